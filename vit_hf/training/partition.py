"""What each process holds of the weights and of the optimizer's state, by parameter name: one face for one process, DDP,
DeepSpeed's ZeRO stages and FSDP2. Checkpoints, the moving average and the finite check are written against it.

A parameter's name is the one it has in the model as it was built. Weights and moments come out and go in whole and in
fp32, one tensor at a time, so that the memory stays at one tensor above a process's share. This module must not know
about files.
"""

from typing import Any

import accelerate
import torch
from torch import Tensor, nn

from vit_hf.training.accelerator import engine_name

MOMENTS = {"AdamW": ("exp_avg", "exp_avg_sq"), "SGD": ("momentum_buffer",)}
Scaler = dict[str, float | int | bool]


class Partition:
    """The face. `full_*` and `set_*` are collective: every process calls them, with the same name at the same time.

    Frozen parameters have weights, but no master and no moments.
    """

    name: str  # of `engine_name`
    # fp32 (P,), by trainable parameter, of this process's share, before the last clip
    gradient_norms: Tensor | None = None

    def __init__(self, accelerator: accelerate.Accelerator, model: nn.Module, optimizer: Any):
        """
        Args:
            model: as it was built, after `accelerator.prepare`.
            optimizer: as `accelerator.prepare` returned it.
        """
        self.name = engine_name(accelerator)
        self._accelerator = accelerator
        self._optimizer = optimizer
        self._parameters = dict(model.named_parameters())

    def parameter_names(self) -> list[str]:
        """All parameters, trainable and frozen, in the order of model.named_parameters()."""
        return list(self._parameters)

    def trainable_names(self) -> list[str]:
        """Those of them that the optimizer updates."""
        return [name for name, parameter in self._parameters.items() if parameter.requires_grad]

    def moment_keys(self) -> tuple[str, ...]:
        """The tensors that the optimizer keeps for each trainable parameter."""
        base = self._base_optimizer()
        if type(base).__name__ == "SGD":
            return MOMENTS["SGD"] if any(group["momentum"] for group in base.param_groups) else ()
        return MOMENTS["AdamW"]

    def masters(self) -> list[Tensor]:
        """The live fp32 tensors that this process's optimizer updates: its share of the trainable weights. The list and
        the storages stay the same for the whole run; after writing into them call `refresh`."""
        raise NotImplementedError

    def full_weight(self, name: str) -> Tensor:
        """A whole weight in fp32, on the device. It may be the live tensor: copy it before the next step."""
        raise NotImplementedError

    def full_moment(self, name: str, key: str) -> Tensor:
        """A whole moment in fp32, on the device; zeros before the first step. It may be the live tensor.

        Args:
            key: one of `moment_keys`.
        """
        raise NotImplementedError

    def optimizer_steps(self) -> int:
        """How many updates AdamW has counted; 0 for SGD, which does not count."""
        return count_of(self._base_optimizer())

    def set_weight(self, name: str, tensor: Tensor) -> None:
        """Writes a whole weight (on the CPU, the same on all processes) into the masters. Call `refresh` after the last."""
        raise NotImplementedError

    def set_moment(self, name: str, key: str, tensor: Tensor) -> None:
        """Writes a whole moment (on the CPU, the same on all processes), before the first step too."""
        raise NotImplementedError

    def set_optimizer_steps(self, steps: int) -> None:
        """Sets AdamW's count of updates, from which its bias correction follows; nothing for SGD."""
        for name in self.trainable_names():
            set_count(self._state(self._parameters[name]), steps)

    def refresh(self) -> None:
        """Lets the low-precision copies and the replicas follow the masters."""

    def scaler_state(self) -> Scaler | None:
        """The fp16 loss scaler's plain numbers, {scale, good_steps since the last overflow or growth, ...}, the same under
        every partition; None where there is no scaler."""
        scaler = self._accelerator.scaler
        if scaler is None or not scaler.is_enabled():
            return None
        state = scaler.state_dict()
        return {"scale": state["scale"], "good_steps": state["_growth_tracker"]}

    def load_scaler_state(self, state: Scaler) -> None:
        """Takes over what `scaler_state` gave; nothing where there is no scaler."""
        scaler = self._accelerator.scaler
        if scaler is not None and scaler.is_enabled():
            now = scaler.state_dict()
            good_steps = state["good_steps"] % now["growth_interval"]  # DeepSpeed counts on where torch starts again
            scaler.load_state_dict(now | {"scale": state["scale"], "_growth_tracker": good_steps})

    def clip(self, max_grad_norm: float) -> Tensor:
        """Clips the gradients where the engine has not done it, between the last backward and the optimizer's step; keeps
        the norms that it takes on its way.

        Args:
            max_grad_norm: 0 does not clip.

        Returns:
            The norm before, a scalar fp32 on the device; NaN or infinite where a gradient is.
        """
        self._accelerator.unscale_gradients()
        parameters = [p for p in self._parameters.values() if p.requires_grad and p.grad is not None]
        norms = torch._foreach_norm([parameter.grad for parameter in parameters])
        stacked = torch.stack(norms)
        split = hasattr(stacked, "to_local")
        self.gradient_norms = torch.stack([norm.to_local() for norm in norms]) if split else stacked
        total = torch.linalg.vector_norm(stacked)
        if max_grad_norm:
            nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, total)
        return total

    def finite(self) -> Tensor:
        """1.0 where all masters of this process are finite, and their squares too (below 1.8e19), else 0.0: a scalar fp32
        on the device, without a host sync. Processes hold different shares: reduce it (the mean or the least over all)."""
        masters = self.masters()
        if not masters:
            return torch.ones((), device=self._accelerator.device)
        norms = torch._foreach_norm(masters)  # ten times as fast as their largest on a CPU
        return torch.stack(norms).isfinite().all().float().to(self._accelerator.device)

    def steps_left_out(self) -> int:
        """How many updates the engine itself has left out since the start, because a gradient was not finite: a number
        that the host knows. 0 where the engine leaves none out; accelerate's fp16 scaler is not counted here."""
        return 0

    def _base_optimizer(self) -> torch.optim.Optimizer:
        """torch's own optimizer, under what accelerate and DeepSpeed put around it."""
        return self._optimizer.optimizer

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        """What torch's optimizer keeps of one of its parameters."""
        return optimizer_state(self._base_optimizer(), parameter, self.moment_keys())


class Whole(Partition):
    """One process, or DDP: every process holds all weights in fp32 and all of the optimizer's state."""

    def masters(self) -> list[Tensor]:
        return [self._parameters[name].detach() for name in self.trainable_names()]

    def full_weight(self, name: str) -> Tensor:
        return self._parameters[name].detach()

    def full_moment(self, name: str, key: str) -> Tensor:
        return self._state(self._parameters[name])[key]

    def set_weight(self, name: str, tensor: Tensor) -> None:
        self.full_weight(name).copy_(tensor)

    def set_moment(self, name: str, key: str, tensor: Tensor) -> None:
        self._state(self._parameters[name])[key].copy_(tensor)


def optimizer_state(base: torch.optim.Optimizer, parameter: Tensor, keys: tuple[str, ...]) -> dict[str, Tensor]:
    """torch's state of one parameter, made as its first step makes it where there is none yet: zeros, which that step
    would start from."""
    state = base.state[parameter]
    if keys and state.get(keys[0]) is None:  # SGD without momentum keeps nothing
        if keys == MOMENTS["AdamW"]:  # the fused kernel counts on the device
            device = parameter.device if base.defaults["fused"] or base.defaults["capturable"] else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        state.update({key: torch.zeros_like(parameter, memory_format=torch.preserve_format) for key in keys})
    return state


def count_of(base: torch.optim.Optimizer) -> int:
    """How many updates torch's optimizer has counted; the counts of fused kernels are on the device: one host sync."""
    steps = [state["step"] for state in base.state.values() if "step" in state]
    return int(torch.stack(steps).max()) if steps else 0


def set_count(state: dict[str, Tensor], steps: int) -> None:
    """Sets the count in the state of one parameter, where one is kept."""
    if "step" in state:
        state["step"].fill_(steps)
