"""Converts the body of an HTTP request to the `submit` that a WebSocket client would send."""

import json
from collections.abc import Mapping

from starlette.requests import Request

from protocol.wire.codec import decode, pack
from protocol.wire.errors import EncodeError, ErrorCode, ProtocolError
from protocol.wire.media_types import accepts
from protocol.wire.messages import FROM_CLIENT, Rejected, Submit
from protocol.wire.params_schema import check_params
from protocol.wire.validators import Value
from relayd.core import access
from relayd.core.space import Space
from relayd.http.authentication import principal_of
from relayd.http.body_parser import Body, InputLimit
from relayd.http.context import context_of
from relayd.http.errors import HttpError
from relayd.http.requests_api.openapi import OPTIONS

#: How forms write yes and no: HTML's checkboxes, Python, JSON, and people.
_BOOLEANS = {"true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False, "0": False}


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
        if not accepts(rule.media_types, media_type):
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
    properties = space.params.get("properties")
    announced = {} if body.is_form and "inputs" in (properties or {}) else _announced(body, fields.pop("inputs", {}))
    params = fields.pop("params", {})
    if body.is_form:
        options = _coerce_fields(OPTIONS, options)
        params = _params_of_form(space, params, fields)
    elif fields:
        unknown = ", ".join(map(repr, sorted(fields)))[:200]
        known = ", ".join(("params", "inputs", *OPTIONS))
        raise HttpError(ErrorCode.INVALID_PARAMS, f"the body has unknown fields {unknown}; known are {known}")
    wire: dict[str, Value] = {
        "type": Submit.TYPE,
        "request_id": request_id,
        "space": space.name,
        "params": params,
        "inputs": {
            name: {"media_type": upload.media_type, "size": len(upload.data), "sha256": upload.sha256}
            for name, upload in body.uploads.items()
        }
        | announced,
    }
    try:
        submit = decode(pack(wire | options), FROM_CLIENT)
    except EncodeError as fault:
        message, faults = fault.describe_in("params"), fault.fields_in("params")
        raise HttpError(ErrorCode.INVALID_PARAMS, message, details=faults) from None
    except ProtocolError as fault:
        raise HttpError(ErrorCode.INVALID_PARAMS, str(fault)) from None
    assert isinstance(submit, Submit)
    return submit


def _announced(body: Body, inputs: Value) -> dict[str, Value]:
    """Return the inputs that the body only announces: live and piped ones."""
    if body.is_form and isinstance(inputs, str):
        inputs = _parsed(inputs or "{}")
    if not isinstance(inputs, dict):
        raise HttpError(ErrorCode.INVALID_PARAMS, "inputs must be a JSON object of input names")
    for name, info in inputs.items():
        is_fed = isinstance(info, dict) and (info.get("live") is True or "from" in info)
        if not is_fed or name in body.uploads:
            what = (
                'must be {"media_type": "text/plain", "live": true} or {"from": "REQUEST_ID"}; '
                "what is whole is sent as a file of a form"
            )
            message = f"input {name[:64]!r} {what}"
            raise HttpError(ErrorCode.INVALID_PARAMS, message, details={f"inputs.{name[:64]}": what})
    return inputs


def _params_of_form(space: Space, params: Value, fields: dict[str, Value]) -> Value:
    """Return the params of a form: the JSON object in its field `params`, overridden by the other fields."""
    base = _parsed(params or "{}") if isinstance(params, str) else params
    if not isinstance(base, dict):
        raise HttpError(ErrorCode.INVALID_PARAMS, "the form's field params must hold a JSON object")
    properties = space.params.get("properties")
    return base | _coerce_fields(properties if isinstance(properties, dict) else {}, fields)


def _coerce_fields(rules: Mapping[str, Value], fields: Mapping[str, Value]) -> dict[str, Value]:
    """Convert the texts of a form to the types of their schemas; an empty one that its schema refuses is left out."""
    filled = {name: text for name, text in fields.items() if text or _fits(rules.get(name, {}), text)}
    return {name: _coerce_field(rules.get(name, {}), text) for name, text in filled.items()}


def _coerce_field(rule: Value, text: Value) -> Value:
    """Return the first reading of a field's text that its schema accepts: as it is, as JSON, as a yes or no.

    If there is none, the reading by its type, whose fault can be told best.
    """
    if not isinstance(text, str) or _fits(rule, text):
        return text
    value = _parsed(text)
    kinds = rule.get("type", ()) if isinstance(rule, dict) else ()
    if "integer" in kinds and isinstance(value, float) and value.is_integer():
        value = int(value)
    boolean = _BOOLEANS.get(text.strip().lower())
    if boolean is not None and not _fits(rule, value) and _fits(rule, boolean):
        return boolean
    return text if "string" in kinds else value


def _fits(rule: Value, value: Value) -> bool:
    return not check_params({"properties": {"": rule}}, {"": value})


def _parsed(text: str) -> Value:
    try:
        return json.loads(text, parse_constant=lambda name: name)
    except (ValueError, RecursionError):
        return text
