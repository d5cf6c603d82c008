"""Live inputs: sent while the request waits and runs, and kept until the relay has stored them."""

from collections.abc import Callable

from protocol.client.inputs import HIGH_WATER_BYTES, LOW_WATER_BYTES
from protocol.link.base import Link
from protocol.wire.errors import LinkError
from protocol.wire.messages import MAX_INPUT_CHUNK_BYTES, MAX_UNACKED_BYTES, Input, InputAck


class LiveInput:
    """The bytes of one live input that the relay may not have stored yet, and how far they are sent over the link.

    Attributes:
        offset: bytes written.
        ended: whether nothing more will be written.
        end_stored: whether the relay has stored everything, the end included.
    """

    def __init__(self, request_id: str, name: str, *, goes_on: bool = False) -> None:
        """Args:
        request_id: the request.
        name: of the input.
        goes_on: whether it begins where the relay stands, as the input of a stream that was attached.
        """
        self.offset = 0
        self.ended = False
        self.end_stored = False
        self._goes_on = goes_on  # until something of it is written
        self._request_id = request_id
        self._name = name
        self._kept = bytearray()  # the bytes below `offset` that are either not sent or not stored
        self._stored = 0
        self._sent = 0
        self._end_sent = False
        self._link: Link | None = None
        self._may_send = False
        self._remove: Callable[[], None] = _nothing

    def write(self, data: bytes | memoryview) -> int:
        """Take as much of `data` as fits into the window; return how many bytes. Nothing is sent as a sign of life."""
        self._goes_on = False
        taken = data[: MAX_UNACKED_BYTES - len(self._kept)]
        self._kept += taken
        self.offset += len(taken)
        self._advance(self._sent)
        self._pump(is_sign=not data)
        return len(taken)

    def end(self) -> None:
        """Nothing more will be written."""
        self._goes_on = False
        self.ended = True
        self._pump()

    def open(self, link: Link, *, is_new: bool) -> None:
        """Send over this link from now on.

        Args:
            link: the link.
            is_new: whether the relay cannot know the request from another link. Otherwise nothing is sent until it has
                said how much it has.
        """
        self.stop()
        self._link, self._may_send = link, is_new
        self._remove = link.on_drained(self._pump, LOW_WATER_BYTES)
        self._pump()

    def on_ack(self, ack: InputAck) -> bool:
        """Process the relay's word on what it has stored; False if it has lost what it had."""
        if self._goes_on:
            self.offset = self._sent = self._stored = ack.offset
            self.ended = self._end_sent = bool(ack.last)
        sent = self._sent
        if not self._may_send or ack.again:  # the first word over this link says where to go on
            if ack.offset < self._base:
                return False
            self._may_send, self._end_sent = True, False
            sent = min(ack.offset, self.offset)
        self._advance(sent, ack.offset)
        self.end_stored = self.end_stored or (bool(ack.last) and ack.offset == self.offset)
        self._pump()
        return True

    def stop(self) -> None:
        """Send nothing more over this link."""
        self._may_send = False
        self._remove()

    @property
    def _base(self) -> int:
        """Offset of the first byte kept."""
        return min(self._stored, self._sent)

    def _pump(self, *, is_sign: bool = False) -> None:
        link, is_due = self._link, is_sign and not self._has_more
        try:
            while (
                self._may_send
                and (self._has_more or is_due)
                and link is not None
                and link.backlog_bytes < HIGH_WATER_BYTES
            ):
                is_due = False
                start, end = self._sent, min(self.offset, self._sent + MAX_INPUT_CHUNK_BYTES)
                data = bytes(self._kept[start - self._base : end - self._base])
                last = True if self.ended and end == self.offset else None
                link.send(Input(request_id=self._request_id, name=self._name, offset=start, data=data, last=last))
                self._end_sent = bool(last)
                self._advance(end)
        except LinkError:  # it goes on over the next link
            self._may_send = False

    def _advance(self, sent: int, stored: int = 0) -> None:
        """Note what is sent and stored, and drop what need not be sent again."""
        before = self._base
        self._sent, self._stored = sent, max(self._stored, stored)
        if MAX_UNACKED_BYTES <= self._sent < self._stored:
            # The relay has it from an earlier program; the bytes before these were sent for it to compare.
            self._sent = min(self._stored, self.offset)
        del self._kept[: self._base - before]

    @property
    def _has_more(self) -> bool:
        return self._sent < self.offset or (self.ended and not self._end_sent and not self.end_stored)


def _nothing() -> None:
    pass
