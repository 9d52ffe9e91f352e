"""What a run uploads on its way, from its main process: each checkpoint when it is whole and its step is over.

A checkpoint is written by a thread and may be pruned while it is sent. So its files get second names in a folder of their
own, which takes no room on the disk, and keep them until the commit is made.
"""

import contextlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from vit_hf.errors import UserError
from vit_hf.hub.card import card_text
from vit_hf.hub.content import LAST, MANIFEST, MODEL, commit_message, goes_up, run_files, state_files
from vit_hf.hub.uploader import Commit, Files, Uploader
from vit_hf.training.manifest import step_of
from vit_hf.training.signals import SIGNALS
from vit_hf.training.tracking import append_event, warn

ASIDE = ".upload-"
STOP_SECONDS = 20.0  # who stops a run by a signal kills it 30 s later


def remove_leftovers(run: Path) -> None:
    """Removes the second names that an upload kept when its run was killed; on the main process, before the run goes on."""
    for left in run.glob(f"{ASIDE}[0-9]*"):
        shutil.rmtree(left, ignore_errors=True)


class Uploads:
    """Every method may be called on every process; without an uploader nothing happens.

    Args:
        with_state: the checkpoint goes to last-checkpoint/ too.
        stop_seconds: waited at most for what is under way when the run is stopped.
    """

    def __init__(self, uploader: Uploader | None, run: Path, with_state: bool, stop_seconds: float = STOP_SECONDS):
        self._uploader, self._run, self._with_state, self._stop_seconds = uploader, run, with_state, stop_seconds
        self._lock = threading.Lock()
        self._staged: dict[int, Path] = {}
        self._due: set[int] = set()

    def whole(self, checkpoint: Path) -> None:
        """A checkpoint has its final name; called by the thread that wrote it, before an older one is removed."""
        if self._uploader is None:
            return
        step, aside = step_of(checkpoint), self._run / f"{ASIDE}{step_of(checkpoint)}"
        try:
            _give_second_names(checkpoint, aside, all_files=self._with_state)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            warn(f"{checkpoint.name} is not uploaded: {error.strerror or error}; the next one is tried as usual")
            append_event(self._run, "upload_failed", step=step, why=str(error.strerror or error))
            return
        with self._lock:
            self._staged[step] = aside
        self._go()

    def due(self, step: int) -> None:
        """All that belongs to a step is done, its evaluation too; called by the loop, which does not wait."""
        if self._uploader is not None:
            with self._lock:
                self._due = {step}
            self._go()

    def leave(self) -> None:
        """The run is over, in whatever way. Where it was stopped, nothing is uploaded later: waits for what is under way, for
        `stop_seconds` at most and not after another signal, and says what is not sent."""
        error = sys.exc_info()[1]
        if self._uploader is None or error is None:
            return
        if isinstance(error, UserError):
            with _listening() as heard:
                self._uploader.wait(self._stop_seconds, heard)
        if unsent := self._uploader.unsent():
            why = f" ({self._uploader.why})" if self._uploader.why else ""
            warn(
                f"not uploaded: step {', '.join(map(str, sorted(unsent)))}{why}; the same command goes on and uploads, or: "
                f"vit-hf push {self._run}"
            )

    def _go(self) -> None:
        with self._lock:
            ready = sorted(self._due & self._staged.keys())
            asides = {step: self._staged.pop(step) for step in ready}
            self._due -= set(ready)
        for step, aside in asides.items():
            self._uploader.put(
                Commit(
                    step=step,
                    build=lambda step=step, aside=aside: self._build(step, aside),
                    mirrored=(LAST,) if self._with_state else (),
                    done=lambda aside=aside: shutil.rmtree(aside, ignore_errors=True),
                )
            )

    def _build(self, step: int, aside: Path) -> tuple[str, Files]:
        files: Files = {path.name: path for path in sorted(aside.iterdir()) if goes_up(path.name, MODEL)}
        files |= run_files(self._run, step)
        files["README.md"] = card_text(aside, self._uploader.name, self._run).encode()
        if self._with_state:
            files |= state_files(aside)
        return commit_message(self._run, step), files


class Teller:
    """Says and records what happens to uploads: one line for an outage, however long, and one when it is over."""

    def __init__(self, run: Path):
        self._run, self._told = run, ""

    def __call__(self, event: str, commit: Commit, **details: Any) -> None:
        if event == "upload_failed":
            if commit.last or details["why"] == self._told:  # the last one ends in an error of its own
                return
            self._told = details["why"]
            after = "the next checkpoint and the end of the run try it again" if details["seconds"] is None else (
                f"it is tried again in {details['seconds']:g} s, and less and less often"
            )  # fmt: skip
            warn(f"step {commit.step} was not uploaded: {self._told}; training goes on, and {after}")
        elif event == "uploaded":
            if self._told and not commit.last:
                tqdm.write(f"uploads work again: step {commit.step} is on {details['url']}")
            self._told = ""
        append_event(self._run, event, step=commit.step, **details)


def _give_second_names(checkpoint: Path, aside: Path, all_files: bool) -> None:
    """Raises OSError of the disk."""
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for path in checkpoint.iterdir():
        if path.is_file() and (all_files or goes_up(path.name, [*MODEL, MANIFEST])):
            try:
                os.link(path, aside / path.name)
            except OSError:  # a disk without second names
                shutil.copyfile(path, aside / path.name)


@contextlib.contextmanager
def _listening() -> Iterator[Callable[[], bool]]:
    """A context in which a signal does nothing but make the function true that it gives."""
    heard = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield heard.is_set
        return
    before = {number: signal.signal(number, lambda *_: heard.set()) for number in SIGNALS}
    try:
        yield heard.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
