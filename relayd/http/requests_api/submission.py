"""Converts the body of an HTTP request to the `submit` that a WebSocket client would send."""

import json

from starlette.requests import Request

from protocol.wire.codec import decode, pack
from protocol.wire.errors import EncodeError, ErrorCode, ProtocolError
from protocol.wire.messages import FROM_CLIENT, Rejected, Submit
from protocol.wire.validators import Value
from relayd.core import access
from relayd.core.space import Space
from relayd.http.authentication import principal_of
from relayd.http.body_parser import Body, InputLimit
from relayd.http.context import context_of
from relayd.http.errors import HttpError

#: Fields of a body besides `params`; in a form, every other field is a param.
OPTIONS = ("priority", "queue_timeout_s", "run_timeout_s", "detach", "retry")


def find_space(http: Request, name: str) -> Space:
    """Return the space a request is for; called before the body is read.

    Raises:
        HttpError: the space does not exist or the principal may not use it, or the relay is shutting down.
    """
    context, principal = context_of(http), principal_of(http)
    if context.relay.draining.is_set():
        message = "the relay is shutting down; send the request again when it is back"
        raise HttpError(ErrorCode.SHUTTING_DOWN, message, retry_after_s=5.0)
    space = access.find_space(context.relay, principal, name)
    if isinstance(space, Rejected):
        raise HttpError.of(space)
    return space


def input_limits(http: Request, space: Space) -> InputLimit:
    """Return the size limits for the inputs of a space; the relay checks the complete inputs again."""
    most = context_of(http).relay.config.limits.max_input_bytes

    def cap(name: str, media_type: str) -> int:
        if not space.engine:
            return most  # no worker has registered its inputs yet
        rule = space.inputs.get(name)
        if rule is None:
            known = ", ".join(sorted(space.inputs)) or "none"
            message = f"space {space.name!r} does not accept input {name!r}; it accepts {known}"
            raise HttpError(ErrorCode.INVALID_PARAMS, message, details={f"inputs.{name}": "is not accepted"})
        if rule.media_types and media_type not in rule.media_types:
            what = f"is {media_type!r}; it must be {' or '.join(rule.media_types)}"
            message = f"space {space.name!r}: input {name!r} {what}"
            raise HttpError(ErrorCode.INVALID_PARAMS, message, details={f"inputs.{name}": what})
        return min(most, rule.max_bytes)

    return cap


def build_submit(request_id: str, space: Space, body: Body) -> Submit:
    """Build the `submit` message for a body, and validate it by the rules of the wire.

    Raises:
        HttpError: `invalid_params`, with the faults.
    """
    fields = dict(body.fields)
    options = {name: fields.pop(name) for name in OPTIONS if name in fields}
    params = fields.pop("params", {})
    if body.is_form:
        options = {name: _parsed(str(value)) for name, value in options.items()}
        params = _params_of_form(space, params, fields)
    elif fields:
        unknown = ", ".join(map(repr, sorted(fields)))[:200]
        known = ", ".join(("params", *OPTIONS))
        raise HttpError(ErrorCode.INVALID_PARAMS, f"the body has unknown fields {unknown}; known are {known}")
    wire: dict[str, Value] = {
        "type": Submit.TYPE,
        "request_id": request_id,
        "space": space.name,
        "params": params,
        "inputs": {
            name: {"media_type": upload.media_type, "size": len(upload.data), "sha256": upload.sha256}
            for name, upload in body.uploads.items()
        },
    }
    try:
        submit = decode(pack(wire | options), FROM_CLIENT)
    except EncodeError as fault:
        what = str(fault).removeprefix(f"{Submit.TYPE}: ")
        raise HttpError(ErrorCode.INVALID_PARAMS, f"{what}; send large values as files") from None
    except ProtocolError as fault:
        raise HttpError(ErrorCode.INVALID_PARAMS, str(fault)) from None
    assert isinstance(submit, Submit)
    return submit


def _params_of_form(space: Space, params: Value, fields: dict[str, Value]) -> Value:
    """Return the params of a form: the JSON object in its field `params`, overridden by the other fields."""
    base = _parsed(params) if isinstance(params, str) else params
    if not isinstance(base, dict):
        raise HttpError(ErrorCode.INVALID_PARAMS, "the form's field params must hold a JSON object")
    properties = space.params.get("properties")
    rules = properties if isinstance(properties, dict) else {}
    return base | {name: _coerce_field(rules.get(name), value) for name, value in fields.items()}


def _coerce_field(rule: Value, value: Value) -> Value:
    """Return a field's text unchanged if the space expects a string; else parsed as JSON, if it is valid JSON."""
    kind = rule.get("type") if isinstance(rule, dict) else None
    wants_text = kind == "string" or (isinstance(kind, list) and "string" in kind)
    return value if wants_text or not isinstance(value, str) else _parsed(value)


def _parsed(text: str) -> Value:
    try:
        return json.loads(text, parse_constant=lambda name: name)
    except (ValueError, RecursionError):
        return text
