"""Accelerate's trackers (tensorboard, wandb, trackio) for a run that outlives them: one that is down never ends it, and a
run that is resumed goes on in the same tracker run."""

import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
from accelerate.tracking import GeneralTracker

from vit_hf.training.tracking import append_event, warn

PROJECT = "vit_hf"
FILE = "trackers.json"  # which run of each tracker is this folder's; no key or token


def open_trackers(
    accelerator: accelerate.Accelerator, output_dir: Path, run_name: str, config: dict[str, Any], first_step: int = 0
) -> None:
    """Starts the trackers of `accelerator.log_with`, each by itself. One that is down, now or later, is one warning and one
    event, and is left alone from then on. Which run of each tracker is this folder's is kept in OUTPUT_DIR/trackers.json.

    Args:
        output_dir: there already.
        run_name: what a new run is called there.
        config: hyper-parameters by name; None is left out, and what is no number becomes text.
        first_step: of this start.
    """
    if not accelerator.is_main_process or not accelerator.log_with:
        return
    values = {name: _plain(value) for name, value in config.items() if value is not None}
    known, wanted, started = _read(output_dir / FILE), list(accelerator.log_with), []
    for chosen in wanted:
        name = chosen.name if isinstance(chosen, GeneralTracker) else str(chosen)
        project, options, own = _run_of(name, run_name, known.get(name, {}), first_step)
        accelerator.log_with, accelerator.trackers = [chosen], []  # accelerate starts all or none
        tracker = SafeTracker(name, output_dir)
        if tracker.attempt("its start", accelerator.init_trackers, project, values, {name: options}):
            tracker.inner = accelerator.trackers[0]
            if name == "trackio":
                own = {"name": tracker.inner.tracker.name}  # another one where the name was taken
            known[name] = own
            started.append(tracker)
    accelerator.log_with, accelerator.trackers = wanted, started
    temporary = output_dir / f"{FILE}.tmp"
    try:
        temporary.write_text(json.dumps({name: own for name, own in known.items() if own}, indent=1) + "\n")
        temporary.replace(output_dir / FILE)
    except OSError as error:
        warn(f"{FILE} cannot be written ({error.strerror}); a resumed run begins another tracker run")


class SafeTracker:
    """A tracker of accelerate that may fail: then it is a warning and an event, and is not called again.

    Args:
        output_dir: where events.jsonl is.
    """

    def __init__(self, name: str, output_dir: Path):
        self.name, self.inner = name, None
        self._output_dir, self._down = output_dir, False

    def attempt(self, when: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> bool:
        """Calls with these arguments, unless the tracker has failed before, and says whether that went well."""
        if self._down:
            return False
        try:
            call(*arguments, **options)
        except Exception as error:  # whatever a tracker, its server or its disk comes up with
            self._down = True
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
            warn(f"the tracker {self.name} is down at {when} ({why}); the run goes on, metrics.jsonl has the numbers")
            append_event(self._output_dir, "tracker_down", tracker=self.name, when=when, why=why)
        return not self._down

    def log(self, values: dict[str, float], step: int | None = None, **options: Any) -> None:
        """Numbers by name."""
        self.attempt(f"step {step}", self.inner.log, values, step=step, **options)

    def log_images(self, images: dict[str, np.ndarray], step: int) -> None:
        """Pictures uint8 (H, W, 3) by name, where the tracker takes any."""
        if hasattr(self.inner, "log_images"):
            options = {"dataformats": "NHWC"} if self.name == "tensorboard" else {}
            batches = {name: image[None] for name, image in images.items()}
            self.attempt(f"step {step}", self.inner.log_images, batches, step=step, **options)

    def finish(self) -> None:
        """Closes it; accelerator.end_training() calls this."""
        self.attempt("its end", self.inner.finish)

    @property
    def tracker(self) -> Any:
        """What the package itself calls a run; accelerator.get_tracker() asks for it."""
        return self.inner.tracker


def _run_of(
    name: str, run_name: str, known: dict[str, str], first_step: int
) -> tuple[str, dict[str, Any], dict[str, str]]:
    """The project and the options that start a tracker in the folder's own run, and what is to be kept of them."""
    if name == "wandb":
        own = {"id": known.get("id") or secrets.token_hex(4)}
        return PROJECT, {"id": own["id"], "resume": "allow", "name": run_name}, own
    if name == "trackio":  # a run is known by its name there
        own = {"name": known.get("name", run_name)}
        return PROJECT, {"name": own["name"], "resume": "allow" if known else "never"}, own
    if name == "tensorboard":  # a run is a folder; what a stopped start wrote after its checkpoint is hidden
        own = {"folder": known.get("folder") or f"runs/{run_name.replace('/', '-')}"}
        return own["folder"], {"purge_step": first_step + 1} if first_step else {}, own
    return PROJECT, {}, {}


def _read(path: Path) -> dict[str, dict[str, str]]:
    """What an earlier start has kept; nothing where that cannot be read."""
    try:
        known = json.loads(path.read_text())
        return {name: dict(own) for name, own in known.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _plain(value: Any) -> bool | int | float | str:
    return value if isinstance(value, (bool, int, float, str)) else str(value)
