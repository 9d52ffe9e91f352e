"""Sets that are decoded once: all pixels in one file in the cache of `datasets`, mapped into memory.

    vit_hf_pixels/KEY.npy     uint8 (N, H, W, 3)
    vit_hf_pixels/KEY.json    the rows that did not decode, with the reasons; written before the pixels get their name

KEY is a hash of the set's fingerprint and of everything that decoding depends on. One process makes the file while the
others of its machine wait at a lock; a file with its final name is whole. This module must not know about batches.
"""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
from filelock import FileLock
from PIL import __version__ as pillow_version
from tqdm.auto import tqdm

from vit_hf.arguments import RandomCrop
from vit_hf.data.decode import DECODE_ERRORS, decode_row, image_size
from vit_hf.data.preprocessing import Preprocessing
from vit_hf.data.rows.interface import Rows
from vit_hf.data.rows.table import TableRows, source_state
from vit_hf.errors import UserError

DECODED_BYTES = 8 << 30  # sets whose pixels take no more than this are decoded once
FORMAT = 1  # raise it when the same rows would give other pixels


def worth_decoding(rows: TableRows, preprocessing: Preprocessing, crop: RandomCrop = RandomCrop()) -> bool:
    """Whether a set is decoded once: its pixels fit, and nothing is lost by cropping the resized image instead of the
    original.

    Args:
        crop: boxes out of larger images should come at their full resolution, and a `simple` crop out of an image of
            another shape than the input.
    """
    height, width = preprocessing.image_size
    if len(rows) * height * width * 3 > DECODED_BYTES:
        return False
    if not crop.while_decoding:
        return True
    sizes = sampled_sizes(rows)
    has_shape = crop.kind != "simple" or all(h * width == w * height for h, w in sizes)
    return has_shape and all(h <= height and w <= width for h, w in sizes)


def sampled_sizes(rows: Rows, samples: int = 32) -> list[tuple[int, int]]:
    """(height, width) of some images, evenly over a table, the first ones of a stream; those that are none are left
    out."""
    sizes = []
    last = len(rows) - 1 if isinstance(rows, TableRows) else min(len(rows), samples) - 1
    images, _ = rows.read(np.unique(np.linspace(0, last, samples).astype(np.int64)))
    for image in images:
        try:
            sizes.append(image_size(image))
        except DECODE_ERRORS:
            pass
    return sizes


def decoded(
    rows: TableRows, preprocessing: Preprocessing, cache_dir: str | None = None
) -> tuple[np.ndarray, dict[int, str]]:
    """All pixels, uint8 (N, H, W, 3), mapped from the cache and read-only, and {row: reason} of the rows that did not
    decode, which are black.

    Raises:
        UserError: no room on the disk of the cache.
    """
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "vit_hf_pixels"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = dataclasses.asdict(preprocessing)
    decides = {name: wanted[name] for name in ("image_size", "shortest_edge", "resample", "resized")}
    state = [*source_state(rows.dataset), json.dumps(decides), pillow_version, str(FORMAT)]
    key = hashlib.sha256("\n".join(state).encode()).hexdigest()[:32]
    final, notes = folder / f"{key}.npy", folder / f"{key}.json"
    shape = (len(rows), *preprocessing.image_size, 3)
    found = _read(final, notes, shape)
    if found is None:
        with FileLock(folder / f"{key}.lock"):
            found = _read(final, notes, shape)  # another process may have made it meanwhile
            if found is None:
                for left in folder.glob(f"{key}.*tmp"):  # by a process that was killed: we hold the lock
                    left.unlink()
                _make(rows, preprocessing, final, notes)
                found = _read(final, notes, shape, fresh=True)
    return found


def _read(
    final: Path, notes: Path, shape: tuple[int, ...], fresh: bool = False
) -> tuple[np.ndarray, dict[int, str]] | None:
    """What the files hold; None where one is missing or damaged, or a file of the set could not be read when they were
    made: unless they are `fresh`, it may be there now."""
    try:
        content = json.loads(notes.read_text())
        bad = {int(row): reason for row, reason in content["bad"].items()}
        pixels = np.asarray(np.load(final, mmap_mode="r"))
        if pixels.shape != shape or (content["unread"] and not fresh):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no such file, or not one of ours
        return None
    return pixels, bad


def _make(rows: TableRows, preprocessing: Preprocessing, final: Path, notes: Path) -> None:
    shape = (len(rows), *preprocessing.image_size, 3)
    temporary = final.with_suffix(".npy.tmp")
    try:
        pixels = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        _reserve(temporary)
        bad: dict[int, str] = {}
        unread = []

        def decode(first: int) -> int:
            index = np.arange(first, min(first + 64, len(rows)))
            for row, image in zip(index.tolist(), rows.read(index)[0]):
                result = decode_row(image, preprocessing)
                if isinstance(result, str):
                    bad[row] = result
                    unread.extend([row] if image["bytes"] is None else [])
                else:
                    pixels[row] = result
            return len(index)

        bar = tqdm(total=len(rows), unit="image", desc="Decoding", disable=len(rows) < 5000, dynamic_ncols=True)
        with ThreadPoolExecutor() as pool, bar:  # Pillow decodes and resizes without holding Python's lock
            for count in pool.map(decode, range(0, len(rows), 64)):
                bar.update(count)
        pixels.flush()
        notes_temporary = notes.with_suffix(".json.tmp")
        notes_temporary.write_text(json.dumps({"bad": bad, "unread": sorted(unread)}))
        notes_temporary.replace(notes)
        temporary.replace(final)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(final.parent).free
        raise UserError(
            f"the decoded images need {np.prod(shape) / 1e9:.1f} GB in {final.parent}, where {free / 1e9:.1f} GB are "
            "free: make room, or set HF_DATASETS_CACHE to a folder on a larger disk"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def _reserve(path: Path) -> None:
    """Takes the room for a file that is all holes: a mapped page that finds none ends the process with a bus error."""
    size = path.stat().st_size
    with open(path, "r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        elif shutil.disk_usage(path.parent).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
