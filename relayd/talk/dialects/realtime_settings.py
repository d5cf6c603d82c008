"""What a Realtime client may set: of its session, and of one response."""

from collections.abc import Mapping
from typing import Any

import attrs

from protocol.audio.encoder import MAX_SPEED, MIN_SPEED
from protocol.wire.validators import Rule, Value, any_value, array_of, choice, integer, map_of, mapping, number, text
from relayd.talk.dialects.realtime_events import EventError, Json, read_field
from relayd.talk.dialects.realtime_listening import FORMAT, MAX_NAME_CHARS, check_format, listening_json
from relayd.talk.listening import Listening
from relayd.talk.talks import MAX_INSTRUCTIONS_CHARS

AUDIO, TEXT = "audio", "text"
INF = "inf"


def _voice(value: Value) -> None:
    text(MAX_NAME_CHARS)(value.get("id") if isinstance(value, dict) else value)


def _most(value: Value) -> None:
    if value != INF:
        integer(1)(value)


@attrs.frozen(kw_only=True)
class Settings:
    """The settings of a session, or of one response.

    Args:
        instructions: what the model is told first; None for those of the conversation.
        modality: `audio`, which comes with its transcript, or `text`.
        voice: as the client names it.
        speed: how fast it is spoken; 1 is as it is made.
        max_output_tokens: of one reply; None for no limit.
        temperature: None for the model's own.
    """

    instructions: str | None = None
    modality: str = AUDIO
    voice: str = "default"
    speed: float = 1.0
    max_output_tokens: int | None = None
    temperature: float | None = None

    def language_params(self, known: Mapping[str, Any]) -> dict[str, Value]:
        """Return the params of the language model, which knows these."""
        params = {"max_tokens": self.max_output_tokens, "temperature": self.temperature}
        return {name: value for name, value in params.items() if value is not None and name in known}


def changed(settings: Settings, fields: Json, path: str, *, has_speech: bool) -> Settings:
    """Return the settings as an object of a client changes them; of fields in both of their names, the newer counts.

    Args:
        settings: as they are.
        fields: `session` of `session.update`, or `response` of `response.create`.
        path: what it is called in errors.
        has_speech: whether there is a space that speaks.

    Raises:
        EventError: a field is not valid, or asks for something that this relay does not do.
    """
    _refuse_unsupported(fields, path)
    modalities = _either(fields, path, array_of(choice(AUDIO, TEXT), 1), "output_modalities", "modalities")
    audio = read_field(fields, "audio", mapping, {}, path)
    at = f"{path}audio.output."
    output = read_field(audio, "output", mapping, {}, f"{path}audio.")
    check_format(read_field(output, "format", any_value, FORMAT, at), f"{at}format")
    beta_format = read_field(fields, "output_audio_format", text(MAX_NAME_CHARS), "pcm16", path)
    if beta_format != "pcm16":
        raise EventError("invalid_value", f"output_audio_format must be 'pcm16', not {beta_format[:64]!r}", path)
    voice = read_field(output, "voice", _voice, read_field(fields, "voice", _voice, settings.voice, path), at)
    speeds = number(MIN_SPEED, MAX_SPEED)
    speed = read_field(output, "speed", speeds, read_field(fields, "speed", speeds, settings.speed, path), at)
    most = _either(fields, path, _most, "max_output_tokens", "max_response_output_tokens")
    made = attrs.evolve(
        settings,
        instructions=read_field(fields, "instructions", text(MAX_INSTRUCTIONS_CHARS), settings.instructions, path),
        voice=voice["id"] if isinstance(voice, dict) else voice,
        speed=float(speed),
        temperature=read_field(fields, "temperature", number(0, 2), settings.temperature, path),
    )
    if most is not None:
        made = attrs.evolve(made, max_output_tokens=None if most == INF else most)
    if modalities is not None:
        made = attrs.evolve(made, modality=AUDIO if AUDIO in modalities else TEXT)
    if made.modality == AUDIO and not has_speech:
        message = 'no space speaks here ([talk] speech in relayd.toml); ask for output_modalities ["text"]'
        raise EventError("unsupported", message, f"{path}output_modalities")
    return made


def _either(fields: Json, path: str, rule: Rule, name: str, beta_name: str) -> Any:
    return read_field(fields, name, rule, read_field(fields, beta_name, rule, None, path), path)


def _refuse_unsupported(fields: Json, path: str) -> None:
    if fields.get("type", "realtime") != "realtime":
        raise EventError("unsupported", f"{path}type must be 'realtime'", f"{path}type")
    for name, what in (("tools", "no tools are called"), ("prompt", "no prompts are stored")):
        if fields.get(name):
            raise EventError("unsupported", f"{what} here; leave out {path}{name}", path + name)


_METADATA = map_of(text(64), text(512))


def metadata_of(fields: Json) -> dict[str, str] | None:
    """Return what a client has attached to a response.

    Raises:
        EventError: it is not at most 16 short strings.
    """
    metadata: dict[str, str] | None = read_field(fields, "metadata", _METADATA, None, "response.")
    if metadata is not None and len(metadata) > 16:
        raise EventError("invalid_value", "response.metadata may have 16 keys", "response.metadata")
    return metadata


def session_json(
    session_id: str, model: str, settings: Settings, instructions: str, listening: Listening | None, ears: str
) -> Json:
    """Return a session as its client sees it.

    Args:
        session_id: its id.
        model: as the client has named it.
        settings: as they are.
        instructions: that the model is told.
        listening: how the client is listened to; None if it is not.
        ears: the space that does it.
    """
    return {
        "type": "realtime",
        "object": "realtime.session",
        "id": session_id,
        "model": model,
        "output_modalities": [settings.modality],
        "instructions": instructions,
        "tools": [],
        "tool_choice": "auto",
        "max_output_tokens": settings.max_output_tokens or INF,
        "temperature": settings.temperature,
        "tracing": None,
        "truncation": "auto",
        "prompt": None,
        "audio": {"input": listening_json(listening, ears), "output": output_json(settings)},
    }


def output_json(settings: Settings) -> Json:
    """Return how replies are spoken."""
    return {"format": FORMAT, "voice": settings.voice, "speed": settings.speed}
