"""The OpenAPI 3.1 document of the HTTP API, which `docs/http.md` describes for people."""

from collections.abc import Iterable
from typing import Any

from protocol.audio.encoder import CODINGS
from protocol.wire.ivf import IVF
from protocol.wire.messages import ENDED_STATES, LIVE_STATES, RETRY_POLICIES
from protocol.wire.structs import ID_PATTERN
from relayd.http.requests_api.openapi_others import CHAT, OPENAI_ERROR, OTHER_PATHS, SPEECH, TRANSCRIPTION
from relayd.views.rows import VERSION

Schema = dict[str, Any]

_DESCRIPTIONS = {
    400: "The body is invalid, or not a JSON object.",
    401: "The token is missing or not valid.",
    403: "The token's role or spaces, or the page's origin, do not allow this.",
    404: "The space does not exist, or the token has no request with this id.",
    405: "The path does not support this method.",
    408: "The body arrived too slowly.",
    409: "The id belongs to another request; or the result has no audio.",
    410: "The request was cancelled.",
    413: "The body or an input is larger than the relay or the space allows.",
    415: "The content type is not supported.",
    416: "The range is beyond the end of the audio.",
    422: "A field is not valid: `details` says which.",
    429: "Too many queued requests, connections, concurrent uploads or failed logins. See Retry-After.",
    500: "Internal error, or the result was too large.",
    501: "This relay is installed without its audio packages.",
    502: "The engine failed, or its worker was lost.",
    503: "The space has no worker and does not queue without one, or the relay is shutting down. See Retry-After.",
    504: "A deadline of the request passed.",
    507: "The disk of the relay is full.",
}
#: Errors of all operations, because they need a token.
_ALWAYS = (401, 403, 429)
#: Errors of requests that did not complete.
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
                "details": {"type": "object", "description": "field -> what is wrong with it; or figures"},
            }
        )
    }
)
_SECONDS = {"minimum": 0.001, "maximum": 1e7}
#: Fields of a body besides `params`; in a form, every other field is a param.
OPTIONS: Schema = {
    "priority": {"type": "integer", "minimum": 0, "maximum": 9, "default": 5},
    "queue_timeout_s": _nullable("number", **_SECONDS),
    "run_timeout_s": _nullable("number", **_SECONDS),
    "detach": {
        "type": "boolean",
        "default": False,
        "description": "whether the request continues when no client reads or holds it or asks for its status",
    },
    "retry": {"type": "string", "enum": list(RETRY_POLICIES), "default": "before_output"},
    "cache": {
        "type": "boolean",
        "default": True,
        "description": "false: it is not answered with the result of an equal request, and its result answers none",
    },
    "group": _nullable(
        "string", maxLength=64, description="any name; to cancel one request of a group cancels the others, too"
    ),
}
_PARAMS = {
    "type": "object",
    "description": "according to the space's `params` schema; 64 KiB at most",
    "maxProperties": 60,
}
_FED = {
    "type": "object",
    "description": "inputs that are fed while the request waits and runs, by name: `live` ones by "
    "`PUT /v1/requests/{request_id}/inputs/{name}`, others from the output of another request",
    "additionalProperties": {
        "anyOf": [
            _object({"media_type": {"type": "string", "maxLength": 128}, "live": {"const": True}}),
            _object(
                {"from": {"type": "string", "pattern": f"^{ID_PATTERN.pattern}$"}, "media_type": {"type": "string"}},
                required=("from",),
            ),
        ]
    },
}
_SUBMIT = _object({"params": _PARAMS, "inputs": _FED, **OPTIONS}, required=(), additionalProperties=False)
#: In a form, fields with other names are params and files.
_FORM = {
    "type": "object",
    "properties": {name: {"type": "string", "contentMediaType": "application/json"} for name in ("params", "inputs")},
    "additionalProperties": True,
    "description": "each field is a param, in the type that the space expects; each file an input",
}
_STATUS = _object(
    {
        "request_id": {"type": "string", "pattern": f"^{ID_PATTERN.pattern}$"},
        "space": {"type": "string"},
        "state": {"type": "string", "enum": [*LIVE_STATES, *ENDED_STATES]},
        "position": _nullable("integer", description="in the queue, from 1; null if it is not queued"),
        "of": _nullable("integer", description="number of requests queued in the space"),
        "eta_s": _nullable("number", description="seconds until it starts; null if unknown"),
        "attempt": {"type": "integer"},
        "next_seq": {"type": "integer", "description": "number of frames so far"},
        "age_s": {"type": "number"},
        "fraction": _nullable("number", description="progress from 0 to 1; null if the engine does not report it"),
        "audio_s": _nullable("number", description="seconds of audio produced"),
        "inputs": {
            "type": "object",
            "description": "live and piped inputs by name, until it has ended",
            "additionalProperties": _object(
                {
                    "bytes": {"type": "integer", "description": "how many are stored"},
                    "bytes_s": {"type": "integer"},
                    "age_s": {"type": "number", "description": "seconds since the latest came"},
                    "ended": {"type": "boolean"},
                    "from": {"type": "string", "description": "the request that a piped one comes from"},
                },
                required=("bytes", "bytes_s", "age_s", "ended"),
            ),
        },
        "code": _nullable("string", description="why it failed"),
        "message": _nullable("string"),
        "details": {"type": "object", "description": "why it failed: field -> what is wrong with it; or figures"},
        "retryable": _nullable("boolean", description="whether the same request may succeed later; null unless failed"),
        "run_s": _nullable("number", description="how long its last attempt ran; null until it has ended"),
        "result": _nullable("object", description="what the engine says of a completed request; null otherwise"),
        "links": _object({name: {"type": "string"} for name in ("self", "events", "audio", "video", "output")}),
    }
)
_OUTPUTS = {
    "type": ["array", "null"],
    "items": {},
    "description": "data of all `output` frames once it has completed; null before, and if they are too large (64 KiB) "
    "or no longer kept: see its events. Binary data is {base64: string}",
}
_STATUS_AND_OUTPUTS = _object(_STATUS["properties"] | {"outputs": _OUTPUTS})
_SPACE = _object(
    {
        "name": {"type": "string"},
        "state": {"type": "string", "enum": ["ready", "no worker", "paused"]},
        "workers": {"type": "integer"},
        "draining": {"type": "integer", "description": "how many of them take no new requests"},
        "slots": {"type": "integer"},
        "queued": {"type": "integer"},
        "running": {"type": "integer"},
        "engine": {"type": "string"},
        "format": _nullable("object"),
        "description": {"type": "string"},
        "params": {"type": "object", "description": "JSON Schema of `params`"},
        "inputs": {"type": "object", "description": "accepted files, by name"},
    }
)


def _responses(success: Schema, *refusals: int) -> Schema:
    """Return the responses in `success`, and the errors."""
    errors = {
        str(status): {"description": _DESCRIPTIONS[status], "content": {"application/json": {"schema": _ref("Error")}}}
        for status in sorted({*refusals, *_ALWAYS})
    }
    return success | errors


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(name: str, description: str, headers: Iterable[str] = ()) -> Schema:
    response: Schema = {"description": description, "content": {"application/json": {"schema": _ref(name)}}}
    if headers:
        response["headers"] = {header: {"schema": {"type": "string"}} for header in headers}
    return response


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
#: Headers of the answer to a submit.
_SUBMITTED = ("Location", "x-relay-cache")
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

_FED_ANSWER = _object(
    {
        "request_id": {"type": "string"},
        "input": {"type": "string"},
        "bytes": {"type": "integer", "description": "how many are stored"},
        "ended": {"type": "boolean"},
    }
)
_LINK = _object(
    {
        "url": {"type": "string", "description": "path of the result: its audio, its video, or its first output"},
        "expires_at": {"type": "string", "format": "date-time"},
        "links": _object({name: {"type": "string"} for name in ("audio", "video", "output")}),
    }
)
_NUMBER = _parameter("number", "path", {"type": "integer", "minimum": 0}, "which output, from 0")
_OUTPUT: Schema = {
    "operationId": "output",
    "summary": "Return the first output as the bytes it is: an image, a video, text; any other value as JSON",
    "parameters": [_parameter("Range", "header", {"type": "string"}, "one range of bytes, once it has ended")],
    "responses": _responses(
        {
            "200": {
                "description": "The output, in the media type that its engine declared.",
                "content": {"*/*": _BYTES},
            },
            "206": {"description": "The requested range.", "content": {"*/*": _BYTES}},
            "416": {"description": "The range is beyond the end of the output."},
        },
        404,
        *_ENDED,
    ),
}

PATHS: Schema = {
    "/v1/spaces": {
        "get": {
            "operationId": "spaces",
            "summary": "List the spaces that this token may use, with the schemas of their params and inputs",
            "responses": _responses({"200": _json("Spaces", "The spaces, sorted by name.")}),
        }
    },
    "/v1/spaces/{space}/requests": {
        "parameters": [_SPACE_NAME],
        "post": {
            "operationId": "submit",
            "summary": "Submit a request",
            "requestBody": _BODY,
            "responses": _responses(
                {"202": _json("Status", "It is stored and will be executed.", _SUBMITTED)}, *_REFUSED
            ),
        },
    },
    "/v1/requests/{request_id}": {
        "parameters": [_REQUEST_ID],
        "get": {
            "operationId": "status",
            "summary": "Return the status of a request, and keep it alive",
            "responses": _responses({"200": _json("StatusAndOutputs", "Its status.")}, 404),
        },
        "put": {
            "operationId": "submit_again",
            "summary": "Submit a request with an id of your own; safe to repeat",
            "parameters": [
                _parameter(
                    "request_id", "path", {"type": "string", "pattern": f"^{ID_PATTERN.pattern}$"}, "128 random bits"
                ),
                {"name": "space", "in": "query", "required": True, "schema": {"type": "string", "minLength": 1}},
            ],
            "requestBody": _BODY,
            "responses": _responses(
                {
                    "200": _json("Status", "The same request was submitted before, and has ended.", _SUBMITTED),
                    "202": _json("Status", "It is stored and will be executed.", _SUBMITTED),
                },
                *_REFUSED,
            ),
        },
        "delete": {
            "operationId": "cancel",
            "summary": "Cancel a request",
            "responses": _responses(
                {
                    "200": _json("Status", "It has ended."),
                    "202": _json("Status", "It is being cancelled; it ends within a second."),
                },
                404,
            ),
        },
    },
    "/v1/requests/{request_id}/inputs/{name}": {
        "parameters": [
            _REQUEST_ID,
            _parameter("name", "path", {"type": "string", "minLength": 1}, "a live input of the request"),
        ],
        "put": {
            "operationId": "feed_input",
            "summary": "Feed a live input while the body comes; the end of the body is the end of the input",
            "parameters": [
                _parameter(
                    "offset",
                    "query",
                    {"type": "integer", "minimum": 0, "default": 0},
                    "number of bytes before this body, to go on after a cut",
                )
            ],
            "requestBody": {"required": True, "content": {"*/*": _BYTES}},
            "responses": _responses(
                {"200": _json("Fed", "All of it is stored.")}, 400, 404, 409, 413, 422, 500, 503, 507
            ),
        },
    },
    "/v1/requests/{request_id}/events": {
        "parameters": [_REQUEST_ID],
        "get": {
            "operationId": "events",
            "summary": "Stream every frame as a server-sent event, until the end; binary data is base64",
            "parameters": [
                _parameter(
                    "Last-Event-ID",
                    "header",
                    {"type": "string", "pattern": "^([0-9]{1,5}\\.[0-9]{1,9})?$"},
                    "id of the last event you have (attempt.seq): the stream continues after it",
                )
            ],
            "responses": _responses(
                {
                    "200": {
                        "description": "`queued`, `started`, `worker_away`, `worker_back`, `progress`, `audio`, "
                        "`output`, and one of `completed`, `failed`, `cancelled`; `error` if the relay has to end "
                        "the stream.",
                        "content": {"text/event-stream": {"schema": _EVENT}},
                    },
                    "204": {"description": "You have all events."},
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
            "summary": "Return the audio: live while the request runs, with ranges once it has ended",
            "parameters": [
                _parameter(
                    "format",
                    "query",
                    {"type": "string", "enum": list(CODINGS), "default": "wav"},
                    "`pcm` has the worker's own sample rate",
                ),
                _parameter("Range", "header", {"type": "string"}, "one range of bytes"),
            ],
            "responses": _responses(
                {
                    "200": {"description": "The audio.", "content": _AUDIO},
                    "206": {"description": "The requested range.", "content": _AUDIO},
                    "304": {"description": "The client has it: its ETag is in If-None-Match."},
                    "416": {"description": _DESCRIPTIONS[416]},
                },
                404,
                409,
                422,
                501,
                *_ENDED,
            ),
        },
    },
    "/v1/requests/{request_id}/video": {
        "parameters": [_REQUEST_ID],
        "get": {
            "operationId": "video",
            "summary": "Return the video as IVF, while the request runs or later",
            "responses": _responses(
                {"200": {"description": "The video.", "content": {IVF: _BYTES}}},
                404,
                409,
                *_ENDED,
            ),
        },
    },
    "/v1/requests/{request_id}/link": {
        "parameters": [_REQUEST_ID],
        "get": {
            "operationId": "link",
            "summary": "Make a link to what this request has made, which needs no token until it expires",
            "parameters": [
                _parameter(
                    "expires_s",
                    "query",
                    {"type": "integer", "minimum": 1, "default": 3600},
                    "how long it lasts, at most `http.link_s` of the relay",
                )
            ],
            "responses": _responses({"200": _json("Link", "The link.")}, 404, 422),
        },
    },
    "/v1/requests/{request_id}/output": {"parameters": [_REQUEST_ID], "get": _OUTPUT},
    "/v1/requests/{request_id}/output/{number}": {
        "parameters": [_REQUEST_ID, _NUMBER],
        "get": _OUTPUT | {"operationId": "output_by_number", "summary": "Return an output by its number"},
    },
}

DOCUMENT: Schema = {
    "openapi": "3.1.0",
    "info": {
        "title": "relayd",
        "version": VERSION,
        "summary": "Submit requests to the spaces of a relay",
        "description": "docs/protocol.md describes the WebSocket at `/v1/relay`.",
    },
    "security": [{"token": []}],
    "paths": PATHS | OTHER_PATHS,
    "components": {
        "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        "schemas": {
            "Error": _ERROR,
            "Fed": _FED_ANSWER,
            "Link": _LINK,
            "OpenAiError": OPENAI_ERROR,
            "Speech": SPEECH,
            "Chat": CHAT,
            "Transcription": TRANSCRIPTION,
            "Spaces": _object({"spaces": {"type": "array", "items": _SPACE}}),
            "Status": _STATUS,
            "StatusAndOutputs": _STATUS_AND_OUTPUTS,
            "Submit": _SUBMIT,
        },
    },
}
