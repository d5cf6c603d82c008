"""Serves HTTP connections and the application's WebSockets, and closes them at shutdown."""

from collections.abc import Callable
from urllib.parse import unquote

import attrs
import structlog
import trio
from starlette.applications import Starlette
from starlette.routing import Match

from protocol.wire.messages import PATH
from relayd.http.connection import CLOSE_S, Connection
from relayd.http.context import Exchange, HttpContext, Slot
from relayd.http.websocket import WebSocketSession
from relayd.net.hang_up import answer_and_hang_up
from relayd.net.http_head import PrefixedStream, split_head
from relayd.net.websocket_handshake import HandshakeRejected, parse_head

log = structlog.get_logger("relayd.http")

#: Interval of checking whether the last responses were sent.
POLL_S = 0.02


@attrs.frozen
class Door:
    """A further port, with an application of its own.

    Args:
        listen: `HOST:PORT`.
        setting: where that can be changed, for errors.
        make_app: makes the application.
    """

    listen: str
    setting: str
    make_app: Callable[[HttpContext], Starlette]


@attrs.define(eq=False)
class HttpServer:
    """Serves an HTTP application on connections whose first bytes were already read."""

    context: HttpContext
    app: Starlette
    _open: set[Connection] = attrs.field(factory=set)
    _sockets: set[WebSocketSession] = attrs.field(factory=set)

    async def serve(self, stream: PrefixedStream, slot: Slot, secure: bool) -> bytes:
        """One connection, to its end or to the head of a request for a WebSocket; no fault of it gets out.

        Args:
            stream: TLS already spoken.
            slot: counts the connection, and knows where it comes from.
            secure: whether it is TLS.

        Returns:
            The head of a WebSocket request and the data after it: proxies that reuse connections send one after other
            requests. The stream is then open and belongs to the caller. Else empty.
        """
        connection = Connection(self.app, self.context, stream, slot, secure)
        self._open.add(connection)
        self.context.connections += 1
        try:
            await connection.serve()
        except Exception:
            log.exception("internal error in connection", peer=slot.peer)
        finally:
            self._open.discard(connection)
            self.context.connections -= 1
        return connection.upgrade

    def has_websocket(self, data: bytes) -> bool:
        """Whether the application has a route for the WebSocket that a head asks for; never for the relay's own."""
        try:
            path = parse_head(split_head(data)[0]).path
        except HandshakeRejected:
            return False
        scope = {"type": "websocket", "path": unquote(path), "root_path": "", "headers": []}
        return path != PATH and any(route.matches(scope)[0] is Match.FULL for route in self.app.routes)

    async def serve_websocket(self, stream: trio.abc.Stream, data: bytes, slot: Slot, secure: bool) -> None:
        """One WebSocket of the application, from its handshake to its end; no fault of it gets out.

        Args:
            stream: as for `serve`.
            data: the head of its request, and the bytes received behind it.
            slot: as for `serve`.
            secure: as for `serve`.
        """
        text, early = split_head(data)
        session = WebSocketSession(
            self.app, self.context, stream, Exchange(slot, secure), parse_head(text), text, early
        )
        self._sockets.add(session)
        self.context.connections += 1
        try:
            await session.serve()
        except HandshakeRejected as refusal:
            await answer_and_hang_up(stream, refusal.to_bytes())
        except Exception:
            log.exception("internal error in WebSocket", peer=slot.peer)
        finally:
            self._sockets.discard(session)
            self.context.connections -= 1

    async def close(self) -> None:
        """Accept no more requests: end idle connections and WebSockets now, the others after their responses."""
        self.context.begin_shutdown()
        for connection in self._open:
            connection.end_if_idle()
        with trio.move_on_after(CLOSE_S):
            while self._open or self._sockets:  # noqa: ASYNC110  at most a hundred times, once per daemon
                await trio.sleep(POLL_S)
