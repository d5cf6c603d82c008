"""Whether a peer's path carries its video: if not, it gets key frames only.

A browser reports what it takes its path to carry (REMB), but grows that no faster than what it is sent, and slowly:
its figure is often below the rate of a video that has just begun, on a path that carries it well. So a figure counts
if it is the first or has fallen, which it does when packets queue up on the way. What has stopped is tried again.
"""

from collections import deque

#: The rate is that of the last seconds.
WINDOW_S = 2.0
#: Key frames only for so long, unless the browser reports enough before.
PAUSE_S = 10.0
#: Share of the rate below which a report is taken as too little: it is measured, and swings.
ENOUGH = 0.8


class Bandwidth:
    """What one peer's video needs, and what the peer reports.

    Args:
        max_bits_s: never more than this.

    Attributes:
        remb_bits_s: the last report; None before the first.
    """

    def __init__(self, max_bits_s: float) -> None:
        self._max_bits_s = max_bits_s
        self.remb_bits_s: float | None = None
        self._sent: deque[tuple[float, int]] = deque()
        self._paused_at: float | None = None
        self._needed = 0.0

    def rate_bits_s(self, now: float) -> float:
        """The rate of the pictures of the last seconds, whether they were sent or left out."""
        while self._sent and self._sent[0][0] <= now - WINDOW_S:
            self._sent.popleft()
        return sum(size for _, size in self._sent) * 8 / WINDOW_S

    def on_pictures(self, now: float, size: int) -> None:
        """Pictures of `size` bytes were due."""
        if size:
            self._sent.append((now, size))

    def on_remb(self, now: float, bits_s: float) -> None:
        """The peer reports what it takes its path to carry."""
        before, self.remb_bits_s = self.remb_bits_s, bits_s
        if self._paused_at is not None:
            if bits_s >= self._needed:
                self._paused_at = None
        elif (before is None or bits_s < before) and bits_s < ENOUGH * (rate := self.rate_bits_s(now)):
            self._paused_at, self._needed = now, rate

    def keys_only(self, now: float) -> bool:
        """Whether only key frames are to be sent."""
        if self._paused_at is not None and now - self._paused_at >= PAUSE_S:
            self._paused_at = None
        return self._paused_at is not None or self.rate_bits_s(now) > self._max_bits_s
