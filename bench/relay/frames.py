"""Audio frames as templates: what differs between frames is written into place, the rest is built once.

The bytes are a worker's: a real `audio` message, with `seq` in msgpack's shortest form, masked. Relays that do not know
the protocol forward it like any message, and route it by the request id that it contains.
"""

import struct
from collections.abc import Callable

import attrs

from protocol.wire.codec import encode
from protocol.wire.frames import Audio

#: Any key is allowed (RFC 6455 section 5.3); with four equal bytes, a hole can be filled without knowing its offset.
MASK_BYTE = 0x37
_MASK = bytes((MASK_BYTE,)) * 4
_MASKED = bytes(byte ^ MASK_BYTE for byte in range(256))
TEXT, BINARY, PONG = 1, 2, 10
#: 80 ms of 48 kHz speech, 16 bit, which VoxCPM makes in one step. The "8 KiB" of the tables.
SPEECH_BYTES = 7_680

_AN_ID = "0123456789abcdef" * 2
_STAMP_BYTES = 8
#: msgpack's positive integers: the first number of each width, the bytes used, and a number to search for.
_WIDTHS = ((0, 1, 0x5B), (128, 1, 0xDB), (256, 2, 0x5BDB), (65_536, 4, 0x5BDB3C7A))


def _audio(request_id: str, seq: int, pcm_bytes: int) -> bytes:
    """An audio frame; all its samples differ, so that a mix-up is detected."""
    pcm = (bytes(range(251)) * (pcm_bytes // 251 + 1))[:pcm_bytes]
    return encode(Audio(request_id=request_id, attempt=1, seq=seq, pcm=pcm))


#: Offset of the request id in a frame, for relays that route by it.
_ROUTE_AT = _audio(_AN_ID, 0, 16).index(_AN_ID.encode())
ROUTE = slice(_ROUTE_AT, _ROUTE_AT + len(_AN_ID))


def _head(opcode: int, size: int, mask: int) -> bytes:
    if size < 126:
        return bytes((0x80 | opcode, mask | size))
    if size < 65_536:
        return struct.pack(">BBH", 0x80 | opcode, mask | 126, size)
    return struct.pack(">BBQ", 0x80 | opcode, mask | 127, size)


def message(data: bytes, opcode: int = BINARY) -> bytes:
    """A WebSocket message as sent by a client, masked."""
    return _head(opcode, len(data), 0x80) + _MASK + data.translate(_MASKED)


def plain_message(data: bytes) -> bytes:
    """A WebSocket message as sent by a server."""
    return _head(BINARY, len(data), 0) + data


@attrs.frozen
class Wrapping:
    """How a protocol wraps a frame from a sender: the bytes before and after it, and whether it is masked."""

    wrap: Callable[[str, bytes], bytes]
    tail_bytes: int = 0
    masked: bool = True


@attrs.frozen
class Variant:
    """A frame template for numbers from `first_seq` on: `wire` is sent, `read` is received.

    Args:
        seq_bytes: size of the hole for the number, big-endian, at `seq_at`; the time has eight bytes at `stamp_at`.
        wrapped: offset by which both holes lie further back in `wire`.
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
    """The templates of one stream, one for each width of number that occurs in it."""
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
#: No party in between knows WebSocket: bytes arrive as sent, so they must be a server's.
TCP = Wrapping(lambda _id, data: plain_message(data), masked=False)
NATS = Wrapping(
    lambda name, data: b"PUB %s %d\r\n%s\r\n" % (name.encode(), len(data), data), tail_bytes=2, masked=False
)


def _event(name: str, data: bytes) -> bytes:
    """An event of Socket.IO 5 with one attachment: a text message, then a binary one."""
    return message(b'451-["frame","%s",{"_placeholder":true,"num":0}]' % name.encode(), TEXT) + message(data)


SOCKETIO = Wrapping(_event)
