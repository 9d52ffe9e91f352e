"""All files of a copy, on all cores."""

import multiprocessing
import os
import signal
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tqdm.auto import tqdm

from vit_hf.data.copy.plan import Shard, Work
from vit_hf.data.copy.shard import finish_shard
from vit_hf.data.machine import end_with_parent
from vit_hf.data.rows.table import TableRows
from vit_hf.errors import UserError


class _Stopped(Exception):
    """Another process failed, or the user stopped the work."""


def make_shards(shards: list[Shard], work: Work, num_processes: int) -> list[str]:
    """Makes the shards that are missing, and returns the SHA-256 of each.

    Raises:
        UserError: an image cannot be copied; a worker process was killed.
        OSError: a file cannot be written.
    """
    with tqdm(total=sum(map(len, shards)), unit="image", desc="preparing", dynamic_ncols=True) as bar:
        if num_processes == 1:
            rows = {split: TableRows(dataset) for split, dataset in work.sets.items()}
            return [finish_shard(shard, rows[shard.split], work, bar.update) for shard in shards]
        # Spawned, not forked: the libraries have threads by now, which a fork would leave in the middle of something.
        context = multiprocessing.get_context("spawn")
        done, stop = context.Value("q", 0), context.Value("b", 0, lock=False)
        state = (work, done, stop, os.getpid())
        with ProcessPoolExecutor(num_processes, context, initializer=_start_worker, initargs=state) as pool:
            try:
                futures = [pool.submit(_work_on, shard) for shard in shards]
                waiting = set(futures)
                while waiting:
                    ended, waiting = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
                    bar.update(done.value - bar.n)
                    for future in ended:
                        future.result()
                return [future.result() for future in futures]
            except BaseException as error:
                stop.value = 1  # a worker in the middle of a shard removes it
                pool.shutdown(cancel_futures=True)
                if isinstance(error, BrokenProcessPool):
                    raise UserError(
                        "a worker process was killed (is there enough memory?); the same command goes on after the "
                        "finished files"
                    ) from None
                raise


_worker: dict[str, Any] = {}  # in a worker process: what `_work_on` needs besides the shard


def _start_worker(work: Work, done: Any, stop: Any, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent says when to stop
    end_with_parent(parent)
    _worker.update(work=work, done=done, stop=stop, rows={name: TableRows(rows) for name, rows in work.sets.items()})


def _work_on(shard: Shard) -> str:
    def count(rows: int) -> None:
        with _worker["done"].get_lock():
            _worker["done"].value += rows
        if _worker["stop"].value:
            raise _Stopped

    return finish_shard(shard, _worker["rows"][shard.split], _worker["work"], count)
