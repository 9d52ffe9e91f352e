"""How fast models answer, and with how much memory: each in several variants, measured in turns on one device. This module
must not know where models come from.
"""

import copy
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

ROUNDS = 5  # turns of each variant
SLICES = 20  # of a variant's seconds: half of them find the batch size, half are the rounds
LARGEST_BATCH = 1024


@dataclass(frozen=True)
class Variant:
    """How a model is run: precision of weights and activations, as it is written or compiled."""

    name: str
    dtype: torch.dtype
    compiled: bool = False


def variants_of(device: torch.device) -> list[Variant]:
    """Those that make sense on a device."""
    both = [
        Variant("fp32", torch.float32),
        Variant("fp32 compiled", torch.float32, True),
        Variant("bf16", torch.bfloat16),
    ]
    if device.type != "cuda":
        return both
    return [*both, Variant("bf16 compiled", torch.bfloat16, True), Variant("fp16", torch.float16)]


@dataclass
class Subject:
    """A model in one variant, and what was measured of it.

    Args:
        model: fp32, on the host; the subject runs a copy.
        image_shape: (C, H, W).
        failed: why it cannot be run, in one line.
        by_batch_size: images a second when the batch size was looked for.
        ended: why no larger batch was tried: it fell, memory, time, the last size, or it followed another subject.
        latencies, rates: of each round: seconds of each run at batch 1; images a second at the best batch size.
    """

    name: str
    model: nn.Module
    variant: Variant
    image_shape: tuple[int, int, int]
    device: torch.device
    failed: str | None = None
    run: Callable[[torch.Tensor], Any] | None = None
    warm_up_seconds: float = 0.0
    weight_bytes: int = 0
    by_batch_size: dict[int, float] = field(default_factory=dict)
    ended: str | None = None
    latencies: list[list[float]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    peak_bytes: dict[int, int] = field(default_factory=dict)

    @property
    def best_batch_size(self) -> int:
        return max(self.by_batch_size, key=self.by_batch_size.__getitem__)

    def prepare(self) -> None:
        """A copy on the device, in its precision, compiled where that is the variant, and run until it is warm."""
        start = time.perf_counter()
        model = copy.deepcopy(self.model).to(self.device, self.variant.dtype).eval()
        self.weight_bytes = sum(t.nbytes for t in itertools.chain(model.parameters(), model.buffers()))
        self.run = torch.compile(model, dynamic=False) if self.variant.compiled else model
        self.times(1, 0.0, at_least=2)
        self.warm_up_seconds = time.perf_counter() - start

    def images(self, batch_size: int) -> torch.Tensor:
        """Noise, the same for all; a processor does zeros with less power, and so faster."""
        noise = torch.randn(batch_size, *self.image_shape, generator=torch.Generator().manual_seed(0))
        return noise.to(self.device, self.variant.dtype)

    @torch.no_grad()
    def times(self, batch_size: int, seconds: float, at_least: int = 2) -> list[float]:
        """Seconds of each run of a batch, for about so many seconds after one run that is not counted."""
        images, found = self.images(batch_size), []
        clock = _event_clock if self.device.type == "cuda" else _host_clock
        clock(self.run, images)
        end = time.perf_counter() + seconds
        while len(found) < at_least or time.perf_counter() < end:
            found.append(clock(self.run, images))
        return found

    @torch.no_grad()
    def measure_memory(self, batch_size: int) -> None:
        """Weights, and the most that a forward pass holds beside them: peak_bytes."""
        images = self.images(batch_size)
        beside = _peak_of_device(self.run, images) if self.device.type == "cuda" else _peak_of_host(self.run, images)
        self.peak_bytes[batch_size] = self.weight_bytes + images.nbytes + beside


def _host_clock(run: Callable, images: torch.Tensor) -> float:
    start = time.perf_counter()
    run(images)
    return time.perf_counter() - start


def _event_clock(run: Callable, images: torch.Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run(images)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _peak_of_device(run: Callable, images: torch.Tensor) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(images)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_of_host(run: Callable, images: torch.Tensor) -> int:
    """By what torch's allocator tells the profiler; what libraries take for themselves is not seen."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or else the profiler prints that it begins and ends
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        output = run(images)
    del output
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    told = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda event: event["ts"])
    return max([0, *itertools.accumulate(event["args"]["Bytes"] for event in told)])


def measure_in_turns(
    subjects: Sequence[Subject],
    seconds: float,
    batch_sizes: Sequence[int] | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Measures latency at batch 1, and throughput at the batch size that gives most; in each turn all subjects, in another
    order, so that none has the quiet minutes alone. A subject that fails says why and is left out.

    Args:
        seconds: for each subject, beside its warm-up.
        batch_sizes: tried for throughput, ascending; None doubles from 1 until it falls twice, or memory or time ends it.

    Source: throughput and largest batch of arXiv 2010.11929, appendix D.5.
    """
    share = seconds / SLICES
    for subject in subjects:
        say(f"warming up: {subject.name}, {subject.variant.name}")
        _attempt(subject, subject.prepare)
    sizes = batch_sizes or [2**power for power in range(LARGEST_BATCH.bit_length())]
    for turn, batch_size in enumerate(sizes):
        for subject in _ordered(subjects, turn):
            if subject.ended is None and (batch_sizes or not subject.variant.compiled):
                _climb(subject, batch_size, share, fixed=batch_sizes is not None)
    for subject in _ordered(subjects, 0):
        if not subject.by_batch_size:
            _follow(subject, subjects, share)
    for turn in range(ROUNDS):
        say(f"round {turn + 1} of {ROUNDS}")
        for subject in _ordered(subjects, turn):
            _attempt(subject, lambda subject=subject: _round(subject, share))
    for subject in _ordered(subjects, 0):
        for batch_size in sorted({1, subject.best_batch_size}):
            _attempt(subject, lambda subject=subject, size=batch_size: subject.measure_memory(size))
        subject.ended = subject.ended or "last"


def _ordered(subjects: Sequence[Subject], turn: int) -> list[Subject]:
    """Those that run; each turn begins with another one."""
    live = [subject for subject in subjects if subject.failed is None]
    first = turn % max(1, len(live))
    return live[first:] + live[:first]


def _follow(subject: Subject, subjects: Sequence[Subject], share: float) -> None:
    """A compiled subject takes the batch size that is best for the same model as it is written: code is compiled for each
    size, and to try them all would take longer than all else."""
    same = (subject.name, subject.variant.dtype, False)
    found = [
        other.best_batch_size
        for other in subjects
        if (other.name, other.variant.dtype, other.variant.compiled) == same and other.failed is None
    ]
    start = time.perf_counter()
    for batch_size in sorted({1, *found}):
        if subject.failed is None and subject.ended is None:
            _climb(subject, batch_size, share, fixed=True)
    subject.warm_up_seconds += time.perf_counter() - start
    subject.ended = subject.ended or "followed"


def _climb(subject: Subject, batch_size: int, share: float, fixed: bool) -> None:
    """Tries a batch size, and ends the search where a larger one is no use."""

    def attempt() -> None:
        times = subject.times(batch_size, share)
        subject.by_batch_size[batch_size] = batch_size / float(np.median(times))
        if not fixed and subject.best_batch_size < batch_size / 2:  # twice in a row; once may be noise
            subject.ended = "fell"
        elif not fixed and float(np.median(times)) > share:
            subject.ended = "time"

    try:
        attempt()
    except Exception as error:
        if subject.by_batch_size and is_memory(error):
            subject.ended = "memory"
            if subject.device.type == "cuda":
                torch.cuda.empty_cache()
        else:
            subject.failed = line_of(error)


def _round(subject: Subject, share: float) -> None:
    subject.latencies.append(subject.times(1, share))
    size = subject.best_batch_size
    subject.rates.append(size / float(np.median(subject.times(size, share))))


def _attempt(subject: Subject, work: Callable[[], None]) -> None:
    try:
        work()
    except Exception as error:  # of a compiler, a kernel, a device: the other subjects go on
        subject.failed = line_of(error)


def is_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text


def line_of(error: Exception) -> str:
    """An error as one line of at most 160 letters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


def summary(subject: Subject) -> dict[str, Any]:
    """What was measured of a subject, as plain values: {"variant", "failed"} and, where it ran, milliseconds, images a
    second and bytes."""
    if subject.failed is not None:
        return {"variant": subject.variant.name, "failed": subject.failed}
    milliseconds = 1000 * np.concatenate(subject.latencies)
    return {
        "variant": subject.variant.name,
        "failed": None,
        "latency_p50_ms": float(np.percentile(milliseconds, 50)),
        "latency_p95_ms": float(np.percentile(milliseconds, 95)),
        "latency_runs": len(milliseconds),
        "images_per_second": float(np.median(subject.rates)),
        "best_batch_size": subject.best_batch_size,
        "search_ended": subject.ended,
        "peak_memory_bytes": {str(size): peak for size, peak in subject.peak_bytes.items()},
        "warm_up_seconds": round(subject.warm_up_seconds, 2),
        "rounds": {
            "latency_p50_ms": [1000 * float(np.median(times)) for times in subject.latencies],
            "images_per_second": subject.rates,
        },
        "images_per_second_by_batch_size": {str(size): rate for size, rate in subject.by_batch_size.items()},
    }
