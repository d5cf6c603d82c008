"""The limits that a link enforces on its peer, and the interface that receives its messages."""

from typing import Protocol

import attrs

from protocol.link.websocket_frames import PartialBudget
from protocol.wire.frames import MAX_MESSAGE_BYTES
from protocol.wire.validators import Message

PING_INTERVAL_S = 5.0
#: Time in which three pings stay unanswered and no other byte arrives.
DEAD_AFTER_S = 15.0
#: Time in which the peer must accept some of what is queued; a peer that accepts a little at a time is merely slow.
SEND_TIMEOUT_S = 60.0
#: Time for a peer that broke a rule to read the reason: closing a socket with unread bytes resets the connection, and
#: the reason is lost.
LINGER_S = 2.0
#: Eight of the largest messages.
MAX_INBOX_BYTES = 8 * MAX_MESSAGE_BYTES
#: Overhead counted for each message in addition to its bytes, so that a queue of tiny messages is bounded too.
MESSAGE_COST_BYTES = 64
#: Limit for messages queued but not accepted by the transport: a quarter of the largest result.
MAX_BACKLOG_BYTES = 16 * MAX_MESSAGE_BYTES


@attrs.frozen
class LinkLimits:
    """The limits that a link enforces on its peer; many links share one instance.

    Args:
        ping_interval_s: seconds between WebSocket pings.
        dead_after_s: seconds of silence after which the link is broken.
        send_timeout_s: if data is queued and the peer accepts none for this many seconds, the link breaks
            ("slow_consumer").
        max_backlog_bytes: the link breaks in the same way if more than this is queued.
        farewell: message sent to such a peer in place of what it did not read; the link is then closed within twice
            `CLOSE_S`, and counts as closed by this side.
        max_message_bytes: longer messages are neither accepted nor sent.
        max_inbox_bytes: if more than this is received but not yet returned by `receive`, the link stops reading.
        budget: limits the unfinished messages of all links that share it.
    """

    ping_interval_s: float = PING_INTERVAL_S
    dead_after_s: float = DEAD_AFTER_S
    send_timeout_s: float = SEND_TIMEOUT_S
    max_backlog_bytes: int = MAX_BACKLOG_BYTES
    farewell: Message | None = None
    max_message_bytes: int = MAX_MESSAGE_BYTES
    max_inbox_bytes: int = MAX_INBOX_BYTES
    budget: PartialBudget | None = None


class TurnMeter(Protocol):
    """Charges somebody for the turns of a link: parsing what was received, handling it, answering control frames."""

    def begin(self) -> None:
        """A turn begins."""

    def end(self) -> None:
        """A turn has ended; the link's reading may now be paused."""


class LinkHandler(Protocol):
    """Receives a link's messages as they arrive; its methods must neither wait nor raise."""

    def on_messages(self, messages: list[bytes]) -> None:
        """Process binary messages, in order."""

    def on_text(self, text: str) -> None:
        """Process a text message."""

    def on_closed(self) -> None:
        """The link has ended or is closing: no more messages arrive, and none can be sent. Called by a task, never
        during a send."""

    def on_transport_closed(self) -> None:
        """The transport has been cut as well."""
