"""All files of a copy, on all cores."""

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from vit_hf.data.copy.plan import Shard, Work
from vit_hf.data.copy.shard import finish_shard
from vit_hf.data.machine import end_with_parent
from vit_hf.data.rows.table import TableRows
from vit_hf.errors import UserError
from vit_hf.progress import progress


class _Stopped(Exception):
    """Another process failed, or the user stopped the work."""


def make_shards(shards: list[Shard], work: Work, num_processes: int) -> list[str]:
    """Makes the shards that are missing, and returns the SHA-256 of each.

    Raises:
        UserError: an image cannot be copied; a worker process was killed.
        OSError: a file cannot be written.
    """
    with progress(sum(map(len, shards)), "preparing", "image") as bar:
        if num_processes == 1:
            rows = {split: TableRows(dataset) for split, dataset in work.sets.items()}
            return [finish_shard(shard, rows[shard.split], work, bar.update) for shard in shards]
        return _make_in_processes(shards, work, num_processes, bar)


def _make_in_processes(shards: list[Shard], work: Work, num_processes: int, bar: Any) -> list[str]:
    """A worker can be killed at any moment, so workers share no queue and no lock, which a dead one would hold for ever:
    each has its own pipe, which the system closes with it. ProcessPoolExecutor has both, and does not end at all when
    one worker dies while it starts another."""
    # Spawned, not forked: the libraries have threads by now, which a fork would leave in the middle of something.
    context = multiprocessing.get_context("spawn")
    done, stop = context.RawArray("q", num_processes), context.RawValue("b", 0)
    workers: dict[Connection, BaseProcess] = {}
    checksums, waiting, busy = [""] * len(shards), iter(range(len(shards))), {}

    def give_next(pipe: Connection) -> None:
        if (number := next(waiting, None)) is not None:
            busy[pipe] = number
            with _somebody_at_the_end():
                pipe.send(shards[number])

    try:
        for number in range(num_processes):
            pipe, end = context.Pipe()
            # Without the work: what is larger than a pipe would never all be written to a process that dies at once.
            worker = context.Process(target=_run_worker, args=(end, number, done, stop, os.getpid()))
            worker.start()
            end.close()  # the worker's is the only one now
            workers[pipe] = worker
        for pipe in workers:
            with _somebody_at_the_end():
                pipe.send(work)
            give_next(pipe)
        while busy:
            for pipe in wait(list(busy), timeout=0.2):
                with _somebody_at_the_end():
                    answer = pipe.recv()
                if isinstance(answer, Exception):
                    raise answer
                checksums[busy.pop(pipe)] = answer
                give_next(pipe)
            bar.update(sum(done) - bar.n)
        return checksums
    finally:
        stop.value = 1  # a worker in the middle of a shard removes it
        for pipe in workers:
            pipe.close()
        for worker in workers.values():
            worker.join()


@contextlib.contextmanager
def _somebody_at_the_end() -> Iterator[None]:
    """Around the use of a pipe: raises UserError where the worker at its other end is dead."""
    try:
        yield
    except (EOFError, OSError):
        raise UserError(
            "a worker process was killed (is there enough memory?); the same command goes on after the finished files"
        ) from None


def _run_worker(pipe: Connection, number: int, done: Any, stop: Any, parent: int) -> None:
    """Answers each shard that comes through the pipe, until the parent closes it.

    Args:
        done: a number of rows for each worker, which only that worker changes.
        stop: 1 when no shard is wanted any more.
        parent: its process number.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent says when to stop
    end_with_parent(parent)

    def count(rows: int) -> None:
        done[number] += rows
        if stop.value:
            raise _Stopped

    with contextlib.suppress(EOFError, ConnectionError):
        work, rows = pipe.recv(), {}
        while True:
            pipe.send(_answer(pipe.recv(), work, rows, count))


def _answer(shard: Shard, work: Work, rows: dict[str, TableRows], count: Callable[[int], Any]) -> str | Exception:
    """The SHA-256 of a shard that is made, or why it is not. `rows` keeps the tables that are open."""
    try:
        if shard.split not in rows:
            rows[shard.split] = TableRows(work.sets[shard.split])
        return finish_shard(shard, rows[shard.split], work, count)
    except Exception as error:
        error.add_note(f"in a worker process:\n{traceback.format_exc()}")  # a pipe takes no traceback
        return error
