"""How far a long work has come, on stderr: a bar at a terminal, and now and then a line where stderr goes to a file, in
which the states of a bar would pile up.

Must not know what the work is.
"""

import sys
import time
from typing import Any

from tqdm.auto import tqdm

LINE_SECONDS = 30.0  # between two lines


def at_terminal() -> bool:
    """Whether somebody can be looking at a bar."""
    return sys.stderr is not None and sys.stderr.isatty()


def progress(total: int, description: str, unit: str, *, disable: bool = False) -> Any:
    """A context with `update(n)`, `close()` and the count so far in `n`: tqdm's bar at a terminal; elsewhere lines, one
    in LINE_SECONDS at most, and one at the end of what took longer than that.

    Args:
        total: units of work. unit: what one is called, such as "image".
        disable: nothing is shown.
    """
    if disable or at_terminal():
        return tqdm(total=total, unit=unit, desc=description, disable=disable, dynamic_ncols=True)
    return _Lines(total, description, unit)


class _Lines:
    """`Decoding: 5,000 of 60,000 images, 812 images/s, 1 min 8 s left`"""

    def __init__(self, total: int, description: str, unit: str):
        self.n, self._total, self._description, self._unit = 0, total, description, unit
        self._start = self._last = time.perf_counter()
        self._told = 0

    def update(self, n: int = 1) -> None:
        self.n += n
        now = time.perf_counter()
        if now - self._last >= LINE_SECONDS:
            self._tell(now)

    def close(self) -> None:
        if self._told not in (0, self.n):
            self._tell(time.perf_counter())

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _tell(self, now: float) -> None:
        speed = self.n / max(now - self._start, 1e-9)
        ending = "" if self.n >= self._total or not speed else f", {time_left((self._total - self.n) / speed)}"
        line = (
            f"{self._description}: {self.n:,} of {self._total:,} {self._unit}s, {speed:,.0f} {self._unit}s/s{ending}"
        )
        print(line, file=sys.stderr, flush=True)
        self._last, self._told = now, self.n


def time_left(seconds: float) -> str:
    """`47 s left`, `12 min 5 s left`, `3 h 24 min left`."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s left"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s left"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min left"
