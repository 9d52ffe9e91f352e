"""What goes wrong with the data of a run: counted, named once, and reported for all processes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import accelerate


@dataclass
class Faults:
    """What went wrong with the rows of a split, as far as this process has seen it."""

    bad: dict[int, str] = field(default_factory=dict)  # rows that did not decode: the reason
    retried: list[str] = field(default_factory=list)  # reads that had to be tried again


class DataReport:
    """What went wrong with the data of a run, of all processes: counted in metrics, named once in events.jsonl.

    Args:
        events: what events.jsonl holds already.
        record: called with an event's name and its fields to add one; None adds none.
    """

    def __init__(
        self,
        accelerator: accelerate.Accelerator,
        on_bad_image: str,
        events: Iterable[dict[str, Any]] = (),
        record: Callable[..., None] | None = None,
    ):
        self.accelerator, self.on_bad_image, self.record = accelerator, on_bad_image, record
        self.train, self.eval = Faults(), Faults()
        self._known = {(e["split"], e["row"]) for e in events if e["event"] == "bad_image"}

    def numbers(self, speed: dict[str, float]) -> dict[str, int]:
        """What `collect` gives, for the log line."""
        return self.collect()

    def collect(self) -> dict[str, int]:
        """{"bad_images": distinct rows of both splits that were left out so far}; {} where none may be."""
        retried, self.train.retried, self.eval.retried = self.train.retried + self.eval.retried, [], []
        for reason in retried if self.record is not None else ():
            self.record("retry", why=reason, rank=self.accelerator.process_index)
        if self.on_bad_image == "raise":
            return {}
        mine = [
            (split, row, why)
            for split, faults in (("train", self.train), ("eval", self.eval))
            for row, why in faults.bad.items()
        ]
        for split, row, why in sorted(accelerate.utils.gather_object(mine)):
            if (split, row) not in self._known:
                self._known.add((split, row))
                if self.record is not None and self.accelerator.is_main_process:
                    self.record("bad_image", split=split, row=row, why=why)
        return {"bad_images": len(self._known)}
