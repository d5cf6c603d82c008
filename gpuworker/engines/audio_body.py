"""Reads bytes as audio, in pieces of any size: the body of a speech server's answer, or an input. Pure.

A body is PCM, or WAV, which its first bytes show whatever its type says: a server that is asked for PCM may only know
WAV. WAVs may follow one another, a sentence each.
"""

import struct
from array import array
from collections.abc import Generator, Iterator, Mapping
from email.message import Message

import attrs

from gpuworker.engines.base import AudioChunk, Chunk, EngineError, FormatChunk
from protocol.wire.structs import AudioFormat

_WAV_HEAD_BYTES = 12
#: Longest `fmt ` chunk; WAVE_FORMAT_EXTENSIBLE has 40 bytes.
MAX_FMT_BYTES = 256
#: A WAV that is made while it is sent says 0, or about 2 or 4 GiB.
ENDLESS_BYTES = 0x7FFF_0000
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
#: Types of PCM. `audio/l16` is big-endian in RFC 3551, but speech servers that say it send what `pcm` means to OpenAI.
_RAW = {"", "audio/pcm", "audio/x-pcm", "audio/l16", "audio/x-l16", "audio/raw", "audio/x-raw"}
_RAW |= {"application/octet-stream", "binary/octet-stream"}
#: First bytes of MP3, FLAC and Ogg, which some servers send as `application/octet-stream`.
_COMPRESSED = (b"ID3", b"fLaC", b"OggS")
_RATES = ("x-audio-sample-rate", "x-sample-rate")
_CHANNELS = ("x-audio-channels", "x-channels")
_BITS = ("x-audio-bits-per-sample", "x-audio-bit-depth", "x-bits-per-sample", "x-bit-depth")
_ENCODINGS = ("x-audio-format", "x-audio-encoding", "x-audio-codec")


@attrs.frozen
class Declared:
    """What the head of an answer says about its body; None where it says nothing."""

    media_type: str
    sample_rate: int | None = None
    channels: int | None = None

    @property
    def is_text(self) -> bool:
        """Whether the body is something to read: an error, a page or events."""
        return (
            self.media_type.startswith("text/")
            or self.media_type.partition("+")[2] == "json"
            or (self.media_type in ("application/json", "application/xml"))
        )


def declared(headers: Mapping[str, str]) -> Declared:
    """Read `Content-Type`, with its `rate` and `channels`, and `X-Audio-…`.

    Args:
        headers: by name in lower case.

    Raises:
        EngineError: the samples are not 16-bit.
    """
    head = Message()
    head["content-type"] = headers.get("content-type", "")
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    bits = _number(*(headers.get(name) for name in _BITS))
    encoding = next((headers[name].lower() for name in _ENCODINGS if name in headers), "")
    if bits not in (None, 16) or "f32" in encoding or "float" in encoding:
        raise EngineError(
            f"the speech server sends {encoding or f'{bits}-bit'} samples; let it make 16-bit PCM, or WAV"
        )
    rates = [head.get_param(name) for name in ("rate", "sample_rate", "samplerate")]
    return Declared(
        media_type,
        _number(*(headers.get(name) for name in _RATES), *rates),
        _number(*(headers.get(name) for name in _CHANNELS), head.get_param("channels")),
    )


def _number(*texts: object) -> int | None:
    numbers = (text.strip() for text in texts if isinstance(text, str))
    return next((int(text[:9]) for text in numbers if text.isdecimal()), None)


class AudioBody:
    """Chunks of the audio in a body; a `FormatChunk` first, unless the format is fixed.

    Args:
        head: what the head of the answer said.
        expected: the format of PCM whose head says nothing.
        fixed: the format is `expected` whatever the head says; a WAV of another format is refused.
        sender: who sends it, in errors.
    """

    def __init__(
        self, head: Declared, expected: AudioFormat, *, fixed: bool, sender: str = "the speech server"
    ) -> None:
        self._sender = sender
        self._head = head
        self._expected = expected
        self._fixed = fixed
        self._format: AudioFormat | None = None
        self._held = bytearray()
        self._wav: bool | None = None
        #: In a WAV: bytes to leave out before the next chunk's head, and bytes of samples to come.
        self._skip = 0
        self._samples = 0
        self._float = False
        self._made = False

    def feed(self, data: bytes) -> Iterator[Chunk]:
        """The chunks that `data` completes.

        Raises:
            EngineError: it is not audio that can be used.
        """
        self._held += data
        if self._wav is None:
            if len(self._held) < _WAV_HEAD_BYTES:
                return
            yield from self._begin()
        yield from self._more()

    def end(self) -> Iterator[Chunk]:
        """The chunks that the end of the body completes; part of a sample is left out.

        Raises:
            EngineError: there was no audio.
        """
        if self._wav is None and self._held:
            yield from self._begin()
            yield from self._more()
        if not self._made:
            raise EngineError(f"{self._sender} made no audio of this; send another text")

    def _begin(self) -> Iterator[Chunk]:
        head = bytes(self._held[:_WAV_HEAD_BYTES])
        self._wav = head[:4] == b"RIFF" and head[8:] == b"WAVE"
        if self._wav:
            return
        kind = self._head.media_type
        if kind not in _RAW or head.startswith(_COMPRESSED):
            raise EngineError(
                f"{self._sender} sent {kind[:64] or 'something'}, which is neither PCM nor WAV; its owner may try "
                "-o response_format=wav"
            )
        rate, channels = self._head.sample_rate, self._head.channels
        if self._fixed or (rate is None and channels is None):
            yield from self._started(self._expected.sample_rate, self._expected.channels)
        else:
            yield from self._started(rate or self._expected.sample_rate, channels or 1)

    def _started(self, rate: int, channels: int) -> Iterator[Chunk]:
        try:
            found = AudioFormat(sample_rate=rate, channels=channels)
        except ValueError as fault:
            raise EngineError(f"{self._sender}'s audio cannot be used: {fault}") from None
        if self._format not in (None, found) or (self._fixed and found != self._expected):
            before = self._format or self._expected
            raise EngineError(
                f"{self._sender} made audio of {_words(found)} after {_words(before)}"
                if self._format
                else f"{self._sender} made audio of {_words(found)}, and not of {_words(before)}; its owner leaves "
                "out -o sample_rate and channels"
            )
        if self._format is None:
            self._format = found
            if not self._fixed:
                yield FormatChunk(found)

    def _more(self) -> Iterator[Chunk]:
        held = self._held
        if not self._wav:
            yield from self._audio(len(held))
            return
        while held:
            if self._skip:
                left_out = min(self._skip, len(held))
                del held[:left_out]
                self._skip -= left_out
            elif self._samples >= self._sample_bytes > 0:
                before = len(held)
                yield from self._audio(min(self._samples, before))
                if len(held) == before:
                    return  # part of a sample
                self._samples -= before - len(held)
            elif self._samples:  # it ends in mid-sample; chunks have an even length
                self._skip, self._samples = self._samples + self._samples % 2, 0
            elif not (yield from self._chunk_head()):
                return

    def _chunk_head(self) -> Generator[Chunk, None, bool]:
        """Read the head of a WAV's chunk, and `fmt ` whole; False if more bytes must come first."""
        held = self._held
        if len(held) < 8:
            return False
        if held.startswith(b"RIFF"):  # this WAV, or one after it
            self._skip = _WAV_HEAD_BYTES
            return True
        name, size = struct.unpack_from("<4sI", held)
        if name == b"data":
            if self._format is None:
                raise EngineError(f"{self._sender}'s WAV has no format before its samples")
            self._samples = 1 << 62 if size == 0 or size >= ENDLESS_BYTES else size
            del held[:8]
            return True
        if name != b"fmt ":
            self._skip = 8 + size + size % 2
            return True
        if not 16 <= size <= MAX_FMT_BYTES:
            raise EngineError(f"{self._sender}'s WAV cannot be read: its format has an impossible length")
        if len(held) < 8 + size:
            return False
        coding, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", held, 8)
        if coding == _EXTENSIBLE and size >= 26:
            (coding,) = struct.unpack_from("<H", held, 8 + 24)
        if (coding, bits) not in ((_PCM, 16), (_FLOAT, 32)):
            raise EngineError(f"{self._sender}'s WAV has {bits}-bit samples of kind {coding}; let it make 16-bit PCM")
        self._float = coding == _FLOAT
        yield from self._started(rate, channels)
        self._skip = 8 + size + size % 2
        return True

    @property
    def _sample_bytes(self) -> int:
        """Bytes of one sample over all channels; 0 while the format is unknown."""
        return 0 if self._format is None else self._format.sample_bytes * (2 if self._float else 1)

    def _audio(self, available: int) -> Iterator[Chunk]:
        """The whole samples among the first `available` bytes held."""
        whole = available - available % self._sample_bytes
        if whole:
            data = bytes(self._held[:whole])
            del self._held[:whole]
            self._made = True
            yield AudioChunk(_from_float(data) if self._float else data)


def _from_float(data: bytes) -> bytes:
    return array("h", (round(32_767 * min(1.0, max(-1.0, sample))) for sample in array("f", data))).tobytes()


def _words(made: AudioFormat) -> str:
    return f"{made.sample_rate} Hz with {made.channels} channel{'s' * (made.channels > 1)}"
