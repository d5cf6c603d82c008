"""Recordings in the formats of phones and browsers."""

import io
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

RATE_HZ = 48_000
#: FFmpeg's names of a container and of what is in it.
RECORDINGS = [("ipod", "aac"), ("mp4", "aac"), ("adts", "aac"), ("webm", "libopus"), ("matroska", "libopus")]


def tone(seconds: float, rate: int = 16_000, channels: int = 1, level: float = 0.3) -> NDArray[np.float32]:
    """Samples of shape (n, channels), another pitch in each channel."""
    time = np.arange(round(seconds * rate)) / rate
    return np.stack([level * np.sin(2 * np.pi * 220 * (1 + at) * time) for at in range(channels)], 1).astype(np.float32)


def make_recording(kind: str, codec: str, seconds: float = 1.0, channels: int = 1, rate: int = RATE_HZ) -> bytes:
    """A tone, encoded as a phone or a browser does it."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream: Any = container.add_stream(codec, rate=rate, layout="mono" if channels == 1 else "stereo")
        stream.bit_rate = 64_000  # of which WMA has no default
        layout = stream.layout.name
        samples = np.ascontiguousarray(tone(seconds, rate, channels).T)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
        frame.rate = rate
        for part in av.AudioResampler(format=stream.format.name, layout=layout, rate=rate).resample(frame):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return file.getvalue()
