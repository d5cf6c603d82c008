"""Computes the waiting time before the next attempt to connect."""

import random
from collections.abc import Callable

FIRST_S = 0.5
LONGEST_S = 10.0
#: A login that lasted this long was a success: after it, waiting starts again with the shortest time.
HELD_S = 5.0


class Backoff:
    """Waiting times whose upper bound doubles from `first_s` to `longest_s`, each drawn from 0 to that bound.

    With this full jitter, a relay that restarts does not receive all its peers' attempts at the same moment.
    """

    def __init__(
        self,
        first_s: float = FIRST_S,
        longest_s: float = LONGEST_S,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.first_s = first_s
        self.longest_s = longest_s
        self._draw = draw
        self._ceiling_s = first_s

    def next_s(self) -> float:
        """The wait before the next attempt; doubles the bound for the one after it."""
        delay_s = self._draw() * self._ceiling_s
        self._ceiling_s = min(self._ceiling_s * 2, self.longest_s)
        return delay_s

    def note_uptime(self, seconds: float) -> None:
        """Report how long the last login lasted; after `HELD_S` or more, the bound is reset."""
        if seconds >= HELD_S:
            self._ceiling_s = self.first_s
