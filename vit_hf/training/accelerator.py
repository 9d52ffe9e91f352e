"""Builds the Accelerator: where a run runs is the business of `accelerate launch` and its config; the values that the
recipe owns (batch sizes, clipping) are filled into DeepSpeed's config here."""

import ctypes
import importlib.util
import os
import sys
import time
import warnings
from collections.abc import Sequence
from datetime import timedelta

import accelerate
import datasets
import numpy as np
import torch
import transformers
from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from vit_hf.errors import UserError
from vit_hf.training.schedule import BatchPlan

# what prepare() can handle: one process, DDP on any device, ZeRO, FSDP2
SUPPORTED = (
    "NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_MLU", "MULTI_SDAA", "MULTI_MUSA", "MULTI_XPU", "MULTI_HPU",
    "MULTI_NEURON", "DEEPSPEED", "FSDP",
)  # fmt: skip


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


def build_accelerator(
    ddp_timeout: int, log_with: Sequence[str] = (), project_dir: str | None = None
) -> accelerate.Accelerator:
    """The Accelerator of this process: as `accelerate launch` describes it, or alone.

    Args:
        ddp_timeout: seconds a process waits for the others.
        log_with: trackers of accelerate, whose packages have to be installed.

    Raises:
        UserError: a precision or a back end that this machine does not have, or a way to train that is not supported.
    """
    for name in log_with:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--report_to {name}: the package is not installed; pip install -e '.[{name}]'")
    keep_freed_memory()
    _refuse_asked()
    _let_precision_through()
    no_device = not torch.accelerator.is_available()
    deepspeed = _asked("ACCELERATE_USE_DEEPSPEED")
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
            log_with=list(log_with) or None,
            project_dir=project_dir,
        )
    except (ValueError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"accelerate cannot run this configuration here: {reason} (change accelerate's --config_file)"
        ) from None
    if _asked("ACCELERATE_USE_FSDP"):
        _set_up_fsdp2(accelerator)
    if accelerator.distributed_type not in SUPPORTED:
        raise UserError(
            f"distributed_type {accelerator.distributed_type.value} is not supported; take a file of "
            "accelerate_configs/: one process, DDP, ZeRO 1, 2, 3 or FSDP2 (accelerate's --config_file)"
        )
    if accelerator.state.deepspeed_plugin is not None:
        _set_up_deepspeed(accelerator.state.deepspeed_plugin)
    _keep_quiet(accelerator)
    return accelerator


def _keep_quiet(accelerator: accelerate.Accelerator) -> None:
    """Libraries say what matters, and their progress on the main process alone."""
    # torch 2.13 has another name for it, which accelerate does not hand on yet
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not accelerator.is_main_process:
        datasets.disable_progress_bars()


def _asked(variable: str) -> bool:
    """Whether `accelerate launch` has set a switch."""
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes")


def _let_precision_through() -> None:
    """accelerate refuses a config with both a deepspeed_config_file and mixed_precision, though the file may leave it
    "auto", as ours do. The launcher has put the precision into the environment; only that refusal is taken out."""
    fields = os.environ.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")
    if "mixed_precision" in fields:
        os.environ["ACCELERATE_CONFIG_DS_FIELDS"] = ",".join(field for field in fields if field != "mixed_precision")


def _refuse_asked() -> None:
    """Refuses what `accelerate launch` was asked for and what would run as something else, or not at all."""
    for variable, what in (
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism_config (tensor, context or expert parallelism)"),
    ):
        if _asked(variable):
            raise UserError(
                f"{what} is not supported; take a file of accelerate_configs/: one process, DDP, ZeRO 1, 2, 3 or FSDP2 "
                "(accelerate's --config_file)"
            )
    version = os.environ.get("FSDP_VERSION", "1")
    if _asked("ACCELERATE_USE_FSDP") and version != "2":
        raise UserError(
            f"fsdp_version {version} is not supported, allowed is 2; take accelerate_configs/fsdp2.yaml, or write "
            "fsdp_version: 2 into the fsdp_config of accelerate's --config_file"
        )


def _set_up_fsdp2(accelerator: accelerate.Accelerator) -> None:
    """Gradients are added up in fp32; every process reads the whole model, as ever. Where there is no device accelerate
    leaves FSDP out without a word: its state is told."""
    state = accelerator.state
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        for shared in (AcceleratorState._shared_state, PartialState._shared_state):
            shared["distributed_type"] = DistributedType.FSDP
    if accelerator.distributed_type != DistributedType.FSDP:
        raise UserError("FSDP2 needs more than one process, seen 1; set num_processes in accelerate's --config_file")
    # transformers would leave the weights of all processes but the first empty; a ViT fits whole into host memory
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    state.fsdp_plugin.cpu_ram_efficient_loading = False
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)


def _set_up_deepspeed(plugin: DeepSpeedPlugin) -> None:
    """Refuses what would train other than the recipe says, and fixes what the recipe cannot know."""
    # transformers would split the weights while it reads them; a ViT fits whole into host memory, where the head
    # and the position embeddings are changed, and `prepare` splits it afterwards
    transformers.integrations.unset_hf_deepspeed_config()
    config = plugin.deepspeed_config
    if "optimizer" in config or "scheduler" in config:
        raise UserError("the DeepSpeed config holds an optimizer or scheduler block; remove it, the recipe owns both")
    if plugin.zero_stage == 0:
        raise UserError(
            "DeepSpeed's zero_optimization stage 0 splits nothing, and keeps no fp32 weights in 16 bits; allowed are 1, "
            "2, 3, and plain DDP with accelerate_configs/ddp.yaml (accelerate's --config_file)"
        )
    zero = config["zero_optimization"]
    for part in ("offload_optimizer", "offload_param"):
        if (device := zero.get(part, {}).get("device", "none")) not in ("none", "cpu"):
            raise UserError(f"the DeepSpeed config's {part} has device {device}; allowed are none and cpu")
    config["zero_force_ds_cpu_optimizer"] = False  # offloaded or not, the same AdamW
    # gradients of 16-bit weights are added up over micro-steps and processes in fp32, as everywhere else
    config.setdefault("data_types", {})["grad_accum_dtype"] = "fp32"
    config["communication_data_type"] = "fp32"


def check_drawing(accelerator: accelerate.Accelerator, log_figures_steps: int | None) -> None:
    """Raises UserError where figures are asked for and no process holds the whole model."""
    split = {"zero3": "DeepSpeed ZeRO stage 3", "fsdp2": "FSDP2"}.get(engine_name(accelerator))
    if log_figures_steps and split:
        raise UserError(
            f"--log_figures_steps does not work with {split}, which leaves no process the whole model; use "
            "ZeRO stage 1 or 2, or drop the flag and draw a checkpoint or the finished model: vit-hf figures"
        )


def zero_stage(accelerator: accelerate.Accelerator) -> int:
    """DeepSpeed's ZeRO stage; 0 without DeepSpeed."""
    plugin = accelerator.state.deepspeed_plugin
    return 0 if plugin is None else plugin.zero_stage


def engine_name(accelerator: accelerate.Accelerator) -> str:
    """What a model trains behind here: single, ddp, zero1, zero2, zero3 or fsdp2."""
    if stage := zero_stage(accelerator):
        return f"zero{stage}"
    if accelerator.distributed_type == DistributedType.FSDP:
        return "fsdp2"
    return "ddp" if accelerator.num_processes > 1 else "single"


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
