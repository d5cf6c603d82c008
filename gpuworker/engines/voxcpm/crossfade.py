"""Joins pieces of speech into one stream without clicks, and converts samples to PCM.

The silence that a model leaves around a piece is kept: telling silence from a soft breath or consonant would be a
guess, and trimming the end would hold back audio until it is known not to be the end.
"""

from collections.abc import Generator, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]


def pcm16(samples: Samples) -> bytes:
    """Convert samples to signed 16-bit little-endian PCM.

    Args:
        samples: shape (n,), full scale -1..1. Values beyond are clipped; values that are not finite become silence.

    Returns:
        2 bytes per sample: x * 32767 rounded to the nearest integer, halves to even. Computed in double precision: in
        single precision the product itself is rounded, and about one sample in some hundred is off by one step.
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
    begins: bool = True,
    ends: bool = True,
) -> Generator[Samples, None, None]:
    """Stream segments one after another, with a short pause between them, fading out before it and in after it.

    The start of the first segment and the end of the last are left unchanged, so a single segment comes out bit for
    bit, chunk by chunk. A segment is requested only after the one before has ended and is closed. Chunks are not
    modified in place. Closing this generator early closes the current segment, then `segments`, if they have a `close`.

    Args:
        segments: each an iterator of chunks of shape (n,), n >= 0, float32. A segment without samples adds no pause.
        count: the number of segments, known beforehand, so that nothing of the last is held back.
        sample_rate: of all segments, Hz.
        pause_s: silence between two segments, seconds.
        fade_s: length of each fade, seconds; also the most that is held back of a segment other than the last.
        begins: False if other segments came before these: then the first has a pause before it, and fades in as well.
        ends: False if others may follow: then the last fades out as well, and has no pause after it.

    Yields:
        chunks of shape (n,), n >= 0; equal input chunks give equal output chunks.

    Raises:
        ValueError: there are more than `count` segments.
    """
    fade = round(fade_s * sample_rate)
    # Half a Hann window: neither the value nor the slope jumps at either end.
    ramp = (0.5 - 0.5 * np.cos(np.pi * np.arange(1, fade + 1) / (fade + 1))).astype(np.float32)
    pause = np.zeros(round(pause_s * sample_rate), np.float32)
    try:
        if not begins:
            yield pause
        for index, segment in enumerate(segments):
            try:
                if index >= count:
                    raise ValueError(f"there are more than the {count} segments announced")
                faded = segment if index == 0 and begins else _fade_in(segment, ramp)
                if index < count - 1:
                    yield from _fade_out(faded, ramp, pause)
                elif ends:
                    yield from faded
                else:
                    yield from _fade_out(faded, ramp, pause[:0])
            finally:
                _close(segment)
    finally:
        _close(segments)


def _fade_in(chunks: Iterator[Samples], ramp: Samples) -> Iterator[Samples]:
    """Yield the chunks, fading in from silence."""
    done = 0
    for chunk in chunks:
        rising = ramp[done : done + len(chunk)]
        if len(rising):
            done += len(rising)
            yield np.concatenate([chunk[: len(rising)] * rising, chunk[len(rising) :]])
        else:
            yield chunk


def _fade_out(chunks: Iterator[Samples], ramp: Samples, pause: Samples) -> Iterator[Samples]:
    """Yield the chunks, fading out to silence, then the pause; holds back as many samples as the ramp has."""
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
    """Close a generator or similar; plain iterators have nothing to close."""
    close = getattr(chunks, "close", None)
    if close is not None:
        close()
