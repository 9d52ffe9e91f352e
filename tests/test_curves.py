"""What is drawn is what the lines say."""

import csv
import math

import pytest

from vit_hf.analysis.curves import (
    ACCURACY,
    LEARNING,
    OPTIMISATION,
    THROUGHPUT,
    UTILISATION,
    curves_csv,
    draw_curves,
    drawable,
    learning_curves,
    missing_keys,
)


def course(steps=4, batch=8, flops=5.0, seconds=90.0, level=0.0):
    """Lines of a run: one of training each step, one of evaluation every second."""
    lines = []
    for step in range(1, steps + 1):
        cost = {"images_seen": batch * step, "wall_time_seconds": seconds * step, "training_flops": flops * step}
        lines.append(
            {"step": step, "loss": 3 / step + level, "learning_rate": 1e-3 / step, "grad_norm": 2.0 + level,
             "images_per_second": 100.0 * step, "data_wait_fraction": 0.1 / step, **cost}
        )  # fmt: skip
        if step % 2 == 0:
            lines.append({"step": step, "eval_accuracy": 0.1 * step + level, "eval_samples": 9, **cost})
    return lines


def drawn(figure):
    """[{run: (x, y)}] of the axes from left to right."""
    return [
        {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}
        for axes in figure.axes
    ]


@pytest.mark.parametrize("panels", [LEARNING, OPTIMISATION, THROUGHPUT, ACCURACY])
def test_every_panel_shows_the_lines_values(panels):
    runs = {"one": course(), "two": course(steps=6, level=0.05)}
    figure = draw_curves(runs, panels)
    assert len(figure.axes) == len(panels)
    for axes, panel, curves in zip(figure.axes, panels, drawn(figure), strict=True):
        assert (axes.get_xlabel(), axes.get_ylabel()) == (panel.x_label, panel.y_label)
        for name, lines in runs.items():
            held = [line for line in lines if panel.y in line]
            assert curves[name][0] == pytest.approx([line[panel.x] / panel.x_unit for line in held])
            assert curves[name][1] == [line[panel.y] for line in held] and held


def test_a_short_run_beside_a_long_one_is_drawn_by_the_share_of_its_steps_too():
    runs = {"short": course(steps=4), "long": course(steps=20), "none": []}
    steps, accuracy, shares, accuracy_by_share = drawn(draw_curves(runs, LEARNING))
    assert steps["short"][0] == [1, 2, 3, 4] and shares["short"][0] == [0.25, 0.5, 0.75, 1]
    assert shares["short"][1] == steps["short"][1] and accuracy_by_share["short"][0] == [0.5, 1]
    assert (
        shares["long"][0][-1] == 1
        and accuracy_by_share["long"][1] == accuracy["long"][1]
        and shares["none"] == ([], [])
    )
    figure = draw_curves(runs, OPTIMISATION)
    assert [axes.get_xlabel() for axes in figure.axes] == ["step"] * 2 + ["share of the run's steps"] * 2
    alike = {"short": course(steps=5), "long": course(steps=20)}  # four times as long: both can be seen
    assert len(draw_curves(alike, LEARNING).axes) == 2 and len(draw_curves(runs, ACCURACY).axes) == 3
    assert all(set(line) == set(again) for line, again in zip(runs["short"], course(steps=4)))  # what is given stays


def test_accuracy_is_drawn_against_images_flops_and_hours():
    images, flops, hours = drawn(draw_curves({"run": course(seconds=1800.0)}, ACCURACY))
    assert images["run"] == ([16, 32], [0.2, 0.4])
    assert flops["run"][0] == [10.0, 20.0] and hours["run"][0] == [1.0, 2.0]


def test_a_run_whose_lines_lack_a_key_is_left_out_of_that_panel_alone():
    old = [{key: value for key, value in line.items() if key != "images_seen"} for line in course()]
    images, flops, _ = drawn(draw_curves({"old": old, "new": course()}, ACCURACY))
    assert images["old"] == ([], []) and images["new"][0] == [16, 32] and flops["old"] == flops["new"]
    assert missing_keys(old, LEARNING + ACCURACY) == ["images_seen"] and missing_keys(course(), ACCURACY) == []
    assert missing_keys(course(steps=1), LEARNING + ACCURACY) == ["eval_accuracy"]  # not evaluated yet


def test_a_panel_that_no_run_has_points_for_is_left_out():
    runs = {"one": course(steps=1), "none": []}
    assert drawable(runs, LEARNING) == [LEARNING[0]] and len(learning_curves(runs).axes) == 1
    assert drawable(runs, UTILISATION) == [] and len(draw_curves({"none": []}, LEARNING).axes) == 2


def test_a_value_that_was_not_finite_is_a_gap():
    lines = course()
    lines[0]["grad_norm"] = None
    gap = drawn(draw_curves({"run": lines}, OPTIMISATION))[1]["run"]
    assert gap[0] == [1, 2, 3, 4] and math.isnan(gap[1][0]) and gap[1][1:] == [2.0] * 3
    nothing = [{"step": step, "loss": None} for step in (1, 2)]
    assert missing_keys(nothing, LEARNING[:1]) == ["loss"]


def test_axes_are_logarithmic_where_runs_are_tenfold_apart():
    near = draw_curves({"a": course(flops=1.0), "b": course(flops=9.0)}, ACCURACY)
    far = draw_curves({"a": course(flops=1.0), "b": course(flops=99.0)}, ACCURACY)
    assert [axes.get_xscale() for axes in near.axes] == ["linear"] * 3
    assert [axes.get_xscale() for axes in far.axes] == ["linear", "log", "linear"]
    assert learning_curves({"a": course()}).axes[0].get_yscale() == "linear"
    assert learning_curves({"a": course(steps=40)}).axes[0].get_yscale() == "log"


@pytest.mark.parametrize("number", [1, 6, 7, 20, 30])
def test_the_legend_names_every_run_and_covers_no_curve_when_there_are_many(number):
    runs = {f"run {n}": course(steps=2) for n in range(number)}
    figure = draw_curves(runs, LEARNING)
    inside = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    (legend,) = inside or figure.legends
    assert bool(inside) == (number <= 6) and [text.get_text() for text in legend.get_texts()] == list(runs)
    styles = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].get_lines()}
    assert len(styles) == number
    figure.canvas.draw()
    if figure.legends:
        box = legend.get_window_extent()
        assert box.y0 >= 0 and box.x1 <= figure.bbox.x1  # all of it is in the picture
        assert all(axes.get_tightbbox().x1 <= box.x0 for axes in figure.axes)


def test_names_that_matplotlib_would_read_otherwise(tmp_path):
    runs = {"_hidden": course(), "$a_b$c": course(), "very/" * 30 + "last": course()}
    figure = learning_curves(runs)
    shown = [text.get_text() for text in figure.legends[0].get_texts()]  # long names: outside
    assert [text.strip() for text in shown[:2]] == ["_hidden", r"\$a_b\$c"] and shown[2].endswith("very/last")
    figure.savefig(tmp_path / "curves.png")  # a formula that is none would raise here


def test_csv_has_all_lines_of_all_runs():
    other = [{"step": 1, "loss": None, "new": [1, 2]}]
    rows = list(csv.DictReader(curves_csv({"one": course(), "b,c": other}).splitlines()))
    assert [row["run"] for row in rows] == ["one"] * 6 + ["b,c"]
    for row, line in zip(rows, course()):
        assert {key: float(value) for key, value in row.items() if value and key != "run"} == line
    assert rows[-1]["new"] == "[1, 2]" and rows[-1]["loss"] == "" and rows[-1]["eval_accuracy"] == ""
