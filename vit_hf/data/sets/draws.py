"""Few images of each class, drawn from a training split, and their way to the device.

Must not know: models, and what is fitted on them.
"""

import zlib
from typing import NamedTuple

import numpy as np

from vit_hf.data.device import DeviceBatches
from vit_hf.data.faults import Faults
from vit_hf.data.feed import LoadingSettings, eval_batches
from vit_hf.data.preprocessing import Preprocessing
from vit_hf.data.processes import Processes
from vit_hf.data.rows.table import Source, TableRows
from vit_hf.data.sets.names import ImageSplits
from vit_hf.errors import UserError


class Draws:
    """Which training images are drawn: k of each class, by the name of the set, its split and the labels alone, so that all
    models get the same. The draw of few images is a part of that of more.

    Raises:
        UserError: the labels are not known before the images are read, or an image has several classes.

    Source: arXiv 2010.11929, section 4.1 (a subset of training images, few of each class); nested permutations of each
    class: big_vision, fewshot_lsr.py.
    """

    def __init__(self, splits: ImageSplits, flag: str):
        rows = splits.rows("train")
        if not isinstance(rows, TableRows):
            raise UserError(f"{flag}: images of a streamed set are not drawn by their class; leave --streaming out")
        if rows.labels.ndim != 1:
            raise UserError(f"{flag}: takes sets with one class an image, and this one has several")
        self.splits, self.flag = splits, flag
        self.seed = zlib.crc32(f"{rows.source_name[0]} {splits.train_split}".encode())
        self.rows_of = [np.flatnonzero(rows.labels == number) for number in range(len(splits.class_names))]

    def rows(self, shots: int | None, draw: int) -> np.ndarray:
        """The rows of one draw, ascending int64; shots None: all. Raises UserError where a class has fewer images."""
        if shots is None:
            return np.sort(np.concatenate(self.rows_of))
        counts = [len(rows) for rows in self.rows_of]
        fewest = int(np.argmin(counts))
        if counts[fewest] < shots:
            raise UserError(
                f"{self.flag}: asks for {shots} images of each class, and class {self.splits.class_names[fewest]} has "
                f"{counts[fewest]} training images; allowed are up to {counts[fewest]}"
            )
        rng = np.random.default_rng([self.seed, draw])
        return np.sort(np.concatenate([rng.permutation(rows)[:shots] for rows in self.rows_of]))

    def images(self, rows: np.ndarray) -> TableRows:
        """Some rows of the training split, ascending int64, by new numbers 0..n-1."""
        source = self.splits.sources.get("train")
        if source is not None:
            source = Source(source.images, source.rows[rows], source.name)
        return TableRows(self.splits.train.select(rows), source)


class FewShot(NamedTuple):
    """Batches of the images of some draws, and for each draw int64 (k K,), which of these images it is."""

    batches: DeviceBatches
    draws: list[np.ndarray]


def few_shot(
    splits: ImageSplits,
    preprocessing: Preprocessing,
    processes: Processes,
    loading: LoadingSettings,
    *,
    shots: int = 10,
    draws: int = 3,
) -> FewShot:
    """What --probe_steps looks at: of the training set the images of three draws of ten of each class alone. Arguments are
    those of `eval_batches`; errors are those of `Draws`."""
    drawn = Draws(splits, "--probe_steps")
    chosen = [drawn.rows(shots, draw) for draw in range(draws)]
    together = np.unique(np.concatenate(chosen))
    batches = eval_batches(drawn.images(together), preprocessing, processes, loading, Faults())
    return FewShot(batches, [np.searchsorted(together, rows) for rows in chosen])
