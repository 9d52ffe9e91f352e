"""What stops a run before its end: a signal, a loss that is not finite, a device without memory left."""

import math
import signal
import sys
import threading

import accelerate
import torch

from vit_hf.errors import UserError


class StoppedBySignal(UserError):
    """SIGTERM or Ctrl-C came; a complete checkpoint was written. Exit status 128 + the signal's number."""

    def __init__(self, number: int, step: int):
        super().__init__(
            f"stopped by {signal.Signals(number).name} after checkpoint-{step}; the same command goes on from there"
        )
        self.exit_status = 128 + number


class SignalGuard:
    """Remembers a SIGTERM or a Ctrl-C until the step is over, and lets all processes agree to stop at the same step. A
    second Ctrl-C stops at once."""

    def __init__(self, accelerator: accelerate.Accelerator, agree_every: int = 10):
        self._accelerator = accelerator
        self._agree_every = agree_every
        self.received: int | None = None
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._remember)

    def _remember(self, number, frame) -> None:
        if number == signal.SIGINT:
            if self.received == signal.SIGINT:
                raise KeyboardInterrupt
            print("\nstopping after this step, with a checkpoint; Ctrl-C again stops at once", file=sys.stderr)
        self.received = number

    def stop_asked(self, steps: int) -> bool:
        """Whether to stop after so many steps. One process knows at once; several ask each other every few steps,
        since asking makes the host wait for the device."""
        if self._accelerator.num_processes == 1:
            return self.received is not None
        if steps % self._agree_every:
            return False
        flag = torch.tensor(float(self.received is not None), device=self._accelerator.device)
        return self._accelerator.reduce(flag, reduction="sum").item() > 0

    def release(self) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


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
        "global batch stays: accumulation grows), set --gradient_checkpointing, or leave the set on the host: "
        "--data_on_device never"
    )
