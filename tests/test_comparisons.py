"""What stands in the figures is what was given."""

import numpy as np
import pytest

from vit_hf.analysis.comparisons import accuracy_by_category, accuracy_by_cost, accuracy_by_row


def bars(axes):
    """(x, y, lower end, upper end) of each point with its interval."""
    found = []
    for container in axes.containers:
        line, _, (intervals,) = container.lines
        for (x, y), ((x0, y0), (x1, y1)) in zip(line.get_xydata(), intervals.get_segments(), strict=True):
            found.append((x, y, *((x0, x1) if y0 == y1 and x0 != x1 else (y0, y1))))
    return found


def test_lines_over_names():
    """A model that lacks a value is drawn at its own values, not at the first ones."""
    figure = accuracy_by_category(
        {"a $x": {"all": (0.9, None), "10": (0.5, 0.1)}, "b": {"all": (0.8, 0.05)}}, ("10", "30", "all"), "images"
    )
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["10", "all"]
    first, second, third = bars(axes)
    assert first[1:] == pytest.approx((0.5, 0.4, 0.6)) and second[1:] == pytest.approx((0.9, 0.9, 0.9))
    assert third[1:] == pytest.approx((0.8, 0.75, 0.85))
    assert (round(first[0]), round(second[0]), round(third[0])) == (0, 1, 1) and second[0] != third[0]
    assert axes.get_xlabel() == "images"


def test_no_interval_leaves_0_to_1():
    wide = {"a": (0.95, 0.2), "b": (0.1, 0.3), "c": (1.0, 0.0)}
    for figure in (
        accuracy_by_category({name: {"10": point} for name, point in wide.items()}, ("10",), "images"),
        accuracy_by_cost({name: (1e6, point) for name, point in wide.items()}),
        accuracy_by_row(wide),
    ):
        ends = [point[2:] for point in bars(figure.axes[0])]
        np.testing.assert_allclose(ends[:2], [(0.75, 1.0), (0.0, 0.4)])


def test_points_over_cost():
    figure = accuracy_by_cost({"a": (42e6, (0.9, 0.02)), "b": (7e6, (0.8, None))})
    (axes,) = figure.axes
    assert [point[:2] for point in bars(axes)] == [(42, 0.9), (7, 0.8)]
    assert axes.get_xscale() == "log" and "MFLOP" in axes.get_xlabel()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_rows_from_the_top():
    figure = accuracy_by_row({"a": (0.9, 0.02), "b": (0.8, 0.01)})
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first row is on top
    first, second = bars(axes)
    assert first == pytest.approx((0.9, 0, 0.88, 0.92)) and second == pytest.approx((0.8, 1, 0.79, 0.81))
