"""train(): the one loop. It is handed a model, batches on the device, and functions; it knows no dataset and no Hub."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit_hf.training import checkpoint
from vit_hf.training.accelerator import seed_micro_step, zero_stage
from vit_hf.training.checkpoint import TrainState
from vit_hf.training.guards import SignalGuard, StoppedBySignal, check_finite, out_of_memory
from vit_hf.training.optimizer import set_learning_rate
from vit_hf.training.schedule import BatchPlan, Schedule
from vit_hf.training.tracking import Tracker, append_event, peak_memory_bytes

Batch = dict[str, Tensor]


@dataclass
class LoopSettings:
    """How often things happen, and what the run is called in its checkpoints."""

    output_dir: Path
    run: dict[str, Any]
    seed: int
    max_grad_norm: float
    logging_steps: int
    eval_steps: int | None
    save_steps: int | None
    save_total_limit: int | None


def train(
    state: TrainState,
    batches: Iterator[Batch],
    *,
    plan: BatchPlan,
    schedule: Schedule,
    settings: LoopSettings,
    augment: Callable[[Batch, int, int, int], tuple[Tensor, Tensor]],
    objective: Callable[[torch.nn.Module, Tensor, Tensor], Tensor],
    evaluate: Callable[[], dict[str, float]],
    extra_metrics: Callable[[], dict[str, Any]] = dict,
    first_step: int = 0,
) -> None:
    """Trains from `first_step` to the end of the schedule, writing metrics.jsonl and checkpoints as it goes.

    Args:
        batches: one micro-batch of this process after the other, on the device, from `first_step` on.
        augment: (batch, step, micro_step, rank) -> pixel_values float (B, C, H, W), targets float (B, K).
        objective: (model, pixel_values, targets) -> mean loss.
        evaluate: called on all processes; its numbers make a line of metrics.jsonl.
        extra_metrics: more numbers for each log line.

    Raises:
        StoppedBySignal: SIGTERM came; the checkpoint is written.
        UserError: the loss is not finite, or the device is full.
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
            stop = guard.stop_asked(done)
            save_due = stop or schedule.is_due(done, settings.save_steps)
            if save_due or schedule.is_due(done, settings.logging_steps):
                steps = done - window_start
                numbers = torch.stack([window_loss / (steps * plan.accumulation), _norm(state, grad_norm)])
                mean_loss, last_norm = accelerator.reduce(numbers, reduction="mean").tolist()  # the one host sync
                check_finite(mean_loss, window_start + 1, done)
                tracker.write(
                    {
                        "step": done,
                        "epoch": round(schedule.epochs_after(done), 4),
                        "loss": mean_loss,
                        "learning_rate": learning_rate,
                        "grad_norm": last_norm,
                        **tracker.window(steps * plan.global_batch_size),
                        "peak_memory_bytes": peak_memory_bytes(device),
                        **extra_metrics(),
                    }
                )
                window_loss.zero_()
                window_start = done
            if schedule.is_due(done, settings.eval_steps) and not stop:
                with tracker.pause(), state.ema.in_place() if state.ema is not None else contextlib.nullcontext():
                    engine.eval()
                    measured = evaluate()
                    engine.train()
                tracker.write({"step": done, "epoch": round(schedule.epochs_after(done), 4), **measured})
            if save_due:
                with tracker.pause():
                    checkpoint.save(state, settings.output_dir, done, settings.run, settings.save_total_limit)
            if stop and done < schedule.total_steps:
                if accelerator.is_main_process:
                    append_event(settings.output_dir, "signal", signal="SIGTERM", step=done)
                raise StoppedBySignal(
                    f"stopped by SIGTERM after checkpoint-{done}; the same command goes on from there"
                )
    except torch.OutOfMemoryError:
        raise out_of_memory(plan.micro_batch_size) from None
    finally:
        guard.release()
        tracker.close()


def _clip(state: TrainState, max_grad_norm: float) -> Tensor | None:
    """Clips the gradients and returns their norm before that, on the device. DeepSpeed has done it already."""
    if zero_stage(state.accelerator):
        return None
    return state.accelerator.clip_grad_norm_(state.model.parameters(), max_grad_norm or float("inf"))


def _norm(state: TrainState, grad_norm: Tensor | None) -> Tensor:
    if grad_norm is None:
        grad_norm = state.engine.get_global_grad_norm()
    return torch.as_tensor(grad_norm, dtype=torch.float32, device=state.accelerator.device)
