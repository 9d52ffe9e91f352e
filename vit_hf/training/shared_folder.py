"""How processes write into one folder from their threads: what each has written, and whether all see it. No collective is
called from a thread, where it would meet those of the training. This module must not know what is written.
"""

import json
import time
from pathlib import Path
from typing import Any

import accelerate

from vit_hf.errors import UserError
from vit_hf.training import lost

POLL_SECONDS = 0.05
APPEARS_SECONDS = 10.0  # a network disk may take a while to show a file


class SaveFailed(Exception):
    """A checkpoint that was not finished, with the reason."""


class Answers:
    """What the threads of the other processes tell the main one's, through the process group's store."""

    def __init__(self, accelerator: accelerate.Accelerator):
        self._accelerator = accelerator
        self._store = lost.private_store("save") if accelerator.num_processes > 1 else None

    def tell(self, number: int, answer: dict[str, Any]) -> None:
        """The answer of this process to the save of this number. Raises RuntimeError where the store is gone."""
        self._store.set(self._key(number, self._accelerator.process_index), json.dumps(answer))

    def collect(self, number: int, timeout_seconds: float) -> list[dict[str, Any]]:
        """The answers of all other processes. Raises SaveFailed where one does not come in time, or its process is gone:
        whoever ends the run then waits for this thread, and a launcher does not wait for long."""
        deadline = time.monotonic() + timeout_seconds
        answers = []
        for rank in range(1, self._accelerator.num_processes):
            key = self._key(number, rank)
            while not self._store.check([key]):
                if lost.is_quiet(rank):
                    raise SaveFailed(lost.line_of_silent([rank], lost.QUIET_SECONDS))
                if time.monotonic() > deadline:
                    raise SaveFailed(
                        f"process {rank} has not written its part within {timeout_seconds:g} s (--ddp_timeout)"
                    )
                time.sleep(POLL_SECONDS)
            answers.append(json.loads(self._store.get(key)))
            self._store.delete_key(key)
        return answers

    @staticmethod
    def _key(number: int, rank: int) -> str:
        return f"{number}/{rank}"


def check_shared(accelerator: accelerate.Accelerator, output_dir: Path) -> None:
    """Raises UserError, on all processes alike, where one does not see what the main process puts into the folder."""
    if accelerator.num_processes == 1:
        return
    probe = output_dir / f".shared-{time.time_ns()}"
    (probe,) = accelerate.utils.broadcast_object_list([probe])
    if accelerator.is_main_process:
        probe.touch()
    accelerator.wait_for_everyone()
    blind = accelerate.utils.gather_object([not appears(probe)])
    if accelerator.is_main_process:
        probe.unlink()
    if any(blind):
        raise UserError(
            f"process {blind.index(True)} does not see what the main process writes into {output_dir}: --output_dir must be "
            "on a disk that all machines share"
        )


def appears(path: Path) -> bool:
    """Whether a file is there."""
    deadline = time.monotonic() + APPEARS_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True
