"""The client's end of a conversation: writes what a case says, as chopped as it says, and notes what comes back."""

import base64
import hashlib
import socket
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

import attrs
import trio

from tests.conformance.frames import Opcode, ServerFrames, close
from tests.conformance.server_socket import ServerSocket

#: For one conversation; a server that hangs fails the test after so long.
PATIENCE_S = 30.0
#: RFC 6455, section 1.3: its own example of a key, and the answer to it.
EXAMPLE_KEY = "dGhlIHNhbXBsZSBub25jZQ=="
_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


@attrs.frozen
class Message:
    """A text or binary message."""

    opcode: Opcode
    payload: bytes

    def __repr__(self) -> str:
        shown = repr(self.payload[:40]) + (f"... of {len(self.payload):,} octets" if len(self.payload) > 40 else "")
        return f"{self.opcode.name.lower()} {shown}"


@attrs.define
class Heard:
    """All that a server said on one connection after the handshake."""

    messages: list[Message] = attrs.field(factory=list)
    pongs: list[bytes] = attrs.field(factory=list)
    #: Whether its close frame came.
    closed: bool = False
    #: That frame's; it may have none.
    code: int | None = None
    reason: bytes = b""
    #: Octets of frames behind its close frame, or of one that it did not finish.
    stray: int = 0
    #: Whether the connection was reset, and not closed in order: that may eat what was underway.
    reset: bool = False
    _ended: bool = False
    _something: trio.Event = attrs.field(factory=trio.Event, repr=False)

    async def until(self, heard: Callable[[], bool]) -> None:
        """Wait until it was heard, or the end."""
        while not heard() and not self._ended:
            await self._something.wait()

    def end(self) -> None:
        """Nothing comes any more."""
        self._ended = True
        self._something.set()

    def note(self, opcode: Opcode, payload: bytes) -> None:
        """Note a whole message or control frame."""
        if self.closed:
            self.stray += 2 + len(payload)
        elif opcode is Opcode.CLOSE:
            assert len(payload) != 1, "the server sent a close code of one octet"
            self.closed = True
            self.code = struct.unpack_from("!H", payload)[0] if payload else None
            self.reason = payload[2:]
            self.reason.decode()
        elif opcode is Opcode.PONG:
            self.pongs.append(payload)
        elif opcode is not Opcode.PING:  # the relay's own sign of life, which needs no answer so soon
            if opcode is Opcode.TEXT:
                payload.decode()
            self.messages.append(Message(opcode, payload))
        self._something.set()
        self._something = trio.Event()


class ServerStream:
    """What comes from a server."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._early = b""

    async def head(self) -> bytes:
        """The head of the server's HTTP answer, without the empty line; what came of one that never ended."""
        octets = b""
        while b"\r\n\r\n" not in octets:
            octets += (more := await self.receive())
            if not more:
                return octets
        head, _, self._early = octets.partition(b"\r\n\r\n")
        return head

    async def receive(self) -> bytes:
        """What comes next; nothing at the end.

        Raises:
            trio.BrokenResourceError: the server reset the connection.
        """
        if self._early:
            early, self._early = self._early, b""
            return early
        return bytes(await self._stream.receive_some(65536))

    async def listen(self, heard: Heard) -> None:
        """Note all that comes, until the server hangs up."""
        frames = ServerFrames()
        opcode, parts = Opcode.CONTINUATION, b""
        try:
            while octets := await self.receive():
                for one in frames.feed(octets):
                    if one.opcode >= Opcode.CLOSE:
                        heard.note(one.opcode, one.payload)
                    else:
                        begins = one.opcode is not Opcode.CONTINUATION
                        assert begins == (opcode is Opcode.CONTINUATION), "the server mixed up its fragments"
                        opcode, parts = (one.opcode, one.payload) if begins else (opcode, parts + one.payload)
                        if one.fin:
                            heard.note(opcode, parts)
                            opcode, parts = Opcode.CONTINUATION, b""
        except trio.BrokenResourceError:
            heard.reset = True
        finally:
            heard.stray += frames.left
            heard.end()


class Peer(ServerStream):
    """A raw client on one TCP connection."""

    def __init__(self, stream: trio.SocketStream, server: ServerSocket) -> None:
        super().__init__(stream)
        self.stream = stream
        self.server = server

    async def send(self, octets: bytes, chop: int = 0) -> None:
        """Send, in one write or in writes of `chop` octets, each of which the server has read before the next goes.

        Raises:
            trio.BrokenResourceError: the server has hung up.
        """
        if not chop:
            await self.stream.send_all(octets)
            return
        for at in range(0, len(octets), chop):
            await self.stream.send_all(octets[at : at + chop])
            await self.server.read_all()

    async def converse(
        self, sent: bytes, chop: int = 0, *, close_after: int | None = None, polite: bool = True
    ) -> Heard:
        """Send all of `sent` and hear the answers, until the server hangs up.

        Args:
            sent: frames, good or bad.
            chop: octets a write, 0 for all in one.
            close_after: close with 1000, once that many messages and pongs have come.
            polite: whether to answer the server's close frame; so where this side sends none.
        """
        heard = Heard()

        async def speak() -> None:
            try:
                await self.send(sent, chop)
                if close_after is not None:
                    await heard.until(lambda: len(heard.messages) + len(heard.pongs) >= close_after)
                    await self.send(close())
                elif polite:
                    await heard.until(lambda: heard.closed)
                    await self.send(close(heard.code))
            except trio.BrokenResourceError as fault:  # it hung up on us, as it may once it has said why
                heard.reset |= isinstance(fault.__cause__, ConnectionResetError)

        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(speak)
                await self.listen(heard)
        return heard


def accept_for(key: str) -> str:
    """The answer to a client's key (RFC 6455, section 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key.encode() + _GUID.encode()).digest()).decode()


def request(
    port: int, headers: Mapping[str, str | None] | None = None, *, method: str = "GET", version: str = "HTTP/1.1"
) -> bytes:
    """The head of a handshake.

    Args:
        port: the server's.
        headers: to add or change, by names in small letters, or, where None, to leave out.
        method: of HTTP.
        version: of HTTP.
    """
    fields: dict[str, str | None] = {
        "host": f"127.0.0.1:{port}",
        "upgrade": "websocket",
        "connection": "Upgrade",
        "sec-websocket-key": EXAMPLE_KEY,
        "sec-websocket-version": "13",
    }
    fields |= headers or {}
    told = [f"{name}: {value}" for name, value in fields.items() if value is not None]
    return "\r\n".join([f"{method} / {version}", *told, "", ""]).encode("latin-1")


@asynccontextmanager
async def open_peer(port: int) -> AsyncIterator[Peer]:
    """A TCP connection to the server, no handshake yet."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    async with stream:
        with ServerSocket(stream.socket) as server:
            yield Peer(stream, server)


@asynccontextmanager
async def open_websocket(port: int) -> AsyncIterator[Peer]:
    """A connection whose handshake is done."""
    async with open_peer(port) as peer:
        with trio.fail_after(PATIENCE_S):
            await peer.send(request(port))
            head = await peer.head()
        assert head.startswith(b"HTTP/1.1 101 "), head
        yield peer
