"""Turns what a model's server says when it does not do what it was asked into errors. Pure.

A client reads what the server says of its own request (4xx). What the server says of itself (5xx, keys, addresses,
paths) is the worker's owner's business, and stays in the worker's log.
"""

import json
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

import attrs

from gpuworker.engines.base import EngineError
from protocol.wire.errors import ErrorCode
from protocol.wire.validators import Value

MAX_WORDS_CHARS = 300
#: Statuses of a server that may answer the same request later.
BUSY = frozenset([429, 502, 503])
_NO_PARAMS: Mapping[str, str] = {}
_PRIVATE = {
    re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+"): "(an address)",
    re.compile(r"(?<![\w/])/(?:[^\s/'\",;:]+/)+[^\s/'\",;:]*"): "(a path)",
    re.compile(r"\b(?:sk|rly|hf|key)[-_]\S{6,}"): "(a key)",
}


@attrs.frozen(kw_only=True)
class Words:
    """How errors speak of a server.

    Args:
        server: what it is.
        makes: what it is asked for.
        knows: what it may not know.
        params: its field -> the engine's param, where they differ.
    """

    server: str
    makes: str
    knows: str
    params: Mapping[str, str] = attrs.field(factory=dict)


class ServerBusy(EngineError):
    """The server did not begin, and may later: it is busy, starting or away.

    Args:
        message: what happened.
        retry_after_s: when the server asks to be asked again; None if it does not say.
        away: it cannot be reached at all, so no slot is ready until it is back; no request is to blame.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None, away: bool = False) -> None:
        details: dict[str, Value] = {} if retry_after_s is None else {"retry_after_s": retry_after_s}
        details |= {"innocent": True} if away else {}
        super().__init__(message, details=details, retryable=True, restart=away)
        self.retry_after_s = retry_after_s


def refusal(words: Words, status: int, headers: Mapping[str, str], body: bytes) -> EngineError:
    """The error that an answer stands for which is not what was asked for; its note says the server's own words.

    Args:
        words: how to speak of the server.
        status: of the answer, any.
        headers: by name in lower case.
        body: as much of it as was read.
    """
    fault = _refusal(words, status, headers, body)
    fault.add_note(f"it answered HTTP {status}: {owner_words(body) or 'nothing'}")
    return fault


def _refusal(words: Words, status: int, headers: Mapping[str, str], body: bytes) -> EngineError:
    said = client_words(body, words)
    quoted = f": {said}" if said else ""
    server, http = words.server, f"(HTTP {status})"
    if status < 300:
        return EngineError(
            f"{server} answered without {words.makes}{quoted}; its owner finds out more in the worker's log"
        )
    if status < 400:
        return EngineError(f"{server} is elsewhere {http}; the worker's owner gives its address with -o url")
    if status in (401, 403):
        return EngineError(f"{server} refuses the worker {http}; its owner gives a key with -o api_key_file")
    if status in BUSY:
        what = "answers nothing now" if status == 502 else "is busy"
        return ServerBusy(f"{server} {what} {http}; try again later", retry_after_s=_retry_after_s(headers))
    if status in (400, 413, 415, 422):
        return EngineError(
            f"{server} refuses this request {http}{quoted}",
            code=ErrorCode.INVALID_PARAMS,
            details=_fields(body, words),
        )
    if status < 500:
        return EngineError(f"{server} does not know {words.knows} {http}{quoted}")
    return EngineError(
        f"{server} failed {http}; the worker's owner finds the reason in its log", retryable=status == 504
    )


def owner_words(body: bytes, params: Mapping[str, str] = _NO_PARAMS) -> str:
    """What a body says, for the worker's log: in one line, at most `MAX_WORDS_CHARS`."""
    parsed = _parsed(body)
    words = _message(parsed, params) if parsed is not None else ""
    if not words and not body.lstrip().startswith((b"<", b"data:", b"event:")):  # a page, or events of audio
        words = body[: 4 * MAX_WORDS_CHARS].decode("utf-8", "replace")
    words = " ".join("".join(char if char.isprintable() else " " for char in words).split())
    return words if len(words) <= MAX_WORDS_CHARS else f"{words[: MAX_WORDS_CHARS - 1]}…"


def client_words(body: bytes, words: Words) -> str:
    """What a body says, for the client: without addresses, paths and keys."""
    said = owner_words(body, words.params)
    for pattern, instead in _PRIVATE.items():
        said = pattern.sub(instead, said)
    return said


def _parsed(body: bytes) -> Value:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _message(answer: Value, params: Mapping[str, str]) -> str:
    """The text in an error of OpenAI, FastAPI, LocalAI and others: `{"error": {"message": …}}`, `{"detail": …}`, …"""
    if isinstance(answer, str):
        return answer
    if isinstance(answer, list):  # FastAPI's faults of fields
        return "; ".join(filter(None, (_message(each, params) for each in answer[:8])))
    if not isinstance(answer, dict):
        return ""
    words = next(
        (said for name in ("error", "detail", "message", "msg") if (said := _message(answer.get(name), params))), ""
    )
    place = answer.get("loc")
    field = str(place[-1]) if isinstance(place, list) and place else ""
    return f"{params.get(field, field)}: {words}" if field and words else words


def _fields(body: bytes, words: Words) -> dict[str, str]:
    """Field -> what is wrong, as far as the server names fields."""
    answer = _parsed(body)
    if not isinstance(answer, dict):
        return {}
    error, detail = answer.get("error"), answer.get("detail")
    if isinstance(error, dict) and isinstance(error.get("param"), str):
        found: dict[str, Value] = {error["param"]: error.get("message")}
    elif isinstance(detail, list):
        faults = [each for each in detail[:8] if isinstance(each, dict) and isinstance(each.get("loc"), list)]
        found = {str(fault["loc"][-1]): fault.get("msg") for fault in faults if fault["loc"]}
    else:
        return {}
    return {
        words.params.get(name, name): client_words(json.dumps(said).encode(), words)
        for name, said in found.items()
        if name and isinstance(said, str)
    }


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """`Retry-After` (RFC 9110 section 10.2.3): seconds, or a date."""
    text = headers.get("retry-after", "").strip()
    if text.isdecimal():
        return float(text[:9])
    try:
        return max(0.0, round(parsedate_to_datetime(text).timestamp() - time.time(), 3))
    except (ValueError, OverflowError):
        return None
