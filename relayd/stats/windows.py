"""Counts and samples over the last minutes: for rates, percentiles and shares of failures."""

import math
from collections import deque

import attrs

SAMPLE_S = 1.0
#: What "a minute" and "lately" mean in rows.
MINUTE = 60
WINDOW_S = 300.0
#: Samples kept of one kind: a percentile of a thousand is as good as one of all.
MAX_SAMPLES = 1_000
#: Over which bytes a second are told: long enough for frames of a second each.
RATE_SAMPLES = 6


@attrs.define(eq=False)
class MinuteWindow:
    """What was counted in each of the last sixty seconds, the running one last."""

    total: float = 0.0
    _buckets: deque[float] = attrs.field(factory=lambda: deque([0.0] * MINUTE, maxlen=MINUTE))
    _second: int = 0

    def add(self, now: float, amount: float = 1.0) -> None:
        """Count `amount`."""
        self._roll(now)
        self._buckets[-1] += amount
        self.total += amount

    def sum(self, now: float) -> float:
        """Of the last minute."""
        self._roll(now)
        return math.fsum(self._buckets)

    def by_second(self, now: float) -> list[float]:
        """Sixty numbers, the oldest first."""
        self._roll(now)
        return list(self._buckets)

    def _roll(self, now: float) -> None:
        second = int(now)
        if second > self._second:
            self._buckets.extend([0.0] * min(second - self._second, MINUTE))
            self._second = second


@attrs.define(eq=False)
class SampleWindow:
    """Samples of the last five minutes, the latest thousand at most, and what they come to."""

    _samples: deque[tuple[float, float]] = attrs.field(factory=lambda: deque(maxlen=MAX_SAMPLES))
    _sorted: list[float] | None = None

    def add(self, now: float, value: float) -> None:
        """Take a sample."""
        self._samples.append((now, value))
        self._sorted = None

    def percentile(self, now: float, part: float) -> float | None:
        """The sample that `part` of all do not exceed (nearest rank); None where there is none."""
        while self._samples and self._samples[0][0] < now - WINDOW_S:
            self._samples.popleft()
            self._sorted = None
        if self._sorted is None:
            self._sorted = sorted(value for _when, value in self._samples)
        values = self._sorted
        return round(values[max(0, math.ceil(part * len(values)) - 1)], 3) if values else None


@attrs.frozen
class End:
    """How a request ended: when, whether it failed, and how long it ran for how much audio."""

    when: float
    failed: bool
    run_s: float = 0.0
    audio_s: float = 0.0


@attrs.define(eq=False)
class OutcomeWindow:
    """The ends of the last five minutes, the latest thousand at most."""

    _ends: deque[End] = attrs.field(factory=lambda: deque(maxlen=MAX_SAMPLES))
    _cached: tuple[float | None, float | None] | None = None

    def add(self, end: End) -> None:
        """Take one more."""
        self._ends.append(end)
        self._cached = None

    def rtf(self, now: float) -> float | None:
        """Real-time factor: seconds run per second of audio, of what was completed; None where there was no audio."""
        return self._compute(now)[0]

    def error_percent(self, now: float) -> float | None:
        """Of what was completed or failed, how much failed; None where nothing was."""
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
    """How fast a counter rises, from what it was at each of the last samples."""

    per_s: int = 0
    #: Where the counter stood at the sample before the first.
    _begin: int = 0
    _seen: deque[tuple[float, int]] = attrs.field(factory=lambda: deque(maxlen=RATE_SAMPLES))

    def sample(self, now: float, count: int) -> None:
        """The counter stands at `count` now."""
        seen = self._seen
        if not seen:  # it has begun since the last sample
            seen.append((now - SAMPLE_S, self._begin))
        seen.append((now, count))
        when, before = seen[0]
        self.per_s = round((count - before) / (now - when)) if now > when else 0
