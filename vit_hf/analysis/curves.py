"""The course of runs as curves: the lines of their metrics.jsonl in, matplotlib figures and CSV out.

What a panel shows is a pair of keys of those lines, so a run that is not finished, or of which nothing else was copied,
is drawn as far as it went. This module must not know folders, or what else a run leaves behind.
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from vit_hf.evaluation.main_metric import MAIN_METRICS, main_metric

Lines = list[dict[str, Any]]  # the lines of one run's metrics.jsonl

LEGEND_INSIDE = 6  # with more runs, or with names longer than so many characters, the legend would cover the curves
LEGEND_INSIDE_LENGTH = 24
LABEL_LENGTH = 48  # characters of a run's name in a legend
APART = 4  # runs whose numbers of steps are further apart are drawn against the share of their steps, too
WIDE = 10  # values that span more than tenfold are on a logarithmic axis, where the panel has one
LINE_STYLES = ("-", "--", "-.", ":")  # after ten colours the next style begins


SHARE = "share of steps"  # a key that lines are given here


class Panel(NamedTuple):
    """One pair of axes: two keys of the lines, and what is written beside them. x is divided by `x_unit`; `log_y`: y may
    be on a logarithmic axis; `from_zero`: y is a share or a rate, whose axis begins at 0."""

    x: str
    y: str
    x_label: str
    y_label: str
    log_y: bool = False
    from_zero: bool = False
    x_unit: float = 1.0


LEARNING = (
    Panel("step", "loss", "step", "training loss", log_y=True),
    Panel("step", "eval_accuracy", "step", "evaluation accuracy"),
)
OPTIMISATION = (
    Panel("step", "learning_rate", "step", "learning rate"),
    Panel("step", "grad_norm", "step", "gradient norm before clipping", log_y=True),
)
THROUGHPUT = (
    Panel("step", "images_per_second", "step", "images / s", from_zero=True),
    Panel("step", "data_wait_fraction", "step", "share of time waiting for data", from_zero=True),
)
UTILISATION = (Panel("step", "mfu", "step", "model FLOPs utilisation", from_zero=True),)  # known on some devices only
ACCURACY = (
    Panel("images_seen", "eval_accuracy", "images seen", "evaluation accuracy"),
    Panel("training_flops", "eval_accuracy", "training FLOPs", "evaluation accuracy"),
    Panel("wall_time_seconds", "eval_accuracy", "hours since the start", "evaluation accuracy", x_unit=3600.0),
)


def learning_curves(runs: dict[str, Lines]) -> Figure:
    """Training loss and evaluation accuracy against steps, one colour a run.

    Args:
        runs: {name: the lines of its metrics.jsonl}.
    """
    return draw_curves(runs, LEARNING)


def draw_curves(runs: dict[str, Lines], panels: Sequence[Panel]) -> Figure:
    """Panels side by side with all runs in each, one colour and line style a run, and one legend.

    A panel that no run has points for is left out, unless all are. Loss and gradient norm are on a logarithmic axis
    where they span more than tenfold, and so is what a run has cost where the runs end that far apart. On an axis of
    steps a run of few of them is a line at the left edge: where runs are that unlike in length, a second row of panels has
    the share of each run's steps.

    Args:
        runs: {name: the lines of its metrics.jsonl}.
    """
    shown = drawable(runs, panels) or list(panels)
    rows = [shown]
    if all(panel.x == "step" for panel in shown) and unlike_in_length(runs):
        runs = {name: with_shares(lines) for name, lines in runs.items()}
        rows.append([panel._replace(x=SHARE, x_label="share of the run's steps") for panel in shown])
    labels = [legend_label(name) for name in runs]
    longest = max(map(len, labels))
    outside = len(runs) > LEGEND_INSIDE or longest > LEGEND_INSIDE_LENGTH
    width = 4.5 * len(shown) + (0.6 + 0.075 * longest if outside else 0)
    height = max(3.6 if len(rows) == 1 else 6.2, 0.3 + 0.17 * len(runs))
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(len(rows), len(shown), squeeze=False)
    for axes, panel in zip(grid.flat, [panel for row in rows for panel in row], strict=True):
        curves = [points(lines, panel) for lines in runs.values()]
        for number, (label, (x, y)) in enumerate(zip(labels, curves, strict=True)):
            axes.plot(x, y, color=f"C{number % 10}", linestyle=LINE_STYLES[number // 10 % 4], label=label,
                      marker="o" if len(x) < 25 else None, markersize=3, linewidth=1.2)  # fmt: skip
        _set_axes(axes, panel, curves)
    handles = grid[0, -1].get_lines()
    if outside:
        figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    else:
        grid[0, -1].legend(handles, labels, loc="best", fontsize=9)
    return figure


def unlike_in_length(runs: dict[str, Lines]) -> bool:
    """Whether the longest run has more than APART times the steps of the shortest."""
    lengths = [length for length in map(last_step, runs.values()) if length > 0]
    return bool(lengths) and max(lengths) > APART * min(lengths)


def last_step(lines: Lines) -> float:
    """0 where no line has a step."""
    return max((line["step"] for line in lines if _is_number(line.get("step"))), default=0)


def with_shares(lines: Lines) -> Lines:
    """The lines, each with the share of the run's steps that were done by then; of an unfinished run, of those it has
    done so far."""
    last = last_step(lines)
    return [line | {SHARE: line["step"] / last} if last and _is_number(line.get("step")) else line for line in lines]


def _set_axes(axes: Axes, panel: Panel, curves: list[tuple[list[float], list[float]]]) -> None:
    """Labels, scales and ticks of a panel."""
    axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
    axes.grid(alpha=0.3)
    if panel.log_y and _is_wide([value for _, y in curves for value in y]):
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter("{x:g}")
    elif panel.from_zero:
        axes.set_ylim(bottom=0)
    if panel.x not in ("step", SHARE) and _is_wide([x[-1] for x, _ in curves if x]):
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=6)


def _is_wide(values: list[float]) -> bool:
    positive = [value for value in values if value > 0]
    return bool(positive) and max(positive) > WIDE * min(positive)


def points(lines: Lines, panel: Panel) -> tuple[list[float], list[float]]:
    """x and y of the lines that hold both keys; a value that was not finite is a gap. Empty where nothing is left."""
    held = [line for line in lines if panel.y in line and _is_number(line.get(panel.x))]
    x = [line[panel.x] / panel.x_unit for line in held]
    y = [line[panel.y] if _is_number(line[panel.y]) else math.nan for line in held]
    return (x, y) if not all(map(math.isnan, y)) else ([], [])


def drawable(runs: dict[str, Lines], panels: Iterable[Panel]) -> list[Panel]:
    """The panels that at least one run has points for; those of accuracy once for each main metric that a run has."""
    every = [one for panel in panels for one in _of_main_metrics(panel)]
    return [panel for panel in every if any(points(lines, panel)[0] for lines in runs.values())]


def _of_main_metrics(panel: Panel) -> list[Panel]:
    """A panel of accuracy for each main metric; another one as it is."""
    if panel.y not in MAIN_METRICS:
        return [panel]
    return [panel._replace(y=key, y_label=f"evaluation {title}") for key, title in MAIN_METRICS.items()]


def missing_keys(lines: Lines, panels: Iterable[Panel]) -> list[str]:
    """The keys for want of which a run is left out of some panels, each once; [] where it is in all of them."""
    main = next(filter(None, map(main_metric, lines)), None)
    missing = []
    for panel in panels:
        if main is not None and panel.y in MAIN_METRICS:
            panel = panel._replace(y=main)
        if not points(lines, panel)[0]:
            has_y = any(_is_number(line.get(panel.y)) for line in lines)
            missing.append(panel.x if has_y else panel.y)
    return list(dict.fromkeys(missing))


def curves_csv(runs: dict[str, Lines]) -> str:
    """All lines of all runs as CSV, the run's name first; the columns are all keys in the order they appear, and a cell
    is empty where a line lacks the key or the value was not finite."""
    columns = ["run", *dict.fromkeys(key for lines in runs.values() for line in lines for key in line)]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for name, lines in runs.items():
        writer.writerows([name, *(_cell(line.get(key)) for key in columns[1:])] for line in lines)
    return file.getvalue()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def legend_label(name: str) -> str:
    """The end of a long path says more than its beginning; what matplotlib reads as a formula, or as no label, is
    only a name here."""
    short = name if len(name) <= LABEL_LENGTH else f"…{name[1 - LABEL_LENGTH :]}"
    return f"{' ' if short.startswith('_') else ''}{short}".replace("$", r"\$")
