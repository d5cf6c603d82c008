"""What the engines of hearing spaces have in common: their params, their input, and the outputs they make of it. Pure.

A hearing space is one that takes a live input `audio`, and whose params have `turn_detection`. What it puts out are
strings, the transcript as it is recognized, and objects between them: when speech began and ended, and when each piece
of the transcript was said. The last one says how much it was.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import attrs

from gpuworker.engines.base import Capabilities, Chunk, EngineInput, LiveInput, OutputChunk
from gpuworker.hearing.sound import RAW, WAV, Decode, read_sound
from gpuworker.hearing.utterances import Began, Detector, Ended, Utterance, Utterances
from protocol.wire.structs import InputRule
from protocol.wire.validators import Value

AUDIO = "audio"
#: An hour of speech at 16 kHz is 115 MB; the relay has a limit of its own (`limits.max_input_bytes`).
MAX_BYTES = 128 * 1024 * 1024
SERVER_VAD, NONE = "server_vad", "none"
MAX_PROMPT_CHARS = 4_000


@attrs.frozen
class Segment:
    """A piece of a transcript.

    Args:
        text: with the white space in front of it, if any.
        start_s: when it was said, in seconds of its utterance.
        end_s: when it was over.
        language: what it is, such as `en`; "" if that is not known.
    """

    text: str
    start_s: float
    end_s: float
    language: str = ""


#: Recognizes one utterance; it is given the params of the request.
Recognize = Callable[[Utterance, Mapping[str, Value]], Iterable[Segment]]


def params_schema() -> dict[str, Value]:
    """The JSON Schema of the params of a hearing space."""
    return {
        "type": "object",
        "properties": {
            "turn_detection": {
                "enum": [SERVER_VAD, NONE],
                "default": SERVER_VAD,
                "description": "server_vad: a transcript of each utterance, once a silence ends it; none: of all",
            },
            "threshold": {
                "type": "number",
                "minimum": 0,
                "maximum": 1,
                "default": 0.5,
                "description": "from which likelihood on sound is speech",
            },
            "silence_ms": {
                "type": "integer",
                "minimum": 100,
                "maximum": 10_000,
                "default": 500,
                "description": "the silence that ends an utterance",
            },
            "prefix_ms": {
                "type": "integer",
                "minimum": 0,
                "maximum": 5_000,
                "default": 300,
                "description": "what belongs to an utterance of the sound before it",
            },
            "language": {
                "type": "string",
                "maxLength": 32,
                "description": "that is spoken, such as en; recognized if it is not given",
            },
            "prompt": {
                "type": "string",
                "maxLength": MAX_PROMPT_CHARS,
                "description": "words that may occur, or what was said before",
            },
            "temperature": {"type": "number", "minimum": 0, "maximum": 1, "description": "of recognition"},
        },
        "additionalProperties": False,
    }


def capabilities(*, decodes: bool, reproducible: bool = False, fingerprint: str = "") -> Capabilities:
    """The capabilities of an engine of hearing.

    Args:
        decodes: whether it reads other formats than PCM and WAV.
        reproducible: see `Capabilities`.
        fingerprint: see `Capabilities`.
    """
    media_types = [] if decodes else [*RAW, *WAV]
    rule = InputRule(media_types=media_types, max_bytes=MAX_BYTES, required=True, live=True, patient=True)
    return Capabilities(
        reproducible=reproducible, fingerprint=fingerprint, params=params_schema(), inputs={AUDIO: rule}
    )


def transcribe(
    recognize: Recognize,
    detector: Callable[[int], Detector],
    params: Mapping[str, Value],
    inputs: Mapping[str, EngineInput | LiveInput],
    decode: Decode | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[Chunk]:
    """Run a request of a hearing space.

    Args:
        recognize: recognizes an utterance.
        detector: makes one for a sample rate.
        params: of the request.
        inputs: of the request.
        decode: see `read_sound`.
        cancelled: whether to stop; `Engine.cancelled`.

    Raises:
        EngineError: the sound cannot be read, or not be recognized.
    """
    output = _Output(recognize, params)
    utterances: Utterances | None = None
    whole, rate = bytearray(), 0
    for sound in read_sound(inputs[AUDIO], decode):
        if cancelled():
            return
        output.heard_s += len(sound.pcm) / 2 / sound.sample_rate
        rate = sound.sample_rate
        if params.get("turn_detection") == NONE:
            whole += sound.pcm
            continue
        if utterances is None:
            utterances = Utterances(
                rate,
                detector(rate),
                threshold=params.get("threshold", 0.5),
                silence_ms=params.get("silence_ms", 500),
                prefix_ms=params.get("prefix_ms", 300),
            )
        for event in utterances.add(sound.pcm):
            yield from output.chunks(event)
    for event in () if utterances is None else utterances.finish():
        yield from output.chunks(event)
    if whole:
        yield from output.chunks(Utterance(bytes(whole), rate, 0))
    yield output.ending()


class _Output:
    """Makes chunks of what is heard.

    Attributes:
        heard_s: seconds of sound so far.
    """

    def __init__(self, recognize: Recognize, params: Mapping[str, Value]) -> None:
        self.heard_s = 0.0
        self._recognize = recognize
        self._params = params
        self._language = ""
        self._is_first = True

    def chunks(self, event: Began | Ended | Utterance) -> Iterator[Chunk]:
        """What is told of an event: of an utterance, its transcript."""
        if isinstance(event, Began):
            yield OutputChunk({"speech_started": {"sample": event.sample}})
        elif isinstance(event, Ended):
            yield OutputChunk({"speech_stopped": {"sample": event.sample}})
        else:
            yield from self._transcript(event)

    def _transcript(self, utterance: Utterance) -> Iterator[Chunk]:
        begins = True
        for segment in self._recognize(utterance, self._params):
            text = segment.text.lstrip() if begins else segment.text
            if not text.strip():
                continue
            self._language = segment.language or self._language
            yield OutputChunk(text if self._is_first or not begins else "\n" + text)  # a line is an utterance
            start, end = (
                utterance.start + round(max(0.0, at_s) * utterance.sample_rate)
                for at_s in (segment.start_s, segment.end_s)
            )
            yield OutputChunk({"segment": {"start": start, "end": min(end, utterance.end)}})
            self._is_first = begins = False
        place = {"start": utterance.start, "end": utterance.end, "sample_rate": utterance.sample_rate}
        yield OutputChunk({"utterance": place})

    def ending(self) -> OutputChunk:
        """The last output."""
        usage = {"type": "duration", "seconds": round(self.heard_s, 3)}
        return OutputChunk({"finish_reason": "stop", "language": self._language or None, "usage": usage})
