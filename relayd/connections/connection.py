"""A connection that has logged in, and how a connection is closed with an error."""

from collections.abc import Callable
from typing import Protocol

import attrs
import structlog
import trio

from protocol.link.base import Link
from protocol.link.websocket_frames import INTERNAL_ERROR
from protocol.wire.errors import ErrorCode, LinkError, ProtocolError, TextReceived
from protocol.wire.messages import Error
from relayd.auth.tokens import Principal
from relayd.core.principals import PrincipalUsage
from relayd.core.relay import Relay
from relayd.logs.flood import LogFlood
from relayd.net.socket_link import INTERNAL_LOG, INTERNAL_MESSAGE

log = structlog.get_logger("relayd.wire")

_protocol_faults = LogFlood()
NO_TEXT = "text message; every message is binary (msgpack)"


class RoleHandler(Protocol):
    """Handles the messages of a connection that has logged in, as a client, a worker or an operator."""

    def on_messages(self, messages: list[bytes]) -> int:
        """Handle messages, in order, for as long as the principal has its share of the event loop's time.

        Returns:
            how many were handled; the rest come again.

        Raises:
            ProtocolError: the peer broke the rules.
        """

    def close(self) -> None:
        """Release everything that the connection holds, after its link has ended."""


@attrs.define(eq=False)
class Connection:
    """A connection that has logged in, as the handler of its link. Its methods raise no exceptions."""

    connection_id: str
    link: Link
    principal: Principal
    relay: Relay
    #: Called when the transport is closed.
    release_slot: Callable[[], None]
    #: The peer's program and version.
    agent: str = ""
    #: Whether the peer said that it knows `video` frames.
    knows_video: bool = False
    connected_at: float = attrs.field(factory=trio.current_time)
    role_handler: RoleHandler | None = None
    #: What its principal uses; None for one that is not limited.
    usage: PrincipalUsage | None = None

    def begin(self) -> None:
        """Start handling messages; the role handler must be set."""
        self.relay.connections[self.connection_id] = self
        self.link.set_handler(self)

    def disconnect(self, reason: str) -> None:
        """End the connection now."""
        self.link.abort(reason)

    def on_messages(self, messages: list[bytes]) -> None:
        """See `protocol.link.limits.LinkHandler`."""
        assert self.role_handler is not None
        try:
            handled = self.role_handler.on_messages(messages)
            if handled < len(messages) and self.usage is not None and not self.link.closed_here:
                self.link.pause(messages[handled:])
                self.relay.principals.defer(self.usage, self)
        except ProtocolError as fault:
            send_protocol_error(self.link, fault, self.principal.name)
        except Exception:
            log.exception(INTERNAL_LOG, peer=self.link.peer)
            self.send_internal_error()

    def resume(self) -> None:
        """Handle messages again: the principal has its turn."""
        self.link.set_handler(self)

    def send_internal_error(self) -> None:
        """Send the error `internal`, and close; the caller has logged the exception."""
        send_error_and_close(self.link, ErrorCode.INTERNAL, INTERNAL_MESSAGE, INTERNAL_ERROR)

    def on_text(self, text: str) -> None:
        """See `protocol.link.limits.LinkHandler`."""
        send_protocol_error(self.link, TextReceived(NO_TEXT), self.principal.name)

    def on_closed(self) -> None:
        """See `protocol.link.limits.LinkHandler`."""
        link, relay = self.link, self.relay
        try:
            if self.role_handler is not None:
                self.role_handler.close()
        except Exception:
            log.exception(INTERNAL_LOG, peer=link.peer)
        finally:
            del relay.connections[self.connection_id]
            relay.slow_consumers += link.stalled
            log_event = log.warning if link.stalled else log.info
            if (more := log_lines(self.usage)) is not None:
                why = link.reason or "closed"
                log_event("disconnected", peer=link.peer, principal=self.principal.name, why=why, **more)

    def on_transport_closed(self) -> None:
        """See `protocol.link.limits.LinkHandler`."""
        self.release_slot()


def log_lines(usage: PrincipalUsage | None) -> dict[str, int] | None:
    """See `LogFlood.fields`, for a line about a connection of a principal: each floods only its own lines."""
    return usage.log_flood.fields() if usage is not None else {}


def send_protocol_error(link: Link, fault: ProtocolError, principal: str | None = None) -> None:
    """The peer broke a rule: send an error that names it, and close; `principal` is who it is, after the login."""
    if (more := _protocol_faults.fields()) is not None:
        log.warning("peer violated the protocol", peer=link.peer, principal=principal, why=str(fault), **more)
    send_error_and_close(link, fault.code, str(fault), fault.close_code)


def send_error_and_close(link: Link, code: str, message: str, close_code: int) -> None:
    """Send an error, and close."""
    try:
        link.send(Error(code=code, message=message))
    except LinkError:
        return
    link.close_soon(close_code, message)
