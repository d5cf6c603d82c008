"""Serves HTTP connections, and closes them at the end."""

import attrs
import structlog
import trio
from starlette.types import ASGIApp

from relayd.auth.tokens import PeerCredentials
from relayd.http.connection import CLOSE_S, Connection
from relayd.http.context import HttpContext
from relayd.net.http_head import PrefixedStream

log = structlog.get_logger("relayd.http")

#: Between two looks at whether the last responses have gone out.
LOOK_S = 0.02


@attrs.define(eq=False)
class HttpServer:
    """Serves the HTTP application to connections whose first bytes were read already."""

    context: HttpContext
    app: ASGIApp
    _open: set[Connection] = attrs.field(factory=set)

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
        connection = Connection(self.app, self.context, stream, peer, credentials, secure)
        self._open.add(connection)
        self.context.connections += 1
        try:
            await connection.serve()
        except Exception:
            log.exception("internal error in connection", peer=peer)
        finally:
            self._open.discard(connection)
            self.context.connections -= 1
        return connection.upgrade

    async def close(self) -> None:
        """Take no more requests: idle connections end now, others with their response, and who waits is told why."""
        self.context.begin_shutdown()
        for connection in self._open:
            connection.end_if_idle()
        with trio.move_on_after(CLOSE_S):
            while self._open:  # noqa: ASYNC110  at most a hundred times, and once in a daemon's life
                await trio.sleep(LOOK_S)
