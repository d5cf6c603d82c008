"""Audio as HTTP clients want it: streaming encoders from a worker's `pcm_s16le` to what the API names.

An encoder is a chain of stages, each `feed(bytes) -> bytes` and in the end `finish() -> bytes`: stretch the time, mix
to one channel, resample, then the codec. Whatever a stage can give at once it gives at once. No stage knows a thread
or a loop: they take about 1 ms of CPU for 100 ms of audio, so `threaded_encoder` runs them in threads.

The base install makes `wav`, and `pcm` where the worker already speaks at 24 kHz mono; all else needs the extra
`[audio]` (PyAV, soxr), which is imported when it is first asked for.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import attrs

from protocol.commands.wav_writer import HEADER_BYTES, MAX_DATA_BYTES, wav_header
from protocol.install_hint import install_command
from protocol.wire.structs import AudioFormat

#: What OpenAI's clients take `pcm` for; they have no way to be told otherwise.
PCM = AudioFormat(sample_rate=24_000, channels=1)
MIN_SPEED, MAX_SPEED = 0.25, 4.0


class AudioExtraMissing(Exception):
    """The packages that make this format are not installed."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"this relay cannot make {what}: it runs without its audio packages. Its owner installs them with: "
            f"{install_command('audio')}; response_format 'wav' at speed 1 works without"
        )


class Stage(Protocol):
    """Takes bytes as they come, and gives what it can."""

    def feed(self, data: bytes) -> bytes:
        """What `data` made ready; may be empty."""

    def finish(self) -> bytes:
        """What was held back; nothing is fed any more."""


@attrs.define(eq=False)
class Encoder:
    """A chain of stages, fed with the worker's samples.

    Args:
        source: what is fed.
        stages: in order; the last makes what is sent.
        cheap: whether it only moves bytes, so that nothing is won by a thread.
    """

    source: AudioFormat
    stages: Sequence[Stage]
    cheap: bool = False
    #: Seconds of audio fed.
    _fed_bytes: int = 0
    _odd: bytes = b""

    @property
    def fed_s(self) -> float:
        """Seconds of audio that were fed, before any change of speed."""
        return self._fed_bytes / self.source.sample_bytes / self.source.sample_rate

    def feed(self, pcm: bytes) -> bytes:
        """Encode more samples, and return what is ready; a part of a sample waits for its rest."""
        self._fed_bytes += len(pcm)
        data = self._odd + pcm if self._odd else pcm
        over = len(data) % self.source.sample_bytes
        self._odd = data[len(data) - over :]
        data = data[: len(data) - over]
        for stage in self.stages:
            data = stage.feed(data)
        return data

    def finish(self) -> bytes:
        """The rest of what was fed. Nothing may follow."""
        data = b""
        for stage in self.stages:
            data = stage.feed(data) + stage.finish()
        return data


@attrs.define(eq=False)
class _Wav:
    """A header that does not know how much follows, then the samples.

    Its sizes are the largest there are, as of every program that writes a WAV into a pipe: readers go on to the end.
    """

    audio_format: AudioFormat
    _begun: bool = False

    def feed(self, data: bytes) -> bytes:
        """The samples, behind the header the first time."""
        return self._header() + data

    def finish(self) -> bytes:
        """The header, where there was no audio at all."""
        return self._header()

    def _header(self) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        return wav_header(self.audio_format, MAX_DATA_BYTES - MAX_DATA_BYTES % self.audio_format.sample_bytes)


def with_sizes(name: str, source: AudioFormat, body: bytes) -> bytes:
    """A whole WAV with its true sizes in its header; of any other coding, `body` as it is.

    Args:
        name: of the coding.
        source: what its encoder was fed.
        body: all that it gave.
    """
    return wav_header(source, len(body) - HEADER_BYTES) + body[HEADER_BYTES:] if name == "wav" else body


# -- the codings --------------------------------------------------------------------------------------------------


def _wav(source: AudioFormat) -> list[Stage]:
    return [_Wav(source)]


def _pcm(source: AudioFormat) -> list[Stage]:
    return _converted(source, PCM)


def _by_codec(name: str) -> Callable[[AudioFormat], list[Stage]]:
    def make(source: AudioFormat) -> list[Stage]:
        try:
            from relayd.http.audio.codecs import RECIPES, Codec
        except ImportError:
            raise AudioExtraMissing(name) from None
        recipe = RECIPES[name]
        takes = attrs.evolve(source, sample_rate=recipe.rate_for(source.sample_rate))
        return [*_converted(source, takes), Codec(recipe, takes)]

    return make


def _converted(source: AudioFormat, wanted: AudioFormat) -> list[Stage]:
    """Stages from one format of samples to another."""
    if source == wanted:
        return []
    try:
        from relayd.http.audio.resampler import Downmix, Resampler
    except ImportError:
        spoken = f"{source.sample_rate} Hz with {source.channels} channel{'s' * (source.channels > 1)}"
        raise AudioExtraMissing(f"pcm, which is {wanted.sample_rate} Hz mono, of a worker's {spoken}") from None
    stages: list[Stage] = []
    if wanted.channels < source.channels:
        stages.append(Downmix())
    if wanted.sample_rate != source.sample_rate:
        stages.append(Resampler(source.sample_rate, wanted.sample_rate, wanted.channels))
    return stages


@attrs.frozen
class Coding:
    """One way to send audio.

    Args:
        name: in `response_format`.
        content_type: of the answer.
        stages: makes them for what the worker speaks in.
    """

    name: str
    content_type: str
    stages: Callable[[AudioFormat], list[Stage]] = attrs.field(repr=False)


#: By the names of OpenAI's API, its default first.
CODINGS = {
    coding.name: coding
    for coding in (
        Coding("mp3", "audio/mpeg", _by_codec("mp3")),
        Coding("opus", "audio/ogg; codecs=opus", _by_codec("opus")),
        Coding("aac", "audio/aac", _by_codec("aac")),
        Coding("flac", "audio/flac", _by_codec("flac")),
        Coding("wav", "audio/wav", _wav),
        Coding("pcm", "audio/pcm", _pcm),
    )
}


def open_encoder(name: str, source: AudioFormat, speed: float = 1.0) -> Encoder:
    """An encoder from `source` to the coding of this name.

    Imports what it needs the first time, which takes up to a second: call it in a thread.

    Args:
        name: one of `CODINGS`.
        source: what will be fed.
        speed: of the speech, 0.25..4; its pitch stays.

    Raises:
        KeyError: there is no such coding.
        ValueError: the speed is out of its range.
        AudioExtraMissing: the packages that this takes are not installed.
    """
    if not MIN_SPEED <= speed <= MAX_SPEED:
        raise ValueError(f"speed must be {MIN_SPEED} to {MAX_SPEED}, not {speed}")
    stages: list[Stage] = []
    if speed != 1:
        try:
            from relayd.http.audio.time_stretch import TimeStretch
        except ImportError:
            raise AudioExtraMissing(f"speech at speed {speed:g}") from None
        stages.append(TimeStretch(source, speed))
    stages += CODINGS[name].stages(source)
    return Encoder(source, stages, cheap=all(isinstance(stage, _Wav) for stage in stages))


def check_encoder(name: str, speed: float = 1.0, source: AudioFormat = PCM) -> None:
    """Find out whether a coding can be made here, before anybody is asked to speak; as `open_encoder`, in a thread.

    Raises:
        AudioExtraMissing: not without the extra.
    """
    open_encoder(name, source, speed)
