"""Checkpoints that resume a run: written whole or not at all, found again, checked, and pruned.

    checkpoint-N/manifest.json          step, run, topology, versions, and the size and SHA-256 of every file
    checkpoint-N/model.safetensors      fp32 weights                     (without DeepSpeed)
    checkpoint-N/ema.safetensors        their moving average             (with --ema_decay)
    checkpoint-N/optimizer.pt           optimizer and loss-scaler state  (tensors and plain values only)
    checkpoint-N/deepspeed/             what DeepSpeed's engine writes   (with DeepSpeed, one set of files a process)

Data order, augmentation and dropout are functions of the step and need no state. The folder is complete exactly when
it carries its final name; the latest checkpoint is the highest complete one. This module must not know about data.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import vit_hf
from vit_hf.errors import UserError
from vit_hf.training.accelerator import zero_stage
from vit_hf.training.ema import EMA

NAME = re.compile(r"checkpoint-(\d+)")


class BrokenCheckpoint(Exception):
    """A checkpoint folder that cannot be used, with the reason."""


@dataclass
class TrainState:
    """Everything that a step changes."""

    accelerator: accelerate.Accelerator
    model: nn.Module  # as it was built
    engine: nn.Module  # as `prepare` returned it: the same weights behind DDP or DeepSpeed
    optimizer: Any
    ema: EMA | None = None


def topology(accelerator: accelerate.Accelerator) -> dict[str, Any]:
    """What DeepSpeed's files depend on."""
    return {
        "num_processes": accelerator.num_processes,
        "zero_stage": zero_stage(accelerator),
        "mixed_precision": accelerator.mixed_precision,
    }


def save(
    state: TrainState, output_dir: Path, step: int, record: dict[str, Any], total_limit: int | None = None
) -> None:
    """Writes checkpoint-{step} on all processes, then removes all but the newest `total_limit` ones.

    Args:
        record: goes into the manifest: `run` (its identity), `exactness`, `wall_time_seconds`.
    """
    final = output_dir / f"checkpoint-{step}"
    temporary = output_dir / f"checkpoint-{step}.tmp"
    accelerator = state.accelerator
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    if zero_stage(accelerator):
        state.engine.save_checkpoint(str(temporary), tag="deepspeed", save_latest=False)
    elif accelerator.is_main_process:
        save_file(_tensors(state.model.state_dict()), temporary / "model.safetensors")
        if state.ema is not None:
            save_file(_tensors(state.ema.state_dict()), temporary / "ema.safetensors")
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        torch.save({"optimizer": state.optimizer.state_dict(), "scaler": scaler}, temporary / "optimizer.pt")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        manifest = {
            "step": step,
            **record,
            **topology(accelerator),
            "versions": {"vit_hf": vit_hf.__version__, "torch": torch.__version__},
            "files": {str(path.relative_to(temporary)): _describe(path) for path in _files(temporary)},
        }
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in _files(temporary):
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _sync(output_dir)
        if total_limit is not None:
            ours = [path for path in _checkpoints(output_dir) if (path / "manifest.json").exists()]
            for old in sorted(ours, key=_step)[:-total_limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files all have their recorded sizes and checksums.

    Raises:
        BrokenCheckpoint: a file is missing, truncated or changed, or the folder is not one of ours.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        files, _ = manifest["files"], manifest["run"]
    except FileNotFoundError:
        raise BrokenCheckpoint("no manifest.json, so not written by vit_hf or not whole") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BrokenCheckpoint(f"unreadable manifest.json ({error})") from None
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise BrokenCheckpoint(f"{name} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise BrokenCheckpoint(f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}")
        if _describe(path) != expected:
            raise BrokenCheckpoint(f"{name} was changed: its SHA-256 differs")
    return manifest


def find(output_dir: Path, resume_from: str) -> tuple[Path | None, dict[str, Any], dict[str, str]]:
    """The checkpoint to go on from.

    Args:
        resume_from: auto (the newest whole one), none, or a path.

    Returns:
        Its folder (None: start anew), its manifest, and {folder: why} for newer ones that cannot be used.

    Raises:
        UserError: a path that is no whole checkpoint, or `none` where there are checkpoints.
    """
    if resume_from not in ("auto", "none"):
        try:
            return Path(resume_from), read_manifest(Path(resume_from)), {}
        except BrokenCheckpoint as error:
            raise UserError(f"--resume_from_checkpoint: {resume_from} cannot be used: {error}") from None
    candidates = sorted(_checkpoints(output_dir), key=_step, reverse=True)
    if resume_from == "none" and candidates:
        raise UserError(
            f"--output_dir {output_dir} holds {candidates[0].name} and --resume_from_checkpoint is none; choose another "
            "--output_dir, remove the folder, or resume with auto"
        )
    passed_over = {}
    for folder in candidates:
        try:
            return folder, read_manifest(folder), passed_over
        except BrokenCheckpoint as error:
            passed_over[str(folder)] = str(error)
    return None, {}, passed_over


def later_than(output_dir: Path, step: int) -> list[Path]:
    """The checkpoints of later steps, which a resume from an earlier one makes obsolete."""
    return [path for path in _checkpoints(output_dir) if _step(path) > step]


def move_aside(folder: Path) -> Path:
    """Renames a checkpoint that will not be used, so that it is neither found again nor overwritten nor pruned."""
    number = 0
    while (aside := folder.with_name(f"{folder.name}.aside{number or ''}")).exists():
        number += 1
    return folder.rename(aside)


def remove_unfinished(output_dir: Path) -> None:
    """Removes what a kill in the middle of a save left."""
    for path in output_dir.glob("checkpoint-*.tmp"):
        shutil.rmtree(path)


def load(state: TrainState, folder: Path, manifest: dict[str, Any]) -> None:
    """Puts a checkpoint into the running objects.

    Raises:
        UserError: DeepSpeed states cannot be read by another number of processes or ZeRO stage.
    """
    here = topology(state.accelerator)
    changed = [
        f"{name} {manifest.get(name)} then, {value} now" for name, value in here.items() if manifest.get(name) != value
    ]
    if (here["zero_stage"] or manifest.get("zero_stage")) and changed:
        raise UserError(
            f"{folder} was written by another topology ({'; '.join(changed)}); launch with the same "
            "accelerate --config_file and number of processes"
        )
    if here["zero_stage"]:
        path, _ = state.engine.load_checkpoint(str(folder), tag="deepspeed")
        if path is None:
            raise UserError(f"DeepSpeed found no state in {folder}")
        return
    state.model.load_state_dict(load_file(folder / "model.safetensors"))
    if state.ema is not None:
        state.ema.load_state_dict(load_file(folder / "ema.safetensors"))
    saved = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
    state.optimizer.load_state_dict(saved["optimizer"])
    if state.accelerator.scaler is not None and saved["scaler"] is not None:
        state.accelerator.scaler.load_state_dict(saved["scaler"])


def _checkpoints(output_dir: Path) -> list[Path]:
    return [path for path in output_dir.glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir()]


def _step(folder: Path) -> int:
    return int(NAME.fullmatch(folder.name)[1])


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
