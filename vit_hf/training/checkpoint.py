"""Checkpoints that resume a run under any engine: written aside while training goes on, whole or not at all.

    checkpoint-N/config.json, preprocessor_config.json ...  the model folder that the run would export at this step
    checkpoint-N/model.safetensors                          fp32 weights, or their average with --ema_decay
    checkpoint-N/training_state-0000R-of-0000W.safetensors  a file of each process: the optimizer's moments by parameter
                                                            name (exp_avg.NAME, exp_avg_sq.NAME, momentum_buffer.NAME)
                                                            and with an average the raw weight.NAME and buffer.NAME
    checkpoint-N/manifest.json                              step, run, versions, and size and SHA-256 of every file

One process, DDP, ZeRO and FSDP2 write the same tensors and read them; which file holds a tensor does not matter. Data order,
augmentation and dropout are functions of the step and need no state. The folder is complete exactly when it carries its
final name; the latest checkpoint is the highest complete one. This module must not know about data or engines.
"""

import contextlib
import itertools
import json
import shutil
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import vit_hf
from vit_hf.errors import UserError
from vit_hf.training.accelerator import share_buffers
from vit_hf.training.ema import averaged_buffers
from vit_hf.training.files import Description, sync_folder, write_bytes, write_tensors
from vit_hf.training.manifest import FORMAT, move_aside, prune, remove_unfinished, shard_name
from vit_hf.training.model_folder import WEIGHTS, ModelFolder
from vit_hf.training.state import TrainState
from vit_hf.training.tracking import append_event

POLL_SECONDS = 0.05
_SAVES = itertools.count()  # of this process; all processes save alike, so a number means the same save on each


class SaveFailed(Exception):
    """A checkpoint that was not finished, with the reason."""


class Checkpoints:
    """Writes the checkpoints of a run. Made on all processes; every method is called on all of them alike.

    Args:
        output_dir: on a disk that all processes share.
        total_limit: how many are kept, None: all.
        on_save_error: warn (training goes on) or stop (`wait` raises).
        timeout_seconds: how long the main process waits for the files of the others.

    Raises:
        UserError: a process does not see the output folder of the main process.
    """

    def __init__(
        self,
        state: TrainState,
        model_folder: ModelFolder,
        output_dir: Path,
        *,
        total_limit: int | None = None,
        on_save_error: str = "warn",
        timeout_seconds: float = 1800.0,
    ):
        raise NotImplementedError

    @property
    def failed(self) -> bool:
        """Whether this process knows by now that the last save has failed. Costs nothing; for a flag in a reduce that is
        made anyway, after which all processes call `wait`."""
        raise NotImplementedError

    def save(self, step: int, record: dict[str, Any]) -> float:
        """Copies this process's part of a checkpoint to host memory and leaves the rest to a thread. Waits for the save
        before, and raises what `wait` raises.

        Args:
            record: goes into the manifest: `run` (its identity), `exactness`, `wall_time_seconds`.

        Returns:
            Seconds that training stood still.
        """
        raise NotImplementedError

    def wait(self) -> str | None:
        """Waits for the save under way. Call it before anything is said of the last checkpoint, and at the end.

        Returns:
            Why the last save failed, None where it did not: the same on all processes.

        Raises:
            UserError: it failed, and on_save_error is stop.
        """
        raise NotImplementedError


def load(state: TrainState, model_folder: ModelFolder, folder: Path, manifest: dict[str, Any]) -> None:
    """Puts a checkpoint into the running objects, one tensor at a time. Collective.

    Args:
        manifest: of `find_together`, so that its files are known to be whole.

    Raises:
        UserError: tensors are missing, left over, or of another shape: another model or optimizer.
    """
    raise NotImplementedError
