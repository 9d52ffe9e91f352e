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
import re
from pathlib import Path
from typing import Any

import yaml

from vit_hf.arguments import RunArguments, check, parse
from vit_hf.errors import ArgumentError, UserError, nearest
from vit_hf.study.questions import Question, read_question
from vit_hf.study.syntax import Axes, expand, fill, known_keys, listed, mapping, text

SCRIPTS = ("run_pretrain.py", "run_finetune.py")


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """One training run of a study.

    output_dir: of the run. words: the command line of the script. start_from: the cell whose model it loads.
    """

    name: str
    seed: int
    script: str
    output_dir: Path
    words: tuple[str, ...]
    args: RunArguments
    start_from: "Cell | None"

    @property
    def log(self) -> Path:
        """What the run prints; held locked while it runs."""
        return self.output_dir.parent / f"seed-{self.seed}.log"

    @property
    def origin(self) -> Path:
        """Which training of `start_from` the run began with."""
        return self.output_dir.parent / f"seed-{self.seed}.start_from"

    def __str__(self) -> str:
        return f"{self.name} seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class Study:
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
    try:
        return _study(yaml.safe_load(path.read_text()), path.stem, output_dir)
    except OSError as error:
        raise ArgumentError(f"{path} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{path} is not YAML ({' '.join(str(error).split())})") from None
    except ArgumentError as error:
        raise ArgumentError(f"{path}: {error}") from None


def _study(content: Any, name: str, output_dir: Path | None) -> Study:
    keys = ("title", "output_dir", "seeds", "axes", "cells", "questions")
    content = known_keys(content, "the study", keys)
    for needed in ("output_dir", "cells"):
        if not content.get(needed):
            raise ArgumentError(f"{needed} is missing")
    axes = {
        str(axis): {
            str(label): mapping(flags, f"{axis} {label}") for label, flags in mapping(values, f"axis {axis}").items()
        }
        for axis, values in mapping(content.get("axes"), "axes").items()
    }
    seeds = _seeds(content.get("seeds", [0]))
    folder = output_dir or Path(text(content["output_dir"], "output_dir"))
    cells = _cells(mapping(content["cells"], "cells"), axes, seeds, folder)
    names = list(dict.fromkeys(cell.name for cell in cells))
    questions = [read_question(item, axes, names) for item in listed(content.get("questions"), "questions")]
    return Study(text(content.get("title"), "title") or name, folder, seeds, cells, questions)


def _seeds(value: Any) -> list[int]:
    right = isinstance(value, list) and value and all(type(seed) is int and seed >= 0 for seed in value)
    if not right or len(set(value)) < len(value):
        raise ArgumentError(f"seeds: {value!r} is not a list of different whole numbers of 0 or more")
    return value


def _cells(templates: dict[str, Any], axes: Axes, seeds: list[int], folder: Path) -> list[Cell]:
    """All cells, each after the one it starts from, in the order of the file otherwise."""
    specs: dict[str, tuple[dict[str, Any], dict[str, str]]] = {}
    for template, spec in templates.items():
        spec = known_keys(spec, "a cell", ("recipe", "script", "flags", "start_from", "seeds"))
        for name, values in expand(str(template), axes):
            if name in specs or not re.fullmatch(r"\w[\w.+-]*", name):
                problem = "stands there twice" if name in specs else "is no name for a folder"
                raise ArgumentError(f"the cell {name!r} {problem}")
            specs[name] = spec, values
    made: dict[str, dict[int, Cell]] = {}

    def make(name: str, children: tuple[str, ...] = ()) -> dict[int, Cell]:
        if name in made:
            return made[name]
        if name in children:
            raise ArgumentError(f"{' starts from '.join((*children, name))}: a circle")
        spec, values = specs[name]
        own, parents = _seeds(spec.get("seeds", seeds)), {}
        if spec.get("start_from") is not None:
            parent = fill(text(spec["start_from"], "start_from"), values)
            if parent not in specs:
                raise ArgumentError(f"{name} starts from {parent!r}, {nearest(parent, specs)}")
            parents = make(parent, (*children, name))
            if len(parents) == 1:  # trained once, for all
                parents = dict.fromkeys(own, *parents.values())
            if not set(own) <= set(parents):
                raise ArgumentError(
                    f"{name} has seeds {own}, {parent}, which it starts from, {list(parents)}; or one for all"
                )
        made[name] = {
            seed: _cell(name, seed, spec, _flags(name, spec, values, axes), values, parents.get(seed), folder)
            for seed in own
        }
        return made[name]

    for name in specs:
        make(name)
    return [cell for of_seeds in made.values() for cell in of_seeds.values()]


def _flags(name: str, spec: dict[str, Any], values: dict[str, str], axes: Axes) -> dict[str, Any]:
    """The flags of a cell, with those of its axes over them."""
    flags = dict(mapping(spec.get("flags"), f"{name}: flags"))
    setter: dict[str, str] = {}
    for axis, label in values.items():
        for flag, value in axes[axis][label].items():
            if setter.setdefault(flag, axis) != axis:
                raise ArgumentError(
                    f"{name}: the axes {setter[flag]} and {axis} both set {flag}, and one would be lost"
                )
            flags[flag] = value
    for flag, value in flags.items():
        if value is None:
            raise ArgumentError(f"{name}: {flag} has no value; to have the recipe's, leave it out")
    return flags


def _cell(
    name: str,
    seed: int,
    spec: dict[str, Any],
    flags: dict[str, Any],
    values: dict[str, str],
    parent: Cell | None,
    folder: Path,
) -> Cell:
    script = spec.get("script", "run_finetune.py" if parent else "run_pretrain.py")
    if script not in SCRIPTS:
        raise ArgumentError(f"{name}: script {script!r} is not one of {', '.join(SCRIPTS)}")
    if not spec.get("recipe"):
        raise ArgumentError(f"{name}: recipe is missing")
    output_dir = folder / name / f"seed-{seed}"
    taken = {"seed", "output_dir"} | ({"model_name_or_path"} if parent else set())
    if taken & flags.keys():
        raise ArgumentError(f"{name}: {', '.join(sorted(taken & flags.keys()))} is the study's to set")
    flags = {"subset_seed": seed, **flags, "seed": seed, "output_dir": output_dir}
    if parent is not None:
        flags["model_name_or_path"] = parent.output_dir
    words = ["--config", fill(text(spec["recipe"], "recipe"), values)]
    words += [word for flag, value in flags.items() for word in (f"--{flag}", _word(value))]
    try:
        args = parse(RunArguments, words, prog=script)
        check(args)
    except UserError as error:
        raise ArgumentError(f"{name}: {error}") from None
    return Cell(name, seed, script, output_dir, tuple(words), args, parent)


def _word(value: Any) -> str:
    """A YAML value as the word of a flag."""
    if isinstance(value, dict):
        return ",".join(f"{key}={part}" for key, part in value.items())
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
