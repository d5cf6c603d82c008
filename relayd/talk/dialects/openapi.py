"""The paths of `/v1/talks` in the OpenAPI document, where there are conversations."""

from typing import Any

from relayd.store.records import TURN_ENDED, TURN_LIVE
from relayd.talk.calls import MAX_OFFER_BYTES
from relayd.talk.session import MAX_TEXT_BYTES
from relayd.talk.talks import MAX_INSTRUCTIONS_CHARS, MAX_SESSION_CHARS, MAX_USER_CHARS

Schema = dict[str, Any]

_ERRORS = {
    400: "The body is not a JSON object.",
    401: "The token is missing or not valid.",
    403: "The token may not do this, or may not use the spaces of conversations.",
    404: "The token's principal has no such conversation, call or turn; or the relay takes no calls.",
    408: "The body arrived too slowly.",
    410: "A request of the turn was cancelled.",
    412: "If-Match names another session of ICE.",
    413: "The text or the body is too large.",
    415: "The body is of another media type.",
    422: "A field is not valid: `details` says which.",
    428: "If-Match is missing.",
    429: "Too much waits, or too much was asked. See Retry-After.",
    500: "Internal error, or the reply was too long.",
    501: "This relay is installed without its audio packages.",
    502: "The language model failed, or its worker was lost.",
    503: "No worker, or the relay is shutting down. See Retry-After.",
    504: "A deadline of the reply passed.",
    507: "The disk of the relay is full.",
}
#: Errors of all operations, and of those with a body.
_ALWAYS, _BODY = (401, 403, 429, 507), (400, 408, 413, 422)
_TEXT = {"type": "string", "minLength": 1, "maxLength": MAX_TEXT_BYTES}
_USER = {"type": "string", "maxLength": MAX_USER_CHARS, "description": "which of the principal's users"}
_INSTRUCTIONS = {"type": ["string", "null"], "maxLength": MAX_INSTRUCTIONS_CHARS}
_NUMBER = {"type": "integer", "minimum": 0, "maximum": 2**31}
_TALK = {
    "type": "object",
    "properties": {name: {"type": "string"} for name in ("id", "session", "user", "instructions")}
    | {name: {"type": "string", "format": "date-time"} for name in ("created_at", "touched_at")},
    "required": ["id", "session", "user", "instructions", "created_at", "touched_at"],
}
_TURN = {
    "type": "object",
    "properties": {
        "number": {"type": "integer"},
        "role": {"enum": ["user", "assistant", "system"]},
        "content": {"type": "string"},
        "state": {"enum": [*TURN_LIVE, *TURN_ENDED]},
        "heard_chars": {"type": ["integer", "null"], "description": "how much of it was heard; null for all"},
        "at": {"type": "string", "format": "date-time"},
    }
    | {name: {"type": ["string", "null"]} for name in ("code", "message", "text_request", "speech_request")},
    "required": ["number", "role", "content", "state", "heard_chars", "code", "text_request", "speech_request", "at"],
}
_REPLY = {
    "type": "object",
    "properties": {
        "turn": _TURN,
        "text": {"type": "string"},
        "finish_reason": {"type": ["string", "null"]},
        "usage": {"type": "object"},
        "audio": {"type": ["object", "null"], "description": "`media_type`, `data` in base64, `url`"},
        "speech": {"type": ["object", "null"], "description": "how the speech ended: `code` null if it is whole"},
    },
    "required": ["turn", "text", "finish_reason", "usage", "audio", "speech"],
}

_ICE_SERVER = {
    "type": "object",
    "properties": {
        "urls": {"type": "array", "items": {"type": "string"}},
        "username": {"type": "string"},
        "credential": {"type": "string"},
    },
    "required": ["urls"],
}


def _list(name: str, item: Schema) -> Schema:
    return {"type": "object", "properties": {name: {"type": "array", "items": item}}, "required": [name]}


def _object(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _operation(
    name: str,
    summary: str,
    answers: dict[int, Schema | None],
    *errors: int,
    body: Schema | None = None,
    error: str = "Error",
) -> Schema:
    operation: Schema = {"operationId": name, "summary": summary}
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
        errors = (*errors, *_BODY)
    responses: Schema = {}
    for status, schema in answers.items():
        content = {} if schema is None else {"content": {"application/json": {"schema": schema}}}
        responses[str(status)] = {"description": "Done.", **content}
    for status in sorted({*errors, *_ALWAYS}):
        refused = {"application/json": {"schema": {"$ref": f"#/components/schemas/{error}"}}}
        responses[str(status)] = {"description": _ERRORS[status], "content": refused}
    return operation | {"responses": responses}


def _sdp(media_type: str = "application/sdp") -> Schema:
    return {media_type: {"schema": {"type": "string", "description": f"at most {MAX_OFFER_BYTES:,} bytes"}}}


def _of_sdp(name: str, summary: str, media_type: str, status: int, *errors: int, error: str = "Error") -> Schema:
    """An operation whose body is SDP, or a fragment of it; one that begins a call answers with SDP."""
    errors = (404, 408, 413, 415, 422, 500, 502, 503, 504, *errors)
    operation = _operation(name, summary, {status: None}, *errors, error=error)
    operation["requestBody"] = {"required": True, "content": _sdp(media_type)}
    if status == 201:
        operation["responses"]["201"] |= {"content": _sdp(), "headers": _LOCATION}
    return operation


def _parameter(name: str, where: str, schema: Schema, description: str) -> Schema:
    return {"name": name, "in": where, "required": where == "path", "schema": schema, "description": description}


_LOCATION: Schema = {"Location": {"schema": {"type": "string"}, "description": "where it is hung up"}}
_NAME = _parameter("talk", "path", {"type": "string", "minLength": 1}, "a session, or the id of a conversation")
_OF_USER = _parameter("user", "query", {"type": "string"}, "the user of the session")
_SAY = _object(
    ("text",),
    text=_TEXT,
    user=_USER,
    interrupt={"type": "boolean", "description": "end the reply that is being made"},
    speak={"type": "boolean", "default": True},
    params={"type": "object", "description": "more params of the request to the language model"},
    speech_params={"type": "object", "description": "params of the request that speaks"},
    instructions=_INSTRUCTIONS,
)
_SAID = _operation(
    "say", "Say something and get the reply", {200: _REPLY}, 404, 410, 500, 501, 502, 503, 504, body=_SAY
)
_SAID["responses"]["200"]["content"]["text/event-stream"] = {"schema": {"type": "object"}}
_TALKS = _list("talks", _TALK)
_TALKS["properties"]["calls"] = {"type": "boolean", "description": "whether there is a space through which calls go"}
_TALKS["properties"]["transcribes"] = {"type": "boolean", "description": "whether a space writes down what is spoken"}

_CALL = _parameter("call", "path", {"type": "string", "minLength": 1}, "as `Location` says")
_REALTIME_CALL = _of_sdp(
    "realtime_call", "Call by OpenAI's Realtime API", "application/sdp", 201, 400, error="OpenAiError"
)
_REALTIME_CALL["requestBody"]["content"]["multipart/form-data"] = {
    "schema": _object(
        ("sdp",), sdp={"type": "string"}, session={"type": "string", "description": "the session, as JSON"}
    )
}

PATHS: Schema = {
    "/v1/talk/ice": {
        "get": _operation("ice", "List the servers for calls", {200: _list("iceServers", _ICE_SERVER)}, 500)
    },
    "/v1/talks": {
        "get": _operation("talks", "List the conversations", {200: _TALKS})
        | {"parameters": [_parameter("user", "query", {"type": "string"}, "only those of this user")]},
        "post": _operation(
            "begin_talk",
            "Begin a conversation, or open one that is there",
            {200: _TALK, 201: _TALK},
            body=_object(
                session={"type": "string", "maxLength": MAX_SESSION_CHARS}, user=_USER, instructions=_INSTRUCTIONS
            ),
        ),
    },
    "/v1/talks/{talk}": {
        "parameters": [_NAME, _OF_USER],
        "get": _operation("talk", "Describe a conversation", {200: _TALK}, 404, 422),
        "delete": _operation("delete_talk", "Delete a conversation with its turns", {204: None}, 404, 422),
    },
    "/v1/talks/{talk}/turns": {
        "parameters": [_NAME, _OF_USER],
        "get": _operation("turns", "List what was said and replied", {200: _list("turns", _TURN)}, 404, 422),
        "post": _operation(
            "add_turn",
            "Add a turn that is not answered",
            {201: _TURN},
            404,
            body=_object(
                ("role", "content"), role={"enum": ["user", "assistant", "system"]}, content=_TEXT, user=_USER
            ),
        ),
    },
    "/v1/talks/{talk}/turns/{number}": {
        "parameters": [_NAME, _parameter("number", "path", _NUMBER, "the number of the turn"), _OF_USER],
        "delete": _operation("delete_turn", "Delete a turn that has ended", {204: None}, 404, 422),
    },
    "/v1/talks/{talk}/say": {"parameters": [_NAME], "post": _SAID},
    "/v1/talks/{talk}/interrupt": {
        "parameters": [_NAME],
        "post": _operation(
            "interrupt",
            "End the reply that is being made",
            {200: {"type": "object", "properties": {"interrupted": {"type": "boolean"}}, "required": ["interrupted"]}},
            404,
            body=_object(user=_USER, reason={"type": "string", "maxLength": 200}),
        ),
    },
    "/v1/talks/{talk}/heard": {
        "parameters": [_NAME],
        "post": _operation(
            "heard",
            "Say how much of the speech of a reply was played",
            {204: None},
            404,
            body=_object(("number", "samples"), number=_NUMBER, samples={"type": "integer", "minimum": 0}, user=_USER),
        ),
    },
    "/v1/talks/{talk}/whep": {
        "parameters": [_NAME, _OF_USER],
        "post": _of_sdp("whep", "Call a conversation by WHEP, to hear and see its replies", "application/sdp", 201),
    },
    "/v1/talks/{talk}/whep/{call}": {
        "parameters": [_NAME, _CALL],
        "patch": _of_sdp("trickle", "Bring candidates of ICE", "application/trickle-ice-sdpfrag", 204, 412, 428)
        | {"parameters": [_parameter("If-Match", "header", {"type": "string"}, "the ETag of the answer")]},
        "delete": _operation("hang_up", "Hang up", {200: None}, 404),
    },
    "/v1/realtime/calls": {
        "parameters": [_parameter("model", "query", {"type": "string"}, "where the body is the offer alone")],
        "post": _REALTIME_CALL,
    },
    "/v1/realtime/calls/{call}/hangup": {
        "parameters": [_CALL],
        "post": _operation("hang_up_realtime", "Hang up a Realtime call", {200: None}, 404, error="OpenAiError"),
    },
}
