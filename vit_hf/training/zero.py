"""DeepSpeed's ZeRO stages 1, 2 and 3, with offload to host memory or without, behind the face of partition.py.

DeepSpeed keeps flat fp32 masters, of which each process holds a part; a parameter is one fragment of a flat tensor on
each process, or none. Everything here goes by these fragments.
"""

from dataclasses import dataclass
from typing import Any

import accelerate
import torch
from torch import Tensor, nn

from vit_hf.errors import UserError
from vit_hf.training.partition import Partition, Scaler, set_count


@dataclass(frozen=True)
class Fragment:
    """flat[start : start + numel] is parameter.flatten()[offset : offset + numel]."""

    flat: Tensor
    start: int
    offset: int
    numel: int

    def of(self, flat: Tensor) -> Tensor:
        """The same place of another flat tensor, such as a moment."""
        return flat.detach().narrow(0, self.start, self.numel)


class Zero(Partition):
    """What DeepSpeed's engine holds.

    Source: ZeRO, arXiv 1910.02054.
    """

    def __init__(
        self,
        accelerator: accelerate.Accelerator,
        model: nn.Module,
        optimizer: Any,
        engine: nn.Module,
        before: dict[str, Tensor],
    ):
        """
        Args:
            engine: DeepSpeed's.
            before: fp32 weights as they were before `accelerator.prepare`; those of frozen parameters are kept. In 16
                bits DeepSpeed rounds the model before it copies the masters, which are therefore written again.
        """
        super().__init__(accelerator, model, optimizer)
        self._engine, self._zero = engine, engine.optimizer
        self._fragments = self._fragments_3() if self.name == "zero3" else self._fragments_1_2()
        if any(fragment.flat.dtype != torch.float32 for fragment in self._fragments.values()):
            raise UserError(
                "the DeepSpeed config keeps master weights in 16 bits; remove bf16_master_weights_and_grads or "
                "fp16_master_weights_and_grads from it"
            )
        self._clear_padding()
        self._frozen = {name: before[name] for name, p in self._parameters.items() if not p.requires_grad}
        if accelerator.mixed_precision != "no":
            for name in self.trainable_names():
                self.set_weight(name, before[name])

    def masters(self) -> list[Tensor]:
        return [flat.detach() for flat in self._flats()]

    def full_weight(self, name: str) -> Tensor:
        if name in self._frozen:
            return self._frozen[name].to(self._accelerator.device)
        fragment = self._fragments.get(name)
        return self._whole(name, fragment and fragment.of(fragment.flat))

    def full_moment(self, name: str, key: str) -> Tensor:
        fragment = self._fragments.get(name)
        return self._whole(name, fragment and fragment.of(self._state(fragment.flat)[key]))

    @torch.no_grad()
    def set_weight(self, name: str, tensor: Tensor) -> None:
        if name in self._frozen:
            self._frozen[name].copy_(tensor)
            self._write_frozen(self._parameters[name], tensor)
        elif fragment := self._fragments.get(name):
            fragment.of(fragment.flat).copy_(_part(tensor, fragment))

    @torch.no_grad()
    def set_moment(self, name: str, key: str, tensor: Tensor) -> None:
        if fragment := self._fragments.get(name):
            fragment.of(self._state(fragment.flat)[key]).copy_(_part(tensor, fragment))

    def set_optimizer_steps(self, steps: int) -> None:
        for flat in self._flats():
            set_count(self._state(flat), steps)

    @torch.no_grad()
    def refresh(self) -> None:
        if self.name != "zero3":
            self._zero.update_lp_params()
            return
        self._zero._partition_all_parameters()  # what a forward pass has gathered would hide the new weights
        for group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        if self._zero.persistent_parameters:  # small ones, which stay gathered
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    def scaler_state(self) -> Scaler | None:
        scaler = getattr(self._zero, "loss_scaler", None)
        if scaler is None or not scaler.dynamic:
            return None
        good_steps = scaler.cur_iter - scaler.last_overflow_iter - 1
        return {"scale": float(scaler.cur_scale), "good_steps": good_steps, "hysteresis": scaler.cur_hysteresis}

    def load_scaler_state(self, state: Scaler) -> None:
        scaler = getattr(self._zero, "loss_scaler", None)
        if scaler is not None and scaler.dynamic:
            scaler.cur_scale = float(state["scale"])
            scaler.cur_iter, scaler.last_overflow_iter = int(state["good_steps"]), -1
            scaler.cur_hysteresis = int(state.get("hysteresis", scaler.delayed_shift))

    def clip(self, max_grad_norm: float) -> Tensor:
        """DeepSpeed has clipped and stepped in the last backward; its norm is infinite where a gradient was not finite,
        and that step it has left out."""
        norm = self._engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self._accelerator.device)

    def steps_left_out(self) -> int:
        return self._engine.skipped_steps

    @torch.no_grad()
    def _clear_padding(self) -> None:
        """The end of a share holds no weight, and whatever lay in that memory before, which may be NaN. Zeros stay zeros."""
        for flat in self._flats():
            weights = torch.zeros_like(flat)
            for fragment in self._fragments.values():
                if fragment.flat is flat:
                    fragment.of(weights).copy_(fragment.of(flat))
            flat.copy_(weights)

    def _flats(self) -> list[Tensor]:
        """The flat tensors as the optimizer's state knows them."""
        return list({id(fragment.flat): fragment.flat for fragment in self._fragments.values()}.values())

    def _base_optimizer(self) -> torch.optim.Optimizer:
        return self._zero.optimizer

    def _whole(self, name: str, part: Tensor | None) -> Tensor:
        """Puts a tensor together from the fragments. The sum is over bits, so that -0.0 and NaN stay what they are."""
        parameter = self._parameters[name]
        shape = getattr(parameter, "ds_shape", parameter.shape)
        bits = torch.zeros(shape.numel(), dtype=torch.int32, device=self._accelerator.device)
        if part is not None:
            fragment = self._fragments[name]
            bits.narrow(0, fragment.offset, fragment.numel).copy_(part.view(torch.int32))
        torch.distributed.all_reduce(bits)
        return bits.view(torch.float32).view(shape)

    def _write_frozen(self, parameter: nn.Parameter, tensor: Tensor) -> None:
        if not hasattr(parameter, "ds_id"):
            parameter.data.copy_(tensor)
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if torch.distributed.get_rank() == 0:
                parameter.data.copy_(tensor)

    def _fragments_1_2(self) -> dict[str, Fragment]:
        """Of the parameters of which this process holds something."""
        fragments = {}
        for name in self.trainable_names():
            mapping = self._parameters[name]._hp_mapping
            if mapping is not None:
                flat = self._zero.optimizer.param_groups[mapping.param_group_index]["params"][0]
                high, low = mapping.hp_fragment_address, mapping.lp_fragment_address
                fragments[name] = Fragment(flat, high.start, low.start, low.numel)
        return fragments

    def _fragments_3(self) -> dict[str, Fragment]:
        """Each process holds an equal part of every parameter, the last ones less of it and then padding."""
        fragments, rank = {}, torch.distributed.get_rank()
        for name in self.trainable_names():
            parameter = self._parameters[name]
            group, start, length = self._zero.grad_position[self._zero.get_param_id(parameter)]
            numel = min(length, parameter.ds_numel - rank * length)
            if numel > 0:
                flat = self._zero.fp32_partitioned_groups_flat[group]
                fragments[name] = Fragment(flat, start, rank * length, numel)
        return fragments


def _part(tensor: Tensor, fragment: Fragment) -> Tensor:
    return tensor.flatten().narrow(0, fragment.offset, fragment.numel)
