"""`vit-hf convert`: weights from and to other formats."""

import dataclasses
from pathlib import Path

from vit_hf.arguments import Parser
from vit_hf.errors import ArgumentError, UserError


def main(argv: list[str]) -> None:
    """Converts weights: from timm (a Hub folder, or a .safetensors file), google-research/vision_transformer (.npz) or a
    model folder, to a model folder or to timm's."""
    parser = Parser(prog="vit-hf convert", description=main.__doc__)
    parser.add_argument("source", metavar="SOURCE", type=Path, help="folder, .safetensors or .npz file")
    parser.add_argument("directory", metavar="DIR", type=Path, help="folder to write; it must not hold a model yet")
    parser.add_argument("--to", default="vit_hf", metavar="{vit_hf,timm}", help="whose format (default: vit_hf)")
    args = parser.parse_args(argv)
    if args.to not in ("vit_hf", "timm"):
        raise ArgumentError(f"--to: {args.to!r} is not one of vit_hf, timm")
    if (args.directory / "config.json").exists() or args.directory.is_file():
        raise UserError(f"{args.directory} holds a model already, or is a file; name another folder")
    import transformers
    from safetensors import SafetensorError

    from vit_hf.data.preprocessing import Preprocessing, own_preprocessing
    from vit_hf.models.configuration_vit import pair
    from vit_hf.models.convert import load_source, save_timm

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, normalisation = load_source(args.source)
        size = pair(model.config.image_size)
        preprocessing = Preprocessing(
            size
        )  # Google's .npz files: input_pipeline.py of google-research/vision_transformer
        if args.source.suffix != ".npz":
            folder = args.source if args.source.is_dir() else args.source.parent
            preprocessing = (own_preprocessing(str(folder), None, size) or preprocessing).at_size(size)
        if normalisation is not None:
            mean, std = map(tuple, normalisation)
            preprocessing = dataclasses.replace(preprocessing, image_mean=mean, image_std=std)
        if args.to == "timm":
            save_timm(model, args.directory, preprocessing.to_timm())
        else:
            model.save_pretrained(args.directory)
            preprocessing.image_processor().save_pretrained(args.directory)
    except (ValueError, OSError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise UserError(f"{args.source}: {' '.join(str(error).split())[:400]}") from None
    describe_conversion(args.source, args.directory, sum(p.numel() for p in model.parameters()))
    if args.to == "timm" and model.config.layer_norm_eps != 1e-6:
        print(
            f"note: timm's norms have an eps of 1e-6, this model {model.config.layer_norm_eps:g}; logits differ by it"
        )
    kind = "timm" if args.to == "timm" else ("stock vit" if model.config.is_stock else model.config.model_type)
    print(f"{args.directory}: {kind}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


def describe_conversion(source: Path, directory: Path, parameters: int) -> None:
    """Writes conversion.json, what was converted and the hashes of both, and the card that tells it."""
    from vit_hf import __version__
    from vit_hf.hub.card import write_card
    from vit_hf.hub.export import write_json
    from vit_hf.hub.lineage import sha256_of

    read = source / "model.safetensors" if source.is_dir() else source
    written = directory / "model.safetensors"
    formats = {".npz": "google-research/vision_transformer", ".safetensors": "timm"}
    if source.is_dir():
        is_timm = "architecture" in (source / "config.json").read_text()
        formats[source.suffix] = (
            "timm" if is_timm and "model_type" not in (source / "config.json").read_text() else "a model folder"
        )
    content = {
        "source": source.resolve().name, "format": formats[source.suffix], "sha256": sha256_of(read) if read.is_file() else None,
        "file": written.name, "file_sha256": sha256_of(written) if written.is_file() else None,
        "parameters": parameters, "vit_hf": __version__,
    }  # fmt: skip
    write_json(content, directory / "conversion.json")
    write_card(directory)
