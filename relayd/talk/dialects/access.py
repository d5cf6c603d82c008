"""How the dialects over HTTP reach the conversations of their daemon, and read what they are asked."""

from collections.abc import Mapping
from typing import Any, TypeVar

from starlette.requests import HTTPConnection, Request

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import Rejected
from protocol.wire.validators import Rule
from relayd.http.authentication import principal_of
from relayd.http.body_parser import MAX_FIELDS_BYTES, json_object, read_all
from relayd.http.errors import HttpError
from relayd.http.openai.extra_fields import check_text
from relayd.talk.events import TurnFailed
from relayd.talk.talks import Talk, Talks

T = TypeVar("T")
#: Limits of a refusal: names of fields come from the client, in any number and length.
MAX_FAULTS, MAX_FIELD_CHARS, MAX_FAULT_CHARS = 16, 64, 200


def talks_of(connection: HTTPConnection) -> Talks:
    """Return the conversations of the daemon that serves a request or a WebSocket."""
    talks = connection.app.state.context.talks
    assert isinstance(talks, Talks)
    return talks


async def fields_of(http: Request, rules: Mapping[str, Rule], *required: str) -> dict[str, Any]:
    """Return the fields of a body.

    Raises:
        HttpError: it is no JSON object, or a field is not what it may be.
    """
    fields = json_object(await read_all(http, MAX_FIELDS_BYTES) or b"{}")
    faults = {name: f"is not a field; known are {', '.join(rules)}" for name in fields.keys() - rules.keys()}
    faults |= {name: "is required" for name in required if name not in fields}
    for name, rule in rules.items():
        if name in fields:
            try:
                rule(fields[name])
                check_text(fields[name])
            except ValueError as fault:
                faults[name] = str(fault)
    if faults:
        named = [(name[:MAX_FIELD_CHARS], what[:MAX_FAULT_CHARS]) for name, what in faults.items()]
        faults = dict(named[:MAX_FAULTS])
        message = "; ".join(f"{name} {what}" for name, what in faults.items())
        raise HttpError(ErrorCode.INVALID_PARAMS, message, details=faults)
    return fields


async def open_named(http: Request, user: str | None = None, *, create: bool = False) -> Talk:
    """Return the conversation that the path names: by its id, or by its session and `user`.

    Raises:
        HttpError: there is none.
    """
    user = http.query_params.get("user", "") if user is None else user
    name = http.path_params["talk"]
    return or_refuse(await talks_of(http).open_named(principal_of(http), name, user, create=create))


def or_refuse(value: T | Rejected) -> T:
    """Return what is not a refusal.

    Raises:
        HttpError: it is one.
    """
    if isinstance(value, Rejected):
        raise HttpError.of(value)
    return value


def failure_of(failed: TurnFailed) -> HttpError:
    """Return the error that says why there is no reply."""
    return HttpError(failed.code, failed.message, retryable=failed.retryable)
