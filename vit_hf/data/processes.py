"""What the data of a run has to know of its processes. This module must not know how they meet: it is handed functions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

First = Callable[[Callable[[], Any], str], Any]  # (work, what it does) -> what the work gives, on every process


def by_itself(work: Callable[[], Any], doing: str) -> Any:
    """What a function gives, where no other process waits for it."""
    return work()


@dataclass(frozen=True)
class Processes:
    """This process among those of a run; by default it is alone.

    Args:
        device: where its batches go.
        rank: its number.
        say: prints a line, on the main process alone.
        main_first: the main process works and the others get what it found, e.g. the rows of a set.
        machine_first: one process of each machine works first, and its others find the files that it has made.
    """

    device: torch.device
    num_processes: int = 1
    rank: int = 0
    say: Callable[[str], None] = print
    main_first: First = by_itself
    machine_first: First = by_itself
