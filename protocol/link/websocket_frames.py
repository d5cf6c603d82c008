"""WebSocket frames (RFC 6455) without I/O: a parser for either end, and functions that build frames.

The parser reads bytes in the buffer into which they were received, and allocates only the payloads. Its cost is paid
for every frame of audio, so the common frame (a whole, binary, unfragmented message) is handled first. Masking is done
in C by `websockets`: 0.5 µs for 8 KiB, against 9 µs in Python.
"""

import secrets
import struct
from codecs import getincrementaldecoder
from collections.abc import Mapping
from typing import Protocol

import attrs

try:
    from websockets.speedups import apply_mask
except ImportError:  # a platform without a wheel
    from websockets.utils import apply_mask

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10

#: Section 7.4.1.
GOING_AWAY, BROKEN_RULE, NO_CODE, BAD_TEXT = 1001, 1002, 1005, 1007
POLICY_VIOLATION, TOO_BIG, INTERNAL_ERROR = 1008, 1009, 1011
#: Section 7.1.5, never sent: the connection ended without a close frame.
ABNORMAL = 1006
#: Registered with IANA after the RFC: the server is overloaded.
TRY_AGAIN_LATER = 1013
#: Codes allowed in a close frame: those of the registry, and those reserved for libraries and applications.
_SENDABLE = frozenset((*range(1000, 1004), *range(1007, 1015)))
#: Limit for a control frame (section 5.5); a close frame's reason has two bytes fewer.
MAX_CONTROL_PAYLOAD = 125
MAX_REASON_BYTES = MAX_CONTROL_PAYLOAD - 2

#: A frame up to this size waits for its rest as the bytes received, which are copied for each new piece; a longer one
#: gets its own buffer, so that a peer that sends byte by byte cannot cause a mebibyte to be copied each time.
SMALL_BYTES = 64 * 1024

_SIZE16 = struct.Struct(">BBH").pack
_SIZE64 = struct.Struct(">BBQ").pack
_FIN = 0x80
_MASKED = 0x80
_RESERVED = 0x70
_WHOLE_BINARY = _FIN | BINARY
_PONG = _FIN | PONG
#: Second byte of a masked frame whose length takes two bytes.
_MASKED_16 = _MASKED | 126
_decoder = getincrementaldecoder("utf-8")

Buffer = bytes | bytearray


@attrs.frozen
class Ping:
    """The peer asks for a pong with this payload."""

    payload: bytes


@attrs.frozen
class Pong:
    """The peer answers a ping, or reports that it is alive."""

    payload: bytes


@attrs.frozen
class Close:
    """The peer closes; `code` is `NO_CODE` if it sent none."""

    code: int
    reason: str


@attrs.frozen
class Fault:
    """The peer broke a rule: close with this code. Nothing is parsed after it. `reason` continues "the peer sent"."""

    code: int
    reason: str


#: What a parser yields: `bytes` for a binary message, `str` for a text message, and the classes above.
Event = bytes | str | Ping | Pong | Close | Fault


class _Decoder(Protocol):
    def decode(self, data: bytes, final: bool = False, /) -> str: ...


class PartialBudget:
    """Limits the unfinished messages of all parsers that share it.

    Beyond the limit, the unfinished message that began first is dropped: an honest peer finishes its message quickly,
    and a peer that keeps many open on purpose loses its own first. Frames of up to `SMALL_BYTES` are not counted while
    they wait for their rest, because each connection has at most one.

    Args:
        max_bytes: for all of them together; a message counts from when its buffer is allocated.
    """

    __slots__ = ("_sizes", "held_bytes", "max_bytes")

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held_bytes = 0
        self._sizes: dict[Parser, int] = {}  # in the order in which the messages began

    def note(self, parser: "Parser", size: int) -> None:
        """Note that a parser now holds `size` bytes of an unfinished message; 0 if it holds none."""
        self.held_bytes += size - self._sizes.get(parser, 0)
        if not size:
            self._sizes.pop(parser, None)
            return
        self._sizes[parser] = size
        while self.held_bytes > self.max_bytes and (oldest := next(iter(self._sizes))) is not parser:
            oldest.give_up()


class Parser:
    """Parses what one connection receives.

    Args:
        masked: whether the peer is the client, whose frames are masked (section 5.1).
        max_message_bytes: a longer message is a `Fault` with code 1009, before anything is allocated for it.
        budget: limits the unfinished messages of this parser and others together.

    Attributes:
        events: what was parsed; the caller of `parse` or `feed` removes it with `pop_events`.
        all_binary: whether all of `events` are binary messages.
        partial_frame: the beginning of an incomplete frame; it must precede the data of the next `parse`.
        large_frame: an incomplete frame of more than `SMALL_BYTES`, to be filled from `large_at` on.
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
        self._opcode = CONTINUATION  # of the unfinished message, else 0
        self._message: bytearray | None = None  # one buffer: a list of tiny fragments would cost more than their bytes
        self._size = 0  # bytes in _message
        self._text: _Decoder | None = None

    def pop_events(self) -> list[Event]:
        """Return the events so far, and remove them."""
        events, self.events, self.all_binary = self.events, [], True
        return events

    def release(self) -> None:
        """Drop everything received but not fetched; whatever follows is dropped as well.

        Called when the connection is over: a mebibyte of an unfinished message must not wait for the garbage collector.
        """
        self.events, self.all_binary = [], True
        self._over = True
        self._forget_partial()

    def give_up(self) -> None:
        """Drop the unfinished message, because there is no room for it; the peer learns of it when it sends more."""
        self._fault(TRY_AGAIN_LATER, "a message too slowly; the relay has no more room for it")

    @property
    def over(self) -> bool:
        """Whether the peer has closed or broken a rule: whatever follows is dropped."""
        return self._over

    def feed(self, data: Buffer) -> None:
        """Parse received data."""
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
        """Note that `count` bytes were put into `large_frame`; if it is complete, parse it and return True."""
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
        """Parse `data[:end]`, of which `view` is a view; it must begin with `partial_frame`, which is then replaced."""
        masked, at, least = self.masked, 0, 6 if self.masked else 2
        events = self.events
        # `common`: the loop may use the shortcut for whole binary messages with a two-byte length, which most are.
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
            # Check limits before the payload arrives, so that no memory is used for a frame that is rejected.
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
        """Return the message if `data[:end]` is exactly one frame of the usual kind; else return None, parsing nothing.

        Call it only while no earlier frame is incomplete.
        """
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
        """Like `parse_single`, for a pong: returns its payload."""
        if data[0] != _PONG or end < 6 or data[1] != end - 6 | _MASKED or end > 6 + MAX_CONTROL_PAYLOAD:
            return None
        return None if self._over or not self.masked else apply_mask(view[6:end], data[2:6])

    def _parse_run(self, data: Buffer, view: memoryview, at: int, size: int, end: int) -> int:
        """Parse the frames from `at` on that have the same head as the first; return where they end.

        A worker that catches up sends many frames of one length.
        """
        head, follows, append = data[at : at + 4], data.startswith, self.events.append
        for begin in range(at + 8, end - size + 1, size + 8):
            if not follows(head, begin - 8):
                break
            at = begin + size
            append(apply_mask(view[begin:at], data[begin - 4 : begin]))
        return at

    def _may_come(self, first: int, size: int) -> bool:
        """Check that a frame with this first byte, other than a whole binary message, is allowed now."""
        opcode = first & 15
        if first & _RESERVED:
            return self._fault(BROKEN_RULE, "reserved bits are set, and no extension was agreed upon")
        if opcode > PONG or BINARY < opcode < CLOSE:
            return self._fault(BROKEN_RULE, f"a frame with the unknown opcode {opcode}")
        if opcode >= CLOSE and (not first & _FIN or size > MAX_CONTROL_PAYLOAD):
            return self._fault(BROKEN_RULE, "a control frame that is fragmented, or longer than 125 bytes")
        if opcode == CONTINUATION and not self._opcode:
            return self._fault(BROKEN_RULE, "a continuation frame without a message to continue")
        return True

    def _take(self, first: int, payload: bytes) -> None:
        """Process a complete frame that is not a whole binary message, or that arrives within a message."""
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
        """Process a close frame: section 5.5.1, and 7.4 for the codes."""
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

    def _fault(self, code: int, message: str) -> bool:
        self._end(Fault(code, message))
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


#: Number of sizes for which the frame head is cached; streams use few.
MAX_HEADS = 4096


class _Heads(dict[int, bytes]):
    """Frame heads, made at the first lookup."""

    def __missing__(self, size: int) -> bytes:
        if len(self) >= MAX_HEADS:
            self.clear()
        head = self[size] = frame_head(BINARY, size)
        return head


#: Size of a server's whole binary message -> its frame head.
BINARY_HEADS: Mapping[int, bytes] = _Heads()


#: Opcode and size of a server's control frame -> its frame head.
CONTROL_HEADS: Mapping[tuple[int, int], bytes] = {
    (opcode, size): bytes((_FIN | opcode, size))
    for opcode in (CLOSE, PING, PONG)
    for size in range(MAX_CONTROL_PAYLOAD + 1)
}


def frame_head(opcode: int, size: int, mask: bytes = b"") -> bytes:
    """The head of an unfragmented frame; with a mask, a client's."""
    first, bit = _FIN | opcode, _MASKED if mask else 0
    if size < 126:
        return bytes((first, bit | size)) + mask
    if size < 65_536:
        return _SIZE16(first, bit | 126, size) + mask
    return _SIZE64(first, bit | 127, size) + mask


def make_frame(opcode: int, payload: bytes, *, masked: bool) -> bytes:
    """A whole frame; a client's if it is masked."""
    if not masked:
        return frame_head(opcode, len(payload)) + payload
    mask = secrets.token_bytes(4)  # section 5.3: unpredictable
    return frame_head(opcode, len(payload), mask) + apply_mask(payload, mask)


def close_payload(code: int, reason: str) -> bytes:
    """The payload of a close frame; a reason that is too long is cut."""
    if code == NO_CODE:
        return b""
    return code.to_bytes(2, "big") + cut_reason(reason).encode()


def cut_reason(reason: str) -> str:
    """The longest beginning of a close reason that fits into a frame, in whole characters."""
    return reason.encode()[:MAX_REASON_BYTES].decode("utf-8", "ignore")
