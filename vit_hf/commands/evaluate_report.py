"""`vit-hf evaluate --full`: one page about how a model did on a set, report.html."""

from pathlib import Path
from typing import Any

import numpy as np  # light enough for --help

from vit_hf.commands.given import GivenImages

MATRIX_CLASSES = 30  # with more of them a table of pairs is read more easily than a figure
PAIRS, WORST, CLASSES = 20, 24, 200


def write_report(folder: Path, predictions: Any, images: GivenImages, results: dict[str, Any], details: Any) -> Path:
    """Writes report.html, which holds its pictures, and the pictures beside it.

    Args:
        results: numbers, their intervals and what they are of. details: of `measure_fully`.
    """
    from vit_hf.analysis.document import Heading, write_document

    name = results["model"] if not Path(results["model"]).exists() else Path(results["model"]).resolve().name
    intro = (
        f"{name} on {len(predictions):,} images of {results['dataset_name']} ({results['eval_split']}). "
        f"Images: {results['preprocessing']}. Intervals are 95 % intervals by bootstrap over the images; they say nothing of "
        "another seed of training."
    )
    blocks: list[Any] = [intro, metrics_table(results), Heading("Calibration"), reliability(details)]
    if details.confusion_matrix is not None:
        blocks += [Heading("Confusions"), *confusions(predictions, details)]
        blocks += [Heading("Classes"), *classes(predictions, details)]
    elif "average_precision" in results:
        blocks += [Heading("Classes"), average_precisions(results["average_precision"])]
    blocks += [Heading("Worst errors"), *worst_errors(predictions, images)]
    write_document(folder, "report", f"Evaluation of {name}", blocks, formats=("html",))
    return folder / "report.html"


def metrics_table(results: dict[str, Any]) -> Any:
    from vit_hf.analysis.document import Table

    rows = []
    for name, value in results.items():
        if name.startswith("eval_") and isinstance(value, int | float):
            ends = results.get(f"{name}_interval")
            shown = f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
            rows.append([name, shown, f"{ends[0]:.4f} to {ends[1]:.4f}" if ends else ""])
    return Table("evaluation_metrics", "What was measured.", ["metric", "value", "95 % interval"], rows)


def reliability(details: Any) -> Any:
    from vit_hf.analysis.document import Picture
    from vit_hf.analysis.judged import reliability_diagram

    bins = details.calibration
    error = bins["expected_calibration_error"]
    figure = reliability_diagram(bins["bin_samples"], bins["bin_confidence"], bins["bin_accuracy"], error)
    caption = (
        "How often an answer is right, by the probability that the model gives it: fifteen bins of equal width. Under the "
        "dashed line the model is too sure of itself. Below: how many images are in each bin."
    )
    return Picture("evaluation_reliability", caption, figure)


def confusions(predictions: Any, details: Any) -> list[Any]:
    """The matrix of few classes, and the pairs that are confused most."""
    from vit_hf.analysis.document import Picture, Table
    from vit_hf.analysis.judged import confusion_figure

    matrix, blocks = details.confusion_matrix, []
    seen = np.flatnonzero(matrix.sum(axis=0) + matrix.sum(axis=1))
    if len(seen) <= MATRIX_CLASSES:
        figure = confusion_figure(matrix[np.ix_(seen, seen)], [predictions.name(number) for number in seen])
        blocks.append(
            Picture("evaluation_confusion", "Labels in rows, answers in columns: numbers of images.", figure)
        )
    wrong = matrix * (1 - np.eye(len(matrix), dtype=matrix.dtype))
    order = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    of = matrix.sum(axis=1)
    rows = []
    for label, answer in zip(*np.unravel_index(order, wrong.shape), strict=True):
        if number := int(wrong[label, answer]):
            share = f"{100 * number / of[label]:.1f} %"
            rows.append([predictions.name(label), predictions.name(answer), str(number), share])
    if not rows:
        return [*blocks, "No image of this set is confused with another class."]
    caption = f"The pairs that are confused most (of {int((wrong > 0).sum()):,})."
    columns = ["label", "answer", "images", "share of the label's images"]
    return [*blocks, Table("evaluation_confused_pairs", caption, columns, rows)]


def classes(predictions: Any, details: Any) -> list[Any]:
    """The accuracy of each class, the worst first."""
    from vit_hf.analysis.document import Table

    counts = details.confusion_matrix.sum(axis=1)
    known = [(share, number) for number, share in enumerate(details.per_class_accuracy) if share is not None]
    rows = [
        [predictions.name(number), f"{int(counts[number]):,}", f"{share:.4f}"]
        for share, number in sorted(known)[:CLASSES]
    ]
    caption = "Accuracy of each class, the lowest first."
    if len(known) > CLASSES:
        caption += f" These are {CLASSES} of {len(known)} classes."
    return [Table("evaluation_classes", caption, ["class", "images", "accuracy"], rows)]


def average_precisions(each: dict[str, float | None]) -> Any:
    """The average precision of each class of images with several labels, the worst first."""
    from vit_hf.analysis.document import Table

    known = sorted((value, name) for name, value in each.items() if value is not None)
    caption = "Average precision of each class, the lowest first."
    if len(known) > CLASSES:
        caption += f" These are {CLASSES} of {len(known)} classes."
    rows = [[name, f"{value:.4f}"] for value, name in known[:CLASSES]]
    return Table("evaluation_classes", caption, ["class", "average precision"], rows)


def worst_errors(predictions: Any, images: GivenImages) -> list[Any]:
    """The wrong answers of the highest loss as pictures, and where to find them."""
    from vit_hf.analysis.document import Picture, Table
    from vit_hf.analysis.judged import picture_sheet

    wrong = np.flatnonzero(~predictions.correct)
    if len(wrong) == 0:
        return ["No answer is wrong."]
    places = wrong[np.argsort(-predictions.loss[wrong], kind="stable")][:WORST]
    pixels, paths, places = read_pictures(images, predictions.index, places)
    if len(places) == 0:
        return ["None of the images with a wrong answer decodes any more."]
    titles, rows = [], []
    for place, path in zip(places, paths, strict=True):
        label, answer = label_text(predictions, place), predictions.name(predictions.top5[place, 0])
        sure, row = predictions.probabilities[place, 0], str(source_row(images, predictions.index[place]))
        titles.append(f"label {short(label)}\nanswer {short(answer)} ({sure:.2f})\nrow {row}")
        rows.append([row, label, answer, f"{sure:.4f}", f"{predictions.loss[place]:.4f}", path or ""])
    heading = f"{len(places)} of {len(wrong):,} wrong answers: those of the highest loss"
    sheet = Picture("evaluation_worst_errors", heading + ".", picture_sheet(pixels, titles, heading))
    columns = ["row", "label", "answer", "probability", "loss", "path"]
    where = " ".join(filter(None, images.rows.source_name)) or "the set"
    return [sheet, Table("evaluation_worst_errors", f"The same, by the rows of {where}.", columns, rows)]


def read_pictures(
    images: GivenImages, index: np.ndarray, places: np.ndarray
) -> tuple[np.ndarray, list[str | None], np.ndarray]:
    """Images as the model saw them, uint8 (B, H, W, 3); their paths, where the set has them; and the places that are
    left: those that decode.

    Args:
        index: int64 (N,), rows of the split. places: into it.
    """
    from vit_hf.data.decode import decode_row

    pixels, paths, left = [], [], []
    for place in places:  # one by one: rows far apart of a stream
        (image,), _ = images.rows.read(index[place : place + 1])
        decoded = decode_row(image, images.preprocessing)
        if not isinstance(decoded, str):
            pixels.append(decoded)
            paths.append(image.get("path") if isinstance(image, dict) else None)
            left.append(place)
    return np.stack(pixels) if pixels else np.zeros((0, 1, 1, 3), np.uint8), paths, np.array(left, dtype=np.int64)


def source_row(images: GivenImages, row: int) -> int:
    """The number of an image in the split of the set that it was taken from."""
    return int(images.rows.source_rows[row])


def label_text(predictions: Any, place: int) -> str:
    """The label of an image, or all of them."""
    label = predictions.labels[place]
    if predictions.labels.ndim == 1:
        return predictions.name(label)
    return ", ".join(predictions.name(number) for number in np.flatnonzero(label)) or "none"


def short(name: str) -> str:
    return name if len(name) <= 18 else name[:17] + "…"
