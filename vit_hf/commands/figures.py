"""`vit-hf figures`: what a model has learned and where it looks, drawn for some images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vit_hf.arguments import parse, pick
from vit_hf.arguments.fields import GivenModelArguments, PreprocessingArguments, flag
from vit_hf.arguments.values import IMAGE_SIZE
from vit_hf.commands.outputs import check_folder
from vit_hf.errors import ArgumentError, UserError, model_errors, note_near

IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")


@dataclass
class FiguresArguments(PreprocessingArguments, GivenModelArguments):
    """Flags of `vit-hf figures`; the model is positional."""

    images: list[str] | None = flag(None, "image files, or folders of them, to look at (default: images of a set)")
    dataset_name: str | None = flag(None, "set to take images of: a name, a Hub id or a folder (default: digits)")
    dataset_config_name: str | None = flag(None, "configuration of the Hub dataset, or options of fractal")
    image_column_name: str | None = flag(None, "image column (default: found by its type)")
    label_column_name: str | None = flag(None, "label column (default: found by its type)")
    eval_split: str | None = flag(None, "split to take images of (default: test, or validation)")
    num_images: int = flag(8, "most images that are taken of a set or of a folder", low=1)
    cka_images: int = flag(256, "most images of a set that the similarity of layers is estimated over", low=32)
    attention_distance: Literal["paper", "renormalised"] = flag(
        "paper", "attention to the class token counts as distance 0, as in the authors' code, or patches alone count"
    )
    image_size: int | tuple[int, int] | None = flag(
        None, "input in pixels: SIDE, or HEIGHTxWIDTH (default: the model's)", kind=IMAGE_SIZE
    )
    output_dir: str | None = flag(None, "folder for the figures and index.html")


def main(argv: list[str]) -> None:
    """Draws what a model has learned and where it looks, as PNG files and one page: index.html."""
    args = parse(FiguresArguments, argv, prog="vit-hf figures", description=main.__doc__, positional="model")
    if args.output_dir is None:
        raise ArgumentError("--output_dir is missing")
    if args.images is not None and args.dataset_name is not None:
        raise ArgumentError("give only one of --images and --dataset_name")
    output_dir = Path(args.output_dir)
    check_folder(output_dir)
    if output_dir.name == "figures" and (output_dir.parent / "run_config.yaml").exists():
        raise UserError(
            f"--output_dir: {output_dir} belongs to the run, which publishes what is in it; name another folder"
        )
    files = image_files(args.images, args.num_images) if args.images is not None else None

    import torch

    from vit_hf.analysis.document import Picture, write_document
    from vit_hf.analysis.gallery import model_figures
    from vit_hf.analysis.similarity import MIN_IMAGES
    from vit_hf.progress import progress

    model, preprocessing = open_drawn(args)
    if files is not None:
        images, what = read_files(files, preprocessing)
        many_images = images
    else:
        images, many_images, what = read_set(args, preprocessing)
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    # what takes longest, by far: the similarity of layers
    bar = progress(len(many_images), "Comparing layers", "image", disable=len(many_images) < MIN_IMAGES)
    with bar, model_errors(model=args.model):
        blocks = model_figures(model, images, preprocessing, many_images, args.attention_distance, bar.update)
    name = Path(args.model).resolve().name if Path(args.model).exists() else args.model
    pixels = " x ".join(map(str, preprocessing.image_size))
    intro = f"{len(images)} images {what}, at {pixels} pixels (height x width): {preprocessing}."
    write_document(output_dir, "index", f"Figures of {name}", [intro, *blocks], formats=("html",))
    for block in blocks:
        print(output_dir / f"{block.name}.png" if isinstance(block, Picture) else f"note: {block}")
    print(f"all on one page: {output_dir / 'index.html'}")


def open_drawn(args: FiguresArguments) -> tuple[Any, Any]:
    """The model, on the host, and its preprocessing at the size that is asked for.

    Raises:
        UserError: it cannot be loaded, or is of a family that has no figures.
    """
    import transformers

    from vit_hf.models.presets import FAMILIES, PRESETS
    from vit_hf.models.transfer import check_channels, load_pretrained

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    note_near(args.model, tuple(PRESETS), "preset")
    with model_errors(model=args.model):
        model = load_pretrained(args.model, revision=args.revision, trust_remote_code=args.trust_remote_code)
        if type(model) not in FAMILIES.values():
            raise ValueError(
                f"its family (model_type) is {model.config.model_type}; figures are drawn of {', '.join(FAMILIES)}"
            )
        check_channels(model.config)
        return model, own_at_size(args, model.config)


def image_files(names: list[str], most: int) -> list[Path]:
    """The files that are named, and of each folder the first `most` images below it, by name.

    Raises:
        UserError: a name that does not exist, or a folder without images.
    """
    files: list[Path] = []
    for path in map(Path, names):
        if not path.exists():
            raise UserError(f"--images: {path} does not exist")
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_FILES and file.is_file())
            if not found:
                raise UserError(f"--images: {path} holds no images; their names end in {', '.join(IMAGE_FILES)}")
            files += found[:most]
        else:
            files.append(path)
    return files


def own_at_size(args: FiguresArguments, config: Any) -> Any:
    """The model's own, at its size or the one asked for; of a model that says nothing both sides are resized. Raises
    ValueError where a ViT's patches do not divide the size."""
    from vit_hf.data.preprocessing import PreprocessingSettings, choose_preprocessing, own_preprocessing
    from vit_hf.models.configuration_vit import pair

    height, width = pair(args.image_size or config.image_size)
    stride = getattr(config, "token_stride", (1, 1))
    if height % stride[0] or width % stride[1]:
        raise ValueError(
            f"--image_size: {height}x{width} pixels are not divided by the model's patches; allowed are multiples of "
            + ("x".join(map(str, stride)) if stride[0] != stride[1] else str(stride[0]))
        )
    own = own_preprocessing(args.model, args.revision, pair(config.image_size))
    settings = pick(PreprocessingSettings, args)
    return choose_preprocessing((height, width), own, list, settings)  # the few images that are drawn decide nothing


def read_files(files: list[Path], preprocessing: Any) -> tuple[Any, str]:
    """The images uint8 (B, H, W, 3), and where they are from. Raises UserError for one that does not decode."""
    import numpy as np

    from vit_hf.data.decode import decode_row

    images = []
    for file in files:
        decoded = decode_row({"bytes": None, "path": str(file)}, preprocessing)
        if isinstance(decoded, str):
            raise UserError(f"--images: {decoded}")
        images.append(decoded)
    return np.stack(images), f"({', '.join(file.name for file in files)})"


def read_set(args: FiguresArguments, preprocessing: Any) -> tuple[Any, Any, str]:
    """Images of the evaluation split to draw, those to compare layers over, and where they are from. Raises UserError
    where none decodes."""
    from vit_hf.analysis.gallery import sample_images
    from vit_hf.data.rows.table import TableRows
    from vit_hf.data.sets.load import SetSettings, load_set
    from vit_hf.data.sets.names import trained_split_seed

    name = args.dataset_name or "digits"
    seed = trained_split_seed(args.model)
    splits = load_set(pick(SetSettings, args, dataset_name=name, revision=None, split_seed=seed, need_train=False))
    rows = TableRows(splits.eval)
    images, many_images = (sample_images(rows, preprocessing, most) for most in (args.num_images, args.cka_images))
    if len(images) == 0:
        raise UserError(f"none of the images that were taken of {name} decodes")
    return images, many_images, f"of {Path(name).name} ({splits.eval_split})"
