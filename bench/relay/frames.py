"""An audio frame as bytes with holes: what differs from frame to frame is written into place, the rest is made once.

The bytes are a worker's: a real `audio` message, its `seq` as short as msgpack makes it, really masked. Relays that
know nothing of it pass it on as they would any message, and find its reader by the request id in it.
"""

import struct
from collections.abc import Callable

import attrs

from protocol.wire.codec import encode
from protocol.wire.frames import Audio

#: Any key is allowed (RFC 6455 section 5.3); of one whose four bytes are equal, a hole needs not know where it stands.
MASK_BYTE = 0x37
_MASK = bytes((MASK_BYTE,)) * 4
_MASKED = bytes(byte ^ MASK_BYTE for byte in range(256))
TEXT, BINARY, PONG = 1, 2, 10
#: 80 ms of 48 kHz speech, 16 bit: what VoxCPM puts out at once. The "8 KiB" of the tables.
SPEECH_BYTES = 7_680

_AN_ID = "0123456789abcdef" * 2
_STAMP_BYTES = 8
#: msgpack's positive integers: the first number of each width, the bytes that hold the number, and one to look for.
_WIDTHS = ((0, 1, 0x5B), (128, 1, 0xDB), (256, 2, 0x5BDB), (65_536, 4, 0x5BDB3C7A))


def _audio(request_id: str, seq: int, pcm_bytes: int) -> bytes:
    """Its samples are no two alike, so that a mix-up shows."""
    pcm = (bytes(range(251)) * (pcm_bytes // 251 + 1))[:pcm_bytes]
    return encode(Audio(request_id=request_id, attempt=1, seq=seq, pcm=pcm))


#: Where the request id stands in a frame, for relays that route by it.
_ROUTE_AT = _audio(_AN_ID, 0, 16).index(_AN_ID.encode())
ROUTE = slice(_ROUTE_AT, _ROUTE_AT + len(_AN_ID))


def _head(opcode: int, size: int, mask: int) -> bytes:
    if size < 126:
        return bytes((0x80 | opcode, mask | size))
    if size < 65_536:
        return struct.pack(">BBH", 0x80 | opcode, mask | 126, size)
    return struct.pack(">BBQ", 0x80 | opcode, mask | 127, size)


def message(data: bytes, opcode: int = BINARY) -> bytes:
    """One WebSocket message as a client sends it, masked."""
    return _head(opcode, len(data), 0x80) + _MASK + data.translate(_MASKED)


def plain_message(data: bytes) -> bytes:
    """One WebSocket message as a server sends it."""
    return _head(BINARY, len(data), 0) + data


@attrs.frozen
class Wrapping:
    """How a protocol carries a frame from a sender: what stands before it, behind it, and whether it is masked."""

    wrap: Callable[[str, bytes], bytes]
    tail_bytes: int = 0
    masked: bool = True


@attrs.frozen
class Variant:
    """A frame with holes, for numbers from `first_seq` on: `wire` is sent, `read` is what comes of it.

    Args:
        seq_bytes: of the hole for the number, big-endian, at `seq_at`; the time stands in eight at `stamp_at`.
        wrapped: by so many bytes both lie further behind in `wire`.
    """

    first_seq: int
    seq_bytes: int
    wire: bytes
    read: bytes
    seq_at: int
    stamp_at: int
    wrapped: int
    mask: int


def variants(request_id: str, pcm_bytes: int, first_seq: int, count: int, wrapping: Wrapping) -> list[Variant]:
    """The frames of one stream, for each width of number that occurs in it."""
    made = []
    for (begin, seq_bytes, sample), end in zip(_WIDTHS, [first for first, *_ in _WIDTHS[1:]] + [2**31], strict=True):
        if begin < first_seq + count and first_seq < end:
            read = _audio(request_id, sample, pcm_bytes)
            wire = wrapping.wrap(request_id, read)
            number = sample.to_bytes(seq_bytes)
            made.append(
                Variant(
                    begin,
                    seq_bytes,
                    wire,
                    read,
                    seq_at=read.index(b"\xa3seq") + read[read.index(b"\xa3seq") :].index(number),
                    stamp_at=len(read) - pcm_bytes,
                    wrapped=len(wire) - wrapping.tail_bytes - len(read),
                    mask=MASK_BYTE if wrapping.masked else 0,
                )
            )
    return made


WEBSOCKET = Wrapping(lambda _id, data: message(data))
#: Nothing in between knows WebSocket: what goes in comes out, so it is a server's already.
TCP = Wrapping(lambda _id, data: plain_message(data), masked=False)
NATS = Wrapping(
    lambda name, data: b"PUB %s %d\r\n%s\r\n" % (name.encode(), len(data), data), tail_bytes=2, masked=False
)


def _event(name: str, data: bytes) -> bytes:
    """An event of Socket.IO 5 with one attachment: a text, then a binary message."""
    return message(b'451-["frame","%s",{"_placeholder":true,"num":0}]' % name.encode(), TEXT) + message(data)


SOCKETIO = Wrapping(_event)
