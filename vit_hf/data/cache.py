"""Images that are decoded once: one file a source split in the cache of `datasets`, mapped into memory.

Images of one size are kept at that size, for every subset, draw and image size alike; images of several sizes are kept as
the model's input, for every subset and draw. A file has a place for each row of the source split; those that no run has
asked for are holes and take no room. Its parts, one after the other:

    pixels   uint8 (N, H, W, 3)
    labels   of a stream; a table has its labels in memory: int32 (N,), or a bit a class where an image has a list of them
    states   uint8 (N,): 0 not decoded, 1 decoded, 2 does not decode; written when the pixels are on the disk

One process of a machine decodes what is missing while the others wait at a lock. This module must not know about batches.
"""

import collections
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import os
import shutil
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from PIL import __version__ as pillow_version

from vit_hf.arguments import RandomCrop
from vit_hf.data.cache_folder import cache_folder, hold, make_room, read_description, write_description
from vit_hf.data.decode import DECODE_ERRORS, decode_row, image_size, resized_sides
from vit_hf.data.machine import usable_cores
from vit_hf.data.preprocessing import Preprocessing
from vit_hf.data.processes import First, by_itself
from vit_hf.data.resize import FILTERS, is_input, resized_on_host
from vit_hf.data.rows.interface import Rows
from vit_hf.data.rows.table import TableRows
from vit_hf.errors import SURROUNDINGS
from vit_hf.progress import progress

DECODED_BYTES = 8 << 30  # rows whose pixels take no more than this are decoded once
RESIZED_BYTES = 64 << 20  # sets that as the model's input take no more than this are resized once, too
PART_BYTES = 256 << 20  # pixels after which they count
FORMAT = 2  # raise it when the same rows would give other pixels, or another file
LABEL = np.dtype("<i4")
DECODED, BAD = 1, 2


class NotKept(Exception):
    """Why the images are not kept decoded, after all."""


class _OtherSize(Exception):
    """An image of another size than the rest."""


@dataclasses.dataclass(frozen=True)
class Way:
    """How images are kept: each at its own size, `size` (height, width), or (with a preprocessing) as the input."""

    size: tuple[int, int]
    preprocessing: Preprocessing | None

    def name(self) -> str:
        if self.preprocessing is None:
            return f"native {self.size}"
        wanted = dataclasses.asdict(self.preprocessing)
        decides = ("image_size", "shortest_edge", "resample", "resized")
        return json.dumps({name: wanted[name] for name in decides})


@dataclasses.dataclass
class Decoded:
    """The decoded rows of a set: kept[index] -> uint8 (B, H, W, 3).

    Args:
        pixels: uint8 (N, H, W, 3), read-only.
        rows: int64 (n,), where each row of the set lies.
        bad: {row of the set: reason} of those that did not decode, which are black.
        native: whether images have their own size; else they are the model's input.
    """

    pixels: np.ndarray
    rows: np.ndarray
    bad: dict[int, str]
    native: bool

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.pixels[self.rows[index]]

    @property
    def size(self) -> tuple[int, int]:
        return self.pixels.shape[1:3]

    @property
    def nbytes(self) -> int:
        return len(self.rows) * int(np.prod(self.pixels.shape[1:]))

    def resized(self, preprocessing: Preprocessing) -> "Decoded":
        """The same as the model's input, where that takes no more than RESIZED_BYTES: it costs nothing any more then."""
        height, width = preprocessing.image_size
        if not self.native or len(self) * height * width * 3 > RESIZED_BYTES:
            return self
        if is_input(self.size, preprocessing):
            return self
        return Decoded(resized_on_host(self[:], preprocessing), np.arange(len(self)), self.bad, native=False)


def worth_decoding(rows: Rows, preprocessing: Preprocessing, crop: RandomCrop = RandomCrop()) -> bool:
    """Whether a set is decoded once: its pixels fit, and nothing is lost by cropping the resized image instead of the
    original.

    Args:
        crop: a box out of a larger image should come at its full resolution, and one out of an image of another shape than
            the input would be drawn in a distorted image.
    """
    height, width = preprocessing.image_size
    sizes = sampled_sizes(rows)
    if not _ways(len(rows), sizes, preprocessing):
        return False
    if not crop.while_decoding:
        return True
    return all(h <= height and w <= width and h * width == w * height for h, w in sizes)


_SIZES: weakref.WeakKeyDictionary[Rows, list[tuple[int, int]]] = weakref.WeakKeyDictionary()


def sampled_sizes(rows: Rows, first: First = by_itself) -> list[tuple[int, int]]:
    """(height, width) of some images, which are read once for each `rows`.

    Args:
        first: lets the main process look, so that all find the same; a user's error there ends all alike.
    """
    if rows not in _SIZES:
        _SIZES[rows] = first(functools.partial(_read_sizes, rows), "looking at the images' sizes")
    return _SIZES[rows]


def _read_sizes(rows: Rows, samples: int = 32) -> list[tuple[int, int]]:
    """(height, width) of some images; those that are none are left out. Evenly over a table, the first ones of a stream,
    where reading far apart is dear."""
    step = max(1, (len(rows) - 1) / (samples - 1)) if isinstance(rows, TableRows) else 1
    sizes = []
    images, _ = rows.read((np.arange(min(samples, len(rows))) * step).astype(np.int64))
    for image in images:
        try:
            sizes.append(image_size(image))
        except DECODE_ERRORS:
            pass
    return sizes


def _ways(number: int, sizes: list[tuple[int, int]], preprocessing: Preprocessing) -> list[Way]:
    """The ways in which `number` images fit, best first. Images more than twice as large as what they are resized to are
    kept as the input: to make them smaller in each epoch costs more than to read them."""
    ways = [Way(preprocessing.image_size, preprocessing)]
    if len(set(sizes)) == 1 and preprocessing.resample in FILTERS:
        height, width = sizes[0]
        resized_width, resized_height = resized_sides((width, height), preprocessing)
        if height <= 2 * resized_height and width <= 2 * resized_width:
            ways.insert(0, Way((height, width), None))
    return [way for way in ways if number * way.size[0] * way.size[1] * 3 <= DECODED_BYTES]


def decoded(rows: Rows, preprocessing: Preprocessing, cache_dir: str | os.PathLike | None = None) -> Decoded:
    """The pixels of all rows, mapped from the cache, with what is missing there decoded first; a stream's labels, too.

    Raises:
        NotKept: no room on the disk, a folder that cannot be written, or images of several sizes that do not fit.
    """
    folder = cache_folder(cache_dir)
    for way in _ways(len(rows), sampled_sizes(rows), preprocessing):
        try:
            return _open(rows, way, folder)
        except _OtherSize:
            continue
        except OSError as error:
            if error.errno not in (errno.EFBIG, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, *SURROUNDINGS):
                raise
            needed = len(rows) * way.size[0] * way.size[1] * 3
            raise NotKept(f"{error.strerror}; {needed / 1e9:.1f} GB would go to {folder}") from None
    raise NotKept(f"images of several sizes would take more than {DECODED_BYTES >> 30} GiB as the model's input")


def _open(rows: Rows, way: Way, folder: Path) -> Decoded:
    state = [*rows.source_state(), way.name(), pillow_version, str(FORMAT)]
    key = hashlib.sha256("\n".join(state).encode()).hexdigest()[:32]
    several = 0 if isinstance(rows, TableRows) or not rows.multi_label else len(rows.class_names)
    file = _File(folder / f"{key}.pixels", rows.num_source_rows, way, several)
    found = file.read(rows)
    if found is None:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{key}.lock"):
            found = file.read(rows)  # another process may have decoded them meanwhile
            if found is None:
                found = file.read(rows, unread=_fill(file, rows))
    if found is None:
        raise NotKept(f"{file.path} was damaged while it was written")
    try:
        os.utime(file.notes)  # it was used now
    except OSError:
        pass
    return found


@dataclasses.dataclass
class _File:
    """A file of the cache and its description."""

    path: Path
    number: int  # of rows of the source
    way: Way
    several: int = 0  # classes of a stream whose images have lists of labels

    def __post_init__(self):
        self.notes = self.path.with_suffix(".json")
        self.row_bytes = self.way.size[0] * self.way.size[1] * 3
        self.label_bytes = -(-self.several // 8) or LABEL.itemsize
        self.labels_at = self.number * self.row_bytes
        self.states_at = self.labels_at + self.number * self.label_bytes
        self.size = self.states_at + self.number

    def reasons(self) -> dict[str, str] | None:
        """{row of the source: why it does not decode}; None without a description. Raises _OtherSize."""
        notes = read_description(self.notes)
        if notes.get("several_sizes"):
            raise _OtherSize
        return notes.get("bad") if notes.get("rows") == self.number else None

    def states(self) -> np.ndarray:
        """The state of each row; a bad one whose reason is lost is not decoded."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.states_at)
                states = np.frombuffer(file.read(), dtype=np.uint8).copy()
        except FileNotFoundError:
            states = np.zeros(0, dtype=np.uint8)
        if len(states) != self.number:
            return np.zeros(self.number, dtype=np.uint8)
        known = np.zeros(self.number, dtype=bool)
        known[[int(row) for row in self.reasons() or ()]] = True
        states[(states == BAD) & ~known] = 0
        return states

    def read(self, rows: Rows, unread: dict[int, str] | None = None) -> Decoded | None:
        """The pixels of the rows, or None where some are missing.

        Args:
            unread: rows of the set that could not be read just now; at the next start they may be there.
        """
        reasons = self.reasons()
        try:
            with open(self.path, "rb") as file:
                hold(file)  # for as long as it is mapped
                if os.fstat(file.fileno()).st_size != self.size or reasons is None:
                    return None
                content = np.asarray(np.memmap(file, dtype=np.uint8, mode="r"))
        except FileNotFoundError:
            return None
        states = content[self.states_at :][rows.source_rows]
        bad = dict(unread or {})
        for row in np.flatnonzero(states != DECODED).tolist():
            reason = reasons.get(str(rows.source_rows[row])) if states[row] == BAD else None
            if reason is None and row not in bad:
                return None
            bad[row] = reason or bad[row]
        if not isinstance(rows, TableRows):
            rows.labels = rows.numbered(self._labels(content[self.labels_at : self.states_at], rows.source_rows))
        pixels = content[: self.labels_at].reshape(-1, *self.way.size, 3)
        return Decoded(pixels, rows.source_rows, bad, self.way.preprocessing is None)

    def _labels(self, content: np.ndarray, source_rows: np.ndarray) -> np.ndarray:
        """The source's labels of some rows: int32 (n,), or bool (n, K)."""
        if not self.several:
            return content.view(LABEL)[source_rows]
        bits = content.reshape(-1, self.label_bytes)[source_rows]
        return np.unpackbits(bits, axis=1, count=self.several).astype(bool)

    def stored_label(self, label: Any) -> bytes:
        """A label as it lies in the file."""
        return np.packbits(label).tobytes() if self.several else LABEL.type(label).tobytes()


def _fill(file: _File, rows: Rows) -> dict[int, str]:
    """Decodes the rows that are missing. Returns those that could not be read, and why."""
    states = file.states()
    missing = np.flatnonzero(states[rows.source_rows] == 0)
    new = not states.any()
    if new:
        file.path.unlink(missing_ok=True)  # left by a process that was killed, or damaged
    needed = len(missing) * file.row_bytes
    make_room(file.path.parent, file.path.stem, needed)
    try:
        if shutil.disk_usage(file.path.parent).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return _write(file, rows, missing, states)
    except OSError:
        if new:  # a full disk is not left fuller
            file.path.unlink(missing_ok=True)
            file.notes.unlink(missing_ok=True)
        raise
    except _OtherSize:
        file.path.unlink(missing_ok=True)
        write_description(file.notes, {**_description(file, rows), "several_sizes": True})
        raise


def _description(file: _File, rows: Rows) -> dict[str, Any]:
    name, split = rows.source_name
    return {"set": name, "split": split, "size": list(file.way.size), "rows": file.number}


def _write(file: _File, rows: Rows, missing: np.ndarray, states: np.ndarray) -> dict[int, str]:
    """Writes pixels, then what makes them count, part by part."""
    bad, unread = file.reasons() or {}, {}
    stored = rows if isinstance(rows, TableRows) else rows.as_stored()
    bar = progress(len(missing), "Decoding", "image", disable=len(missing) < 5000)
    with open(file.path, "r+b" if file.path.exists() else "w+b") as target, ThreadPoolExecutor() as pool, bar:
        target.truncate(file.size)
        for part in np.array_split(missing, max(1, -(-len(missing) * file.row_bytes // PART_BYTES))):
            for row, result, label, was_read in _decoded_rows(stored, part, file.way, pool):
                source = int(rows.source_rows[row])
                if isinstance(result, np.ndarray):
                    target.seek(source * file.row_bytes)
                    target.write(result.tobytes())
                    states[source] = DECODED
                elif was_read:
                    bad[str(source)], states[source] = result, BAD
                else:
                    unread[row] = result
                if label is not None:
                    target.seek(file.labels_at + source * file.label_bytes)
                    target.write(file.stored_label(label))
                bar.update()
            target.flush()
            os.fsync(target.fileno())
            write_description(file.notes, {**_description(file, rows), "bad": bad})
            target.seek(file.states_at)
            target.write(states.tobytes())
            target.flush()
    return unread


def _decoded_rows(
    rows: Rows, wanted: np.ndarray, way: Way, pool: ThreadPoolExecutor
) -> Iterator[tuple[int, np.ndarray | str, Any, bool]]:
    """(row, its pixels or why there are none, the label of a stream's row, whether its bytes could be read) of each."""

    def decode(images: list[Any]) -> list[tuple[np.ndarray | str, bool]]:
        results = []
        for image in images:
            result = decode_row(image, way.preprocessing)
            if isinstance(result, np.ndarray) and result.shape[:2] != way.size:
                raise _OtherSize
            results.append((result, isinstance(image, np.ndarray) or image["bytes"] is not None))
        return results

    is_table = isinstance(rows, TableRows)  # files are read by many threads, pieces of a stream in their order

    def start(block: np.ndarray) -> tuple[list[int], list[Any], Future]:
        if is_table:
            return block.tolist(), [None] * len(block), pool.submit(lambda: decode(rows.read(block)[0]))
        images, labels = rows.read(block)
        return block.tolist(), list(labels), pool.submit(decode, images)

    blocks = (wanted[first : first + 64] for first in range(0, len(wanted), 64))
    under_way: collections.deque[tuple[list[int], list[Any], Future]] = collections.deque()
    for block in itertools.chain(blocks, [None]):
        if block is not None:
            under_way.append(start(block))
        while under_way and (block is None or len(under_way) > 2 * usable_cores()):  # no more is held in memory
            block_rows, labels, results = under_way.popleft()
            for row, label, (result, was_read) in zip(block_rows, labels, results.result(), strict=True):
                yield row, result, label, was_read
