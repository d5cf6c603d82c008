"""How long to wait before the next try to connect."""

import random
from collections.abc import Callable

FIRST_S = 0.5
LONGEST_S = 10.0
#: A link that lived this long was a good one: the next loss starts over with the shortest wait.
HELD_S = 5.0


class Backoff:
    """Waiting times that double from `first_s` to `longest_s`, each drawn anew from 0 to that (full jitter).

    With full jitter a relay that comes back is not met by all its peers in the same instant.
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
        """The wait before the next try; doubles the ceiling for the one after."""
        delay_s = self._draw() * self._ceiling_s
        self._ceiling_s = min(self._ceiling_s * 2, self.longest_s)
        return delay_s

    def note_uptime(self, seconds: float) -> None:
        """Tell how long the last login held; after `HELD_S` the waits begin anew."""
        if seconds >= HELD_S:
            self._ceiling_s = self.first_s
