"""Which checkpoints an output folder holds, and whether they are whole: manifest.json is read, believed in nothing, and
checked against the files beside it. This module must not know what is in the files.
"""

import functools
import hashlib
import json
import math
import re
import reprlib
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

import accelerate

from vit_hf.errors import UserError
from vit_hf.training.files import describe
from vit_hf.training.waiting import main_process_first

FORMAT = 2
NAME = re.compile(r"checkpoint-(\d{1,15})", re.ASCII)
SHARD = re.compile(r"training_state-(\d{5})-of-(\d{5})\.safetensors", re.ASCII)
Found = tuple[Path | None, dict[str, Any], dict[str, str]]


class BrokenCheckpoint(Exception):
    """A checkpoint folder that cannot be used, with the reason."""


class OtherFormat(BrokenCheckpoint):
    """A checkpoint that another version of vit_hf wrote and can go on from."""


def shard_name(rank: int, num_processes: int) -> str:
    """The file of one process."""
    return f"training_state-{rank + 1:05}-of-{num_processes:05}.safetensors"


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """The same manifest with its own SHA-256 in it, so that a changed number is seen."""
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    plain = json.loads(json.dumps(content))
    return content | {"sha256": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files all have their recorded sizes and checksums. Every value that is read here
    or by a resume has its type.

    Raises:
        BrokenCheckpoint: a file is missing, truncated or changed, or the folder is not one of ours.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BrokenCheckpoint("no manifest.json, so not written by vit_hf or not whole") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BrokenCheckpoint(f"manifest.json cannot be read ({error})") from None
    if not isinstance(manifest, dict):
        raise BrokenCheckpoint(f"manifest.json holds {_short(manifest)} instead of an object")
    _check_format(manifest)
    for name, (is_right, what) in FIELDS.items():
        if name in OPTIONAL and name not in manifest:
            continue
        if name not in manifest or not is_right(manifest[name]):
            found = f"is {_short(manifest[name])}" if name in manifest else "is missing"
            raise BrokenCheckpoint(f"manifest.json: {name} {found}, it should be {what}")
    match = NAME.fullmatch(folder.name)
    if match and int(match[1]) != manifest["step"]:
        raise BrokenCheckpoint(f"manifest.json: step is {manifest['step']}, and the folder is {folder.name}")
    _check_list(manifest["files"])
    if seal(manifest) != manifest:
        raise BrokenCheckpoint("manifest.json was changed: its own SHA-256 differs")
    _check_files(folder, manifest["files"])
    return manifest


def find(output_dir: Path, resume_from: str) -> Found:
    """The checkpoint to go on from, as one process sees it.

    Args:
        resume_from: auto (the newest whole one), none, or a path.

    Returns:
        Its folder (None: start anew), its manifest, and {folder: why} for newer ones that cannot be used.

    Raises:
        UserError: a path that is no whole checkpoint, `none` where there are checkpoints, one of another version's.
    """
    if resume_from not in ("auto", "none"):
        if not Path(resume_from).is_dir():
            raise UserError(
                f"--resume_from_checkpoint: {resume_from} is no folder; allowed are auto, none, hub, and the path of a checkpoint"
            )
        try:
            return Path(resume_from), read_manifest(Path(resume_from)), {}
        except BrokenCheckpoint as error:
            raise UserError(f"--resume_from_checkpoint: {resume_from} cannot be used: {error}") from None
    candidates = sorted(checkpoints(output_dir), key=step_of, reverse=True)
    if resume_from == "none" and candidates:
        raise UserError(
            f"--output_dir {output_dir} holds {candidates[0].name} and --resume_from_checkpoint is none; choose another "
            "--output_dir, remove the folder, or resume with auto"
        )
    passed_over = {}
    for folder in candidates:
        try:
            return folder, read_manifest(folder), passed_over
        except OtherFormat as error:
            raise UserError(f"--output_dir: {folder} cannot be used: {error}") from None
        except BrokenCheckpoint as error:
            passed_over[str(folder)] = str(error)
    return None, {}, passed_over


def find_together(accelerator: accelerate.Accelerator, output_dir: Path, resume_from: str) -> Found:
    """What `find` gives on the main process, which alone reads and hashes, on every process.

    Raises:
        UserError: as `find`, on all processes alike; a process that does not see the folder which the main one has found.
    """
    found = main_process_first(
        accelerator, functools.partial(find, output_dir, resume_from), "looking for a checkpoint"
    )
    folder, manifest, _ = found
    if folder is not None and accelerator.num_processes > 1:
        blind = accelerate.utils.gather_object([not _sees(folder, manifest)])
        if any(blind):
            raise UserError(
                f"process {blind.index(True)} does not see {folder} as the main process does: --output_dir must be on a "
                "disk that all machines share"
            )
    return found


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders whose name is that of a checkpoint, whole or not, ours or not."""
    return [path for path in output_dir.glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir()]


def later_than(output_dir: Path, step: int) -> list[Path]:
    """The checkpoints of later steps, which a resume from an earlier one makes obsolete."""
    return [path for path in checkpoints(output_dir) if step_of(path) > step]


def move_aside(folder: Path) -> Path:
    """Renames a checkpoint that will not be used, so that it is neither found again nor overwritten nor pruned."""
    number = 0
    while (aside := folder.with_name(f"{folder.name}.aside{number or ''}")).exists():
        number += 1
    return folder.rename(aside)


def remove_unfinished(output_dir: Path) -> None:
    """Removes what a kill in the middle of a save left."""
    for path in output_dir.glob("checkpoint-*.tmp"):
        if NAME.fullmatch(path.stem):
            shutil.rmtree(path)


def prune(output_dir: Path, total_limit: int) -> None:
    """Removes all whole checkpoints but the newest; folders of others stay. Raises OSError."""
    ours = [path for path in checkpoints(output_dir) if (path / "manifest.json").exists()]
    for old in sorted(ours, key=step_of)[:-total_limit]:
        unfinished = old.with_name(
            f"{old.name}.tmp"
        )  # a kill in the middle leaves nothing that looks like a checkpoint
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(old.rename(unfinished))


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(NAME.fullmatch(folder.name)[1])


def _sees(folder: Path, manifest: dict[str, Any]) -> bool:
    try:
        return json.loads((folder / "manifest.json").read_text(encoding="utf-8")) == manifest
    except (OSError, ValueError):
        return False


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_description(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _is_count(value.get("bytes"))
        and isinstance(value.get("sha256"), str)
        and re.fullmatch("[0-9a-f]{64}", value["sha256"], re.ASCII) is not None
    )


def _is_scaler(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(type(v) is bool or _is_number(v) for v in value.values()))


def _is_history(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, dict) and _is_count(one.get("step")) and isinstance(one.get("flags"), dict) for one in value
    )


# name -> (what its value has to be, in words)
FIELDS = {
    "step": (_is_count, "a whole number, 0 or more"),
    "run": (lambda value: isinstance(value, dict), "an object"),
    "exactness": (lambda value: isinstance(value, dict), "an object"),
    "wall_time_seconds": (lambda value: _is_number(value) and value >= 0, "a number, 0 or more"),
    "optimizer_steps": (_is_count, "a whole number, 0 or more"),
    "scaler": (_is_scaler, "null or an object of numbers"),
    "versions": (lambda value: isinstance(value, dict), "an object"),
    "files": (lambda value: isinstance(value, dict) and len(value) > 0, "an object with the files"),
    "total_steps": (_is_count, "a whole number, 0 or more"),
    "changed": (_is_history, "a list of what was changed, with step and flags"),
}
OPTIONAL = ("total_steps", "changed")


def _check_format(manifest: dict[str, Any]) -> None:
    """Raises BrokenCheckpoint, or OtherFormat where another version can go on."""
    found, files, versions = manifest.get("format"), manifest.get("files"), manifest.get("versions")
    if type(found) is int and found == FORMAT:
        return
    version = versions.get("vit_hf") if isinstance(versions, dict) else None
    version = version if isinstance(version, str) and len(version) < 20 else None
    if "format" not in manifest and isinstance(files, dict):
        if "optimizer.pt" in files or any(str(name).startswith("deepspeed/") for name in files):
            raise OtherFormat(
                f"vit_hf {version or '0.2'} wrote it in an older format, and that version goes on from it; this one "
                "starts anew in another --output_dir"
            )
    if type(found) is int and found > FORMAT:
        raise OtherFormat(
            f"a newer vit_hf{f' ({version})' if version else ''} wrote it in format {found}; update vit_hf"
        )
    was = f"is {_short(found)}" if "format" in manifest else "is missing"
    raise BrokenCheckpoint(f"manifest.json: format {was}, it should be {FORMAT}")


def _check_list(files: dict[str, Any]) -> None:
    """Raises BrokenCheckpoint where the list of files does not make a checkpoint."""
    for name, description in files.items():
        path = PurePosixPath(name)
        inside = name and name.isprintable() and not path.is_absolute() and ".." not in path.parts
        if not inside or "\\" in name or str(path) != name:
            raise BrokenCheckpoint(f"manifest.json: {_short(name)} is no name of a file in the folder")
        if not _is_description(description):
            raise BrokenCheckpoint(f"manifest.json: {_short(name)} has {_short(description)} for its bytes and sha256")
    shards = [match for name in files if (match := SHARD.fullmatch(name))]
    expected = (
        {shard_name(rank, int(shards[0][2])) for rank in range(min(int(shards[0][2]), 99999))} if shards else set()
    )
    missing = sorted({"model.safetensors", *expected} - set(files)) or (
        [] if shards else ["training_state-...safetensors"]
    )
    if missing or len(shards) != len(expected):
        raise BrokenCheckpoint(f"manifest.json: files lists no {missing[0]}" if missing else
                               "manifest.json: files lists the training state of two checkpoints")  # fmt: skip


def _check_files(folder: Path, files: dict[str, Any]) -> None:
    """Raises BrokenCheckpoint where the disk holds something else than the list."""
    for name, expected_description in files.items():
        try:
            if not (folder / name).is_file():
                raise BrokenCheckpoint(f"{name} is missing")
            size = (folder / name).stat().st_size
            if size != expected_description["bytes"]:
                raise BrokenCheckpoint(f"{name} has {size} bytes instead of {expected_description['bytes']}")
            if describe(folder / name)["sha256"] != expected_description["sha256"]:
                raise BrokenCheckpoint(f"{name} was changed: its SHA-256 differs")
        except OSError as error:
            raise BrokenCheckpoint(f"{_short(name)} cannot be read ({error.strerror})") from None


def _short(value: Any) -> str:
    return reprlib.repr(value)  # of a nest or a text of any length
