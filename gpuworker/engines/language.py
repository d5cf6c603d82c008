"""What the engines of language spaces have in common: their params, the messages of a request, and the last output.

A language space is one whose params have `messages`. What it puts out are strings, the reply as it is written, and at
the end one object that says why it ended and how much it was.
"""

import json
from collections.abc import Iterable, Mapping

import attrs

from gpuworker.engines.base import EngineInput, InvalidParams, OutputChunk
from protocol.wire.params_schema import check_params
from protocol.wire.structs import InputRule
from protocol.wire.validators import Value

ROLES = ("system", "user", "assistant")
MAX_STOPS = 4
MAX_STOP_CHARS = 64
MAX_INSTRUCTIONS_CHARS = 16_384
#: A million tokens of text, or so; params have room for 64 KiB.
MAX_MESSAGES_BYTES = 4 * 1024 * 1024
#: Of an input, for which no schema counts.
MAX_MESSAGES = 10_000
#: Longer conversations than params may hold come as an input of the same name, in JSON.
INPUTS = {"messages": InputRule(media_types=["application/json"], max_bytes=MAX_MESSAGES_BYTES)}

_MESSAGE: dict[str, Value] = {
    "type": "object",
    "properties": {"role": {"enum": list(ROLES)}, "content": {"type": "string"}},
    "required": ["role", "content"],
    "additionalProperties": False,
}


def params_schema() -> dict[str, Value]:
    """The JSON Schema of the params of a language space."""
    stops = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
    return {
        "type": "object",
        "properties": {
            "messages": {
                "type": "array",
                "items": _MESSAGE,
                "minItems": 1,
                "description": "the conversation so far; a long one is sent as an input of this name, in JSON",
            },
            "instructions": {
                "type": "string",
                "maxLength": MAX_INSTRUCTIONS_CHARS,
                "description": "what the model is told first, before the messages",
            },
            "temperature": {"type": "number", "minimum": 0, "maximum": 2, "description": "of sampling"},
            "top_p": {"type": "number", "minimum": 0, "maximum": 1, "description": "of sampling"},
            "max_tokens": {"type": "integer", "minimum": 1, "maximum": 2**31, "description": "longest reply"},
            "stop": {
                "type": "array",
                "items": stops,
                "maxItems": MAX_STOPS,
                "description": "the reply ends before the first of these",
            },
            "seed": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1, "description": "of sampling"},
        },
        "required": ["messages"],
        "additionalProperties": False,
    }


@attrs.frozen
class Message:
    """One message of a conversation."""

    role: str
    content: str


def messages_of(params: Mapping[str, Value], inputs: Mapping[str, EngineInput]) -> list[Message]:
    """The messages of a request, from its params or its input, with its instructions in front, in one message.

    Raises:
        InvalidParams: the input holds something else.
    """
    given = params.get("messages")
    if (whole := inputs.get("messages")) is not None:
        given = _checked(whole.data)
    messages = [Message(message["role"], message["content"]) for message in given or ()]
    instructions = str(params.get("instructions") or "")
    at = next((at for at, message in enumerate(messages) if message.role != "system"), len(messages))
    texts = [text for text in (instructions, *(message.content for message in messages[:at])) if text.strip()]
    # Together in one message: the templates of many models take no second one.
    return ([Message("system", "\n\n".join(texts))] if texts else []) + messages[at:]


def _checked(data: bytes) -> list[dict[str, str]]:
    try:
        messages = json.loads(data)
        json.dumps(messages, ensure_ascii=False).encode()  # JSON can express half of a character
    except (ValueError, RecursionError):
        raise InvalidParams({"messages": "is an input that is not JSON in UTF-8"}) from None
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_MESSAGES:
        raise InvalidParams({"messages": f"must be an array of 1 to {MAX_MESSAGES} messages"})
    for number, message in enumerate(messages):
        if faults := check_params({"properties": {"message": _MESSAGE}}, {"message": message}):
            place, fault = next(iter(faults.items()))
            raise InvalidParams({f"messages.{number}{place.removeprefix('message')}": fault})
    return messages


def last_output(finish_reason: str, usage: tuple[int, int] | None) -> OutputChunk:
    """The last output of a reply.

    Args:
        finish_reason: `stop`, `length`, or another word of the model's.
        usage: tokens of the messages and of the reply; None if nobody has counted them.
    """
    counted: Value = None if usage is None else {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return OutputChunk({"finish_reason": finish_reason, "usage": counted})


def cut_at_stop(text: str, stops: Iterable[str]) -> str:
    """`text` up to the first of the texts at which a reply ends."""
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(found)] if found else text
