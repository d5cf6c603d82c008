"""trio-websocket's connection, with what it lacks: bytes heard, the end of a handshake seen, no fall while closing.

Everything that touches trio-websocket's private parts is here (checked against 0.12.2).
"""

import errno
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio
from trio_websocket import ConnectionClosed, ConnectionRejected, WebSocketConnection, WebSocketRequest
from wsproto import ConnectionType, WSConnection
from wsproto.connection import ConnectionState
from wsproto.events import BytesMessage, CloseConnection, Event, Pong, TextMessage

from protocol.address import Address
from protocol.background import open_background
from protocol.errors import ConnectError, LinkBroken
from protocol.kernel import answers, waiting_bytes
from protocol.messages import KIB, MAX_MESSAGE_BYTES, SUBPROTOCOL

#: trio-websocket asks for 4 KiB at a time: 256 turns of the event loop for a full message. 64 KiB makes it 16.
RECEIVE_BYTES = 64 * KIB
#: A longer send goes out in pieces of this size, each of which shows that the peer still takes bytes.
SEND_PIECE_BYTES = 64 * KIB
#: A piece that took this long had to wait for the peer: its going through is a sign of life.
WAITED_S = 0.01
#: How much of an over-long message is read and thrown away so that the peer sees the close and not a reset.
LINGER_BYTES = 64 * MAX_MESSAGE_BYTES
LINGER_S = 2.0


class HeardStream(trio.abc.Stream):
    """A stream that knows when its peer last showed a sign of life.

    Attributes:
        heard_at: Trio time of it.
        taken_at: Trio time at which some of what is sent last got further.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.heard_at = trio.current_time()
        self.taken_at = self.heard_at
        self._waiting_bytes = 0

    @property
    def answered(self) -> bool:
        """Whether the peer's machine is there, as far as the kernel can tell."""
        return answers(self.stream)

    def look(self) -> None:
        """See whether the peer takes something: a kernel that is full takes the next piece only much later."""
        waiting = waiting_bytes(self.stream) or 0
        if waiting < self._waiting_bytes:
            self.taken_at = trio.current_time()
        self._waiting_bytes = waiting

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """As the stream's."""
        data = await self.stream.receive_some(max_bytes)
        if data:
            self.heard_at = trio.current_time()
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """As the stream's, in pieces."""
        view = memoryview(data)
        while True:
            piece, view = view[:SEND_PIECE_BYTES], view[SEND_PIECE_BYTES:]
            began = trio.current_time()
            await self.stream.send_all(piece)
            # While one long message goes out, the reader may wait for its turn to send a pong and hear nothing.
            # Bytes that went out only after a wait were taken by a living peer, not by the kernel's free buffer.
            self.taken_at = now = trio.current_time()
            if now - began > WAITED_S:
                self.heard_at = now
            if not view:
                return

    async def wait_send_all_might_not_block(self) -> None:
        """As the stream's."""
        await self.stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        """As the stream's."""
        await self.stream.aclose()


class Socket(WebSocketConnection):
    """A WebSocket of either side.

    Attributes:
        lingered: there once this side closed it with 1009, over the peer's message of more than
            `MAX_MESSAGE_BYTES`; set when the peer has hung up, or had its `LINGER_S`.
        refusal: the HTTP answer that was no upgrade, on the client side.
    """

    _stream: HeardStream
    lingered: trio.Event | None = None
    refusal: ConnectionRejected | None = None

    @classmethod
    def over(cls, stream: trio.abc.Stream, kind: ConnectionType, **more: Any) -> "Socket":
        """A socket over `stream`, not reading yet."""
        return cls(
            HeardStream(stream),
            WSConnection(kind),
            max_message_size=MAX_MESSAGE_BYTES,
            receive_buffer_size=RECEIVE_BYTES,
            **more,
        )

    @classmethod
    def adopt(cls, plain: WebSocketConnection) -> "Socket":
        """A connection that trio-websocket made, turned into one of these.

        Its reader runs already, so over-long messages are still handled trio-websocket's way, without lingering.
        """
        if isinstance(plain, cls):
            return plain
        plain.__class__ = cls
        plain._stream = HeardStream(plain._stream)
        assert isinstance(plain, cls)
        return plain

    @property
    def transport(self) -> HeardStream:
        """The stream underneath."""
        return self._stream

    async def read(self) -> None:
        """Read until the end of the connection, and see to it that whoever waits for a handshake learns of it."""
        try:
            await self._reader_task()
        except ConnectionRejected as refusal:
            self.refusal = refusal
        except ConnectionClosed:
            pass  # the peer broke HTTP or WebSocket and hung up before it was told
        finally:
            self._open_handshake.set()

    async def hang_up(self) -> None:
        """Cut the transport and have `read` return, also where it waits for a message of its to be taken."""
        await trio.aclose_forcefully(self._stream)
        await self._recv_channel.aclose()

    async def shake_hands(self, address: Address) -> None:
        """Wait for the relay's answer to our handshake.

        Raises:
            ConnectError: the answer was no, or none.
        """
        await self._open_handshake.wait()
        if self.refusal is not None:
            body = (self.refusal.body or b"").decode("utf-8", "replace").strip()[:300]
            raise ConnectError(f"{address} answered HTTP {self.refusal.status_code}" + (f": {body}" if body else ""))
        if self.closed is not None or self.subprotocol is None:
            raise ConnectError(f"{address} is no relay, or it hung up: the WebSocket handshake did not finish")
        if self.subprotocol != SUBPROTOCOL:
            raise ConnectError(f"{address} speaks {self.subprotocol!r}, not {SUBPROTOCOL}")

    async def _send(self, event: Event) -> None:
        # wsproto refuses, with an exception that ends the reader and its nursery, a pong or a second close frame
        # once the close frame went out; a peer's ping on the way at that moment is enough to run into it.
        state = self._wsproto.state
        if isinstance(event, Pong) and state is not ConnectionState.OPEN:
            return
        if isinstance(event, CloseConnection) and state in (ConnectionState.LOCAL_CLOSING, ConnectionState.CLOSED):
            return
        await super()._send(event)

    async def _handle_message_event(self, event: BytesMessage | TextMessage) -> None:
        if self.lingered is not None:
            return
        if self._message_size + len(event.data) <= self._max_message_size:
            await super()._handle_message_event(event)
            return
        self.lingered = trio.Event()
        try:
            await super()._handle_message_event(event)  # closes with 1009
            await self._linger()
        finally:
            self.lingered.set()

    async def _linger(self) -> None:
        """Throw away what still comes, until the peer hangs up: closing over unread bytes resets the connection."""
        with trio.move_on_after(LINGER_S):
            for _ in range(LINGER_BYTES // RECEIVE_BYTES):
                try:
                    if not await self._stream.receive_some(RECEIVE_BYTES):
                        return
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    return


async def connect(address: Address, ssl_context: ssl.SSLContext | None = None) -> trio.abc.Stream:
    """A transport to `address`, TLS included.

    Args:
        address: where to.
        ssl_context: for `tls`; the system's certificate authorities where it is None.

    Raises:
        ConnectError: nobody answered, or TLS failed; the text says what to look at.
    """
    try:
        if address.kind == "unix":
            return await trio.open_unix_socket(address.path)
        if address.kind == "tcp":
            return await trio.open_tcp_stream(address.host, address.port)
        stream = await trio.open_ssl_over_tcp_stream(
            address.host,
            address.port,
            https_compatible=True,
            ssl_context=ssl_context or ssl.create_default_context(),
        )
        try:
            await stream.do_handshake()
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return stream
    except trio.BrokenResourceError as fault:
        raise ConnectError(f"{address}: TLS failed: {fault.__cause__ or fault}") from fault
    except OSError as fault:
        reasons = _reasons(fault)
        if reasons <= {os.strerror(errno.ENOENT), os.strerror(errno.ECONNREFUSED)}:
            raise ConnectError(f"no relay listens at {address}") from fault
        raise ConnectError(f"cannot reach {address}: {'; '.join(sorted(reasons))}") from fault


def _reasons(fault: OSError) -> set[str]:
    """Why, in words; trio puts the failures of several tried addresses into a group."""
    cause = fault.__cause__
    if isinstance(cause, BaseExceptionGroup):
        return set().union(*(_reasons(one) for one in cause.exceptions if isinstance(one, OSError)))
    if isinstance(cause, OSError):
        return _reasons(cause)
    if fault.errno is not None and fault.errno in errno.errorcode:
        return {os.strerror(fault.errno)}
    return {fault.strerror or str(fault)}


@asynccontextmanager
async def open_socket(stream: trio.abc.Stream, address: Address) -> AsyncIterator[Socket]:
    """A client's WebSocket over `stream`, handshake done; the stream is closed at the end of the block.

    Raises:
        ConnectError: the handshake was refused or cut off.
    """
    host = f"[{address.host}]" if ":" in address.host else address.host
    if address.port not in (0, 80, 443):
        host += f":{address.port}"
    socket = Socket.over(
        stream,
        ConnectionType.CLIENT,
        host=host or "localhost",
        path=address.resource,
        client_subprotocols=[SUBPROTOCOL],
    )

    async def hang_up() -> None:
        await socket.hang_up()

    async with open_background(socket.read, hang_up):
        await socket.shake_hands(address)
        yield socket


@asynccontextmanager
async def open_upgrade(stream: trio.abc.Stream) -> AsyncIterator[WebSocketRequest]:
    """A relay's side of a handshake: the request, to `accept()` or `reject()` inside the block.

    Use it in place of `trio_websocket.wrap_server_stream`: its reader is shielded, so that a cancellation never
    leaves half a pong on the wire, and the stream is closed at the end of the block, after `reject()` too. Set a
    deadline around entering it: it waits for the request's head.

    Raises:
        LinkBroken: the peer hung up, or spoke no HTTP, before the handshake was done.
    """
    socket = Socket.over(stream, ConnectionType.SERVER)
    request: WebSocketRequest | None = None
    waiting = trio.CancelScope()

    async def read() -> None:
        try:
            await socket.read()
        finally:
            waiting.cancel()  # no head will come any more

    async def hang_up() -> None:
        await socket.hang_up()

    async with open_background(read, hang_up):
        with waiting:
            request = await socket._get_request()
        if request is None:
            raise LinkBroken("no WebSocket handshake came")
        try:
            yield request
        except ConnectionClosed:
            raise LinkBroken("the peer hung up during the handshake") from None
