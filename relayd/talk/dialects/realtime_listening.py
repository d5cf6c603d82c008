"""What a Realtime client may set about its own sound. Pure."""

from typing import Any

import attrs

from protocol.wire.validators import Value, any_value, boolean, choice, integer, mapping, number, text
from relayd.talk.dialects.realtime_events import EventError, Json, read_field
from relayd.talk.listening import Listening, TurnDetection

#: What comes, and what is sent: OpenAI's `pcm`.
PCM_HZ = 24_000
FORMAT = {"type": "audio/pcm", "rate": PCM_HZ}
MAX_NAME_CHARS = 256
MAX_PROMPT_CHARS = 4_000


def changed_listening(listening: Listening, fields: Json, path: str) -> Listening:
    """Return how the client is listened to as a `session.update` changes it.

    Raises:
        EventError: a field is not valid, or asks for something that this relay does not do.
    """
    audio = read_field(fields, "audio", mapping, {}, path)
    given = read_field(audio, "input", mapping, {}, f"{path}audio.")
    at = f"{path}audio.input."
    check_format(read_field(given, "format", any_value, FORMAT, at), f"{at}format")
    if read_field(fields, "input_audio_format", text(MAX_NAME_CHARS), "pcm16", path) != "pcm16":
        raise EventError("unsupported", f"{path}input_audio_format must be 'pcm16'", f"{path}input_audio_format")
    for owner, name, where in (
        (fields, "turn_detection", path),
        (given, "turn_detection", at),
    ):
        if name in owner:
            wanted = read_field(owner, name, mapping, None, where)
            detection = None if wanted is None else _detection(listening, wanted, f"{where}{name}.")
            listening = attrs.evolve(listening, turn_detection=detection)
    for owner, name, where in ((fields, "input_audio_transcription", path), (given, "transcription", at)):
        if name in owner:
            wanted = read_field(owner, name, mapping, None, where)
            listening = attrs.evolve(listening, **_transcription(wanted, f"{where}{name}."))
    return listening


def _detection(listening: Listening, fields: Json, path: str) -> TurnDetection:
    kind = read_field(fields, "type", choice("server_vad", "semantic_vad"), "server_vad", path)
    before = listening.turn_detection or TurnDetection()
    if kind == "semantic_vad":  # silences are what is heard here, whatever was meant
        fields = {name: value for name, value in fields.items() if name.endswith("_response")}
    return TurnDetection(
        threshold=float(read_field(fields, "threshold", number(0, 1), before.threshold, path)),
        prefix_ms=read_field(fields, "prefix_padding_ms", integer(0, 5_000), before.prefix_ms, path),
        silence_ms=read_field(fields, "silence_duration_ms", integer(100, 10_000), before.silence_ms, path),
        create_response=read_field(fields, "create_response", boolean, before.create_response, path),
        interrupt_response=read_field(fields, "interrupt_response", boolean, before.interrupt_response, path),
    )


def _transcription(fields: Json | None, path: str) -> dict[str, Any]:
    if fields is None:
        return {"transcription": False, "language": "", "prompt": ""}
    read_field(fields, "model", text(MAX_NAME_CHARS), None, path)  # the space that transcribes is that of [talk]
    return {
        "transcription": True,
        "language": read_field(fields, "language", text(32), "", path),
        "prompt": read_field(fields, "prompt", text(MAX_PROMPT_CHARS), "", path),
    }


def check_format(value: Value, path: str) -> None:
    """Check that samples are what they always are.

    Raises:
        EventError: they are to be something else.
    """
    fields = value if isinstance(value, dict) else {"type": value}
    if fields.get("type") != FORMAT["type"] or fields.get("rate", PCM_HZ) != PCM_HZ:
        message = f"{path} must be {{'type': 'audio/pcm', 'rate': {PCM_HZ}}}"
        raise EventError("unsupported", message, path)


def listening_json(listening: Listening | None, model: str) -> Json:
    """Return what a session says about the client's sound.

    Args:
        listening: None if nothing is heard.
        model: the space that transcribes.
    """
    described: Json = {"format": FORMAT, "transcription": None, "noise_reduction": None, "turn_detection": None}
    if listening is None:
        return described
    if listening.transcription:
        hints = {"language": listening.language or None, "prompt": listening.prompt}
        described["transcription"] = {"model": model} | hints
    if (detection := listening.turn_detection) is not None:
        described["turn_detection"] = {
            "type": "server_vad",
            "threshold": detection.threshold,
            "prefix_padding_ms": detection.prefix_ms,
            "silence_duration_ms": detection.silence_ms,
            "create_response": detection.create_response,
            "interrupt_response": detection.interrupt_response,
            "idle_timeout_ms": None,
        }
    return described
