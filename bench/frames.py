"""An audio frame as bytes with holes: what differs from frame to frame is written into place, the rest is made once.

So the load generator spends some 10 µs a frame where any WebSocket library in Python spends 50 to 100, and is never
what is measured. The bytes are a worker's: a real `audio` message, really masked.
"""

import struct

from protocol.codec import encode
from protocol.messages import Audio

#: 80 ms of 48 kHz speech, 16 bit: what VoxCPM puts out at once.
PCM_BYTES = 7_680
#: RFC 6455 section 5.3 wants it unpredictable, against proxies that none of ours pass; a constant costs the same.
MASK = bytes((0x37, 0xFA, 0x21, 0x3D))

_AN_ID = "0123456789abcdef" * 2
#: Packed in five bytes, so that every `seq` has room.
_WIDE_SEQ = 2**31
_HEADER = struct.Struct(">BBH")
_SEQ = struct.Struct(">I")
_STAMP = struct.Struct(">Q")


def _audio(request_id: str) -> bytes:
    return encode(Audio(request_id=request_id, attempt=1, seq=_WIDE_SEQ, pcm=bytes(PCM_BYTES)))


_sample = _audio(_AN_ID)
FRAME_BYTES = len(_sample)
_ROUTE_AT = _sample.index(_AN_ID.encode())
#: Where the request id stands.
ROUTE = slice(_ROUTE_AT, _ROUTE_AT + len(_AN_ID))
_SEQ_AT = _sample.index(_SEQ.pack(_WIDE_SEQ))
#: The time of sending takes the place of the first four samples.
_STAMP_AT = FRAME_BYTES - PCM_BYTES


def masked(data: bytes) -> bytes:
    """`data` as a client masks it (RFC 6455 section 5.3)."""
    key = (MASK * (len(data) // 4 + 1))[: len(data)]
    return (int.from_bytes(data) ^ int.from_bytes(key)).to_bytes(len(data))


def message(data: bytes, opcode: int = 2) -> bytes:
    """One masked WebSocket message."""
    if len(data) < 126:
        head = bytes((0x80 | opcode, 0x80 | len(data)))
    else:
        head = _HEADER.pack(0x80 | opcode, 0x80 | 126, len(data))
    return head + MASK + masked(data)


def _mask_of(at: int, size: int) -> int:
    return int.from_bytes((MASK * 4)[at % 4 : at % 4 + size])


class Frames:
    """The frames of one stream."""

    def __init__(self, request_id: str) -> None:
        self._bytes = bytearray(message(_audio(request_id)))
        head = len(self._bytes) - FRAME_BYTES
        self._seq_at, self._seq_mask = head + _SEQ_AT, _mask_of(_SEQ_AT, 4)
        self._stamp_at, self._stamp_mask = head + _STAMP_AT, _mask_of(_STAMP_AT, 8)

    def fill(self, seq: int, stamp_ns: int) -> bytearray:
        """The frame `seq`, sent at `stamp_ns`; good until the next call."""
        _SEQ.pack_into(self._bytes, self._seq_at, seq ^ self._seq_mask)
        _STAMP.pack_into(self._bytes, self._stamp_at, stamp_ns ^ self._stamp_mask)
        return self._bytes


def read(buffer: bytearray, at: int) -> tuple[int, int]:
    """`seq` and time of sending of the frame that begins at `at`."""
    return _SEQ.unpack_from(buffer, at + _SEQ_AT)[0], _STAMP.unpack_from(buffer, at + _STAMP_AT)[0]
