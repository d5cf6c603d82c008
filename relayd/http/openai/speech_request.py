"""Parses the body of `POST /v1/audio/speech`, and converts it to the params of a space. Pure.

A table maps OpenAI's fields to params, and only params that the space's worker has declared are sent. `speed` is not
mapped, because it means different things to engines (to `mock`, how fast it works): the relay stretches the audio
itself, so every space supports 0.25 to 4.
"""

from collections.abc import Iterable
from typing import Any

import attrs

from protocol.audio.encoder import CODINGS, MAX_SPEED, MIN_SPEED, Coding
from protocol.speakable import speakable
from protocol.wire.structs import AudioFormat
from protocol.wire.validators import Rule, Value, boolean, choice, kind_of, number, text
from relayd.config.schema import MIB, OpenAi
from relayd.core.space import Space
from relayd.http.openai.extra_fields import check_text, read_extra
from relayd.http.openai.json_body import MAX_NAME_CHARS, invalid, read_fields

#: Enough for a minute of recorded speech in base64.
MAX_BODY_BYTES = 8 * MIB
MAX_INPUT_CHARS = 64 * 1024
#: OpenAI's field -> names of corresponding params; the first one that the worker has declared is used.
PARAMS = {
    "input": ("text", "input"),
    "voice": ("voice",),
    "instructions": ("instructions", "voice_description"),
}
#: A voice name that every space accepts: the voice used if none is given.
DEFAULT_VOICE = "default"
_NO_NAMES = OpenAi(strict=True)
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
    "cache": (boolean, True),
}


@attrs.frozen(kw_only=True)
class Speech:
    """A parsed speech request.

    Args:
        model: a space, or a name that stands for one.
        text: `input` of the API.
        sse: whether the audio is sent as server-sent events.
        whole: whether the audio is sent in one piece when it is complete.
        cache: whether the result of an equal request may answer it.
        extra: other fields that OpenAI's API does not have.
    """

    model: str
    text: str
    voice: str
    instructions: str
    coding: Coding
    speed: float
    sse: bool
    whole: bool
    cache: bool
    extra: dict[str, Value]


def parse_speech(body: bytes) -> Speech:
    """Parse a body.

    Raises:
        HttpError: 400 if the body is not a JSON object, 422 with every fault if a field is invalid.
    """
    fields = read_fields(body)
    values, faults = {}, {}
    for name, (rule, default) in _FIELDS.items():
        value = fields.get(name)
        values[name] = default if value is None else value
        try:
            if values[name] is _REQUIRED:
                raise ValueError("is required")
            rule(values[name])
            check_text(values[name])
        except ValueError as fault:
            faults[name] = str(fault)
    if not faults and not speakable(values["input"]):
        faults["input"] = "contains nothing to speak"
    if faults:
        raise invalid(faults)
    voice = values["voice"]
    return Speech(
        model=values["model"],
        text=values["input"],
        voice=(voice["id"] if isinstance(voice, dict) else voice) or DEFAULT_VOICE,
        instructions=values["instructions"],
        coding=CODINGS[values["response_format"]],
        speed=float(values["speed"]),
        sse=values["stream_format"] == "sse",
        whole=not values["stream"] and values["stream_format"] == "audio",
        cache=values["cache"],
        extra={name: value for name, value in fields.items() if name not in _FIELDS},
    )


@attrs.frozen(kw_only=True)
class SpaceParams:
    """A speech request as params and inputs of a space.

    Args:
        inputs: name -> media type and content.
        voice: the voice that is used; `default` if the space chooses.
        replaced: whether it is used because the space does not have the one that was asked for.
        passed_over: fields that are ignored.
        names: param or input -> the field of the body that it was sent as.
    """

    params: dict[str, Value]
    inputs: dict[str, tuple[str, bytes]]
    voice: str
    replaced: bool
    passed_over: tuple[str, ...]
    names: dict[str, str]

    def field(self, name: str) -> str:
        """The field of the body that a param, an input or a part of one was sent as."""
        whole, dot, part = name.removeprefix("inputs.").partition(".")
        return self.names.get(whole, whole) + dot + part


def params_of(speech: Speech, space: Space, names: OpenAi = _NO_NAMES, *, any_voice: bool = False) -> SpaceParams:
    """Convert a speech request to the params and inputs of a space.

    Before its first worker registers, a space has declared nothing; then the first name of each param is used, and the
    worker checks the params itself.

    Args:
        speech: the request.
        space: the space.
        names: what voice names stand for, and whether unknown instructions are refused.
        any_voice: whether the default voice is used for a name that the space does not have.

    Raises:
        HttpError: 422; the space produces no audio, does not have the voice or does not accept instructions.
    """
    if space.engine and space.format is None:
        raise invalid({"model": f"space {space.name!r} produces no audio; GET /v1/models lists the spaces that do"})
    properties = space.params.get("properties", {})
    text_param = _param(space, "input")
    if text_param is None:
        taken = ", ".join(sorted(properties))
        raise invalid(
            {"model": f"space {space.name!r} has no param for a text (it has: {taken}); submit a request to it instead"}
        )
    extra = read_extra(speech.extra, space)
    if extra.faults:
        raise invalid(extra.faults)
    params = extra.params | {text_param: speech.text}
    passed_over = []
    if extra.recorded:  # it is the voice: what `voice` names besides is only there because the API requires it
        names = attrs.evolve(names, voices={})
    try:
        voice = _voice_of(extra.voice or speech.voice, space, names, any_voice=any_voice and not extra.voice)
        if extra.voice and speech.voice != voice and speech.voice in (voices_of(space) or ()):
            raise ValueError(f"names another voice than voice, {speech.voice!r}; send one of them")
    except ValueError as fault:
        raise invalid({extra.names.get("voice", "voice"): str(fault)}) from None
    if (name := _param(space, "voice")) and (voice != DEFAULT_VOICE or DEFAULT_VOICE in (voices_of(space) or ())):
        params[name] = voice
    if speech.instructions:
        if name := _param(space, "instructions"):
            params[name] = speech.instructions
            extra.names[name] = "instructions"
        elif names.strict or names.unknown_instructions == "refuse":
            raise invalid({"instructions": f"space {space.name!r} does not accept instructions; leave them out"})
        else:
            passed_over.append("instructions")
    sent_as = extra.names | {text_param: "input"}
    return SpaceParams(
        params=params,
        inputs=extra.inputs,
        voice=voice,
        replaced=voice != speech.voice and not extra.voice and not extra.recorded,
        passed_over=tuple(passed_over),
        names=sent_as,
    )


def _voice_of(asked: str, space: Space, names: OpenAi, *, any_voice: bool) -> str:
    """The voice of the space that `asked` stands for: what the settings say of this name, or the space's own, or what
    they say of every other name.

    Raises:
        ValueError: it stands for none.
    """
    own = names.voices.get(space.name)
    tables = (own if isinstance(own, dict) else {}, names.voices)
    voices = voices_of(space)
    for name in (asked, "*"):
        meaning = next((table[name] for table in tables if isinstance(table.get(name), str)), None)
        voice = meaning if isinstance(meaning, str) else asked
        if voice == DEFAULT_VOICE or voices is None or voice in voices:
            return voice
        if meaning is not None:
            what = f"voice {asked[:64]!r} stands for {voice[:64]!r} ([openai] voices of relayd.toml)"
            raise ValueError(f"{what}, and {_no_such_voice(voice, space, voices)}")
    if not any_voice:
        raise ValueError(_no_such_voice(asked, space, voices or ()))
    return DEFAULT_VOICE


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
