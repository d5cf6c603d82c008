"""WebSocket frames (RFC 6455) without I/O: a parser for either end, and what goes out.

The parser looks at bytes where they lie, in the buffer they were received into, and makes nothing but the payloads.
What a frame costs is paid per frame of audio, so the common one (a whole, binary, unfragmented message) comes first.
Masking is done in C by `websockets`: 0.5 µs for 8 KiB, against 9 in Python.
"""

import secrets
import struct
from codecs import getincrementaldecoder
from collections.abc import Mapping
from typing import Protocol

import attrs

try:
    from websockets.speedups import apply_mask
except ImportError:  # a platform for which there is no wheel
    from websockets.utils import apply_mask

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10

#: Section 7.4.1.
GOING_AWAY, BROKEN_RULE, NO_CODE, BAD_TEXT = 1001, 1002, 1005, 1007
POLICY_VIOLATION, TOO_BIG, INTERNAL_ERROR = 1008, 1009, 1011
#: Registered with IANA after the RFC: the server is overloaded.
TRY_AGAIN_LATER = 1013
#: Codes that may stand in a close frame: those of the registry, and those left to libraries and applications.
_SENDABLE = frozenset((*range(1000, 1004), *range(1007, 1015)))
#: Of a control frame (section 5.5); a close frame's reason has two bytes less.
MAX_CONTROL_PAYLOAD = 125
MAX_REASON_BYTES = MAX_CONTROL_PAYLOAD - 2

#: A frame up to this size waits for its rest as the bytes that came, which are copied at each look; a longer one gets
#: a buffer of its own, so that a peer that sends byte by byte makes nobody copy a mebibyte each time.
SMALL_BYTES = 64 * 1024

_SIZE16 = struct.Struct(">BBH").pack
_SIZE64 = struct.Struct(">BBQ").pack
_FIN = 0x80
_MASKED = 0x80
_RESERVED = 0x70
_WHOLE_BINARY = _FIN | BINARY
_PONG = _FIN | PONG
#: Second byte of a masked frame whose length has two bytes.
_MASKED_16 = _MASKED | 126
_decoder = getincrementaldecoder("utf-8")

Buffer = bytes | bytearray


@attrs.frozen
class Ping:
    """The peer asks for a pong with this payload."""

    payload: bytes


@attrs.frozen
class Pong:
    """The peer answers a ping, or says that it lives."""

    payload: bytes


@attrs.frozen
class Close:
    """The peer closes; `code` is `NO_CODE` where it gave none."""

    code: int
    reason: str


@attrs.frozen
class Fault:
    """The peer broke a rule; close with this code. Nothing is parsed after it."""

    code: int
    words: str


#: What comes out of a parser: messages as `bytes` or, of text, `str`; the rest as the classes above.
Event = bytes | str | Ping | Pong | Close | Fault


class _Decoder(Protocol):
    def decode(self, data: bytes, final: bool = False, /) -> str: ...


class PartialBudget:
    """A bound on the unfinished messages of all parsers that share it.

    When there are too many, the one that began first is given up: an honest peer finishes its message in a moment,
    and whoever holds many open on purpose loses his own first. Frames of up to `SMALL_BYTES` are not counted while they
    wait for their rest, as each connection has one at most.

    Args:
        max_bytes: for all of them together; room for a message counts from when it is made.
    """

    __slots__ = ("_sizes", "held_bytes", "max_bytes")

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held_bytes = 0
        self._sizes: dict[Parser, int] = {}  # the message that began first comes first

    def note(self, parser: "Parser", size: int) -> None:
        """A parser now holds so many bytes of an unfinished message; 0 when it holds none."""
        self.held_bytes += size - self._sizes.get(parser, 0)
        if not size:
            self._sizes.pop(parser, None)
            return
        self._sizes[parser] = size
        while self.held_bytes > self.max_bytes and (oldest := next(iter(self._sizes))) is not parser:
            oldest.give_up()


class Parser:
    """The receiving side of one connection.

    Args:
        masked: whether the peer is the client, whose frames are masked (section 5.1).
        max_message_bytes: longer messages are a `Fault` with 1009, before anything is allocated for them.
        budget: bounds what this parser and others hold of unfinished messages together.

    Attributes:
        events: what was parsed; whoever called `parse` or `feed` takes them out (`take`).
        plain: whether all of `events` are binary messages.
        left: the beginning of a frame whose rest has not come; to stand before what `parse` gets next.
        large: a frame of more than `SMALL_BYTES` whose rest has not come; to be filled from `large_at` on.
    """

    __slots__ = (
        "_budget",
        "_message",
        "_opcode",
        "_over",
        "_size",
        "_text",
        "all_binary",
        "events",
        "large_at",
        "large_frame",
        "masked",
        "max_message_bytes",
        "partial_frame",
    )

    def __init__(self, *, masked: bool, max_message_bytes: int, budget: PartialBudget | None = None) -> None:
        self.masked = masked
        self._budget = budget
        self.max_message_bytes = max_message_bytes
        self.events: list[Event] = []
        self.all_binary = True
        self.partial_frame = b""
        self.large_frame: bytearray | None = None
        self.large_at = 0
        self._over = False  # nothing more is parsed
        self._opcode = CONTINUATION  # of the message that came in part, else 0
        self._message: bytearray | None = None  # in one piece: parts of no or one byte would cost more than they are
        self._size = 0  # of them
        self._text: _Decoder | None = None

    def pop_events(self) -> list[Event]:
        """The events so far."""
        events, self.events, self.all_binary = self.events, [], True
        return events

    def release(self) -> None:
        """Drop all that has come and was not taken out; whatever follows is dropped as well.

        Called when the connection is over: a mebibyte of an unfinished message must not wait for the garbage collector.
        """
        self.events, self.all_binary = [], True
        self._over = True
        self._forget_partial()

    def give_up(self) -> None:
        """Drop the unfinished message, for which there is no room; the peer learns of it when it sends more."""
        self._fault(TRY_AGAIN_LATER, "a message too slowly; the relay has no room for it now")

    @property
    def over(self) -> bool:
        """Whether the peer has closed or broken a rule: whatever follows is dropped."""
        return self._over

    def feed(self, data: Buffer) -> None:
        """Parse what was received."""
        if self.large_frame is not None:
            taken = min(len(self.large_frame) - self.large_at, len(data))
            self.large_frame[self.large_at : self.large_at + taken] = data[:taken]
            if not self.fill_large(taken):
                return
            data = data[taken:]
        if self.partial_frame:
            data = self.partial_frame + data
        self.parse(data, memoryview(data), len(data))

    def fill_large(self, count: int) -> bool:
        """So many bytes were put into `large`; parses it, and returns True, where it is whole now."""
        whole = self.large_frame
        assert whole is not None
        self.large_at += count
        if self.large_at < len(whole):
            return False
        self.large_frame = None
        self._note_partial()
        self.parse(whole, memoryview(whole), len(whole))
        return True

    def parse(self, data: Buffer, view: memoryview, end: int) -> None:
        """Parse `data[:end]`, of which `view` is a view; `left` was put before it, and is replaced."""
        masked, at, least = self.masked, 0, 6 if self.masked else 2
        events = self.events
        # Of the longest frame with a length of two bytes, which is most of them.
        common = masked and not self._opcode and not self._over and self.max_message_bytes >= 0xFFFF
        self.partial_frame = b""
        while end - at >= 2 and not self._over:
            first, size = data[at], data[at + 1]
            if common and first == _WHOLE_BINARY and size == _MASKED_16 and end - at >= 8:
                size = data[at + 2] << 8 | data[at + 3]
                if at + 8 + size <= end and size >= 126:
                    at = self._parse_run(data, view, at, size, end)
                    continue
                size = _MASKED_16
            if masked:
                if size < _MASKED:
                    self._fault(BROKEN_RULE, "a client's frames must be masked")
                    return
                size -= _MASKED
            elif size >= _MASKED:
                self._fault(BROKEN_RULE, "a server's frames must not be masked")
                return
            begin = at + least
            if begin > end:
                break
            if size == 126:
                if end - at < least + 2:
                    break
                size, begin = data[at + 2] << 8 | data[at + 3], begin + 2
                if size < 126:
                    self._fault(BROKEN_RULE, "a length that is not in its shortest form")
                    return
            elif size == 127:
                if end - at < least + 8:
                    break
                size, begin = int.from_bytes(view[at + 2 : at + 10], "big"), begin + 8
                if size < 65_536 or size >> 63:
                    self._fault(BROKEN_RULE, "a length that is not in its shortest form, or over 2^63")
                    return
            # Limits come before the payload does: nothing is kept of what is not taken in the end.
            if self._size + size > self.max_message_bytes and not first & 8:
                self._fault(TOO_BIG, f"a message of more than {self.max_message_bytes // 1024} KiB")
                return
            if first != _WHOLE_BINARY and not self._may_come(first, size):
                return
            stop = begin + size
            if stop > end:
                if stop - at > SMALL_BYTES:
                    self.large_frame = large = bytearray(stop - at)
                    self.large_at = end - at
                    large[: self.large_at] = view[at:end]
                    self._note_partial()
                    return
                break
            payload = apply_mask(view[begin:stop], data[begin - 4 : begin]) if masked else bytes(view[begin:stop])
            at = stop
            if first == _WHOLE_BINARY and not self._opcode:
                events.append(payload)
            else:
                self._take(first, payload)
                common = masked and not self._opcode and self.max_message_bytes >= 0xFFFF
        if at < end and not self._over:
            self.partial_frame = bytes(view[at:end])

    def parse_single(self, data: Buffer, view: memoryview, end: int) -> bytes | None:
        """The message that `data[:end]` is, if it is one of the usual kind, and all of it; else None, and nothing is
        parsed. Nothing of a frame before it may wait for its rest."""
        if (
            end < 8 + 126
            or data[0] != _WHOLE_BINARY
            or data[1] != _MASKED_16
            or (data[2] << 8 | data[3]) + 8 != end
            or self._opcode
            or self._over
            or not self.masked
            or self.max_message_bytes < 0xFFFF
        ):
            return None
        return apply_mask(view[8:end], data[4:8])

    def parse_single_pong(self, data: Buffer, view: memoryview, end: int) -> bytes | None:
        """As `lone`, for a pong: what it carries."""
        if data[0] != _PONG or end < 6 or data[1] != end - 6 | _MASKED or end > 6 + MAX_CONTROL_PAYLOAD:
            return None
        return None if self._over or not self.masked else apply_mask(view[6:end], data[2:6])

    def _parse_run(self, data: Buffer, view: memoryview, at: int, size: int, end: int) -> int:
        """Parse the frames from `at` on for as long as they begin as the first does, and return where they stop: a
        worker that is behind sends many of one length."""
        head, follows, append = data[at : at + 4], data.startswith, self.events.append
        for begin in range(at + 8, end - size + 1, size + 8):
            if not follows(head, begin - 8):
                break
            at = begin + size
            append(apply_mask(view[begin:at], data[begin - 4 : begin]))
        return at

    def _may_come(self, first: int, size: int) -> bool:
        """Whether a frame that begins so, and is no whole binary message, may come now."""
        opcode = first & 15
        if first & _RESERVED:
            return self._fault(BROKEN_RULE, "reserved bits are set, and no extension was agreed upon")
        if opcode > PONG or BINARY < opcode < CLOSE:
            return self._fault(BROKEN_RULE, f"opcode {opcode} means nothing")
        if opcode >= CLOSE and (not first & _FIN or size > MAX_CONTROL_PAYLOAD):
            return self._fault(BROKEN_RULE, "a control frame that is fragmented, or longer than 125 bytes")
        if opcode == CONTINUATION and not self._opcode:
            return self._fault(BROKEN_RULE, "a continuation of nothing")
        return True

    def _take(self, first: int, payload: bytes) -> None:
        """A whole frame that is no whole binary message, or comes where none may."""
        opcode = first & 15
        if opcode >= CLOSE:
            self._take_control(opcode, payload)
            return
        if opcode:
            if self._opcode:
                self._fault(BROKEN_RULE, "a new message in the middle of another")
                return
            self._opcode, self._message = opcode, bytearray()
            self._text = _decoder() if opcode == TEXT else None
        assert self._message is not None
        last = bool(first & _FIN)
        if self._text is not None:
            try:
                self._text.decode(payload, last)
            except UnicodeDecodeError:
                self._fault(BAD_TEXT, "a text message that is not UTF-8")
                return
        self._message += payload
        self._size += len(payload)
        if last:
            if self._text is None:
                self.events.append(bytes(self._message))
            else:
                self.events.append(self._message.decode())
                self.all_binary = False
            self._opcode, self._size, self._message, self._text = CONTINUATION, 0, None, None
        self._note_partial()

    def _take_control(self, opcode: int, payload: bytes) -> None:
        self.all_binary = False
        if opcode == PING:
            self.events.append(Ping(payload))
        elif opcode == PONG:
            self.events.append(Pong(payload))
        else:
            self._take_close(payload)

    def _take_close(self, payload: bytes) -> None:
        """Section 5.5.1, and 7.4 for the codes."""
        if not payload:
            self._end(Close(NO_CODE, ""))
            return
        code = int.from_bytes(payload[:2], "big")
        if len(payload) == 1 or not (code in _SENDABLE or 3000 <= code < 5000):
            self._fault(BROKEN_RULE, f"close code {code} may not be sent")
            return
        try:
            reason = payload[2:].decode()
        except UnicodeDecodeError:
            self._fault(BAD_TEXT, "a close reason that is not UTF-8")
            return
        self._end(Close(code, reason))

    def _fault(self, code: int, words: str) -> bool:
        self._end(Fault(code, words))
        return False

    def _end(self, event: Event) -> None:
        self.events.append(event)
        self.all_binary = False
        self._over = True
        self._forget_partial()

    def _forget_partial(self) -> None:
        self.partial_frame, self.large_frame, self.large_at = b"", None, 0
        self._opcode, self._size, self._message, self._text = CONTINUATION, 0, None, None
        self._note_partial()

    def _note_partial(self) -> None:
        if self._budget is not None:
            self._budget.note(self, self._size + (len(self.large_frame) if self.large_frame is not None else 0))


#: Sizes of which the head is kept; streams have few.
MAX_HEADS = 4096


class _Heads(dict[int, bytes]):
    """Made when first looked up."""

    def __missing__(self, size: int) -> bytes:
        if len(self) >= MAX_HEADS:
            self.clear()
        head = self[size] = frame_head(BINARY, size)
        return head


#: Size of a whole binary message of a server's -> what stands before it.
BINARY_HEADS: Mapping[int, bytes] = _Heads()


#: Opcode and size of a server's control frame -> what stands before its payload.
CONTROL_HEADS: Mapping[tuple[int, int], bytes] = {
    (opcode, size): bytes((_FIN | opcode, size))
    for opcode in (CLOSE, PING, PONG)
    for size in range(MAX_CONTROL_PAYLOAD + 1)
}


def frame_head(opcode: int, size: int, mask: bytes = b"") -> bytes:
    """What stands before the payload of an unfragmented frame; with a mask, a client's."""
    first, bit = _FIN | opcode, _MASKED if mask else 0
    if size < 126:
        return bytes((first, bit | size)) + mask
    if size < 65_536:
        return _SIZE16(first, bit | 126, size) + mask
    return _SIZE64(first, bit | 127, size) + mask


def make_frame(opcode: int, payload: bytes, *, masked: bool) -> bytes:
    """A whole frame, of a client's where it is masked."""
    if not masked:
        return frame_head(opcode, len(payload)) + payload
    mask = secrets.token_bytes(4)  # section 5.3: not to be guessed
    return frame_head(opcode, len(payload), mask) + apply_mask(payload, mask)


def close_payload(code: int, reason: str) -> bytes:
    """Of a close frame; a reason that is too long is cut."""
    if code == NO_CODE:
        return b""
    return code.to_bytes(2, "big") + cut_reason(reason).encode()


def cut_reason(reason: str) -> str:
    """As much of a close reason as a frame takes, in whole characters."""
    return reason.encode()[:MAX_REASON_BYTES].decode("utf-8", "ignore")
