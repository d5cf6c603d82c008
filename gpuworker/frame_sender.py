"""Sends the frames of a worker's attempts over the current link, in turn, without filling the link's queue."""

from collections import deque

import trio

from gpuworker.attempt import Attempt
from protocol.link.base import Link
from protocol.wire.codec import encode
from protocol.wire.messages import Report
from protocol.wire.structs import KIB

#: Most bytes queued in the link, plus one frame. Enough to keep a fast network busy, and little enough that
#: `register` or the first frame of a new request does not wait long behind a replay.
FEED_BYTES = 512 * KIB


class FrameSender:
    """Sends the frames of attempts over one link.

    Args:
        link: a link over which the worker is registered.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._waiting: deque[Attempt] = deque()
        self._queued: set[Attempt] = set()
        self._more = trio.Event()

    def add(self, attempt: Attempt) -> None:
        """Include an attempt that may have frames to send."""
        if attempt not in self._queued and attempt.has_frames:
            self._queued.add(attempt)
            self._waiting.append(attempt)
            self._more.set()

    async def run(self) -> None:
        """Send until cancelled.

        Raises:
            LinkError: the link was lost.
        """
        while True:
            if not self._waiting:
                self._more = trio.Event()
                await self._more.wait()
            await self._link.drained(FEED_BYTES)
            attempt = self._waiting.popleft()
            self._queued.discard(attempt)
            if attempt.has_frames:
                if attempt.report and attempt.at_last_frame:
                    report = Report(request_id=attempt.request_id, attempt=attempt.number, output=attempt.report)
                    self._link.send_nowait(encode(report))
                self._link.send_nowait(attempt.next_frame())
                self.add(attempt)
