"""The values that follow from the flags, for run_config.yaml, the card and the lines at the start of a run."""

import os
import platform
from typing import Any

import accelerate
import datasets
import torch
import transformers

import vit_hf
from vit_hf.data.preprocessing import Preprocessing
from vit_hf.data.sets.names import ImageSplits
from vit_hf.hub.lineage import dataset_revision, parent_of
from vit_hf.models import ModelSettings
from vit_hf.training.accelerator import engine_name, zero_stage
from vit_hf.training.schedule import BatchPlan, Schedule


def resolve(
    accelerator: accelerate.Accelerator,
    splits: ImageSplits,
    model: transformers.PreTrainedModel,
    which: ModelSettings,
    preprocessing: Preprocessing,
    plan: BatchPlan,
    schedule: Schedule,
    changed: list[dict[str, Any]],
) -> dict[str, Any]:
    """The values that follow from the flags, plain.

    Args:
        which: the model that the run starts from, as it was loaded.
        changed: what was changed on the way, of training/folder.py.
    """
    device, base = accelerator.device, which.model_name_or_path
    parent = parent_of(base, which.revision) if base and accelerator.is_main_process else None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    return {
        "train_split": splits.train_split,
        "eval_split": splits.eval_split,
        "dataset_revision": dataset_revision(splits),
        "train_samples": len(splits.train),
        "eval_samples": len(splits.eval),
        "num_classes": len(splits.class_names),
        "subset": splits.subset or None,
        "subset_hash": splits.subset.get("subset_hash"),
        **({"parent_revision": _pin(parent), "parent": parent} if parent else {}),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "num_trained_parameters": sum(
            parameter.numel() for parameter in model.parameters() if parameter.requires_grad
        ),
        "image_size": list(preprocessing.image_size),
        "eval_resize": preprocessing.eval_resize,
        "resized_to": preprocessing.resized_to,
        "interpolation": preprocessing.interpolation,
        "preprocessing": str(preprocessing),
        "image_mean": list(preprocessing.image_mean),
        "image_std": list(preprocessing.image_std),
        "total_steps": schedule.total_steps,
        "warmup_steps": schedule.warmup_steps,
        "num_processes": plan.num_processes,
        "micro_batch_size": plan.micro_batch_size,
        "accumulation": plan.accumulation,
        "mixed_precision": accelerator.mixed_precision,
        "engine": engine_name(accelerator),
        "zero_stage": zero_stage(accelerator),
        "device": f"{plan.num_processes} x {name}" if device.type == "cuda" else name,
        **({"changed": changed} if changed else {}),
        "versions": {
            "vit_hf": vit_hf.__version__,
            "python": platform.python_version(),
            **{package.__name__: str(package.__version__) for package in (torch, transformers, accelerate, datasets)},
        },
    }


def _pin(parent: dict[str, Any]) -> str | None:
    """The commit of a Hub model, or the hash of a folder's weights."""
    return f"sha256:{parent['sha256']}" if parent.get("sha256") else parent.get("revision")


def describe(flags: dict[str, Any], resolved: dict[str, Any], plan: BatchPlan, schedule: Schedule) -> str:
    """The lines that say what will be run.

    Args:
        flags: all of them, as plain values. resolved: of `resolve`.
    """
    preset, trained = flags["preset"], ""
    if resolved["num_trained_parameters"] < resolved["num_parameters"]:
        trained = f" ({resolved['num_trained_parameters']:,} of them trained)"
    return "\n".join([
        f"model: {preset or flags['model_name_or_path']}, from {'random' if preset else 'its'} weights, "
        f"{resolved['num_parameters'] / 1e6:.2f} M parameters{trained}, {resolved['num_classes']} classes, "
        f"{'x'.join(map(str, resolved['image_size']))} pixels",
        f"data: {flags['dataset_name']}, {resolved['train_samples']} training images ({resolved['train_split']}), "
        f"{resolved['eval_samples']} evaluation images ({resolved['eval_split']})",
        f"preprocessing: {resolved['preprocessing']}",
        f"plan: {plan}; {schedule.total_steps} steps, {schedule.warmup_steps} of warm-up, "
        f"{schedule.epochs_after(schedule.total_steps):.1f} epochs",
        f"on: {resolved['device']}, engine {resolved['engine']}, mixed precision {resolved['mixed_precision']}",
    ])  # fmt: skip
