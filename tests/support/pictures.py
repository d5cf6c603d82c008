"""Encoded pictures for workers and engines to send: VP8 that a decoder takes."""

from gpuworker.engines.mock import KEY_PICTURE as KEY_PICTURE
from gpuworker.engines.mock import NEXT_PICTURE as NEXT_PICTURE
from protocol.wire.ivf import ivf_header, ivf_picture
from protocol.wire.structs import VideoFormat

VIDEO = VideoFormat(width=16, height=16, fps=25)
#: Data and pts of each picture of 0.2 s.
PICTURES = [(KEY_PICTURE if not number else NEXT_PICTURE, number * 3600) for number in range(5)]


def ivf(pictures: list[tuple[bytes, int]], video: VideoFormat = VIDEO) -> bytes:
    """The stream that has these pictures."""
    return ivf_header(video) + b"".join(ivf_picture(data, pts) for data, pts in pictures)
