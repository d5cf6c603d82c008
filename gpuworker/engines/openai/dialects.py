"""What a speech server is asked, and how: OpenAI's API with the additions of its imitators, and nano-vllm's own. Pure.

A dialect says where speech is made, which params and inputs it takes, and how a server tells what it has.
"""

import base64
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import attrs

from gpuworker.engines.base import EngineInput
from gpuworker.engines.model_server.engine import MAX_NAME_CHARS, names_in, without_nulls
from protocol.wire.media_types import recognize
from protocol.wire.structs import AudioFormat, InputRule
from protocol.wire.validators import Value

MAX_TEXT_CHARS = 20_000
MAX_WORDS_CHARS = 4_096
#: Voices in a schema; a server with more has its names checked by itself.
MAX_VOICES = 500
RECORDING = InputRule(max_bytes=16 * 1024 * 1024)
#: What OpenAI's `pcm` is.
PCM = AudioFormat(sample_rate=24_000)


@attrs.frozen(kw_only=True)
class Offer:
    """What a server says it has.

    Args:
        models: names; empty if it lists none.
        voices: names; None if it lists none, and takes any or says itself what is wrong.
        format: of PCM whose head says nothing.
    """

    models: tuple[str, ...] = ()
    voices: tuple[str, ...] | None = None
    format: AudioFormat = PCM


@attrs.frozen(kw_only=True)
class Settings:
    """What the worker's owner has chosen, and `load` has completed.

    Args:
        model: its name, if requests have one.
        voices: names to offer; empty until the server was asked, None for any.
        default_voice: the voice of a request that names none; None leaves it to the server.
        response_format: what to ask for.
        cloning: whether recordings of a voice are accepted.
        extra: more fields of each request; None leaves a field out.
    """

    model: str | None = None
    voices: tuple[str, ...] | None = ()
    default_voice: str | None = None
    response_format: str = "pcm"
    cloning: bool = False
    extra: Mapping[str, Value] = attrs.field(factory=dict)


def _text(max_chars: int, description: str) -> dict[str, Value]:
    return {"type": "string", "minLength": 1, "maxLength": max_chars, "description": description}


def _number(minimum: float, maximum: float, description: str, kind: str = "number") -> dict[str, Value]:
    return {"type": kind, "minimum": minimum, "maximum": maximum, "description": description}


def _schema(properties: dict[str, Value]) -> dict[str, Value]:
    text = _text(MAX_TEXT_CHARS, "text to speak; the server may accept less")
    return {
        "type": "object",
        "properties": {"text": text, **properties},
        "required": ["text"],
        "additionalProperties": False,
    }


#: Asks for the JSON at a path, with this query; None if there is none.
Ask = Callable[[str, Mapping[str, str]], Value]


class Dialect(ABC):
    """How speech servers of one kind are asked."""

    #: Where speech is made.
    SPEECH: ClassVar[str]
    #: Whether a request names its model.
    NAMES_MODEL: ClassVar[bool]

    @abstractmethod
    def offer(self, ask: Ask, chosen: Settings) -> Offer:
        """Ask a server what it has."""

    @abstractmethod
    def params(self, chosen: Settings) -> dict[str, Value]:
        """The JSON Schema of the params."""

    @abstractmethod
    def inputs(self, chosen: Settings) -> dict[str, InputRule]:
        """The inputs."""

    @abstractmethod
    def faults(self, params: Mapping[str, Value], inputs: Mapping[str, EngineInput]) -> dict[str, str]:
        """Faults that the schema cannot express: field -> what is wrong."""

    @abstractmethod
    def body(
        self, params: Mapping[str, Value], inputs: Mapping[str, EngineInput], chosen: Settings
    ) -> dict[str, Value]:
        """The body of a request for speech."""


class OpenAi(Dialect):
    """`POST /audio/speech`, with `ref_audio` and `ref_text` for cloning, as vllm-omni and sglang-omni have them."""

    SPEECH = "/audio/speech"
    NAMES_MODEL = True

    def offer(self, ask: Ask, chosen: Settings) -> Offer:
        """Ask a server what it has."""
        models = names_in(ask("/models", {}))
        if chosen.voices != ():
            return Offer(models=models)
        model = chosen.model or next(iter(models), None)
        voices = names_in(ask("/audio/voices", {"model": model} if model else {}))
        return Offer(models=models, voices=voices if 0 < len(voices) <= MAX_VOICES else None)

    def params(self, chosen: Settings) -> dict[str, Value]:
        """The JSON Schema of the params."""
        if chosen.voices:
            voice: dict[str, Value] = {"enum": list(chosen.voices), "description": "a voice of the speech server"}
            if chosen.default_voice:
                voice["default"] = chosen.default_voice
        else:
            voice = _text(MAX_NAME_CHARS, "a voice of the speech server")
        transcript = _text(MAX_WORDS_CHARS, "transcript of reference_wav, word for word")
        return _schema(
            {
                "voice": voice,
                "instructions": _text(MAX_WORDS_CHARS, "how to speak, if the model takes that"),
                "speed": _number(0.25, 4, "1 is as usual"),
                **({"ref_text": transcript} if chosen.cloning else {}),
            }
        )

    def inputs(self, chosen: Settings) -> dict[str, InputRule]:
        """The inputs."""
        return {"reference_wav": RECORDING} if chosen.cloning else {}

    def faults(self, params: Mapping[str, Value], inputs: Mapping[str, EngineInput]) -> dict[str, str]:
        """Faults that the schema cannot express: field -> what is wrong."""
        if params.get("ref_text") is not None and "reference_wav" not in inputs:
            return {"reference_wav": "is required with ref_text, as an input: the recording that ref_text transcribes"}
        return {}

    def body(
        self, params: Mapping[str, Value], inputs: Mapping[str, EngineInput], chosen: Settings
    ) -> dict[str, Value]:
        """The body of a request for speech."""
        sent: dict[str, Value] = {
            "model": chosen.model,
            "input": params["text"],
            "voice": params.get("voice") or chosen.default_voice,
            "instructions": params.get("instructions"),
            "speed": params.get("speed"),
            "response_format": chosen.response_format,
            "stream": True,
            "stream_format": "audio",
        }
        if (recording := inputs.get("reference_wav")) is not None:
            data = base64.b64encode(recording.data).decode()
            sent |= {"ref_audio": f"data:{_audio_type(recording)};base64,{data}", "ref_text": params.get("ref_text")}
        return without_nulls(sent | dict(chosen.extra))


class NanoVllm(Dialect):
    """`POST /generate` of nano-vllm-voxcpm's server, with its recordings in base64."""

    SPEECH = "/generate"
    NAMES_MODEL = False

    def offer(self, ask: Ask, chosen: Settings) -> Offer:
        """Ask a server what it has."""
        info = ask("/info", {})
        model = info.get("model") if isinstance(info, dict) else None
        if not isinstance(model, dict):
            return Offer()
        try:
            heard = AudioFormat(sample_rate=model["sample_rate"], channels=model["channels"])
        except (ValueError, KeyError):  # another version of it; its answers say the format too
            return Offer()
        return Offer(format=heard)

    def params(self, chosen: Settings) -> dict[str, Value]:
        """The JSON Schema of the params."""
        transcript = _text(MAX_WORDS_CHARS, "transcript of prompt_wav, word for word; the speech continues from there")
        return _schema(
            {
                "seed": _number(0, 2**32 - 1, "another seed gives another rendition", "integer"),
                "cfg_value": _number(0, 10, "guidance: higher follows the text and the prompt more closely"),
                "temperature": _number(0, 2, "of sampling"),
                **({"prompt_text": transcript} if chosen.cloning else {}),
            }
        )

    def inputs(self, chosen: Settings) -> dict[str, InputRule]:
        """The inputs."""
        return {"prompt_wav": RECORDING, "reference_wav": RECORDING} if chosen.cloning else {}

    def faults(self, params: Mapping[str, Value], inputs: Mapping[str, EngineInput]) -> dict[str, str]:
        """Faults that the schema cannot express: field -> what is wrong."""
        has_text = params.get("prompt_text") is not None
        if has_text and "prompt_wav" not in inputs:
            return {"prompt_wav": "is required with prompt_text, as an input: the audio that prompt_text transcribes"}
        if "prompt_wav" in inputs and not has_text:
            return {"prompt_text": "is required with prompt_wav: its transcript, word for word"}
        return {}

    def body(
        self, params: Mapping[str, Value], inputs: Mapping[str, EngineInput], chosen: Settings
    ) -> dict[str, Value]:
        """The body of a request for speech."""
        sent: dict[str, Value] = {"target_text": params["text"], "response_format": "pcm"}
        sent |= {name: params.get(name) for name in ("seed", "cfg_value", "temperature", "prompt_text")}
        for name, field in (("prompt_wav", "prompt_wav"), ("reference_wav", "ref_audio_wav")):
            if (recording := inputs.get(name)) is not None:
                sent[f"{field}_base64"] = base64.b64encode(recording.data).decode()
                sent[f"{field}_format"] = _audio_type(recording).partition("/")[2].replace("mpeg", "mp3")
        return without_nulls(sent | dict(chosen.extra))


DIALECTS: Mapping[str, Dialect] = {"openai": OpenAi(), "nanovllm": NanoVllm()}


def _audio_type(recording: EngineInput) -> str:
    """The media type of a recording, by its first bytes or as it was sent."""
    found = recognize(recording.data) or recording.media_type.partition(";")[0]
    return found if found.startswith("audio/") else "audio/wav"
