"""From all flags to what one room of the package needs of them."""

import dataclasses
from typing import Any, TypeVar

T = TypeVar("T")


def pick(settings: type[T], flags: Any, **instead: Any) -> T:
    """The settings of a room: each field of that dataclass is the value of the flag of the same name; where there is no
    such flag, the field keeps its default.

    Args:
        flags: parsed arguments of a script or a command.
        instead: values of fields that do not come from their flags.
    """
    names = {item.name for item in dataclasses.fields(settings)}
    taken = {name: getattr(flags, name) for name in names if hasattr(flags, name)}
    return settings(**{**taken, **instead})
