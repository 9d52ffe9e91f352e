"""The questions of a study file: which cells stand side by side, and what is tested. Must not know what comes of them."""

import dataclasses
from typing import Any

from vit_hf.errors import ArgumentError, nearest
from vit_hf.study.syntax import Axes, expand, fill, known_keys, listed, number, text


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a question's table. x: its value on the question's axis, where the cell's name has that axis. quoted:
    what others found; of a cell with axes it belongs to the last value, which is usually all of the data."""

    cell: str
    label: str
    quoted: str
    x: str | None


@dataclasses.dataclass(frozen=True)
class Claim:
    """What is tested: `greater` has more accuracy than `than`, a cell or a number, by more than `margin`; or, with
    `equal`, all of these lie within `within` of each other."""

    greater: str = ""
    than: str | float = ""
    margin: float = 0.0
    equal: tuple[str, ...] = ()
    within: float = 0.0


@dataclasses.dataclass(frozen=True)
class Question:
    """x: an axis, or forward_flops, for the figure; None: one line a row. places: the labels of that axis, in order."""

    question: str
    claim: str
    source: str
    rows: list[Row]
    tests: list[Claim]
    x: str | None
    places: tuple[str, ...]


def read_question(item: Any, axes: Axes, cells: list[str]) -> Question:
    """Reads one question. Raises ArgumentError for what cannot be right."""
    item = known_keys(item, "a question", ("question", "claim", "source", "rows", "tests", "x"))
    x = text(item.get("x"), "x") or None
    if x is not None and x != "forward_flops" and x not in axes:
        raise ArgumentError(f"x: {x!r} is neither forward_flops nor an axis; there are {', '.join(axes) or 'none'}")
    places = tuple(axes.get(x, ()))
    rows: list[Row] = []
    for row in listed(item.get("rows"), "rows"):
        row = known_keys(row, "a row", ("cell", "label", "quoted"))
        template = text(row.get("cell"), "cell")
        label = text(row.get("label"), "label") or template
        expanded = expand(template, axes)
        for name, values in expanded:
            quoted = text(row.get("quoted"), "quoted") if name == expanded[-1][0] else ""
            rows.append(Row(_known(name, cells), fill(label, values), quoted, _place(values, x, places)))
    for row in rows:
        if sum((row.label, row.x) == (other.label, other.x) for other in rows) > 1:
            raise ArgumentError(f"two rows of a question are called {row.label!r}; put an axis into the label")
    tests = [claim for test in listed(item.get("tests"), "tests") for claim in _claims(test, axes, cells)]
    texts = [text(item.get(key), key) for key in ("question", "claim", "source")]
    return Question(*texts, rows, tests, x, places)


def _claims(test: Any, axes: Axes, cells: list[str]) -> list[Claim]:
    """One test; or one for each value of the axes in `greater`, which `than` goes through too."""
    test = known_keys(test, "a test", ("greater", "than", "margin", "equal", "within"))
    if set(test) == {"equal", "within"}:
        names = tuple(_known(name, cells) for name in listed(test["equal"], "equal"))
        if len(set(names)) < 2 or len(set(names)) < len(names):
            raise ArgumentError(f"equal: {', '.join(names)}: takes two or more different cells")
        return [Claim(equal=names, within=number(test["within"], "within"))]
    if set(test) - {"margin"} != {"greater", "than"}:
        raise ArgumentError(f"a test is 'greater, than, margin' or 'equal, within', found {', '.join(test)}")
    margin, than = number(test.get("margin", 0), "margin"), test["than"]
    if isinstance(than, (int, float)):
        than = number(than, "than")
        if not 0 <= than <= 1:
            raise ArgumentError(f"than: {than:g} is no accuracy, allowed is a cell or a number from 0 to 1")
    return [
        Claim(
            _known(name, cells),
            than if isinstance(than, float) else _known(fill(text(than, "than"), values), cells),
            margin,
        )
        for name, values in expand(text(test["greater"], "greater"), axes)
    ]


def _known(name: Any, cells: list[str]) -> str:
    if str(name) not in cells:
        raise ArgumentError(f"a question asks for the cell {str(name)!r}, {nearest(str(name), cells)}")
    return str(name)


def _place(values: dict[str, str], x: str | None, places: tuple[str, ...]) -> str | None:
    """Where a row stands on the axis: at its value of it, or of the one axis that it has, if that is a part of it."""
    if x in values:
        return values[x]
    (only,) = values.values() if len(values) == 1 else (None,)
    return only if only in places else None
