"""Leaves a step of the optimizer out by what only the device knows: whether its gradients are finite. Weights, moments, step
count and BatchNorm's statistics are then what they were, to the bit.

torch's fused optimizers look at a flag on the device, `found_inf`. For the others, what a step changes is copied before it
and taken back after it. Where a loss scaler or DeepSpeed's engine leaves the step out by itself, the statistics are left.
"""

import torch
from torch import Tensor, nn

from vit_hf.errors import UserError
from vit_hf.training.state import TrainState


class LeavingOut:
    """Call `arrange` before the optimizer's step and `finish` after it."""

    def __init__(self, state: TrainState):
        norms = (m for m in state.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        self._statistics = [buffer for module in norms for buffer in module.buffers(recurse=False)]
        self._kept = [buffer.clone() for buffer in self._statistics]
        self._base = state.optimizer.optimizer
        by_itself = state.accelerator.scaler is not None or state.partition.name.startswith("zero")
        # fused SGD makes its momentum in the first step without looking at the flag
        fused = isinstance(self._base, torch.optim.Adam) and all(group["fused"] for group in self._base.param_groups)
        self._flag = fused and not by_itself
        self._copies = not fused and not by_itself
        device = state.accelerator.device
        if self._copies and device.type != "cpu" and isinstance(self._base, torch.optim.Adam):
            raise UserError(
                f"--on_nonfinite skip: {type(self._base).__name__} counts its steps on the host on {device.type}, and the "
                "step count could not be taken back; allowed here is stop"
            )
        self._before: dict[int, Tensor] = {}
        self._left_out: Tensor | bool = False

    @torch.no_grad()
    def arrange(self, left_out: Tensor | bool) -> None:
        """Before the optimizer's step.

        Args:
            left_out: bool scalar on the device, the same on all processes; a bool where the host knows.
        """
        self._left_out = left_out
        if self._flag:
            self._base.found_inf = left_out.float()
        elif self._copies:
            self._before = {id(tensor): _local(tensor).clone() for tensor in self._changed()}

    @torch.no_grad()
    def finish(self) -> None:
        """After the optimizer's step."""
        if self._copies:
            for tensor in self._changed():
                before, now = self._before.get(id(tensor), 0), _local(tensor)  # 0: made by this step, from zeros
                now.copy_(now.where(~self._left_out, before))
            self._before = {}
        if self._statistics:
            if isinstance(self._left_out, Tensor):
                for buffer, kept in zip(self._statistics, self._kept, strict=True):
                    buffer.copy_(torch.where(self._left_out, kept, buffer))
            elif self._left_out:
                torch._foreach_copy_(self._statistics, self._kept)
            torch._foreach_copy_(self._kept, self._statistics)

    def _changed(self) -> list[Tensor]:
        """The weights and everything that the optimizer keeps of them."""
        changed = [parameter for group in self._base.param_groups for parameter in group["params"]]
        return changed + [
            kept for own in self._base.state.values() for kept in own.values() if isinstance(kept, Tensor)
        ]


def _local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return getattr(tensor, "_local_tensor", tensor).detach()
