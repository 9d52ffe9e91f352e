"""How the global batch is cut into what one process takes at once: as the flag says, or as much as its device holds."""

from collections.abc import Callable
from dataclasses import dataclass

import accelerate
import transformers
from torch import Tensor

from vit_hf.training.memory import bytes_beside_gradients, largest_micro_batch, smallest_of_all
from vit_hf.training.schedule import BatchPlan, plan_batches

SHARED_STATE = ("DEEPSPEED", "FSDP")  # ways to train in which the processes share the optimizer's state


@dataclass(frozen=True)
class BatchSettings:
    """What decides how much fits, as the flags of the same names say."""

    global_batch_size: int
    per_device_train_batch_size: int | str | None = None  # None: the whole share of a process; auto: what fits
    optim: str = "adamw_torch"
    momentum: float = 0.9
    ema_decay: float = 0.0
    gradient_checkpointing: bool = False


def fit_batches(
    accelerator: accelerate.Accelerator,
    model: transformers.PreTrainedModel,
    objective: Callable[[Tensor, Tensor], Tensor],
    image_size: tuple[int, int],
    settings: BatchSettings,
) -> BatchPlan:
    """How the global batch is cut. With `auto` each process tries how much its device takes, before the first step, and
    the least of them is taken; the global batch stays.

    Args:
        model: before `prepare`.
        objective: (logits fp32 (B, K), targets (B, K)) -> mean loss.
        image_size: (height, width) in pixels.

    Raises:
        ArgumentError: a global batch that does not divide evenly.
        UserError: not even one image fits.
    """
    number, asked = accelerator.num_processes, settings.per_device_train_batch_size
    if asked != "auto":
        return plan_batches(settings.global_batch_size, number, asked)
    share = plan_batches(settings.global_batch_size, number, None).micro_batch_size
    if settings.gradient_checkpointing and model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    reserved = bytes_beside_gradients(
        model,
        moments=2 if settings.optim == "adamw_torch" else int(settings.momentum > 0),
        ema=settings.ema_decay > 0,
        num_processes=number,
        split_moments=accelerator.distributed_type in SHARED_STATE,
    )
    size = largest_micro_batch(
        model,
        objective,
        (3, *image_size),
        model.config.num_labels,
        share,
        accelerator.device,
        autocast=accelerator.autocast,
        reserved_bytes=reserved,
    )
    size = smallest_of_all(accelerator, size)
    accelerator.print(f"--per_device_train_batch_size auto: {size} images fit")
    return plan_batches(settings.global_batch_size, number, size)
