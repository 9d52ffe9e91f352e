"""From a dataset to batches on the device: which sample comes where, decoding, and the way to the device.

Training samples are one endless stream, epoch after epoch; position p of the stream is place p % N of epoch p // N.
Step k takes the positions k*G to (k+1)*G of the stream, whatever the number of processes and the micro-batch, so a
run can start at any step. Evaluation takes every sample exactly once.
"""

import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from vit_hf.data.augment import REPLACEMENT, epoch_order, resized_crop_boxes, sample_keys, uniform
from vit_hf.data.decode import DECODE_ERRORS, Preprocessing, crop_to_pixels, open_image, to_pixels
from vit_hf.errors import UserError

CACHE_BYTES = 1 << 30  # a set whose pixels fit in this is decoded once and kept in memory


@dataclass
class Places:
    """The samples of one micro-batch: epochs and indices int64 (B,); `valid` marks those that count."""

    epoch: np.ndarray
    index: np.ndarray
    valid: np.ndarray


class TrainPlaces:
    """The micro-batches of one process from step `first_step` on."""

    def __init__(
        self, *, num_samples, seed, first_step, total_steps, num_processes, rank, micro_batch_size, accumulation
    ):
        self.num_samples, self.seed, self.rank = num_samples, seed, rank
        self.first_step, self.total_steps = first_step, total_steps
        self.num_processes, self.micro_batch_size, self.accumulation = num_processes, micro_batch_size, accumulation
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return (self.total_steps - self.first_step) * self.accumulation

    def __iter__(self) -> Iterator[Places]:
        across = self.num_processes * self.micro_batch_size
        for micro_step in range(self.first_step * self.accumulation, self.total_steps * self.accumulation):
            start = micro_step * across + self.rank * self.micro_batch_size
            position = np.arange(start, start + self.micro_batch_size, dtype=np.int64)
            epoch, place = position // self.num_samples, position % self.num_samples
            index = np.empty_like(place)
            for number in np.unique(epoch):
                here = epoch == number
                index[here] = self._order(int(number))[place[here]]
            yield Places(epoch, index, np.ones(len(index), dtype=bool))

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k == epoch - 1}
            self._orders[epoch] = epoch_order(self.seed, epoch, self.num_samples)
        return self._orders[epoch]


class EvalPlaces:
    """The evaluation batches of one process. All processes get equally many, since ZeRO-3 gathers weights in each
    forward pass; places that are there only to fill up are not valid."""

    def __init__(self, *, num_samples: int, num_processes: int, rank: int, batch_size: int):
        self.num_samples, self.num_processes, self.rank = num_samples, num_processes, rank
        self.batch_size = min(batch_size, -(-num_samples // num_processes))

    def __len__(self) -> int:
        return -(-self.num_samples // (self.num_processes * self.batch_size))

    def __iter__(self) -> Iterator[Places]:
        for number in range(len(self)):
            start = (number * self.num_processes + self.rank) * self.batch_size
            index = np.arange(start, start + self.batch_size, dtype=np.int64)
            valid = index < self.num_samples
            yield Places(np.zeros_like(index), np.where(valid, index, 0), valid)


class ImageBatches(torch.utils.data.Dataset):
    """Decoded micro-batches: batches[places] -> {pixel_values uint8 (B, H, W, C), labels, epoch, index int64 (B,),
    valid bool (B,)}, and under "bad" the rows that did not decode, {row: reason}.

    Args:
        dataset: columns `image` (undecoded) and `label`.
        crop_scale: smallest share of the area of a random crop; None keeps the whole image. Sets that are kept in
            memory are cropped on the device instead (`crops_on_device`).
        on_bad_image: `raise`, or `skip`: a training row is replaced by another, chosen from (seed, epoch, index); an
            evaluation row does not count.
        training: whether bad rows are replaced.
        keep_in_memory: default, where the pixels fit in CACHE_BYTES.
        class_index: another number for each label.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        preprocessing: Preprocessing,
        *,
        seed: int = 0,
        crop_scale: float | None = None,
        on_bad_image: str = "raise",
        training: bool = False,
        keep_in_memory: bool | None = None,
        class_index: list[int] | None = None,
    ):
        self.images = dataset.with_format(None)
        self.labels = dataset.with_format("numpy")["label"][:].astype(np.int64)
        if class_index is not None:
            self.labels = np.asarray(class_index)[self.labels]
        self.preprocessing, self.seed = preprocessing, seed
        self.on_bad_image, self.training = on_bad_image, training
        height, width = preprocessing.image_size
        if keep_in_memory is None:
            keep_in_memory = len(dataset) * height * width * 3 <= CACHE_BYTES
        self.crops_on_device = keep_in_memory
        self.crop_scale = None if keep_in_memory else crop_scale
        self.pixels: np.ndarray | None = None
        self.bad: dict[int, str] = {}
        if keep_in_memory:
            self._decode_all()

    def _decode_all(self) -> None:
        pixels = np.zeros((len(self.images), *self.preprocessing.image_size, 3), dtype=np.uint8)

        def decode(row: int) -> None:
            result = self._decode(row, None)
            if isinstance(result, str):
                self.bad[row] = result
            else:
                pixels[row] = result

        with ThreadPoolExecutor() as pool:  # Pillow decodes and resizes without holding Python's lock
            list(pool.map(decode, range(len(self.images))))
        if self.bad and self.on_bad_image == "raise":
            raise self.error(self.bad)
        self.pixels = pixels

    def _decode(self, row: int, key: np.ndarray | None) -> np.ndarray | str:
        """The pixels of a row, uint8 (H, W, 3), or why there are none."""
        value = self.images[row]["image"]
        try:
            image = open_image(value)
            if self.crop_scale is None or key is None:
                return to_pixels(image, self.preprocessing)
            box = resized_crop_boxes(key, image.height, image.width, self.crop_scale)
            return crop_to_pixels(image, tuple(float(side[0]) for side in box), self.preprocessing)
        except DECODE_ERRORS as error:
            name = f"file {value['path']}, " if value.get("path") else ""
            return f"{name}{type(error).__name__}: {' '.join(str(error).split())}"

    def error(self, bad: dict[int, str]) -> UserError:
        """The error for a run that does not skip bad images."""
        row, reason = min(bad.items())
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        return UserError(
            f"image in row {row} does not decode{more}: {reason}; --on_bad_image skip leaves such rows out"
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, places: Places) -> dict[str, Any]:
        index, valid = places.index.copy(), places.valid.copy()
        keys = sample_keys(self.seed, places.epoch, places.index)
        bad: dict[int, str] = {}
        if self.pixels is None:
            rows = []
            for place in range(len(index)):
                pixels = self._decode_or_replace(index, place, keys[place : place + 1], bad)
                valid[place] &= pixels is not None
                rows.append(pixels if pixels is not None else np.zeros((*self.preprocessing.image_size, 3), np.uint8))
            stacked = np.stack(rows)
        else:
            for place in np.flatnonzero(np.isin(index, list(self.bad))) if self.bad else ():
                pixels = self._decode_or_replace(index, place, keys[place : place + 1], bad)
                valid[place] &= pixels is not None
            stacked = self.pixels[index]
        return {
            "pixel_values": torch.from_numpy(stacked),
            "labels": torch.from_numpy(self.labels[index]),
            "epoch": torch.from_numpy(places.epoch),
            "index": torch.from_numpy(places.index),
            "valid": torch.from_numpy(valid),
            "bad": bad,
        }

    def _decode_or_replace(
        self, index: np.ndarray, place: int, key: np.ndarray, bad: dict[int, str]
    ) -> np.ndarray | None:
        """Decodes index[place]; where that fails in a training run that skips, puts another row there."""
        for attempt in range(100):
            row = int(index[place])
            known = self.bad.get(row)
            result = known if known else (self.pixels[row] if self.pixels is not None else self._decode(row, key))
            if not isinstance(result, str):
                return result
            bad[row] = result
            if not self.training or self.on_bad_image == "raise":
                return None
            index[place] = int(uniform(key, REPLACEMENT + attempt)[0] * len(self))
        return None


def _leave_signals_to_the_parent(worker: int) -> None:
    """Launchers, clusters and Ctrl-C signal a whole process group; the parent still needs its batches for the step at
    hand, saves, and then ends its workers."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def device_batches(
    batches: ImageBatches,
    places: TrainPlaces | EvalPlaces,
    device: torch.device,
    num_workers: int,
    bad: dict[int, str],
) -> Iterator[dict[str, Tensor]]:
    """The micro-batches at `places`, on the device: pixel_values uint8 (B, C, H, W), the rest as in ImageBatches. Rows
    that did not decode are added to `bad`.

    Raises:
        UserError: a row that does not decode, where bad images are not skipped.
    """
    loader = torch.utils.data.DataLoader(
        batches,
        batch_size=None,  # an item is a whole micro-batch
        sampler=places,
        num_workers=0 if batches.pixels is not None else num_workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # or else it would draw from the one that dropout uses
        worker_init_fn=_leave_signals_to_the_parent,
    )
    for batch in loader:
        found = batch.pop("bad")
        replaced = not batches.training or bool(batch["valid"].all())  # on the host still: no wait for the device
        if found and (batches.on_bad_image == "raise" or not replaced):
            raise batches.error(found)
        for row in found.keys() - bad.keys():
            if len(bad) < 10:  # all are counted; the first ones are shown
                print(f"warning: skipping row {row}: {found[row]}", file=sys.stderr)
            bad[row] = found[row]
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        batch["pixel_values"] = batch["pixel_values"].permute(0, 3, 1, 2)
        yield batch
