"""Joins pieces of speech into one stream without clicks, and converts samples to PCM.

The silence that a model leaves round a piece is kept: what is silence and what is a soft breath or consonant is
a guess, and trimming the end would hold back audio until it is known not to be the end.
"""

from collections.abc import Generator, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]


def pcm16(samples: Samples) -> bytes:
    """Samples as signed 16-bit little-endian PCM.

    Args:
        samples: shape (n,), full scale -1..1. What is beyond is clipped, what is not finite becomes silence.

    Returns:
        2 bytes a sample: x * 32767 rounded to nearest, halves to even. Computed in double precision: in single
        precision the product itself is rounded, and one sample in some hundred comes out one step off.
    """
    exact = samples.astype(np.float64)
    exact[~np.isfinite(exact)] = 0.0
    return np.rint(np.clip(exact, -1.0, 1.0) * 32767.0).astype("<i2").tobytes()


def join(
    segments: Iterable[Iterator[Samples]],
    count: int,
    sample_rate: int,
    *,
    pause_s: float = 0.15,
    fade_s: float = 0.01,
) -> Generator[Samples, None, None]:
    """Streams segments one after another, with a short silence between them that is faded into and out of.

    The start of the first and the end of the last are left as they are; so one segment alone comes out bit for bit,
    chunk by chunk. A segment is asked for only after the one before has ended and is closed. Chunks are not changed in
    place.

    Args:
        segments: each an iterator of chunks of shape (n,), n >= 0, float32. One with no samples adds no pause.
        count: how many segments there are, known beforehand: the last is not held back.
        sample_rate: of all segments, Hz.
        pause_s: silence between two segments, seconds.
        fade_s: length of each fade, seconds; also the most that is held back of a segment that is not the last.

    Yields:
        Chunks of shape (n,), n >= 0; the same ones for the same chunks in.

    Raises:
        ValueError: more segments come than `count`.

    Closing it in mid-stream closes the running segment, then `segments`, where they have a `close`.
    """
    fade = round(fade_s * sample_rate)
    # Half a Hann window: neither value nor slope jumps at either end.
    ramp = (0.5 - 0.5 * np.cos(np.pi * np.arange(1, fade + 1) / (fade + 1))).astype(np.float32)
    pause = np.zeros(round(pause_s * sample_rate), np.float32)
    try:
        for index, segment in enumerate(segments):
            try:
                if index >= count:
                    raise ValueError(f"a segment more than the {count} that were to be joined")
                faded = segment if index == 0 else _fade_in(segment, ramp)
                if index == count - 1:
                    yield from faded
                else:
                    yield from _fade_out(faded, ramp, pause)
            finally:
                _close(segment)
    finally:
        _close(segments)


def _fade_in(chunks: Iterator[Samples], ramp: Samples) -> Iterator[Samples]:
    """The chunks, fading in from silence."""
    done = 0
    for chunk in chunks:
        rising = ramp[done : done + len(chunk)]
        if len(rising):
            done += len(rising)
            yield np.concatenate([chunk[: len(rising)] * rising, chunk[len(rising) :]])
        else:
            yield chunk


def _fade_out(chunks: Iterator[Samples], ramp: Samples, pause: Samples) -> Iterator[Samples]:
    """The chunks, fading out to silence, and the pause; holds back as many samples as the ramp has."""
    held = np.zeros(0, np.float32)
    sounded = False
    for chunk in chunks:
        both = np.concatenate([held, chunk])
        ready = max(0, len(both) - len(ramp))
        held = both[ready:]
        sounded = sounded or len(both) > 0
        if ready:
            yield both[:ready]
    if sounded:
        yield np.concatenate([held * ramp[::-1][len(ramp) - len(held) :], pause])


def _close(chunks: object) -> None:
    """Close a generator or the like; plain iterators have nothing to close."""
    close = getattr(chunks, "close", None)
    if close is not None:
        close()
