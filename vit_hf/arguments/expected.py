"""What a recipe promises: the block `expected:`, a list of results with their tolerance and where they come from.

It is no flag: a recipe holds it, run_config.yaml keeps it, `vit-hf verify` compares with it, and the card shows it.
"""

import math
from dataclasses import dataclass
from typing import Any

from vit_hf.arguments.values import Kind

KEYS = ("metric", "value", "tolerance", "seeds", "source", "measured", "flags", "dataset_name")
NEEDED = ("metric", "value", "source", "measured")


@dataclass(frozen=True)
class Expected:
    """One result that a run should have.

    Args:
        metric: as all_results.json or eval_results.json names it, e.g. eval_accuracy.
        value: of the metric, a share and not a percentage.
        tolerance: how much worse than the value is no miss.
        source: who says so: a command, a paper with its table, a page.
        measured: by us, with this recipe; otherwise it is a target that others' numbers stand for.
        seeds: those that the value is the mean of, where it was measured.
        flags: ((flag, value), ...) that the run must have for it to hold; others' runs are not held against it.
        dataset_name: the set of eval_results.json that it is about; None: the run's own.
    """

    metric: str
    value: float
    tolerance: float
    source: str
    measured: bool
    seeds: tuple[int, ...] = ()
    flags: tuple[tuple[str, Any], ...] = ()
    dataset_name: str | None = None

    @classmethod
    def of(cls, given: Any) -> "Expected":
        """From YAML's mapping. Raises ValueError: a key that is unknown or missing, a value of another kind."""
        if not isinstance(given, dict):
            raise ValueError(f"{given!r} is not a mapping of {', '.join(KEYS)}")
        if unknown := [str(key) for key in given if key not in KEYS]:
            raise ValueError(f"unknown key {unknown[0]!r}, allowed are {', '.join(KEYS)}")
        if missing := [key for key in NEEDED if given.get(key) is None]:
            raise ValueError(f"{missing[0]} is missing, each entry needs {', '.join(NEEDED)}")
        seeds, flags = given.get("seeds") or [], given.get("flags") or {}
        for key in ("metric", "source", "dataset_name"):
            if not isinstance(given.get(key) or "", str):
                raise ValueError(f"{key}: {given[key]!r} is not a text")
        if type(given["measured"]) is not bool:
            raise ValueError(f"measured: {given['measured']!r} is not true or false")
        if not isinstance(seeds, list) or not all(type(seed) is int for seed in seeds):
            raise ValueError(f"seeds: {seeds!r} is not a list of whole numbers")
        if not isinstance(flags, dict):
            raise ValueError(f"flags: {flags!r} is not a mapping of flags to values")
        return cls(
            given["metric"], _number("value", given["value"]), abs(_number("tolerance", given.get("tolerance", 0))),
            given["source"], given["measured"], tuple(seeds), tuple((str(k), v) for k, v in flags.items()),
            given.get("dataset_name"),
        )  # fmt: skip

    def plain(self) -> dict[str, Any]:
        """As YAML has it; what is empty is left out."""
        content = {key: getattr(self, key) for key in KEYS}
        content["seeds"], content["flags"] = list(self.seeds), dict(self.flags)
        return {key: value for key, value in content.items() if value not in ([], {}, None)}


def _number(key: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{key}: {value!r} is not a number")
    return float(value)


def _refuse(text: str) -> Any:
    raise ValueError(f"{text!r} is not a list of results; it is a block of a recipe, and no flag")


EXPECTED = Kind(
    _refuse,
    lambda expected: [one.plain() for one in expected] or None,
    "BLOCK",
    lambda given: tuple(Expected.of(one) for one in given),
)
