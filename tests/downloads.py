"""What tests fetch from the package index, kept from one session to the next."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vit_hf" / "tests"


def once(name: str, fill: Callable[[Path], None]) -> Path:
    """The folder of that name in the user's cache, filled by the first who asks: the others wait, and a fill that was cut
    off leaves nothing that is taken for a whole one.

    Args:
        name: tells versions, so that another version is another folder.
        fill: writes into an empty folder; may raise.
    """
    folder = CACHE / name
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f"{name}.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=CACHE, prefix=f"{name}.") as scratch:
                aside = Path(scratch) / "whole"
                aside.mkdir()
                fill(aside)
                aside.rename(folder)
    return folder
