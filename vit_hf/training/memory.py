"""A device without memory left: which flag helps, and the largest micro-batch that fits."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import accelerate
import torch
from torch import Tensor, nn

from vit_hf.errors import UserError

# of CUDA, of the CPU's allocator, of cuBLAS and cuDNN
FULL = ("out of memory", "can't allocate memory", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device was full. Some libraries raise a plain RuntimeError then."""
    full = isinstance(error, RuntimeError) and any(words in str(error) for words in FULL)
    return full or isinstance(error, torch.OutOfMemoryError)


def out_of_memory(
    micro_batch_size: int, share: int, training: bool, gradient_checkpointing: bool, eval_batch_size: int | None = None
) -> UserError:
    """The error of a device that is full, in one line: the flag to change, and its value.

    Args:
        share: images of the global batch that a process takes.
        training: False in an evaluation.
    """
    if not training:
        value = f" to {eval_batch_size // 2}" if (eval_batch_size or 0) > 1 else ""
        return UserError(f"out of device memory in the evaluation; lower --per_device_eval_batch_size{value}")
    seen = f"out of device memory with {_images(micro_batch_size)} at once"
    checkpointing = "" if gradient_checkpointing else "set --gradient_checkpointing true, or "
    if micro_batch_size > 1:
        return UserError(
            f"{seen}; lower --per_device_train_batch_size to {_divisor(share, micro_batch_size - 1)} (the global batch "
            f"stays: accumulation grows), or {checkpointing}leave the set on the host: --data_on_device never"
        )
    return UserError(
        f"{seen}; {checkpointing}leave the set on the host (--data_on_device never), or split the weights over the "
        "processes (accelerate's --config_file accelerate_configs/zero3.yaml)"
    )


def largest_micro_batch(
    model: nn.Module,
    objective: Callable[[Tensor, Tensor], Tensor],
    image_shape: tuple[int, int, int],
    num_classes: int,
    share: int,
    device: torch.device,
    *,
    autocast: Callable[[], AbstractContextManager],
    reserved_bytes: int = 0,
) -> int:
    """The largest micro-batch whose forward and backward pass this device takes: the whole share, or else the largest
    divisor of the share that is at most half of what did not fit, and so on. A share that is a power of two gives one.

    Weights, buffers, gradients, modes, random generators and the model's place are afterwards as they were.

    Args:
        model: as it was built, before `prepare`; called as `model(pixel_values=...)`, gives `.logits` (B, K).
        objective: (logits fp32 (B, K), targets (B, K)) -> mean loss, as in the loop.
        image_shape: (C, H, W).
        share: images of the global batch that a process takes.
        autocast: gives the context of the forward pass, e.g. `accelerator.autocast`.
        reserved_bytes: what the optimizer will hold on the device, and the average.

    Raises:
        UserError: not even one image fits.
    """
    size = share
    with _as_it_was(model, device):
        while not _fits(model, objective, (size, *image_shape), num_classes, device, autocast, reserved_bytes):
            if size == 1:
                checkpointing = getattr(model, "is_gradient_checkpointing", False)
                raise out_of_memory(size, share, True, checkpointing)
            size = _divisor(share, size // 2)
    return size


def bytes_beside_gradients(
    model: nn.Module, *, moments: int, ema: bool, num_processes: int, split_moments: bool
) -> int:
    """What a device holds of a model beside weights, gradients and activations: the optimizer's moments, the average, and
    DDP's buckets; for `largest_micro_batch`, which runs before there are any.

    Args:
        moments: of each weight: 2 for AdamW, 1 for SGD with momentum.
        split_moments: whether the processes share moments and average (ZeRO, FSDP2).
    """
    count = 4 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)  # fp32
    held = count * (moments + ema)
    buckets = count if num_processes > 1 else 0
    return (held // num_processes if split_moments else held) + buckets


def smallest_of_all(accelerator: accelerate.Accelerator, value: int) -> int:
    """The least of all processes' values, on each."""
    return min(accelerate.utils.gather_object([value]))


def _divisor(share: int, limit: int) -> int:
    """The largest divisor of a share up to a limit."""
    return next(size for size in range(limit, 0, -1) if share % size == 0)


def _images(count: int) -> str:
    return f"{count} image{'s' if count > 1 else ''}"


def _fits(model, objective, shape, num_classes, device, autocast, reserved_bytes: int) -> bool:
    """Whether two micro-steps go through: the second one finds gradients, as those of an accumulation do."""
    try:
        model.to(device)
        held = [torch.empty(reserved_bytes, dtype=torch.uint8, device=device)]
        held.append(torch.empty(shape, dtype=torch.uint8, device=device))  # the images as they arrive
        pixel_values = torch.zeros(shape, device=device)
        targets = torch.full((shape[0], num_classes), 1 / num_classes, device=device)
        for _ in range(2):
            with autocast():
                logits = model(pixel_values=pixel_values).logits
            objective(logits.float(), targets).backward()
        return True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    finally:
        model.zero_grad(set_to_none=True)
    # only here is nothing left that holds what the failed attempt has computed
    gc.collect()
    _release(device)
    return False


def _release(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
        torch.get_device_module(device).empty_cache()


@contextlib.contextmanager
def _as_it_was(model: nn.Module, device: torch.device) -> Iterator[None]:
    """A model in training mode that may be run, and is afterwards as it was, BatchNorm's statistics included."""
    place = next(model.parameters()).device
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    generators = [] if device.type == "cpu" else [device]
    try:
        with torch.random.fork_rng(generators, device_type="cuda" if device.type == "cpu" else device.type):
            model.zero_grad(set_to_none=True)
            model.train()
            yield
    finally:
        model.to(place)
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
        for name, module in model.named_modules():
            module.training = modes[name]
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        _release(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # the trial is no part of what the run takes
