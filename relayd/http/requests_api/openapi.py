"""The OpenAPI document of the HTTP side (OpenAPI 3.1): what `docs/http.md` says, for programs."""

from collections.abc import Iterable
from typing import Any

from protocol.wire.messages import ENDED_STATES, LIVE_STATES, RETRY_POLICIES
from protocol.wire.structs import ID_PATTERN
from relayd.http.audio.encoder import CODINGS
from relayd.views.rows import VERSION

Schema = dict[str, Any]

_WORDS = {
    400: "The body is damaged, or no JSON object.",
    401: "No token, or one that opens nothing.",
    403: "The token's role, its spaces or the page's origin do not allow this.",
    404: "There is no such space, or no request of this id that is the token's.",
    405: "The path does not take this method.",
    408: "The body came too slowly.",
    409: "The id belongs to another request; or the result holds no audio.",
    410: "The request was cancelled.",
    413: "More than the relay or the space takes.",
    415: "No content type that is taken here.",
    416: "The range lies behind the end of the audio.",
    422: "Something asked for is not taken: `details` says what.",
    429: "Too many: queued, connections, uploads at once, or failed logins. See Retry-After.",
    500: "Internal error, or the result was too large.",
    501: "This relay was installed without its audio packages.",
    502: "The engine failed, or its worker was lost.",
    503: "No worker (and the space does not queue without), or the relay is shutting down. See Retry-After.",
    504: "A deadline of the request passed.",
    507: "The relay's store is full.",
}
#: What may come of anything that needs a token.
_ALWAYS = (401, 403, 429)
#: What a request that ended otherwise than completed answers with.
_ENDED = (410, 500, 502, 503, 504, 507)


def _nullable(kind: str, **more: Any) -> Schema:
    return {"type": [kind, "null"], **more}


def _object(properties: Schema, required: Iterable[str] | None = None, **more: Any) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties if required is None else required),
        **more,
    }


_ERROR = _object(
    {
        "error": _object(
            {
                "code": {"type": "string", "examples": ["invalid_params"]},
                "message": {"type": "string", "description": "what happened and what to do next"},
                "retryable": {"type": "boolean", "description": "whether the same request may succeed later"},
                "retry_after_s": _nullable("number"),
                "details": {"type": "object", "description": "field -> what is wrong with it, or figures"},
            }
        )
    }
)
_SECONDS = {"minimum": 0.001, "maximum": 1e7}
_OPTIONS: Schema = {
    "priority": {"type": "integer", "minimum": 0, "maximum": 9, "default": 5},
    "queue_timeout_s": _nullable("number", **_SECONDS),
    "run_timeout_s": _nullable("number", **_SECONDS),
    "detach": {
        "type": "boolean",
        "default": False,
        "description": "whether the request goes on though nobody reads it, asks about it or holds it",
    },
    "retry": {"type": "string", "enum": list(RETRY_POLICIES), "default": "before_output"},
}
_PARAMS = {
    "type": "object",
    "description": "as the space's `params` schema says; 64 KiB at most",
    "maxProperties": 60,
}
_SUBMIT = _object({"params": _PARAMS, **_OPTIONS}, required=(), additionalProperties=False)
#: Of a form, fields of other names are params and files.
_FORM = {
    "type": "object",
    "properties": {"params": {"type": "string", "contentMediaType": "application/json"}},
    "additionalProperties": True,
    "description": "each field is a param (JSON where the space wants no string), each file an input of that name",
}
_STATUS = _object(
    {
        "request_id": {"type": "string", "pattern": f"^{ID_PATTERN.pattern}$"},
        "space": {"type": "string"},
        "state": {"type": "string", "enum": [*LIVE_STATES, *ENDED_STATES]},
        "position": _nullable("integer", description="in the queue, from 1; null when it is not queued"),
        "of": _nullable("integer", description="queued in the space"),
        "eta_s": _nullable("number", description="until it starts, where that can be told"),
        "attempt": {"type": "integer"},
        "next_seq": {"type": "integer", "description": "frames there are"},
        "age_s": {"type": "number"},
        "fraction": _nullable("number", description="how far it is, where the engine tells"),
        "audio_s": _nullable("number", description="seconds of audio made"),
        "code": _nullable("string", description="why it failed"),
        "message": _nullable("string"),
        "links": _object({name: {"type": "string"} for name in ("self", "events", "audio")}),
    }
)
_SPACE = _object(
    {
        "name": {"type": "string"},
        "state": {"type": "string", "enum": ["ready", "no worker", "paused"]},
        "workers": {"type": "integer"},
        "slots": {"type": "integer"},
        "queued": {"type": "integer"},
        "running": {"type": "integer"},
        "engine": {"type": "string"},
        "format": _nullable("object"),
        "description": {"type": "string"},
        "params": {"type": "object", "description": "JSON Schema of `params`"},
        "inputs": {"type": "object", "description": "files that are taken, by name"},
    }
)


def _answers(told: Schema, *refusals: int) -> Schema:
    """Responses: those in `told`, and errors."""
    errors = {
        str(status): {"description": _WORDS[status], "content": {"application/json": {"schema": _ref("Error")}}}
        for status in sorted({*refusals, *_ALWAYS})
    }
    return told | errors


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(name: str, description: str, headers: Iterable[str] = ()) -> Schema:
    told: Schema = {"description": description, "content": {"application/json": {"schema": _ref(name)}}}
    if headers:
        told["headers"] = {header: {"schema": {"type": "string"}} for header in headers}
    return told


def _parameter(name: str, where: str, schema: Schema, description: str) -> Schema:
    return {"name": name, "in": where, "required": where == "path", "schema": schema, "description": description}


_SPACE_NAME = _parameter("space", "path", {"type": "string", "minLength": 1}, "the space's name")
_REQUEST_ID = _parameter("request_id", "path", {"type": "string", "minLength": 1}, "the request's id")
_BODY = {
    "required": True,
    "content": {
        "application/json": {"schema": _ref("Submit")},
        "multipart/form-data": {"schema": _FORM},
        "application/x-www-form-urlencoded": {"schema": _FORM},
    },
}
_REFUSED = (400, 404, 408, 409, 413, 415, 422, 500, 503, 507)
_BYTES = {"schema": {"type": "string", "format": "binary"}}
_AUDIO = {"audio/wav": _BYTES, "audio/pcm": _BYTES} | {
    coding.content_type.partition(";")[0]: _BYTES for coding in CODINGS.values()
}

_EVENT = _object(
    {
        "event": {"type": "string", "description": "type of the message"},
        "id": {"type": "string", "description": "`attempt.seq` of a frame"},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
    required=("event", "data"),
)

PATHS: Schema = {
    "/v1/spaces": {
        "get": {
            "operationId": "spaces",
            "summary": "The spaces that this token may use, and what they take",
            "responses": _answers({"200": _json("Spaces", "In order of their names.")}),
        }
    },
    "/v1/spaces/{space}/requests": {
        "parameters": [_SPACE_NAME],
        "post": {
            "operationId": "submit",
            "summary": "Submit a request",
            "requestBody": _BODY,
            "responses": _answers(
                {"202": _json("Status", "It is safe in the relay's store.", ["Location"])}, *_REFUSED
            ),
        },
    },
    "/v1/requests/{request_id}": {
        "parameters": [_REQUEST_ID],
        "get": {
            "operationId": "status",
            "summary": "How a request stands; asking keeps it alive",
            "responses": _answers({"200": _json("Status", "How it stands.")}, 404),
        },
        "put": {
            "operationId": "submit_again",
            "summary": "Submit a request under an id of your own; harmless to send again",
            "parameters": [
                _parameter(
                    "request_id", "path", {"type": "string", "pattern": f"^{ID_PATTERN.pattern}$"}, "128 random bits"
                ),
                {"name": "space", "in": "query", "required": True, "schema": {"type": "string", "minLength": 1}},
            ],
            "requestBody": _BODY,
            "responses": _answers(
                {
                    "200": _json("Status", "The same request was submitted before, and has ended.", ["Location"]),
                    "202": _json("Status", "It is safe in the relay's store.", ["Location"]),
                },
                *_REFUSED,
            ),
        },
        "delete": {
            "operationId": "cancel",
            "summary": "Cancel a request",
            "responses": _answers(
                {
                    "200": _json("Status", "It has ended."),
                    "202": _json("Status", "Its worker was told; it ends within a second."),
                },
                404,
            ),
        },
    },
    "/v1/requests/{request_id}/events": {
        "parameters": [_REQUEST_ID],
        "get": {
            "operationId": "events",
            "summary": "Every frame as a server-sent event, until the end; binary is base64",
            "parameters": [
                _parameter(
                    "Last-Event-ID",
                    "header",
                    {"type": "string", "pattern": "^([0-9]{1,5}\\.[0-9]{1,9})?$"},
                    "id of the last event you have (attempt.seq): the stream goes on behind it",
                )
            ],
            "responses": _answers(
                {
                    "200": {
                        "description": "`queued`, `started`, `progress`, `audio`, `output`, and one of `completed`, "
                        "`failed`, `cancelled`; `error` where the relay itself has to stop.",
                        "content": {"text/event-stream": {"schema": _EVENT}},
                    },
                    "204": {"description": "You have all of it."},
                },
                404,
                422,
                503,
            ),
        },
    },
    "/v1/requests/{request_id}/audio": {
        "parameters": [_REQUEST_ID],
        "get": {
            "operationId": "audio",
            "summary": "What the request says: live while it speaks, in ranges (wav, pcm) once it has ended",
            "parameters": [
                _parameter(
                    "format",
                    "query",
                    {"type": "string", "enum": list(CODINGS), "default": "wav"},
                    "`pcm` is what the worker made, at its own rate",
                ),
                _parameter("Range", "header", {"type": "string"}, "one range of bytes"),
            ],
            "responses": _answers(
                {
                    "200": {"description": "The audio.", "content": _AUDIO},
                    "206": {"description": "The range asked for.", "content": _AUDIO},
                    "416": {"description": _WORDS[416]},
                },
                404,
                409,
                422,
                501,
                *_ENDED,
            ),
        },
    },
}

DOCUMENT: Schema = {
    "openapi": "3.1.0",
    "info": {
        "title": "relayd",
        "version": VERSION,
        "summary": "Requests to the spaces of a relay",
        "description": "OpenAI's speech API (`/v1/audio/speech`, `/v1/models`) is served beside this, as OpenAI "
        "documents it; the WebSocket at `/v1/relay` is described in docs/protocol.md.",
    },
    "security": [{"token": []}],
    "paths": PATHS,
    "components": {
        "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        "schemas": {
            "Error": _ERROR,
            "Spaces": _object({"spaces": {"type": "array", "items": _SPACE}}),
            "Status": _STATUS,
            "Submit": _SUBMIT,
        },
    },
}
