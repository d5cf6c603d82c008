"""Samples of another rate or number of channels: `pcm_s16le` in, `pcm_s16le` out. Needs the extra `[audio]`."""

import numpy as np
import soxr
from numpy.typing import NDArray


class Downmix:
    """Two channels to one: their mean."""

    def feed(self, data: bytes) -> bytes:
        """The mean of each pair; at -6 dB each, so that nothing clips."""
        pairs = np.frombuffer(data, "<i2").reshape(-1, 2)
        return _bytes((pairs.astype(np.int32).sum(axis=1) >> 1).astype("<i2"))

    def finish(self) -> bytes:
        """Nothing: it holds nothing back."""
        return b""


class Resampler:
    """Another sample rate, by libsoxr.

    Its quality `HQ` (20 bits) holds back 20 ms of audio, 90 ms for 8 kHz to 48 kHz; `VHQ` was no better to
    the ear on speech, and `LQ`, which holds back 5 ms, mirrors the upper band audibly.

    Args:
        source_hz: sample rate of what is fed.
        wanted_hz: of what comes back.
        channels: of both.
    """

    def __init__(self, source_hz: int, wanted_hz: int, channels: int) -> None:
        self._channels = channels
        self._stream = soxr.ResampleStream(source_hz, wanted_hz, channels, dtype="int16", quality="HQ")

    def feed(self, data: bytes) -> bytes:
        """What `data` made ready."""
        return self._resample(data, last=False) if data else b""

    def finish(self) -> bytes:
        """What was held back."""
        return self._resample(b"", last=True)

    def _resample(self, data: bytes, *, last: bool) -> bytes:
        samples = np.frombuffer(data, "<i2").astype(np.int16, copy=False)
        if self._channels > 1:
            samples = samples.reshape(-1, self._channels)
        return _bytes(self._stream.resample_chunk(samples, last=last).astype("<i2", copy=False))


def _bytes(samples: NDArray[np.int16]) -> bytes:
    return samples.tobytes()
