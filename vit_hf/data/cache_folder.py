"""The folder of sets that are decoded once: what lies there, what is dropped to make room.

    vit_hf_pixels/KEY.pixels   the pixels of a source split (cache.py)
    vit_hf_pixels/KEY.json     which set it is; its time is that of the last use
    vit_hf_pixels/KEY.lock     held while rows are decoded

A file that a process has mapped is held by a shared lock and stays. This module must not know what a pixel is.
"""

import contextlib
import datetime
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import datasets
from filelock import FileLock, Timeout

try:
    import fcntl
except ImportError:  # Windows keeps a file that is open from being removed
    fcntl = None

FOLDER = "vit_hf_pixels"
DIGESTS = "vit_hf_image_digests"  # of the subset filter; small, and listed with the rest
CACHE_BYTES = 32 << 30  # what all files may take; those used longest ago are dropped


@dataclass(frozen=True)
class CachedSet:
    """One entry: its key and files, what its description says ({} where there is none), bytes on the disk, last use."""

    key: str
    files: list[Path]
    description: dict[str, Any]
    size_bytes: int
    used: datetime.datetime

    @property
    def in_use(self) -> bool:
        return any(_is_held(file) for file in self.files if file.suffix == ".pixels")


def cache_folder(cache_dir: str | os.PathLike | None = None, name: str = FOLDER) -> Path:
    return Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / name


def cached_sets(folder: Path) -> list[CachedSet]:
    """What lies in a folder, used longest ago first; also what was left by older versions or killed processes."""
    groups: dict[str, list[Path]] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.suffix != ".lock":
            groups.setdefault(path.name.split(".")[0], []).append(path)
    found = []
    for key, files in groups.items():
        try:
            states = [file.stat() for file in files]
        except FileNotFoundError:  # dropped by another process meanwhile
            continue
        size = sum(state.st_blocks * 512 if hasattr(state, "st_blocks") else state.st_size for state in states)
        used = datetime.datetime.fromtimestamp(max(state.st_mtime for state in states))
        found.append(CachedSet(key, files, read_description(folder / f"{key}.json"), size, used))
    return sorted(found, key=lambda entry: entry.used)


def read_description(path: Path) -> dict[str, Any]:
    """What a file's description holds; {} where it is missing or damaged."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_description(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(content))
    temporary.replace(path)


def drop(entry: CachedSet) -> bool:
    """Removes an entry's files; False where a process uses or fills them, or they cannot be removed."""
    lock = FileLock(entry.files[0].with_name(f"{entry.key}.lock"))
    try:
        with lock.acquire(timeout=0):
            if entry.in_use:
                return False
            for file in entry.files:
                file.unlink(missing_ok=True)
    except (Timeout, PermissionError):
        return False
    return True


def make_room(folder: Path, key: str, needed: int) -> None:
    """Drops what was used longest ago until `needed` more bytes for the entry `key` stay within CACHE_BYTES."""
    entries = cached_sets(folder)
    total = sum(entry.size_bytes for entry in entries)
    for entry in entries:
        if total + needed <= CACHE_BYTES:
            return
        if entry.key != key and drop(entry):
            total -= entry.size_bytes


def hold(file: BinaryIO) -> None:
    """Keeps an open file from being dropped, until it is closed and no longer mapped, or the process ends."""
    if fcntl is not None:
        with contextlib.suppress(OSError):  # some network folders know no locks
            fcntl.flock(file, fcntl.LOCK_SH)


def _is_held(path: Path) -> bool:
    if fcntl is None:
        return False
    try:
        with open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
