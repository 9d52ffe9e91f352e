"""Builds the Accelerator: where a run runs is the business of `accelerate launch` and its config; the values that the
recipe owns (batch sizes, clipping) are filled into DeepSpeed's config here."""

import ctypes
import os
import sys
import time
from datetime import timedelta

import accelerate
import numpy as np
import torch
import transformers
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn

from vit_hf.errors import UserError
from vit_hf.training.schedule import BatchPlan


def keep_freed_memory() -> None:
    """Makes glibc keep freed blocks instead of returning them to the system at once. A training step on a CPU frees
    and takes the same large blocks again and again; the page faults cost several per cent of it."""
    if sys.platform == "linux" and not torch.cuda.is_available():
        try:
            libc = ctypes.CDLL("libc.so.6")
        except OSError:  # musl
            return
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)


def build_accelerator(ddp_timeout: int, log_with: list[str] | None = None, project_dir: str | None = None):
    """The Accelerator of this process: as `accelerate launch` describes it, or alone.

    Args:
        ddp_timeout: seconds a process waits for the others.
        log_with: trackers of accelerate.

    Raises:
        UserError: a precision or a back end that this machine does not have.
    """
    keep_freed_memory()
    no_device = not torch.accelerator.is_available()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    # Without a device accelerate has to be told to run on the CPU, but under DeepSpeed that would hide the other
    # processes: there it takes the backend instead.
    backend = {"backend": "gloo"} if no_device and deepspeed else {}
    try:
        accelerator = accelerate.Accelerator(
            cpu=no_device and not deepspeed,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=ddp_timeout), **backend),
                DistributedDataParallelKwargs(broadcast_buffers=False),  # share_buffers does it where it matters
            ],
            log_with=log_with or None,
            project_dir=project_dir,
        )
    except (ValueError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"accelerate cannot run this configuration here: {reason} (change accelerate's --config_file)"
        ) from None
    if accelerator.state.deepspeed_plugin is not None:
        # transformers would split the weights while it reads them; a ViT fits whole into host memory, where the head
        # and the position embeddings are changed, and `prepare` splits it afterwards
        transformers.integrations.unset_hf_deepspeed_config()
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        if "optimizer" in config or "scheduler" in config:
            raise UserError(
                "the DeepSpeed config holds an optimizer or scheduler block; remove it, the recipe owns both"
            )
    return accelerator


def zero_stage(accelerator: accelerate.Accelerator) -> int:
    """DeepSpeed's ZeRO stage; 0 without DeepSpeed."""
    plugin = accelerator.state.deepspeed_plugin
    return 0 if plugin is None else plugin.zero_stage


def apply_batch_plan(accelerator: accelerate.Accelerator, plan: BatchPlan, max_grad_norm: float) -> None:
    """Tells accelerate, and DeepSpeed where it is used, how the global batch is cut. Before `prepare`."""
    accelerator.gradient_accumulation_steps = plan.accumulation
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        plugin.deepspeed_config.update(
            train_batch_size=plan.global_batch_size,
            train_micro_batch_size_per_gpu=plan.micro_batch_size,
            gradient_accumulation_steps=plan.accumulation,
            gradient_clipping=max_grad_norm,
            steps_per_print=10**9,  # our log lines are enough
        )


def end(accelerator: accelerate.Accelerator) -> None:
    """Closes the trackers and the process group, when all processes have come here."""
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if accelerator.num_processes > 1:
        # A thread of gloo lets go of the last collective's tensors, for which it needs the interpreter. DDP's engine,
        # when it is freed, waits for that thread and holds the interpreter meanwhile: so let the thread go first.
        time.sleep(0.1)


def share_buffers(accelerator: accelerate.Accelerator, model: nn.Module) -> None:
    """Gives all processes the main process's BatchNorm statistics. Each collects those of its own images, and uses
    them in evaluation alone: before one, and before a checkpoint, they have to be the same."""
    if accelerator.num_processes > 1:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for buffer in module.buffers(recurse=False):
                    accelerate.utils.broadcast(buffer)  # in place


def seed_micro_step(seed: int, step: int, micro_step: int, rank: int) -> None:
    """Seeds dropout and drop path from where the run stands, so that there is no state to save for a resume."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, micro_step, rank]).generate_state(1, np.uint64)[0] >> 1))
