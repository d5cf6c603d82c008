"""Events of OpenAI's Realtime API: what a client sends, parsed; what it is sent, built. Pure.

Events have the names of the API as it is now; `to_beta` gives them those of `OpenAI-Beta: realtime=v1`.
"""

import base64
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

from protocol.wire.validators import Rule
from relayd.talk.dialects.json_messages import parse_object

Json = dict[str, Any]

#: Samples in one event: half a second, far below the size of a message that clients accept.
PIECE_BYTES = 24_000
INVALID, SERVER = "invalid_request_error", "server_error"


class EventError(Exception):
    """A client's event is answered with an `error` event.

    Args:
        code: what is wrong, for programs.
        message: what is wrong and what to do, for people.
        param: the field that is wrong.
        kind: `SERVER` if it is not the client's fault.
    """

    def __init__(self, code: str, message: str, param: str | None = None, kind: str = INVALID) -> None:
        super().__init__(message)
        self.code, self.message, self.param, self.kind = code, message, param, kind


REQUIRED = object()


def read_field(fields: Mapping[str, Any], name: str, rule: Rule, default: Any = None, path: str = "") -> Any:
    """Return a field of an object; one that is null is missing.

    Args:
        fields: the object.
        name: of the field.
        rule: what it may be.
        default: if it is missing; `REQUIRED` if there is none.
        path: of the object, in front of the name in an error.

    Raises:
        EventError: it may not be that; or it is missing, and there is no default.
    """
    value = fields.get(name)
    if value is None and default is not REQUIRED:
        return default
    if value is None:
        raise EventError("missing_required_parameter", f"{path}{name} is required", path + name)
    try:
        rule(value)
        if isinstance(value, str):
            value.encode()
    except UnicodeEncodeError:
        message = f"{path}{name} has half a surrogate pair; send whole characters"
        raise EventError("invalid_value", message, path + name) from None
    except ValueError as fault:
        raise EventError("invalid_value", f"{path}{name} {fault}", path + name) from None
    return value


def parse_event(message: str | bytes) -> Json:
    """Parse a message of a client.

    Raises:
        EventError: it is not an event.
    """
    if isinstance(message, bytes):
        raise EventError("invalid_json", "events are JSON in text messages; this one is binary")
    try:
        return parse_object(message)
    except ValueError as fault:
        raise EventError("invalid_json", f"an event must be a JSON object: {fault}") from None


# -- what is sent


def new_id(kind: str) -> str:
    """Return a new id: of an `event`, an `item`, a `resp` or a `sess`."""
    return f"{kind}_{secrets.token_hex(12)}"


def error_json(fault: EventError, event_id: Any = None) -> Json:
    """Return what is wrong with a client's event, which is named as the client has named it."""
    error = {"type": fault.kind, "code": fault.code, "message": fault.message, "param": fault.param}
    return error | {"event_id": event_id[:512] if isinstance(event_id, str) else None}


def item_json(item_id: str, role: str, status: str, content: Json | None) -> Json:
    """Return a message of the conversation; it has one part at most."""
    return {
        "id": item_id,
        "object": "realtime.item",
        "type": "message",
        "status": status,
        "role": role,
        "content": [] if content is None else [content],
    }


def content_json(role: str, text: str, *, spoken: bool = False) -> Json:
    """Return the content of a message."""
    if role == "user" and spoken:
        return {"type": "input_audio", "transcript": text}
    if role != "assistant":
        return {"type": "input_text", "text": text}
    return {"type": "output_audio", "transcript": text} if spoken else {"type": "output_text", "text": text}


def part_json(text: str, *, spoken: bool) -> Json:
    """Return the part of a response that its events name."""
    return {"type": "audio", "transcript": text} if spoken else {"type": "text", "text": text}


def audio_pieces(pcm: bytes) -> Iterator[str]:
    """Return samples in base64, in pieces that fit into an event."""
    for start in range(0, len(pcm), PIECE_BYTES):
        yield base64.b64encode(pcm[start : start + PIECE_BYTES]).decode()


def usage_json(usage: Mapping[str, Any], audio_s: float) -> Json:
    """Return the usage of a response.

    Args:
        usage: as the language model counts.
        audio_s: seconds of speech; 50 ms are a token.
    """
    asked, text = (_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens"))
    audio = round(audio_s * 20)
    return {
        "total_tokens": asked + text + audio,
        "input_tokens": asked,
        "output_tokens": text + audio,
        "input_token_details": {
            "text_tokens": asked,
            "audio_tokens": 0,
            "cached_tokens": 0,
            "cached_tokens_details": {"text_tokens": 0, "audio_tokens": 0},
        },
        "output_token_details": {"text_tokens": text, "audio_tokens": audio},
    }


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value >= 0 else 0


# -- the names of the beta

_NAMES = {"conversation.item.added": "conversation.item.created"} | {
    f"response.output_{what}.{when}": f"response.{what}.{when}"
    for what in ("text", "audio", "audio_transcript")
    for when in ("delta", "done")
}
_CONTENT = {"output_text": "text", "output_audio": "audio"}


def to_beta(event: Json) -> Json | None:
    """Return an event with the names of the beta; None if it has no such event."""
    if event["type"] == "conversation.item.done":
        return None
    event = event | {"type": _NAMES.get(event["type"], event["type"])}
    if "item" in event:
        event["item"] = _beta_item(event["item"])
    if "response" in event:
        event["response"] = _beta_response(event["response"])
    if "session" in event:
        event["session"] = _beta_session(event["session"])
    return event


def _beta_item(item: Json) -> Json:
    content = [part | {"type": _CONTENT.get(part["type"], part["type"])} for part in item["content"]]
    return item | {"content": content}


def _beta_modalities(modalities: list[str]) -> list[str]:
    return ["text", "audio"] if modalities == ["audio"] else modalities


def _beta_response(response: Json) -> Json:
    beta = {name: value for name, value in response.items() if name not in ("output_modalities", "audio")}
    output = response["audio"]["output"]
    return beta | {
        "output": [_beta_item(item) for item in response["output"]],
        "modalities": _beta_modalities(response["output_modalities"]),
        "voice": output["voice"],
        "output_audio_format": "pcm16",
    }


def _beta_session(session: Json) -> Json:
    output, given = session["audio"]["output"], session["audio"]["input"]
    return {
        "id": session["id"],
        "object": session["object"],
        "model": session["model"],
        "modalities": _beta_modalities(session["output_modalities"]),
        "instructions": session["instructions"],
        "voice": output["voice"],
        "speed": output["speed"],
        "input_audio_format": "pcm16",
        "output_audio_format": "pcm16",
        "input_audio_transcription": given["transcription"],
        "turn_detection": given["turn_detection"],
        "tools": [],
        "tool_choice": session["tool_choice"],
        "temperature": session["temperature"],
        "max_response_output_tokens": session["max_output_tokens"],
    }
