"""A connection before its login."""

from collections.abc import Callable

import attrs
import structlog

from protocol.link.websocket_frames import POLICY_VIOLATION
from protocol.wire.errors import ErrorCode, ProtocolError, TextReceived
from relayd.auth.tokens import PeerCredentials
from relayd.connections.connection import NO_TEXT, send_protocol_error
from relayd.net.socket_link import INTERNAL_LOG, INTERNAL_MESSAGE, SocketLink

log = structlog.get_logger("relayd.wire")


@attrs.define(eq=False)
class ConnectionSlot:
    """A connection's place among those that are counted, from its first byte to its last, logged in or not.

    Args:
        peer: where the connection comes from, for logs.
        credentials: of a unix socket's peer.
        on_left: called once, when the connection leaves its place.
    """

    peer: str
    credentials: PeerCredentials | None
    on_left: Callable[[], None]
    _left: bool = False

    def release(self) -> None:
        """Leave the place; without effect after the first call."""
        if not self._left:
            self._left = True
            self.on_left()


@attrs.define(eq=False)
class PendingConnection:
    """A connection of the reactor's between its handshake and its login; it handles its link's messages meanwhile.

    Args:
        link: the connection's.
        connection_slot: the connection's.
        log_in: called with this object, the first message, which is the hello, and the messages behind it.
        due: Trio time by which the hello must come.
        patience_s: how long that is after the handshake.
    """

    link: SocketLink
    connection_slot: ConnectionSlot
    log_in: "Callable[[PendingConnection, bytes, list[bytes]], None]"
    due: float
    patience_s: float
    waiting: bool = True

    def on_messages(self, messages: list[bytes]) -> None:
        """See `protocol.link.limits.LinkHandler`: the first is the hello."""
        self.waiting = False
        self.log_in(self, messages[0], messages[1:])

    def on_text(self, text: str) -> None:
        """See `protocol.link.limits.LinkHandler`."""
        self.waiting = False
        send_protocol_error(self.link, TextReceived(NO_TEXT))

    def on_closed(self) -> None:
        """See `protocol.link.limits.LinkHandler`."""
        self.waiting = False
        log.debug("connection lost", peer=self.link.peer, why=self.link.reason)

    def on_transport_closed(self) -> None:
        """See `protocol.link.limits.LinkHandler`."""
        self.connection_slot.release()

    def time_out(self) -> None:
        """Close the connection if its hello has not come."""
        if self.waiting:
            self.waiting = False
            try:
                send_protocol_error(self.link, HelloMissing(self.patience_s))
            except Exception:
                log.exception(INTERNAL_LOG, peer=self.link.peer)
                self.link.abort(INTERNAL_MESSAGE)


class HelloMissing(ProtocolError):
    """No `hello` came in time. The network may have stood still, so the peer may try again."""

    code = ErrorCode.IDLE_TIMEOUT
    close_code = POLICY_VIOLATION

    def __init__(self, patience_s: float) -> None:
        super().__init__(f"no hello within {patience_s:g} s; connect again")
