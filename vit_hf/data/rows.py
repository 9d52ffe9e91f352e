"""Reading rows: the encoded images and labels at given indices, with patience for storage that stumbles.

Job: one small interface over a table of `datasets`; streams.py and fractals.py have it over remote files and over
formulas: `len(rows)`, and `rows.read(index)` -> the images and int64 labels (B,). An image is a row of an
`Image(decode=False)` column, {"bytes", "path"}, or its pixels, uint8 (H, W, 3).
Must not know: pixels, epochs, processes.
"""

import errno
import os
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import datasets
import numpy as np
import pyarrow as pa

from vit_hf.errors import UserError

T = TypeVar("T")
WAITS_SECONDS = (0.5, 2.0, 8.0)  # before the second, third and last try
# what stays as it is, however often it is tried
LASTING = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)


class Rows(Protocol):
    """What can be read by index."""

    retried: list[str]  # one line for each read that had to be tried again, until somebody takes them

    def __len__(self) -> int: ...

    def read(self, index: np.ndarray) -> tuple[list[Any], np.ndarray]: ...


def patiently(read: Callable[[], T], name: str, retried: list[str]) -> T:
    """Calls `read`; where the storage or the network fails, again after a while.

    Args:
        name: what is read, for the message.
        retried: gets a line for each failure that is not the last.

    Raises:
        UserError: it failed to the end.
    """
    for wait in (*WAITS_SECONDS, None):
        try:
            return read()
        except Exception as error:
            if not _may_pass(error):
                raise
            reason = f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if wait is None or getattr(error, "errno", None) in LASTING or isinstance(error, FileNotFoundError):
                raise UserError(f"cannot be read: {reason}") from None
            retried.append(reason)
            time.sleep(wait)
    raise AssertionError


class LazyRows:
    """What rows that are not stored have in common: some of the source's rows, under other numbers.

    Args:
        num_rows: of the source.
        class_names: of the labels 0..K-1.
    """

    def __init__(self, num_rows: int, class_names: list[str]):
        self.class_names = class_names
        self.number_of = np.arange(len(class_names))  # for each label the number it is trained under
        self.source_rows = np.arange(num_rows)
        self.retried: list[str] = []

    def __len__(self) -> int:
        return len(self.source_rows)

    def keep(self, rows: np.ndarray) -> None:
        """Narrows the set to some of its present rows, ascending int64 (n,)."""
        self.source_rows = self.source_rows[rows]

    def renumber(self, class_index: list[int]) -> None:
        """Gives each label another number."""
        self.number_of = np.asarray(class_index)[self.number_of]


class TableRows:
    """The rows of a `datasets.Dataset` with the columns `image` (undecoded) and `label`.

    Args:
        class_index: another number for each label.
    """

    def __init__(self, dataset: datasets.Dataset, class_index: list[int] | None = None):
        self.dataset = dataset
        self.images = dataset.select_columns(["image"]).with_format("arrow")
        self.labels = dataset.with_format("numpy")["label"][:].astype(np.int64)
        if class_index is not None:
            self.labels = np.asarray(class_index)[self.labels]
        self.retried: list[str] = []

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: np.ndarray) -> tuple[list[dict[str, Any]], np.ndarray]:
        """The images {"bytes", "path"} and labels int64 (B,) at `index`. A file that cannot be read stays a path, and
        fails where it is decoded."""
        images = [image or {"bytes": None, "path": None} for image in self.images[index]["image"].to_pylist()]
        for image in images:
            if image["bytes"] is None and image["path"] is not None:
                try:
                    image["bytes"] = patiently(lambda path=image["path"]: _file(path), image["path"], self.retried)
                except UserError:
                    pass
        return images, self.labels[index]


def _may_pass(error: Exception) -> bool:
    """Whether an error comes from storage or network; fsspec, pyarrow, httpx and the system each have their own."""
    foreign = type(error).__module__.split(".")[0] in ("httpx", "httpcore", "aiohttp", "requests", "huggingface_hub")
    return foreign or isinstance(error, OSError | TimeoutError | pa.ArrowException)


def _file(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def source_state(dataset: datasets.Dataset) -> list[str]:
    """What identifies a dataset's content for a cache: its fingerprint, and the state of its files, which fingerprints
    of some sources outlive."""
    files = [file["filename"] for file in dataset.cache_files]
    state = [f"{name} {os.path.getsize(name)} {os.stat(name).st_mtime_ns}" for name in files]
    return [dataset._fingerprint, *state]
