"""One HTTP/1.1 connection: h11 parses and frames, and the ASGI application runs over a Trio stream.

The connection's own task reads; each request's handler runs in a task beside it, so that a client that goes away ends
its handler at once. A client that takes nothing is cut off, a response that cannot be finished is cut and not ended,
and a connection is closed in such a way that its last response is not lost to a reset. There is no HTTP/2 here, and
a request for a WebSocket is handed back to whoever opened the connection.
"""

import math
import socket
import struct
import time
from collections.abc import Sequence
from email.utils import formatdate
from functools import lru_cache
from urllib.parse import unquote

import attrs
import h11
import structlog
import trio
from starlette.types import ASGIApp, Message, Scope

from relayd.auth.tokens import PeerCredentials
from relayd.http.context import Exchange, HttpContext
from relayd.http.errors import ResponseAborted
from relayd.net import http_head
from relayd.net.http_head import MAX_HEAD_BYTES, PrefixedStream

log = structlog.get_logger("relayd.http")

READ_BYTES = 64 * 1024
#: What is sent at once: each piece that is taken shows that the client still reads.
SEND_PIECE_BYTES = 64 * 1024
#: Pieces of a request's body, of `READ_BYTES` at most, that wait for a handler; then the client has to wait.
BODY_PIECES = 10
#: How long a connection waits for the client to read its last response and to hang up.
LINGER_S = 2.0
#: What is read meanwhile and thrown away: a client may send all of a body before it looks at the answer.
LINGER_BYTES = 32 * 1024 * 1024
#: Shielded, for closing in order.
CLOSE_S = 2.0
#: `SO_LINGER` of no time: the peer gets a reset, and knows that something is missing.
_RESET = struct.pack("ii", 1, 0)

_ASGI = {"version": "3.0", "spec_version": "2.4"}  # from 2.4 on, nobody has to ask whether the client is still there
_DISCONNECT: Message = {"type": "http.disconnect"}
_LAST_PIECE: Message = {"type": "http.request", "body": b"", "more_body": False}
_CONTINUE = h11.InformationalResponse(status_code=100, headers=[])
_GONE = (trio.BrokenResourceError, trio.ClosedResourceError)


@lru_cache(maxsize=1)
def _date_at(second: int) -> bytes:
    """The value of a `Date` header."""
    return formatdate(second, usegmt=True).encode()


def _fault_of(request: h11.Request) -> int | None:
    """The status that refuses a head to which h11 does not object; None for a good one."""
    names = {name for name, _value in request.headers}
    if not request.http_version.startswith(b"1."):
        return 505
    if {b"content-length", b"transfer-encoding"} <= names:
        return 400  # RFC 9112 section 6.1: a proxy in front may see the body's end elsewhere
    size = len(request.target) + sum(len(name) + len(value) + 4 for name, value in request.headers)
    return 431 if size > MAX_HEAD_BYTES else None  # h11 limits a head only while it is incomplete


def _asks_for_websocket(request: h11.Request) -> bool:
    return any(name == b"upgrade" and value.strip().lower() == b"websocket" for name, value in request.headers)


def _head_of(request: h11.Request) -> bytes:
    """A request's head, as it was sent or nearly so."""
    lines = [request.method + b" " + request.target + b" HTTP/" + request.http_version]
    lines += [name + b": " + value for name, value in request.headers.raw_items()]
    return b"\r\n".join((*lines, b"", b""))


@attrs.define(eq=False)
class Connection:
    """Serves one client, one request after the other.

    Args:
        app: answers the requests.
        context: counts them.
        stream: TLS already spoken.
        peer: where the client comes from, for logs.
        credentials: of a unix socket's peer.
        secure: whether the client speaks TLS.
    """

    app: ASGIApp
    context: HttpContext
    stream: PrefixedStream
    peer: str
    credentials: PeerCredentials | None
    secure: bool
    #: The head that asks for a WebSocket and whatever came behind it, once there is one.
    upgrade: bytes = b""
    #: Nothing more is answered; what still comes is read so that the client reads its response.
    done: bool = False
    http: h11.Connection = attrs.field(factory=lambda: h11.Connection(h11.SERVER, MAX_HEAD_BYTES - 1))
    _reading: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    #: The request that is being answered.
    _cycle: "RequestCycle | None" = None

    async def serve(self) -> None:
        """Read requests and answer them until either side ends it, or asks for a WebSocket."""
        try:
            async with trio.open_nursery() as handlers:
                self._reading.deadline = trio.current_time() + http_head.HEAD_S
                with self._reading:
                    await self._read(handlers)
                if self._cycle is not None:
                    self._cycle.abort()
        finally:
            self._cycle = None  # it knows this connection: a cycle would keep both, and a body, for the collector
            if not self.upgrade:
                with trio.move_on_after(CLOSE_S, shield=True):
                    await self.stream.aclose()

    def end_if_idle(self) -> None:
        """Hang up unless a request is being answered."""
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
        """A request that has begun to come has to come soon."""
        if self._cycle is None and not self.done and self.http.trailing_data[0]:
            self._reading.deadline = min(self._reading.deadline, trio.current_time() + http_head.HEAD_S)

    async def _take_events(self, handlers: trio.Nursery) -> None:
        """Act on all that has been received."""
        while not self.done:
            try:
                event = self.http.next_event()
            except h11.RemoteProtocolError as fault:
                await self._refuse(fault.error_status_hint)
                return
            cycle = self._cycle
            if isinstance(event, h11.Request):
                if (status := _fault_of(event)) is not None:
                    await self._refuse(status)
                elif _asks_for_websocket(event):
                    self.upgrade = _head_of(event) + self.http.trailing_data[0]
                    return
                else:
                    self._begin(event, handlers)
            elif isinstance(event, h11.Data) and cycle is not None:
                await cycle.put({"type": "http.request", "body": bytes(event.data), "more_body": True})
            elif isinstance(event, h11.EndOfMessage) and cycle is not None:
                await cycle.put(_LAST_PIECE)
            elif event is h11.PAUSED and cycle is not None and self.http.trailing_data[0]:
                await cycle.ended.wait()  # the next request has come already
            else:
                return

    def _begin(self, request: h11.Request, handlers: trio.Nursery) -> None:
        """Start the handler of a request."""
        path, _, query = request.target.partition(b"?")
        exchange = Exchange(self.peer, self.credentials, self.secure)
        scope: Scope = {
            "type": "http",
            "asgi": dict(_ASGI),
            "http_version": request.http_version.decode(),
            "method": request.method.decode(),
            "scheme": "https" if self.secure else "http",
            "path": unquote(path.decode()),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": list(request.headers),
            "client": None,
            "server": None,
            "state": {"exchange": exchange},
            "extensions": {},
        }
        self._cycle = cycle = RequestCycle(self, exchange, scope["method"], scope["path"])
        self._reading.deadline = math.inf
        handlers.start_soon(self._answer, cycle, scope)

    # -- answering

    async def _answer(self, cycle: "RequestCycle", scope: Scope) -> None:
        """Run one handler; a fault of it ends its response alone."""
        exchange = cycle.exchange
        self.context.exchanges.add(exchange)
        try:
            with exchange.scope:
                await self.app(scope, cycle.receive, cycle.send)
        except ResponseAborted:
            self._cut()
        except Exception:
            log.exception("internal error in HTTP handler", path=cycle.path, peer=exchange.peer)
        finally:
            self.context.exchanges.discard(exchange)
            cycle.close()
        if not exchange.answered and not self.done:
            if cycle.status or exchange.gone:  # it fell midway; or its client left, or has a token no more
                self._cut()
            else:
                await self._end_with(500)
        cycle.ended.set()

    async def conclude(self, cycle: "RequestCycle") -> None:
        """A response is out: wait for the next request, or end the connection."""
        cycle.close()
        if self._cycle is cycle and not self.done:
            self._cycle = None
            cycle.log_answer()
            if self.http.our_state is self.http.their_state is h11.DONE and not self.context.leaving:
                self.http.start_next_cycle()
                self._reading.deadline = trio.current_time() + self.context.relay.config.http.keep_alive_s
            else:
                await self._finish()
        cycle.ended.set()

    async def transmit(self, pieces: Sequence[bytes]) -> None:
        """Send bytes, for as long as the client takes them; else the connection is cut."""
        if sum(map(len, pieces)) <= SEND_PIECE_BYTES:
            pieces = [b"".join(pieces)]  # and not a system call, and a packet, for each
        for piece in pieces:
            for start in range(0, len(piece), SEND_PIECE_BYTES):
                if not await self._send(memoryview(piece)[start : start + SEND_PIECE_BYTES]):
                    self._cut()
                    return

    async def _send(self, data: memoryview) -> bool:
        """Whether the client has taken it."""
        stall_timeout_s = self.context.relay.config.limits.stall_timeout_s
        with trio.move_on_after(stall_timeout_s):
            try:
                await self.stream.send_all(data)
            except _GONE:
                return False
            return True
        log.warning("client took no data", peer=self.peer, for_s=stall_timeout_s)
        self.context.relay.slow_consumers += 1
        return False

    # -- the end

    async def _refuse(self, status: int) -> None:
        """What was received is not HTTP as it may be spoken here: answer that if it can be, and end the connection."""
        self.done = True
        if self._cycle is not None:
            self._cycle.abort()
            await self._cycle.ended.wait()
        if self.http.our_state is h11.SEND_BODY:
            self._cut()
        else:
            await self._end_with(status)

    async def _end_with(self, status: int) -> None:
        """Answer with a status alone where nothing has been answered yet, and end the connection."""
        self.done = True
        if self.http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            date = _date_at(int(time.time()))
            headers = [(b"date", date), (b"content-length", b"0"), (b"connection", b"close")]
            head = self.http.send(h11.Response(status_code=status, headers=headers))
            await self.transmit([head, self.http.send(h11.EndOfMessage())])
        await self._finish()

    async def _finish(self) -> None:
        """Nothing more will be said; wait a little for the client to hang up, or a reset could overtake the rest."""
        self.done = True
        self._reading.deadline = min(self._reading.deadline, trio.current_time() + LINGER_S)
        try:
            await self.stream.send_eof()
        except (*_GONE, trio.BusyResourceError):
            self._reading.cancel()

    def _cut(self) -> None:
        """End the connection at once; the client gets a reset, so that it takes nothing for whole."""
        self.done = True
        self._reading.cancel()
        stream: trio.abc.Stream | None = self.stream
        while stream is not None and not isinstance(stream, trio.SocketStream):
            stream = getattr(stream, "transport_stream", None)
        if stream is not None and stream.socket.family != socket.AF_UNIX and stream.socket.fileno() != -1:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


@attrs.define(eq=False)
class RequestCycle:
    """One request and its response, as the application sees them."""

    connection: Connection
    exchange: Exchange
    method: str
    path: str
    #: Of the response, once its head was given.
    status: int = 0
    #: The response is out, or never will be.
    ended: trio.Event = attrs.field(factory=trio.Event)
    _begun: float = attrs.field(factory=time.monotonic)
    #: A head that goes out with the first bytes of its body.
    _held: list[bytes] = attrs.field(factory=list)
    _body: tuple[trio.MemorySendChannel[Message], trio.MemoryReceiveChannel[Message]] = attrs.field(
        factory=lambda: trio.open_memory_channel[Message](BODY_PIECES)
    )

    # -- for the connection

    async def put(self, message: Message) -> None:
        """Give a piece of the body to the handler; waits while that has too many."""
        try:
            try:
                self._body[0].send_nowait(message)
            except trio.WouldBlock:
                await self._body[0].send(message)
        except _GONE:
            return  # the handler wants no more of it

    def close(self) -> None:
        """No more of the body will come, or is wanted."""
        self._body[0].close()

    def abort(self) -> None:
        """The client has left."""
        self.exchange.abort()
        self.close()

    def log_answer(self) -> None:
        """The response is out; no more of the URL is logged than its path."""
        took_s = round(time.monotonic() - self._begun, 4)
        log.debug("answered", method=self.method, path=self.path, status=self.status, took_s=took_s)

    # -- for the application

    async def receive(self) -> Message:
        """The next piece of the body, then that the client has left."""
        http = self.connection.http
        if not self.status and not self.connection.done and http.they_are_waiting_for_100_continue:
            await self.connection.transmit([http.send(_CONTINUE)])
        try:
            return await self._body[1].receive()
        except trio.EndOfChannel:
            return _DISCONNECT

    async def send(self, message: Message) -> None:
        """Send a part of the response; waits while the client takes nothing.

        Raises:
            RuntimeError: ASGI knows no such message here.
            h11.LocalProtocolError: it is not HTTP.
        """
        kind = message["type"]
        if kind not in ("http.response.start", "http.response.body") or self.exchange.answered:
            raise RuntimeError(f"{kind} has no place here, or came after the end of the response")
        if self.connection.done:
            await trio.lowlevel.checkpoint()
            return
        await self.connection.transmit(self._head(message) if kind == "http.response.start" else self._part(message))
        if kind == "http.response.body" and not message.get("more_body", False):
            await self.connection.conclude(self)

    def _head(self, message: Message) -> list[bytes]:
        headers = [(bytes(name).strip(), bytes(value).strip()) for name, value in message.get("headers", ())]
        whole = any(name.lower() == b"content-length" for name, _value in headers)
        headers.append((b"date", _date_at(int(time.time()))))
        if self.connection.context.leaving:
            headers.append((b"connection", b"close"))
        head = self.connection.http.send(h11.Response(status_code=message["status"], headers=headers))
        self.status = message["status"]
        if not whole:
            return [head]  # its body is made while it is sent: that may take long to begin
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
