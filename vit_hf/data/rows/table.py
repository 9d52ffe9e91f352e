"""The rows of a table of `datasets`, in memory-mapped files on this machine.

Must not know: pixels, epochs, processes.
"""

import dataclasses
import os
from typing import Any

import datasets
import numpy as np

from vit_hf.data.rows.labels import LabelLists
from vit_hf.data.rows.retries import patiently
from vit_hf.errors import UserError


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the rows of a table come from.

    Args:
        images: the whole source split, with the column `image`.
        rows: int64 (n,), which of its rows they are.
        name: (set, split), as a user names them.
    """

    images: datasets.Dataset
    rows: np.ndarray
    name: tuple[str, str]


class TableRows:
    """The rows of a `datasets.Dataset` with the columns `image` (undecoded) and `label`, a class or a list of classes.

    Args:
        source: the split that they were chosen from; None: all of them are one of their own.
    """

    def __init__(self, dataset: datasets.Dataset, source: Source | None = None):
        images = dataset.select_columns(["image"])
        source = source or Source(images, np.arange(len(dataset)), ("", ""))
        self.source, self.source_rows, self.source_name = source.images, source.rows, source.name
        self.images = images.with_format("arrow")
        kind = dataset.features["label"]
        self.labels: np.ndarray | LabelLists  # int64 (N,); or lists, of which the labels at an index are bool (B, K)
        if isinstance(kind, datasets.List):
            column = dataset.select_columns(["label"]).with_format("arrow")[:]["label"]
            self.labels = LabelLists.of(column, kind.feature.num_classes)
        else:
            self.labels = dataset.with_format("numpy")["label"][:].astype(np.int64)
        self.retried: list[str] = []

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_source_rows(self) -> int:
        return len(self.source)

    def source_state(self) -> list[str]:
        """What identifies the content of the source split."""
        return source_state(self.source)

    def renumber(self, class_index: list[int]) -> None:
        """Gives each label another number."""
        if isinstance(self.labels, LabelLists):
            self.labels = self.labels.renumbered(np.asarray(class_index))
        else:
            self.labels = np.asarray(class_index)[self.labels]

    def read(self, index: np.ndarray) -> tuple[list[dict[str, Any]], np.ndarray]:
        """The images {"bytes", "path"} and labels int64 (B,) or bool (B, K) at `index`. A file that cannot be read stays a path, and
        fails where it is decoded."""
        images = [image or {"bytes": None, "path": None} for image in self.images[index]["image"].to_pylist()]
        for image in images:
            if image["bytes"] is None and image["path"] is not None:
                try:
                    image["bytes"] = patiently(
                        lambda path=image["path"]: file_bytes(path), image["path"], self.retried
                    )
                except UserError:
                    pass
        return images, self.labels[index]


def file_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def source_state(dataset: datasets.Dataset) -> list[str]:
    """What identifies a dataset's content for a cache: its fingerprint, and the state of its files, which fingerprints
    of some sources outlive."""
    files = [file["filename"] for file in dataset.cache_files]
    state = [f"{name} {os.path.getsize(name)} {os.stat(name).st_mtime_ns}" for name in files]
    return [dataset._fingerprint, *state]
