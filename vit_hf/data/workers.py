"""Worker processes: how they start and end, and how a micro-batch comes from one to its parent: through shared memory,
or through a pipe where shared memory has no room. This module must not know what a batch means.
"""

import errno
import signal
import threading
from collections.abc import Callable, Iterable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor

from vit_hf.data.machine import SHARED_MEMORY, end_with_parent, shared_memory_free
from vit_hf.errors import UserError

SILENT_SECONDS = 600  # no read that is tried again, and no decoding, takes so long; well below --ddp_timeout's default
GONE_SECONDS = 5  # until a broken connection must have become a dead worker
SMALL_BYTES = 1 << 16  # what a pipe takes at once: less is not worth a file of shared memory


def set_up_worker(worker: int) -> None:
    """Launchers, clusters and Ctrl-C signal a whole process group; the parent still needs its batches for the step at
    hand, saves, and then ends its workers. One that is killed takes them along."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


class _Piped:
    """A tensor that is pickled as its bytes, and comes out as a tensor."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def __reduce__(self):
        return torch.from_numpy, (self.tensor.numpy(),)


def through_pipe(batch: dict[str, Any]) -> dict[str, Any]:
    """A worker's micro-batch as it goes through the pipe to the parent."""
    return {name: _Piped(value) if isinstance(value, Tensor) else value for name, value in batch.items()}


def through_shared_memory(batch: dict[str, Any]) -> dict[str, Any]:
    """A worker's micro-batch with its large tensors in shared memory; in the pipe where there is no room at the moment:
    torch, which would move them later in a thread of the worker, loses the batch then, and the parent waits for ever."""
    sent = through_pipe(batch)
    for name, value in batch.items():
        free = shared_memory_free()
        if isinstance(value, Tensor) and value.nbytes > SMALL_BYTES and (free is None or free > value.nbytes):
            try:
                sent[name] = value.share_memory_()
            except RuntimeError:  # another process was faster
                pass
    return sent


def free_text() -> str:
    """How much shared memory is free, in words."""
    free = shared_memory_free()
    return "" if free is None else f"{free / 1e6:.1f} MB of shared memory are free in {SHARED_MEMORY}"


def no_room(error: OSError, needed: int) -> UserError | None:
    """The error of a system that has not even room for the locks of workers; None for another error."""
    if error.errno != errno.ENOSPC:
        return None
    return UserError(
        f"worker processes need shared memory: {needed / 1e6:.1f} MB for their images, and a little for their locks, but "
        f"{free_text()}: give the container more (docker's --shm-size), empty the folder, or decode without workers "
        "(--dataloader_num_workers 0)"
    )


def failure(error: Exception, workers: Iterable[BaseProcess]) -> UserError | None:
    """The line for what torch raises when a worker is silent or dead; None for another error."""
    workers, text = list(workers), str(error)
    if text.startswith("Caught "):  # a fault in a worker, with its traceback
        return None
    if "DataLoader timed out" in text:
        _kill(workers)
        return UserError(
            f"no worker process has brought images for {SILENT_SECONDS} seconds: does the storage answer? {free_text()}; "
            "--dataloader_num_workers 0 decodes without workers"
        )
    broken = isinstance(error, OSError | EOFError)  # it may have died with a batch under way
    if not broken and "DataLoader worker (pid" not in text:
        return None
    wait([worker.sentinel for worker in workers], timeout=GONE_SECONDS)
    codes = [code for worker in workers if (code := worker.exitcode)]  # None lives, 0 ended in peace
    if broken and not codes:
        return None
    code = codes[0] if codes else 0
    if code == -getattr(signal, "SIGBUS", 0) < 0:
        return UserError(
            "a worker process that decodes images ended by a bus error: shared memory that is full, or a mapped file that "
            f"was cut off; {free_text()}: give the container more (docker's --shm-size), or lower --dataloader_num_workers"
        )
    if code == -getattr(signal, "SIGKILL", 0) < 0:
        return UserError(
            "a worker process that decodes images was killed, as a system does that is out of memory: lower "
            "--dataloader_num_workers"
        )
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
    return UserError(
        f"a worker process that decodes images {how}; --dataloader_num_workers 0 decodes in the training process, which "
        "shows the fault itself"
    )


class _Explained:
    """torch's handler of SIGCHLD, which raises in the midst of what the main thread does, with a line for its error."""

    def __init__(self, handler: Callable, workers: Callable[[], Iterable[BaseProcess]]):
        self.handler, self.workers, self.expected = handler, workers, False

    def __call__(self, number: int, frame: Any) -> None:
        if self.expected:
            return
        try:
            self.handler(number, frame)
        except RuntimeError as error:
            if (line := failure(error, self.workers())) is None:
                raise
            raise line from None


def _kill(workers: Iterable[BaseProcess]) -> None:
    """Ends workers that do not answer, which torch would wait for."""
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    if isinstance(handler, _Explained):
        handler.expected = True
    for worker in workers:
        worker.kill()
        worker.join()
    if isinstance(handler, _Explained):
        handler.expected = False


def explain_deaths(workers: Callable[[], Iterable[BaseProcess]]) -> None:
    """Makes a worker's death a line, wherever the main thread hears of it. To be called when torch has set its handler.

    Args:
        workers: gives all that live, or should.
    """
    if not hasattr(signal, "SIGCHLD"):  # Windows tells nobody
        return
    handler = signal.getsignal(signal.SIGCHLD)
    if threading.current_thread() is threading.main_thread() and callable(handler):
        if not isinstance(handler, _Explained):
            signal.signal(signal.SIGCHLD, _Explained(handler, workers))
