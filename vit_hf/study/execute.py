"""Starts the runs of a study by `accelerate launch`, several side by side where that is asked for.

What is finished is read from the runs' own folders, so there is no state to lose: a study that was killed goes on where
each run's newest checkpoint is. The log of a run is locked by the processes that write it, so that a second study never
starts a run that goes on elsewhere.
"""

import collections
import dataclasses
import fcntl
import functools
import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import yaml

import vit_hf
from vit_hf.arguments import identity, saved_identity
from vit_hf.data.machine import usable_cores
from vit_hf.data.sets.load import check_available
from vit_hf.errors import ArgumentError, UserError
from vit_hf.study.plan import Cell

ROOT = Path(vit_hf.__file__).resolve().parents[1]  # where the two scripts are
POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Launcher:
    """Where runs take place.

    config_file: of accelerate. jobs: runs at a time. devices: numbers of the GPUs to use, dealt out evenly over the
    jobs; empty: whatever the config file says, with the CPU's cores dealt out.
    """

    config_file: Path
    jobs: int = 1
    devices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        settings, flag = self.settings, f"--config_file {self.config_file}"
        if len(self.devices) % self.jobs:
            raise ArgumentError(
                f"--devices: {len(self.devices)} devices do not divide evenly over --jobs {self.jobs}; take a divisor"
            )
        if self.devices and settings.get("use_cpu"):
            raise ArgumentError(
                f"--devices: {flag} runs on the CPU; take accelerate_configs/single_gpu.yaml or ddp.yaml"
            )
        if len(self.devices) > self.jobs and settings.get("distributed_type") == "NO":
            raise ArgumentError(
                f"--devices: {flag} takes one device a run; take accelerate_configs/ddp.yaml, or more --jobs"
            )
        if self.jobs > 1 and not self.devices and not settings.get("use_cpu"):
            raise ArgumentError(
                f"--jobs: {self.jobs} runs of {flag} would share a GPU; deal the GPUs out by --devices"
            )

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """The file's content. Raises ArgumentError where it cannot be read."""
        try:
            content = yaml.safe_load(self.config_file.read_text())
        except (OSError, yaml.YAMLError, UnicodeDecodeError):
            content = None
        if not isinstance(content, dict) or "distributed_type" not in content:
            raise ArgumentError(
                f"--config_file: {self.config_file} is no file of accelerate; accelerate_configs/ has some"
            )
        return content

    def command(self, cell: Cell, slot: int) -> tuple[list[str], dict[str, str]]:
        """The command line of a run in this slot, and what it needs in its environment."""
        words = ["--quiet", "--config_file", str(self.config_file)]
        environment = {}
        num_processes = int(self.settings.get("num_processes") or 1)
        if self.devices:
            share = len(self.devices) // self.jobs
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")  # numbers count what is visible to us
            names = [visible[int(number)] if visible != [""] else number for number in self.devices]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[slot * share : (slot + 1) * share])
            num_processes = share
            words += ["--num_processes", str(share)]
        cores = usable_cores()
        threads = max(1, cores // (self.jobs * num_processes))
        words += ["--num_cpu_threads_per_process", str(threads)]
        if num_processes > 1:
            words += ["--main_process_port", str(_free_port())]
        script = ROOT / cell.script
        if not script.is_file():
            raise UserError(
                f"{script} is not there: studies are run from a checkout of the project (pip install -e .)"
            )
        return [sys.executable, "-m", "accelerate.commands.launch", *words, str(script), *cell.words], environment


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def is_finished(cell: Cell) -> bool:
    """Whether the cell's folder holds this very run, finished, and begun with the training of `start_from` that is
    there now."""
    if not (cell.output_dir / "all_results.json").exists():
        return False
    try:
        before = yaml.safe_load((cell.output_dir / "run_config.yaml").read_text())
        then, now = saved_identity(before), identity(cell.args)
    except (OSError, yaml.YAMLError, AttributeError):
        return False
    if cell.start_from is not None:  # its path may be written otherwise; what it held is compared
        if not is_finished(cell.start_from) or not began_with(cell):
            return False
        then["model_name_or_path"] = now["model_name_or_path"]
    return then == now


def fingerprint(cell: Cell) -> str:
    """Of a finished training: no two have the same, since its results hold what it took."""
    return hashlib.sha256((cell.output_dir / "all_results.json").read_bytes()).hexdigest()


def began_with(cell: Cell) -> bool:
    """Whether the run began with the training of `start_from` that is there now."""
    return cell.origin.exists() and cell.origin.read_text() == fingerprint(cell.start_from)


def missing_data(cells: list[Cell]) -> dict[Cell, str]:
    """The cells whose set cannot be had here, each with the reason."""
    reasons: dict[tuple[str | None, str | None], str | None] = {}
    for cell in cells:
        source = (cell.args.dataset_name, cell.args.dataset_config_name)
        if source not in reasons:
            try:
                check_available(*source)
                reasons[source] = None
            except UserError as error:
                reasons[source] = str(error)
    found = {cell: reasons[cell.args.dataset_name, cell.args.dataset_config_name] for cell in cells}
    return {cell: reason for cell, reason in found.items() if reason is not None}


class Running:
    """A run that has been started."""

    def __init__(self, cell: Cell, slot: int, log: IO[bytes], launcher: Launcher):
        self.cell, self.slot = cell, slot
        self.log_start = log.tell()
        command, environment = launcher.command(cell, slot)
        self.start_time = time.monotonic()
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,  # every process of the run inherits the lock with it
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C comes to us alone, and a signal from us to all of them
        )

    def terminate(self) -> None:
        """Asks for a checkpoint and the end."""
        try:
            os.killpg(self.process.pid, signal.SIGTERM)
        except ProcessLookupError:
            pass


def run_cells(cells: list[Cell], launcher: Launcher, tell: Callable[[Cell, str, float], None]) -> dict[Cell, str]:
    """Runs cells, each after the one it starts from; one that fails does not stop the others.

    Args:
        cells: those that are not finished; what they start from is among them, or finished.
        tell: called with a cell, `finished` or why not, and the seconds that it took just now.

    Returns the cells that failed or could not be started, with the reason. On Ctrl-C or SIGTERM each run writes a
    checkpoint before this returns.
    """
    unfinished = set(cells)
    failed = missing_data(cells)
    for cell, reason in failed.items():
        tell(cell, reason, 0.0)
    elsewhere: set[Cell] = set()  # trained by what an earlier study started
    waiting = collections.deque(cell for cell in cells if cell not in failed)
    running: list[Running] = []
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        while waiting or running:
            for _ in range(len(waiting)):
                cell = waiting.popleft()
                if cell.start_from in failed:
                    failed[cell] = f"starts from {cell.start_from}, which is not trained"
                    tell(cell, failed[cell], 0.0)
                elif len(running) == launcher.jobs or cell.start_from in unfinished:
                    waiting.append(cell)
                elif reason := _begun_otherwise(cell):
                    failed[cell] = reason
                    tell(cell, reason, 0.0)
                elif (started := _start(cell, running, launcher)) is not None:
                    running.append(started)
                elif is_finished(cell):
                    unfinished.remove(cell)
                    tell(cell, "finished elsewhere", 0.0)
                else:
                    waiting.append(cell)
                    if cell not in elsewhere:
                        elsewhere.add(cell)
                        print(f"{cell} is being trained by an earlier start; waiting for it ({cell.log})", flush=True)
            time.sleep(POLL_SECONDS)
            for done in [run for run in running if run.process.poll() is not None]:
                running.remove(done)
                if is_finished(done.cell):
                    unfinished.remove(done.cell)
                    reason = "finished"
                else:
                    failed[done.cell] = reason = _last_words(done.cell.log, done.log_start)
                tell(done.cell, reason, time.monotonic() - done.start_time)
    finally:
        for run in running:
            run.terminate()
        for run in running:
            _wait_for_lock(run.cell.log)
        signal.signal(signal.SIGTERM, previous)
    return failed


def _stop(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def _begun_otherwise(cell: Cell) -> str | None:
    """Why a folder cannot be gone on with: what it started from was trained anew since."""
    if cell.start_from is None or not cell.output_dir.exists() or began_with(cell):
        return None
    return f"failed: {cell.output_dir} began with another training of {cell.start_from}; remove the folder"


def _start(cell: Cell, running: list[Running], launcher: Launcher) -> Running | None:
    """The started run; None while processes of an earlier study are still at it."""
    cell.log.parent.mkdir(parents=True, exist_ok=True)
    with open(cell.log, "ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        if is_finished(cell):
            return None
        if cell.start_from is not None:
            cell.origin.write_text(fingerprint(cell.start_from))
        free = set(range(launcher.jobs)) - {run.slot for run in running}
        return Running(cell, min(free), log, launcher)


def _wait_for_lock(log: Path) -> None:
    with open(log, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)


def _last_words(log: Path, start: int) -> str:
    """Why a run failed: the error line that it printed from `start` on, or else its last line."""
    with open(log, "rb") as file:
        file.seek(max(start, log.stat().st_size - 65536))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(\[rank \d+\] )?error: ", line)] or lines or ["it printed nothing"]
    return f"failed: {errors[-1].removeprefix('error: ')[:300]} ({log})"
