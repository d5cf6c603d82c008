"""The paths of the OpenAPI document that are not of the requests API: OpenAI's, logins, health and metrics."""

from typing import Any

from protocol.audio.encoder import CODINGS, MAX_SPEED, MIN_SPEED
from relayd.auth.users import MAX_PASSWORD_CHARS
from relayd.http.openai.chat_request import HINTS, MAX_MESSAGES, MAX_STOPS, ROLES
from relayd.http.openai.json_body import MAX_NAME_CHARS
from relayd.http.openai.speech_request import MAX_INPUT_CHARS
from relayd.http.openai.transcription_request import FORMATS, MAX_PROMPT_CHARS, TEXT_TYPES

Schema = dict[str, Any]

_ANY_OBJECT: Schema = {"type": "object"}
_BYTES: Schema = {"schema": {"type": "string", "format": "binary"}}
_EVENT: Schema = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_PUBLIC: list[Schema] = []


def _answer(description: str, media_type: str = "application/json", schema: Schema | None = None) -> Schema:
    return {"description": description, "content": {media_type: {"schema": schema or _ANY_OBJECT}}}


def _openai_errors(*statuses: int) -> Schema:
    error = _answer("An error, as OpenAI has it.", schema={"$ref": "#/components/schemas/OpenAiError"})
    return {str(status): error for status in statuses}


def _site_errors(*statuses: int) -> Schema:
    properties = {"success": {"const": False}, "message": {"type": "string"}, "error": {"type": "string"}}
    schema: Schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {str(status): _answer("An error, as the site had it.", schema=schema) for status in statuses}


def _session(summary: str, name: str, fields: tuple[str, ...], *statuses: int, done: str = "200") -> Schema:
    """An operation of the page's login; all of them are refused where there are no users."""
    errors = _answer("An error.", schema={"$ref": "#/components/schemas/Error"})
    text: Schema = {"type": "string", "maxLength": MAX_PASSWORD_CHARS}
    schema: Schema = {"type": "object", "properties": dict.fromkeys(fields, text), "required": list(fields)}
    body: Schema = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
    answer = (
        _answer("`name`, `role` and `expires_at`; the cookie of the session.") if fields else {"description": "Done."}
    )
    return {
        "operationId": name,
        "summary": summary,
        "security": _PUBLIC,
        **(body if fields else {}),
        "responses": {done: answer, **{str(status): errors for status in (400, 403, 404, 408, *statuses)}},
    }


_LISTS = {
    "200": _answer("The list."),
    **_openai_errors(401, 403, 429),
}
OPENAI_ERROR: Schema = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
SPEECH: Schema = {
    "type": "object",
    "properties": {
        "model": {"type": "string", "maxLength": MAX_NAME_CHARS, "description": "a space, or a name in the settings"},
        "input": {"type": "string", "minLength": 1, "maxLength": MAX_INPUT_CHARS, "description": "the text to speak"},
        "voice": {
            "anyOf": [
                {"type": ["string", "null"], "maxLength": MAX_NAME_CHARS},
                {
                    "type": "object",
                    "properties": {"id": {"type": "string", "maxLength": MAX_NAME_CHARS}},
                    "required": ["id"],
                },
            ],
            "description": "a voice of the space, or a name of OpenAI's",
        },
        "response_format": {"enum": [*CODINGS, None], "default": next(iter(CODINGS))},
        "speed": {"type": ["number", "null"], "minimum": MIN_SPEED, "maximum": MAX_SPEED, "default": 1.0},
        "instructions": {"type": ["string", "null"], "maxLength": MAX_INPUT_CHARS},
        "stream_format": {"enum": ["audio", "sse", None], "default": "audio"},
        "stream": {"type": ["boolean", "null"], "description": "false: the whole file at once, with its length"},
        "cache": {"type": ["boolean", "null"], "description": "false: it is not answered with an equal one's result"},
    },
    "required": ["model", "input"],
    "additionalProperties": True,
}

_TEXT_PART: Schema = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_OF_SAMPLING: Schema = {
    "temperature": {"type": ["number", "null"], "minimum": 0, "maximum": 2},
    "top_p": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
    "max_tokens": {"type": ["integer", "null"], "minimum": 1},
    "stop": {
        "anyOf": [
            {"type": ["string", "null"], "minLength": 1},
            {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MAX_STOPS},
        ]
    },
    "seed": {"type": ["integer", "null"]},
}
CHAT: Schema = {
    "type": "object",
    "properties": {
        "model": {"type": "string", "maxLength": MAX_NAME_CHARS, "description": "a space, or a name in the settings"},
        "messages": {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_MESSAGES,
            "items": {
                "type": "object",
                "properties": {
                    "role": {"enum": list(ROLES)},
                    "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}]},
                },
                "required": ["role", "content"],
            },
        },
        "stream": {"type": ["boolean", "null"], "description": "true: events, as the reply is written"},
        "stream_options": {"type": ["object", "null"], "properties": {"include_usage": {"type": ["boolean", "null"]}}},
        "max_completion_tokens": {"type": ["integer", "null"], "minimum": 1},
        **{name: _OF_SAMPLING[name] for name in HINTS},
        "cache": {"type": ["boolean", "null"], "description": "false: it is not answered with an equal one's result"},
    },
    "required": ["model", "messages"],
    "additionalProperties": True,
}
TRANSCRIPTION: Schema = {
    "type": "object",
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "the sound"},
        "model": {"type": "string", "maxLength": MAX_NAME_CHARS, "description": "a space, or a name in the settings"},
        "language": {"type": "string", "maxLength": 32, "description": "that is spoken, such as en"},
        "prompt": {"type": "string", "maxLength": MAX_PROMPT_CHARS, "description": "words that may occur"},
        "temperature": {"type": "number", "minimum": 0, "maximum": 1},
        "response_format": {"enum": list(FORMATS), "default": FORMATS[0]},
        "stream": {"type": "boolean", "description": "true: events, as it is recognized"},
    },
    "required": ["file", "model"],
    "additionalProperties": True,
}

OTHER_PATHS: Schema = {
    "/v1/audio/speech": {
        "post": {
            "operationId": "speech",
            "summary": "Speak a text, as OpenAI's clients ask for it",
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Speech"}}},
            },
            "responses": {
                "200": {
                    "description": "The audio, as it is made; or events, for `stream_format` sse.",
                    "content": {
                        "text/event-stream": {"schema": _EVENT},
                        **{coding.content_type.partition(";")[0]: _BYTES for coding in CODINGS.values()},
                    },
                },
                **_openai_errors(400, 401, 403, 404, 408, 409, 410, 413, 415, 422, 429, 500, 501, 502, 503, 504, 507),
            },
        }
    },
    "/v1/chat/completions": {
        "post": {
            "operationId": "chat",
            "summary": "Reply to messages, as OpenAI's clients ask for it",
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Chat"}}},
            },
            "responses": {
                "200": {
                    "description": "The reply; or events, with `stream`.",
                    "content": {"text/event-stream": {"schema": _EVENT}, "application/json": {"schema": _ANY_OBJECT}},
                },
                **_openai_errors(400, 401, 403, 404, 408, 410, 413, 429, 500, 502, 503, 504, 507),
            },
        }
    },
    "/v1/audio/transcriptions": {
        "post": {
            "operationId": "transcription",
            "summary": "Write down what is said in a file, as OpenAI's clients ask for it",
            "requestBody": {
                "required": True,
                "content": {"multipart/form-data": {"schema": {"$ref": "#/components/schemas/Transcription"}}},
            },
            "responses": {
                "200": {
                    "description": "The transcript; or events, with `stream`.",
                    "content": {
                        "text/event-stream": {"schema": _EVENT},
                        "application/json": {"schema": _ANY_OBJECT},
                        **{kind: {"schema": {"type": "string"}} for kind in TEXT_TYPES},
                    },
                },
                **_openai_errors(400, 401, 403, 404, 408, 410, 413, 415, 429, 500, 502, 503, 504, 507),
            },
        }
    },
    "/v1/audio/models": {
        "get": {"operationId": "audio_models", "summary": "List the models that speak", "responses": _LISTS}
    },
    "/v1/audio/voices": {
        "get": {"operationId": "voices", "summary": "List the voices of the models", "responses": _LISTS}
    },
    "/v1/models": {"get": {"operationId": "models", "summary": "List the models", "responses": _LISTS}},
    "/v1/models/{model}": {
        "parameters": [
            {
                "name": "model",
                "in": "path",
                "required": True,
                "schema": {"type": "string", "minLength": 1},
                "description": "the model's name",
            }
        ],
        "get": {
            "operationId": "model",
            "summary": "Describe a model",
            "responses": {"200": _answer("The model."), **_openai_errors(401, 403, 404, 429)},
        },
    },
    "/v1/session": {
        "get": {
            "operationId": "session",
            "summary": "Say whether the page has users, and who is logged in",
            "security": _PUBLIC,
            "responses": {"200": _answer("`users`, `registration`, `min_password_chars`, `name`, `role`, `proxied`.")},
        },
        "post": _session("Log in to the page", "log_in", ("name", "password"), 401, 413, 422, 429, 507),
        "delete": _session("Log out of the page", "log_out", (), 507, done="204"),
    },
    "/v1/session/password": {
        "put": _session("Change the password", "password", ("password", "new_password"), 401, 413, 422, 429, 507)
    },
    "/v1/register": {
        "post": _session(
            "Register with an invitation", "register", ("name", "password", "invite"), 413, 422, 429, 507, done="201"
        )
    },
    "/websockets/submit/{space}": {
        "parameters": [{"name": "space", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}],
        "post": {
            "operationId": "site_submit",
            "summary": "Submit a prompt, as the WebSocket Spaces site took it",
            "requestBody": {
                "content": {
                    kind: {"schema": {"type": "object", "properties": {"prompt": {"type": "string"}}}}
                    for kind in ("application/x-www-form-urlencoded", "multipart/form-data", "application/json")
                },
            },
            "responses": {
                "200": _answer("`success`, `request_id`, `status` and `queue_size`."),
                **_site_errors(400, 401, 403, 404, 408, 413, 415, 422, 429, 503, 507),
            },
        },
    },
    "/websockets/status": {
        "get": {
            "operationId": "site_status",
            "summary": "Tell how far a request is, as the WebSocket Spaces site did",
            "parameters": [
                {"name": "request_id", "in": "query", "required": True, "schema": {"type": "string", "minLength": 1}}
            ],
            "responses": {
                "200": _answer("`request_id`, `status`, and `result` once it has ended."),
                **_site_errors(400, 401, 403, 404, 429, 503, 507),
            },
        },
    },
    "/health": {
        "get": {
            "operationId": "health",
            "summary": "Say that the relay runs",
            "security": _PUBLIC,
            "responses": {"200": _answer("It runs.")},
        }
    },
    "/ready": {
        "get": {
            "operationId": "ready",
            "summary": "Say whether the relay accepts new requests",
            "security": _PUBLIC,
            "responses": {"200": _answer("It does."), "503": _answer("It is shutting down. See Retry-After.")},
        }
    },
    "/metrics": {
        "get": {
            "operationId": "metrics",
            "summary": "Return the metrics, for Prometheus; who may read them is a setting of the relay",
            "responses": {
                "200": {
                    "description": "The metrics.",
                    "content": {
                        "text/plain": {"schema": {"type": "string"}},
                        "application/openmetrics-text": {"schema": {"type": "string"}},
                    },
                },
                **{
                    status: _answer("An error.", schema={"$ref": "#/components/schemas/Error"})
                    for status in ("401", "403", "429")
                },
            },
        }
    },
}
