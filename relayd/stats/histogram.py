"""Histograms of plain numbers, as Prometheus reads them: how many values came up to each bound. Pure."""

from bisect import bisect_left

import attrs

#: Seconds that somebody waits, from a queue that is empty to one that is given up.
WAIT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
#: Seconds run per second of audio: 1 is as fast as it plays.
REAL_TIME_FACTORS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 1.0, 1.5, 2.0, 5.0)
#: Seconds until something is on the disk: from an SSD that is idle to a disk that is dying.
DISK_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


@attrs.define(eq=False)
class Histogram:
    """Values, counted by size. To add one costs the same however many there were.

    Args:
        bounds: the upper ones, rising; what is over the last is counted as well.
    """

    bounds: tuple[float, ...]
    sum: float = 0.0
    #: One more than there are bounds: the last is of all that is over.
    counts: list[int] = attrs.field()

    @counts.default
    def _no_counts(self) -> list[int]:
        return [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        """Count a value; a bound takes what is exactly as large."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value
