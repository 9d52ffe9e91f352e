"""A study file -> the runs it asks for, in an order in which each comes after what it starts from.

    title: Small against large
    output_dir: runs/small_against_large
    seeds: [0, 1, 2]
    axes:                               # a name in braces in the name of a cell stands for each of its values
      images: {10: {subset_per_class: 10}, all: {}}
    cells:
      glyphs: {recipe: recipes/demo/pretrain_glyphs.yaml, script: run_pretrain.py}
      scratch-{images}: {recipe: recipes/demo/finetune_digits.yaml, flags: {preset: vit-demo-patch8-32}}
      tuned-{images}: {recipe: recipes/demo/finetune_digits.yaml, start_from: glyphs}
    questions:
      - question: Is pretraining worth it?
        claim: Pretraining is worth ten points.
        source: ...
        rows: [{cell: scratch-10, label: random weights}, {cell: tuned-10, label: glyphs}]
        tests: [{greater: tuned-10, than: scratch-10, margin: 0.1}]

Must not know: how a run is started, and what comes of it.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from vit_hf.arguments import RunArguments, check, parse
from vit_hf.errors import ArgumentError, UserError, nearest

SCRIPTS = ("run_pretrain.py", "run_finetune.py")
KEYS = {
    "the study": {"title", "output_dir", "seeds", "axes", "cells", "questions"},
    "a cell": {"recipe", "script", "flags", "start_from", "seeds"},
    "a question": {"question", "claim", "source", "rows", "tests", "x"},
    "a row": {"cell", "label", "quoted"},
    "a test": {"greater", "than", "margin", "equal", "within"},
}


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """One training run of a study.

    output_dir: of the run. words: the command line of the script. start_from: the cell whose model it loads.
    values: {axis: label} of the axes in its name.
    """

    name: str
    seed: int
    script: str
    output_dir: Path
    words: tuple[str, ...]
    args: RunArguments
    start_from: "Cell | None"
    values: dict[str, str]

    @property
    def log(self) -> Path:
        """What the run prints; held locked while it runs."""
        return self.output_dir.parent / f"seed-{self.seed}.log"

    def __str__(self) -> str:
        return f"{self.name} seed {self.seed}"


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
    """x: an axis, or forward_flops, for the figure; None: one line a row."""

    question: str
    claim: str
    source: str
    rows: list[Row]
    tests: list[Claim]
    x: str | None


@dataclasses.dataclass(frozen=True)
class Study:
    name: str
    title: str
    output_dir: Path
    seeds: list[int]
    cells: list[Cell]
    questions: list[Question]


def read_study(path: Path, output_dir: Path | None = None) -> Study:
    """Reads a study file and holds it against the recipes that it names.

    Args:
        output_dir: in place of the file's.

    Raises:
        ArgumentError: no such file, an unknown key, axis, cell or recipe, a flag that cannot be right, a circle.
    """
    content = _read(path)
    _check_keys(content, "the study", path)
    for needed in ("output_dir", "cells"):
        if not content.get(needed):
            raise ArgumentError(f"{path}: {needed} is missing")
    seeds = _seeds(content.get("seeds", [0]), path)
    axes = {
        str(axis): {str(label): flags or {} for label, flags in _mapping(values, f"{path}: axis {axis}").items()}
        for axis, values in _mapping(content.get("axes") or {}, f"{path}: axes").items()
    }
    folder = Path(output_dir or content["output_dir"])
    cells = _cells(_mapping(content["cells"], f"{path}: cells"), axes, seeds, folder, path)
    known = list(dict.fromkeys(cell.name for cell in cells))
    questions = [_question(item, axes, known, path) for item in content.get("questions") or []]
    return Study(path.stem, str(content.get("title", path.stem)), folder, seeds, cells, questions)


def _read(path: Path) -> dict[str, Any]:
    try:
        return _mapping(yaml.safe_load(path.read_text()), str(path))
    except OSError as error:
        raise ArgumentError(f"{path} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{path} is not YAML ({' '.join(str(error).split())})") from None


def _mapping(value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ArgumentError(f"{where} must hold 'name: value' lines, found {type(value).__name__}")
    return value


def _check_keys(item: Any, kind: str, path: Path) -> None:
    for key in _mapping(item, f"{path}: {kind}"):
        if key not in KEYS[kind]:
            raise ArgumentError(f"{path}: unknown key {key!r} in {kind}, {nearest(str(key), KEYS[kind])}")


def _seeds(value: Any, path: Path) -> list[int]:
    if not isinstance(value, list) or not value or not all(type(seed) is int and seed >= 0 for seed in value):
        raise ArgumentError(f"{path}: seeds: {value!r} is not a list of whole numbers of 0 or more")
    return value


def expand(template: str, axes: dict[str, dict[str, Any]], path: Path) -> Iterable[tuple[str, dict[str, str]]]:
    """`vit-{images}` -> (vit-10, {images: 10}), (vit-all, {images: all})."""
    names = list(dict.fromkeys(re.findall(r"\{(\w+)\}", template)))
    for name in names:
        if name not in axes:
            raise ArgumentError(f"{path}: {template}: no axis {name!r}, {nearest(name, axes)}")
    for labels in itertools.product(*(axes[name] for name in names)):
        values = dict(zip(names, labels, strict=True))
        yield template.format(**values), values


def _cells(
    templates: dict[str, Any], axes: dict[str, dict[str, Any]], seeds: list[int], folder: Path, path: Path
) -> list[Cell]:
    """All cells, each after the one it starts from, in the order of the file otherwise."""
    specs: dict[str, tuple[dict[str, Any], dict[str, str]]] = {}
    for template, spec in templates.items():
        _check_keys(spec, "a cell", path)
        for name, values in expand(str(template), axes, path):
            if name in specs or not re.fullmatch(r"\w[\w.+-]*", name):
                problem = "stands there twice" if name in specs else "is no name for a folder"
                raise ArgumentError(f"{path}: the cell {name!r} {problem}")
            specs[name] = spec, values
    made: dict[str, dict[int, Cell]] = {}

    def make(name: str, children: tuple[str, ...] = ()) -> dict[int, Cell]:
        if name in made:
            return made[name]
        if name in children:
            raise ArgumentError(f"{path}: {' starts from '.join((*children, name))}: a circle")
        spec, values = specs[name]
        parents = {}
        if spec.get("start_from") is not None:
            parent = _fill(str(spec["start_from"]), values, path)
            if parent not in specs:
                raise ArgumentError(f"{path}: {name} starts from {parent!r}, {nearest(parent, specs)}")
            parents = make(parent, (*children, name))
        own = _seeds(spec.get("seeds", seeds), path)
        made[name] = {
            seed: _cell(
                name, seed, spec, values, axes, parents.get(seed, next(iter(parents.values()), None)), folder, path
            )
            for seed in own
        }
        return made[name]

    for name in specs:
        make(name)
    return [cell for of_seeds in made.values() for cell in of_seeds.values()]


def _cell(
    name: str,
    seed: int,
    spec: dict[str, Any],
    values: dict[str, str],
    axes: dict[str, dict[str, Any]],
    parent: Cell | None,
    folder: Path,
    path: Path,
) -> Cell:
    script = spec.get("script", "run_finetune.py" if parent else "run_pretrain.py")
    if script not in SCRIPTS:
        raise ArgumentError(f"{path}: {name}: script {script!r} is not one of {', '.join(SCRIPTS)}")
    if not spec.get("recipe"):
        raise ArgumentError(f"{path}: {name}: recipe is missing")
    output_dir = folder / name / f"seed-{seed}"
    flags = dict(_mapping(spec.get("flags") or {}, f"{path}: {name}: flags"))
    for axis, label in values.items():
        flags |= _mapping(axes[axis][label], f"{path}: {axis} {label}")
    taken = {"seed", "output_dir"} | ({"model_name_or_path"} if parent else set())
    if taken & flags.keys():
        raise ArgumentError(f"{path}: {name}: {', '.join(sorted(taken & flags.keys()))} is the study's to set")
    flags = {"subset_seed": seed, **flags, "seed": seed, "output_dir": output_dir}
    if parent is not None:
        flags["model_name_or_path"] = parent.output_dir
    words = ["--config", _fill(str(spec["recipe"]), values, path)]
    words += [word for flag, value in flags.items() if value is not None for word in (f"--{flag}", _text(value))]
    try:
        args = parse(RunArguments, words, prog=script)
        check(args)
    except UserError as error:
        raise ArgumentError(f"{path}: {name}: {error}") from None
    return Cell(name, seed, script, output_dir, tuple(words), args, parent, values)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{key}={part}" for key, part in value.items())
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _question(item: Any, axes: dict[str, dict[str, Any]], cells: list[str], path: Path) -> Question:
    _check_keys(item, "a question", path)

    def known(name: Any) -> str:
        if str(name) not in cells:
            raise ArgumentError(f"{path}: a question asks for the cell {name!r}, {nearest(str(name), cells)}")
        return str(name)

    x = item.get("x")
    if x is not None and x != "forward_flops" and x not in axes:
        raise ArgumentError(f"{path}: x: {x!r} is neither forward_flops nor one of {', '.join(axes)}")
    rows = []
    for row in item.get("rows") or []:
        _check_keys(row, "a row", path)
        template, label = str(row.get("cell")), str(row.get("label", row.get("cell")))
        expanded = list(expand(template, axes, path))
        for name, values in expanded:
            quoted = str(row.get("quoted", "")) if name == expanded[-1][0] else ""
            rows.append(Row(known(name), _fill(label, values, path), quoted, _place(values, x)))
    tests = []
    for test in item.get("tests") or []:
        _check_keys(test, "a test", path)
        if ("greater" in test) != ("than" in test) or ("equal" in test) != ("within" in test) or len(test) < 2:
            raise ArgumentError(f"{path}: a test is 'greater, than, margin' or 'equal, within', found {sorted(test)}")
        if "equal" in test:
            tests.append(Claim(equal=tuple(known(name) for name in test["equal"]), within=float(test["within"])))
            continue
        margin, target = float(test.get("margin", 0)), test["than"]
        for name, values in expand(str(test["greater"]), axes, path):
            than = target if isinstance(target, float) else known(_fill(str(target), values, path))
            tests.append(Claim(greater=known(name), than=than, margin=margin))
    texts = [str(item.get(key, "")) for key in ("question", "claim", "source")]
    return Question(*texts, rows, tests, x)


def _place(values: dict[str, str], x: str | None) -> str | None:
    """Where a row stands on the axis: at its value of it, or of the one axis that it has (a shorter one)."""
    if x is None or x == "forward_flops":
        return None
    return values.get(x, next(iter(values.values())) if len(values) == 1 else None)


def _fill(template: str, values: dict[str, str], path: Path) -> str:
    try:
        return template.format(**values)
    except KeyError as error:
        raise ArgumentError(
            f"{path}: {template}: there is no axis {error} here, only {', '.join(values) or 'none'}"
        ) from None
