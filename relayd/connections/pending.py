"""A connection before its login, and the slot by which connections are counted."""

from collections.abc import Callable

import attrs
import structlog

from protocol.link.websocket_frames import POLICY_VIOLATION
from protocol.wire.errors import ErrorCode, ProtocolError, TextReceived
from relayd.connections.budget import ConnectionSlot
from relayd.connections.connection import NO_TEXT, send_protocol_error
from relayd.net.socket_link import INTERNAL_LOG, INTERNAL_MESSAGE, SocketLink

log = structlog.get_logger("relayd.wire")


@attrs.define(eq=False)
class PendingConnection:
    """A connection of the reactor between its handshake and its login, as the handler of its link.

    Args:
        link: the link of the connection.
        connection_slot: the slot of the connection.
        log_in: called with this object, the first message, which must be the hello, and the messages behind it.
        due: Trio time by which the hello must arrive.
        timeout_s: the time allowed for the hello, from the handshake on.
    """

    link: SocketLink
    connection_slot: ConnectionSlot
    log_in: "Callable[[PendingConnection, bytes, list[bytes]], None]"
    due: float
    timeout_s: float
    waiting: bool = True

    def on_messages(self, messages: list[bytes]) -> None:
        """See `protocol.link.limits.LinkHandler`; the first message must be the hello."""
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
        """Close the connection if it has sent no hello."""
        if self.waiting:
            self.waiting = False
            try:
                send_protocol_error(self.link, HelloMissing(self.timeout_s))
            except Exception:
                log.exception(INTERNAL_LOG, peer=self.link.peer)
                self.link.abort(INTERNAL_MESSAGE)


class HelloMissing(ProtocolError):
    """No `hello` was received in time. The network may have been interrupted, so the peer may try again."""

    code = ErrorCode.IDLE_TIMEOUT
    close_code = POLICY_VIOLATION

    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"no hello within {timeout_s:g} s; connect again")
