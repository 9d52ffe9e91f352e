"""FSDP2 (torch's fully_shard): every parameter is split over the processes along its first dimension."""

from typing import Any

import accelerate
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import distribute_tensor

from vit_hf.training.partition import Partition


class Fsdp2(Partition):
    """The shards of this process are the fp32 masters; low-precision copies live only between gathering and use."""

    def __init__(self, accelerator: accelerate.Accelerator, model: nn.Module, optimizer: Any):
        super().__init__(accelerator, model, optimizer)
        self._sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]

    def masters(self) -> list[Tensor]:
        shards = [self._parameters[name].detach().to_local() for name in self.trainable_names()]
        return [shard for shard in shards if shard.numel()]  # a short tensor does not reach to all processes

    def full_weight(self, name: str) -> Tensor:
        return self._parameters[name].detach().full_tensor()

    def full_moment(self, name: str, key: str) -> Tensor:
        return self._state(self._parameters[name])[key].full_tensor()

    def set_weight(self, name: str, tensor: Tensor) -> None:
        self._write(self._parameters[name].detach(), tensor)

    def set_moment(self, name: str, key: str, tensor: Tensor) -> None:
        self._write(self._state(self._parameters[name])[key], tensor)

    def refresh(self) -> None:
        for module in self._sharded:  # after an evaluation the outermost one still holds gathered weights
            module.reshard()

    def clip(self, max_grad_norm: float) -> Tensor:
        return super().clip(max_grad_norm).full_tensor()

    @torch.no_grad()
    def _write(self, sharded: Tensor, whole: Tensor) -> None:
        """Each process cuts its own shard from the whole, which all of them have."""
        mesh, placements = sharded.device_mesh, sharded.placements
        cut = distribute_tensor(whole.to(sharded.device), mesh, placements, src_data_rank=None)
        sharded.to_local().copy_(cut.to_local())


def prepare_fsdp2(accelerator: accelerate.Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple:
    """accelerate's `prepare`: each layer of the model's _no_split_modules is gathered by itself.

    Returns:
        engine (the model itself), optimizer.
    """
    # accelerate asks for the embeddings of words, and transformers answers with an error for a model that has none
    model.get_input_embeddings = lambda: None
    try:
        return accelerator.prepare(model, optimizer)
    finally:
        del model.get_input_embeddings
