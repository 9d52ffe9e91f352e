"""The output folder of a run: whose run it holds, whether that is finished, where a start goes on from, and what has been
changed on the way. The main process looks and decides, once; the others are told.

This module must not know the flags: it is handed the run's identity as plain values, and how two identities differ.
"""

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import torch
import yaml

import vit_hf
from vit_hf.errors import UserError
from vit_hf.training import checkpoint, manifest
from vit_hf.training.model_folder import ModelFolder
from vit_hf.training.schedule import BatchPlan, Schedule
from vit_hf.training.state import TrainState
from vit_hf.training.tracking import append_event, read_jsonl
from vit_hf.training.waiting import main_process_first

# what a run writes beside run_config.yaml: where they are without it, they are somebody else's
WRITTEN = (
    "README.md",
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "metrics.jsonl",
    "all_results.json",
)
Differences = Callable[..., dict[str, tuple[Any, Any]]]  # (identity as it was saved, folder=) -> {flag: (then, now)}


@dataclass
class Folder:
    """An output folder as a start finds it.

    Args:
        finished: it holds this very run, exported.
        checkpoint: to go on from; None starts anew. manifest: the checkpoint's.
        passed_over: {folder: why} of newer checkpoints that cannot be used.
        changed: what --change has changed so far, oldest first: {"step", "total_steps" that the run had before,
            "flags": {name: [then, now]}}.
    """

    path: Path
    finished: bool = False
    checkpoint: Path | None = None
    manifest: dict[str, Any] = field(default_factory=dict)
    passed_over: dict[str, str] = field(default_factory=dict)
    changed: list[dict[str, Any]] = field(default_factory=list)

    def events(self) -> list[dict[str, Any]]:
        """What events.jsonl holds."""
        return read_jsonl(self.path / "events.jsonl")

    def record(self, event: str, **details: Any) -> None:
        """Adds a line to events.jsonl, from any process."""
        append_event(self.path, event, **details)

    @property
    def step(self) -> int:
        """Steps that earlier starts have done."""
        return self.manifest.get("step", 0)

    @property
    def seconds(self) -> float:
        """Wall time of earlier starts."""
        return self.manifest.get("wall_time_seconds", 0.0)


def open_folder(
    accelerator: accelerate.Accelerator,
    path: Path,
    resume_from: str,
    differences: Differences,
    fetch: Callable[[], str] | None = None,
) -> Folder:
    """Looks at an output folder and decides what this start does; changes nothing in it but by `fetch`.

    Args:
        resume_from: auto, none, hub, or the path of a checkpoint.
        differences: between a run as it was saved and this one; raises UserError where they are not to be mixed.
        fetch: for hub: brings a checkpoint of this run from elsewhere into the folder, and tells what it did; the main
            process calls it.

    Raises:
        UserError: the folder holds another run or something else, a checkpoint asked for cannot be used, or a process does
            not see it.
    """
    local = "auto" if resume_from == "hub" else resume_from
    finished = functools.partial(_is_finished, path, local, differences)
    if main_process_first(accelerator, finished, f"looking at {path}"):
        accelerator.print(f"{path} holds this run, finished; nothing to do (a new run needs another --output_dir)")
        return Folder(path, finished=True)
    if resume_from == "hub":
        accelerator.print(main_process_first(accelerator, fetch, "downloading a checkpoint"))
    found, read, passed_over = manifest.find_together(accelerator, path, local)
    changed = list(read.get("changed", []))
    if differ := differences(read["run"], folder=found) if found is not None else {}:
        flags = {name: list(pair) for name, pair in differ.items()}
        changed.append({"step": read["step"], "total_steps": read.get("total_steps"), "flags": flags})
    return Folder(path, False, found, read, passed_over, changed)


def _is_finished(path: Path, resume_from: str, differences: Differences) -> bool:
    """Whether the folder holds this very run, exported. Raises UserError where it holds something else."""
    config = path / "run_config.yaml"
    if path.exists() and not path.is_dir():
        raise UserError(f"--output_dir: {path} is a file; name a folder")
    foreign = [name for name in WRITTEN if not config.exists() and (path / name).exists()]
    if foreign:
        raise UserError(
            f"--output_dir: {path} holds {', '.join(foreign)} of something else, which the run would overwrite; "
            "name another folder"
        )
    if not (path / "all_results.json").exists():
        return False
    if resume_from not in ("auto", "none") and Path(resume_from).resolve().parent == path.resolve():
        return False  # one of its own checkpoints says whose run it is: that may be the run before a change
    differ = differences(yaml.safe_load(config.read_text()) or {}, folder=path)
    return not differ and resume_from == "auto"


def begin(accelerator: accelerate.Accelerator, folder: Folder, run_config: dict[str, Any]) -> None:
    """Makes the folder this run's: run_config.yaml is written, and what this start makes obsolete is moved aside.

    Args:
        run_config: the flags and what was derived from them, as plain values.
    """
    if accelerator.is_main_process:
        folder.path.mkdir(parents=True, exist_ok=True)
        (folder.path / "all_results.json").unlink(missing_ok=True)  # it says that a run is finished
        temporary = folder.path / "run_config.yaml.tmp"
        temporary.write_text(yaml.safe_dump(run_config, sort_keys=False, allow_unicode=True))
        temporary.replace(folder.path / "run_config.yaml")
        _take_lines(folder)
        later = manifest.later_than(folder.path, folder.step) if folder.manifest else []
        reasons = {str(path): "later than the checkpoint asked for" for path in later} | folder.passed_over
        for path, reason in reasons.items():
            aside = manifest.move_aside(Path(path))
            print(f"passing over {path}: {reason}; moved to {aside.name}")
            append_event(folder.path, "checkpoint_passed_over", folder=path, reason=reason, moved_to=aside.name)
    accelerator.wait_for_everyone()


def _take_lines(folder: Folder) -> None:
    """The lines of the run so far, where a checkpoint that came from elsewhere brought them along."""
    own = folder.path / "metrics.jsonl"
    brought = folder.checkpoint / "metrics.jsonl" if folder.checkpoint is not None else own
    if brought.exists() and not own.exists():
        shutil.copyfile(brought, own)


def _record_of(
    state: TrainState, folder: Folder, run: dict[str, Any], plan: BatchPlan, schedule: Schedule, torch_compile: bool
) -> dict[str, Any]:
    """What each checkpoint's manifest says of the run: its identity, its length, what was changed, and what must be the
    same for a resume that continues to the bit."""
    accelerator, device = state.accelerator, state.accelerator.device
    exactness = {
        "engine": state.partition.name,
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "micro_batch_size": plan.micro_batch_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu_threads": torch.get_num_threads() if device.type == "cpu" else None,  # they cut sums into parts
        "vit_hf": vit_hf.__version__,
        "torch": torch.__version__,
        "torch_compile": torch_compile,
    }
    return {"run": run, "total_steps": schedule.total_steps, "changed": folder.changed, "exactness": exactness}


def resume(
    state: TrainState,
    files: ModelFolder,
    folder: Folder,
    run: dict[str, Any],
    plan: BatchPlan,
    schedule: Schedule,
    torch_compile: bool,
) -> dict[str, Any]:
    """Loads the checkpoint that the folder goes on from, where there is one, and says and records whether the run continues
    to the bit. Returns what the manifests of this start's checkpoints say of the run.

    Args:
        files: what the model's folder holds.
        run: its identity.
    """
    record = _record_of(state, folder, run, plan, schedule, torch_compile)
    if folder.checkpoint is not None:
        _go_on(state, files, folder, record, schedule)
    return record


def _go_on(state: TrainState, files: ModelFolder, folder: Folder, record: dict[str, Any], schedule: Schedule) -> None:
    checkpoint.load(state, files, folder.checkpoint, folder.manifest)
    then, now = folder.manifest["exactness"], record["exactness"]
    why = [f"{key} {then.get(key)} then, {value} now" for key, value in now.items() if then.get(key) != value]
    accelerator, step = state.accelerator, folder.step
    accelerator.print(
        f"resuming from {folder.checkpoint}, " + (f"not to the bit: {'; '.join(why)}" if why else "exactly")
    )
    news = folder.changed[-1] if len(folder.changed) > len(folder.manifest.get("changed", [])) else None
    if news is not None:
        told = "; ".join(f"--{name} {old} until then, {new} now" for name, (old, new) in news["flags"].items())
        accelerator.print(f"changed from step {step} on: {told}")
        if {"max_steps", "num_train_epochs"} & set(news["flags"]) and schedule.kind != "constant":
            accelerator.print(
                f"the {schedule.kind} schedule is stretched to {schedule.total_steps} steps: it goes on from step {step} with "
                f"a learning rate of {schedule.learning_rate_at(step):.4g}"
            )
    if accelerator.is_main_process:
        append_event(folder.path, "resume", folder=str(folder.checkpoint), step=step, exact=not why, why=why)
        if news is not None:
            append_event(folder.path, "changed", **news)
