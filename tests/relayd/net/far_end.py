"""A link of the reactor, the client's end of its socket, and an object that takes its messages."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import trio
import trio.testing

from protocol.link.limits import LinkLimits
from protocol.link.websocket_frames import (
    BINARY,
    Event,
    Parser,
    make_frame,
)
from protocol.wire.frames import MAX_MESSAGE_BYTES
from relayd.net.reactor import Reactor, open_reactor
from relayd.net.socket_link import SocketLink


@attrs.define(eq=False)
class Taken:
    """Whoever takes a link's messages."""

    messages: list[bytes] = attrs.field(factory=list)
    batches: int = 0
    texts: list[str] = attrs.field(factory=list)
    ends: int = 0
    cuts: int = 0

    def on_messages(self, messages: list[bytes]) -> None:
        self.batches += 1
        self.messages += messages

    def has(self, count: int) -> bool:
        return len(self.messages) == count

    def on_text(self, text: str) -> None:
        self.texts.append(text)

    def on_closed(self) -> None:
        self.ends += 1

    def on_transport_closed(self) -> None:
        self.cuts += 1


@attrs.define(eq=False)
class FarEnd:
    """The client's socket, frame by frame."""

    stream: trio.SocketStream
    parser: Parser = attrs.field(factory=lambda: Parser(masked=False, max_message_bytes=2 * MAX_MESSAGE_BYTES))
    events: list[Event] = attrs.field(factory=list)

    async def send(self, payload: bytes, opcode: int = BINARY) -> None:
        await self.stream.send_all(make_frame(opcode, payload, masked=True))

    async def next(self) -> Event:
        """The next thing that comes; fails where the relay hung up."""
        while not self.events:
            data = await self.stream.receive_some(65_536)
            assert data, "the relay hung up"
            self.parser.feed(data)
            self.events += self.parser.pop_events()
        return self.events.pop(0)

    async def hung_up(self) -> bool:
        """Whether the relay closes the connection without another byte."""
        return not self.events and not await self.stream.receive_some()


@asynccontextmanager
async def linked(*, tcp: bool = True, **limits: Any) -> AsyncIterator[tuple[Reactor, SocketLink, FarEnd]]:
    """A plane, a link of it, and the far end."""
    with trio.fail_after(30):
        async with open_reactor() as reactor:
            if tcp:
                (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
                async with listener:
                    theirs = await trio.open_tcp_stream(*listener.socket.getsockname()[:2])
                    ours = await listener.accept()
            else:
                ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(each)) for each in socket.socketpair())
            async with theirs:
                yield reactor, reactor.register(ours, "peer", LinkLimits(**limits)), FarEnd(theirs)


async def hear_out(link: SocketLink) -> None:
    """Take messages until there are no more."""
    while True:
        await link.receive()
