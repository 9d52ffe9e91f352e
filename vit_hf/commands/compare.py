"""`vit-hf compare`: two models on the same images, with what chance alone would explain."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vit_hf.arguments import parse, pick
from vit_hf.arguments.fields import DatasetArguments, LoadingArguments, PreprocessingArguments, WaitingArguments, flag
from vit_hf.commands.evaluate_report import label_text, read_pictures, short, source_row
from vit_hf.commands.given import GivenImages, open_images, open_model, set_settings, split_revision
from vit_hf.commands.outputs import check_folder
from vit_hf.errors import UserError

SHOWN = 30  # images of the contact sheet
THUMBNAIL = 96  # pixels a side, where no model says how large it takes them


@dataclass
class CompareArguments(WaitingArguments, PreprocessingArguments, LoadingArguments, DatasetArguments):
    """Flags of `vit-hf compare`; the two models are positional."""

    first: str = flag(
        "", "folder or Hub id (ID@REVISION) of a model; or a predictions.parquet, or a folder that has one"
    )
    second: str = flag("", "the other one")
    trust_remote_code: bool = flag(False, "run model code that comes with a Hub repository")
    split_seed: int | None = flag(
        None,
        "which images are held out of a set without an evaluation split (default: the run's)",
        low=0,
        high=2**32 - 1,
    )
    output_dir: str | None = flag(
        None, "folder for comparison.json and comparison.png (default: comparison, beside the first model; else here)"
    )


def main(argv: list[str]) -> None:
    """Compares two models on the same images: differences with paired intervals, McNemar's test, and the images that they
    answer differently. With --dataset_name both are evaluated; a predictions.parquet, and without --dataset_name a folder
    that has one, is read."""
    names = ("first", "second")
    args = parse(CompareArguments, argv, prog="vit-hf compare", description=main.__doc__, positional=names)
    first = Path(args.first)
    beside = first.resolve().parent if first.exists() else Path(".")
    folder = Path(args.output_dir) if args.output_dir else beside / "comparison"
    check_folder(folder)
    files = [saved_file(name, args.dataset_name) for name in (args.first, args.second)]
    from vit_hf.evaluation.intervals import compare
    from vit_hf.evaluation.predictions import read_predictions
    from vit_hf.training.accelerator import build_accelerator, end

    accelerator = build_accelerator(args.ddp_timeout)
    sides, images = [], None
    for name, file in zip((args.first, args.second), files, strict=True):
        predictions, opened = (read_predictions(file), None) if file else evaluated(name, args, accelerator)
        sides.append(predictions)
        images = images or opened
    sides[1] = numbered_alike(*sides)
    check_same(*sides, args.first, args.second)
    if accelerator.is_main_process:
        found = {"first": args.first, "second": args.second, "dataset_name": args.dataset_name} | compare(*sides)
        found |= {"source": sides[0].source, "different_answers": len(different(*sides))}
        print(table(found))
        write(folder, sides, images or only_images(args, accelerator, sides[0]), found)
    end(accelerator)


def saved_file(name: str, dataset_name: str | None) -> Path | None:
    """The file of predictions that a word of the command names; None: it is a model to be evaluated.

    Raises:
        UserError: neither predictions nor a set to evaluate on.
    """
    from vit_hf.evaluation.predictions import FILE

    path = Path(name)
    if path.suffix == ".parquet":
        return path
    if dataset_name is not None:
        return None
    if (path / FILE).is_file():
        return path / FILE
    raise UserError(
        f"{name} holds no {FILE}: --dataset_name says on what it is to be evaluated; or write them by "
        "`vit-hf evaluate --save_predictions`"
    )


def evaluated(name: str, args: CompareArguments, accelerator: Any) -> tuple[Any, GivenImages]:
    """What a model answers to the images as it takes them."""
    from vit_hf.commands.evaluate import predictions_of
    from vit_hf.data.feed import LoadingSettings
    from vit_hf.data.preprocessing import PreprocessingSettings

    model, revision = split_revision(name)
    given = open_model(model, revision, args.trust_remote_code)
    inputs, loading = pick(PreprocessingSettings, args), pick(LoadingSettings, args)
    images = open_images(given, accelerator, set_settings(args, model), inputs, loading)
    accelerator.print(f"{name}: {images.preprocessing}")
    predictions = predictions_of(given, images, accelerator)
    images.report.collect()
    return predictions, images


def numbered_alike(one: Any, two: Any) -> Any:
    """The second of two predictions with lists of labels, its classes in the order of the first's, by their names; as it
    is where one set of names is not the other's."""
    if one.labels.ndim == 1 or two.labels.ndim == 1 or one.class_names == two.class_names:
        return two
    if sorted(one.class_names) != sorted(two.class_names) or len(set(one.class_names)) < len(one.class_names):
        return two
    order = np.array([two.class_names.index(name) for name in one.class_names])
    return dataclasses.replace(
        two, labels=two.labels[:, order], scores=two.scores[:, order], top5=np.argsort(order)[two.top5],
        class_names=one.class_names,
    )  # fmt: skip


def check_same(one: Any, two: Any, first: str, second: str) -> None:
    """Raises UserError where two predictions are not of the same images with the same labels."""
    if one.source and two.source and one.source != two.source:
        raise UserError(
            f"{first} was evaluated on {one.source!r}, {second} on {two.source!r}; evaluate both on one set"
        )
    if not np.array_equal(one.index, two.index):
        raise UserError(
            f"{first} was evaluated on {len(one)} images, {second} on {len(two)}"
            + (" others" if len(one) == len(two) else "")
            + "; evaluate both on one set"
        )
    if one.labels.shape[1:] != two.labels.shape[1:]:
        counts = [f"{side.labels.shape[1]} classes, several an image" if side.labels.ndim == 2 else "one label an image"
                  for side in (one, two)]  # fmt: skip
        raise UserError(f"{first} was evaluated on {counts[0]}, {second} on {counts[1]}; evaluate both on one set")
    differ = label_keys(one, two)[0] != label_keys(one, two)[1]
    differ = differ.any(axis=1) if differ.ndim == 2 else differ
    if differ.any():
        place = int(np.argmax(differ))
        raise UserError(
            f"row {one.index[place]} is {label_text(one, place)!r} for {first} and {label_text(two, place)!r} "
            f"for {second} (and {int(differ.sum()) - 1} more differ); evaluate both on one set"
        )


def label_keys(one: Any, two: Any, answers: bool = False) -> list[np.ndarray]:
    """What stands for the labels (or the answers) of both, so that the same classes are the same: their numbers, or
    their names, where the models number the classes differently."""
    by_number = one.labels.ndim == 2 or np.array_equal(one.labels, two.labels)
    columns = [side.top5[:, 0] if answers else side.labels for side in (one, two)]
    if by_number:
        return columns
    return [
        np.array([side.name(number) for number in column]) for side, column in zip((one, two), columns, strict=True)
    ]


def only_images(args: CompareArguments, accelerator: Any, predictions: Any) -> Any:
    """The images of the set, where no model was evaluated on it; None where no set is named.

    Raises:
        UserError: they are not those of the predictions.
    """
    if args.dataset_name is None:
        return None
    from types import SimpleNamespace

    from vit_hf.data.preprocessing import Preprocessing
    from vit_hf.data.sets.load import load_set
    from vit_hf.data.sets.subset import identity_of

    rows = load_set(set_settings(args, args.first)).rows("eval")
    if predictions.source and identity_of(rows) != predictions.source:
        raise UserError(
            f"--dataset_name: {args.first} is of {predictions.source!r}, this set is {identity_of(rows)!r}; name that set, "
            "or leave the flag out"
        )
    return SimpleNamespace(rows=rows, preprocessing=Preprocessing((THUMBNAIL, THUMBNAIL)))


def different(one: Any, two: Any) -> np.ndarray:
    """The places at which two predictions have different answers."""
    return np.flatnonzero(np.not_equal(*label_keys(one, two, answers=True)))


def write(folder: Path, sides: list[Any], images: Any, found: dict[str, Any]) -> None:
    """comparison.json, and comparison.png where there are images that differ."""
    from vit_hf.hub.export import write_json

    one, two = sides
    differ = different(one, two)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.png").unlink(missing_ok=True)  # of an earlier comparison
    if images is None:
        print("note: no contact sheet is drawn: --dataset_name says where the images are")
    elif len(differ):
        gap = np.abs(one.loss - two.loss)[differ]
        places = differ[np.argsort(-gap, kind="stable")][:SHOWN]
        draw(folder / "comparison.png", sides, images, places, len(differ))
        print(f"written to {folder / 'comparison.png'}")
    write_json(found, folder / "comparison.json")
    print(f"written to {folder / 'comparison.json'}")


def table(found: dict[str, Any]) -> str:
    """What is printed."""
    lines = [f"A: {found['first']}", f"B: {found['second']}", f"{found['samples']} images, 95 % intervals of A - B"]
    for name in filter(found.__contains__, ("accuracy", "map", "loss", "brier")):
        (a, b), (low, high) = found[name], found[f"{name}_difference_interval"]
        lines.append(
            f"{name:9} A {a:.4f}  B {b:.4f}  A - B {found[f'{name}_difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
        )
    lines.append(
        f"right: both {found['both_right']}, only A {found['only_first_right']}, only B {found['only_second_right']}, "
        f"none {found['none_right']}; different answers: {found['different_answers']}"
    )
    return "\n".join([*lines, f"McNemar's exact test: p = {found['mcnemar_p_value']:.4g}"])


def draw(path: Path, sides: list[Any], images: Any, places: np.ndarray, of: int) -> None:
    """The images at `places` as one picture: label, A's and B's answer above each."""
    from vit_hf.analysis.judged import picture_sheet

    one, two = sides
    pixels, _, places = read_pictures(images, one.index, places)
    if len(places) == 0:
        return
    titles = []
    for place in places:
        said = [f"{short(side.name(side.top5[place, 0]))} ({side.probabilities[place, 0]:.2f})" for side in sides]
        label, row = short(label_text(one, place)), source_row(images, one.index[place])
        titles.append(f"label {label}\nA: {said[0]}\nB: {said[1]}\nrow {row}")
    heading = f"{len(places)} of {of} images with different answers: those whose losses differ most"
    temporary = path.with_name(path.name + ".tmp")
    picture_sheet(pixels, titles, heading).savefig(temporary, format="png", dpi=120)
    temporary.replace(path)
