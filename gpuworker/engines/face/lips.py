"""Reads from speech how the mouth stands: its loudness opens it, three bands of its spectrum say how wide it is.

Causal, and without a model: what it says of a window depends on that and the ones before. It works for any language and
for the speech of any engine.
"""

import numpy as np
from numpy.typing import NDArray

#: Bands in Hz: open vowels, spread vowels (the second formant of "ee" lies in it), and hiss.
_LOW, _MIDDLE, _HIGH = (200, 1_000), (1_000, 2_800), (3_500, 8_000)
#: Loudness (RMS of full scale) below which nobody speaks, and the least that counts as this speaker's loud.
_SILENCE, _LEAST_LOUD = 0.004, 0.02
#: What is left each second of the loudest so far, by which loudness is judged.
_FORGET = 0.88
#: How far the lips go in 40 ms of their way: opening, closing, in width.
_OPENS, _CLOSES, _WIDENS = 0.75, 0.55, 0.5
REST = 0.5


class Lips:
    """Follows one speech, window by window.

    Args:
        window: samples in one.
        rate: samples a second.
    """

    def __init__(self, window: int, rate: int) -> None:
        self._hann = np.hanning(window).astype(np.float32)
        hz = np.fft.rfftfreq(window, 1 / rate)
        self._bands = [(hz >= low) & (hz < high) for low, high in (_LOW, _MIDDLE, _HIGH)]
        seconds = window / rate
        self._forget = _FORGET**seconds
        self._ease = [1 - (1 - part) ** (seconds / 0.04) for part in (_OPENS, _CLOSES, _WIDENS)]
        self._loudest = 0.05
        self._opening, self._width = 0.0, REST

    def follow(self, pcm: NDArray[np.int16]) -> tuple[float, float]:
        """The opening and the width of the mouth in the next window, 0..1.

        Args:
            pcm: its samples; a few more are passed over, those that a last one lacks are silence.
        """
        samples = np.zeros(len(self._hann), np.float32)
        known = pcm[: len(samples)]
        samples[: len(known)] = known / np.float32(32_768)
        opens, closes, widens = self._ease
        opening, width = self._wanted(samples)
        self._opening += (opening - self._opening) * (opens if opening > self._opening else closes)
        self._width += (width - self._width) * widens
        return self._opening, self._width

    def _wanted(self, samples: NDArray[np.float32]) -> tuple[float, float]:
        loud = float(np.sqrt(np.mean(samples * samples)))
        self._loudest = max(self._loudest * self._forget, loud, _LEAST_LOUD)
        if loud < _SILENCE:
            return 0.0, REST
        power = np.abs(np.fft.rfft(samples * self._hann)) ** 2
        low, middle, high = (float(power[band].sum()) + 1e-9 for band in self._bands)
        hiss = high / (low + middle + high)  # s, f, sh: the teeth are nearly closed
        voiced = low / (low + middle)
        opening = min(1.0, loud / self._loudest) * (1 - 0.8 * min(1.0, 1.5 * hiss)) * (0.45 + 0.55 * voiced)
        return opening, min(1.0, 2.2 * (1 - voiced))
