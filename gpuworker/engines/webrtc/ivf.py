"""Reads VP8 from an IVF stream, piece by piece."""

from collections.abc import Iterator

import attrs

from gpuworker.engines.base import EngineError
from protocol.wire.errors import ErrorCode

#: Ticks in a second of every time here that is not in seconds: those of video in RTP.
TICKS_HZ = 90_000
MAX_PICTURE_BYTES = 1024 * 1024
_HEAD_BYTES = 32
_FRAME_HEAD_BYTES = 12


@attrs.frozen
class Picture:
    """One encoded picture; `pts` in 1/90000 s."""

    data: bytes
    pts: int
    key: bool


class IvfReader:
    """Takes the bytes of a stream as they come, and yields its pictures."""

    def __init__(self) -> None:
        self._held = bytearray()
        #: Seconds of one unit of the stream's time: numerator and denominator.
        self._unit: tuple[int, int] | None = None

    def feed(self, data: bytes) -> Iterator[Picture]:
        """Yield the pictures that are whole now.

        Raises:
            EngineError: it is no IVF stream with VP8.
        """
        self._held += data
        if self._unit is None:
            if len(self._held) < _HEAD_BYTES:
                return
            self._read_head()
        while len(self._held) >= _FRAME_HEAD_BYTES:
            size = int.from_bytes(self._held[:4], "little")
            if not 0 < size <= MAX_PICTURE_BYTES:
                raise _wrong(f"a picture of {size} bytes")
            end = _FRAME_HEAD_BYTES + size
            if len(self._held) < end:
                return
            pts = int.from_bytes(self._held[4:_FRAME_HEAD_BYTES], "little")
            picture = bytes(self._held[_FRAME_HEAD_BYTES:end])
            del self._held[:end]
            assert self._unit is not None
            numerator, denominator = self._unit
            yield Picture(picture, pts * numerator * TICKS_HZ // denominator, key=not picture[0] & 1)

    def _read_head(self) -> None:
        head = bytes(self._held[:_HEAD_BYTES])
        length = int.from_bytes(head[6:8], "little")
        if head[:4] != b"DKIF" or length < _HEAD_BYTES:
            raise _wrong("no IVF header")
        if head[8:12] != b"VP80":
            raise _wrong(f"the codec {head[8:12]!r}")
        denominator, numerator = int.from_bytes(head[16:20], "little"), int.from_bytes(head[20:24], "little")
        if not denominator or not numerator:
            raise _wrong("a time base of 0")
        self._unit = (numerator, denominator)
        del self._held[:length]


def _wrong(what: str) -> EngineError:
    return EngineError(f"the video has {what}; send video/x-ivf with VP8", code=ErrorCode.INPUT_MISMATCH)
