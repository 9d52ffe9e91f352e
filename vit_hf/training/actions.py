"""What falls due in a run, one class each: log, save, evaluate, probe, push, draw. A run has one list of them, and at a
step those that are due run in the order of the list. A new kind is one class here and one line where the list is made.

This module must not know about data, models or the Hub: it is handed functions.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vit_hf.training.accelerator import share_buffers
from vit_hf.training.checkpoint import Checkpoints
from vit_hf.training.memory import is_out_of_memory
from vit_hf.training.nonfinite import NonFinite
from vit_hf.training.schedule import BatchPlan, Cadence, Schedule
from vit_hf.training.state import TrainState
from vit_hf.training.tracking import Tracker, append_event, peak_memory_bytes


@dataclass(frozen=True)
class LoopSettings:
    """What a start of a run needs beside its schedule.

    Args:
        start_time: time.perf_counter() at the start of the run, less the time of earlier starts.
        max_grad_norm: 0: gradients are not clipped.
        first_step: of this start; the steps before it were done by earlier ones.
        training_flops_per_image: operations of an image's forward and backward pass, where they are known.
        per_device_eval_batch_size: images that a process evaluates at once, for the line that says that they are too many.
        on_nonfinite: stop, or skip steps whose gradients are not finite (NonFinite).
        spike_threshold: of the loss, in robust deviations; 0: not looked for (NonFinite).
    """

    output_dir: Path
    start_time: float
    seed: int
    max_grad_norm: float
    first_step: int = 0
    training_flops_per_image: float | None = None
    per_device_eval_batch_size: int | None = None
    on_nonfinite: str = "stop"
    spike_threshold: float = 0.0


@dataclass
class Moment:
    """Where a run stands after a step; what an action may look at. train() makes one and keeps it up to date.

    Args:
        watch: has seen the losses and gradients since the last log line.
        step: optimizer steps done, earlier starts included.
        learning_rate: of the last step.
        logged_step: the step of the last log line, at which loss, gradients and weights were seen to be finite; before
            the first one, the step that this start began with.
        notes: numbers that wait for the next log line.
        not_saved: why the last checkpoint could not be written, known when the run has finished.
    """

    state: TrainState
    plan: BatchPlan
    schedule: Schedule
    settings: LoopSettings
    tracker: Tracker
    watch: NonFinite
    actions: Sequence["Action"]
    step: int
    logged_step: int
    learning_rate: float = 0.0
    notes: dict[str, float] = field(default_factory=dict)
    not_saved: str | None = None

    def where(self) -> dict[str, float]:
        """{"step", "epoch"}: how each line of metrics.jsonl begins."""
        return {"step": self.step, "epoch": round(self.schedule.epochs_after(self.step), 4)}

    def wall_time_seconds(self) -> float:
        """Since the start of the run, earlier starts up to their checkpoints included."""
        return round(time.perf_counter() - self.settings.start_time, 2)

    def spent(self) -> dict[str, float]:
        """What the run has cost up to now, earlier starts included: images, wall clock, and operations where an image's
        are known. Images and operations are functions of the step."""
        images, flops = self.step * self.plan.global_batch_size, self.settings.training_flops_per_image
        spent = {"images_seen": images, "wall_time_seconds": self.wall_time_seconds()}
        return spent if flops is None else spent | {"training_flops": flops * images}

    def average(self) -> AbstractContextManager[None]:
        """A context in which the model holds its average, where there is one. All processes enter it together."""
        return self.state.ema.in_place() if self.state.ema is not None else contextlib.nullcontext()

    def record(self, event: str, **details: Any) -> None:
        """A line of events.jsonl, from the main process."""
        if self.state.accelerator.is_main_process:
            append_event(self.settings.output_dir, event, **details)


class Action:
    """Something that falls due.

    Attributes:
        cadence: after which steps (schedule.cadence(every)).
        on_stop: runs, due or not, when a signal ends the run; the others do not run then, due or not.
        needs_log: a log line, and with it the check that all is finite, comes before it at the same step.
    """

    cadence: Cadence
    on_stop = False
    needs_log = False

    def run(self, moment: Moment) -> None:
        """Does it; called on all processes."""
        raise NotImplementedError

    def is_missing(self, lines: list[dict[str, Any]]) -> bool:
        """Whether a run that goes on from a step at which this was due has to do it first.

        Args:
            lines: those of metrics.jsonl at that step.
        """
        return False

    def alarm(self) -> bool:
        """Whether this process knows of something that all processes shall hear of at the next log line."""
        return False

    def heard(self) -> None:
        """On all processes, after a log line at which one or more had an alarm."""

    def finish(self, moment: Moment) -> None:
        """After the last step, or when a signal ends the run: waits for what is under way."""

    def close(self) -> None:
        """However the run ends: lets go of what it holds; raises nothing."""


class Log(Action):
    """A line of metrics.jsonl with means since the last one: one collective, one host sync.

    Args:
        numbers: functions that give more numbers for the line, called in their order on all processes; each is handed
            what the window measured of the speed: {"images_per_second", "data_wait_fraction", "mfu"}.
        mfu_scale: model FLOPs utilisation for each image a second, where it is known.
    """

    on_stop = True

    def __init__(
        self,
        cadence: Cadence,
        numbers: Sequence[Callable[[dict[str, float]], dict[str, Any]]] = (),
        mfu_scale: float | None = None,
    ):
        self.cadence, self.numbers, self.mfu_scale = cadence, numbers, mfu_scale

    def run(self, moment: Moment) -> None:
        """
        Raises:
            UserError: loss, gradients or weights are not finite; a checkpoint failed, and that is to end the run.
        """
        accelerator, steps = moment.state.accelerator, moment.step - moment.logged_step
        alarm = torch.tensor([float(any(action.alarm() for action in moment.actions))], device=accelerator.device)
        row = torch.cat([moment.watch.numbers(), alarm])
        rows = accelerator.gather(row[None]).tolist()  # the one collective and the one host sync
        window = moment.watch.look([row[:-1] for row in rows])
        speed = moment.tracker.window(steps * moment.plan.global_batch_size)
        if self.mfu_scale is not None:
            speed["mfu"] = speed["images_per_second"] * self.mfu_scale
        line = {
            **moment.where(),
            "loss": window.loss,
            "learning_rate": moment.learning_rate,
            "grad_norm": window.grad_norm,
            **speed,
            "peak_memory_bytes": peak_memory_bytes(accelerator.device),
            **moment.spent(),
            **moment.notes,
        }
        if moment.settings.on_nonfinite == "skip" or window.skipped_steps:  # an fp16 loss scaler skips in either mode
            line["skipped_steps"] = window.skipped_steps
        for numbers in self.numbers:
            line |= numbers(speed)
        moment.tracker.write(line)
        moment.notes.clear()
        moment.logged_step = moment.step
        if any(row[-1] for row in rows):
            for action in moment.actions:
                action.heard()


class Save(Action):
    """A checkpoint. The step waits for the copy to host memory; the next log line says how long (`save_stall_seconds`).

    Args:
        checkpoints: writes them aside.
        record: goes into each manifest: `run` (its identity), `exactness`.
    """

    on_stop = needs_log = True

    def __init__(self, cadence: Cadence, checkpoints: Checkpoints, record: dict[str, Any]):
        self.cadence, self.checkpoints, self.record = cadence, checkpoints, record

    def run(self, moment: Moment) -> None:
        assert moment.logged_step == moment.step, "a Log stands before a Save in the list of actions"
        record = {**self.record, "wall_time_seconds": moment.wall_time_seconds()}
        with moment.tracker.pause():
            moment.notes["save_stall_seconds"] = round(self.checkpoints.save(moment.step, record), 3)

    def alarm(self) -> bool:
        return self.checkpoints.failed

    def heard(self) -> None:
        self.checkpoints.wait()  # raises with --on_save_error stop

    def finish(self, moment: Moment) -> None:
        moment.not_saved = self.checkpoints.wait()

    def close(self) -> None:
        self.checkpoints.close()


class Evaluate(Action):
    """Measures the model, or its average where there is one, on all processes: a line of metrics.jsonl.

    Args:
        evaluate: gives {"eval_...": number}, the same on all processes.
    """

    kind = "eval_"  # how the names of its numbers begin

    def __init__(self, cadence: Cadence, evaluate: Callable[[], dict[str, float]]):
        self.cadence, self.evaluate = cadence, evaluate

    def run(self, moment: Moment) -> None:
        state = moment.state
        with moment.tracker.pause(), moment.average():
            share_buffers(state.accelerator, state.model)
            state.engine.eval()
            measured = self.evaluate()
            state.engine.train()
        moment.tracker.write({**moment.where(), **measured, **moment.spent()})

    def is_missing(self, lines: list[dict[str, Any]]) -> bool:
        return not any("loss" not in line and key.startswith(self.kind) for line in lines for key in line)


class Probe(Evaluate):
    """Measures what the model's features are worth: as Evaluate, with numbers {"probe_...": number}."""

    kind = "probe_"


class Push(Action):
    """Says that all that belongs to a checkpoint's step is done, so that it may go elsewhere; it never waits.

    Args:
        due: called with the step, after an evaluation at that step.
        leave: called when the run is over, however it ends.
    """

    on_stop = True

    def __init__(self, cadence: Cadence, due: Callable[[int], None], leave: Callable[[], None]):
        self.cadence, self.due, self.leave = cadence, due, leave

    def run(self, moment: Moment) -> None:
        self.due(moment.step)

    def close(self) -> None:
        self.leave()


class Draw(Action):
    """Draws the model, or its average where there is one, for the trackers and into files.

    Args:
        draw: called with the step, gives pictures uint8 (H, W, 3) by name, and leaves the model and all random
            generators as they were. None on the processes that do not draw: they help to give the model its average,
            and are a step ahead meanwhile.
    """

    def __init__(self, cadence: Cadence, draw: Callable[[int], dict[str, np.ndarray]] | None):
        self.cadence, self.draw = cadence, draw

    def run(self, moment: Moment) -> None:
        with moment.tracker.pause(), moment.average():
            try:
                if self.draw is not None:
                    moment.tracker.write_images(self.draw(moment.step), moment.step)
            except (RuntimeError, ValueError) as error:
                if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                    raise
                # no reason to end a run; what is not finite has a line of its own when the run logs
                append_event(
                    moment.settings.output_dir,
                    "figures_left_out",
                    step=moment.step,
                    why=str(error).split(". ")[0],
                )
