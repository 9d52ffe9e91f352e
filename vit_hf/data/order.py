"""Which sample comes where: the order of an epoch, and the samples of each micro-batch of each process.

Training samples are one endless stream, epoch after epoch; position p of the stream is place p % N of epoch p // N.
Step k takes the positions k*G to (k+1)*G of the stream, whatever the number of processes and the micro-batch, so a
run can start at any step. Evaluation takes every sample exactly once. This module must not know what a sample is.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vit_hf.data.randomness import mix_bits, sample_keys, uniform
from vit_hf.errors import UserError


def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """The order of the samples in an epoch: int64 (num_samples,), a permutation, a function of its arguments alone."""
    index = np.arange(num_samples, dtype=np.int64)
    return np.argsort(mix_bits(sample_keys(seed, np.full_like(index, epoch), index)), kind="stable")


def balanced_order(seed: int, epoch: int, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order of an epoch in which all classes come equally often: the number of each visit, counted for its sample
    from the first epoch on, and the sample's index, int64 (N,) each; a function of the arguments alone.

    The places of all epochs, N an epoch, go round the classes that have samples; those of one class go through its
    samples again and again, each time in another order. So after each epoch the places of two classes, and the visits
    of two samples of a class, differ by one at most. Source: class-balanced sampling, arXiv 1910.09217, section 3, here
    without replacement.

    Args:
        labels: int (N,), at least 0.
    """
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])
    members = [rows for rows in members if len(rows)]
    first, step = epoch * len(labels), len(members)
    visit, index = np.empty((2, len(labels)), dtype=np.int64)
    for number, rows in enumerate(members):
        places = np.arange((number - first) % step, len(labels), step)
        cycle, place = np.divmod((first + places) // step, len(rows))
        cycles = np.arange(cycle[0], cycle[-1] + 1)
        order = np.argsort(mix_bits(sample_keys(seed, cycles[:, None], rows[None])), axis=1, kind="stable")
        visit[places], index[places] = cycle, rows[order[cycle - cycle[0], place]]
    mixed = epoch_order(seed, epoch, len(labels))
    return visit[mixed], index[mixed]


@dataclass
class BatchIndices:
    """The samples of one micro-batch: how often each was seen before and its index, int64 (B,); `valid` marks those
    that count."""

    visit: np.ndarray
    index: np.ndarray
    valid: np.ndarray


@dataclass(frozen=True)
class StepPlan:
    """Which steps a process takes part in, and how each step's samples are cut over processes and micro-batches.

    Args:
        first_step, total_steps: the steps first_step..total_steps-1 are taken.
        rank: this process, of `num_processes`.
        accumulation: micro-batches of each process in a step.
    """

    seed: int
    first_step: int
    total_steps: int
    num_processes: int
    rank: int
    micro_batch_size: int
    accumulation: int

    def __len__(self) -> int:
        """The number of micro-batches."""
        return (self.total_steps - self.first_step) * self.accumulation

    def micro_steps(self) -> range:
        """The numbers of the micro-batches, counted from the start of the run."""
        return range(self.first_step * self.accumulation, self.total_steps * self.accumulation)


class TrainOrder:
    """The micro-batches of one process, of a set whose samples can be read in any order.

    Args:
        repeats: how often each sample comes in a row, each time augmented otherwise; an epoch keeps its length, so it
            then holds a part of the samples. Source: repeated augmentation, arXiv 1902.05509.
        labels: of all samples, int (N,), where all classes shall come equally often.
    """

    def __init__(self, plan: StepPlan, *, num_samples: int, repeats: int = 1, labels: np.ndarray | None = None):
        self.plan, self.num_samples, self.repeats, self.labels = plan, num_samples, repeats, labels
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[BatchIndices]:
        size = self.plan.micro_batch_size
        for micro_step in self.plan.micro_steps():
            start = (micro_step * self.plan.num_processes + self.plan.rank) * size
            position, copy = np.divmod(np.arange(start, start + size), self.repeats)
            epoch, place = np.divmod(position, self.num_samples)
            visit, index = np.empty((2, size), dtype=np.int64)
            for number in np.unique(epoch):
                here = epoch == number
                visit[here], index[here] = (values[place[here]] for values in self._order(int(number)))
            yield BatchIndices(visit * self.repeats + copy, index, np.ones(len(index), dtype=bool))

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The number of each visit of an epoch, and the sample's index."""
        if epoch not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k == epoch - 1}
            if self.labels is None:
                order = epoch_order(self.plan.seed, epoch, self.num_samples)
                self._orders[epoch] = np.broadcast_to(epoch, order.shape), order
            else:
                self._orders[epoch] = balanced_order(self.plan.seed, epoch, self.labels)
        return self._orders[epoch]


class EvalOrder:
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

    def __iter__(self) -> Iterator[BatchIndices]:
        workers = np.arange(len(self)) % max(1, self.num_workers)  # which worker gets which batch
        stretch = np.empty(len(self), dtype=np.int64)
        stretch[np.argsort(workers, kind="stable")] = np.arange(len(self))
        for number in stretch:
            start = (self.rank * len(self) + number) * self.batch_size
            index = np.arange(start, start + self.batch_size, dtype=np.int64)
            valid = index < self.num_samples
            yield BatchIndices(np.zeros_like(index), np.where(valid, index, 0), valid)


DISPLACE = 200  # the use of a row's randomness


class StreamOrder:
    """The micro-batches of one process, of a set that is read shard by shard: those of its workers, in turn.

    A stream is one worker's share of the shards, drawn anew for each epoch from (seed, epoch); inside it a row is moved
    back by up to the worker's share of the shuffle buffer, drawn from (seed, epoch, row). So every position is a function
    of the step, the number of processes and the number of workers, and a resume starts there at once.

    Args:
        shards: the indices in each shard.
        num_workers: of each process; 0 counts as one.
        buffer_size: rows that a process mixes.

    Raises:
        UserError: fewer shards than the processes and workers need.
    """

    def __init__(self, plan: StepPlan, *, shards: list[np.ndarray], num_workers: int, buffer_size: int):
        self.plan, self.shards = plan, shards
        self.workers = max(1, num_workers)
        self.num_streams = plan.num_processes * self.workers
        if len(shards) < self.num_streams:
            raise UserError(
                f"--streaming: {len(shards)} shards for {plan.num_processes} processes with {self.workers} workers each, "
                f"which need {self.num_streams}; take fewer workers (--dataloader_num_workers) or processes, or write "
                "more shards (vit-hf data prepare)"
            )
        self.buffer_size = max(1, buffer_size // self.workers)
        self._orders: dict[tuple[int, int], np.ndarray] = {}
        self._starts: dict[int, list[int]] = {}  # of each stream: the position at which each epoch begins

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[BatchIndices]:
        for micro_step in self.plan.micro_steps():
            number, worker = divmod(micro_step, self.workers)
            epoch, index = self._take(self.plan.rank * self.workers + worker, number * self.plan.micro_batch_size)
            yield BatchIndices(epoch, index, np.ones(len(index), dtype=bool))

    def _take(self, stream: int, start: int) -> tuple[np.ndarray, np.ndarray]:
        starts = self._starts.setdefault(stream, [0])
        while starts[-1] < start + self.plan.micro_batch_size:
            starts.append(starts[-1] + sum(len(shard) for shard in self._share(stream, len(starts) - 1)))
        position = np.arange(start, start + self.plan.micro_batch_size)
        epoch = np.searchsorted(starts, position, side="right") - 1
        index = np.empty_like(position)
        for number in np.unique(epoch):
            here = epoch == number
            index[here] = self._order(stream, int(number))[position[here] - starts[number]]
        return epoch.astype(np.int64), index

    def _share(self, stream: int, epoch: int) -> list[np.ndarray]:
        order = epoch_order(self.plan.seed, epoch, len(self.shards))
        return [self.shards[number] for number in order[stream :: self.num_streams]]

    def _order(self, stream: int, epoch: int) -> np.ndarray:
        if (stream, epoch) not in self._orders:
            for old in [key for key in self._orders if key[0] == stream and key[1] != epoch - 1]:
                del self._orders[old]
            index = np.concatenate(self._share(stream, epoch))
            drawn = uniform(sample_keys(self.plan.seed, np.full_like(index, epoch), index), DISPLACE)
            self._orders[stream, epoch] = index[np.argsort(np.arange(len(index)) + self.buffer_size * drawn)]
        return self._orders[stream, epoch]
