"""What is done about steps whose loss, gradient or update is not finite: the run stops before anything of them is saved, or
the step is left out on every process alike.

Nothing here makes the host wait for the device within a step: what a step measured stays there until the log line, whose
one gather brings the numbers of all processes. This module must not know about files other than events.jsonl.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vit_hf.training.state import TrainState

LONGEST_ROW = 10  # so many steps left out one after the other end a run
MODES = ("stop", "skip")


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


class NonFinite:
    """Watches the steps of a run. In the loop:

        for each micro-step: ...; accelerator.backward(loss); watch.saw(loss)
        left_out = watch.before_step(state.partition.clip(max_grad_norm))
        optimizer.step(); optimizer.zero_grad()
        watch.after_step()
        if ema is not None: ema.update(left_out)

    and at a log line, which comes before any checkpoint, on all processes:

        rows = accelerator.gather(watch.numbers()[None]).tolist()       # the one collective and host sync
        window = watch.look(rows, done)                                 # raises UserError

    Args:
        mode: stop, or skip: steps whose gradients are not finite are left out; weights, moments, step count and averages
            stay to the bit.
        accumulation: micro-steps in a step.
        first_step: steps done by earlier starts.
        spike_threshold: see Spikes.
        record: (event, **details) writes a line of events.jsonl; called on the main process alone.
    """

    def __init__(
        self,
        state: TrainState,
        mode: str,
        *,
        accumulation: int,
        first_step: int = 0,
        spike_threshold: float = 0.0,
        record: Callable[..., None] = lambda event, **details: None,
    ):
        raise NotImplementedError

    def saw(self, loss: Tensor) -> None:
        """Takes note of the loss of a micro-step, a scalar on the device."""
        raise NotImplementedError

    def before_step(self, grad_norm: Tensor) -> Tensor | bool:
        """Between clipping and the optimizer's step. Under DeepSpeed that step is made already.

        Args:
            grad_norm: scalar on the device, the same on all processes; not finite where any gradient is not.

        Returns:
            Whether the step is left out, for `EMA.update`: a bool scalar on the device, or False or True where the host
            knows (DeepSpeed).
        """
        raise NotImplementedError

    def after_step(self) -> None:
        """After the optimizer's step: what the forward passes of a step left out changed (BatchNorm's statistics) is
        put back."""
        raise NotImplementedError

    def numbers(self) -> Tensor:
        """What this process measured since the last call: fp32 (N,) on the device. Begins a new window."""
        raise NotImplementedError

    def look(self, rows: list[list[float]], step: int) -> Window:
        """Judges a window; the same on all processes.

        Args:
            rows: `numbers` of each process, in their order.
            step: steps done.

        Raises:
            UserError: weights that are not finite; with `stop` a loss or gradient that is not finite; with `skip`
                LONGEST_ROW steps left out one after the other.
        """
        raise NotImplementedError
