"""`vit-hf space`: a model as a page of the Hub."""

from dataclasses import dataclass
from pathlib import Path

from vit_hf.arguments import parse
from vit_hf.arguments.fields import GivenModelArguments, flag
from vit_hf.commands.outputs import check_folder
from vit_hf.errors import ArgumentError, UserError, model_errors


@dataclass
class SpaceArguments(GivenModelArguments):
    """A Space."""

    output_dir: str | None = flag(None, "folder to write; new or empty")
    images: list[str] | None = flag(
        None, "example pictures (default: of the evaluation split of the run that made the model)"
    )


def main(argv: list[str]) -> None:
    """Writes a folder for a Space of the Hub: a page with the five likeliest classes of a picture and, of a Vision
    Transformer, where it looks. `python app.py` serves it (pip install 'gradio>=6'); a folder's model is copied into it."""
    args = parse(SpaceArguments, argv, prog="vit-hf space", description=main.__doc__, positional="model")
    if not args.output_dir:
        raise ArgumentError("--output_dir is missing")
    check_folder(args.output_dir)
    from PIL import Image

    from vit_hf.hub.space import EXAMPLES, needs_code, read_config, write_space

    with model_errors(model=args.model):
        config, commit = read_config(args.model, args.revision)
    ours = str(config.get("model_type", "")).startswith("vit_hf")
    if needs_code(config) and not (ours or args.trust_remote_code):
        raise UserError(
            f"{args.model} comes with code of its own, which the page would run; --trust_remote_code allows it"
        )
    if args.images:
        images = []
        for path in args.images:
            try:
                images.append(Image.open(path).convert("RGB"))
            except OSError as error:
                raise UserError(f"--images: {path} is no picture ({' '.join(str(error).split())[:120]})") from None
    else:
        images = examples_of(args.model, EXAMPLES)
    folder = Path(args.output_dir)
    write_space(folder, args.model, commit, needs_code(config), images)
    print(f"{folder}: a Space with {len(images)} examples; look at it: cd {folder} && python app.py")
    print(f"publish it: hf upload --repo-type space --space-sdk gradio NAME {folder} .")


def examples_of(model: str, count: int) -> list:
    """Pictures of the evaluation split of the run that made a model, evenly over it; [] where that is not known."""
    import numpy as np
    import yaml

    from vit_hf.arguments import RunArguments, pick
    from vit_hf.arguments.parser import convert
    from vit_hf.data.decode import open_image
    from vit_hf.data.sets.load import SetSettings, load_set

    path = Path(model) / "run_config.yaml"
    if not path.is_file():
        print("note: no run_config.yaml beside the model, so the page has no examples; give some by --images")
        return []
    fields = RunArguments.__dataclass_fields__
    told = yaml.safe_load(path.read_text())
    args = RunArguments(**{name: convert(fields[name], value) for name, value in told.items() if name in fields})
    rows = load_set(pick(SetSettings, args, revision=None, need_train=False)).rows("eval")
    values, _ = rows.read(np.arange(min(count, len(rows))) * len(rows) // min(count, len(rows)))
    return [open_image(value).convert("RGB") for value in values]
