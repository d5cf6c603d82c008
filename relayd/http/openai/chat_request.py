"""Parses the body of `POST /v1/chat/completions`, and converts it to the params and inputs of a space. Pure.

What would change the reply, and no space can do, is refused; hints that a space has no param for are ignored.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import attrs

from protocol.wire.errors import ErrorCode
from protocol.wire.validators import Rule, Value, boolean, integer, kind_of, number, text
from relayd.config.schema import MIB
from relayd.core.space import Space
from relayd.http.errors import HttpError
from relayd.http.openai.extra_fields import check_text
from relayd.http.openai.json_body import MAX_NAME_CHARS, invalid, read_fields

MAX_BODY_BYTES = 8 * MIB
MAX_MESSAGES = 10_000
MAX_STOPS = 4
#: What is larger is sent as an input, if the space has one: params have 64 KiB, and a budget for being checked.
MAX_PARAM_BYTES, MAX_PARAM_MESSAGES = 48 * 1024, 200
MESSAGES = "messages"
JSON = "application/json"
#: OpenAI's roles -> those of a language space.
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
#: OpenAI's fields that a space may have a param for; otherwise they are ignored.
HINTS = ("temperature", "top_p", "max_tokens", "stop", "seed")


def _stop(value: Value) -> None:
    stops = value if isinstance(value, list) else [value]
    if len(stops) > MAX_STOPS or not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError(f"must be a string, or an array of up to {MAX_STOPS}")


def _options(value: Value) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"must be an object, not {kind_of(value)}")
    boolean(value.get("include_usage") or False)


#: Field -> rule.
_FIELDS: dict[str, Rule] = {
    "stream": boolean,
    "stream_options": _options,
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "max_tokens": integer(1),
    "max_completion_tokens": integer(1),
    "stop": _stop,
    "seed": integer(-(2**63), 2**63 - 1),
    "cache": boolean,
}


def _is_text_format(value: Value) -> bool:
    return isinstance(value, dict) and value.get("type") == "text"


#: Field that no space can do -> whether a value asks for nothing, and what to tell who asks.
_UNSUPPORTED: dict[str, tuple[Callable[[Value], bool], str]] = {
    "n": (lambda value: value == 1, "must be 1: a request has one reply; send several requests"),
    "tools": (lambda value: not value, "is not supported; leave it out"),
    "tool_choice": (lambda value: value in ("none", "auto"), "is not supported; leave it out"),
    "functions": (lambda value: not value, "is not supported; leave it out"),
    "function_call": (lambda value: value in ("none", "auto"), "is not supported; leave it out"),
    "response_format": (_is_text_format, "must be text: no other form is promised"),
    "modalities": (lambda value: value == ["text"], "must be text: POST /v1/audio/speech speaks"),
    "audio": (lambda value: not value, "is not supported; POST /v1/audio/speech speaks"),
    "logprobs": (lambda value: not value, "is not supported; leave it out"),
}


_KNOWN = frozenset(["model", MESSAGES, *_FIELDS, *_UNSUPPORTED])


@attrs.frozen(kw_only=True)
class ChatRequest:
    """A parsed request for a reply.

    Args:
        model: a space, or a name that stands for one.
        messages: role and content of each.
        hints: params that OpenAI's API has, by the names of a language space.
        stream: whether the reply is sent as it is written.
        include_usage: whether a stream ends with the usage.
        cache: whether the result of an equal request may answer it.
        extra: other fields.
    """

    model: str
    messages: list[dict[str, str]]
    hints: dict[str, Value]
    stream: bool
    include_usage: bool
    cache: bool
    extra: dict[str, Value]


def parse_chat(body: bytes) -> ChatRequest:
    """Parse a body.

    Raises:
        HttpError: 400 with every fault; 413 if it holds too much.
    """
    fields = {name: value for name, value in read_fields(body).items() if value is not None}
    faults: dict[str, str] = {}
    for name, rule in ({"model": text(MAX_NAME_CHARS)} | _FIELDS).items():
        try:
            if name in fields:
                rule(fields[name])
                check_text(fields[name])
            elif name == "model":
                raise ValueError("is required")
        except ValueError as fault:
            faults[name] = str(fault)
    for name, (asks_nothing, what) in _UNSUPPORTED.items():
        if name in fields and not asks_nothing(fields[name]):
            faults[name] = what
    messages: list[dict[str, str]] = []
    try:
        messages = list(_messages(fields.get(MESSAGES)))
    except _MessageFault as fault:
        faults[fault.place] = str(fault)
    if faults:
        raise invalid(faults, status=400)
    hints = {name: fields[name] for name in HINTS if name in fields}
    if "max_completion_tokens" in fields:
        hints["max_tokens"] = fields["max_completion_tokens"]
    if isinstance(hints.get("stop"), str):
        hints["stop"] = [hints["stop"]]
    if "seed" in hints:
        hints["seed"] %= 2**63
    return ChatRequest(
        model=fields["model"],
        messages=messages,
        hints=hints,
        stream=fields.get("stream", False),
        include_usage=bool(fields.get("stream_options", {}).get("include_usage")),
        cache=fields.get("cache", True),
        extra={
            name: fields[name] for name in fields.keys() - {"model", MESSAGES} - _FIELDS.keys() - _UNSUPPORTED.keys()
        },
    )


class _MessageFault(ValueError):
    """A fault of one message: where it is, and what is wrong."""

    def __init__(self, place: str, what: str) -> None:
        super().__init__(what)
        self.place = place


def _messages(given: Value) -> Iterator[dict[str, str]]:
    if not isinstance(given, list):
        raise _MessageFault(MESSAGES, "is required" if given is None else f"must be an array, not {kind_of(given)}")
    if not 0 < len(given) <= MAX_MESSAGES:
        raise _MessageFault(MESSAGES, f"must be 1 to {MAX_MESSAGES} messages")
    for number_, message in enumerate(given):
        place = f"{MESSAGES}.{number_}"
        if not isinstance(message, dict):
            raise _MessageFault(place, f"must be an object, not {kind_of(message)}")
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise _MessageFault(f"{place}.role", f"must be one of {', '.join(ROLES)}; tools are not supported")
        for field in ("tool_calls", "function_call", "audio"):
            if message.get(field):
                raise _MessageFault(f"{place}.{field}", "is not supported; leave it out")
        yield {"role": ROLES[role], "content": _content(message.get("content"), role, f"{place}.content")}


def _content(given: Value, role: str, place: str) -> str:
    """The text of a message: a string, or parts that are joined by line breaks."""
    if given is None and role == "assistant":
        return ""
    parts = given if isinstance(given, list) else [given]
    texts = []
    for number_, part in enumerate(parts):
        where = f"{place}.{number_}" if parts is given else place
        kind = part.get("type") if isinstance(part, dict) and parts is given else "text"
        said = part.get(kind) if isinstance(part, dict) and parts is given and isinstance(kind, str) else part
        if not isinstance(kind, str) or kind not in ("text", "refusal"):
            raise _MessageFault(where, f"is of type {str(kind)[:64]!r}; only text is supported")
        if not isinstance(said, str):
            raise _MessageFault(where, f"must be text, not {kind_of(said)}")
        try:
            check_text(said)
        except ValueError as fault:
            raise _MessageFault(where, str(fault)) from None
        texts.append(said)
    return "\n".join(texts)


@attrs.frozen(kw_only=True)
class Asked:
    """A request for a reply as params and inputs of a space.

    Args:
        params: by name.
        inputs: name -> content, which is JSON.
        passed_over: fields that are ignored.
    """

    params: dict[str, Value]
    inputs: dict[str, bytes]
    passed_over: tuple[str, ...]


def converses(space: Space) -> bool:
    """Whether a space replies to messages; True for one that no worker has served yet."""
    return not space.engine or _takes_messages(space)


def _takes_messages(space: Space) -> bool:
    schema = space.params.get("properties", {}).get(MESSAGES)
    return isinstance(schema, dict) and not ("const" in schema and schema["const"] is None)


def asked_of(chat: ChatRequest, space: Space) -> Asked:
    """Convert a request to the params and inputs of a space.

    Before its first worker registers, a space has declared nothing; then all hints are sent, and the worker checks the
    params itself.

    Raises:
        HttpError: 400 if the space does not reply to messages, 413 if it does not take so many.
    """
    if not converses(space):
        what = f"space {space.name!r} takes no messages, so it is no language model; GET /v1/models lists what there is"
        raise invalid({"model": what}, status=400)
    known = space.params.get("properties", {}) if space.engine else dict.fromkeys(HINTS)
    params: dict[str, Value] = {name: value for name, value in chat.hints.items() if name in known}
    for name, value in chat.extra.items():
        if name in known:
            try:
                check_text(value)
            except ValueError as fault:
                raise invalid({name: str(fault)}, status=400) from None
            params[name] = value
    passed_over = tuple(name for name in chat.hints if name not in known)
    size = sum(len(message["content"].encode()) + 32 for message in chat.messages)
    if size <= MAX_PARAM_BYTES and len(chat.messages) <= MAX_PARAM_MESSAGES:
        return Asked(
            params=params | {MESSAGES: [dict(each) for each in chat.messages]}, inputs={}, passed_over=passed_over
        )
    if space.engine and MESSAGES not in space.inputs:
        what = f"are more than space {space.name!r} takes: {MAX_PARAM_BYTES} bytes in {MAX_PARAM_MESSAGES} messages"
        raise HttpError(ErrorCode.INPUT_TOO_LARGE, f"{MESSAGES} {what}", details={MESSAGES: what})
    data = json.dumps(chat.messages, ensure_ascii=False).encode()
    return Asked(params=params, inputs={MESSAGES: data}, passed_over=passed_over)


def usage_json(usage: Any) -> dict[str, int] | None:
    """What a space says of the tokens, as OpenAI has it; None if it says nothing."""
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if type(prompt) is not int or type(completion) is not int or prompt < 0 or completion < 0:
        return None
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
