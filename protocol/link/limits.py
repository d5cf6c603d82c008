"""What a link holds its peer to, and who takes its messages."""

from typing import Protocol

import attrs

from protocol.link.websocket_frames import PartialBudget
from protocol.wire.frames import MAX_MESSAGE_BYTES
from protocol.wire.validators import Message

PING_INTERVAL_S = 5.0
#: Three pings unanswered, and no other byte.
DEAD_AFTER_S = 15.0
#: For anything at all of what waits to be taken; a peer that takes little at a time is slow, and not gone.
SEND_TIMEOUT_S = 60.0
#: Messages queued and not yet taken by the transport: a quarter of the largest result.
MAX_BACKLOG_BYTES = 16 * MAX_MESSAGE_BYTES


@attrs.frozen
class LinkLimits:
    """What a link holds its peer to; many links share one.

    Args:
        ping_interval_s: seconds between WebSocket pings.
        dead_after_s: seconds of silence after which the link is broken.
        send_timeout_s: with something to send, and nothing of it taken for so many seconds, the link breaks
            ("slow_consumer").
        max_backlog_bytes: with more queued, the same.
        farewell: for such a peer, in place of what it did not take; the link is then closed, and counts as closed by
            this side, after at most twice `CLOSE_S`.
        max_message_bytes: longer ones are neither taken nor sent.
        budget: bounds what all links with it hold of unfinished messages.
    """

    ping_interval_s: float = PING_INTERVAL_S
    dead_after_s: float = DEAD_AFTER_S
    send_timeout_s: float = SEND_TIMEOUT_S
    max_backlog_bytes: int = MAX_BACKLOG_BYTES
    farewell: Message | None = None
    max_message_bytes: int = MAX_MESSAGE_BYTES
    budget: PartialBudget | None = None


class LinkHandler(Protocol):
    """Who is handed a link's messages as they come; none of this may wait or raise."""

    def on_messages(self, messages: list[bytes]) -> None:
        """Binary messages, in order."""

    def on_text(self, text: str) -> None:
        """A text message."""

    def on_closed(self) -> None:
        """The link is gone or closing: no message comes any more, and none can be sent. Told by a task, never within
        a send."""

    def on_transport_closed(self) -> None:
        """Its transport is cut as well."""
