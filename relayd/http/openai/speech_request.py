"""Parses the body of `POST /v1/audio/speech`, and converts it to the params of a space. Pure.

A table maps OpenAI's fields to params, and only params that the space's worker has declared are sent. `speed` is not
mapped, because it means different things to engines (to `mock`, how fast it works): the relay stretches the audio
itself, so every space supports 0.25 to 4.
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

#: The params must fit a message of 64 KiB, of which JSON may write each character as six.
MAX_BODY_BYTES = 400_000
MAX_INPUT_CHARS = 64 * 1024
MAX_NAME_CHARS = 256
#: OpenAI's field -> names of corresponding params; the first one that the worker has declared is used.
PARAMS = {
    "input": ("text", "input"),
    "voice": ("voice",),
    "instructions": ("instructions", "voice_description"),
}
#: A voice name that every space accepts: the voice used if none is given.
DEFAULT_VOICE = "default"
MAX_VOICES_LISTED = 24


def _voice(value: Value) -> None:
    name = value.get("id") if isinstance(value, dict) else value
    if not isinstance(name, str):
        raise ValueError(f'must be a string or {{"id": string}}, not {kind_of(value)}')
    text(MAX_NAME_CHARS)(name)


_REQUIRED = object()
#: Field -> rule, and the default if it is missing or null.
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
    """A parsed speech request.

    Args:
        space: `model` of the API.
        text: `input` of the API.
        sse: whether the audio is sent as server-sent events.
        whole: whether the audio is sent in one piece when it is complete.
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
    """Parse a body. Unknown fields are ignored, because OpenAI's clients add some.

    Raises:
        HttpError: 400 if the body is not a JSON object, 422 with every fault if a field is invalid.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as fault:
        why = str(fault) if isinstance(fault, json.JSONDecodeError) else "it is not UTF-8, or nested too deeply"
        raise HttpError("invalid_json", f"the body must be JSON: {why}", status=400) from None
    if not isinstance(fields, dict):
        raise HttpError("invalid_json", f"the body must be a JSON object, not {kind_of(fields)}", status=400)
    values, faults = {}, {}
    for name, (rule, default) in _FIELDS.items():
        value = fields.get(name)
        values[name] = default if value is None else value
        try:
            if values[name] is _REQUIRED:
                raise ValueError("is required")
            rule(values[name])
            _check_utf8(values[name])
        except ValueError as fault:
            faults[name] = str(fault)
    if not faults and not values["input"].strip():
        faults["input"] = "contains nothing to speak"
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


def _check_utf8(value: Value) -> None:
    """Refuse lone surrogates, which JSON can express but UTF-8 cannot."""
    try:
        str(value.get("id", "") if isinstance(value, dict) else value).encode()
    except UnicodeEncodeError:
        raise ValueError("contains a lone surrogate, which is not a character") from None


def params_of(speech: Speech, space: Space) -> dict[str, Value]:
    """Convert a speech request to the params of a space.

    Before its first worker registers, a space has declared nothing; then the first name of each param is used, and the
    worker checks the params itself.

    Raises:
        HttpError: 422; the space produces no audio, does not have the voice or does not accept instructions.
    """
    if space.engine and space.format is None:
        raise _invalid({"model": f"space {space.name!r} produces no audio; GET /v1/models lists the spaces that do"})
    properties = space.params.get("properties", {})
    params = {_param(space, "input"): speech.text}
    if None in params:
        known = ", ".join(sorted(properties)) or "none"
        raise _invalid(
            {"model": f"space {space.name!r} has no param for a text (it has: {known}); submit a request to it instead"}
        )
    if speech.voice != DEFAULT_VOICE or DEFAULT_VOICE in (voices_of(space) or ()):
        voices, name = voices_of(space), _param(space, "voice")
        if name is None or (voices is not None and speech.voice not in voices):
            raise _invalid({"voice": _no_such_voice(speech.voice, space, voices or ())})
        params[name] = speech.voice
    if speech.instructions:
        name = _param(space, "instructions")
        if name is None:
            raise _invalid({"instructions": f"space {space.name!r} does not accept instructions; leave them out"})
        params[name] = speech.instructions
    return {name: value for name, value in params.items() if name is not None}


def _param(space: Space, field: str) -> str | None:
    """Return the name of the param for a field; None if the space has none."""
    names, properties = PARAMS[field], space.params.get("properties", {})
    if not properties:
        return names[0]
    return next((name for name in names if _accepts_value(properties.get(name))), None)


def _accepts_value(schema: Value) -> bool:
    """Whether a param accepts a value: workers declare unsupported params as ones that must be null."""
    return isinstance(schema, dict) and not ("const" in schema and schema["const"] is None)


def voices_of(space: Space) -> tuple[str, ...] | None:
    """Return the voices declared by a space's worker, besides its default; None if it accepts any name."""
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
    listed = ", ".join(names[:MAX_VOICES_LISTED])
    if len(names) > MAX_VOICES_LISTED:
        listed += f" and {len(names) - MAX_VOICES_LISTED} more: GET /v1/audio/voices?model={space.name}"
    return f"space {space.name!r} has no voice {voice[:64]!r}; it has {listed}"


def _invalid(faults: dict[str, str]) -> HttpError:
    message = "; ".join(f"{field}: {what}" for field, what in faults.items())
    return HttpError(ErrorCode.INVALID_PARAMS, message, details=faults)


def usage_of(speech: Speech, audio_s: float) -> dict[str, Value]:
    """Return the usage of a request. The relay counts no tokens: a character counts as an input token, 50 ms of audio
    as an output token.

    Args:
        speech: the speech request.
        audio_s: duration of the worker's audio in seconds.
    """
    input_tokens, output_tokens = len(speech.text), round(audio_s * 20)
    return {
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "total_tokens": input_tokens + output_tokens,
    }


def speaks(space: Space) -> bool:
    """Whether a space converts text to audio; True for one that no worker has served yet."""
    return (not space.engine or isinstance(space.format, AudioFormat)) and _param(space, "input") is not None
