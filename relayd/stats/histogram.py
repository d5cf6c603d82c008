"""Histograms with fixed bounds, as used by Prometheus. Pure."""

from bisect import bisect_left

import attrs

#: Bounds of waiting times in seconds, from an empty queue to one that users give up on.
WAIT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
#: Bounds of real-time factors: run time per second of audio; 1 is real time.
REAL_TIME_FACTORS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 1.0, 1.5, 2.0, 5.0)
#: Bounds of disk write times in seconds, from an idle SSD to a failing disk.
DISK_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


@attrs.define(eq=False)
class Histogram:
    """Values counted by size, with constant cost per value.

    Args:
        bounds: upper bounds of the buckets, ascending; larger values have an extra bucket.
    """

    bounds: tuple[float, ...]
    sum: float = 0.0
    #: Values per bucket, one more than bounds: the last bucket holds the values over all bounds.
    counts: list[int] = attrs.field()

    @counts.default
    def _no_counts(self) -> list[int]:
        return [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        """Count a value; bounds are inclusive."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value
