"""Arrays in, matplotlib figures out."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure


def learning_curves(runs: dict[str, list[dict[str, Any]]]) -> Figure:
    """Training loss and evaluation accuracy against steps, one colour a run.

    Args:
        runs: {name: the lines of its metrics.jsonl}.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    for number, (name, lines) in enumerate(runs.items()):
        for axes, key in ((loss_axes, "loss"), (accuracy_axes, "eval_accuracy")):
            points = [(line["step"], line[key]) for line in lines if key in line]
            axes.plot(*zip(*points, strict=True) if points else ([], []), color=f"C{number}", label=name,
                      marker="o" if len(points) < 25 else None, markersize=3)  # fmt: skip
    loss_axes.set(xlabel="step", ylabel="training loss", yscale="log")
    accuracy_axes.set(xlabel="step", ylabel="evaluation accuracy")
    accuracy_axes.grid(alpha=0.3)
    loss_axes.grid(alpha=0.3)
    accuracy_axes.legend(loc="lower right")
    return figure


def contact_sheet(
    originals: np.ndarray, augmented: np.ndarray, labels: list[str], mixed_labels: list[list[str]]
) -> Figure:
    """Each image of a set beside what becomes of it in training, one row an image.

    Args:
        originals: uint8 (N, H, W, 3). augmented: uint8 (N, M, H, W, 3).
        labels: of the originals. mixed_labels: N lists of M texts, under the augmented ones.
    """
    rows, columns = augmented.shape[:2]
    figure = Figure(figsize=(1.5 * (columns + 1), 1.75 * rows), layout="constrained")
    for row, line in enumerate(figure.subplots(rows, columns + 1, squeeze=False)):
        pictures = [originals[row], *augmented[row]]
        for axes, picture, text in zip(line, pictures, [labels[row], *mixed_labels[row]], strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set_axis_off()
            axes.set_title(text, fontsize=7, fontweight="bold" if axes is line[0] else "normal")
    return figure
