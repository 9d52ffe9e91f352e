"""train(): the one loop. It is handed a model, batches on the device, and functions; it knows no dataset and no Hub."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence

from accelerate.utils import broadcast_object_list
from torch import Tensor

from vit_hf.errors import UserError
from vit_hf.training.accelerator import seed_micro_step
from vit_hf.training.actions import Action, Log, LoopSettings, Moment
from vit_hf.training.memory import is_out_of_memory, out_of_memory
from vit_hf.training.nonfinite import NonFinite
from vit_hf.training.optimizer import set_learning_rate
from vit_hf.training.schedule import BatchPlan, Schedule
from vit_hf.training.signals import SignalGuard, StoppedBySignal
from vit_hf.training.state import TrainState
from vit_hf.training.tracking import Tracker, read_jsonl, warn

Batch = dict[str, Tensor]


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
    """Trains from `settings.first_step` to the end of the schedule, and does what falls due on the way.

    Args:
        batches: one micro-batch of this process after the other, on the device, from `first_step` on.
        augment: (batch, step, micro_step, rank) -> pixel_values float (B, C, H, W), targets float (B, K).
        objective: (logits fp32 (B, K), targets) -> mean loss; torch's cross_entropy takes soft targets.
        actions: those that are due at a step run in the order of this list: Log, Save, Evaluate, Draw.

    Raises:
        StoppedBySignal: a signal came; the checkpoint is written.
        UserError: the loss, the gradients or the weights are not finite, a checkpoint failed and that is to end the run, or
            the device is full.
    """
    accelerator, engine, optimizer = state.accelerator, state.engine, state.optimizer
    rank, first_step = accelerator.process_index, settings.first_step
    tracker = Tracker(accelerator, settings.output_dir, first_step, schedule.total_steps)
    watch = NonFinite(
        state,
        settings.on_nonfinite,
        settings.output_dir,
        accumulation=plan.accumulation,
        first_step=first_step,
        learning_rate=schedule.learning_rate,
        spike_threshold=settings.spike_threshold,
    )
    moment = Moment(state, plan, schedule, settings, tracker, watch, actions, first_step, first_step)
    guard = SignalGuard(accelerator, schedule.total_steps)
    engine.train()
    try:
        for action in _missing(actions, moment):
            action.run(moment)
        for step in range(first_step, schedule.total_steps):
            moment.learning_rate = schedule.learning_rate_at(step)
            set_learning_rate(optimizer, moment.learning_rate)
            for micro_step in range(plan.accumulation):
                wait_start = time.perf_counter()
                batch = next(batches)
                tracker.add_wait(time.perf_counter() - wait_start)
                seed_micro_step(settings.seed, step, micro_step, rank)
                pixel_values, targets = augment(batch, step, micro_step, rank)
                accelerator.sync_gradients = micro_step == plan.accumulation - 1
                with contextlib.nullcontext() if accelerator.sync_gradients else accelerator.no_sync(engine):
                    loss = objective(engine(pixel_values=pixel_values).logits.float(), targets)
                    accelerator.backward(loss)  # DeepSpeed clips and steps in here
                watch.saw(loss)
            left_out = watch.before_step(state.partition.clip(settings.max_grad_norm))
            optimizer.step()
            optimizer.zero_grad()
            watch.after_step()
            if state.ema is not None:
                state.ema.update(left_out)
            tracker.step()

            moment.step = step + 1
            stop = guard.stop_asked(moment.step)  # never at the last step: that is the end
            for action in _due(actions, moment.step, stop):
                action.run(moment)
            if stop:
                raise _stopped(actions, moment, guard.number)
        for action in actions:
            action.finish(moment)
        if moment.not_saved is not None and tracker.is_main:
            warn(f"the run ends without checkpoint-{moment.step}: {moment.not_saved}")
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise _out_of_memory(moment) from None
        raise
    finally:
        for action in actions:
            action.close()
        guard.release()  # last: who comes to its end first lets the launcher end the others, and some may still write
        tracker.close()


def _due(actions: Sequence[Action], step: int, stop: bool) -> list[Action]:
    """What runs after a step, in the order of the list. Who stops us may not wait for an evaluation."""
    due = [action for action in actions if (action.on_stop if stop else action.cadence.is_due(step))]
    needs_log = any(action.needs_log for action in due)
    return [action for action in actions if action in due or (needs_log and isinstance(action, Log))]


def _missing(actions: Sequence[Action], moment: Moment) -> list[Action]:
    """What was due at the step that the run goes on from, and was not done before the run ended. The main process reads
    that and tells the others."""
    if moment.step == 0:
        return []
    lines = read_jsonl(moment.settings.output_dir / "metrics.jsonl") if moment.tracker.is_main else []
    here = [line for line in lines if line["step"] == moment.step]
    told = [[action.cadence.is_due(moment.step) and action.is_missing(here) for action in actions]]
    return [action for action, missing in zip(actions, broadcast_object_list(told)[0], strict=True) if missing]


def _out_of_memory(moment: Moment) -> UserError:
    """The end of a run for which the device is too small."""
    plan, model, settings = moment.plan, moment.state.model, moment.settings
    share = plan.micro_batch_size * plan.accumulation
    checkpointing = getattr(model, "is_gradient_checkpointing", False)
    training = moment.state.engine.training
    return out_of_memory(plan.micro_batch_size, share, training, checkpointing, settings.per_device_eval_batch_size)


def _stopped(actions: Sequence[Action], moment: Moment, number: int) -> UserError:
    """The end of a run that a signal asked for, when its checkpoint is written."""
    for action in actions:
        action.finish(moment)
    name = signal.Signals(number).name
    moment.record("signal", signal=name, step=moment.step)
    if moment.not_saved is None:
        return StoppedBySignal(number, moment.step)
    return UserError(
        f"stopped by {name} at step {moment.step}, whose checkpoint could not be written: {moment.not_saved}; the same "
        "command goes on from the one before"
    )
