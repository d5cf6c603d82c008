"""What `POST /v1/audio/speech` asks for, in OpenAI's words, and the same in those of a space. Pure.

OpenAI's fields become params by a declared table, and only params that the space's worker has declared are ever sent.
`speed` becomes none: what an engine calls speed may be anything (of `mock` it is the pace of its work), so the relay
stretches time itself, and every space has the same 0.25 to 4.
"""

import json
from collections.abc import Iterable
from typing import Any

import attrs

from protocol.wire.errors import ErrorCode
from protocol.wire.structs import AudioFormat
from protocol.wire.validators import Rule, Value, boolean, choice, kind_of, number, text
from relayd.core.space import Space
from relayd.http.audio.encoder import CODINGS, MAX_SPEED, MIN_SPEED, Coding
from relayd.http.errors import HttpError

#: Of a body. What it asks for must fit a message of 64 KiB, in JSON each character may be written with six.
MAX_BODY_BYTES = 400_000
MAX_INPUT_CHARS = 64 * 1024
MAX_NAME_CHARS = 256
#: OpenAI's field -> names of the param that means it, of which the first that the worker has declared is sent.
PARAMS = {
    "input": ("text", "input"),
    "voice": ("voice",),
    "instructions": ("instructions", "voice_description"),
}
#: A voice that every space has: the one it speaks with when none is named.
DEFAULT_VOICE = "default"
MAX_VOICES_TOLD = 24


def _voice(value: Value) -> None:
    name = value.get("id") if isinstance(value, dict) else value
    if not isinstance(name, str):
        raise ValueError(f'must be a string or {{"id": string}}, not {kind_of(value)}')
    text(MAX_NAME_CHARS)(name)


_REQUIRED = object()
#: Field -> rule, and what it is where it is left out or null.
_FIELDS: dict[str, tuple[Rule, Any]] = {
    "model": (text(MAX_NAME_CHARS), _REQUIRED),
    "input": (text(MAX_INPUT_CHARS), _REQUIRED),
    "voice": (_voice, DEFAULT_VOICE),
    "instructions": (text(MAX_INPUT_CHARS), ""),
    "response_format": (choice(*CODINGS), next(iter(CODINGS))),
    "speed": (number(MIN_SPEED, MAX_SPEED), 1.0),
    "stream_format": (choice("audio", "sse"), "audio"),
    "stream": (boolean, True),
}


@attrs.frozen(kw_only=True)
class Speech:
    """What is to be spoken, and how it is to be sent.

    Args:
        space: `model` of the API.
        text: `input` of the API.
        sse: whether the audio comes as server-sent events.
        whole: whether it is sent only when all of it is there.
    """

    space: str
    text: str
    voice: str
    instructions: str
    coding: Coding
    speed: float
    sse: bool
    whole: bool


def parse_speech(body: bytes) -> Speech:
    """The speech that a body asks for. Fields that the API does not have are passed over, as OpenAI's clients add some.

    Raises:
        HttpError: 400 for what is no JSON, 422 with every fault for what is no request to speak.
    """
    try:
        told = json.loads(body)
    except (ValueError, RecursionError) as fault:
        why = str(fault) if isinstance(fault, json.JSONDecodeError) else "it is not UTF-8, or nested too deep"
        raise HttpError("invalid_json", f"the body must be JSON: {why}", status=400) from None
    if not isinstance(told, dict):
        raise HttpError("invalid_json", f"the body must be a JSON object, not {kind_of(told)}", status=400)
    values, faults = {}, {}
    for name, (rule, default) in _FIELDS.items():
        value = told.get(name)
        values[name] = default if value is None else value
        try:
            if values[name] is _REQUIRED:
                raise ValueError("is required")
            rule(values[name])
            _utf8(values[name])
        except ValueError as fault:
            faults[name] = str(fault)
    if not faults and not values["input"].strip():
        faults["input"] = "holds nothing to speak"
    if faults:
        raise _invalid(faults)
    voice = values["voice"]
    return Speech(
        space=values["model"],
        text=values["input"],
        voice=(voice["id"] if isinstance(voice, dict) else voice) or DEFAULT_VOICE,
        instructions=values["instructions"],
        coding=CODINGS[values["response_format"]],
        speed=float(values["speed"]),
        sse=values["stream_format"] == "sse",
        whole=not values["stream"] and values["stream_format"] == "audio",
    )


def _utf8(value: Value) -> None:
    """JSON may write one half of a character in UTF-16; nothing else can."""
    try:
        str(value.get("id", "") if isinstance(value, dict) else value).encode()
    except UnicodeEncodeError:
        raise ValueError("holds a lone surrogate, which is no character") from None


def params_of(speech: Speech, space: Space) -> dict[str, Value]:
    """The params with which a space is asked to speak.

    Before its first worker has come a space has declared nothing; then the first name of each is taken, and the worker
    checks for itself.

    Raises:
        HttpError: 422; it makes no audio, has no such voice or takes no instructions.
    """
    if space.engine and space.format is None:
        raise _invalid({"model": f"space {space.name!r} makes no audio; GET /v1/models lists those that do"})
    properties = space.params.get("properties", {})
    params = {_param(space, "input"): speech.text}
    if None in params:
        taken = ", ".join(sorted(properties)) or "nothing"
        raise _invalid({"model": f"space {space.name!r} takes no text to speak, but {taken}; submit a request to it"})
    if speech.voice != DEFAULT_VOICE or DEFAULT_VOICE in (voices_of(space) or ()):
        voices, name = voices_of(space), _param(space, "voice")
        if name is None or (voices is not None and speech.voice not in voices):
            raise _invalid({"voice": _no_such_voice(speech.voice, space, voices or ())})
        params[name] = speech.voice
    if speech.instructions:
        name = _param(space, "instructions")
        if name is None:
            raise _invalid({"instructions": f"space {space.name!r} takes no instructions; leave them out"})
        params[name] = speech.instructions
    return {name: value for name, value in params.items() if name is not None}


def _param(space: Space, field: str) -> str | None:
    """Name of the param that a field becomes; None where the space has none for it."""
    names, properties = PARAMS[field], space.params.get("properties", {})
    if not properties:
        return names[0]
    return next((name for name in names if _asks(properties.get(name))), None)


def _asks(schema: Value) -> bool:
    """Whether a param may have a value: what a worker cannot do it declares as a param that must be null."""
    return isinstance(schema, dict) and not ("const" in schema and schema["const"] is None)


def voices_of(space: Space) -> tuple[str, ...] | None:
    """The voices that a space's worker has declared, its default aside; None where it takes any name."""
    name = _param(space, "voice")
    if name is None:
        return ()
    schema = space.params.get("properties", {}).get(name, {})
    if "const" in schema:
        return (schema["const"],) if isinstance(schema["const"], str) else ()
    if "enum" not in schema:
        return None
    return tuple(voice for voice in schema["enum"] if isinstance(voice, str))


def _no_such_voice(voice: str, space: Space, voices: Iterable[str]) -> str:
    names = [DEFAULT_VOICE, *(name for name in voices if name != DEFAULT_VOICE)]
    told = ", ".join(names[:MAX_VOICES_TOLD])
    if len(names) > MAX_VOICES_TOLD:
        told += f" and {len(names) - MAX_VOICES_TOLD} more: GET /v1/audio/voices?model={space.name}"
    return f"space {space.name!r} has no voice {voice[:64]!r}; there are {told}"


def _invalid(faults: dict[str, str]) -> HttpError:
    told = "; ".join(f"{field}: {what}" for field, what in faults.items())
    return HttpError(ErrorCode.INVALID_PARAMS, told, details=faults)


def usage_of(speech: Speech, audio_s: float) -> dict[str, Value]:
    """What a speech took. Nothing here counts tokens: a character stands for one of input, 50 ms for one of audio.

    Args:
        speech: what was asked for.
        audio_s: seconds that the worker spoke.
    """
    heard, spoken = len(speech.text), round(audio_s * 20)
    return {"input_tokens": heard, "output_tokens": spoken, "total_tokens": heard + spoken}


def speaks(space: Space) -> bool:
    """Whether a space makes audio of text; one that no worker has served yet may."""
    return (not space.engine or isinstance(space.format, AudioFormat)) and _param(space, "input") is not None
