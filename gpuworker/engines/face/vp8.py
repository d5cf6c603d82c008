"""Encodes pictures as VP8, so that equal pictures always make equal bytes."""

from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np
from av.video.codeccontext import VideoCodecContext
from av.video.frame import PictureType
from numpy.typing import NDArray

from protocol.wire.ivf import PTS_HZ

#: One thread, and a negative `cpu-used`: a positive one has libvpx choose its effort by how long pictures take.
_OPTIONS = {"deadline": "realtime", "cpu-used": "-6", "lag-in-frames": "0", "qmax": "32", "static-thresh": "1"}


class Vp8Encoder:
    """Encodes one video, with a key frame each second.

    Args:
        side: of the square pictures, pixels; even.
        fps: pictures a second.
        bitrate: bits a second that it aims at.
    """

    def __init__(self, side: int, fps: int, bitrate: int) -> None:
        codec = av.CodecContext.create("libvpx", "w")
        assert isinstance(codec, VideoCodecContext)
        codec.width = codec.height = side
        codec.pix_fmt = "yuv420p"
        codec.framerate = Fraction(fps)
        codec.time_base = Fraction(1, fps)
        codec.gop_size = fps
        codec.bit_rate = bitrate
        codec.thread_count = 1
        codec.options = _OPTIONS
        self._codec = codec
        self._fps = fps
        self._count = 0

    def encode(self, picture: NDArray[np.uint8]) -> Iterator[tuple[bytes, int, bool]]:
        """Encode the next picture; yields its bytes, its time in 1/`PTS_HZ` s, and whether it is a key frame."""
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
        frame.pts = self._count
        if self._count % self._fps == 0:
            frame.pict_type = PictureType.I
        self._count += 1
        for packet in self._codec.encode(frame):
            assert packet.pts is not None
            yield bytes(packet), packet.pts * PTS_HZ // self._fps, packet.is_keyframe
