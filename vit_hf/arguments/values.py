"""The flags that are more than a number or a word: read from text once, and written as text again.

A parser of this file raises ValueError with the text seen and what is allowed; parser.py puts the flag's name before it.
"""

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml


class Kind(NamedTuple):
    """How the text of a flag becomes a value, and the value what a YAML file holds.

    Args:
        parse: text -> value. Raises ValueError.
        plain: value -> text, or a number or a list where YAML has it so; None: the flag is not given. What it returns is
            parsed to the same value again, and equal values give equal ones.
        word: stands for the value in --help.
        of_list: a YAML list -> value, where a list is more than its items by comma.
    """

    parse: Callable[[str], Any]
    plain: Callable[[Any], Any]
    word: str = "TEXT"
    of_list: Callable[[list[Any]], Any] | None = None


@dataclass(frozen=True)
class RandomCrop:
    """How training images are cropped at random.

    Args:
        kind: none | padding | scale | simple.
        amount: pixels of padding, or the smallest share of the area.
        rule: whose way of drawing the boxes of `scale`: torchvision | tensorflow.
    """

    kind: str = "none"
    amount: float = 0.0
    rule: str = "torchvision"

    @property
    def while_decoding(self) -> bool:
        """Whether it belongs on the image as it is stored: on a set that is decoded batch by batch the host cuts it."""
        return self.kind in ("scale", "simple")

    @classmethod
    def parse(cls, text: str) -> "RandomCrop":
        """`none`, `padding=4`, `scale=0.08[,rule=tensorflow]` or `simple`. Raises ValueError for any other text, a padding
        below 1, a scale outside (0, 1]."""
        first, comma, rest = text.strip().partition(",")
        kind, _, number = (part.strip() for part in first.partition("="))
        rules = {"": "torchvision", ",rule=torchvision": "torchvision", ",rule=tensorflow": "tensorflow"}
        rule = rules.get(comma + rest.strip())
        try:
            if text.strip() == "none":
                return cls()
            if text.strip() == "simple":
                return cls("simple", 4.0)  # pixels of padding, as DeiT III has it
            if kind == "padding" and int(number) >= 1 and not comma:
                return cls(kind, float(number))
            if kind == "scale" and 0 < float(number) <= 1 and rule is not None:
                return cls(kind, float(number), rule)
        except ValueError:
            pass
        raise ValueError(
            f"{text!r} is not none, padding=PIXELS (1 or more), scale=SHARE (above 0, to 1), the last also with "
            ",rule=torchvision or ,rule=tensorflow, or simple"
        )

    def __str__(self) -> str:
        if self.kind in ("none", "simple"):
            return self.kind
        return f"{self.kind}={_number(self.amount)}" + (",rule=tensorflow" if self.rule == "tensorflow" else "")


@dataclass(frozen=True)
class RandAugment:
    """Some operations for each image, all of one magnitude or about it.

    Args:
        num_ops: operations an image, 1 to 8.
        magnitude: 0 to 30 for the operations of torchvision, 0 to 10 for those of big_vision and timm.
        ops: whose operations: torchvision | big_vision | timm.
        magnitude_std: standard deviation of each operation's magnitude, 0 to 10; timm's alone.
    """

    num_ops: int = 2
    magnitude: float = 9.0
    ops: str = "torchvision"
    magnitude_std: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "RandAugment | None":
        """`num_ops=2,magnitude=9[,ops=big_vision]`, timm's with `increasing=true` in place of ops; `none` is None. Raises
        ValueError for any other text, or a number out of range."""
        if text.strip() == "none":
            return None
        kinds: dict[str, Callable[[str], Any]] = {"num_ops": int, "magnitude": float, "ops": str}
        highest = {"torchvision": 30, "big_vision": 10}  # what their scales end at
        values: dict[str, Any] = {}
        try:
            given = {name.strip(): value.strip() for name, value in (part.split("=") for part in text.split(","))}
            if given.get("increasing") == "true" and "ops" not in given:  # timm's are named by what they do
                del given["increasing"]
                values["ops"], highest = "timm", {"timm": 10}
                kinds["magnitude_std"] = float
            values |= {name: kinds[name](value) for name, value in given.items()}
            found = cls(**values)
            in_range = 1 <= found.num_ops <= 8 and 0 <= found.magnitude <= highest[found.ops]
            if in_range and 0 <= found.magnitude_std <= 10:
                return found
        except (ValueError, KeyError):
            pass
        raise ValueError(
            f'{text!r} is not none or e.g. "num_ops=2,magnitude=9,ops=torchvision" (num_ops 1 to 8, magnitude '
            "0 to 30), ops=big_vision (magnitude 0 to 10), or in place of ops timm's increasing=true (magnitude 0 to 10, "
            "magnitude_std 0 to 10)"
        )

    def __str__(self) -> str:
        text = f"num_ops={self.num_ops},magnitude={_number(self.magnitude)}"
        if self.ops == "timm":
            return f"{text},magnitude_std={_number(self.magnitude_std)},increasing=true"
        return text if self.ops == "torchvision" else f"{text},ops={self.ops}"


def parse_image_size(text: str) -> int | tuple[int, int]:
    """`224` -> 224; `224x160` -> (224, 160), height and width. Raises ValueError for anything else."""
    sides = text.strip().split("x")
    if not 1 <= len(sides) <= 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ValueError(f"{text!r} is not SIDE or HEIGHTxWIDTH in pixels")
    return (int(sides[0]), int(sides[1])) if len(sides) == 2 else int(sides[0])


def image_size_text(size: int | tuple[int, int] | None) -> str | None:
    """The text that `parse_image_size` reads."""
    return None if size is None else str(size) if isinstance(size, int) else f"{size[0]}x{size[1]}"


def _channels(text: str, is_right: Callable[[float], bool], allowed: str) -> tuple[float, float, float]:
    """`0.485,0.456,0.406`, or one number for all three channels."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 3) or not all(math.isfinite(number) and is_right(number) for number in numbers):
        raise ValueError(f"{text!r} is not one number or three by comma, {allowed}")
    return tuple(numbers * (3 // len(numbers)))


def parse_mean(text: str) -> tuple[float, float, float]:
    """The mean of each channel, or of all. Raises ValueError for what is not one or three numbers from 0 to 1."""
    return _channels(text, lambda number: 0 <= number <= 1, "from 0 to 1 (of grey levels divided by 255)")


def parse_std(text: str) -> tuple[float, float, float]:
    """The standard deviation of each channel, or of all. Raises ValueError for what is not one or three numbers above 0."""
    return _channels(text, lambda number: number > 0, "above 0")


def channels_text(numbers: tuple[float, float, float] | None) -> str | None:
    """The text that `parse_mean` and `parse_std` read; one number where all are the same."""
    if numbers is None:
        return None
    return ",".join(map(_number, numbers if len(set(numbers)) > 1 else numbers[:1]))


def parse_workers(text: str) -> int | None:
    """`auto` -> None, a number of processes otherwise. Raises ValueError for anything else."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) > 512:
        raise ValueError(f"{text!r} is not auto or a number from 0 to 512")
    return int(text)


def parse_batch_size(text: str) -> int | str:
    """`auto`, or a number of images. Raises ValueError for anything else."""
    if text == "auto":
        return text
    try:
        number = float(text)
        if number >= 1 and number == int(number):
            return int(number)
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"{text!r} is not auto or a whole number of 1 or more")


def parse_trackers(text: str) -> tuple[str, ...]:
    """`tensorboard,wandb` -> the trackers' names; `none` -> (). Raises ValueError for one that is not known."""
    known = ("tensorboard", "wandb", "trackio")
    names = () if text in ("none", "") else tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in known:
            raise ValueError(f"{name!r} is not one of {', '.join(known)}; or give none alone")
    return names


def parse_names(text: str) -> tuple[str, ...]:
    """Names by comma, each once, in their order."""
    return tuple(dict.fromkeys(name.strip().removeprefix("--") for name in text.split(",") if name.strip()))


def names_text(names: tuple[str, ...]) -> str | None:
    """The text that `parse_names` reads; None for no name."""
    return ",".join(names) or None


def parse_classes(text: str) -> tuple[str, ...]:
    """Names or indices of classes by comma, or the path of a file with one a line. A name that itself holds a comma (as
    ImageNet's do) can only be given in a file, in a list, or by its index.

    Raises:
        ValueError: the text or the file names no class, or the file cannot be read.
    """
    path = os.path.expanduser(text.strip())
    if not os.path.isfile(path):
        return listed_classes(text.split(","), text)
    try:
        with open(path, encoding="utf-8") as file:
            return listed_classes(file.read().splitlines(), text)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{text!r} cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})") from None


def listed_classes(items: list[Any], seen: Any = None) -> tuple[str, ...]:
    """The classes of a list. Raises ValueError for none; `seen` is what is shown of it."""
    names = tuple(str(item).strip() for item in items if str(item).strip())
    if not names:
        seen = items if seen is None else seen
        raise ValueError(f"{seen!r} names no class: give names or indices, by comma or one a line in a file")
    return names


def plain_classes(names: tuple[str, ...] | None) -> str | list[str] | None:
    """The names by comma, or as a list where the text would be read as something else."""
    if names is None:
        return None
    text = ",".join(names)
    is_read_again = listed_classes(text.split(",")) == names and not os.path.isfile(os.path.expanduser(text))
    return text if is_read_again else list(names)


def parse_overrides(text: str) -> dict[str, Any]:
    """`"drop_path_rate=0.1,stem_depths=[2,2]"` -> {field: value} by name, values as YAML reads them. Raises ValueError for
    a part that is not NAME=VALUE."""
    overrides = {}
    for part in filter(None, re.split(r",(?![^\[]*\])", text)):  # not at the commas of a list
        name, equals, value = (word.strip() for word in part.partition("="))
        if not name or not equals or not value:
            raise ValueError(f"{part!r} is not NAME=VALUE")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"{part!r} is not NAME=VALUE") from None
        if isinstance(parsed, str):  # YAML reads 1e-6 as text
            try:
                parsed = float(parsed)
            except ValueError:
                parsed = None if parsed.lower() == "none" else parsed
        overrides[name] = parsed
    return dict(sorted(overrides.items()))


def overrides_text(overrides: dict[str, Any]) -> str | None:
    """The text that `parse_overrides` reads; None for nothing."""

    def word(value: Any) -> str:
        if value is None:
            return "none"
        return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str)

    return ",".join(f"{name}={word(value)}" for name, value in overrides.items()) or None


def parse_freeze(text: str) -> tuple[str, ...]:
    """`"layers.0-2,embeddings"` -> ("embeddings", "layers.0", "layers.1", "layers.2"): parts of the names of modules, each
    once, in order. Raises ValueError for what cannot be such a part."""
    parts: set[tuple[str, int]] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        found = re.fullmatch(r"(\w+(?:\.\w+)*?)(?:\.(\d+)(?:-(\d+))?)?", part)
        if not found or part[0].isdecimal():
            raise ValueError(
                f'{part!r} is not a part of the model such as embeddings, encoder, layers.3 or "layers.0-5"'
            )
        path, first, last = found[1], *(int(number or -1) for number in found.groups()[1:])
        if last > 999 or found[3] and last < first:
            raise ValueError(f"{part!r} is not a range of layers, from the lower to the higher, to 999")
        parts |= {(path, number) for number in range(first, max(first, last) + 1)}
    if not parts:
        raise ValueError(f'{text!r} names no part of the model: give e.g. "embeddings,layers.0-5", or encoder')
    return tuple(path if number < 0 else f"{path}.{number}" for path, number in sorted(parts))


def freeze_text(parts: tuple[str, ...]) -> str | None:
    """The text that `parse_freeze` reads, with ranges where numbers follow each other; None for nothing."""
    runs: list[list[Any]] = []  # [path, first, last]
    for part in parts:
        path, _, number = part.rpartition(".")
        if not path or not number.isdecimal():
            runs.append([part, None, None])
        elif runs and runs[-1][0] == path and runs[-1][2] == int(number) - 1:
            runs[-1][2] = int(number)
        else:
            runs.append([path, int(number), int(number)])
    texts = [path if first is None else f"{path}.{first}" + f"-{last}" * (last > first) for path, first, last in runs]
    return ",".join(texts) or None


def _number(value: float) -> str:
    """Without a point where it is whole; digits enough to read the same number again."""
    return str(int(value)) if value == int(value) else repr(value)


def _or_none(value: Any) -> str:
    return "none" if value is None else str(value)


RANDOM_CROP = Kind(RandomCrop.parse, str)
RANDAUGMENT = Kind(RandAugment.parse, _or_none)
IMAGE_SIZE = Kind(parse_image_size, image_size_text, "PIXELS")
MEAN = Kind(parse_mean, channels_text, "NUMBERS")
STD = Kind(parse_std, channels_text, "NUMBERS")
WORKERS = Kind(parse_workers, lambda count: "auto" if count is None else str(count), "{auto,INT}")
BATCH_SIZE = Kind(parse_batch_size, lambda size: size, "{INT,auto}")
TRACKERS = Kind(parse_trackers, lambda names: ",".join(names) or "none", "NAMES")
NAMES = Kind(parse_names, names_text, "NAMES")
CLASSES = Kind(parse_classes, plain_classes, "NAMES", of_list=listed_classes)
OVERRIDES = Kind(parse_overrides, overrides_text, "NAME=VALUE,...")
FREEZE = Kind(parse_freeze, freeze_text, "PARTS")


def parse_license(text: str) -> str:
    """A licence's name on the Hub. Raises ValueError for a text that cannot be one."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", text.strip()):
        raise ValueError(
            f"{text!r} is no licence's name on the Hub, allowed are e.g. apache-2.0, mit, cc-by-4.0, other"
        )
    return text.strip()


LICENSE = Kind(parse_license, lambda name: name, "NAME")
