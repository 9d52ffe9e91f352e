"""Which sample comes where: the order of an epoch, and the samples of each micro-batch of each process.

Training samples are one endless stream, epoch after epoch; position p of the stream is place p % N of epoch p // N.
Step k takes the positions k*G to (k+1)*G of the stream, whatever the number of processes and the micro-batch, so a
run can start at any step. Evaluation takes every sample exactly once. This module must not know what a sample is.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vit_hf.data.processes import Processes
from vit_hf.data.randomness import DISPLACE, mix_bits, sample_keys, uniform


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

    @classmethod
    def of(
        cls,
        processes: Processes,
        seed: int,
        first_step: int,
        total_steps: int,
        micro_batch_size: int,
        accumulation: int,
    ) -> "StepPlan":
        """That of this process."""
        own = processes.num_processes, processes.rank
        return cls(seed, first_step, total_steps, *own, micro_batch_size, accumulation)

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


MAX_STREAMS = 1024
PARTS = 4  # row groups of a stream at least: the cut between two streams goes through one, which is then read twice


class StreamOrder:
    """The micro-batches of one process, in pieces for its workers, of a set that is read row group by row group.

    Each epoch puts the row groups into an order drawn from (seed, epoch) and cuts that row of rows into equally long
    virtual streams. In a stream each row group is mixed by draws from (seed, epoch, row) and spread evenly over the
    place of its own and of `window - 1` neighbours. Position p of the epoch belongs to stream p % num_streams. So the
    order is a function of the set, the buffer, the seed and the epoch; processes and workers divide the samples of each
    step: whole neighbourhoods of streams, so that a row group is read by one of them.

    The streams are neighbours in the order of their reversed bits (van der Corput's sequence). Thus any 2**n positions
    in a row fall evenly into 2**n neighbourhoods, and 2**n processes never read each other's streams.

    Args:
        groups: the first index of each row group, and the number of samples: ascending int64 (R + 1,).
        num_workers: of each process; 0 counts as one.
        buffer_size: rows that all processes mix together; at least one row group a stream.
    """

    def __init__(self, plan: StepPlan, *, groups: np.ndarray, num_workers: int, buffer_size: int):
        self.plan, self.groups, self.pieces = plan, groups, max(1, num_workers)
        self.num_streams, self.window = stream_shape(groups, buffer_size)
        bits = self.num_streams.bit_length() - 1
        number = np.arange(self.num_streams)
        reversed_bits = ((number >> bit & 1) << (bits - 1 - bit) for bit in range(bits))
        self.neighbourhood = sum(reversed_bits, np.zeros_like(number))
        self._orders: dict[int, np.ndarray] = {}

    @property
    def held_rows(self) -> int:
        """Rows that a worker needs at hand so that a row group is rarely read twice: its streams' windows and what a
        micro-batch takes of them, a quarter more for groups that are done, and a group at either end."""
        largest, plan = int(np.diff(self.groups).max(initial=0)), self.plan
        streams = -(-self.num_streams // (plan.num_processes * self.pieces))
        taken = plan.micro_batch_size * plan.num_processes / self.num_streams
        return int(1.25 * streams * (self.window * largest + taken)) + 2 * largest

    def __len__(self) -> int:
        """The number of pieces."""
        return len(self.plan) * self.pieces

    def __iter__(self) -> Iterator[BatchIndices]:
        plan, num_samples = self.plan, int(self.groups[-1])
        share = plan.micro_batch_size * plan.accumulation
        for step in range(plan.first_step, plan.total_steps):
            position = np.arange(step * share * plan.num_processes, (step + 1) * share * plan.num_processes)
            epoch, place = np.divmod(position, num_samples)
            stream = self.neighbourhood[place % self.num_streams]
            index = np.empty_like(place)
            for number in np.unique(epoch):
                here = epoch == number
                index[here] = self._order(int(number))[place[here]]
            mine = np.sort(np.argsort(stream, kind="stable")[plan.rank * share :][:share])
            # where a stream lies among those of this process, in workers
            worker = (stream * plan.num_processes - plan.rank * self.num_streams) * self.pieces // self.num_streams
            for batch in mine.reshape(plan.accumulation, plan.micro_batch_size):
                batch = batch[np.argsort(stream[batch], kind="stable")]
                for number in range(self.pieces):
                    piece = batch[worker[batch].clip(0, self.pieces - 1) == number]
                    yield BatchIndices(epoch[piece], index[piece], np.ones(len(piece), dtype=bool))

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k == epoch - 1}
            self._orders[epoch] = stream_order(self.plan.seed, epoch, self.groups, self.num_streams, self.window)
        return self._orders[epoch]


def stream_shape(groups: np.ndarray, buffer_size: int) -> tuple[int, int]:
    """The number of virtual streams, a power of two up to MAX_STREAMS, and the row groups that each of them mixes."""
    largest = int(np.diff(groups).max(initial=1))
    at_hand = max(1, buffer_size // largest)
    most = max(1, min(MAX_STREAMS, at_hand, (len(groups) - 1) // PARTS))
    num_streams = 1 << (most.bit_length() - 1)
    return num_streams, at_hand // num_streams


def stream_order(seed: int, epoch: int, groups: np.ndarray, num_streams: int, window: int) -> np.ndarray:
    """The order of an epoch of virtual streams: int64 (num_samples,), a permutation, a function of its arguments."""
    chosen = epoch_order(seed, epoch, len(groups) - 1)
    sizes, num_samples = np.diff(groups)[chosen], int(groups[-1])
    ends = np.cumsum(sizes)  # of each group, where they stand one after the other
    more = (window - 1) * int(sizes.max(initial=0))
    order, start = np.empty(num_samples, dtype=np.int64), 0
    for number in range(num_streams):
        stop = start + len(range(number, num_samples, num_streams))
        here = slice(np.searchsorted(ends, start, side="right"), np.searchsorted(ends, stop) + 1)
        begin = np.maximum(ends[here] - sizes[here], start)  # of each group, or of the part that is in this stream
        size = np.minimum(ends[here], stop) - begin
        index = np.arange(start, stop) + np.repeat(groups[chosen[here]] - ends[here] + sizes[here], size)
        drawn = uniform(sample_keys(seed, np.full_like(index, epoch), index), DISPLACE).astype(np.float64)
        begin, size = np.repeat(begin, size), np.repeat(size, size)
        index = index[
            np.argsort(begin + drawn, kind="stable")
        ]  # each part is mixed, and then spread over its neighbours
        width = np.minimum(size + more, stop - start)
        time = np.clip(begin - more / 2, start, stop - width) + (np.arange(start, stop) - begin + 0.5) / size * width
        order[number::num_streams] = index[np.argsort(time, kind="stable")]
        start = stop
    return order
