"""What is done about steps whose loss, gradient or update is not finite: the run stops before anything of them is saved, or
the step is left out on every process alike.

Nothing here makes the host wait for the device within a step: what a step measured stays there until the log line, whose
one gather brings the numbers of all processes. This module must not know about files other than events.jsonl and the names
of checkpoints.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from vit_hf.errors import UserError
from vit_hf.training.leaving_out import LeavingOut
from vit_hf.training.manifest import checkpoints, step_of
from vit_hf.training.spikes import Spikes
from vit_hf.training.state import TrainState
from vit_hf.training.tracking import append_event

LONGEST_ROW = 10  # so many steps left out one after the other end a run
FOLD = 256  # so many steps are kept apart before they are summed up on the device
NEVER = float(2**24)  # an index that is not; float32 counts that far


@dataclass(frozen=True)
class Window:
    """What all processes measured since the last log line.

    Args:
        loss: mean over the micro-steps whose loss is finite; NaN where there is none.
        grad_norm: of the last step, before clipping.
        skipped_steps: steps that were left out.
    """

    loss: float
    grad_norm: float
    skipped_steps: int


class Numbers(NamedTuple):
    """What one process measured in a window. Indices count from the window's first step, in its micro-steps or steps."""

    loss_sum: float  # of the finite ones
    losses: float
    broken_losses: float
    first_broken_loss: float  # micro-step; NEVER: none
    last_norm: float
    broken_steps: float  # their gradient norm is not finite
    first_broken_step: float
    longest_row: float  # broken steps one after the other, those before the window included
    parameter: float  # index of the first one in the order of the backward whose gradient went; -1: none
    weights_finite: float  # 1 or 0


class NonFinite:
    """Watches the steps of a run. In the loop:

        for each micro-step: ...; accelerator.backward(loss); watch.saw(loss)
        left_out = watch.before_step(state.partition.clip(max_grad_norm))
        optimizer.step(); optimizer.zero_grad()
        watch.after_step()
        if ema is not None: ema.update(left_out)

    and at a log line, which comes before any checkpoint, on all processes:

        rows = accelerator.gather(watch.numbers()[None]).tolist()  # the one collective and host sync
        window = watch.look(rows)  # raises UserError

    Args:
        mode: stop, or skip: steps whose gradients are not finite are left out; weights, moments, step count, averages and
            BatchNorm's statistics stay to the bit.
        output_dir: for events.jsonl, and to name the checkpoint to go back to.
        accumulation: micro-steps in a step.
        first_step: steps done by earlier starts.
        learning_rate: the peak, for the advice.
        spike_threshold: see Spikes.

    Raises:
        UserError: an optimizer that cannot leave a step out.
    """

    def __init__(
        self,
        state: TrainState,
        mode: str,
        output_dir: Path,
        *,
        accumulation: int,
        first_step: int = 0,
        learning_rate: float = 0.0,
        spike_threshold: float = 0.0,
    ):
        self._state, self._mode, self._output_dir = state, mode, output_dir
        self._accumulation, self._learning_rate = accumulation, learning_rate
        self._done = self._looked = first_step
        self._spikes = Spikes(spike_threshold)
        self._scaled = state.accelerator.mixed_precision == "fp16"  # a loss scaler leaves steps out in either mode
        self._leaving_out = LeavingOut(state) if mode == "skip" or self._scaled else None
        self._names = state.partition.trainable_names()
        self._engine_parameter = -1.0
        self._zero = state.partition.name.startswith("zero")
        self._engine_left_out = state.partition.steps_left_out()
        if self._zero:
            _before_gradients_are_dropped(state.engine, self._look_at_engine)
        self._buffers = [b for b in state.model.buffers() if b.is_floating_point() and b.numel()]
        self._row = self._zeros()  # broken steps at the end of what was folded
        self._begin_window()

    def saw(self, loss: Tensor) -> None:
        """Takes note of the loss of a micro-step, a scalar on the device."""
        self._losses.append(loss.detach())

    def before_step(self, grad_norm: Tensor) -> Tensor | bool:
        """Between clipping and the optimizer's step. Under DeepSpeed that step is made already.

        Args:
            grad_norm: scalar on the device, the same on all processes; not finite where any gradient is not.

        Returns:
            Whether the step is left out, for `EMA.update`: a bool scalar on the device; False or True where the host
            knows.
        """
        self._done += 1
        self._norms.append(grad_norm)
        by_parameter = self._state.partition.gradient_norms
        if by_parameter is not None and len(by_parameter) == len(self._names):
            self._by_parameter.append(by_parameter)
        if len(self._norms) == FOLD:
            self._fold()
        if self._zero:  # its engine leaves out what is not finite, at every stage and in either mode
            before, self._engine_left_out = self._engine_left_out, self._state.partition.steps_left_out()
            left_out: Tensor | bool = self._engine_left_out > before
        else:
            left_out = ~grad_norm.isfinite() if self._leaving_out is not None else False
        if self._leaving_out is not None:
            self._leaving_out.arrange(left_out)
        return left_out

    def after_step(self) -> None:
        """After the optimizer's step: what the forward passes of a step left out changed (BatchNorm's statistics) is
        put back."""
        if self._leaving_out is not None:
            self._leaving_out.finish()

    @torch.no_grad()
    def numbers(self) -> Tensor:
        """What this process measured since the last call: fp32 (N,) on the device. Begins a new window."""
        last_norm = self._norms[-1] if self._norms else self._last_norm
        self._fold()
        numbers = Numbers(
            loss_sum=self._loss_sum,
            losses=self._zeros() + self._seen_losses,
            broken_losses=self._broken_losses,
            first_broken_loss=self._first_broken_loss,
            last_norm=last_norm.float(),
            broken_steps=self._broken_steps,
            first_broken_step=self._first_broken_step,
            longest_row=self._longest_row,
            parameter=self._parameter + 0.0 if not self._zero else self._zeros() + self._engine_parameter,
            weights_finite=self._weights_finite(),
        )
        self._begin_window()
        return torch.stack([number.to(self._state.accelerator.device) for number in numbers])

    def look(self, rows: list[list[float]]) -> Window:
        """Judges a window; the same on all processes.

        Args:
            rows: `numbers` of each process, in their order.

        Raises:
            UserError: weights that are not finite; with `stop` a loss or gradient that is not finite; with `skip`
                LONGEST_ROW steps left out one after the other.
        """
        seen = [Numbers(*row) for row in rows]
        first, last, self._looked = self._looked + 1, self._done, self._done
        counted = sum(one.losses - one.broken_losses for one in seen)
        loss = sum(one.loss_sum for one in seen) / counted if counted else float("nan")
        skipped = int(seen[0].broken_steps)
        broken_loss = any(one.broken_losses for one in seen)
        if broken_loss or skipped or not all(one.weights_finite for one in seen):
            self._tell(seen, first, last)
        if (spike := self._spikes.look(loss)) is not None:
            self._record("loss_spike", step=last, **spike)
        return Window(loss=loss, grad_norm=seen[0].last_norm, skipped_steps=skipped)

    def _tell(self, seen: list[Numbers], first: int, last: int) -> None:
        """Says what was not finite in the steps from `first` to `last`, as an event or as the run's end."""
        details = self._details(seen, first)
        row, scale = int(seen[0].longest_row), details.get("loss_scale")
        weights = not all(one.weights_finite for one in seen)
        loss, gradient = "micro_step" in details, "skipped" in details
        too_many = row >= LONGEST_ROW and (scale is None or scale <= 1)
        if self._mode == "skip" or (self._scaled and not loss):
            stop = weights or too_many
        else:
            stop = True
        self._record("not_finite" if stop else "steps_left_out", **details)
        if not stop:
            return
        what = "loss" if loss else "gradient" if gradient else "weights"
        if what == "weights":
            what = f"the weights are not finite after the steps {first} to {last}"
        else:
            at = f", process {details['process']}, micro-step {details['micro_step']}" if loss else ""
            what = (
                f"the {what} is not finite at step {details['step']}{at} (looked at after the steps {first} to {last})"
            )
        if too_many and not weights:
            what = f"{row} steps one after the other had to be left out; {what}"
        if "parameter" in details:
            what += f", in the backward pass first that of {details['parameter']}"
        # a save may be ending just now: what the main process sees of the folder is said by all
        (advice,) = broadcast_object_list([self._advice(first)])
        raise UserError(f"{what}; {advice}")

    def _details(self, seen: list[Numbers], first: int) -> dict[str, object]:
        """What an event says: the first step that broke, and where."""
        details: dict[str, object] = {}
        process, micro = min(((r, one.first_broken_loss) for r, one in enumerate(seen)), key=lambda pair: pair[1])
        at_gradient = min(one.first_broken_step for one in seen)
        step, micro_step = divmod(int(micro), self._accumulation)
        if micro < NEVER and step <= at_gradient:
            details |= {"step": first + step, "process": process, "micro_step": micro_step}
        elif at_gradient < NEVER:
            details["step"] = first + int(at_gradient)
        else:
            details["step"] = self._done
        if seen[0].broken_steps:
            details["skipped"] = int(seen[0].broken_steps)
        if (parameter := max(int(one.parameter) for one in seen)) >= 0:
            details["parameter"] = self._names[parameter]
        if self._scaled:
            scaler = self._state.partition.scaler_state() or {}
            details["loss_scale"] = scaler.get("scale")
        return details

    def _advice(self, first: int) -> str:
        """The words that mend the run: from the newest checkpoint before the step `first`."""
        lower = f"--learning_rate {self._learning_rate / 3:.2g}" if self._learning_rate else "a lower --learning_rate"
        before = max(
            (path for path in checkpoints(self._output_dir) if step_of(path) < first), key=step_of, default=None
        )
        where = "" if before is None else f" --resume_from_checkpoint {before}"
        how = f"start again with {lower}" if before is None else f"go on with --change learning_rate {lower}{where}"
        bf16 = ", or use bf16 instead of fp16 (accelerate's mixed_precision)" if self._scaled else ""
        return f"{how}; a longer --warmup_steps, --max_grad_norm 1.0 or --on_nonfinite skip may help too{bf16}"

    def _record(self, event: str, **details: object) -> None:
        if self._state.accelerator.is_main_process:
            append_event(self._output_dir, event, **details)

    def _zeros(self, value: float = 0.0) -> Tensor:
        return torch.full((), value, device=self._state.accelerator.device)

    def _begin_window(self) -> None:
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._by_parameter: list[Tensor] = []
        self._seen_losses = self._seen_steps = 0
        self._loss_sum, self._broken_losses, self._broken_steps = self._zeros(), self._zeros(), self._zeros()
        self._first_broken_loss, self._first_broken_step = self._zeros(NEVER), self._zeros(NEVER)
        self._longest_row, self._parameter = self._zeros(), self._zeros(-1.0)
        self._engine_parameter = -1.0
        self._last_norm = self._zeros()

    @torch.no_grad()
    def _fold(self) -> None:
        """Sums the steps kept apart up, on the device."""
        if self._losses:
            losses = torch.stack(self._losses).float()
            broken = ~losses.isfinite()
            index = torch.arange(len(losses), device=losses.device) + float(self._seen_losses)
            self._loss_sum = self._loss_sum + losses.where(~broken, 0.0).sum()
            self._broken_losses = self._broken_losses + broken.sum()
            self._first_broken_loss = torch.minimum(self._first_broken_loss, index.where(broken, NEVER).min())
            self._seen_losses += len(losses)
            self._losses = []
        if self._norms:
            norms = torch.stack(self._norms).float()
            broken = ~norms.isfinite()
            self._find_parameter(broken)
            index = torch.arange(len(norms), device=norms.device, dtype=torch.float32)
            last_good = torch.where(broken, -1 - self._row, index).cummax(0).values
            row = index - last_good
            self._broken_steps = self._broken_steps + broken.sum()
            found = (index + self._seen_steps).where(broken, NEVER).min()
            self._first_broken_step = torch.minimum(self._first_broken_step, found)
            self._longest_row, self._row = torch.maximum(self._longest_row, row.max()), row[-1]
            self._seen_steps += len(norms)
            self._last_norm, self._norms, self._by_parameter = norms[-1], [], []

    def _find_parameter(self, broken: Tensor) -> None:
        """The first broken step's last parameter whose gradient is not finite: what broke there went on to all before it
        in the model, so this is where the backward pass met it first."""
        if len(self._by_parameter) != len(broken):
            return
        at = broken.int().argmax()
        norms = torch.stack(self._by_parameter).index_select(0, at[None])[0]
        index = torch.arange(len(norms), device=norms.device, dtype=torch.float32)
        found = torch.where(broken.any(), index.where(~norms.isfinite(), -1.0).max(), -1.0)
        self._parameter = torch.where(self._first_broken_step < NEVER, self._parameter, found)

    def _weights_finite(self) -> Tensor:
        finite = self._state.partition.finite()
        if self._buffers:  # a step that broke in the forward pass is in BatchNorm's statistics
            finite = finite * torch.stack(torch._foreach_norm(self._buffers)).isfinite().all().to(finite.device)
        return finite

    def _look_at_engine(self) -> None:
        """Called on all processes when DeepSpeed leaves a step out, while its gradients are still there."""
        from deepspeed.utils import safe_get_full_grad

        if self._engine_parameter >= 0:  # the window's first
            return
        parameters = dict(self._state.model.named_parameters())
        for index in range(len(self._names) - 1, -1, -1):
            gradient = safe_get_full_grad(parameters[self._names[index]])
            if gradient is not None and not gradient.isfinite().all():  # the same on all processes
                self._engine_parameter = float(index)
                return


def _before_gradients_are_dropped(engine: nn.Module, look: Callable[[], None]) -> None:
    """Lets `look` be called in each step that DeepSpeed leaves out, before it drops the gradients: the stages of ZeRO first
    tell their loss scaler, which there is in any precision; stage 1 in bf16 with fp32 gradients has none."""
    optimizer = engine.optimizer
    name = "_update_scale" if hasattr(optimizer, "_update_scale") else "clear_hp_grads"
    inner = getattr(optimizer, name, None)
    if inner is None:  # the events will name no parameter
        return

    def look_first(*args, **kwargs):
        if optimizer.overflow:
            look()
        return inner(*args, **kwargs)

    setattr(optimizer, name, look_first)
