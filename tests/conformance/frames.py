"""WebSocket frames made and read by hand (RFC 6455, section 5.2), with nothing of the relay's own code.

`frame` makes what a client may send, and what it may not.
"""

import struct
from enum import IntEnum

import attrs

#: Any will do; that it holds a zero octet shows whoever takes the four for text.
KEY = b"\x37\x00\xfa\x21"


class Opcode(IntEnum):
    """Those that RFC 6455 gives a meaning; the others are reserved."""

    CONTINUATION = 0
    TEXT = 1
    BINARY = 2
    CLOSE = 8
    PING = 9
    PONG = 10


def masked(payload: bytes, key: bytes) -> bytes:
    """`payload`, masked or unmasked with a key of four octets."""
    repeated = (key * (len(payload) // 4 + 1))[: len(payload)]
    return (int.from_bytes(payload) ^ int.from_bytes(repeated)).to_bytes(len(payload))


def frame(
    opcode: int,
    payload: bytes = b"",
    *,
    fin: bool = True,
    rsv: int = 0,
    key: bytes | None = KEY,
    announced: int | None = None,
    length_octets: int | None = None,
) -> bytes:
    """One frame, right or wrong.

    Args:
        opcode: 0..15.
        payload: not masked yet.
        fin: whether it ends its message.
        rsv: the three reserved bits, 0..7.
        key: to mask with; None leaves it unmasked.
        announced: the length that its head tells, where that is not the payload's.
        length_octets: how many octets tell it after the first seven bits: 0, 2 or 8; by default as few as will do.
    """
    length = len(payload) if announced is None else announced
    if length_octets is None:
        length_octets = 0 if length <= 125 else 2 if length <= 0xFFFF else 8
    seven = {0: length, 2: 126, 8: 127}[length_octets]
    head = bytes([fin << 7 | rsv << 4 | opcode, (key is not None) << 7 | seven])
    head += {0: b"", 2: struct.pack("!H", length & 0xFFFF), 8: struct.pack("!Q", length)}[length_octets]
    return head + payload if key is None else head + key + masked(payload, key)


def text(payload: bytes | str, *, fin: bool = True) -> bytes:
    """A text message, or its first frame; octets may be no UTF-8."""
    return frame(Opcode.TEXT, payload.encode() if isinstance(payload, str) else payload, fin=fin)


def binary(payload: bytes, *, fin: bool = True) -> bytes:
    """A binary message, or its first frame."""
    return frame(Opcode.BINARY, payload, fin=fin)


def more(payload: bytes | str = b"", *, fin: bool = True) -> bytes:
    """A continuation frame: the last one unless `fin` is false."""
    return frame(Opcode.CONTINUATION, payload.encode() if isinstance(payload, str) else payload, fin=fin)


def ping(payload: bytes = b"") -> bytes:
    """A ping."""
    return frame(Opcode.PING, payload)


def pong(payload: bytes = b"") -> bytes:
    """A pong that may answer nothing."""
    return frame(Opcode.PONG, payload)


def close(code: int | None = 1000, reason: bytes = b"") -> bytes:
    """A close frame; None leaves its payload empty."""
    return frame(Opcode.CLOSE, b"" if code is None else struct.pack("!H", code) + reason)


def fragmented(opcode: Opcode, payload: bytes, size: int) -> bytes:
    """One message in frames of `size` octets."""
    pieces = [payload[at : at + size] for at in range(0, len(payload), size)] or [b""]
    last = len(pieces) - 1
    return b"".join(
        frame(opcode if number == 0 else Opcode.CONTINUATION, piece, fin=number == last)
        for number, piece in enumerate(pieces)
    )


@attrs.frozen
class ServerFrame:
    """A frame as a server may send it."""

    opcode: Opcode
    fin: bool
    payload: bytes


class ServerFrames:
    """Reads a server's octets; what a server must not send is an `AssertionError`."""

    def __init__(self) -> None:
        self._octets = bytearray()

    @property
    def left(self) -> int:
        """Octets of a frame that is not whole yet."""
        return len(self._octets)

    def feed(self, octets: bytes | bytearray) -> list[ServerFrame]:
        """The frames that are whole now."""
        self._octets += octets
        frames = []
        while (one := self._next()) is not None:
            frames.append(one)
        return frames

    def _next(self) -> ServerFrame | None:
        octets = self._octets
        if len(octets) < 2:
            return None
        first, second = octets[0], octets[1]
        assert not first & 0x70, f"the server set a reserved bit: {first:#04x}"
        assert not second & 0x80, "the server masked a frame"
        opcode, at, length = Opcode(first & 0x0F), 2, second & 0x7F
        if opcode >= Opcode.CLOSE:
            assert first & 0x80, f"the server fragmented a {opcode.name}"
            assert length <= 125, f"the server sent a {opcode.name} of more than 125 octets"
        if length >= 126:
            form, least = ("!H", 126) if length == 126 else ("!Q", 0x10000)
            at += struct.calcsize(form)
            if len(octets) < at:
                return None
            (length,) = struct.unpack_from(form, octets, 2)
            assert length >= least, f"the server told the length {length} in more octets than it takes"
        if len(octets) < at + length:
            return None
        payload = bytes(memoryview(octets)[at : at + length])
        del octets[: at + length]
        return ServerFrame(opcode, bool(first & 0x80), payload)
