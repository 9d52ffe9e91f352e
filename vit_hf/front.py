"""The front of a folder of the package: the names that the scripts and commands use of it, imported when they are asked
for, so that `--help` and a wrong flag answer before torch is loaded."""

import importlib
from collections.abc import Callable
from typing import Any


def front(package: str, rooms: dict[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package.

    Args:
        rooms: {module of the package: its names, by space}.
    """
    room_of = {name: room for room, names in rooms.items() for name in names.split()}

    def find(name: str) -> Any:
        if name not in room_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{room_of[name]}"), name)

    return find
