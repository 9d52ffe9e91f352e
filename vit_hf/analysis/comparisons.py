"""Models side by side: accuracies with their intervals in, matplotlib figures out. An accuracy is between 0 and 1, and so
is an interval as it is drawn: what lies beyond is cut off, which takes nothing from the chance that it holds the true value."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

from vit_hf.analysis.curves import legend_label

Point = tuple[float, float | None]  # a mean, and half the width of its interval where it has one


def bars(mean: float, half_width: float | None) -> tuple[float, float]:
    """How far the interval reaches below and above the mean, within [0, 1]."""
    width = half_width or 0.0
    return min(width, max(mean, 0.0)), min(width, max(1.0 - mean, 0.0))


def accuracy_by_category(series: dict[str, dict[str, Point]], places: tuple[str, ...], xlabel: str) -> Figure:
    """One line a model over names in the order of `places`: {"ViT": {"10": (0.61, 0.02), "all": (0.98, None)}}."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    values = [place for place in places if any(place in points for points in series.values())]
    for number, (label, points) in enumerate(series.items()):
        shift = 0.05 * (number - (len(series) - 1) / 2)  # so that intervals do not hide each other
        drawn = [x for x in values if x in points]
        means, widths = zip(*(points[x] for x in drawn), strict=True)
        axes.errorbar(
            [values.index(x) + shift for x in drawn],
            means,
            np.transpose([bars(*point) for point in zip(means, widths, strict=True)]),
            label=legend_label(label),
            marker="o",
            capsize=3,
        )
    axes.set(xticks=range(len(values)), xticklabels=values, xlabel=xlabel)
    return _finished(figure, axes)


def accuracy_by_cost(points: dict[str, tuple[float, Point]]) -> Figure:
    """One point a model against its operations for an image, e.g. {"ViT": (42e6, (0.98, 0.01))}."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, (label, (flops, (mean, width))) in enumerate(points.items()):
        axes.errorbar(flops / 1e6, mean, np.transpose([bars(mean, width)]), label=legend_label(label), marker="os^Dv"[number // 10 % 5], capsize=3, linestyle="none")  # fmt: skip
    axes.set(xscale="log", xlabel="forward pass of one image, MFLOP")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    return _finished(figure, axes)


def accuracy_by_row(points: dict[str, Point]) -> Figure:
    """One line a model, the first on top."""
    figure = Figure(figsize=(7, 1.2 + 0.4 * len(points)), layout="constrained")
    axes = figure.subplots()
    for place, (mean, width) in enumerate(points.values()):
        axes.errorbar(mean, place, xerr=np.transpose([bars(mean, width)]), marker="o", color="C0", capsize=3)
    axes.set(
        yticks=range(len(points)),
        yticklabels=map(legend_label, points),
        xlabel="accuracy",
        ylim=(len(points) - 0.5, -0.5),
    )
    axes.grid(alpha=0.3)
    return figure


def _finished(figure: Figure, axes: Axes) -> Figure:
    axes.set_ylabel("accuracy")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure
