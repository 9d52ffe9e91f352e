"""What makes a run this run: which flags must be the same when it goes on, and which may change where they are named."""

import dataclasses
import functools
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from vit_hf.arguments.fields import RunArguments, default_of
from vit_hf.arguments.parser import ALTERNATIVES, convert, plain, plain_of
from vit_hf.errors import ArgumentError, UserError, nearest

_FIELDS = {item.name: item for item in dataclasses.fields(RunArguments)}
# What --change may name: what is done to the images and the weights, and for how long. The rest makes another run: the
# model, the images and their order, the size of a step, the seed.
MENDABLE = tuple(name for name, item in _FIELDS.items() if item.metadata["mendable"])


def identity(args: RunArguments) -> dict[str, Any]:
    """The flags that make a run this run, as YAML and JSON have them: model, data, optimisation and seed. Where it writes,
    how often it logs, and how much one device takes at once may change from one start to the next."""
    return saved_identity(plain(args))


def saved_identity(before: dict[str, Any]) -> dict[str, Any]:
    """The identity of a run as it was written, by this version or an earlier one: flags that it did not know had their
    defaults. Texts that mean the same value are the same here."""
    found = {}
    for name, item in _FIELDS.items():
        if not item.metadata["same_run"]:
            found[name] = _same_text(item, before.get(name, plain_of(item, default_of(item))))
    found["split_seed"] = before.get("split_seed", before.get("seed", 0))  # there was one seed for both
    if not found["streaming"]:
        found["shuffle_buffer_size"] = None  # it is not used
    return found


def _same_text(item: dataclasses.Field, saved: Any) -> Any:
    try:
        return plain_of(item, convert(item, saved))
    except ArgumentError:  # what an earlier version allowed is like nothing that is allowed now
        return saved


def changes(
    before: dict[str, Any], now: dict[str, Any], allowed: Collection[str] = (), *, folder: Path
) -> dict[str, tuple[Any, Any]]:
    """What differs from a run as it was saved: {flag: (then, now)}, {} where it is the same.

    Args:
        before: its flags or its identity, as they were written. now: `identity` of this start.
        allowed: what --change names. One of two flags that stand for each other (the length in epochs or in steps) names
            both.
        folder: where `before` was found.

    Raises:
        UserError: something differs that is not named, or cannot change in a run; or `before` is no run's.
    """
    if not isinstance(before, dict):
        raise UserError(f"{folder} does not hold the flags of a run; choose another --output_dir, or remove it")
    then = saved_identity(before)
    differ = {name: (then[name], now[name]) for name in now if then[name] != now[name]}
    named = {other for name in allowed for other in _with_alternatives(name)}
    refused = {name: pair for name, pair in differ.items() if name not in named or not _may_change(name, *pair)}
    if not refused:
        return differ
    told = [f"--{name} {old} there, {new} now" for name, (old, new) in refused.items()]
    way_out = "choose another --output_dir, or remove it"
    if all(_may_change(name, *pair) for name, pair in refused.items()):
        way_out += f", or go on with the new values: --change {','.join([*allowed, *refused])}"
    raise UserError(f"{folder} belongs to another run ({'; '.join(told[:5])}); {way_out}")


def differences(now: dict[str, Any], allowed: Collection[str]) -> Callable[..., dict[str, tuple[Any, Any]]]:
    """`changes` from a run as it was saved to this start: called with `before` and `folder`."""
    return functools.partial(changes, now=now, allowed=allowed)


def _with_alternatives(name: str) -> set[str]:
    return {name}.union(*(group for group in ALTERNATIVES if name in group))


def _may_change(name: str, then: Any, now: Any) -> bool:
    """Whether --change may name it: an average that is taken or not taken is another run, its decay is not."""
    return name in MENDABLE and (name != "ema_decay" or bool(then) == bool(now))


def check_change(names: Collection[str]) -> None:
    """Raises ArgumentError for a name that --change cannot have."""
    for name in names:
        if name not in _FIELDS:
            raise ArgumentError(f"--change: {name!r} is no flag, {nearest(name, MENDABLE)}")
        if name not in MENDABLE:
            free = _FIELDS[name].metadata["same_run"]
            why = (
                "may change without being named here"
                if free
                else "makes another run, which needs its own --output_dir"
            )
            raise ArgumentError(
                f"--change: {name} {why}; allowed are flags of optimisation, augmentation and length: {', '.join(MENDABLE)}"
            )


def without_paths(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags as they may be published: of a local path only its last name."""
    named = ("output_dir", "model_name_or_path", "dataset_name", "subset_classes", "resume_from_checkpoint")

    def public(name: str, value: Any) -> Any:
        is_path = name in named and isinstance(value, str) and (os.path.exists(value) or os.path.isabs(value))
        return Path(value).name if is_path else value

    return {name: public(name, value) for name, value in flags.items()}
