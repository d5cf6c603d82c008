"""From the body of an HTTP request to the `submit` that a WebSocket client would have sent."""

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

#: What a body may say beside `params`; in a form every other field is a param.
OPTIONS = ("priority", "queue_timeout_s", "run_timeout_s", "detach", "retry")


def find_space(http: Request, name: str) -> Space:
    """Return the space a request is for, before anything of its body is read.

    Raises:
        HttpError: the principal may not use the space, there is none, or the relay is shutting down.
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
    """How large the inputs of a space may be; the relay's own checks follow when all of them are there."""
    most = context_of(http).relay.config.limits.max_input_bytes

    def cap(name: str, media_type: str) -> int:
        if not space.engine:
            return most  # no worker has said yet what it takes
        taken = space.inputs.get(name)
        if taken is None:
            takes = ", ".join(sorted(space.inputs)) or "none"
            message = f"space {space.name!r} does not take input {name!r}; it takes {takes}"
            raise HttpError(ErrorCode.INVALID_PARAMS, message, details={f"inputs.{name}": "is not taken"})
        if taken.media_types and media_type not in taken.media_types:
            what = f"is {media_type!r}; it takes {', '.join(taken.media_types)}"
            message = f"space {space.name!r}: input {name!r} {what}"
            raise HttpError(ErrorCode.INVALID_PARAMS, message, details={f"inputs.{name}": what})
        return min(most, taken.max_bytes)

    return cap


def build_submit(request_id: str, space: Space, body: Body) -> Submit:
    """The `submit` that `body` stands for, held to the rules of the wire.

    Raises:
        HttpError: `invalid_params`, with what is wrong.
    """
    fields = dict(body.fields)
    options = {name: fields.pop(name) for name in OPTIONS if name in fields}
    params = fields.pop("params", {})
    if body.is_form:
        options = {name: _parsed(str(value)) for name, value in options.items()}
        params = _params_of_form(space, params, fields)
    elif fields:
        unknown = ", ".join(map(repr, sorted(fields)))[:200]
        takes = ", ".join(("params", *OPTIONS))
        raise HttpError(ErrorCode.INVALID_PARAMS, f"the body has {unknown}; it takes {takes}")
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
        words = str(fault).removeprefix(f"{Submit.TYPE}: ")
        raise HttpError(ErrorCode.INVALID_PARAMS, f"{words}; send large values as files") from None
    except ProtocolError as fault:
        raise HttpError(ErrorCode.INVALID_PARAMS, str(fault)) from None
    assert isinstance(submit, Submit)
    return submit


def _params_of_form(space: Space, params: Value, fields: dict[str, Value]) -> Value:
    """Params of a form: the JSON in its field `params`, and over it each other field."""
    told = _parsed(params) if isinstance(params, str) else params
    if not isinstance(told, dict):
        raise HttpError(ErrorCode.INVALID_PARAMS, "the form's field params must hold a JSON object")
    known = space.params.get("properties")
    rules = known if isinstance(known, dict) else {}
    return told | {name: _coerce_field(rules.get(name), value) for name, value in fields.items()}


def _coerce_field(rule: Value, value: Value) -> Value:
    """A field's text as it is where the space wants a string; else as the JSON it is, if it is any."""
    kind = rule.get("type") if isinstance(rule, dict) else None
    wants_text = kind == "string" or (isinstance(kind, list) and "string" in kind)
    return value if wants_text or not isinstance(value, str) else _parsed(value)


def _parsed(text: str) -> Value:
    try:
        return json.loads(text, parse_constant=lambda name: name)
    except (ValueError, RecursionError):
        return text
