"""Everything that a step changes, and how it is put together from a model: compiled, handed to accelerate."""

from dataclasses import dataclass
from typing import Any

import accelerate
import torch
from accelerate import DistributedType
from torch import nn

from vit_hf.errors import UserError
from vit_hf.training.accelerator import apply_batch_plan
from vit_hf.training.ema import EMA
from vit_hf.training.optimizer import OptimizerSettings, make_optimizer, parameter_groups
from vit_hf.training.partition import Partition, Whole
from vit_hf.training.schedule import BatchPlan


@dataclass
class TrainState:
    """Everything that a step changes."""

    accelerator: accelerate.Accelerator
    model: nn.Module  # as it was built: its parameters' names are the names everywhere
    engine: nn.Module  # as accelerate prepared it: what is called in a forward pass
    optimizer: Any  # as accelerate prepared it
    partition: Partition
    ema: EMA | None = None


def prepare(
    accelerator: accelerate.Accelerator,
    model: nn.Module,
    plan: BatchPlan,
    *,
    optimizer: OptimizerSettings,
    max_grad_norm: float,
    ema_decay: float = 0.0,
    gradient_checkpointing: bool = False,
    torch_compile: bool = False,
) -> TrainState:
    """Model and optimizer on the device, behind DDP, ZeRO or FSDP2 where the launch says so.

    Args:
        model: in fp32 on the CPU, the same on all processes; parameters without `requires_grad` stay as they are.
        ema_decay: 0 keeps no average.

    Raises:
        UserError: what this model or this partition cannot do.
    """
    if gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise UserError(f"--gradient_checkpointing: {type(model).__name__} has no checkpoints to recompute from")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if torch_compile:
        model.compile()  # in place: names in the state dict stay
    if optimizer.layer_decay < 1 and model.base_model_prefix != "vit":
        raise UserError(
            f"--layer_decay: {optimizer.layer_decay} is for the layers of a ViT, allowed for this model is 1"
        )
    apply_batch_plan(accelerator, plan, max_grad_norm)
    groups = parameter_groups(model, weight_decay=optimizer.weight_decay, layer_decay=optimizer.layer_decay)
    made = make_optimizer(groups, optimizer)
    engine, prepared, partition = _partitioned(accelerator, model, made)
    ema = EMA(partition, model, ema_decay) if ema_decay else None
    return TrainState(accelerator, model, engine, prepared, partition, ema)


def _partitioned(
    accelerator: accelerate.Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, Any, Partition]:
    """Engine and optimizer as accelerate prepares them, and what each process then holds."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from vit_hf.training.zero import Zero

        # frozen weights have no master there; trainable ones are cast, and these tensors are not
        before = {name: p.detach() if p.requires_grad else p.detach().clone() for name, p in model.named_parameters()}
        engine, prepared = accelerator.prepare(model, optimizer)
        return engine, prepared, Zero(accelerator, model, prepared, engine, before)
    if accelerator.distributed_type == DistributedType.FSDP:
        from vit_hf.training.fsdp import Fsdp2, prepare_fsdp2

        engine, prepared = prepare_fsdp2(accelerator, model, optimizer)
        return engine, prepared, Fsdp2(accelerator, model, prepared)
    engine, prepared = accelerator.prepare(model, optimizer)
    return engine, prepared, Whole(accelerator, model, prepared)
