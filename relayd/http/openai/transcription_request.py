"""Parses the form of `POST /v1/audio/transcriptions`, and converts it to the params of a space. Pure."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from protocol.wire.validators import Value
from relayd.core.space import Space
from relayd.http.openai.json_body import MAX_NAME_CHARS, invalid

AUDIO = "audio"
FORMATS = ("json", "text", "verbose_json", "srt", "vtt")
#: Of the formats that are text.
TEXT_TYPES = ("text/plain", "application/x-subrip", "text/vtt")
MAX_PROMPT_CHARS = 4_000
_FLAGS = {"true": True, "1": True, "false": False, "0": False}


def transcribes(space: Space) -> bool:
    """Whether a space writes down what it hears; true for one that no worker has served yet."""
    if not space.engine:
        return True
    rule = space.inputs.get(AUDIO)
    return rule is not None and rule.live and "turn_detection" in space.params.get("properties", {})


@attrs.frozen(kw_only=True)
class Transcription:
    """What is asked for.

    Args:
        model: a space, or a name that stands for one.
        response_format: one of `FORMATS`.
        stream: whether the transcript is sent as events, while it is recognized.
        hints: params that a space may have.
    """

    model: str
    response_format: str
    stream: bool
    hints: Mapping[str, Value]

    def params_of(self, space: Space) -> dict[str, Value]:
        """The params of the space: those that its worker has declared."""
        known = space.params.get("properties", {}) if space.engine else self.hints
        return {"turn_detection": "none"} | {name: value for name, value in self.hints.items() if name in known}


def parse_transcription(fields: Mapping[str, Any]) -> Transcription:
    """Parse the fields of a form; empty ones are left out.

    Raises:
        HttpError: a field is not valid.
    """
    faults: dict[str, str] = {}

    def read(name: str, convert: Callable[[str], Any], default: Any) -> Any:
        text = fields.get(name)
        try:
            return default if text in (None, "") else convert(str(text))
        except ValueError as fault:
            faults[name] = str(fault)
            return default

    model = read("model", _text(MAX_NAME_CHARS), None)
    if model is None and "model" not in faults:
        faults["model"] = "is required"
    response_format = read("response_format", _format, FORMATS[0])
    stream = read("stream", _flag, False)
    read("timestamp_granularities[]", _granularity, None)
    hints = {
        "language": read("language", _language, None),
        "prompt": read("prompt", _text(MAX_PROMPT_CHARS), None),
        "temperature": read("temperature", _temperature, None),
    }
    if stream and response_format not in ("json", "text"):
        faults["stream"] = f"cannot be true for response_format {response_format}; ask for json"
    if faults:
        raise invalid(faults, status=400)
    given = {name: value for name, value in hints.items() if value is not None}
    return Transcription(model=model, response_format=response_format, stream=stream, hints=given)


def _text(most: int) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if len(text) > most:
            raise ValueError(f"may have {most} characters")
        return text

    return convert


def _format(text: str) -> str:
    if text not in FORMATS:
        raise ValueError(f"must be one of {', '.join(FORMATS)}")
    return text


def _flag(text: str) -> bool:
    if text.lower() not in _FLAGS:
        raise ValueError("must be true or false")
    return _FLAGS[text.lower()]


def _granularity(text: str) -> str:
    if text != "segment":
        raise ValueError("must be segment: single words have no times here")
    return text


def _language(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{1,8}){0,3}", text):
        raise ValueError("must be a language such as en")
    return text


def _temperature(text: str) -> float:
    try:
        temperature = float(text)
    except ValueError:
        raise ValueError("must be a number") from None
    if not 0 <= temperature <= 1:
        raise ValueError("must lie in 0..1")
    return temperature


# -- what is answered


@attrs.define
class Transcript:
    """A transcript, as far as it has come: each piece, and when it was said.

    Attributes:
        pieces: text, and the samples at which it begins and ends; None where that was not told.
        sample_rate: of those samples.
        ending: the last object; empty before.
    """

    pieces: list[tuple[str, int | None, int | None]] = attrs.field(factory=list)
    sample_rate: int = 0
    ending: Mapping[str, Value] = attrs.field(factory=dict)

    def add(self, text: str) -> None:
        """Add a piece."""
        self.pieces.append((text, None, None))

    def note(self, data: Mapping[str, Value]) -> None:
        """Take what is told beside the text."""
        match data:
            case {"segment": {"start": int(start), "end": int(end)}} if self.pieces:
                self.pieces[-1] = (self.pieces[-1][0], start, end)
            case {"utterance": {"sample_rate": int(rate)}}:
                self.sample_rate = rate

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(text for text, _, _ in self.pieces).strip()

    @property
    def seconds(self) -> float:
        """How long the sound was."""
        usage = self.ending.get("usage")
        seconds = usage.get("seconds") if isinstance(usage, dict) else None
        return float(seconds) if isinstance(seconds, int | float) else 0.0

    @property
    def segments(self) -> list[dict[str, Value]]:
        """The pieces whose times are known, with these in seconds."""
        rate = max(1, self.sample_rate)
        timed = [(text, start / rate, (end or 0) / rate) for text, start, end in self.pieces if start is not None]
        return [
            {"id": number, "start": round(start, 3), "end": round(end, 3), "text": text}
            for number, (text, start, end) in enumerate(timed)
        ]

    def usage_json(self) -> dict[str, Value]:
        """The usage, as OpenAI has it."""
        return {"type": "duration", "seconds": round(self.seconds, 3)}

    def in_format(self, response_format: str) -> tuple[Any, str]:
        """The body in this format, and its media type; a body in JSON is an object."""
        if response_format == "json":
            return {"text": self.text, "usage": self.usage_json()}, "application/json"
        if response_format == "verbose_json":
            fields = {"task": "transcribe", "language": self.ending.get("language"), "duration": self.seconds}
            body = fields | {"text": self.text, "segments": self.segments, "usage": self.usage_json()}
            return body, "application/json"
        if response_format == "srt":
            return "".join(_cue(segment, ",") for segment in self.segments), f"{TEXT_TYPES[1]}; charset=utf-8"
        if response_format == "vtt":
            return "WEBVTT\n\n" + "".join(
                _cue(segment, ".") for segment in self.segments
            ), f"{TEXT_TYPES[2]}; charset=utf-8"
        return self.text + "\n", f"{TEXT_TYPES[0]}; charset=utf-8"


def _cue(segment: Mapping[str, Any], mark: str) -> str:
    number = f"{segment['id'] + 1}\n" if mark == "," else ""
    text = " ".join(segment["text"].split())
    return f"{number}{_clock(segment['start'], mark)} --> {_clock(segment['end'], mark)}\n{text}\n\n"


def _clock(seconds: float, mark: str) -> str:
    ms = round(seconds * 1000)
    return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02}{mark}{ms % 1000:03}"
