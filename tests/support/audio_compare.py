"""Compares the output of an encoder, decoded by FFmpeg, with its input."""

import contextlib
import io
import itertools
from typing import Any

import attrs
import av
import numpy as np
from av.audio.resampler import AudioResampler
from numpy.typing import NDArray

from protocol.audio.encoder import PCM
from protocol.wire.structs import AudioFormat

Samples = NDArray[np.float64]
#: Length of the windows in which energy is measured; codecs add up to 70 ms of silence at the start.
WINDOW_S = 0.05
#: Spectra are compared at this rate, up to 4 kHz, which every coding keeps.
COMPARED_HZ = 8_000


@attrs.frozen
class Sound:
    """Mono samples and their rate."""

    samples: Samples
    rate_hz: int

    @property
    def duration_s(self) -> float:
        return len(self.samples) / self.rate_hz


def speech_like(rate_hz: int, duration_s: float, channels: int = 1) -> bytes:
    """Gliding harmonics in syllables with pauses between them, as `pcm_s16le`; the same for the same arguments."""
    at = np.arange(round(rate_hz * duration_s)) / rate_hz
    pitch = 2 * np.pi * np.cumsum(140 + 40 * np.sin(2 * np.pi * 0.7 * at)) / rate_hz
    voice = sum(np.sin(k * pitch) / k for k in range(1, 12) if 180 * k < rate_hz / 2)
    syllables = np.clip(np.sin(2 * np.pi * 2.3 * at), 0, None) ** 0.5 * (0.5 + 0.5 * np.sin(2 * np.pi * 0.31 * at))
    mono = (9_000 * voice * syllables).astype("<i2")
    return bytes(np.repeat(mono[:, None], channels, axis=1).tobytes())


def of_pcm(pcm: bytes, audio_format: AudioFormat = PCM) -> Sound:
    """Decode raw samples, with all channels mixed to one."""
    samples = np.frombuffer(pcm, "<i2").reshape(-1, audio_format.channels).mean(axis=1)
    return Sound(samples, audio_format.sample_rate)


def decoded(body: bytes, coding: str) -> Sound:
    """Decode `body` as a player does, mixed to one channel."""
    if coding == "pcm":
        return of_pcm(body)
    pieces: list[Any] = []
    with av.open(io.BytesIO(body), "r") as container:
        stream = container.streams.audio[0]
        mono = AudioResampler(format="s16", layout="mono", rate=stream.rate)
        with contextlib.suppress(av.InvalidDataError):  # the body was cut off here
            for frame in container.decode(stream):
                pieces += [piece.to_ndarray()[0] for piece in mono.resample(frame)]
        pieces += [piece.to_ndarray()[0] for piece in mono.resample(None)]
        rate_hz = stream.rate
    return Sound(np.concatenate(pieces).astype(np.float64) if pieces else np.zeros(0), rate_hz)


def energy_likeness(one: Sound, other: Sound, speed: float = 1.0) -> float:
    """Correlation of the energies over time, at the best delay up to 150 ms; 1 for equal sounds.

    Args:
        one: the original.
        other: the decoded sound.
        speed: the factor by which `other` is faster than `one`.
    """
    before = _energy(one, WINDOW_S)
    delays_s = np.arange(0, 0.15, 0.005)
    return max(_correlation(before, _energy(other, WINDOW_S / speed, delay_s)) for delay_s in delays_s)


def spectral_likeness(one: Sound, other: Sound) -> float:
    """Correlation of the mean spectra up to 4 kHz, in dB; 1 for equal sounds.

    A shift in time has no effect, a shift in pitch has.
    """
    return _correlation(_spectrum(one), _spectrum(other))


def _energy(sound: Sound, window_s: float, delay_s: float = 0.0) -> Samples:
    size, begin = sound.rate_hz * window_s, round(delay_s * sound.rate_hz)
    edges = begin + (np.arange(int((len(sound.samples) - begin) / size) + 1) * size).astype(int)
    return np.array([np.sqrt(np.mean(sound.samples[a:b] ** 2)) for a, b in itertools.pairwise(edges)])


def _spectrum(sound: Sound) -> Samples:
    """The mean spectrum in dB, in bins of 50 Hz."""
    size = sound.rate_hz // 50
    whole = len(sound.samples) // size * size
    blocks = sound.samples[:whole].reshape(-1, size) * np.hanning(size)
    power = np.mean(np.abs(np.fft.rfft(blocks, axis=1)) ** 2, axis=0)[: COMPARED_HZ // 2 // 50]
    decibels: Samples = 10 * np.log10(power + power.max() * 1e-6)
    return decibels


def _correlation(one: Samples, other: Samples) -> float:
    size = min(len(one), len(other))
    return float(np.corrcoef(one[:size], other[:size])[0, 1])
