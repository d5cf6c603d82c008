"""Video as a stream of bytes: IVF, a header and then each picture with its size and time; and what a VP8 picture says.

IVF is what libvpx's own tools read and write, and ffmpeg with them. A stream can be cut behind any picture, and nothing
in its header has to be known at its end. Pure.
"""

import struct

import attrs

from protocol.wire.frames import MAX_BINARY_BYTES
from protocol.wire.structs import VideoFormat

IVF = "video/x-ivf"
#: Units of `pts` in a second.
PTS_HZ = 90_000
_SIGNATURE = b"DKIF"
_FOURCC = b"VP80"
#: Signature, version, bytes of the header, codec, width, height, units of time a second (a fraction), pictures (0: it
#: is not known), unused.
_HEADER = struct.Struct("<4sHH4sHHIIII")
#: Bytes of the picture, its time.
_PICTURE = struct.Struct("<IQ")
#: RFC 6386 section 9.1: what follows the three bytes of any picture's tag in a key frame, before width and height.
_START_CODE = b"\x9d\x01\x2a"


@attrs.frozen
class Picture:
    """One encoded picture; `pts` is when it is shown, in units of 1/90,000 s."""

    data: bytes
    pts: int

    @property
    def key(self) -> bool:
        """Whether it can be decoded without any picture before it."""
        return is_key(self.data)


def is_key(data: bytes) -> bool:
    """Whether a VP8 picture is a key frame."""
    return bool(data) and not data[0] & 1


def key_size(data: bytes) -> tuple[int, int] | None:
    """Width and height in a VP8 key frame; None if it is none."""
    if not is_key(data) or len(data) < 10 or data[3:6] != _START_CODE:
        return None
    width, height = struct.unpack_from("<HH", data, 6)
    return width & 0x3FFF, height & 0x3FFF  # the upper two bits ask for scaling


def ivf_header(video: VideoFormat) -> bytes:
    """The bytes before the first picture of a stream."""
    return _HEADER.pack(_SIGNATURE, 0, _HEADER.size, _FOURCC, video.width, video.height, PTS_HZ, 1, 0, 0)


def ivf_picture(data: bytes, pts: int) -> bytes:
    """A picture as it stands in a stream."""
    return _PICTURE.pack(len(data), pts) + data


class IvfReader:
    """Reads a stream in pieces of any size.

    Attributes:
        size: width and height in its header; None before that has come.
    """

    def __init__(self) -> None:
        self.size: tuple[int, int] | None = None
        self._held = bytearray()
        self._rate, self._scale = PTS_HZ, 1

    def feed(self, data: bytes) -> list[Picture]:
        """The pictures that `data` completes.

        Raises:
            ValueError: it is not IVF with VP8.
        """
        self._held += data
        at = 0
        if self.size is None:
            if not _SIGNATURE.startswith(self._held[:4]):
                raise ValueError(f"the video does not begin with {_SIGNATURE.decode()}; send it as {IVF}")
            if len(self._held) < _HEADER.size:
                return []
            at = self._read_header()
        pictures = []
        while len(self._held) - at >= _PICTURE.size:
            size, pts = _PICTURE.unpack_from(self._held, at)
            if size > MAX_BINARY_BYTES:
                raise ValueError(f"the video has a picture of {size} bytes; the limit is {MAX_BINARY_BYTES}")
            begin = at + _PICTURE.size
            if len(self._held) < begin + size:
                break
            at = begin + size
            pictures.append(Picture(bytes(self._held[begin:at]), pts * PTS_HZ * self._scale // self._rate))
        del self._held[:at]
        return pictures

    def end(self) -> None:
        """Note the end of the stream.

        Raises:
            ValueError: it is cut short.
        """
        if self._held or self.size is None:
            raise ValueError(f"the video is cut short within {'a picture' if self.size else 'its header'}")

    def _read_header(self) -> int:
        """Read the header; returns its size."""
        length: int
        _, _, length, codec, width, height, self._rate, self._scale, _, _ = _HEADER.unpack_from(self._held)
        if codec != _FOURCC:
            raise ValueError(f"the video is {codec.decode('latin-1')!r}; send {_FOURCC.decode()}, which is VP8")
        if length != _HEADER.size or not self._rate or not self._scale or not width or not height:
            raise ValueError("the header of the video is broken")
        self.size = width, height
        return length
