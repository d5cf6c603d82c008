"""From the worker's attempts to the link at hand: one frame of each in turn, never more queued than the link takes."""

from collections import deque

import trio

from gpuworker.attempt import Attempt
from protocol.link.base import Link
from protocol.wire.structs import KIB

#: Queued in the link at most (and one frame more). Enough to keep a fast network busy; little enough that a
#: `register` or the first frame of a new request does not wait long behind a replay.
FEED_BYTES = 512 * KIB


class FrameSender:
    """Sends the frames of attempts over one link.

    Args:
        link: registered.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._waiting: deque[Attempt] = deque()
        self._queued: set[Attempt] = set()
        self._more = trio.Event()

    def add(self, attempt: Attempt) -> None:
        """This attempt may have frames to send."""
        if attempt not in self._queued and attempt.has_frames:
            self._queued.add(attempt)
            self._waiting.append(attempt)
            self._more.set()

    async def run(self) -> None:
        """Send until cancelled.

        Raises:
            LinkError: the link is gone.
        """
        while True:
            if not self._waiting:
                self._more = trio.Event()
                await self._more.wait()
            await self._link.drained(FEED_BYTES)
            attempt = self._waiting.popleft()
            self._queued.discard(attempt)
            if attempt.has_frames:
                self._link.send_nowait(attempt.next_frame())
                self.add(attempt)
