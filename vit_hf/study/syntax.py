"""The pieces that a study file is made of, each held against what it may be. Errors name no file: who reads it does."""

import itertools
import re
from typing import Any

from vit_hf.errors import ArgumentError, nearest

Axes = dict[str, dict[str, dict[str, Any]]]  # {axis: {label: {flag: value}}}


def mapping(value: Any, what: str) -> dict[Any, Any]:
    """`value`, or {} for nothing. Raises ArgumentError for anything but names with values."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ArgumentError(f"{what} must hold 'name: value' lines, found {type(value).__name__}")
    return value


def listed(value: Any, what: str) -> list[Any]:
    """`value`, or [] for nothing. Raises ArgumentError for anything but a list."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise ArgumentError(f"{what} must be a list, found {value!r}")
    return value


def number(value: Any, what: str) -> float:
    """Raises ArgumentError for anything but a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentError(f"{what}: {value!r} is not a number")
    return float(value)


def text(value: Any, what: str) -> str:
    """A short value as text. Raises ArgumentError for a list or a mapping."""
    if isinstance(value, (list, dict)):
        raise ArgumentError(f"{what}: {value!r} is not a text")
    return "" if value is None else str(value)


def known_keys(item: Any, what: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """`item`. Raises ArgumentError for a key that is none of these."""
    for key in mapping(item, what):
        if key not in keys:
            raise ArgumentError(f"unknown key {key!r} in {what}, {nearest(str(key), keys)}")
    return mapping(item, what)


def expand(template: str, axes: Axes) -> list[tuple[str, dict[str, str]]]:
    """`vit-{images}` -> (vit-10, {images: 10}), (vit-all, {images: all}). Raises ArgumentError for an unknown axis."""
    names = list(dict.fromkeys(re.findall(r"\{(\w+)\}", template)))
    for name in names:
        if name not in axes:
            raise ArgumentError(f"{template}: no axis {name!r}, {nearest(name, axes) if axes else 'there are none'}")
    grid = [dict(zip(names, labels, strict=True)) for labels in itertools.product(*(axes[name] for name in names))]
    return [(fill(template, values), values) for values in grid]


def fill(template: str, values: dict[str, str]) -> str:
    """A template with the labels of the axes in place. Raises ArgumentError where there is no such axis."""
    try:
        return template.format(**values)
    except KeyError as error:
        raise ArgumentError(f"{template}: there is no axis {error} here, only {', '.join(values) or 'none'}") from None
    except (ValueError, IndexError, AttributeError):
        raise ArgumentError(f"{template}: braces hold the name of an axis; write {{{{ for a brace") from None
