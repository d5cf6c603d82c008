"""Both ends of a link over streams in memory, and a peer that a test plays frame by frame."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
import trio.testing
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, Event, Request

from protocol.client.address import Address
from protocol.link.base import Link
from protocol.link.dial import open_link
from protocol.link.limits import LinkLimits
from protocol.wire.messages import SUBPROTOCOL
from tests.support.scripted_relay import ADDRESS, accept_link


@asynccontextmanager
async def link_pair(**server_rules: float) -> AsyncIterator[tuple[Link, Link]]:
    """A client's link and the relay's end of it."""
    ours, theirs = trio.testing.memory_stream_pair()

    async def connect(_address: Address) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        return ours

    served: list[Link] = []
    ready, over = trio.Event(), trio.Event()

    async def serve() -> None:
        async with accept_link(theirs, **server_rules) as link:
            served.append(link)
            ready.set()
            await over.wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        async with open_link(ADDRESS, connect_to=connect) as link:
            await ready.wait()
            yield link, served[0]
        over.set()


class RawPeer:
    """The relay's end by hand, frame by frame, for what no well-behaved peer does."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.ws = WSConnection(ConnectionType.SERVER)
        self.events: list[Event] = []

    async def until(self, kind: type[Event]) -> Event:
        """Read up to the next event of this kind."""
        while True:
            for number, event in enumerate(self.events):
                if isinstance(event, kind):
                    del self.events[: number + 1]
                    return event
            data = await self.stream.receive_some()
            assert data, "the link closed the connection"
            self.ws.receive_data(bytes(data))
            self.events += self.ws.events()

    async def accept(self) -> None:
        await self.until(Request)
        await self.send(AcceptConnection(subprotocol=SUBPROTOCOL))

    async def send(self, event: Event) -> None:
        await self.stream.send_all(self.ws.send(event))


@asynccontextmanager
async def link_to_raw_peer(
    *, limits: LinkLimits | None = None, lockstep: bool = False
) -> AsyncIterator[tuple[Link, RawPeer]]:
    """A client's link to a `RawPeer`; with `lockstep` nothing is buffered: a send waits until the peer receives."""
    ours, theirs = trio.testing.lockstep_stream_pair() if lockstep else trio.testing.memory_stream_pair()
    peer = RawPeer(theirs)

    async def connect(_address: Address) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        return ours

    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.accept)
        async with open_link(ADDRESS, connect_to=connect, limits=limits) as link:
            yield link, peer
