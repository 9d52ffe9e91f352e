"""How a model was judged, as pictures: arrays in, matplotlib figures out."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure


def reliability_diagram(samples: Sequence[int], confidence: Sequence, accuracy: Sequence, error: float) -> Figure:
    """The share of right answers over the probability that the model gives them, with the gap between the two, above how
    many images each bin holds.

    Args:
        samples: of each bin of equal width. confidence, accuracy: their means, None where a bin is empty.
        error: the expected calibration error.

    Source: Guo et al. 2017, arXiv 1706.04599, figure 1.
    """
    figure = Figure(figsize=(5.4, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    width = 1 / len(samples)
    for place, (number, sure, right) in enumerate(zip(samples, confidence, accuracy, strict=True)):
        if number:
            left = place * width
            above.bar(left, right, width, align="edge", color="C0", edgecolor="white")
            above.bar(left, sure - right, width, bottom=right, align="edge", fill=False, edgecolor="C3", hatch="///")
    above.plot([0, 1], [0, 1], linestyle="--", color="grey", linewidth=1)
    above.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy", title=f"Reliability: calibration error {error:.4f}")
    above.bar([0], [0], color="C0", label="accuracy")
    above.bar([0], [0], fill=False, edgecolor="C3", hatch="///", label="gap to the mean probability")
    above.legend(fontsize=8, loc="upper left")
    below.bar(np.arange(len(samples)) * width, samples, width, align="edge", color="grey", edgecolor="white")
    below.set(xlabel="probability of the answer", ylabel="images")
    return figure


def confusion_figure(matrix: np.ndarray, names: Sequence[str]) -> Figure:
    """Which class is answered for which: the share of each class's images, and their number where there is room.

    Args:
        matrix: int (K, K), a row a true class. names: of the K classes.
    """
    count = len(names)
    side = 2.2 + 0.42 * count
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    shown = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    for row, column in zip(*np.nonzero(matrix), strict=True):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(matrix[row, column]), ha="center", va="center", fontsize=7, color=colour)
    short = [name if len(name) <= 24 else name[:23] + "…" for name in names]
    axes.set_xticks(range(count), short, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(range(count), short, fontsize=8, parse_math=False)
    axes.set(xlabel="answer", ylabel="label", title="Confusions")
    figure.colorbar(shown, ax=axes, label="share of the images of a label", shrink=0.8)
    return figure


def picture_sheet(images: np.ndarray, titles: Sequence[str], heading: str) -> Figure:
    """Images with a few lines above each.

    Args:
        images: uint8 (B, H, W, 3), B at least 1. titles: of each.
    """
    columns = min(6, len(images))
    rows, lines = -(-len(images) // columns), max(title.count("\n") for title in titles) + 1
    height = 1.7 * images.shape[1] / images.shape[2] + 0.15 * lines
    figure = Figure(figsize=(1.75 * columns + 0.2, height * rows + 0.5), layout="constrained")
    figure.suptitle(heading, fontsize=10)
    for number, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.set_axis_off()
        if number < len(images):
            axes.imshow(images[number], interpolation="nearest")
            axes.set_title(titles[number], fontsize=7, parse_math=False)
    return figure
