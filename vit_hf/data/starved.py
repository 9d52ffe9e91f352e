"""Says once where a run waits for its images. This module must not know the loop: it is handed what a window measured."""

from collections.abc import Callable

from vit_hf.data.device import DeviceBatches
from vit_hf.data.machine import usable_cores
from vit_hf.data.processes import Processes

WAITING = 0.2  # share of the time; below it other things decide how fast a run is


class StarvedNote:
    """A line, once, when workers decode more slowly than the model learns; then the run is as fast as they are.

    Args:
        num_workers: of each process; None where the set is decoded once.
        say: prints a line.
        record: called with an event's name and its fields; None on all but the main process.
    """

    def __init__(
        self,
        num_workers: int | None,
        num_processes: int,
        say: Callable[[str], None],
        record: Callable[..., None] | None,
    ):
        self.num_workers, self.num_processes, self.say, self.record = num_workers, num_processes, say, record
        self._first, self._said = True, num_workers is None

    @classmethod
    def of(cls, batches: DeviceBatches, processes: Processes, record: Callable[..., None]) -> "StarvedNote":
        """The note for a run's training batches; the main process records."""
        workers = None if batches.batches.decoded is not None else batches.loader.num_workers
        return cls(workers, processes.num_processes, processes.say, record if processes.rank == 0 else None)

    def numbers(self, speed: dict[str, float]) -> dict[str, float]:
        """Looks at what a window measured; has no number of its own for the log line."""
        self.look(speed["images_per_second"], speed["data_wait_fraction"])
        return {}

    def look(self, images_per_second: float, data_wait_fraction: float) -> None:
        """At what a window of training steps measured; the first one, in which workers start, tells nothing."""
        first, self._first = self._first, False
        if first or self._said or data_wait_fraction <= WAITING:
            return
        self._said = True
        each = f" in each of {self.num_processes} processes" if self.num_processes > 1 else ""
        workers = (
            f"{self.num_workers} workers{each} give" if self.num_workers else f"decoding without workers{each} gives"
        )
        cores = usable_cores()
        why = (
            f"{workers} about {images_per_second:,.0f} images/s, for which training waits {data_wait_fraction:.0%} of its "
            f"time; more workers may help (--dataloader_num_workers, {cores} cores here), and a copy of smaller images "
            "(vit-hf data prepare); vit-hf data bench measures the loader alone"
        )
        self.say(f"note: {why}")
        if self.record is not None:
            measured = {"images_per_second": images_per_second, "data_wait_fraction": data_wait_fraction}
            self.record("starved", **measured, num_workers=self.num_workers, cores=cores, why=why)
