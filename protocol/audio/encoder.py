"""Streaming audio encoders, from a worker's `pcm_s16le` to the formats that clients can ask for.

An encoder is a chain of stages, each `feed(bytes) -> bytes` and at the end `finish() -> bytes`: time stretch, downmix,
resampler, codec. A stage returns output as early as it can. Stages block and know no threads or event loop: they need
about 1 ms of CPU time per 100 ms of audio, so `threaded_encoder` runs them in threads.

The relay's own packages make `mp3`, `wav`, and `pcm` if the worker's audio is 24 kHz mono; everything else needs the
extra `[audio]` (PyAV, soxr), which is imported on first use.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import attrs

from protocol.audio.mp3_encoder import Mp3Encoder
from protocol.commands.wav_writer import MAX_DATA_BYTES, wav_header
from protocol.install_hint import install_command
from protocol.wire.structs import AudioFormat

#: The format that OpenAI's clients assume for `pcm`.
PCM = AudioFormat(sample_rate=24_000, channels=1)
MIN_SPEED, MAX_SPEED = 0.25, 4.0


class AudioExtraMissing(Exception):
    """The packages that this format needs are not installed."""

    def __init__(self, what: str, extra: str = "audio") -> None:
        super().__init__(
            f"this relay cannot produce {what}: its packages for it are missing. Its owner can install them with: "
            f"{install_command(extra)}; response_format 'wav' at speed 1 works without them"
        )


class Stage(Protocol):
    """Converts a stream of bytes piece by piece.

    The last stage of a chain may have `patches` after `finish`: bytes of its output that it could know only then, such
    as the length in a header, as (offset, data).
    """

    def feed(self, data: bytes) -> bytes:
        """Convert more data; returns what is ready, which may be empty."""

    def finish(self) -> bytes:
        """Return the rest; `feed` may not be called afterwards."""


@attrs.define(eq=False)
class Encoder:
    """A chain of stages that encodes a worker's samples.

    Args:
        source: the format of the input.
        stages: the stages in order; the last one produces the output.
        cheap: whether it only copies bytes, so that a thread is not worth its cost.
    """

    source: AudioFormat
    stages: Sequence[Stage]
    cheap: bool = False
    _fed_bytes: int = 0
    #: The beginning of a sample whose rest was not fed yet.
    _partial: bytes = b""

    @property
    def fed_s(self) -> float:
        """Seconds of audio fed, before any change of speed."""
        return self._fed_bytes / self.source.sample_bytes / self.source.sample_rate

    def feed(self, pcm: bytes) -> bytes:
        """Encode more samples, and return what is ready; a partial sample waits for its rest."""
        self._fed_bytes += len(pcm)
        data = self._partial + pcm if self._partial else pcm
        partial_bytes = len(data) % self.source.sample_bytes
        self._partial = data[len(data) - partial_bytes :]
        data = data[: len(data) - partial_bytes]
        for stage in self.stages:
            data = stage.feed(data)
        return data

    def finish(self) -> bytes:
        """Return the rest of the output; `feed` may not be called afterwards."""
        data = b""
        for stage in self.stages:
            data = stage.feed(data) + stage.finish()
        return data

    def make_repeatable(self) -> None:
        """Have equal input give equal output; call it before `feed`. Not for streams that a client may chain."""
        for stage in self.stages[-1:]:
            getattr(stage, "make_repeatable", lambda: None)()

    def with_sizes(self, body: bytearray) -> bytes:
        """Return the complete output with the sizes in its header, which a stream cannot have; changes `body`."""
        for at, data in self.patches:
            body[at : at + len(data)] = data
        return bytes(body)

    @property
    def patches(self) -> Sequence[tuple[int, bytes]]:
        """See `Stage`; there are none before `finish`."""
        return getattr(self.stages[-1], "patches", ()) if self.stages else ()


@attrs.define(eq=False)
class _Wav:
    """A WAV header for an unknown length, then the samples.

    The header has the largest possible sizes, as usual for a WAV written into a pipe; readers read up to the end.
    """

    audio_format: AudioFormat
    _started: bool = False
    _data_bytes: int = 0

    @property
    def patches(self) -> list[tuple[int, bytes]]:
        """See `Stage`."""
        return [(0, wav_header(self.audio_format, self._data_bytes))]

    def feed(self, data: bytes) -> bytes:
        """Return the samples, the first time after the header."""
        self._data_bytes += len(data)
        return self._header() + data

    def finish(self) -> bytes:
        """Return the header if there was no audio at all."""
        return self._header()

    def _header(self) -> bytes:
        if self._started:
            return b""
        self._started = True
        return wav_header(self.audio_format, MAX_DATA_BYTES - MAX_DATA_BYTES % self.audio_format.sample_bytes)


# -- the codings --------------------------------------------------------------------------------------------------


def _wav(source: AudioFormat) -> list[Stage]:
    return [_Wav(source)]


def _pcm(source: AudioFormat) -> list[Stage]:
    return _converted(source, PCM)


def _mp3(source: AudioFormat) -> list[Stage]:
    try:
        return [Mp3Encoder(source)]
    except ImportError:
        raise AudioExtraMissing("mp3", "relay") from None


def _by_codec(name: str) -> Callable[[AudioFormat], list[Stage]]:
    def make(source: AudioFormat) -> list[Stage]:
        try:
            from protocol.audio.codecs import RECIPES, Codec
        except ImportError:
            raise AudioExtraMissing(name) from None
        recipe = RECIPES[name]
        wanted = attrs.evolve(source, sample_rate=recipe.rate_for(source.sample_rate))
        return [*_converted(source, wanted), Codec(recipe, wanted)]

    return make


def _converted(source: AudioFormat, wanted: AudioFormat) -> list[Stage]:
    """Return the stages that convert between two sample formats."""
    if source == wanted:
        return []
    try:
        from protocol.audio.resampler import Downmix, Resampler
    except ImportError:
        have = f"{source.sample_rate} Hz with {source.channels} channel{'s' * (source.channels > 1)}"
        raise AudioExtraMissing(f"pcm, which is {wanted.sample_rate} Hz mono, from a worker's {have}") from None
    stages: list[Stage] = []
    if wanted.channels < source.channels:
        stages.append(Downmix())
    if wanted.sample_rate != source.sample_rate:
        stages.append(Resampler(source.sample_rate, wanted.sample_rate, wanted.channels))
    return stages


@attrs.frozen
class Coding:
    """One format of encoded audio.

    Args:
        name: its name in `response_format`.
        content_type: content type of the response.
        stages: makes the stages for the format of the worker's audio.
    """

    name: str
    content_type: str
    stages: Callable[[AudioFormat], list[Stage]] = attrs.field(repr=False)


#: By their names in OpenAI's API, the default first.
CODINGS = {
    coding.name: coding
    for coding in (
        Coding("mp3", "audio/mpeg", _mp3),
        Coding("opus", "audio/ogg; codecs=opus", _by_codec("opus")),
        Coding("aac", "audio/aac", _by_codec("aac")),
        Coding("flac", "audio/flac", _by_codec("flac")),
        Coding("wav", "audio/wav", _wav),
        Coding("pcm", "audio/pcm", _pcm),
    )
}


def open_encoder(name: str, source: AudioFormat, speed: float = 1.0) -> Encoder:
    """Make an encoder from `source` to a coding.

    The first call imports packages, which takes up to a second: call it in a thread.

    Args:
        name: a key of `CODINGS`.
        source: the format of the input.
        speed: of the speech, 0.25..4; the pitch stays the same.

    Raises:
        KeyError: the coding does not exist.
        ValueError: the speed is out of range.
        AudioExtraMissing: the packages it needs are not installed.
    """
    if not MIN_SPEED <= speed <= MAX_SPEED:
        raise ValueError(f"speed must be {MIN_SPEED} to {MAX_SPEED}, not {speed}")
    stages: list[Stage] = []
    if speed != 1:
        try:
            from protocol.audio.time_stretch import TimeStretch
        except ImportError:
            raise AudioExtraMissing(f"speech at speed {speed:g}") from None
        stages.append(TimeStretch(source, speed))
    stages += CODINGS[name].stages(source)
    return Encoder(source, stages, cheap=all(isinstance(stage, _Wav) for stage in stages))


def check_encoder(name: str, speed: float = 1.0, source: AudioFormat = PCM) -> None:
    """Check that a coding is available, before a request is submitted; call it in a thread, as `open_encoder`.

    Raises:
        AudioExtraMissing: the packages it needs are not installed.
    """
    open_encoder(name, source, speed)
