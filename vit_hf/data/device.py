"""The way of micro-batches to the device: worker processes, pinned memory, and a thread that copies ahead."""

import atexit
import multiprocessing
import queue
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor

from vit_hf.data.batches import ImageBatches
from vit_hf.data.faults import Faults
from vit_hf.data.machine import PREFETCHED
from vit_hf.data.resize import resizing
from vit_hf.data.workers import (
    SILENT_SECONDS,
    explain_deaths,
    failure,
    no_room,
    set_up_worker,
    through_pipe,
    through_shared_memory,
)
from vit_hf.errors import UserError

AHEAD = 2  # micro-batches that wait on the device
ASKING_SECONDS = 5  # after which the loader is asked again


_OPEN: "weakref.WeakSet[DeviceBatches]" = weakref.WeakSet()


@atexit.register
def _end_workers() -> None:
    """Before multiprocessing asks them to end by a signal that they leave to the parent, and waits for them."""
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # their end is no news any more
    for loader in list(_OPEN):
        loader.close()
    for worker in multiprocessing.active_children():  # of a loader that is gone without having been closed
        if worker.daemon:
            worker.kill()


def _workers() -> list[BaseProcess]:
    """All workers that have been started and not been closed."""
    iterators = [loader.loader._iterator for loader in list(_OPEN)]
    return [worker for iterator in iterators if iterator is not None for worker in iterator._workers]


def promised_bytes() -> int:
    """The shared memory that the loaders of this process may take."""
    return sum(loader.needed_bytes for loader in list(_OPEN) if loader.shared)


class DeviceBatches:
    """The micro-batches of an order, on the device, as the model's input: pixel_values uint8 (B, C, H, W), labels int64
    (B,) or, of sets with any number of labels an image, float (B, K) of 0 and 1, valid bool (B,); visit and index stay on
    the host. Each `iter` starts at the first one.

    Args:
        num_workers: processes that read and decode; none where the set is decoded.
        faults: gets what went wrong.
        ahead: micro-batches that a thread keeps waiting on the device, copied while it computes. Default: AHEAD, but
            none on a CPU, where there is no copy to hide and a thread would only take turns with the training.
        pieces: items of the order that are one micro-batch together, each made by another worker.
        needed_bytes: shared memory that the micro-batches of the workers take.
        shared: False sends them through a pipe, which needs none.

    Raises:
        UserError: when a batch is taken: a row that does not decode, where bad images are not skipped, or cannot be
            read; a worker that died, or is silent; no shared memory at all.
    """

    def __init__(
        self,
        batches: ImageBatches,
        order: Any,
        device: torch.device,
        num_workers: int,
        faults: Faults,
        ahead: int | None = None,
        pieces: int = 1,
        needed_bytes: int = 0,
        shared: bool = True,
    ):
        if device.type == "cuda" and device.index is None:  # accelerate's, of a single process
            device = torch.device("cuda", torch.cuda.current_device())
        self.batches, self.device, self.faults, self.pieces = batches, device, faults, pieces
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ahead = (0 if device.type == "cpu" else AHEAD) if ahead is None else ahead
        self.resize = None
        if batches.decoded is not None:
            num_workers = 0
            if batches.decoded.native:
                self.resize = resizing(batches.decoded.size, batches.preprocessing, device)
        self.needed_bytes, self.shared = needed_bytes, shared and num_workers > 0
        send = through_shared_memory if shared else through_pipe
        self.loader = torch.utils.data.DataLoader(
            batches,
            batch_size=None,  # an item is a whole micro-batch, or a worker's piece of it
            sampler=order,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,  # evaluation comes again and again
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # or else it would draw from the one that dropout uses
            worker_init_fn=set_up_worker,
            # so many micro-batches a worker, however they are cut
            prefetch_factor=PREFETCHED * pieces if num_workers else None,
            collate_fn=send if num_workers else None,
            timeout=ASKING_SECONDS if num_workers else 0,
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
        try:
            loader = iter(self.loader)  # workers are started by this thread: they end with the one that started them
        except OSError as error:
            if (line := no_room(error, self.needed_bytes)) is None:
                raise
            raise line from None
        explain_deaths(_workers)
        stop = threading.Event()
        host = self._taken(loader, stop)
        try:
            for batch, copied in self._prefetched(host, stop) if self.ahead else map(self._join, host):
                self._report(batch)
                if copied is not None:
                    stream = torch.cuda.current_stream(self.device)
                    stream.wait_event(copied)
                    for name in ("pixel_values", "labels", "valid"):
                        batch[name].record_stream(stream)
                yield batch
        except (RuntimeError, OSError, EOFError) as error:
            if (line := failure(error, _workers())) is None:
                raise
            raise line from None

    def _taken(self, loader: Iterator[dict[str, Any]], stop: threading.Event) -> Iterator[tuple[dict[str, Any], ...]]:
        """The pieces of each micro-batch, as the workers bring them. The loader is asked again every few seconds, so that
        a worker that died is noticed, and that a thread in here hears of `stop`, at which this ends."""
        pieces: list[dict[str, Any]] = []
        heard = time.monotonic()
        while not stop.is_set():
            try:
                pieces.append(next(loader))
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader timed out" not in str(error) or time.monotonic() - heard > SILENT_SECONDS:
                    raise
                continue
            if len(pieces) == self.pieces:
                yield tuple(pieces)
                pieces = []
            heard = time.monotonic()

    def _prefetched(
        self, host: Iterator[tuple[dict[str, Any], ...]], stop: threading.Event
    ) -> Iterator[tuple[dict[str, Any], Any]]:
        """What `_join` gives for each batch of the host, worked on ahead by a thread."""
        ready: queue.Queue = queue.Queue(self.ahead)
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

    def _fill(self, host: Iterator[tuple[dict[str, Any], ...]], ready: queue.Queue, stop: threading.Event) -> None:
        try:
            if self.stream is not None:
                torch.cuda.set_device(self.device)  # a thread starts at the first one
            with torch.cuda.stream(self.stream):  # None is no stream
                for pieces in host:
                    if stop.is_set():
                        return
                    ready.put(self._join(pieces))
            ready.put(None)
        except BaseException as error:  # the other thread raises it
            ready.put(error)

    def _join(self, pieces: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], Any]:
        """A micro-batch on the device, of its pieces, some of which may be empty; and the event that its copies are done
        (None where there is nothing to wait for)."""
        if len(pieces) == 1:
            whole = self._move(pieces[0])
        else:
            whole = self._joined([self._move(piece) for piece in pieces])
        on_gpu = self.device.type == "cuda" and whole["error"] is None
        return whole, torch.cuda.current_stream().record_event() if on_gpu else None

    def _joined(self, pieces: list[dict[str, Any]]) -> dict[str, Any]:
        """Pieces as one micro-batch. What went wrong may be in an empty one."""
        whole: dict[str, Any] = {
            "bad": {row: reason for piece in pieces for row, reason in piece["bad"].items()},
            "retried": [line for piece in pieces for line in piece["retried"]],
            "error": next((piece["error"] for piece in pieces if piece["error"] is not None), None),
        }
        if whole["error"] is not None:
            return whole
        pieces = [piece for piece in pieces if len(piece["labels"])]
        if len(pieces) == 1:
            return {**pieces[0], **whole}
        for name in ("labels", "visit", "index", "valid"):
            whole[name] = torch.cat([piece[name] for piece in pieces])
        channels_last = [piece["pixel_values"].permute(0, 2, 3, 1) for piece in pieces]  # as it lies in memory
        whole["pixel_values"] = torch.cat(channels_last).permute(0, 3, 1, 2)
        return whole

    def _move(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch on the device; its copies may be under way."""
        if batch["error"] is not None:
            return batch
        for name in ("pixel_values", "rows", "labels", "valid"):
            if name in batch:
                batch[name] = batch[name].to(self.device, non_blocking=True)
        if batch["labels"].dtype == torch.bool:  # a byte a class on the way
            batch["labels"] = batch["labels"].float()
        if "rows" in batch:
            batch["pixel_values"] = self.batches.on_device.index_select(0, batch.pop("rows"))
        if self.resize is not None:
            batch["pixel_values"] = self.resize(batch["pixel_values"])
        batch["pixel_values"] = batch["pixel_values"].permute(0, 3, 1, 2)
        return batch

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
