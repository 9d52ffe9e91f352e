"""What can be read by index: `len(rows)`, and `rows.read(index)` -> the images and their labels: int64 (B,), or of sets
with any number of labels an image bool (B, K).

An image is a row of an `Image(decode=False)` column, {"bytes", "path"}, or its pixels, uint8 (H, W, 3). table.py has it
over a table of `datasets`, parquet.py over remote files, fractals.py over formulas.
"""

import copy
from typing import Any, Protocol

import numpy as np

from vit_hf.data.rows.labels import renumbered_hot


class Rows(Protocol):
    """What can be read by index: some rows of a split, the source."""

    retried: list[str]  # one line for each read that had to be tried again, until somebody takes them
    source_rows: np.ndarray  # int64 (n,), which rows of the source they are
    source_name: tuple[str, str]  # set and split, as a user names them

    @property
    def num_source_rows(self) -> int: ...

    def __len__(self) -> int: ...

    def read(self, index: np.ndarray) -> tuple[list[Any], np.ndarray]: ...

    def renumber(self, class_index: list[int]) -> None: ...

    def source_state(self) -> list[str]: ...  # what identifies the content of the source


class LazyRows:
    """What rows that are not stored have in common: some of the source's rows, under other numbers.

    Args:
        num_rows: of the source.
        class_names: of the labels 0..K-1.
        multi_label: an image has a list of labels.
    """

    def __init__(self, num_rows: int, class_names: list[str], multi_label: bool = False):
        self.class_names, self.multi_label = class_names, multi_label
        self.number_of = np.arange(len(class_names))  # for each label the number it is trained under
        self.source_rows, self.num_source_rows = np.arange(num_rows), num_rows
        self.source_name = ("", "")
        self.retried: list[str] = []

    def as_stored(self) -> "LazyRows":
        """The same rows with the labels of the source."""
        rows = copy.copy(self)
        rows.number_of = np.arange(len(self.class_names))
        return rows

    def numbered(self, labels: np.ndarray) -> np.ndarray:
        """Labels of the source, int (B,) or bool (B, K), under the numbers that they are trained under."""
        return renumbered_hot(labels, self.number_of) if self.multi_label else self.number_of[labels]

    def __len__(self) -> int:
        return len(self.source_rows)

    def keep(self, rows: np.ndarray) -> None:
        """Narrows the set to some of its present rows, ascending int64 (n,)."""
        self.source_rows = self.source_rows[rows]

    def renumber(self, class_index: list[int]) -> None:
        """Gives each label another number."""
        self.number_of = np.asarray(class_index)[self.number_of]
