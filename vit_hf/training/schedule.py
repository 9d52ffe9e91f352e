"""The arithmetic of a run: how a global batch is cut, how many steps there are, the learning rate at a step.

Pure functions of their arguments, so that a resumed run, or one on more processes, finds the same values. This module
must not know about torch.
"""

import math
from dataclasses import dataclass

from vit_hf.errors import ArgumentError


@dataclass(frozen=True)
class BatchPlan:
    """global_batch_size = num_processes x micro_batch_size x accumulation, in images."""

    global_batch_size: int
    num_processes: int
    micro_batch_size: int
    accumulation: int

    def __str__(self) -> str:
        return (
            f"global batch {self.global_batch_size} = {self.num_processes} processes x "
            f"{self.micro_batch_size} images x {self.accumulation} accumulation steps"
        )


def plan_batches(global_batch_size: int, num_processes: int, per_device_train_batch_size: int | None) -> BatchPlan:
    """Derives the accumulation from what one device takes at most.

    Raises:
        ArgumentError: a global batch that does not divide evenly.
    """
    share, rest = divmod(global_batch_size, num_processes)
    if rest or share == 0:
        raise ArgumentError(
            f"--global_batch_size: {global_batch_size} does not divide by {num_processes} processes; "
            f"take a multiple of {num_processes}"
        )
    micro_batch_size = min(share, per_device_train_batch_size or share)
    if share % micro_batch_size:
        divisors = [n for n in range(1, share + 1) if share % n == 0]
        raise ArgumentError(
            f"--per_device_train_batch_size: {micro_batch_size} does not divide the {share} images a process takes of "
            f"--global_batch_size {global_batch_size}; take one of {', '.join(map(str, divisors[-8:]))}"
        )
    return BatchPlan(global_batch_size, num_processes, micro_batch_size, share // micro_batch_size)


@dataclass(frozen=True)
class Schedule:
    """The course of a run over its optimizer steps, counted from 0. Samples come as one endless stream, epoch after
    epoch, so that a batch may hold the end of one epoch and the start of the next, and nothing is dropped.

    Args:
        num_samples: images an epoch.
        learning_rate: the peak, reached at the last warm-up step.
        kind: cosine (to 0), linear (to 0) or constant, after a linear warm-up.
    """

    num_samples: int
    global_batch_size: int
    total_steps: int
    warmup_steps: int
    learning_rate: float
    kind: str

    def learning_rate_at(self, step: int) -> float:
        """Source: cosine from arXiv 1608.03983 without restarts; warm-up from arXiv 1706.02677, section 2.2."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        factor = {
            "constant": 1.0,
            "linear": 1 - progress,
            "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        }[self.kind]
        return self.learning_rate * factor

    def epochs_after(self, steps: int) -> float:
        """Passes over the training set made by so many steps."""
        return steps * self.global_batch_size / self.num_samples

    def first_step_of(self, epoch: int) -> int:
        """The first step that holds no image of an earlier epoch; epochs count from 0."""
        return math.ceil(epoch * self.num_samples / self.global_batch_size)

    def cadence(self, every: int | None, most: int = 100) -> "Cadence":
        """When something happens: every so many steps; None: once an epoch, or every second, third, ... epoch where it
        would be more than `most` times in the run. An epoch may end in the midst of a batch: the step counts for it."""
        if every is not None:
            return Cadence(every, 1, self.total_steps)
        before_last = (self.total_steps - 1) * self.global_batch_size // self.num_samples  # the last comes in any case
        epochs = before_last // most + 1
        return Cadence(epochs * self.num_samples, self.global_batch_size, self.total_steps)


@dataclass(frozen=True)
class Cadence:
    """The steps after which something happens: those in which a period ends, and always the last one.

    Args:
        period: in what steps are made of, steps themselves or images.
        each: as much of it a step is.
        total_steps: the last step.
    """

    period: int
    each: int
    total_steps: int

    @property
    def times(self) -> int:
        """How often it happens in a whole run."""
        before_last = self.total_steps - 1
        return min(before_last, before_last * self.each // self.period) + 1

    def is_due(self, steps: int) -> bool:
        """Whether it happens after `steps` steps."""
        seen = steps * self.each
        return steps == self.total_steps or seen // self.period > (seen - self.each) // self.period


@dataclass(frozen=True)
class ScheduleSettings:
    """Length and learning rate of a run, as the flags of the same names say."""

    global_batch_size: int
    num_train_epochs: float | None = None
    max_steps: int | None = None
    warmup_steps: int | None = None
    warmup_ratio: float | None = None
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "cosine"


def make_schedule(num_samples: int, settings: ScheduleSettings, first_step: int = 0) -> Schedule:
    """Counts the steps of a run and of its warm-up.

    Args:
        num_samples: images an epoch.
        first_step: that the run goes on from.

    Raises:
        ArgumentError: a warm-up longer than the run, or a run that ends before the step that it goes on from.
    """
    batch, warmup = settings.global_batch_size, settings.warmup_steps
    total = settings.max_steps or math.ceil(settings.num_train_epochs * num_samples / batch)
    if total < first_step:
        flag = "max_steps" if settings.max_steps else "num_train_epochs"
        raise ArgumentError(
            f"--{flag} {getattr(settings, flag)}: the run would end at step {total}, and it goes on from step {first_step}; "
            "give more"
        )
    warmup = warmup if warmup is not None else math.ceil((settings.warmup_ratio or 0) * total)
    if warmup > total:
        raise ArgumentError(f"--warmup_steps: {warmup} is longer than the run of {total} steps; take {total} or less")
    return Schedule(num_samples, batch, total, warmup, settings.learning_rate, settings.lr_scheduler_type)
