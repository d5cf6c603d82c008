"""A raw client of the Wyoming protocol, which sends any bytes."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import trio

from relayd.wyoming.events import Event, EventParser


def event(kind: str, data: dict[str, Any] | None = None, payload: bytes = b"") -> bytes:
    """The bytes of an event."""
    return Event(kind, data or {}, payload).encode()


def line(**fields: Any) -> bytes:
    """The first line of an event, with any fields."""
    return json.dumps(fields).encode() + b"\n"


@attrs.define(eq=False)
class WyomingClient:
    """A connection."""

    stream: trio.SocketStream
    _parser: EventParser = attrs.field(factory=EventParser)

    async def send(self, kind: str, data: dict[str, Any] | None = None, payload: bytes = b"") -> None:
        """Send an event."""
        await self.stream.send_all(event(kind, data, payload))

    async def next(self) -> Event | None:
        """The next event; None at the end of the connection."""
        with trio.fail_after(30):
            while (found := self._parser.next()) is None:
                if not (data := await self.stream.receive_some(65_536)):
                    return None
                self._parser.feed(bytes(data))
        return found

    async def expect(self, kind: str) -> dict[str, Any]:
        """The data of the next event, which must be of this type."""
        found = await self.next()
        assert found is not None
        assert found.type == kind, found
        return found.data

    async def until(self, kind: str) -> list[Event]:
        """All events up to one of this type."""
        events: list[Event] = []
        while not events or events[-1].type != kind:
            found = await self.next()
            assert found is not None, events
            assert found.type in (kind, *SENT), found
            events.append(found)
        return events

    async def refused(self) -> tuple[str, str]:
        """The code and the text of the error with which the connection ends."""
        while (found := await self.next()) is not None and found.type != "error":
            pass
        assert found is not None, "it ended without an error"
        assert await self.next() is None
        return found.data["code"], found.data["text"]


#: What comes before the last event of an answer.
SENT = (
    *("audio-start", "audio-chunk", "audio-stop"),
    *("transcript-start", "transcript-chunk", "transcript"),
    *("handled-start", "handled-chunk", "handled"),
)


def pcm_of(events: list[Event]) -> bytes:
    """The samples in events."""
    return b"".join(each.payload for each in events if each.type == "audio-chunk")


@asynccontextmanager
async def wyoming_client(url: str) -> AsyncIterator[WyomingClient]:
    """Connect to `tcp://HOST:PORT`."""
    host, _, port = url.removeprefix("tcp://").rpartition(":")
    stream = await trio.open_tcp_stream(host, int(port))
    async with stream:
        yield WyomingClient(stream)
