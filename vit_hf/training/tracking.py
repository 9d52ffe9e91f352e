"""What a run tells: metrics.jsonl, events.jsonl, the progress bar, trackers, throughput and memory."""

import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
from tqdm.auto import tqdm


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a last line cut off by a kill is left out; [] where there is no file."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def append_event(output_dir: Path, event: str, **details: Any) -> None:
    """Adds one line to events.jsonl: what went wrong or was decided."""
    with open(output_dir / "events.jsonl", "a") as file:
        file.write(json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **details}) + "\n")


# Dense 16-bit matrix products, FLOP/s. Source: the makers' data sheets (without sparsity).
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "V100": 125e12}


def peak_flops(device_name: str, mixed_precision: str) -> float | None:
    """The peak of a device in 16 bits by its name; None where it is not known, or where the run does not use it."""
    if mixed_precision not in ("bf16", "fp16"):
        return None
    words = device_name.replace("-", " ").split()
    return next((peak for name, peak in PEAK_FLOPS.items() if name in words), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: on the accelerator where it uses one, else its resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Tracker:
    """Writes the lines of a run from its main process; the other processes keep quiet.

    Args:
        steps_done: where the run starts; later lines of metrics.jsonl are cut, so that a resume never doubles one.
    """

    def __init__(self, accelerator: accelerate.Accelerator, output_dir: Path, steps_done: int, total_steps: int):
        self._accelerator = accelerator
        self._path = output_dir / "metrics.jsonl"
        self._file = None
        if accelerator.is_main_process:
            kept = [line for line in read_jsonl(self._path) if line["step"] <= steps_done]
            temporary = self._path.with_suffix(".jsonl.tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            temporary.replace(self._path)
            self._file = open(self._path, "a")
        self._bar = tqdm(
            total=total_steps,
            initial=steps_done,
            unit="step",
            dynamic_ncols=True,
            disable=not accelerator.is_main_process,
        )
        self._window_start = time.perf_counter()
        self._paused = 0.0
        self._waited = 0.0

    def step(self) -> None:
        """Counts a step on the progress bar."""
        self._bar.update()

    def add_wait(self, seconds: float) -> None:
        """Time the step spent waiting for data."""
        self._waited += seconds

    def pause(self) -> "_Pause":
        """A context whose time is not training time (evaluation, saving)."""
        return _Pause(self)

    def window(self, images: int) -> dict[str, float]:
        """Closes the window since the last call: global images a second and the share of time spent waiting for data,
        over training time alone. The caller must have synchronised with the device."""
        now = time.perf_counter()
        seconds = max(now - self._window_start - self._paused, 1e-9)
        measured = {"images_per_second": images / seconds, "data_wait_fraction": min(self._waited / seconds, 1.0)}
        self._window_start, self._paused, self._waited = now, 0.0, 0.0
        return measured

    def write(self, line: dict[str, Any]) -> None:
        """One line to metrics.jsonl (flushed), to the trackers and to the progress bar."""
        if self._file is None:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._file.write(json.dumps(finite) + "\n")  # JSON knows no NaN
        self._file.flush()
        numbers = {key: value for key, value in line.items() if isinstance(value, (int, float)) and key != "step"}
        self._accelerator.log(numbers, step=line["step"])
        shown = {"loss": "loss", "images_per_second": "img/s", "eval_accuracy": "acc"}
        self._postfix = {
            **getattr(self, "_postfix", {}),
            **{short: f"{line[key]:.4g}" for key, short in shown.items() if key in line},
        }
        self._bar.set_postfix(self._postfix)

    def write_images(self, images: dict[str, np.ndarray], step: int) -> None:
        """Pictures uint8 (H, W, 3) by name, to the trackers that take any."""
        for tracker in self._accelerator.trackers:
            if hasattr(tracker, "log_images"):
                form = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: image[None] for name, image in images.items()}, step=step, **form)

    def close(self) -> None:
        """Ends the progress bar and the file."""
        self._bar.close()
        if self._file is not None:
            self._file.close()


class _Pause:
    def __init__(self, tracker: Tracker):
        self._tracker = tracker

    def __enter__(self):
        self._start = time.perf_counter()

    def __exit__(self, *_):
        self._tracker._paused += time.perf_counter() - self._start


def open_trackers(
    accelerator: accelerate.Accelerator, output_dir: Path, run_name: str, config: dict[str, Any], first_step: int = 0
) -> None:
    """Starts accelerate's trackers, each for itself: one that is down, now or later, is one warning and one event. A run
    that is resumed goes on in the same tracker run: what identifies it is kept in OUTPUT_DIR/trackers.json.

    Args:
        run_name: what a new run is called there.
        config: its hyper-parameters by name.
        first_step: where this start begins.
    """
    raise NotImplementedError
