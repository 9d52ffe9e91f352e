"""Arrays in, matplotlib figures out."""

from typing import Any

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
