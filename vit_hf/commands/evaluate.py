"""`vit-hf evaluate`: accuracy and loss of a model on a split of a set."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vit_hf.arguments import parse
from vit_hf.arguments.fields import (
    DatasetArguments,
    GivenModelArguments,
    LoadingArguments,
    PreprocessingArguments,
    WaitingArguments,
    flag,
)
from vit_hf.arguments.values import NAMES
from vit_hf.commands.evaluate_report import write_report
from vit_hf.commands.evaluate_sets import (
    about_set,
    check_sets,
    chosen_sets,
    folder_of,
    open_set,
    table,
    write_results,
)
from vit_hf.commands.given import GivenImages, GivenModel, open_model, with_tta
from vit_hf.commands.outputs import check_folder


@dataclass
class EvaluateArguments(
    WaitingArguments, PreprocessingArguments, LoadingArguments, DatasetArguments, GivenModelArguments
):
    """Flags of `vit-hf evaluate`; the model is positional."""

    eval_datasets: tuple[str, ...] = flag(
        (),
        "several sets: imagenet-v2, imagenet-real, imagenet-a, imagenet-r, imagenet-sketch, another copy of one as "
        "NAME=FOLDER or NAME=HUB_ID, or what --dataset_name takes",
        kind=NAMES,
    )
    tta: Literal["none", "flip"] = flag("none", "flip: the mean of the logits of each image and its mirror image")
    output_dir: str | None = flag(None, "where eval_results.json goes (default: the model's folder, else here)")
    split_seed: int | None = flag(
        None,
        "which images are held out of a set without an evaluation split (default: the run's)",
        low=0,
        high=2**32 - 1,
    )
    save_predictions: bool = flag(False, "write predictions.parquet: what the model answers to each image")
    full: bool = flag(False, "more metrics, and report.html with figures, classes and the worst errors as pictures")


def main(argv: list[str]) -> None:
    """Evaluates a model on a split of a dataset; writes eval_results.json."""
    args = parse(EvaluateArguments, argv, prog="vit-hf evaluate", description=main.__doc__, positional="model")
    sets = chosen_sets(args)
    default = Path(args.model) if Path(args.model).is_dir() else Path(".")
    folder, results = Path(args.output_dir) if args.output_dir else default, []
    check_folder(folder)
    from vit_hf.hub.card import refresh_card
    from vit_hf.training.accelerator import build_accelerator, end

    accelerator = build_accelerator(args.ddp_timeout)
    check_sets(sets, args, accelerator)
    given = with_tta(open_model(args.model, args.revision, args.trust_remote_code), args.tta)
    for one in sets:
        images, among = open_set(given, accelerator, one, args)
        accelerator.print(f"preprocessing: {images.preprocessing}")
        predictions = predictions_of(given, images, accelerator, among)
        counted = images.report.collect()
        if accelerator.is_main_process:
            about = {"model": args.model} | about_set(one, images, among, args.dataset_config_name) | {"tta": args.tta}
            about["preprocessing"] = str(images.preprocessing)
            results.append(write(args, folder_of(one, sets, folder), predictions, images, counted | about))
    if accelerator.is_main_process:
        if len(results) > 1:
            print(table(results))
        print(f"written to {write_results(results, folder)}")
        if folder == default and refresh_card(folder):
            print(f"written to {folder / 'README.md'}, the model's card")
    end(accelerator)


def predictions_of(given: GivenModel, images: GivenImages, accelerator: Any, among: Any = None) -> Any:
    """What a model answers to the images, on all processes."""
    from vit_hf.data.sets.subset import identity_of
    from vit_hf.evaluation.evaluate import predict
    from vit_hf.training.objective import loss_of

    model = given.model.to(accelerator.device)
    source = identity_of(images.rows)
    with accelerator.autocast():
        return predict(
            model, images.batches, images.normalise, accelerator, given.class_names,
            loss=loss_of(model.config), among=among, source=source,
        )  # fmt: skip


def write(
    args: EvaluateArguments, folder: Path, predictions: Any, images: GivenImages, about: dict[str, Any]
) -> dict[str, Any]:
    """Files and lines of the main process for one set; its results."""
    from vit_hf.evaluation.evaluate import average_precisions, measure, measure_fully
    from vit_hf.evaluation.intervals import intervals, more_intervals
    from vit_hf.evaluation.predictions import FILE, write_predictions

    folder.mkdir(parents=True, exist_ok=True)
    multi_label = images.splits.multi_label
    more, details = measure_fully(predictions, multi_label) if args.full else ({}, None)
    results = measure(predictions, multi_label) | more
    ends = intervals(predictions)
    if args.full or multi_label:
        ends |= more_intervals(predictions, multi_label)
    if multi_label:
        each = average_precisions(predictions)["average_precision"]
        results["average_precision"] = {predictions.name(number): value for number, value in enumerate(each)}
    results |= {name: pair for name, pair in ends.items() if name.removesuffix("_interval") in results} | about
    print("\n".join(lines(results)))
    if args.save_predictions:
        write_predictions(folder / FILE, predictions, images.rows.source_rows)
        print(f"written to {folder / FILE}")
    if details is not None:
        print(f"written to {write_report(folder, predictions, images, results, details)}")
    return results


def lines(results: dict[str, Any]) -> Iterator[str]:
    """What is printed: a number and its 95 % interval in one line."""
    for key, value in results.items():
        ends = results.get(f"{key}_interval")
        if value is not None and not key.endswith("_interval"):
            yield f"{key:31} {_show(value)}" + (f"  [{ends[0]:.4f}, {ends[1]:.4f}]" if ends else "")


def _show(value: Any) -> str:
    if isinstance(value, dict):  # of each class; all of them are in the file
        lowest = sorted((number, name) for name, number in value.items() if number is not None)[:3]
        return "lowest: " + ", ".join(f"{name} {number:.4f}" for number, name in lowest)
    return f"{value:.4f}" if isinstance(value, float) else str(value)
