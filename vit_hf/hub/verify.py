"""What a run reached beside what its recipe promises.

The promises are the block `expected:` of a recipe, which run_config.yaml keeps. What was measured is in all_results.json,
and in eval_results.json for what `vit-hf evaluate` measured later. This module must not know how either was made.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

from vit_hf.arguments import RunArguments
from vit_hf.arguments.expected import Expected
from vit_hf.arguments.parser import convert
from vit_hf.errors import UserError
from vit_hf.hub.export import write_json

_FIELDS = {item.name: item for item in dataclasses.fields(RunArguments)}
VERIFIED = "verified.json"
LESS_IS_BETTER = ("loss", "error", "brier", "seconds", "bytes")  # in the name of a metric
MISSED = ("missed", "target missed", "not measured")


def verify_run(folder: Path, promises: tuple[Expected, ...] | None = None) -> dict[str, Any]:
    """Compares a finished run with the promises of its recipe, and writes verified.json into its folder.

    Args:
        promises: in place of those that run_config.yaml keeps.

    Returns:
        {"results": [a dict for each promise, with `found` and `status`], "met": whether none was missed}

    Raises:
        UserError: no finished run, or nothing is promised for it.
    """
    flags, results, sets = _measured(folder)
    if promises is None:
        try:
            promises = tuple(Expected.of(one) for one in flags.get("expected") or [])
        except ValueError as error:
            raise UserError(f"{folder / 'run_config.yaml'}: expected: {error}") from None
    if not promises:
        raise UserError(f"{folder}: its recipe promises nothing (no `expected:`); name one that does: --recipe FILE")
    rows = [compare(one, flags, results, sets) for one in promises]
    held = [row for row in rows if row["status"] != "another run's"]
    if not held:
        wanted = "; ".join(f"{name}: {value}" for one in promises for name, value in one.flags)
        raise UserError(f"{folder}: nothing is promised for a run with its flags, only for {wanted}")
    verified = {"results": held, "met": not any(row["status"] in MISSED for row in held)}
    write_json(verified, folder / VERIFIED)
    return verified


def compare(
    promise: Expected, flags: dict[str, Any], results: dict[str, Any], sets: list[dict[str, Any]]
) -> dict[str, Any]:
    """One promise beside what was found: its fields, `found` (None: nowhere) and `status`.

    Args:
        results: all_results.json. sets: what `vit-hf evaluate` measured, a dict a set.
    """
    row = promise.plain() | {"tolerance": promise.tolerance, "found": None}
    if any(_value(name, flags.get(name)) != _value(name, value) for name, value in promise.flags):
        return row | {"status": "another run's"}
    own = flags.get("dataset_name")
    wanted = own if promise.dataset_name is None else promise.dataset_name
    places = [results] if wanted == own else []
    # two passes an image are not the number that was promised
    places += [one for one in sets if one.get("dataset_name") == wanted and one.get("tta", "none") == "none"]
    found = next((one[promise.metric] for one in places if isinstance(one.get(promise.metric), (int, float))), None)
    if found is None:
        return row | {"status": "not measured"}
    less = any(word in promise.metric for word in LESS_IS_BETTER)
    worse_by = (found - promise.value) if less else (promise.value - found)
    words = ("met", "missed") if promise.measured else ("target met", "target missed")
    return row | {"found": found, "status": words[worse_by > promise.tolerance + 1e-9]}


def table(verified: dict[str, Any]) -> str:
    """The comparison as lines of text, with a sentence on what nobody here has measured."""
    lines = [f"{'metric':24} {'expected':>9} {'tolerance':>9} {'found':>9}  status"]
    for row in verified["results"]:
        metric = row["metric"] + (f" ({row['dataset_name']})" if row.get("dataset_name") else "")
        found = "-" if row["found"] is None else f"{row['found']:.4f}"
        lines.append(f"{metric:24} {row['value']:>9.4f} {row['tolerance']:>9.4f} {found:>9}  {row['status']}")
        seeds = f", mean of {len(row['seeds'])} seeds" if row.get("seeds") else ""
        who = "measured with this recipe" if row["measured"] else "a target that was quoted, never measured by us"
        lines.append(f"{'':24} {who}{seeds}: {row['source']}")
    return "\n".join(lines)


def misses(verified: dict[str, Any]) -> str:
    """What was missed, in one line."""
    told = []
    for row in verified["results"]:
        if row["status"] == "not measured":
            told.append(f"{row['metric']} was not measured (no such number in all_results.json or eval_results.json)")
        elif row["status"] in MISSED:
            kind = "expected" if row["measured"] else "the target is"
            told.append(
                f"{row['metric']} is {row['found']:.4f}, {kind} {row['value']:.4f} within {row['tolerance']:g}"
            )
    return "; ".join(told)


def _measured(folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """Of a finished run its flags, its results, and the sets that were measured later. Raises UserError."""
    lacks = [name for name in ("run_config.yaml", "all_results.json") if not (folder / name).is_file()]
    if lacks:
        why = f"it has no {' and no '.join(lacks)}" if folder.is_dir() else "there is no such folder"
        raise UserError(f"{folder} is no finished run: {why}; name the folder of a run that has ended")
    try:
        flags = yaml.safe_load((folder / "run_config.yaml").read_text())
        results = json.loads((folder / "all_results.json").read_text())
        later = folder / "eval_results.json"
        content = json.loads(later.read_text()) if later.exists() else {}
        sets = content.get("sets") or [content]
        if not all(isinstance(one, dict) for one in (flags, results, *sets)):
            raise ValueError("a file holds no mapping")
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise UserError(
            f"{folder} is no finished run ({' '.join(str(error).split())[:160]}); name a folder with run_config.yaml and "
            "all_results.json"
        ) from None
    return flags, results, sets


def _value(name: str, given: Any) -> Any:
    """A flag's value, where 384 and "384", 0.001 and "1e-3" are the same. Raises UserError: no flag has this name."""
    if name not in _FIELDS:
        raise UserError(f"expected: flags: {name!r} is no flag of a run")
    return convert(_FIELDS[name], given) if given is not None else None
