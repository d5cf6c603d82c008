"""Feeds live inputs of requests, piece by piece, as fast as the relay stores them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs

from protocol.wire.messages import MAX_INPUT_CHUNK_BYTES, MAX_UNACKED_BYTES, Input
from relayd.http.errors import HttpError
from relayd.http.request_stream import RequestStream
from relayd.requests.request import Request


def input_closed(request: Request, name: str) -> HttpError:
    """The error for what is fed to a request that has ended."""
    why = f": {request.message}" if request.message else ""
    message = f"request {request.request_id} has {request.entry.state}, and takes no more of input {name!r}{why}"
    return HttpError("input_closed", message, status=409)


@attrs.define(eq=False)
class LiveFeed(RequestStream):
    """Holds a request while a live input of it is fed. It reads none of the frames."""

    def check(self, name: str) -> None:
        """Check that the request still takes the input.

        Raises:
            HttpError: it does not.
        """
        if self._refusal is not None:
            raise self._refusal
        if not self.request.live:
            raise input_closed(self.request, name)

    async def add(self, name: str, offset: int, data: bytes, last: bool | None = None) -> None:
        """Add a piece, of at most MAX_INPUT_CHUNK_BYTES; waits while the relay holds it back.

        Raises:
            HttpError: the request has ended, or the relay refuses what is fed.
        """
        piece = Input(request_id=self.request.request_id, name=name, offset=offset, data=data, last=last)
        while True:
            self.context.admission.add_input(self.request, piece, self)
            self.check(name)
            if self not in self.request.fed[name].held_back:
                return
            await self.wait_for_store(name)

    async def wait_for_store(self, name: str) -> None:
        """Wait until more is stored.

        Raises:
            HttpError: as for `add`.
        """
        await self._wait()
        self.check(name)


@attrs.define(eq=False)
class Feeder:
    """Feeds one live input from its beginning; made by `open_feeder`."""

    _feed: LiveFeed
    _name: str
    _offset: int = 0
    _ended: bool = False

    async def feed(self, data: bytes) -> None:
        """Feed more; waits while too much of it is not stored. What comes after the request's end is dropped.

        Raises:
            HttpError: the relay refuses what is fed.
        """
        for start in range(0, len(data), MAX_INPUT_CHUNK_BYTES):
            await self._add(data[start : start + MAX_INPUT_CHUNK_BYTES])

    async def end(self) -> None:
        """Say that nothing more comes; without effect after the first call.

        Raises:
            HttpError: as for `feed`.
        """
        if not self._ended:
            self._ended = True
            await self._add(b"", last=True)

    async def _add(self, data: bytes, last: bool | None = None) -> None:
        feed, name = self._feed, self._name
        try:
            fed = feed.request.fed.get(name)
            while fed is not None and self._offset + len(data) - fed.size > MAX_UNACKED_BYTES:
                await feed.wait_for_store(name)
            self._offset += len(data)
            feed.check(name)
            await feed.add(name, self._offset - len(data), data, last)
        except HttpError as refusal:
            if refusal.code != "input_closed":  # who reads the request is told why
                raise


@asynccontextmanager
async def open_feeder(held: RequestStream, name: str) -> AsyncIterator[Feeder]:
    """Feed a live input of a request that `held` reads, until the end of the block, which leaves it as it is then."""
    feed = LiveFeed(held.context, None, held.principal)
    feed.attach(held.request)
    try:
        yield Feeder(feed, name)
    finally:
        feed.close()
