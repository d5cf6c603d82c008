"""Cuts sound into utterances: what is said between two silences. Pure.

The sound is looked at in frames of `FRAME_MS`, so the cuts depend on the samples alone, and not on how they come.
"""

import sys
from array import array
from collections import deque
from collections.abc import Iterator
from typing import Protocol

import attrs

FRAME_MS = 30
#: Frames of speech, one after the other, with which an utterance begins: a click is shorter.
BEGINS_FRAMES = 3
#: In speech, a frame counts as silence only when it is so far below the threshold: voices fade between words.
FADE = 0.15
#: Where nobody falls silent, an utterance ends here.
MOST_S = 60.0
#: Peak above which sound is loud, for `loudness`: 2 % of full scale.
LOUD_PEAK = 655


class Detector(Protocol):
    """Says how likely a frame is speech. It is given all frames of a sound in order, and may remember."""

    def __call__(self, frame: bytes) -> float:
        """Return the likelihood, 0 to 1.

        Args:
            frame: `FRAME_MS` of mono, signed 16-bit little-endian samples.
        """


def samples_of(pcm: bytes) -> "array[int]":
    """The samples, as numbers."""
    samples = array("h", pcm)
    if sys.byteorder == "big":
        samples.byteswap()
    return samples


def loudness(frame: bytes) -> float:
    """A detector to which all that is loud is speech."""
    samples = samples_of(frame)
    return 1.0 if max(max(samples), -min(samples)) >= LOUD_PEAK else 0.0


@attrs.frozen
class Began:
    """Speech began, with the sample `sample`; what comes before it of its first sound is counted in."""

    sample: int


@attrs.frozen
class Ended:
    """Speech ended: `silence_ms` before the sample `sample`, or with the sound."""

    sample: int


@attrs.frozen
class Utterance:
    """What was said.

    Args:
        pcm: mono, signed 16-bit little-endian samples.
        sample_rate: Hz.
        start: its first sample, counted from the beginning of the sound.
    """

    pcm: bytes = attrs.field(repr=False)
    sample_rate: int
    start: int

    @property
    def end(self) -> int:
        """The sample behind its last."""
        return self.start + len(self.pcm) // 2


class Utterances:
    """The utterances of a sound.

    Args:
        sample_rate: Hz.
        detector: a new one.
        threshold: the likelihood from which a frame is speech.
        silence_ms: the silence that ends an utterance.
        prefix_ms: what is taken along of the sound before it.
    """

    def __init__(
        self, sample_rate: int, detector: Detector, *, threshold: float, silence_ms: int, prefix_ms: int
    ) -> None:
        self._rate = sample_rate
        self._detector = detector
        self._threshold = threshold
        self._silence_frames = max(1, -(-silence_ms // FRAME_MS))
        self._frame_bytes = 2 * (sample_rate * FRAME_MS // 1000)
        self._most_bytes = int(2 * sample_rate * MOST_S)
        self._held = bytearray()
        #: The end of the last whole frame, in samples.
        self._position = 0
        #: The last frames before an utterance; and the utterance, while one goes on.
        self._before: deque[bytes] = deque(maxlen=BEGINS_FRAMES + prefix_ms // FRAME_MS)
        self._said: bytearray | None = None
        #: Frames of speech before an utterance, or of silence in it, up to now.
        self._run = 0

    def add(self, pcm: bytes) -> Iterator[Began | Ended | Utterance]:
        """Append samples, mono; yields what is known now."""
        self._held += pcm
        while len(self._held) >= self._frame_bytes:
            frame = bytes(self._held[: self._frame_bytes])
            del self._held[: self._frame_bytes]
            self._position += len(frame) // 2
            yield from self._listen(frame)

    def finish(self) -> Iterator[Began | Ended | Utterance]:
        """Yield what the end of the sound ends."""
        if self._said is not None:
            rest = bytes(self._held[: len(self._held) & ~1])
            self._position += len(rest) // 2
            self._said += rest
            yield from self._end()

    def _listen(self, frame: bytes) -> Iterator[Began | Ended | Utterance]:
        likely = self._detector(frame)
        if self._said is None:
            self._before.append(frame)
            self._run = self._run + 1 if likely >= self._threshold else 0
            if self._run >= BEGINS_FRAMES:
                self._said, self._run = bytearray(b"".join(self._before)), 0
                self._before.clear()
                yield Began(self._position - len(self._said) // 2)
            return
        self._said += frame
        self._run = 0 if likely >= max(0.01, self._threshold - FADE) else self._run + 1
        if self._run >= self._silence_frames or len(self._said) >= self._most_bytes:
            yield from self._end()

    def _end(self) -> Iterator[Ended | Utterance]:
        said, self._said, self._run = self._said or bytearray(), None, 0
        yield Ended(self._position)
        yield Utterance(bytes(said), self._rate, self._position - len(said) // 2)
