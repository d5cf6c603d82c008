"""HTTP/1.1 over one stream: Hypercorn's protocol, on a connection of ours.

Hypercorn parses, frames and drives the ASGI application. What it leaves open is here: a client that goes away ends
its handler at once, one that takes nothing is cut off, a response that cannot be finished is cut and not ended, and a
connection is closed so that its last response is not lost to a reset. HTTP/2 and WebSockets are no part of it.
"""

import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any, cast

import attrs
import h11
import structlog
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config as HypercornConfig
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import Request as RequestHead
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ASGISendEvent, ConnectionState, Scope, TaskGroup
from starlette.types import ASGIApp

from relayd.auth.tokens import PeerCredentials
from relayd.http.context import Exchange, HttpContext
from relayd.http.errors import ResponseAborted
from relayd.net import http_head
from relayd.net.http_head import MAX_HEAD_BYTES, PrefixedStream

log = structlog.get_logger("relayd.http")

READ_BYTES = 64 * 1024
#: What is sent at once: each piece that is taken shows that the client still reads.
SEND_PIECE_BYTES = 64 * 1024
#: How long a connection waits for the client to read its last response and to hang up.
LINGER_S = 2.0
#: What is read meanwhile and thrown away: a client may send all of a body before it looks at the answer.
LINGER_BYTES = 32 * 1024 * 1024
#: Shielded, for closing in order.
CLOSE_S = 2.0
#: Between two looks at whether the last responses have gone out.
LOOK_S = 0.02
#: `SO_LINGER` of no time: the peer gets a reset, and knows that something is missing.
_RESET = struct.pack("ii", 1, 0)

Put = Callable[[Any], Awaitable[None]]


class _AccessLog:
    """In place of Hypercorn's own log: ours says it, and never says more of a URL than its path."""

    def __init__(self, config: HypercornConfig) -> None:
        pass

    async def access(self, request: Any, response: Any, request_time: float) -> None:
        """One request was answered."""
        if response:  # else its client left, which may be told of one that was answered, too
            told = {"method": request["method"], "path": request["path"], "status": response["status"]}
            log.debug("answered", **told, took_s=round(request_time, 4))

    async def exception(self, message: str, *_: Any, **__: Any) -> None:
        """Hypercorn fell over something."""
        log.exception(message)


@attrs.define(eq=False)
class HttpServer:
    """Serves the HTTP application to connections whose first bytes were read already."""

    context: HttpContext
    app: ASGIApp
    _config: HypercornConfig = attrs.field(init=False)
    _worker_context: WorkerContext = attrs.field(factory=lambda: WorkerContext(None))
    _open: set["_Connection"] = attrs.field(factory=set)

    def __attrs_post_init__(self) -> None:
        config = HypercornConfig()
        config.h11_max_incomplete_size = MAX_HEAD_BYTES - 1  # what was too long to be read must be too long for it
        config.include_server_header = False
        config.logger_class = cast(Any, _AccessLog)
        self._config = config

    async def serve(
        self, stream: PrefixedStream, peer: str, credentials: PeerCredentials | None, secure: bool
    ) -> bytes:
        """One connection, to its end or to the head of a request for a WebSocket; no fault of it gets out.

        Args:
            stream: TLS already spoken.
            peer: where it comes from, for logs.
            credentials: of a unix socket's peer.
            secure: whether it is TLS.

        Returns:
            That head, where one came behind other requests, as a proxy sends it that keeps its connections: the
            stream is open then, and somebody else's. Else nothing.
        """
        connection = _Connection(self, stream, Exchange(peer, credentials, secure))
        self._open.add(connection)
        self.context.connections += 1
        try:
            await connection.serve()
        except Exception:
            log.exception("internal error in connection", peer=peer)
        finally:
            self._open.discard(connection)
            self.context.connections -= 1
            connection.release()
        return connection.upgrade

    async def close(self) -> None:
        """Take no more requests: idle connections end now, others with their response, and who waits is told why."""
        await self._worker_context.terminated.set()
        self.context.begin_shutdown()
        for connection in self._open:
            connection.end_if_idle()
        with trio.move_on_after(CLOSE_S):
            while self._open:  # noqa: ASYNC110  at most a hundred times, and once in a daemon's life
                await trio.sleep(LOOK_S)


class _Http(H11Protocol):
    """Hypercorn's HTTP/1.1 without its ways to other protocols."""

    #: A request for a WebSocket, and whatever came behind it: nothing is done about it here.
    upgrade = b""

    async def _check_protocol(self, event: h11.Request) -> None:
        """No upgrade to HTTP/2: its streams have limits of their own, which nothing here watches."""

    async def _create_stream(self, request: h11.Request) -> None:
        size = len(request.target) + sum(len(name) + len(value) + 4 for name, value in request.headers)
        if size > MAX_HEAD_BYTES:  # h11 minds only what is too long before it is whole
            await self._send_error_response(431)
            await self.send(Closed())
            return
        if any((name, value.strip().lower()) == (b"upgrade", b"websocket") for name, value in request.headers):
            self.upgrade = _head_of(request) + self.connection.trailing_data[0]
            return
        self.stream = HTTPStream(
            self.app,
            self.config,
            self.context,
            self.task_group,
            self.ssl,
            self.client,
            self.server,
            self.stream_send,
            STREAM_ID,
        )
        await self.stream.handle(
            RequestHead(
                stream_id=STREAM_ID,
                headers=list(request.headers),
                http_version=request.http_version.decode(),
                method=request.method.decode("ascii").upper(),
                raw_path=request.target,
                state=self.connection_state,
            )
        )
        self.keep_alive_requests += 1

    @property
    def idle(self) -> bool:
        """Whether no request is being read or answered."""
        return self.stream is None

    @property
    def has_part_of_a_head(self) -> bool:
        """Whether a request has begun to come."""
        return self.stream is None and bool(self.connection.trailing_data[0])


def _head_of(request: h11.Request) -> bytes:
    """A request's head, as it was sent or nearly so."""
    lines = [request.method + b" " + request.target + b" HTTP/" + request.http_version]
    lines += [name + b": " + value for name, value in request.headers.raw_items()]
    return b"\r\n".join((*lines, b"", b""))


class _Connection:
    """One connection: a reader, and a task for each request's handler."""

    def __init__(self, door: HttpServer, stream: PrefixedStream, template: Exchange) -> None:
        self.door = door
        self.stream = stream
        self.template = template
        self._sending = trio.Lock()
        self._reading = trio.CancelScope()
        self._nursery: trio.Nursery
        self._protocol = _Http(
            ASGIWrapper(cast(Any, door.app)),
            door._config,
            cast(Any, door._worker_context),
            cast(TaskGroup, self),
            cast(ConnectionState, {}),
            template.secure,
            None,
            None,
            self.send,
        )
        #: Nothing more is answered; what still comes is read so that the client reads its response.
        self._done = False
        #: The head that asks for a WebSocket, once there is one.
        self.upgrade = b""

    async def serve(self) -> None:
        """Read requests and answer them until either side ends it, or asks for a WebSocket."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._reading.deadline = trio.current_time() + http_head.HEAD_S
                with self._reading:
                    await self._read()
                await self._protocol.handle(Closed())
        finally:
            if not self.upgrade:
                with trio.move_on_after(CLOSE_S, shield=True):
                    await self.stream.aclose()

    async def _read(self) -> None:
        lingered = 0
        while lingered < LINGER_BYTES:
            try:
                data = await self.stream.receive_some(READ_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return
            if not data:
                return
            if self._done:
                lingered += len(data)
                continue
            await self._protocol.handle(RawData(bytes(data)))
            if self._protocol.upgrade:
                self.upgrade = self._protocol.upgrade
                return
            if self._protocol.has_part_of_a_head and not self._done:
                self._reading.deadline = min(self._reading.deadline, trio.current_time() + http_head.HEAD_S)

    def release(self) -> None:
        """Drop what was received and not read, once the connection is over.

        It, Hypercorn's protocol and the stream of a request refer to each other, and would keep all of it until a
        garbage collection.
        """
        self._protocol.stream = None
        del self._protocol

    def end_if_idle(self) -> None:
        """Hang up unless a request is being answered."""
        if self._protocol.idle:
            self._reading.cancel()

    # -- what Hypercorn's protocol calls

    async def send(self, event: Event) -> None:
        """Bytes for the client, the end of the connection, or whether it idles."""
        if isinstance(event, RawData):
            await self._send_bytes(event.data)
        elif isinstance(event, Closed):
            await self._finish()
        elif isinstance(event, Updated):
            idle_s = self.door.context.relay.config.http.keep_alive_s if event.idle else float("inf")
            self._reading.deadline = trio.current_time() + idle_s

    async def _send_bytes(self, data: bytes) -> None:
        stall_timeout_s = self.door.context.relay.config.limits.stall_timeout_s
        view = memoryview(data)
        async with self._sending:
            while view:
                with trio.move_on_after(stall_timeout_s) as patience:
                    try:
                        await self.stream.send_all(view[:SEND_PIECE_BYTES])
                    except (trio.BrokenResourceError, trio.ClosedResourceError):
                        break  # it went away
                if patience.cancelled_caught:
                    log.warning("client took no data", peer=self.template.peer, for_s=stall_timeout_s)
                    self.door.context.relay.slow_consumers += 1
                    break
                view = view[SEND_PIECE_BYTES:]
            else:
                return
        self._cut()

    def _cut(self) -> None:
        """End the connection without a word."""
        self._done = True
        self._reset()
        self._reading.cancel()

    def _reset(self) -> None:
        stream: trio.abc.Stream | None = self.stream
        while stream is not None and not isinstance(stream, trio.SocketStream):
            stream = getattr(stream, "transport_stream", None)
        if stream is not None and stream.socket.family != socket.AF_UNIX and stream.socket.fileno() != -1:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)

    async def _finish(self) -> None:
        """Nothing more will be said; wait a little for the client to hang up, or a reset could overtake the rest."""
        self._done = True
        self._reading.deadline = min(self._reading.deadline, trio.current_time() + LINGER_S)
        try:
            await self.stream.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
            self._reading.cancel()
        await self._protocol.handle(Closed())

    async def spawn_app(
        self,
        app: AppWrapper,
        config: HypercornConfig,
        scope: Scope,
        send: Callable[[ASGISendEvent | None], Awaitable[None]],
    ) -> Put:
        """Start the handler of one request; what comes for it is given to the function that is returned."""
        exchange = attrs.evolve(self.template, scope=trio.CancelScope())
        told = cast(dict[str, Any], scope)
        told["state"]["exchange"] = exchange
        # From 2.4 on an application is told by an exception that its client is gone; here its scope is cancelled.
        told["asgi"]["spec_version"] = "2.4"
        into, out = trio.open_memory_channel[Any](config.max_app_queue_size)
        self._nursery.start_soon(self._answer, app, scope, out, send, exchange)

        async def put(event: Any) -> None:
            try:
                if event["type"] == "http.disconnect":
                    exchange.abort()
                    into.send_nowait(event)
                else:
                    await into.send(event)
            except (trio.BrokenResourceError, trio.WouldBlock):
                return  # the handler wants no more of it

        return put

    async def _answer(
        self,
        app: AppWrapper,
        scope: Scope,
        out: trio.MemoryReceiveChannel[Any],
        send: Callable[[ASGISendEvent | None], Awaitable[None]],
        exchange: Exchange,
    ) -> None:
        """Run one handler; a fault of it ends its response alone."""

        async def pass_on(event: ASGISendEvent | None) -> None:
            if event is not None and event["type"] == "http.response.body" and not event.get("more_body"):
                exchange.answered = True
            await send(event)

        exchanges, told = self.door.context.exchanges, cast(dict[str, Any], scope)
        exchanges.add(exchange)
        try:
            with out, exchange.scope:
                await app(cast(Any, scope), out.receive, cast(Any, pass_on), cast(Any, None), cast(Any, None))
        except ResponseAborted:
            self._cut()
        except Exception:
            log.exception("internal error in HTTP handler", path=told["path"], peer=exchange.peer)
            if exchange.answered:
                return
        finally:
            exchanges.discard(exchange)
        if exchange.gone and not self._done and exchange.scope.cancelled_caught:
            self._cut()  # its token is good for nothing any more, or it hung up
            return
        exchange.answered = True
        await send(None)

    def spawn(self, func: Callable[..., Awaitable[Any]], *args: Any) -> None:
        """Hypercorn's protocol asks for no other tasks."""
        self._nursery.start_soon(func, *args)
