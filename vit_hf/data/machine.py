"""What this machine has for the data of a run: cores, shared memory, processes that end together. Imports nothing heavy: worker processes start
with it."""

import ctypes
import os
import signal
import sys

SHARED_MEMORY = "/dev/shm"
PREFETCHED = 2  # micro-batches that each worker has ready or under way
AT_HAND = 2  # micro-batches that the parent holds: the one of this step, and the one that comes in its place


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes_here(num_processes: int) -> int:
    """How many of a run's processes are on this machine: as the launcher says, or else all."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))


def shared_memory_free() -> int | None:
    """Bytes that are free in /dev/shm; None where the system has no such folder and keeps shared memory elsewhere."""
    try:
        state = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return state.f_bavail * state.f_frsize


def shared_memory_needed(batch_bytes: int, num_workers: int) -> int:
    """Bytes of shared memory that a loader's micro-batches take at most at once; 0 without workers."""
    return batch_bytes * (PREFETCHED * num_workers + AT_HAND) if num_workers else 0


def end_with_parent(parent: int | None = None) -> None:
    """Has the system end this worker process when its parent is killed, which tells nobody (on Linux).

    Args:
        parent: its process number, where it may be gone already.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if parent is not None and os.getppid() != parent:
            os._exit(1)
