"""`vit-hf evaluate`: accuracy and loss of a model on a split of a set."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit_hf.arguments import parse, pick
from vit_hf.arguments.fields import (
    DatasetArguments,
    GivenModelArguments,
    LoadingArguments,
    PreprocessingArguments,
    WaitingArguments,
    flag,
)
from vit_hf.commands.given import GivenImages, GivenModel, open_images, open_model, set_settings
from vit_hf.errors import ArgumentError


@dataclass
class EvaluateArguments(
    WaitingArguments, PreprocessingArguments, LoadingArguments, DatasetArguments, GivenModelArguments
):
    """Flags of `vit-hf evaluate`; the model is positional."""

    output_dir: str | None = flag(None, "where eval_results.json goes (default: the model's folder, else here)")
    split_seed: int | None = flag(
        None,
        "which images are held out of a set without an evaluation split (default: the run's)",
        low=0,
        high=2**32 - 1,
    )
    save_predictions: bool = flag(False, "write predictions.parquet: what the model answers to each image")


def main(argv: list[str]) -> None:
    """Evaluates a model on a split of a dataset; writes eval_results.json."""
    args = parse(EvaluateArguments, argv, prog="vit-hf evaluate", description=main.__doc__, positional="model")
    if args.dataset_name is None:
        raise ArgumentError("--dataset_name is missing")
    from vit_hf.data.feed import LoadingSettings
    from vit_hf.data.preprocessing import PreprocessingSettings
    from vit_hf.training.accelerator import build_accelerator, end

    accelerator = build_accelerator(args.ddp_timeout)
    given = open_model(args.model, args.revision, args.trust_remote_code)
    sets, inputs = set_settings(args, args.model), pick(PreprocessingSettings, args)
    images = open_images(given, accelerator, sets, inputs, pick(LoadingSettings, args))
    accelerator.print(f"preprocessing: {images.preprocessing}")
    predictions = predictions_of(given, images, accelerator)
    counted = images.report.collect()
    if accelerator.is_main_process:
        about = {"model": args.model, "dataset_name": args.dataset_name, "eval_split": images.splits.eval_split}
        about["preprocessing"] = str(images.preprocessing)
        write(args, predictions, counted | about)
    end(accelerator)


def predictions_of(given: GivenModel, images: GivenImages, accelerator: Any) -> Any:
    """What a model answers to the images, on all processes."""
    from vit_hf.evaluation.evaluate import predict

    model = given.model.to(accelerator.device)
    with accelerator.autocast():
        return predict(model, images.batches, images.normalise, accelerator, given.class_names)


def write(args: EvaluateArguments, predictions: Any, about: dict[str, Any]) -> None:
    """Files and lines of the main process."""
    from vit_hf.evaluation.evaluate import measure
    from vit_hf.evaluation.predictions import FILE, write_predictions
    from vit_hf.hub.export import write_json

    default = Path(args.model) if Path(args.model).is_dir() else Path(".")
    folder = Path(args.output_dir) if args.output_dir else default
    folder.mkdir(parents=True, exist_ok=True)
    results = measure(predictions) | about
    print("\n".join(f"{key:20} {_show(value)}" for key, value in results.items()))
    if args.save_predictions:
        write_predictions(folder / FILE, predictions)
        print(f"written to {folder / FILE}")
    write_json(results, folder / "eval_results.json")
    print(f"written to {folder / 'eval_results.json'}")


def _show(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
