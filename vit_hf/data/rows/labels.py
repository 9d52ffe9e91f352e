"""The labels of a set whose images have any number of them: lists of class numbers, made multi-hot a batch at a time.

Must not know: images, where the lists come from.
"""

import numpy as np
import pyarrow as pa

from vit_hf.errors import UserError


class LabelLists:
    """N lists of class numbers. `labels[index]` is multi-hot: bool (B, K).

    Args:
        ends: int64 (N + 1,), where each list starts in `numbers`, and the end of the last one.
        numbers: int64, those of all lists, each in 0..K-1.
        num_classes: K.
    """

    ndim = 2  # as the labels at an index have

    def __init__(self, ends: np.ndarray, numbers: np.ndarray, num_classes: int):
        self.ends, self.numbers, self.num_classes = ends, numbers, num_classes

    @classmethod
    def of(cls, column: pa.ChunkedArray | pa.Array, num_classes: int) -> "LabelLists":
        """A column of lists in which nothing is missing (`checked_lists`)."""
        whole = pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) and len(column) else column
        if len(whole) == 0:
            return cls(np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64), num_classes)
        ends = np.concatenate([[0], np.cumsum(whole.value_lengths().to_numpy(zero_copy_only=False))])
        return cls(ends.astype(np.int64), whole.flatten().to_numpy().astype(np.int64), num_classes)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def rows(self) -> np.ndarray:
        """The row of each of `numbers`."""
        return np.repeat(np.arange(len(self)), np.diff(self.ends))

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        taken = self.take(index)
        hot = np.zeros((len(taken), self.num_classes), dtype=bool)
        hot[taken.rows(), taken.numbers] = True
        return hot

    def take(self, index: np.ndarray) -> "LabelLists":
        """The lists at `index`, int64 (n,)."""
        lengths = self.ends[index + 1] - self.ends[index]  # not of all lists: a batch takes a few of a million
        ends = np.concatenate([[0], np.cumsum(lengths)])
        places = np.repeat(self.ends[index] - ends[:-1], lengths) + np.arange(ends[-1])
        return LabelLists(ends, self.numbers[places], self.num_classes)

    def renumbered(self, class_index: np.ndarray) -> "LabelLists":
        """Each class under its number in `class_index`, int64 (K,); those below 0 are left out of the lists."""
        numbers = np.asarray(class_index)[self.numbers]
        kept = numbers >= 0
        counts = np.bincount(self.rows()[kept], minlength=len(self))
        return LabelLists(np.concatenate([[0], np.cumsum(counts)]), numbers[kept], int(np.max(class_index)) + 1)

    def digest_bytes(self) -> bytes:
        """What tells these lists from others."""
        return self.ends.astype("<i8").tobytes() + self.numbers.astype("<i8").tobytes()

    def column(self) -> pa.Array:
        """The lists as a column of a table."""
        return pa.ListArray.from_arrays(pa.array(self.ends, pa.int32()), pa.array(self.numbers, pa.int64()))


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def flat(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """What is in all lists of a column, one after the other."""
    return pa.chunked_array([chunk.flatten() for chunk in column.chunks], column.type.value_type)


def is_allowed(labels: list | None, num_classes: int) -> bool:
    """Whether a list holds numbers of classes, each once."""
    if labels is None or len(set(labels)) < len(labels):
        return False
    return all(label is not None and 0 <= label < num_classes for label in labels)


def renumbered_hot(hot: np.ndarray, class_index: np.ndarray) -> np.ndarray:
    """Multi-hot labels, bool (B, K), with each class under its number in `class_index`, as LabelLists.renumbered."""
    class_index = np.asarray(class_index)
    kept = class_index >= 0
    found = np.zeros((len(hot), int(class_index.max()) + 1), dtype=bool)
    found[:, class_index[kept]] = hot[:, kept]
    return found


def checked_lists(column: pa.ChunkedArray, num_classes: int, where: str) -> LabelLists:
    """
    Args:
        column: lists of integers.
        where: what the rows are of, for the message: "train split".

    Raises:
        UserError: a label that is missing, out of range, or twice in a list; the row is named.
    """
    lengths = column.combine_chunks().value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    values = flat(column)
    numbers = values.fill_null(-1).to_numpy().astype(np.int64)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    empty = column.is_null().to_numpy()
    wrong = np.flatnonzero((numbers < 0) | (numbers >= num_classes))
    order = np.lexsort((numbers, rows))
    twice = order[1:][(np.diff(rows[order]) == 0) & (np.diff(numbers[order]) == 0)]
    hint = "correct the labels, or choose another --label_column_name"
    if empty.any():
        raise UserError(
            f"{where}, row {np.argmax(empty)}: its list of labels is missing; no label is an empty list; {hint}"
        )
    if len(wrong):
        shown = values[int(wrong[0])].as_py()
        raise UserError(
            f"{where}, row {rows[wrong[0]]}: label {shown} in its list, allowed are 0..{num_classes - 1} ({len(wrong)} such "
            f"labels); {hint}"
        )
    if len(twice):
        raise UserError(
            f"{where}, row {rows[twice[0]]}: label {numbers[twice[0]]} is twice in its list; lists hold the numbers of "
            f"classes, each once, not 0 and 1; {hint}"
        )
    return LabelLists.of(column, num_classes)
