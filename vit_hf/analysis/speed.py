"""How fast models answer: the rows of bench.json in, a figure out."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vit_hf.analysis.curves import legend_label

BESIDE = 1.04  # from one variant of a model to the next, along the logarithmic axis


def speed_by_cost(rows: list[dict[str, Any]]) -> Figure | None:
    """Latency at batch 1 and best throughput over the operations of an image, a mark a variant; None
    where no model's operations are known."""
    drawn = [row for row in rows if row["failed"] is None and row["gflops"]]
    if not drawn:
        return None
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    variants = list(dict.fromkeys(row["variant"] for row in drawn))
    for number, variant in enumerate(variants):
        points = sorted((row for row in drawn if row["variant"] == variant), key=lambda row: row["gflops"])
        shift = BESIDE ** (number - (len(variants) - 1) / 2)  # so that no mark hides another
        costs, marker = [row["gflops"] * shift for row in points], "os^Dv"[number % 5]
        below, above = (
            [abs(row[f"latency_{name}_ms"] - row["latency_p50_ms"]) for row in points] for name in ("p50", "p95")
        )
        medians = [row["latency_p50_ms"] for row in points]
        left.errorbar(costs, medians, [below, above], label=variant, marker=marker, capsize=3, linestyle="none")
        right.plot(costs, [row["images_per_second"] for row in points], label=variant, marker=marker, linestyle="none")
    left.set(ylabel="ms for one image, median and to the 95th percentile", yscale="log")
    right.set(ylabel="images/s at the best batch size", yscale="log")
    for axes in (left, right):
        _name_the_models(axes, drawn)
    left.legend()
    return figure


def _name_the_models(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """The models stand above the upper edge, each over its points."""
    costs = {row["model"]: row["gflops"] for row in rows}
    axes.set(xscale="log", xlabel="forward pass of one image, GFLOP")
    axes.set_xmargin(0.1)
    axes.grid(alpha=0.3)
    for name, cost in costs.items():
        axes.axvline(cost, color="0.85", zorder=0)
        axes.annotate(
            legend_label(name), (cost, 1.01), xycoords=("data", "axes fraction"), rotation=40, va="bottom", ha="left",
            fontsize=7, color="0.3",
        )  # fmt: skip
