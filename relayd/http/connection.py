"""One HTTP/1.1 connection: h11 parses and frames, and the ASGI application runs over a Trio stream.

The connection's own task reads, and each request's handler runs in another task, so that a disconnect cancels the
handler at once. A client that does not read is disconnected, a response that cannot be finished is aborted with a
reset, and a closing connection lingers so that a reset does not destroy its last response. HTTP/2 is not supported.
A WebSocket request is handed back to the caller of `serve`.
"""

import math
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from email.utils import formatdate
from functools import lru_cache
from urllib.parse import unquote

import attrs
import h11
import structlog
import trio
from starlette.types import ASGIApp, Message, Scope

from relayd.http.context import Exchange, HttpContext, Slot
from relayd.http.errors import ResponseAborted
from relayd.net import http_head
from relayd.net.http_head import MAX_HEAD_BYTES, PrefixedStream

log = structlog.get_logger("relayd.http")

READ_BYTES = 64 * 1024
#: Size of one send: each completed send shows that the client still reads.
SEND_PIECE_BYTES = 64 * 1024
#: Pieces of a request's body, each at most `READ_BYTES`, buffered for the handler; then reading pauses.
BODY_PIECES = 10
#: The rest of a body of at most this size is discarded after the response, for so long, to keep the connection.
DISCARD_BYTES, DISCARD_S = 1024 * 1024, 2.0
#: How long a connection waits for the client to read the last response and to close its end.
LINGER_S = 2.0
#: How much is read and discarded meanwhile: a client may send a whole body before it reads the response.
LINGER_BYTES = 32 * 1024 * 1024
#: Shielded timeout of closing the stream.
CLOSE_S = 2.0
#: `SO_LINGER` with a timeout of 0: the peer gets a reset, and knows that the response is incomplete.
_RESET = struct.pack("ii", 1, 0)

ASGI = {"version": "3.0", "spec_version": "2.4"}  # since 2.4, applications need not poll for a disconnect
_DISCONNECT: Message = {"type": "http.disconnect"}
_LAST_PIECE: Message = {"type": "http.request", "body": b"", "more_body": False}
_CONTINUE = h11.InformationalResponse(status_code=100, headers=[])
_GONE = (trio.BrokenResourceError, trio.ClosedResourceError)


@lru_cache(maxsize=1)
def _date_at(second: int) -> bytes:
    """Return the value of a `Date` header."""
    return formatdate(second, usegmt=True).encode()


def _refusal_status(request: h11.Request) -> int | None:
    """Return the status with which to refuse a request that h11 accepted; None to accept it."""
    names = {name for name, _value in request.headers}
    if not request.http_version.startswith(b"1."):
        return 505
    if {b"content-length", b"transfer-encoding"} <= names:
        return 400  # RFC 9112 section 6.1: a proxy may disagree about where the body ends
    if b"transfer-encoding" in names and request.http_version < b"1.1":
        return 400  # the same
    size = len(request.target) + sum(len(name) + len(value) + 4 for name, value in request.headers)
    return 431 if size > MAX_HEAD_BYTES else None  # h11 limits only incomplete heads


def _asks_for_websocket(request: h11.Request) -> bool:
    return any(name == b"upgrade" and value.strip().lower() == b"websocket" for name, value in request.headers)


def _head_of(request: h11.Request) -> bytes:
    """Rebuild a request's head."""
    lines = [request.method + b" " + request.target + b" HTTP/" + request.http_version]
    lines += [name + b": " + value for name, value in request.headers.raw_items()]
    return b"\r\n".join((*lines, b"", b""))


def _is_discarded(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether the rest of a request's body is discarded after the response."""
    return any(name == b"content-length" and int(value) <= DISCARD_BYTES for name, value in headers)


@attrs.define(eq=False)
class Connection:
    """Serves one connection, one request after the other.

    Args:
        app: answers the requests.
        context: counts them.
        stream: TLS already spoken.
        slot: counts the connection, and knows where the client comes from.
        secure: whether the client speaks TLS.
    """

    app: ASGIApp
    context: HttpContext
    stream: PrefixedStream
    slot: Slot
    secure: bool
    #: The head of a WebSocket request and the data received after it; empty if there was none.
    upgrade: bytes = b""
    #: No more requests are served; further data is read and discarded so that the client reads its response.
    done: bool = False
    http: h11.Connection = attrs.field(factory=lambda: h11.Connection(h11.SERVER, MAX_HEAD_BYTES - 1))
    _reading: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    #: The request being served.
    _cycle: "RequestCycle | None" = None
    #: Requests whose answer has begun.
    _answered: int = 0

    async def serve(self) -> None:
        """Serve requests until either side closes the connection or the client requests a WebSocket."""
        try:
            async with trio.open_nursery() as handlers:
                self._reading.deadline = trio.current_time() + http_head.HEAD_S
                with self._reading:
                    await self._read(handlers)
                if self._cycle is not None:
                    self._cycle.abort()
        finally:
            self._cycle = None  # breaks a reference cycle that would keep a body in memory until garbage collection
            if not self.upgrade:
                with trio.move_on_after(CLOSE_S, shield=True):
                    await self.stream.aclose()

    def end_if_idle(self) -> None:
        """Close the connection unless a request is being served."""
        if self._cycle is None:
            self._reading.cancel()

    # -- reading

    async def _read(self, handlers: trio.Nursery) -> None:
        lingered = 0
        while lingered < LINGER_BYTES and not self.upgrade:
            try:
                data = await self.stream.receive_some(READ_BYTES)
            except _GONE:
                return
            if not data:
                return
            if self.done:
                lingered += len(data)
                continue
            self.http.receive_data(bytes(data))
            await self._take_events(handlers)
            self._limit_head()

    def _limit_head(self) -> None:
        """Limit the time for the rest of a request head of which a part has arrived."""
        if self._cycle is None and not self.done and self.http.trailing_data[0]:
            self._reading.deadline = min(self._reading.deadline, trio.current_time() + http_head.HEAD_S)

    async def _take_events(self, handlers: trio.Nursery) -> None:
        """Handle all events parsed from the received data."""
        while not self.done:
            try:
                event = self.http.next_event()
            except h11.RemoteProtocolError as fault:
                await self._refuse(fault.error_status_hint)
                return
            cycle = self._cycle
            if isinstance(event, h11.Request):
                if (status := _refusal_status(event)) is not None:
                    await self._refuse(status)
                elif _asks_for_websocket(event):
                    self.upgrade = _head_of(event) + self.http.trailing_data[0]
                    return
                else:
                    self._start_handler(event, handlers)
            elif isinstance(event, h11.Data) and cycle is not None:
                await cycle.put({"type": "http.request", "body": bytes(event.data), "more_body": True})
            elif isinstance(event, h11.EndOfMessage) and cycle is not None:
                await cycle.put(_LAST_PIECE)
                if cycle.exchange.answered and not self.done:
                    self._start_next_cycle()
            elif event is h11.PAUSED and cycle is not None and self.http.trailing_data[0]:
                await cycle.ended.wait()  # the next request has arrived already
            else:
                return

    def _start_handler(self, request: h11.Request, handlers: trio.Nursery) -> None:
        """Start the handler of a request."""
        authority, target = http_head.split_target(request.target.decode())
        headers = list(request.headers)
        if authority:
            headers = [*(header for header in headers if header[0] != b"host"), (b"host", authority.encode())]
        path, _, query = target.partition("?")
        exchange = Exchange(self.slot, self.secure)
        scope: Scope = {
            "type": "http",
            "asgi": dict(ASGI),
            "http_version": request.http_version.decode(),
            "method": request.method.decode(),
            "scheme": "https" if self.secure else "http",
            "path": unquote(path),
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": headers,
            "client": None,
            "server": None,
            "state": {"exchange": exchange},
            "extensions": {},
        }
        self._cycle = cycle = RequestCycle(self, exchange, scope["method"], scope["path"], _is_discarded(headers))
        self._reading.deadline = math.inf
        handlers.start_soon(self._handle, cycle, scope)

    # -- answering

    async def _handle(self, cycle: "RequestCycle", scope: Scope) -> None:
        """Run one handler; an error in it ends only its response."""
        exchange = cycle.exchange
        self.context.exchanges.add(exchange)
        try:
            with exchange.scope:
                if self._answered:  # the first request had its turn before the connection came here
                    await self.context.wait_turn(self.slot, http_head.token_of(scope["headers"]))
                self._answered += 1
                await self.app(scope, cycle.receive, cycle.send)
        except ResponseAborted:
            self._abort()
        except Exception:
            log.exception("internal error in HTTP handler", path=cycle.path, peer=exchange.slot.peer)
        finally:
            self.context.exchanges.discard(exchange)
            self.slot.log_out()
            cycle.close()
        if not exchange.answered and not self.done:
            if cycle.status or exchange.gone:  # failed mid-response; or the client or its token is gone
                self._abort()
            else:
                await self._end_with(500)
        cycle.ended.set()

    async def conclude(self, cycle: "RequestCycle") -> None:
        """A response was sent: prepare for the next request, or end the connection."""
        cycle.close()
        if self._cycle is cycle and not self.done:
            cycle.log_response()
            if self.http.our_state is not h11.DONE or self.context.leaving:
                await self._finish()
            elif self.http.their_state is h11.DONE:
                self._start_next_cycle()
            elif cycle.discards_body and not self.http.they_are_waiting_for_100_continue:
                self._reading.deadline = trio.current_time() + DISCARD_S
            else:
                await self._finish()
        cycle.ended.set()

    def _start_next_cycle(self) -> None:
        self._cycle = None
        self.http.start_next_cycle()
        self._reading.deadline = trio.current_time() + self.context.relay.config.http.keep_alive_s

    async def transmit(self, pieces: Sequence[bytes]) -> None:
        """Send bytes; abort the connection if the client does not read."""
        if sum(map(len, pieces)) <= SEND_PIECE_BYTES:
            pieces = [b"".join(pieces)]  # saves a system call and a packet for each piece
        for piece in pieces:
            for start in range(0, len(piece), SEND_PIECE_BYTES):
                if not await self._send(memoryview(piece)[start : start + SEND_PIECE_BYTES]):
                    self._abort()
                    return

    async def _send(self, data: memoryview) -> bool:
        """Send data; returns False if the client disconnected or did not read for `stall_timeout_s`."""
        stall_timeout_s = self.context.relay.config.limits.stall_timeout_s
        with trio.move_on_after(stall_timeout_s):
            try:
                await self.stream.send_all(data)
            except _GONE:
                return False
            return True
        log.warning("client read nothing", peer=self.slot.peer, for_s=stall_timeout_s)
        self.context.relay.slow_consumers += 1
        return False

    # -- closing

    async def _refuse(self, status: int) -> None:
        """Refuse invalid or unsupported HTTP with a status if still possible, and end the connection."""
        self.done = True
        if self._cycle is not None:
            self._cycle.abort()
            await self._cycle.ended.wait()
        if self.http.our_state is h11.SEND_BODY:
            self._abort()
        else:
            await self._end_with(status)

    async def _end_with(self, status: int) -> None:
        """Respond with an empty body unless a response has started, and end the connection."""
        self.done = True
        if self.http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            date = _date_at(int(time.time()))
            headers = [(b"date", date), (b"content-length", b"0"), (b"connection", b"close")]
            head = self.http.send(h11.Response(status_code=status, headers=headers))
            await self.transmit([head, self.http.send(h11.EndOfMessage())])
        await self._finish()

    async def _finish(self) -> None:
        """Close the sending side, and give the client time to close its own: a reset could overtake the response."""
        self.done = True
        self._reading.deadline = min(self._reading.deadline, trio.current_time() + LINGER_S)
        try:
            await self.stream.send_eof()
        except (*_GONE, trio.BusyResourceError):
            self._reading.cancel()

    def _abort(self) -> None:
        """Abort the connection with a reset, so that a partial response does not look complete."""
        self.done = True
        self._reading.cancel()
        stream: trio.abc.Stream | None = self.stream
        while stream is not None and not isinstance(stream, trio.SocketStream):
            stream = getattr(stream, "transport_stream", None)
        if stream is not None and stream.socket.family != socket.AF_UNIX and stream.socket.fileno() != -1:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


@attrs.define(eq=False)
class RequestCycle:
    """One request and its response, with the ASGI interface of the application."""

    connection: Connection
    exchange: Exchange
    method: str
    path: str
    #: Whether the rest of its body is discarded after the response, which keeps the connection.
    discards_body: bool
    #: Status of the response, once started; else 0.
    status: int = 0
    #: Set when the response was sent or aborted.
    ended: trio.Event = attrs.field(factory=trio.Event)
    _started_at: float = attrs.field(factory=time.monotonic)
    #: A head that is sent together with the first bytes of its body.
    _held: list[bytes] = attrs.field(factory=list)
    _body: tuple[trio.MemorySendChannel[Message], trio.MemoryReceiveChannel[Message]] = attrs.field(
        factory=lambda: trio.open_memory_channel[Message](BODY_PIECES)
    )

    # -- for the connection

    async def put(self, message: Message) -> None:
        """Pass a piece of the body to the handler; waits while too many are buffered."""
        try:
            try:
                self._body[0].send_nowait(message)
            except trio.WouldBlock:
                await self._body[0].send(message)
        except _GONE:
            return  # the handler does not read the rest

    def close(self) -> None:
        """End the body: no more of it will arrive or is needed."""
        self._body[0].close()

    def abort(self) -> None:
        """Cancel the handler, because the connection has ended."""
        self.exchange.abort()
        self.close()

    def log_response(self) -> None:
        """Log the completed response; of the URL only the path."""
        took_s = round(time.monotonic() - self._started_at, 4)
        log.debug("response sent", method=self.method, path=self.path, status=self.status, took_s=took_s)

    # -- for the application

    async def receive(self) -> Message:
        """Return the next piece of the body; after the body, a disconnect message."""
        http = self.connection.http
        if not self.status and not self.connection.done and http.they_are_waiting_for_100_continue:
            await self.connection.transmit([http.send(_CONTINUE)])
        try:
            return await self._body[1].receive()
        except trio.EndOfChannel:
            return _DISCONNECT

    async def send(self, message: Message) -> None:
        """Send a part of the response; waits while the client does not read.

        Raises:
            RuntimeError: the message is not valid in ASGI at this point.
            h11.LocalProtocolError: the response is not valid HTTP.
        """
        kind = message["type"]
        if kind not in ("http.response.start", "http.response.body") or self.exchange.answered:
            raise RuntimeError(f"{kind} is not valid here, or was sent after the end of the response")
        if self.connection.done:
            await trio.lowlevel.checkpoint()
            return
        await self.connection.transmit(self._head(message) if kind == "http.response.start" else self._part(message))
        if kind == "http.response.body" and not message.get("more_body", False):
            await self.connection.conclude(self)

    def _head(self, message: Message) -> list[bytes]:
        headers = [(bytes(name).strip(), bytes(value).strip()) for name, value in message.get("headers", ())]
        has_length = any(name.lower() == b"content-length" for name, _value in headers)
        headers.append((b"date", _date_at(int(time.time()))))
        if self.connection.context.leaving:
            headers.append((b"connection", b"close"))
        head = self.connection.http.send(h11.Response(status_code=message["status"], headers=headers))
        self.status = message["status"]
        if not has_length:
            return [head]  # a streamed body may take long to start
        self._held.append(head)
        return []

    def _part(self, message: Message) -> list[bytes]:
        http, data = self.connection.http, message.get("body", b"")
        pieces, self._held = self._held, []
        if data and self.method != "HEAD" and self.status not in (204, 304):
            pieces += http.send_with_data_passthrough(h11.Data(data=data)) or ()
        if not message.get("more_body", False):
            pieces += http.send_with_data_passthrough(h11.EndOfMessage()) or ()
            self.exchange.answered = True
        return pieces
