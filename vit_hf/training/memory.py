"""A device without memory left: which flag helps, and the largest micro-batch that fits."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import accelerate
import torch
from torch import Tensor, nn

from vit_hf.errors import UserError


def out_of_memory(
    micro_batch_size: int, share: int, training: bool, gradient_checkpointing: bool, eval_batch_size: int | None = None
) -> UserError:
    """The error of a device that is full, in one line: the flag to change, and its value.

    Args:
        share: images of the global batch that a process takes.
        training: False in an evaluation.
    """
    raise NotImplementedError


def largest_micro_batch(
    model: nn.Module,
    objective: Callable[[nn.Module, Tensor, Tensor], Tensor],
    image_shape: tuple[int, int, int],
    num_classes: int,
    share: int,
    device: torch.device,
    *,
    autocast: Callable[[], AbstractContextManager],
    reserved_bytes: int = 0,
) -> int:
    """The largest micro-batch that a forward and a backward pass take on this device: the whole share, or else the
    largest divisor of the share that is at most half of what did not fit, and so on.

    Weights, buffers, gradients, modes, random generators and the model's place are afterwards as they were.

    Args:
        model: as it was built, before `prepare`.
        objective: (model, pixel_values (B, C, H, W), targets (B, K)) -> mean loss, as in the loop.
        image_shape: (C, H, W).
        share: images of the global batch that a process takes.
        autocast: gives the context of the forward pass, e.g. `accelerator.autocast`.
        reserved_bytes: what the optimizer will hold on the device, and the average.

    Raises:
        UserError: not even one image fits.
    """
    raise NotImplementedError


def smallest_of_all(accelerator: accelerate.Accelerator, value: int) -> int:
    """The least of all processes' values, on each."""
    raise NotImplementedError
