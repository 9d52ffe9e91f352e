"""Processes that are gone or hang: the others end in a line that names them.

A collective that waits for a process that is gone ends after the time-out of the process group at the latest; what it
says then names no process, and NCCL says nothing that Python could catch. So a thread of each process leaves a sign of
life in the process group's store every second. The main process looks for those of all others, the others look for the
main process's.

This module must not know what the processes do.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import NoReturn

import accelerate
import torch

from vit_hf.errors import UserError

BEAT_SECONDS = 1.0  # between two signs of life
LOOK_SECONDS = 5.0  # how long one looks for them after a collective has failed
LEAVE_SECONDS = 10.0  # for the main thread to come out of a collective by itself, when the others are told to end
DONE = "-"  # the last words of a process that ended well
QUIET_SECONDS = 15.0  # without any: its part of a save is not waited for; launchers kill 30 s after they ask to end
DEAD_SHARE = 0.9  # of the time-out without a sign of life: NCCL's watchdog would end the process without our line
# what torch raises where the other end of a collective is gone; gloo's errors have no class of their own
COLLECTIVE = (
    "gloo",
    "NCCL",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
)


_life: "_Life | None" = None  # of this process, within lost_process


@contextlib.contextmanager
def lost_process(accelerator: accelerate.Accelerator, timeout_seconds: float) -> Iterator[None]:
    """Around everything that processes do together, from the accelerator to its end; all processes enter it.

    Args:
        timeout_seconds: --ddp_timeout. A process that gives no sign of life for nine tenths of it is gone.

    Raises:
        UserError: a collective failed; names the process that is gone, with its own last words where it had some.
    """
    if accelerator.num_processes == 1:
        yield
        return
    global _life
    life, words = _Life(accelerator, DEAD_SHARE * timeout_seconds), ""
    _life = life
    try:
        yield
    except RuntimeError as error:
        if not _of_a_collective(error):
            words = _words(error)
            raise
        if threading.current_thread() is threading.main_thread():
            # the launcher sends it for the same reason, and the line has to come out
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise UserError(life.explain(_first_line(error))) from None
    except BaseException as error:
        words = _words(error)
        raise
    finally:
        _life = None
        life.close(words)


def is_quiet(rank: int) -> bool:
    """Whether the main process has heard nothing of another one for QUIET_SECONDS; False outside of `lost_process`."""
    return _life is not None and rank in _life.quiet


def private_store(name: str) -> torch.distributed.Store:
    """The store of the process group under names of its own, over a connection of its own: whoever waits in it keeps
    nobody else from it."""
    store = torch.distributed.distributed_c10d._get_default_store()
    return torch.distributed.PrefixStore(f"vit_hf/{name}", store.clone())


def named(ranks: Iterable[int]) -> str:
    """ "process 1", "processes 1, 2" """
    ranks = list(ranks)
    return f"process{'es' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def end_at_once(line: str) -> NoReturn:
    """Ends this process from a thread, its main thread being stuck in a collective."""
    rank = int(os.environ.get("RANK", "0"))
    sys.stdout.flush()
    print(f"{f'[rank {rank}] ' if rank else ''}error: {line}", file=sys.stderr, flush=True)
    os._exit(1)


def _of_a_collective(error: RuntimeError) -> bool:
    return isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in COLLECTIVE)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _words(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {_first_line(error)}"


class _Life:
    """Signs of life of this process, and what is known of those of others. Made by all processes."""

    def __init__(self, accelerator: accelerate.Accelerator, dead_seconds: float):
        self._rank, size, self._dead_seconds = accelerator.process_index, accelerator.num_processes, dead_seconds
        self._others = [rank for rank in range(size) if rank != self._rank]
        self._watched = self._others if self._rank == 0 else [0]
        self._store = private_store("life")
        self._beats = 0
        self._leave("")
        self._beat()
        accelerator.wait_for_everyone()  # from here on every process has its names in the store
        now = time.monotonic()
        self._signs, self._heard = dict.fromkeys(self._others, b""), dict.fromkeys(self._others, now)
        self._last_words: dict[int, str] = {}
        self.quiet: list[int] = []  # for QUIET_SECONDS
        self._looked = now
        self._closing, self._asked, self._explained = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def explain(self, error: str) -> str:
        """Why a collective failed."""
        self._error = error
        self._asked.set()
        self._explained.wait(2 * LOOK_SECONDS)  # the store may hang with the machine that keeps it
        return self._explanation if self._explained.is_set() else line_of_silent([0], LOOK_SECONDS)

    def close(self, words: str) -> None:
        """Ends the signs of life, and leaves the last words of a process that failed."""
        self._closing.set()
        self._thread.join(timeout=2 * BEAT_SECONDS)  # the store may hang
        if not self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # the store is gone with whoever kept it
                self._leave(words or DONE)

    def _leave(self, words: str) -> None:
        self._store.set(f"words/{self._rank}", words)

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"sign/{self._rank}", str(self._beats))

    def _run(self) -> None:
        while not self._closing.wait(BEAT_SECONDS):
            line = self._look() if self._asked.is_set() else self._watch()
            if line is not None:
                self._explanation = line
                self._explained.set()
                if not self._closing.wait(LEAVE_SECONDS):
                    end_at_once(line)
                return

    def _watch(self) -> str | None:
        """The line of the end, once a process has given no sign of life for too long; the main process tells it to all."""
        now = time.monotonic()  # before reading: this process may itself be stopped for a while
        with contextlib.suppress(RuntimeError):  # where the store is gone, nobody is heard
            self._beat()
            self._read(self._watched, now)
            if self._store.check(["dead"]):
                return self._store.get("dead").decode()
        stood_still = now - self._looked > LOOK_SECONDS  # itself, so that it has heard nobody
        self.quiet, self._looked = [] if stood_still else self._silent_since(self._watched, now - QUIET_SECONDS), now
        dead = self._silent_since(self._watched, now - self._dead_seconds)
        if not dead:
            return None
        line = self._explained_by_words() or line_of_silent(dead, self._dead_seconds)
        with contextlib.suppress(RuntimeError):
            self._store.set("dead", line)
        return line

    def _look(self) -> str:
        """Why a collective has failed: what a process said before it ended, or who is silent now."""
        start = time.monotonic()
        while (now := time.monotonic()) < start + LOOK_SECONDS:
            try:
                self._beat()
                self._read(self._others, now)
            except RuntimeError:
                return "the store of the process group is gone, with process 0 or with the launcher that kept it"
            if line := self._explained_by_words():
                return line
            if self._closing.wait(BEAT_SECONDS / 2):
                break
        # what changed between the last look and the first of these says nothing about now
        silent = self._silent_since(self._others, start + 2 * BEAT_SECONDS)
        return (
            line_of_silent(silent, LOOK_SECONDS)
            if silent
            else (
                "a collective failed, though all processes give signs of life: look at the network between the machines, or "
                f"raise --ddp_timeout where one may be so slow ({self._error})"
            )
        )

    def _read(self, ranks: list[int], now: float) -> None:
        found = self._store.multi_get([f"{kind}/{rank}" for kind in ("sign", "words") for rank in ranks])
        for place, rank in enumerate(ranks):
            if found[place] != self._signs[rank]:
                self._signs[rank], self._heard[rank] = found[place], now
            self._last_words[rank] = found[len(ranks) + place].decode()

    def _silent_since(self, ranks: list[int], since: float) -> list[int]:
        return [rank for rank in ranks if self._heard[rank] < since and self._last_words.get(rank) != DONE]

    def _explained_by_words(self) -> str | None:
        for rank, words in sorted(self._last_words.items()):
            if words not in ("", DONE):
                return f"process {rank} ended: {words}"
        return None


def line_of_silent(ranks: list[int], seconds: float) -> str:
    return (
        f"{named(ranks)} gave no sign of life for {seconds:.0f} s: killed, stopped, or on a machine that is gone; the "
        "same command goes on from the newest checkpoint"
    )
