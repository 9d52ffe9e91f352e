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
import math
import shutil
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import vit_hf
from vit_hf.errors import UserError
from vit_hf.training.accelerator import share_buffers
from vit_hf.training.ema import averaged_buffers, saved_buffers
from vit_hf.training.files import Description, sync_folder, write_bytes, write_tensors
from vit_hf.training.manifest import FORMAT, move_aside, prune, remove_unfinished, seal, shard_name
from vit_hf.training.model_folder import ModelFolder
from vit_hf.training.shared_folder import Answers, SaveFailed, appears, check_shared
from vit_hf.training.state import TrainState
from vit_hf.training.tracking import append_event, warn

_SAVES = itertools.count()  # of this process; all processes save alike, so a number means the same save on each


class Checkpoints:
    """Writes the checkpoints of a run. Made on all processes; every method is called on all of them alike.

    Args:
        output_dir: on a disk that all processes share.
        total_limit: how many are kept, None: all.
        on_save_error: warn (training goes on) or stop (`wait` raises).
        timeout_seconds: how long the main process waits for the files of the others.
        whole: called with each checkpoint's folder by the main process's thread, before an older one is removed.

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
        whole: Callable[[Path], None] = lambda folder: None,
    ):
        self._state, self._model_folder, self._output_dir = state, model_folder, output_dir
        self._total_limit, self._stops, self._timeout_seconds = total_limit, on_save_error == "stop", timeout_seconds
        self._answers, self._whole = Answers(state.accelerator), whole
        self._thread: threading.Thread | None = None
        self._step: int | None = None  # of the last save
        self._why: str | None = None  # it failed
        if state.accelerator.is_main_process:
            output_dir.mkdir(parents=True, exist_ok=True)
            remove_unfinished(output_dir)
        check_shared(state.accelerator, output_dir)

    @property
    def failed(self) -> bool:
        """Whether this process knows by now that the last save has failed. Costs nothing; for a flag in a reduce that is
        made anyway, after which all processes call `wait`."""
        return self._why is not None and not (self._thread is not None and self._thread.is_alive())

    def save(self, step: int, record: dict[str, Any]) -> float:
        """Copies this process's part of a checkpoint to host memory and leaves the rest to a thread. Waits for the save
        before, and raises what `wait` raises. A step that is saved already is not saved again.

        Args:
            record: goes into the manifest: `run` (its identity), `exactness`, `wall_time_seconds`.

        Returns:
            Seconds that training stood still.
        """
        start = time.perf_counter()
        if self.wait() is None and self._step == step:
            return time.perf_counter() - start
        share_buffers(self._state.accelerator, self._state.model)
        model, shard = _copies(self._state, self._model_folder)
        partition = self._state.partition
        manifest = {
            "format": FORMAT,
            "step": step,
            **record,
            "partition": partition.name,
            "optimizer_steps": partition.optimizer_steps(),
            "scaler": partition.scaler_state(),
            "versions": {"vit_hf": vit_hf.__version__, "torch": torch.__version__},
        }
        self._step, self._why = step, "the thread that writes it has died"  # until it has ended
        self._thread = threading.Thread(target=self._work, args=(next(_SAVES), manifest, model, shard), daemon=True)
        self._thread.start()
        return time.perf_counter() - start

    def wait(self) -> str | None:
        """Waits for the save under way. Call it before anything is said of the last checkpoint, and at the end.

        Returns:
            Why the last save failed, None where it did not: the same on all processes.

        Raises:
            UserError: it failed, and on_save_error is stop.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if self._state.accelerator.num_processes > 1:
                (self._why,) = accelerate.utils.broadcast_object_list([self._why])
        if self._why is not None and self._stops:
            raise UserError(
                f"checkpoint-{self._step} could not be written: {self._why}; mend it (--output_dir {self._output_dir}), or "
                "let the run go on without: --on_save_error warn"
            )
        return self._why

    def close(self) -> None:
        """Waits for the thread of this process alone, however the run ends: what it writes is the last good checkpoint."""
        if self._thread is not None:
            self._thread.join()

    def _work(self, number: int, manifest: dict[str, Any], model: dict[str, Tensor], shard: dict[str, Tensor]) -> None:
        """What the thread does."""
        rank = self._state.accelerator.process_index
        temporary = self._output_dir / f"checkpoint-{manifest['step']}.tmp"
        try:
            files = self._write(temporary, model, shard)
        except Exception as error:  # one process that fails may not leave the others waiting
            files, why = {}, _reason(error)
        else:
            why = None
        if rank != 0:
            with contextlib.suppress(RuntimeError):  # the main process is gone, or has ended the run
                self._answers.tell(number, {"files": files, "why": why})
            self._why = why
            return
        try:
            for answer in self._answers.collect(number, self._timeout_seconds):
                files, why = files | answer["files"], why or answer["why"]
            if why is None:
                self._finish(temporary, manifest | {"files": files})
        except Exception as error:
            why = _reason(error)
        if why is not None:
            self._give_up(temporary, manifest["step"], why)
        self._why = why

    def _write(self, temporary: Path, model: dict[str, Tensor], shard: dict[str, Tensor]) -> dict[str, Description]:
        """Writes the files of this process, when its tensors are worth it."""
        for name, tensor in itertools.chain(model.items(), shard.items()):
            if not tensor.isfinite().all():
                raise SaveFailed(f"{name} is not finite: a run that goes on from there is lost")
        temporary.mkdir(parents=True, exist_ok=True)
        accelerator = self._state.accelerator
        name = shard_name(accelerator.process_index, accelerator.num_processes)
        files = {name: write_tensors(temporary / name, shard)}
        return files | (self._model_folder.write(temporary, model) if accelerator.is_main_process else {})

    def _finish(self, temporary: Path, manifest: dict[str, Any]) -> None:
        """Makes a checkpoint of the files of all processes, then removes the oldest."""
        for name, description in manifest["files"].items():
            path = temporary / name
            if not appears(path) or path.stat().st_size != description["bytes"]:
                raise SaveFailed(
                    f"the main process does not see {name} as it was written: --output_dir must be on a disk that all "
                    "machines share"
                )
        write_bytes(temporary / "manifest.json", json.dumps(seal(manifest), indent=1).encode())
        sync_folder(temporary)
        final = temporary.with_suffix("")
        if final.exists():  # put there during the run
            move_aside(final)
        temporary.rename(final)
        sync_folder(self._output_dir)
        self._whole(final)
        if self._total_limit is not None:
            try:
                prune(self._output_dir, self._total_limit)
            except OSError as error:
                warn(f"an old checkpoint could not be removed: {_reason(error)}")

    def _give_up(self, temporary: Path, step: int, why: str) -> None:
        """Removes what was written and says so."""
        shutil.rmtree(temporary, ignore_errors=True)
        warn(f"checkpoint-{step} could not be written: {why}")
        append_event(self._output_dir, "save_failed", step=step, why=why)


def load(state: TrainState, model_folder: ModelFolder, folder: Path, manifest: dict[str, Any]) -> None:
    """Puts a checkpoint into the running objects, one tensor at a time. Collective.

    Args:
        manifest: of `find_together`, so that its files are known to be whole.

    Raises:
        UserError: tensors are missing, left over, or of another shape: another model or optimizer.
    """
    partition, trainable = state.partition, state.partition.trainable_names()
    averaged = list(averaged_buffers(state.model))
    with Stored(folder, manifest) as stored:
        has_raw = stored.has("weight.")  # so the model's file holds the average
        wanted = {model_folder.names[name]: shape for name, shape in model_folder.shapes.items()}
        wanted |= {f"{key}.{name}": model_folder.shapes[name] for key in partition.moment_keys() for name in trainable}
        if has_raw:
            wanted |= {f"weight.{name}": model_folder.shapes[name] for name in trainable}
            wanted |= {f"buffer.{name}": model_folder.shapes[name] for name in averaged}
        stored.check(wanted)
        buffers = saved_buffers(state.model)
        for name in partition.parameter_names():
            partition.set_weight(name, stored.read(model_folder.names[name]))
        for name, buffer in buffers.items():
            buffer.copy_(stored.read(model_folder.names[name]))
        if state.ema is not None:
            state.ema.adopt()  # without an average in the checkpoint it starts from the weights
        if has_raw:
            for name in trainable:
                partition.set_weight(name, stored.read(f"weight.{name}"))
            for name in averaged:
                buffers[name].copy_(stored.read(f"buffer.{name}"))
        for key in partition.moment_keys():
            for name in trainable:
                partition.set_moment(name, key, stored.read(f"{key}.{name}"))
    partition.set_optimizer_steps(manifest["optimizer_steps"])
    if manifest["scaler"] is not None:
        partition.load_scaler_state(manifest["scaler"])
    partition.refresh()


class Stored:
    """The tensors of a checkpoint by name, read one at a time."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self._folder, self._names = folder, [name for name in manifest["files"] if name.endswith(".safetensors")]
        self._files: dict[str, Any] = {}

    def __enter__(self) -> "Stored":
        with contextlib.ExitStack() as opened:
            for name in self._names:
                try:
                    file = opened.enter_context(safe_open(self._folder / name, framework="pt"))
                except (OSError, SafetensorError) as error:
                    raise UserError(f"{self._folder / name} cannot be read: {error}") from None
                self._files |= dict.fromkeys(file.keys(), file)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._opened.close()

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self._files)

    def read(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def check(self, wanted: dict[str, tuple[int, ...]]) -> None:
        """Raises UserError where these are not the tensors that the files hold."""
        wrong = [f"{name} is missing" for name in wanted if name not in self._files]
        wrong += [f"{name} is left over" for name in sorted(self._files) if name not in wanted]
        for name in wanted.keys() & self._files.keys():
            shape = tuple(self._files[name].get_slice(name).get_shape())
            if shape != tuple(wanted[name]):
                wrong.append(f"{name} has shape {shape} instead of {tuple(wanted[name])}")
        if wrong:
            raise UserError(
                f"{self._folder} is of another model, optimizer or --freeze: {'; '.join(wrong[:3])}"
                + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            )


def model_on_host(state: TrainState) -> dict[str, Tensor]:
    """Copies of the model's weights, or of their average where there is one, in fp32, and of its saved buffers; none but on
    the main process. Collective."""
    partition, main, copies = state.partition, state.accelerator.is_main_process, {}
    with state.ema.in_place() if state.ema is not None else contextlib.nullcontext():
        for name in partition.parameter_names():
            weight = partition.full_weight(name)
            if main:
                copies[name] = _on_host(weight)
        if main:
            copies |= {name: _on_host(buffer) for name, buffer in saved_buffers(state.model).items()}
    return copies


def _copies(state: TrainState, model_folder: ModelFolder) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies on the host of what this process writes: the model's tensors (none but on the main process), and its part of
    the training state. A tensor goes to the process with the least so far, the first of those that are alike; the main one
    starts with the model's. The memory stays at one whole tensor above that."""
    partition, rank = state.partition, state.accelerator.process_index
    model = model_on_host(state)
    shard: dict[str, Tensor] = {}
    loads = [0] * state.accelerator.num_processes
    loads[0] = sum(map(math.prod, model_folder.shapes.values()))

    def give(name: str, tensor: Tensor) -> None:
        to = loads.index(min(loads))
        loads[to] += tensor.numel()
        if to == rank:
            shard[name] = _on_host(tensor)

    for key in partition.moment_keys():
        for name in partition.trainable_names():
            give(f"{key}.{name}", partition.full_moment(name, key))
    if state.ema is not None:
        for name in partition.trainable_names():
            give(f"weight.{name}", partition.full_weight(name))
        for name, buffer in averaged_buffers(state.model).items():
            give(f"buffer.{name}", buffer)
    return model, shard


def _on_host(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True).contiguous()


def _reason(error: Exception) -> str:
    """An error in one line. A mistake of ours is shown whole besides."""
    if isinstance(error, SaveFailed):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.strerror or error}: {error.filename}" if error.filename else str(error.strerror or error)
    traceback.print_exception(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
