"""Reads an input as sound: mono samples, in whichever pieces and container it comes. Pure."""

import sys
from array import array
from collections.abc import Callable, Iterator

import attrs

from gpuworker.engines.audio_body import AudioBody, declared
from gpuworker.engines.base import AudioChunk, Chunk, EngineError, EngineInput, FormatChunk, LiveInput
from gpuworker.hearing.utterances import samples_of
from protocol.wire.errors import ErrorCode
from protocol.wire.media_types import BINARY, essence, recognize
from protocol.wire.structs import AudioFormat

#: Samples without a container; `audio/pcm` without a rate is OpenAI's, 24 kHz mono.
RAW = ("audio/l16", "audio/pcm")
WAV = ("audio/wav", "audio/x-wav", "audio/wave", "audio/vnd.wave")
_PCM = AudioFormat(sample_rate=24_000)
SENDER = "the client"
#: A piece that is looked at without a look whether to stop.
STEP_BYTES = 64 * 1024


@attrs.frozen
class Sound:
    """Samples of a sound: mono, signed 16-bit little-endian; the rate is that of the whole sound."""

    sample_rate: int
    pcm: bytes = attrs.field(repr=False)


#: Reads a whole file of a format that is neither PCM nor WAV.
Decode = Callable[[bytes], Sound]


def read_sound(given: EngineInput | LiveInput, decode: Decode | None = None) -> Iterator[Sound]:
    """Yield an input as it comes; one without sound yields nothing.

    Args:
        given: the input.
        decode: for other formats than PCM and WAV, which are read at their end.

    Raises:
        EngineError: it is no sound that can be read.
    """
    kind = essence(given.media_type)
    if isinstance(given, EngineInput) and kind not in RAW:
        kind = recognize(given.data) or kind
    if kind in WAV and isinstance(given, EngineInput) and decode is not None:
        yield decode(given.data)  # it reads more kinds of WAV
    elif kind in RAW or kind in WAV or (kind == BINARY and decode is None):
        yield from _read_pcm(given)
    elif decode is not None:
        yield decode(b"".join(given))
    else:
        what = f"input audio is {kind!r}, which is not read here; send audio/wav, or audio/L16 with rate and channels"
        raise EngineError(what, code=ErrorCode.INPUT_MISMATCH)


def _read_pcm(given: EngineInput | LiveInput) -> Iterator[Sound]:
    head = declared({"content-type": given.media_type})
    if head.media_type == "audio/l16" and head.sample_rate is None:
        raise EngineError(
            "audio/L16 needs its rate: say audio/L16;rate=16000;channels=1", code=ErrorCode.INPUT_MISMATCH
        )
    body, found = AudioBody(head, _PCM, fixed=False, sender=SENDER), _PCM
    for data in given:
        for start in range(0, len(data), STEP_BYTES):
            for chunk in _chunks(body, data[start : start + STEP_BYTES]):
                if isinstance(chunk, FormatChunk) and chunk.format is not None:
                    found = chunk.format
                elif isinstance(chunk, AudioChunk):
                    yield Sound(found.sample_rate, mono(chunk.pcm, found.channels))


def _chunks(body: AudioBody, data: bytes) -> list[Chunk]:
    try:
        return list(body.feed(data))
    except EngineError as fault:
        raise EngineError(fault.message, code=ErrorCode.INPUT_MISMATCH) from None


def mono(pcm: bytes, channels: int) -> bytes:
    """Mix channels down to one."""
    if channels == 1:
        return pcm
    samples = samples_of(pcm)
    mixed = array("h", ((left + right) // 2 for left, right in zip(samples[0::2], samples[1::2], strict=True)))
    if sys.byteorder == "big":
        mixed.byteswap()
    return mixed.tobytes()
