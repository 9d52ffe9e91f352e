"""Patience with storage and networks that stumble."""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

import pyarrow as pa

from vit_hf.errors import UserError

T = TypeVar("T")
WAITS_SECONDS = (0.5, 2.0, 8.0)  # before the second, third and last try
# what stays as it is, however often it is tried
LASTING = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)


def patiently(read: Callable[[], T], name: str, retried: list[str]) -> T:
    """Calls `read`; where the storage or the network fails, again after a while.

    Args:
        name: what is read, for the message.
        retried: gets a line for each failure that is not the last.

    Raises:
        UserError: it failed to the end.
    """
    for wait in (*WAITS_SECONDS, None):
        try:
            return read()
        except Exception as error:
            if not _may_pass(error):
                raise
            reason = f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if wait is None or getattr(error, "errno", None) in LASTING or isinstance(error, FileNotFoundError):
                raise UserError(f"cannot be read: {reason}") from None
            retried.append(reason)
            time.sleep(wait)
    raise AssertionError


def _may_pass(error: Exception) -> bool:
    """Whether an error comes from storage or network; fsspec, pyarrow, httpx and the system each have their own."""
    foreign = type(error).__module__.split(".")[0] in ("httpx", "httpcore", "aiohttp", "requests", "huggingface_hub")
    return foreign or isinstance(error, OSError | TimeoutError | pa.ArrowException)
