"""Serves HTTP connections, and closes them at shutdown."""

import attrs
import structlog
import trio
from starlette.types import ASGIApp

from relayd.http.connection import CLOSE_S, Connection
from relayd.http.context import HttpContext, Slot
from relayd.net.http_head import PrefixedStream

log = structlog.get_logger("relayd.http")

#: Interval of checking whether the last responses were sent.
POLL_S = 0.02


@attrs.define(eq=False)
class HttpServer:
    """Serves the HTTP application on connections whose first bytes were already read."""

    context: HttpContext
    app: ASGIApp
    _open: set[Connection] = attrs.field(factory=set)

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

    async def close(self) -> None:
        """Accept no more requests: end idle connections now, the others after their responses."""
        self.context.begin_shutdown()
        for connection in self._open:
            connection.end_if_idle()
        with trio.move_on_after(CLOSE_S):
            while self._open:  # noqa: ASYNC110  at most a hundred times, once per daemon
                await trio.sleep(POLL_S)
