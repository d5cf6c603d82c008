"""Keeps a flood of the same event from filling the log: a few lines a second, and how many were left out."""

import time
from collections.abc import Callable

import attrs


@attrs.define(eq=False)
class LogFlood:
    """Lets `per_s` lines a second through.

    Args:
        per_s: lines a second.
        clock: monotonic seconds.
    """

    per_s: int = 10
    clock: Callable[[], float] = time.monotonic
    _second: float = float("-inf")
    _count: int = 0
    _left_out: int = 0

    def fields(self) -> dict[str, int] | None:
        """None where this line is to be left out; else further fields of it: `left_out` where lines before it were."""
        now = self.clock()
        if now - self._second >= 1.0:
            self._second, self._count = now, 0
        self._count += 1
        if self._count > self.per_s:
            self._left_out += 1
            return None
        left_out, self._left_out = self._left_out, 0
        return {"left_out": left_out} if left_out else {}
