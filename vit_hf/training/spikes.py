"""Spikes of the loss: a logged loss far above those before it. They are told, and nothing is done about them. Only logged
numbers are looked at, so a spike costs no wait for the device."""

import math
import statistics
from collections import deque

HISTORY = 50  # log lines that a new one is held against
LEAST_HISTORY = 20  # before so many there is no telling what is usual


class Spikes:
    """Holds each logged loss against the ones before it, in robust deviations: (loss - median) / (1.4826 x MAD), where MAD
    is the median distance from the median and 1.4826 makes it the standard deviation of a normal distribution.

    Args:
        threshold: so many deviations above the median are a spike; 0 never.

    Source: Leys et al. 2013, "Detecting outliers: do not use standard deviation around the mean, use absolute deviation
    around the median", doi 10.1016/j.jesp.2013.03.013.
    """

    def __init__(self, threshold: float):
        self._threshold = threshold
        self._losses: deque[float] = deque(maxlen=HISTORY)

    def look(self, loss: float) -> dict[str, float] | None:
        """What an event says of this loss, if it is a spike; then takes it into the history.

        Args:
            loss: mean of a window; one that is not finite is left out.
        """
        if not self._threshold or not math.isfinite(loss):
            return None
        spike = None
        if len(self._losses) >= LEAST_HISTORY:
            median = statistics.median(self._losses)
            spread = 1.4826 * statistics.median(abs(one - median) for one in self._losses)
            spread = max(spread, 1e-3 * abs(median), 1e-9)  # losses that stand still: not every flicker is a spike
            if loss - median > self._threshold * spread:
                spike = {"loss": loss, "median": median, "deviations": round((loss - median) / spread, 1)}
        self._losses.append(loss)
        return spike
