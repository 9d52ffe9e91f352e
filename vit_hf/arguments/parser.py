"""Flags over a YAML file over the defaults, as the values of a dataclass; and those values as YAML has them.

Every value is held against its field here, and only here: what a function is handed later needs no second look.
"""

import argparse
import dataclasses
import math
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from vit_hf.arguments.fields import default_of
from vit_hf.errors import ArgumentError, nearest

# A flag of one of these groups on the command line puts the file's choice from the same group out of force.
ALTERNATIVES = [
    ("preset", "model_name_or_path"),
    ("num_train_epochs", "max_steps"),
    ("warmup_steps", "warmup_ratio"),
    ("subset_fraction", "subset_per_class"),
]


# What users of other scripts look for here under another name.
_PRECISION = "precision is the launcher's: accelerate launch --mixed_precision bf16 (or fp16)"
MOVED = {
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "mixed_precision": _PRECISION,
    "num_processes": "processes are the launcher's: accelerate launch --num_processes N",
    "deepspeed": "ZeRO is the launcher's: accelerate launch --config_file accelerate_configs/zero2.yaml",
    "gradient_accumulation_steps": "it is derived from --global_batch_size and --per_device_train_batch_size",
    "overwrite_output_dir": "nothing is overwritten: choose another --output_dir, or remove the folder",
    "fsdp": "FSDP2 is the launcher's: accelerate launch --config_file accelerate_configs/fsdp2.yaml",
    "lr": "it is called --learning_rate",
    "expected": "it is a block of a recipe, which `vit-hf verify` reads",
    "eval_strategy": "evaluations come every --eval_steps, by default once an epoch",
    "save_strategy": "checkpoints come every --save_steps, by default once an epoch",
    "do_train": "both scripts train and evaluate; to evaluate alone: vit-hf evaluate",
    "do_eval": "both scripts train and evaluate; to evaluate alone: vit-hf evaluate",
    "hub_token": "log in with `hf auth login`, or set HF_TOKEN; a token is never a flag",
}


def parse(
    cls: type,
    argv: list[str] | None = None,
    *,
    prog: str,
    description: str = "",
    positional: str | tuple[str, ...] | None = None,
    default_config: str | Path | None = None,
) -> Any:
    """Parses flags over a YAML file over the defaults of the dataclass `cls`.

    Args:
        default_config: the recipe of a call with no words at all; the call says that it is used.
        positional: a field that is given without a flag, or several; of a list, one word or more.

    Raises:
        ArgumentError: an unknown or malformed flag or key, or a value outside its range.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _parser(cls, prog, description, positional)
    if not argv and default_config is not None:
        print(f"{prog}: no flags given, running the demo recipe: --config {default_config}", file=sys.stderr)
        argv = ["--config", str(default_config)]
    given, unknown = parser.parse_known_args(argv)
    given = vars(given)
    fields = {item.name: item for item in dataclasses.fields(cls)}
    if unknown:
        name = unknown[0].split("=")[0]
        if not name.startswith("--"):
            raise ArgumentError(f"unexpected word {name!r} on the command line")
        key = name[2:].replace("-", "_")
        hint = MOVED.get(key) or nearest(key, [*fields, "config"])
        raise ArgumentError(f"unknown flag {name}, {hint}")
    config = given.pop("config", None)
    values = read_config(config, cls) if config is not None else {}
    flags = {name: convert(fields[name], value) for name, value in given.items()}
    for group in ALTERNATIVES:
        if any(flags.get(name) is not None for name in group):
            for name in group:
                values.pop(name, None)
    return cls(**{**values, **flags})


def read_config(path: str | Path, cls: type) -> dict[str, Any]:
    """Reads a recipe or a run_config.yaml into {field: value}; the block `resolved:` of the latter is ignored.

    Raises:
        ArgumentError: no such file, not YAML, or a key that is no flag.
    """
    try:
        content = yaml.safe_load(Path(path).read_text()) or {}
    except OSError as error:
        raise ArgumentError(f"--config: {path} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ArgumentError(f"--config: {path} is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise ArgumentError(f"--config: {path} must hold 'flag: value' lines, found {type(content).__name__}")
    content.pop("resolved", None)
    fields = {item.name: item for item in dataclasses.fields(cls)}
    for name in content:
        if name not in fields:
            raise ArgumentError(f"{path}: unknown key {name!r}, {nearest(str(name), fields)}")
    return {name: convert(fields[name], value) for name, value in content.items()}


def convert(item: dataclasses.Field, given: Any) -> Any:
    """Turns a flag's text or a YAML value into the field's value.

    Raises:
        ArgumentError: it is malformed or out of the field's range.
    """
    kind, default = item.metadata["kind"], default_of(item)
    kinds = _kinds(item)
    optional = type(None) in kinds if kind is None else kind.plain(default) is None
    if given is None or (optional and given == "none" and (kind is not None or str not in kinds)):
        if optional:
            return None if kind is None else default
        raise ArgumentError(f"--{item.name}: a value is missing")
    if kind is not None:
        try:
            return kind.of_list(given) if isinstance(given, list) and kind.of_list else kind.parse(_text(given))
        except ValueError as error:
            raise ArgumentError(f"--{item.name}: {error}") from None
    one = next(k for k in kinds if k is not type(None))
    if typing.get_origin(one) is list:  # several words
        return [str(word) for word in (given if isinstance(given, list) else [given])]
    if typing.get_origin(one) is Literal:
        if given not in typing.get_args(one):
            raise ArgumentError(f"--{item.name}: {given!r} is not one of {', '.join(typing.get_args(one))}")
        return given
    return _in_range(item, _plain_value(item.name, one, given))


def _kinds(item: dataclasses.Field) -> tuple[Any, ...]:
    """The types of a field's values. `Literal[...] | None` is typing's union, `int | None` Python's own."""
    is_union = typing.get_origin(item.type) in (typing.Union, types.UnionType)
    return typing.get_args(item.type) if is_union else (item.type,)


def _plain_value(name: str, kind: type, given: Any) -> Any:
    """A bool, an int, a float or a text."""
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[str(given).lower()]
        if kind is int:
            number = float(given)
            if isinstance(given, bool) or number != int(number):
                raise ValueError
            return int(number) if abs(number) < 2**53 else int(given)
        if kind is float:
            if isinstance(given, bool) or not math.isfinite(float(given)):
                raise ValueError
            return float(given)
    except (ValueError, TypeError, KeyError, OverflowError):
        expected = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise ArgumentError(f"--{name}: {given!r} is not {expected}") from None
    return _text(given)


def _text(given: Any) -> str:
    """A YAML list or mapping as the flag has it on the command line."""
    if isinstance(given, (list, tuple)):
        return ",".join(map(str, given))
    if isinstance(given, dict):
        return ",".join(f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in given.items())
    return str(given)


def _in_range(item: dataclasses.Field, value: Any) -> Any:
    low, high = item.metadata["low"], item.metadata["high"]
    if (low is not None and value < low) or (high is not None and value > high):
        allowed = f"from {low} to {high}" if high is not None else f"{low} or more"
        raise ArgumentError(f"--{item.name}: {value} is out of range, allowed is {allowed}")
    return value


def plain_of(item: dataclasses.Field, value: Any) -> Any:
    """A field's value as YAML and JSON have it: a text, a number, a list of texts, or None. `convert` reads it again."""
    kind = item.metadata["kind"]
    return value if kind is None else kind.plain(value)


def plain(args: Any) -> dict[str, Any]:
    """The values of all flags as YAML and JSON have them, in the order of the fields."""
    return {item.name: plain_of(item, getattr(args, item.name)) for item in dataclasses.fields(args)}


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as ours."""

    def error(self, message: str):  # argparse's own faults (a flag without its value) in the form of ours
        raise ArgumentError(message)


def _parser(cls: type, prog: str, description: str, positional: str | tuple[str, ...] | None) -> Parser:
    unnamed = (positional,) if isinstance(positional, str) else positional or ()
    parser = Parser(prog=prog, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    if positional is None:
        parser.add_argument("--config", help="YAML file with the same names as the flags; a flag wins over the file")
    groups = {}
    for base in reversed(cls.__mro__[:-1]):
        for name in base.__dict__.get("__annotations__", {}):
            groups.setdefault(name, base)
    titles: dict[type, Any] = {}
    for item in dataclasses.fields(cls):
        if item.name in unnamed:
            words = "+" if any(typing.get_origin(kind) is list for kind in _kinds(item)) else None
            parser.add_argument(item.name, nargs=words, help=item.metadata["help"])
            continue
        if item.metadata["file_only"]:
            continue
        base = groups[item.name]
        group = titles.setdefault(
            base, parser.add_argument_group(base.__doc__.strip().rstrip(".")) if base not in titles else None
        )
        metavar, extra = _form(item)
        text, default = item.metadata["help"].replace("%", "%%"), plain_of(item, default_of(item))
        text += "" if default is None or default is False else f" (default: {default})"
        group.add_argument(f"--{item.name}", metavar=metavar, help=text, **extra)
    return parser


def _form(item: dataclasses.Field) -> tuple[str, dict[str, Any]]:
    """What stands for a flag's value in --help, and how many words argparse takes for it."""
    if item.metadata["kind"] is not None:
        return item.metadata["kind"].word, {}
    kind = next(k for k in _kinds(item) if k is not type(None))
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(typing.get_args(kind)) + "}", {}
    if typing.get_origin(kind) is list:
        return "PATH", {"nargs": "+", "action": "extend"}
    return kind.__name__.upper(), {"nargs": "?", "const": "true"} if kind is bool else {}
