"""Converts the sample rate and the number of channels of `pcm_s16le` audio. Needs the extra `[audio]`."""

import numpy as np
import soxr
from numpy.typing import NDArray


class Downmix:
    """Mixes two channels into one: their mean."""

    def feed(self, data: bytes) -> bytes:
        """Return the mean of each pair of samples; each channel at -6 dB, so that nothing clips."""
        pairs = np.frombuffer(data, "<i2").reshape(-1, 2)
        return _bytes((pairs.astype(np.int32).sum(axis=1) >> 1).astype("<i2"))

    def finish(self) -> bytes:
        """Return nothing: no data is buffered."""
        return b""


class Resampler:
    """Converts the sample rate, with libsoxr.

    Quality `HQ` (20 bits) delays audio by 20 ms, and by 90 ms for 8 kHz to 48 kHz. `VHQ` did not sound better on
    speech, and `LQ`, with a delay of 5 ms, has audible aliasing in the upper band.

    Args:
        source_hz: sample rate of the input.
        wanted_hz: sample rate of the output.
        channels: number of channels of both.
    """

    def __init__(self, source_hz: int, wanted_hz: int, channels: int) -> None:
        self._channels = channels
        self._stream = soxr.ResampleStream(source_hz, wanted_hz, channels, dtype="int16", quality="HQ")

    def feed(self, data: bytes) -> bytes:
        """Convert more samples; returns what is ready."""
        return self._resample(data, last=False) if data else b""

    def finish(self) -> bytes:
        """Return the rest of the output."""
        return self._resample(b"", last=True)

    def _resample(self, data: bytes, *, last: bool) -> bytes:
        samples = np.frombuffer(data, "<i2").astype(np.int16, copy=False)
        if self._channels > 1:
            samples = samples.reshape(-1, self._channels)
        return _bytes(self._stream.resample_chunk(samples, last=last).astype("<i2", copy=False))


def _bytes(samples: NDArray[np.int16]) -> bytes:
    return samples.tobytes()
