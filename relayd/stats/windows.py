"""Sliding windows of counts and samples over the last minutes, for rates, percentiles and error rates."""

import math
from collections import deque

import attrs

SAMPLE_S = 1.0
#: Seconds in `MinuteWindow`.
MINUTE = 60
#: Length of the other windows.
WINDOW_S = 300.0
#: Samples kept per window: percentiles of a thousand samples are good enough.
MAX_SAMPLES = 1_000
#: Samples that a rate is averaged over: enough for streams with one frame per second.
RATE_SAMPLES = 6


@attrs.define(eq=False)
class MinuteWindow:
    """Counts for each of the last sixty seconds, the current one last."""

    total: float = 0.0
    _buckets: deque[float] = attrs.field(factory=lambda: deque([0.0] * MINUTE, maxlen=MINUTE))
    _second: int = 0

    def add(self, now: float, amount: float = 1.0) -> None:
        """Add `amount` to the current second."""
        self._roll(now)
        self._buckets[-1] += amount
        self.total += amount

    def sum(self, now: float) -> float:
        """Return the sum over the last minute."""
        self._roll(now)
        return math.fsum(self._buckets)

    def by_second(self, now: float) -> list[float]:
        """Return the sixty counts, oldest first."""
        self._roll(now)
        return list(self._buckets)

    def _roll(self, now: float) -> None:
        second = int(now)
        if second > self._second:
            self._buckets.extend([0.0] * min(second - self._second, MINUTE))
            self._second = second


@attrs.define(eq=False)
class SampleWindow:
    """Samples of the last five minutes, at most the latest thousand."""

    _samples: deque[tuple[float, float]] = attrs.field(factory=lambda: deque(maxlen=MAX_SAMPLES))
    _sorted: list[float] | None = None

    def add(self, now: float, value: float) -> None:
        """Add a sample."""
        self._samples.append((now, value))
        self._sorted = None

    def percentile(self, now: float, part: float) -> float | None:
        """Return the percentile for the fraction `part` (nearest rank); None if there are no samples."""
        while self._samples and self._samples[0][0] < now - WINDOW_S:
            self._samples.popleft()
            self._sorted = None
        if self._sorted is None:
            self._sorted = sorted(value for _when, value in self._samples)
        values = self._sorted
        return round(values[max(0, math.ceil(part * len(values)) - 1)], 3) if values else None


@attrs.frozen
class End:
    """The end of a request: time, outcome, run time and duration of its audio."""

    when: float
    failed: bool
    run_s: float = 0.0
    audio_s: float = 0.0


@attrs.define(eq=False)
class OutcomeWindow:
    """The ends of requests in the last five minutes, at most the latest thousand."""

    _ends: deque[End] = attrs.field(factory=lambda: deque(maxlen=MAX_SAMPLES))
    _cached: tuple[float | None, float | None] | None = None

    def add(self, end: End) -> None:
        """Add an end."""
        self._ends.append(end)
        self._cached = None

    def rtf(self, now: float) -> float | None:
        """Return the real-time factor of completed requests: run time per second of audio; None without audio."""
        return self._compute(now)[0]

    def error_percent(self, now: float) -> float | None:
        """Return the percentage of failed requests; None if none has ended."""
        return self._compute(now)[1]

    def _compute(self, now: float) -> tuple[float | None, float | None]:
        while self._ends and self._ends[0].when < now - WINDOW_S:
            self._ends.popleft()
            self._cached = None
        if self._cached is None:
            audio_s = math.fsum(end.audio_s for end in self._ends)
            run_s = math.fsum(end.run_s for end in self._ends if end.audio_s)
            failed = sum(end.failed for end in self._ends)
            self._cached = (
                round(run_s / audio_s, 3) if audio_s else None,
                round(100 * failed / len(self._ends), 1) if self._ends else None,
            )
        return self._cached


@attrs.define(eq=False)
class Rate:
    """The rate of a counter, computed from its last samples."""

    per_s: int = 0
    #: Value of the counter at the time of the sample before the first.
    _begin: int = 0
    _seen: deque[tuple[float, int]] = attrs.field(factory=lambda: deque(maxlen=RATE_SAMPLES))

    def sample(self, now: float, count: int) -> None:
        """Record the value of the counter, `count`, and update the rate."""
        seen = self._seen
        if not seen:  # it started since the last sample
            seen.append((now - SAMPLE_S, self._begin))
        seen.append((now, count))
        then, count_then = seen[0]
        self.per_s = round((count - count_then) / (now - then)) if now > then else 0
