"""What a run tells: metrics.jsonl, events.jsonl, its progress on stderr, throughput and memory."""

import contextlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
from tqdm.auto import tqdm

from vit_hf.progress import at_terminal, time_left


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a line cut off by a kill is left out; [] where there is no file."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def warn(text: str) -> None:
    """A line on stderr, above the progress bar."""
    tqdm.write(f"warning: {text}", file=sys.stderr)


def append_event(output_dir: Path, event: str, **details: Any) -> None:
    """Adds one line to events.jsonl: what went wrong or was decided. Where the disk takes none it goes to stderr: a run
    does not end for it."""
    line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **details})
    try:
        _append(output_dir / "events.jsonl", line + "\n")
    except OSError as error:
        warn(f"events.jsonl cannot be written ({error.strerror}): {line}")


def _append(path: Path, text: str) -> None:
    """Adds text to a file, all of it or, where a full disk takes a part, nothing. Raises OSError."""
    data = text.encode()
    with open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(size)
            raise


# Dense 16-bit matrix products, FLOP/s. Source: the makers' data sheets (without sparsity).
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "V100": 125e12}


def peak_flops(device_name: str, mixed_precision: str) -> float | None:
    """The peak of a device in 16 bits by its name; None where it is not known, or where the run does not use it."""
    if mixed_precision not in ("bf16", "fp16"):
        return None
    words = device_name.replace("-", " ").split()
    return next((peak for name, peak in PEAK_FLOPS.items() if name in words), None)


def mfu_scale(accelerator: accelerate.Accelerator, flops_per_image: float) -> float | None:
    """Model FLOPs utilisation for each image a second: an image's operations over the peak of all devices; None where
    no peak is known. Source: arXiv 2204.02311, appendix B."""
    if accelerator.device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(accelerator.device), accelerator.mixed_precision)
    return None if peak is None else flops_per_image / (peak * accelerator.num_processes)


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
        self.is_main = accelerator.is_main_process
        self._path = output_dir / "metrics.jsonl"
        self._unwritten = ""
        self._postfix: dict[str, str] = {}
        if self.is_main:
            kept = [line for line in read_jsonl(self._path) if line["step"] <= steps_done]
            temporary = self._path.with_suffix(".jsonl.tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            temporary.replace(self._path)
        self._steps = steps_done, total_steps
        self._tells_lines = self.is_main and not at_terminal()
        self._bar = tqdm(
            total=total_steps,
            initial=steps_done,
            unit="step",
            dynamic_ncols=True,
            disable=not self.is_main or self._tells_lines,
        )
        self._start = self._window_start = time.perf_counter()
        self._paused = 0.0
        self._waited = 0.0

    def step(self) -> None:
        """Counts a step on the progress bar."""
        self._bar.update()

    def add_wait(self, seconds: float) -> None:
        """Time the step spent waiting for data."""
        self._waited += seconds

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """A context whose time is not training time (evaluation, saving). Steps that are under way on the device when it
        begins are training, so it waits for them."""
        self._synchronise()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._synchronise()
            self._paused += time.perf_counter() - start

    def _synchronise(self) -> None:
        if self._accelerator.device.type != "cpu":
            torch.accelerator.synchronize(self._accelerator.device)

    def window(self, images: int) -> dict[str, float]:
        """Closes the window since the last call: global images a second and the share of time spent waiting for data,
        over training time alone. The caller must have synchronised with the device."""
        now = time.perf_counter()
        seconds = max(now - self._window_start - self._paused, 1e-9)
        measured = {"images_per_second": images / seconds, "data_wait_fraction": min(self._waited / seconds, 1.0)}
        self._window_start, self._paused, self._waited = now, 0.0, 0.0
        return measured

    def write(self, line: dict[str, Any]) -> None:
        """One line to metrics.jsonl, on disk at once, to the trackers and to the progress bar, or as a line to stderr
        where that is no terminal."""
        if not self.is_main:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._put(json.dumps(finite) + "\n")  # JSON knows no NaN
        numbers = {key: value for key, value in line.items() if isinstance(value, (int, float)) and key != "step"}
        self._accelerator.log(numbers, step=line["step"])
        shown = {"loss": "loss", "images_per_second": "img/s", "eval_accuracy": "acc", "eval_map": "mAP"}
        self._postfix |= {short: f"{line[key]:.4g}" for key, short in shown.items() if key in line}
        self._bar.set_postfix(self._postfix)
        if self._tells_lines and (told := self._words(line)):
            print(told, file=sys.stderr, flush=True)

    def _words(self, line: dict[str, Any]) -> str:
        """`step 50 of 1,200: loss 2.31, learning rate 0.001, 812 images/s, 3 min 7 s left`; "" for a line without any of
        what is told. The time left counts all since the start: evaluations and checkpoints too."""
        told = (
            ("loss", "loss {:.4g}"), ("learning_rate", "learning rate {:.3g}"), ("images_per_second", "{:,.0f} images/s"),
            ("eval_loss", "evaluation loss {:.4g}"), ("eval_accuracy", "evaluation accuracy {:.4f}"),
            ("eval_map", "mean average precision {:.4f}"),
        )  # fmt: skip
        words = [text.format(line[key]) for key, text in told if isinstance(line.get(key), (int, float))]
        (first, total), step = self._steps, line["step"]
        if words and "loss" in line and first < step < total:
            words.append(time_left((time.perf_counter() - self._start) / (step - first) * (total - step)))
        return f"step {step:,} of {total:,}: {', '.join(words)}" if words else ""

    def write_images(self, images: dict[str, np.ndarray], step: int) -> None:
        """Pictures uint8 (H, W, 3) by name, to the trackers that take any."""
        for tracker in self._accelerator.trackers:
            tracker.log_images(images, step)

    def close(self) -> None:
        """Ends the progress bar."""
        self._bar.close()
        if self._unwritten:
            self._put("")

    def _put(self, text: str) -> None:
        """Adds a line to the file. What a full disk does not take is kept for the next time."""
        first, self._unwritten = not self._unwritten, self._unwritten + text
        try:
            _append(self._path, self._unwritten)
            self._unwritten = ""
        except OSError as error:
            if first:
                warn(f"metrics.jsonl cannot be written ({error.strerror}); its lines are kept for the next time")
