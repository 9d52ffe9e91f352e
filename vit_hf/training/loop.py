"""train(): the one loop. It is handed a model, batches on the device, and functions; it knows no dataset and no Hub."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vit_hf.training import checkpoint
from vit_hf.training.actions import Action
from vit_hf.training.accelerator import seed_micro_step, share_buffers, zero_stage
from vit_hf.training.checkpoint import TrainState
from vit_hf.training.guards import SignalGuard, StoppedBySignal, not_finite, out_of_memory
from vit_hf.training.optimizer import set_learning_rate
from vit_hf.training.schedule import BatchPlan, Schedule
from vit_hf.training.tracking import Tracker, append_event, peak_memory_bytes

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class LoopSettings:
    """What a start of a run needs beside its schedule.

    Args:
        start_time: time.perf_counter() at the start of the run, less the time of earlier starts.
        max_grad_norm: 0: gradients are not clipped.
        first_step: of this start; the steps before it were done by earlier ones.
        training_flops_per_image: operations of an image's forward and backward pass, where they are known.
    """

    output_dir: Path
    start_time: float
    seed: int
    max_grad_norm: float
    first_step: int = 0
    training_flops_per_image: float | None = None


def train(
    state: TrainState,
    batches: Iterator[Batch],
    plan: BatchPlan,
    schedule: Schedule,
    settings: LoopSettings,
    augment: Callable[[Batch, int, int, int], tuple[Tensor, Tensor]],
    objective: Callable[[Tensor, Tensor], Tensor],
    actions: Sequence[Action],
) -> None:
    """Trains from `settings.first_step` to the end of the schedule, and does what falls due on its way.

    Args:
        batches: one micro-batch of this process after the other, on the device, from `first_step` on.
        augment: (batch, step, micro_step, rank) -> pixel_values float (B, C, H, W), targets float (B, K).
        objective: (logits fp32 (B, K), targets) -> mean loss; torch.nn.functional.cross_entropy takes soft targets.
        actions: those that are due after a step run in the order of this list: Log, Save, Evaluate, Draw.

    Raises:
        StoppedBySignal: a signal came; the checkpoint is written.
        UserError: the loss, the gradients or the weights are not finite, or the device is full.
    """
    accelerator, engine, optimizer = state.accelerator, state.engine, state.optimizer
    rank, device = accelerator.process_index, accelerator.device
    tracker = Tracker(accelerator, settings.output_dir, first_step, schedule.total_steps)
    guard = SignalGuard(accelerator)
    window_loss, window_start = torch.zeros((), device=device), first_step
    engine.train()
    try:
        for step in range(first_step, schedule.total_steps):
            learning_rate = schedule.learning_rate_at(step)
            set_learning_rate(optimizer, learning_rate)
            for micro_step in range(plan.accumulation):
                wait_start = time.perf_counter()
                batch = next(batches)
                tracker.add_wait(time.perf_counter() - wait_start)
                seed_micro_step(settings.seed, step, micro_step, rank)
                pixel_values, targets = augment(batch, step, micro_step, rank)
                accelerator.sync_gradients = micro_step == plan.accumulation - 1
                with contextlib.nullcontext() if accelerator.sync_gradients else accelerator.no_sync(engine):
                    loss = objective(engine, pixel_values, targets)
                    accelerator.backward(loss)  # DeepSpeed clips and steps in here
                window_loss += loss.detach()
            grad_norm = _clip(state, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            if state.ema is not None:
                state.ema.update()
            tracker.step()

            done = step + 1
            stop = guard.stop_asked(done) and done < schedule.total_steps
            save_due = stop or schedule.is_due(done, settings.save_steps)
            if save_due or schedule.is_due(done, settings.logging_steps):
                steps = done - window_start
                numbers = torch.stack([window_loss / (steps * plan.accumulation), _norm(state, grad_norm)])
                mean_loss, last_norm = accelerator.reduce(numbers, reduction="mean").tolist()  # the one host sync
                if broken := not_finite(mean_loss, last_norm, window_start + 1, done, accelerator.mixed_precision):
                    if accelerator.is_main_process:
                        append_event(settings.output_dir, "not_finite", step=done, why=str(broken))
                    raise broken
                speed = tracker.window(steps * plan.global_batch_size)
                if mfu_scale is not None:
                    speed["mfu"] = speed["images_per_second"] * mfu_scale
                tracker.write(
                    {
                        "step": done,
                        "epoch": round(schedule.epochs_after(done), 4),
                        "loss": mean_loss,
                        "learning_rate": learning_rate,
                        "grad_norm": last_norm,
                        **speed,
                        "peak_memory_bytes": peak_memory_bytes(device),
                        **_spent(done, plan, settings, training_flops_per_image),
                        **extra_metrics(speed),
                    }
                )
                window_loss.zero_()
                window_start = done
            if stop:  # who stops us may not wait for an evaluation
                _save(state, settings, done, tracker)
            if schedule.is_due(done, settings.eval_steps):
                measured = _evaluate(state, evaluate, tracker)
                spent = _spent(done, plan, settings, training_flops_per_image)
                tracker.write({"step": done, "epoch": round(schedule.epochs_after(done), 4), **measured, **spent})
            if save_due and not stop:
                _save(state, settings, done, tracker)
            if draw is not None and not stop and schedule.is_due(done, settings.log_figures_steps):
                _draw(state, settings, done, draw, tracker)
            if stop:
                number = guard.received or signal.SIGTERM  # another process may have been the one that received it
                if accelerator.is_main_process:
                    append_event(settings.output_dir, "signal", signal=signal.Signals(number).name, step=done)
                raise StoppedBySignal(number, done)
    except torch.OutOfMemoryError:
        raise out_of_memory(plan.micro_batch_size, engine.training) from None
    finally:
        guard.release()
        tracker.close()


def _evaluate(state: TrainState, evaluate: Callable[[], dict[str, float]], tracker: Tracker) -> dict[str, float]:
    """Evaluates the model, or its average where there is one."""
    with tracker.pause(), state.ema.in_place() if state.ema is not None else contextlib.nullcontext():
        share_buffers(state.accelerator, state.model)
        state.engine.eval()
        measured = evaluate()
        state.engine.train()
    return measured


def _draw(
    state: TrainState,
    settings: LoopSettings,
    done: int,
    draw: Callable[[int], dict[str, np.ndarray]],
    tracker: Tracker,
) -> None:
    """Draws the model, or its average where there is one. The other processes are a step ahead and wait there."""
    if state.accelerator.device.type == "cuda":
        torch.cuda.synchronize(state.accelerator.device)  # steps under way are training time, what follows is not
    with tracker.pause(), state.ema.in_place() if state.ema is not None else contextlib.nullcontext():
        try:
            tracker.write_images(draw(done), done)
        except (torch.OutOfMemoryError, ValueError) as error:
            # no reason to end a run; weights that are not finite have a line of their own when the loss is looked at
            append_event(settings.output_dir, "figures_left_out", step=done, why=str(error).split(". ")[0])


def _spent(
    done: int, plan: BatchPlan, settings: LoopSettings, training_flops_per_image: float | None
) -> dict[str, float]:
    """What the run has cost up to now, earlier starts included: images, wall clock, and operations where an image's
    are known. Images and operations are functions of the step; the clock goes on from the checkpoint's."""
    images = done * plan.global_batch_size
    spent = {"images_seen": images, "wall_time_seconds": round(time.perf_counter() - settings.start_time, 2)}
    return spent if training_flops_per_image is None else spent | {"training_flops": training_flops_per_image * images}


def _save(state: TrainState, settings: LoopSettings, done: int, tracker: Tracker) -> None:
    """Writes a checkpoint that says how long the run has taken so far."""
    record = {**settings.record, "wall_time_seconds": round(time.perf_counter() - settings.start_time, 2)}
    share_buffers(state.accelerator, state.model)
    with tracker.pause():
        checkpoint.save(state, settings.output_dir, done, record, settings.save_total_limit)


def _clip(state: TrainState, max_grad_norm: float) -> Tensor | None:
    """Clips the gradients and returns their norm before that, on the device. DeepSpeed has done it already."""
    if zero_stage(state.accelerator):
        return None
    return state.accelerator.clip_grad_norm_(state.model.parameters(), max_grad_norm or float("inf"))


def _norm(state: TrainState, grad_norm: Tensor | None) -> Tensor:
    if grad_norm is None:
        grad_norm = state.engine.get_global_grad_norm()
    return torch.as_tensor(grad_norm, dtype=torch.float32, device=state.accelerator.device)
