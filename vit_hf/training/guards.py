"""What stops a run before its end: a signal, a loss that is not finite, a device without memory left."""

import math
import signal
import threading

import accelerate
import torch

from vit_hf.errors import UserError


class StoppedBySignal(UserError):
    """SIGTERM came; a complete checkpoint was written. Exit status 143 = 128 + SIGTERM."""

    exit_status = 143


class SignalGuard:
    """Remembers a SIGTERM until the step is over, and lets all processes agree to stop at the same step."""

    def __init__(self, accelerator: accelerate.Accelerator, agree_every: int = 10):
        self._accelerator = accelerator
        self._agree_every = agree_every
        self._received = False
        self._previous = None
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._remember)

    def _remember(self, signum, frame) -> None:
        self._received = True

    def stop_asked(self, steps: int) -> bool:
        """Whether to stop after so many steps. One process knows at once; several ask each other every few steps,
        since asking makes the host wait for the device."""
        if self._accelerator.num_processes == 1:
            return self._received
        if steps % self._agree_every:
            return False
        flag = torch.tensor(float(self._received), device=self._accelerator.device)
        return self._accelerator.reduce(flag, reduction="sum").item() > 0

    def release(self) -> None:
        """Gives the signal back to whoever had it."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)


def not_finite(
    loss: float, grad_norm: float, first_step: int, last_step: int, mixed_precision: str
) -> UserError | None:
    """The error of a loss or gradient norm that is NaN or infinite; None where both are finite. In fp16 an infinite
    norm is usual now and then: the loss scaler leaves the step out."""
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value) and not (name == "gradient norm" and mixed_precision == "fp16"):
            return UserError(
                f"the {name} is {value} between steps {first_step} and {last_step}; lower --learning_rate, lengthen "
                "--warmup_steps, set --max_grad_norm 1.0, or use bf16 instead of fp16 (accelerate's mixed_precision)"
            )
    return None


def out_of_memory(micro_batch_size: int, training: bool) -> UserError:
    """The error of a device that is full, in one line."""
    if not training:
        return UserError("out of device memory in the evaluation; lower --per_device_eval_batch_size")
    return UserError(
        f"out of device memory with {micro_batch_size} images at once; lower --per_device_train_batch_size (the "
        "global batch stays: accumulation grows), or set --gradient_checkpointing"
    )
