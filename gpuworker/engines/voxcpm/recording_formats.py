"""The formats of phones and browsers, which libsndfile does not read: recognized by their first bytes, read by PyAV."""

import importlib.util
import io
from collections.abc import Iterator

import attrs
import numpy as np
from numpy.typing import NDArray


@attrs.frozen
class RecordingFormat:
    """A format that libsndfile cannot read.

    Args:
        description: what it is, for people.
        demuxer: FFmpeg's name for it; no other demuxer is given the bytes.
        suffix: of its files.
    """

    description: str
    demuxer: str
    suffix: str

    @property
    def advice(self) -> str:
        """What to do where it is not read."""
        return (
            f"is {self.description}, which is not read here; convert it: ffmpeg -i recording{self.suffix} recording.wav"
        )


MP4 = RecordingFormat("MP4/AAC audio (a phone's recording)", "mov", ".m4a")
WEBM = RecordingFormat("WebM audio (a browser's recording)", "matroska", ".webm")
AAC = RecordingFormat("AAC audio", "aac", ".aac")
AMR = RecordingFormat("AMR audio (a phone's recording)", "amr", ".amr")
CAF = RecordingFormat("CAF audio (Apple's)", "caf", ".caf")
WMA = RecordingFormat("WMA audio (Windows Media)", "asf", ".wma")


def recognize(data: bytes) -> RecordingFormat | None:
    """The format of a file that begins with `data`; None if it is none of these."""
    if data[4:8] == b"ftyp":
        return MP4
    if len(data) > 1 and data[0] == 0xFF and data[1] & 0xF6 == 0xF0:  # ADTS: layer 0, which MPEG audio never has
        return AAC
    starts = {b"\x1a\x45\xdf\xa3": WEBM, b"#!AM": AMR, b"caff": CAF, b"ADIF": AAC, b"\x30\x26\xb2\x75": WMA}
    return starts.get(data[:4])


def can_read() -> bool:
    """Whether PyAV is installed."""
    return importlib.util.find_spec("av") is not None


class NotReadable(Exception):
    """PyAV finds no audio in the file."""


@attrs.frozen
class Blocks:
    """The audio of a file: its rate in Hz, its channels, and its samples in blocks of shape (n, channels)."""

    rate: int
    channels: int
    samples: Iterator[NDArray[np.float32]]


def open_recording(data: bytes, kind: RecordingFormat) -> Blocks:
    """Open a file for reading.

    Raises:
        NotReadable: it is damaged, or has no audio. So may reading the blocks.
    """
    av = importlib.import_module("av")
    try:
        container = av.open(io.BytesIO(data), format=kind.demuxer)
        if not container.streams.audio:
            raise NotReadable("it has no audio track")
        stream = container.streams.audio[0]
        if stream.codec_context is None:
            raise NotReadable("its audio is in a codec that FFmpeg does not know")
        rate, channels = int(stream.rate or 0), int(stream.channels or 0)
    except (av.FFmpegError, ValueError, EOFError) as fault:
        raise NotReadable(_words(fault)) from None

    def blocks() -> Iterator[NDArray[np.float32]]:
        try:
            with container:
                resampler = av.AudioResampler(format="fltp", layout=stream.layout.name, rate=rate)
                for frame in container.decode(stream):
                    for made in resampler.resample(frame):
                        yield made.to_ndarray().T
        except (av.FFmpegError, ValueError, EOFError) as fault:
            raise NotReadable(_words(fault)) from None

    return Blocks(rate, channels, blocks())


def _words(fault: BaseException) -> str:
    return str(getattr(fault, "strerror", None) or fault)
