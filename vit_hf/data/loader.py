"""From rows to batches on the device: which sample comes where, gathering or decoding, and the way to the device.

Training samples are one endless stream, epoch after epoch; position p of the stream is place p % N of epoch p // N.
Step k takes the positions k*G to (k+1)*G of the stream, whatever the number of processes and the micro-batch, so a
run can start at any step. Evaluation takes every sample exactly once.
"""

import atexit
import ctypes
import queue
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vit_hf.data.augment import REPLACEMENT, resized_crop_boxes
from vit_hf.data.decode import Preprocessing, decode_row
from vit_hf.data.keys import epoch_order, sample_keys, uniform
from vit_hf.data.rows import Rows
from vit_hf.errors import UserError

DEVICE_SHARE = 0.2  # of a device's memory: a decoded set that takes no more is kept there
AHEAD = 2  # micro-batches that wait on the device


@dataclass
class Places:
    """The samples of one micro-batch: how often each was seen before and its index, int64 (B,); `valid` marks those
    that count."""

    visit: np.ndarray
    index: np.ndarray
    valid: np.ndarray


class TrainPlaces:
    """The micro-batches of one process from step `first_step` on.

    Args:
        repeats: how often each sample comes in a row, each time augmented otherwise; an epoch keeps its length, so it
            then holds a part of the samples. Source: repeated augmentation, arXiv 1902.05509.
    """

    def __init__(
        self,
        *,
        num_samples,
        seed,
        first_step,
        total_steps,
        num_processes,
        rank,
        micro_batch_size,
        accumulation,
        repeats=1,
    ):
        self.num_samples, self.seed, self.rank, self.repeats = num_samples, seed, rank, repeats
        self.first_step, self.total_steps = first_step, total_steps
        self.num_processes, self.micro_batch_size, self.accumulation = num_processes, micro_batch_size, accumulation
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return (self.total_steps - self.first_step) * self.accumulation

    def __iter__(self) -> Iterator[Places]:
        across = self.num_processes * self.micro_batch_size
        for micro_step in range(self.first_step * self.accumulation, self.total_steps * self.accumulation):
            start = micro_step * across + self.rank * self.micro_batch_size
            position, copy = np.divmod(np.arange(start, start + self.micro_batch_size), self.repeats)
            epoch, place = np.divmod(position, self.num_samples)
            index = np.empty_like(place)
            for number in np.unique(epoch):
                here = epoch == number
                index[here] = self._order(int(number))[place[here]]
            yield Places(epoch * self.repeats + copy, index, np.ones(len(index), dtype=bool))

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k == epoch - 1}
            self._orders[epoch] = epoch_order(self.seed, epoch, self.num_samples)
        return self._orders[epoch]


class EvalPlaces:
    """The evaluation batches of one process: a stretch of the set. All processes get equally many, since ZeRO-3
    gathers weights in each forward pass; places that are there only to fill up are not valid.

    Args:
        num_workers: each worker's batches lie side by side too, so that what it has read serves the next one.
    """

    def __init__(self, *, num_samples: int, num_processes: int, rank: int, batch_size: int, num_workers: int = 0):
        self.num_samples, self.num_processes, self.rank = num_samples, num_processes, rank
        self.batch_size = min(batch_size, -(-num_samples // num_processes))
        self.num_workers = num_workers

    def __len__(self) -> int:
        return -(-self.num_samples // (self.num_processes * self.batch_size))

    def __iter__(self) -> Iterator[Places]:
        workers = np.arange(len(self)) % max(1, self.num_workers)  # which worker gets which batch
        stretch = np.empty(len(self), dtype=np.int64)
        stretch[np.argsort(workers, kind="stable")] = np.arange(len(self))
        for number in stretch:
            start = (self.rank * len(self) + number) * self.batch_size
            index = np.arange(start, start + self.batch_size, dtype=np.int64)
            valid = index < self.num_samples
            yield Places(np.zeros_like(index), np.where(valid, index, 0), valid)


@dataclass
class Faults:
    """What went wrong with the rows of a split, as far as this process has seen it."""

    bad: dict[int, str] = field(default_factory=dict)  # rows that did not decode: the reason
    retried: list[str] = field(default_factory=list)  # reads that had to be tried again


class ImageBatches(torch.utils.data.Dataset):
    """Micro-batches on the host: batches[places] -> {pixel_values uint8 (B, H, W, C), labels, visit, index int64 (B,),
    valid bool (B,)}, and beside them "bad", the rows that did not decode, {row: reason}, "retried", and "error", a line
    that ends the run or None. Of a set that lies on the device, `rows` (B,) take the place of pixel_values.

    Args:
        rows: a table, a stream or a formula.
        pixels: all of it, decoded (cache.py), and the rows that did not decode; None decodes batch by batch.
        crop_scale: smallest share of the area of a random crop that is cut while decoding; None keeps the whole image.
        on_bad_image: `raise`, or `skip`: a training row is replaced by another, chosen from (seed, visit, index); an
            evaluation row does not count.
        training: whether bad rows are replaced.
    """

    def __init__(
        self,
        rows: Rows,
        preprocessing: Preprocessing,
        pixels: tuple[np.ndarray, dict[int, str]] | None = None,
        *,
        seed: int = 0,
        crop_scale: float | None = None,
        on_bad_image: str = "raise",
        training: bool = False,
    ):
        self.rows, self.preprocessing, self.seed = rows, preprocessing, seed
        self.crop_scale, self.on_bad_image, self.training = crop_scale, on_bad_image, training
        self.pixels, self.bad = pixels if pixels is not None else (None, {})
        self.on_device: Tensor | None = None
        if self.bad and on_bad_image == "raise":
            raise self.error(self.bad)

    def __len__(self) -> int:
        return len(self.rows)

    def error(self, bad: dict[int, str]) -> UserError:
        """The error for a run that does not skip bad images."""
        row, reason = min(bad.items())
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        hint = "--on_bad_image skip leaves such rows out"
        if self.on_bad_image == "skip":
            hint = "and no row that does was found in its place"
        return UserError(f"image in row {row} does not decode{more}: {reason}; {hint}")

    def place_on_device(self, device: torch.device) -> None:
        """Moves a decoded set to the device, where it fits DEVICE_SHARE of its memory."""
        if self.pixels is None or device.type != "cuda":
            return
        free, total = torch.cuda.mem_get_info(device)
        if self.pixels.nbytes <= min(DEVICE_SHARE * total, free / 2):
            self.on_device = torch.empty(self.pixels.shape, dtype=torch.uint8, device=device)
            for start in range(0, len(self.pixels), 8192):
                part = torch.from_numpy(self.pixels[start : start + 8192].copy())
                self.on_device[start : start + len(part)] = part.to(device)
            torch.cuda.synchronize(device)  # it is read on another stream

    def __getitem__(self, places: Places) -> dict[str, Any]:
        bad: dict[int, str] = {}
        index, valid, error, batch = places.index.copy(), places.valid.copy(), None, {}
        try:
            if self.pixels is None:
                pixels, labels = self._decode(places, valid, bad)
                batch["pixel_values"] = torch.from_numpy(pixels)
            else:
                self._pass_over(places, index, valid, bad)
                labels = self.rows.labels[index]
                if self.on_device is None:
                    batch["pixel_values"] = torch.from_numpy(self.pixels[index])
                else:
                    batch["rows"] = torch.from_numpy(index)
            batch["labels"] = torch.from_numpy(labels)
        except UserError as caught:  # may be in a worker: a line is all that should come out of it
            error = str(caught)
        if bad and (self.on_bad_image == "raise" or (self.training and not valid.all())):
            error = str(self.error(bad))
        retried, self.rows.retried = self.rows.retried, []
        batch |= {"visit": places.visit, "index": places.index, "valid": valid}
        batch = {name: torch.as_tensor(value) for name, value in batch.items()}
        return {**batch, "bad": bad, "retried": retried, "error": error}

    def _pass_over(self, places: Places, index: np.ndarray, valid: np.ndarray, bad: dict[int, str]) -> None:
        """Puts good rows of a decoded set where the index names bad ones."""
        for place in np.flatnonzero(np.isin(index, list(self.bad))) if self.bad else ():
            attempt = 0
            while (row := int(index[place])) in self.bad and attempt < 100:
                bad[row] = self.bad[row]
                index[place] = self._another(places, place, attempt)
                attempt += 1
            valid[place] &= self.training and attempt < 100

    def _another(self, places: Places, place: int, attempt: int) -> int:
        """A row in place of one that does not decode."""
        key = sample_keys(self.seed, places.visit[place : place + 1], places.index[place : place + 1])
        return int(uniform(key, REPLACEMENT + attempt)[0] * len(self))

    def _decode(self, places: Places, valid: np.ndarray, bad: dict[int, str]) -> tuple[np.ndarray, np.ndarray]:
        """Pixels uint8 (B, H, W, 3), cropped where that is asked for, and labels (B,)."""
        index = places.index.copy()
        pixels = np.zeros((len(index), *self.preprocessing.image_size, 3), dtype=np.uint8)
        labels = np.zeros(len(index), dtype=np.int64)
        keys = sample_keys(self.seed, places.visit, places.index)
        left = np.arange(len(index))
        for attempt in range(100):
            images, labels[left] = self.rows.read(index[left])
            again = []
            for place, image in zip(left.tolist(), images):
                result = decode_row(image, self.preprocessing, self._box_of(keys[place : place + 1]))
                if isinstance(result, str):
                    bad[int(index[place])] = result
                    again.append(place)
                else:
                    pixels[place] = result
            if not again or not self.training or self.on_bad_image == "raise":
                break
            left = np.array(again)
            index[left] = [self._another(places, place, attempt) for place in again]
        valid[again] = False
        return pixels, labels

    def _box_of(self, key: np.ndarray):
        if self.crop_scale is None:
            return None
        return lambda size: tuple(resized_crop_boxes(key, size, self.crop_scale)[0].tolist())


def _in_worker(worker: int) -> None:
    """Launchers, clusters and Ctrl-C signal a whole process group; the parent still needs its batches for the step at
    hand, saves, and then ends its workers. One that is killed takes them along."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


_OPEN: "weakref.WeakSet[DeviceBatches]" = weakref.WeakSet()


@atexit.register
def _end_workers() -> None:
    """Before multiprocessing asks them to end by a signal that they leave to the parent, and waits for them."""
    for loader in list(_OPEN):
        loader.close()


class DeviceBatches:
    """The micro-batches at `places`, on the device: pixel_values uint8 (B, C, H, W), labels int64, valid bool (B,); visit
    and index stay on the host. Each `iter` starts at the first place.

    Args:
        num_workers: processes that read and decode; none where the set is decoded.
        faults: gets what went wrong.
        ahead: micro-batches that a thread keeps waiting on the device, copied while it computes. Default: AHEAD, but
            none on a CPU, where there is no copy to hide and a thread would only take turns with the training.

    Raises:
        UserError: when a batch is taken: a row that does not decode, where bad images are not skipped, or cannot be
            read.
    """

    def __init__(
        self,
        batches: ImageBatches,
        places: Any,
        device: torch.device,
        num_workers: int,
        faults: Faults,
        ahead: int | None = None,
    ):
        if device.type == "cuda" and device.index is None:  # accelerate's, of a single process
            device = torch.device("cuda", torch.cuda.current_device())
        self.batches, self.device, self.faults = batches, device, faults
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ahead = (0 if device.type == "cpu" else AHEAD) if ahead is None else ahead
        workers = 0 if batches.pixels is not None else num_workers
        self.loader = torch.utils.data.DataLoader(
            batches,
            batch_size=None,  # an item is a whole micro-batch
            sampler=places,
            num_workers=workers,
            persistent_workers=workers > 0,  # evaluation comes again and again
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # or else it would draw from the one that dropout uses
            worker_init_fn=_in_worker,
        )
        _OPEN.add(self)

    def close(self) -> None:
        """Ends the workers."""
        iterator, self.loader._iterator = self.loader._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()
            for worker in iterator._workers:
                worker.kill()  # one that did not come to an end in time

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        host = iter(self.loader)  # workers are started by this thread: they end with the one that started them
        try:
            for batch, copied in self._prefetched(host) if self.ahead else map(self._move, host):
                self._report(batch)
                if copied is not None:
                    stream = torch.cuda.current_stream(self.device)
                    stream.wait_event(copied)
                    for name in ("pixel_values", "labels", "valid"):
                        batch[name].record_stream(stream)
                yield batch
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(
                "a worker process that decodes images was killed, as a system does that is out of memory: lower "
                "--dataloader_num_workers"
            ) from None

    def _prefetched(self, host: Iterator[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Any]]:
        """What `_move` gives for each batch of the host, worked on ahead by a thread."""
        ready: queue.Queue = queue.Queue(self.ahead)
        stop = threading.Event()
        thread = threading.Thread(target=self._fill, args=(host, ready, stop), daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            while thread.is_alive():  # it may be waiting for room
                try:
                    ready.get(timeout=0.05)
                except queue.Empty:
                    pass
            thread.join()

    def _fill(self, host: Iterator[dict[str, Any]], ready: queue.Queue, stop: threading.Event) -> None:
        try:
            if self.stream is not None:
                torch.cuda.set_device(self.device)  # a thread starts at the first one
            with torch.cuda.stream(self.stream):  # None is no stream
                for batch in host:
                    if stop.is_set():
                        return
                    ready.put(self._move(batch))
            ready.put(None)
        except BaseException as error:  # the other thread raises it
            ready.put(error)

    def _move(self, batch: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """The batch on the device, and the event that its copies are done (None where there is nothing to wait for)."""
        if batch["error"] is not None:
            return batch, None
        for name in ("pixel_values", "rows", "labels", "valid"):
            if name in batch:
                batch[name] = batch[name].to(self.device, non_blocking=True)
        if "rows" in batch:
            batch["pixel_values"] = self.batches.on_device.index_select(0, batch.pop("rows"))
        batch["pixel_values"] = batch["pixel_values"].permute(0, 3, 1, 2)
        return batch, torch.cuda.current_stream().record_event() if self.device.type == "cuda" else None

    def _report(self, batch: dict[str, Any]) -> None:
        found, retried, error = batch.pop("bad"), batch.pop("retried"), batch.pop("error")
        for line in retried:
            print(f"warning: read again: {line}", file=sys.stderr)
        self.faults.retried += retried
        if error is not None:
            raise UserError(error)
        for row in found.keys() - self.faults.bad.keys():
            if len(self.faults.bad) < 10:  # all are counted; the first ones are shown
                print(f"warning: skipping row {row}: {found[row]}", file=sys.stderr)
            self.faults.bad[row] = found[row]
