"""What falls due in a run, one class each: log, save, evaluate, draw. A run has one list of them, and at a step those that
are due run in the order of the list. A new kind is one class here and one line where the list is made.

This module must not know about data, models or the Hub: it is handed functions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from vit_hf.training.schedule import BatchPlan, Cadence, Schedule
from vit_hf.training.tracking import Tracker


@dataclass
class Moment:
    """Where a run stands after a step; what an action may look at. Made once by train() and kept up to date.

    Args:
        step: optimizer steps done, earlier starts included.
        learning_rate: of this step.
        grad_norm: fp32 scalar on the device: of this step, before clipping.
        loss_sum: fp32 scalar on the device: of all micro-steps of this process since the last log line.
        window_start: the step of the last log line, or the first step of this start.
        checked_step: the last step after which loss, gradients and weights were seen to be finite.
    """

    state: Any  # TrainState
    plan: BatchPlan
    schedule: Schedule
    settings: Any  # loop.LoopSettings
    tracker: Tracker
    step: int
    learning_rate: float
    grad_norm: Tensor
    loss_sum: Tensor
    window_start: int
    checked_step: int

    def where(self) -> dict[str, float]:
        """{"step", "epoch"}: how each line of metrics.jsonl begins."""
        raise NotImplementedError

    def spent(self) -> dict[str, float]:
        """What the run has cost up to now, earlier starts included: `images_seen`, `wall_time_seconds` and, where an
        image's are known, `training_flops`."""
        raise NotImplementedError


class Action:
    """Something that falls due.

    Attributes:
        cadence: after which steps (schedule.cadence(every)).
        on_stop: runs, due or not, when a signal ends the run; the others do not run then, due or not.
        needs_log: a log line, and with it the check that all is finite, is written at the same step.
    """

    cadence: Cadence
    on_stop = False
    needs_log = False

    def run(self, moment: Moment) -> None:
        """Does it, on all processes."""
        raise NotImplementedError

    def is_missing(self, moment: Moment, lines: list[dict[str, Any]]) -> bool:
        """Whether a run that goes on from `moment.step` has to do it first: it was due there and was not done. Asked on
        the main process alone; `lines` are those of metrics.jsonl at this step."""
        return False

    def close(self) -> None:
        """At the end of the run, however it ends."""


class Log(Action):
    """A line of metrics.jsonl: means since the last line, after one reduce and one host sync.

    Args:
        numbers: functions that give more numbers for the line, called on all processes in their order; each is handed
            what the window measured of the speed ({"images_per_second", "data_wait_fraction", ...}).
        mfu_scale: model FLOPs utilisation for each image a second, where it is known.

    Raises (run):
        UserError: loss, gradients or weights are not finite.
    """

    on_stop = True

    def __init__(
        self,
        cadence: Cadence,
        numbers: Sequence[Callable[[dict[str, float]], dict[str, Any]]] = (),
        mfu_scale: float | None = None,
    ):
        self.cadence, self.numbers, self.mfu_scale = cadence, numbers, mfu_scale


class Save(Action):
    """A checkpoint. The step waits for the copy to host memory; the rest is written aside.

    Args:
        saving: writes checkpoints (the class of checkpoint/saving.py).
        record: goes into each manifest: `run` (its identity), `exactness`.
    """

    on_stop = needs_log = True

    def __init__(self, cadence: Cadence, saving: Any, record: dict[str, Any]):
        self.cadence, self.saving, self.record = cadence, saving, record


class Evaluate(Action):
    """Measures the model, or its average where there is one, on all processes; a line of metrics.jsonl.

    Args:
        evaluate: gives {"eval_...": number}, the same on all processes.
    """

    def __init__(self, cadence: Cadence, evaluate: Callable[[], dict[str, float]]):
        self.cadence, self.evaluate = cadence, evaluate


class Draw(Action):
    """Draws the model, or its average where there is one, for the trackers and into files.

    Args:
        draw: called with the step, gives pictures uint8 (H, W, 3) by name, and leaves the model and all random
            generators as they were. None on the processes that do not draw: they take part in giving the model its average.
    """

    def __init__(self, cadence: Cadence, draw: Callable[[int], dict[str, np.ndarray]] | None):
        self.cadence, self.draw = cadence, draw
