"""Requests over HTTP, for any space: submit them, query their status, read and cancel them."""

import secrets

import trio
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import PATH
from protocol.wire.structs import ID_PATTERN
from protocol.wire.validators import Value
from relayd.http.authentication import principal_of
from relayd.http.body_parser import open_uploads
from relayd.http.context import context_of
from relayd.http.errors import HttpError
from relayd.http.json_encoding import jsonable, status_json
from relayd.http.request_stream import find_request, open_submission
from relayd.http.requests_api.audio_download import send_audio
from relayd.http.requests_api.event_stream import send_events
from relayd.http.requests_api.openapi import DOCUMENT
from relayd.http.requests_api.submission import build_submit, find_space, input_limits
from relayd.http.streaming_response import StreamingRoute
from relayd.views.rows import space_row


def error_body(refusal: HttpError) -> dict[str, Value]:
    """An error as this API tells it."""
    told: dict[str, Value] = {
        "code": refusal.code,
        "message": refusal.message,
        "retryable": refusal.retryable,
        "retry_after_s": refusal.retry_after_s,
        "details": jsonable(refusal.details),
    }
    return {"error": told}


def routes() -> list[BaseRoute]:
    """What it serves."""
    one = "/v1/requests/{request_id}"
    return [
        Route("/v1/spaces", spaces),
        Route("/v1/spaces/{space}/requests", post, methods=["POST"]),
        Route(one, OneRequest),
        Route(f"{one}/events", StreamingRoute(send_events), methods=["GET"]),
        Route(f"{one}/audio", StreamingRoute(send_audio), methods=["GET"]),
        Route("/openapi.json", openapi),
        Route(PATH, upgrade_required),
    ]


async def spaces(http: HttpRequest) -> Response:
    """The spaces that the principal may use, with what they take."""
    relay, principal = context_of(http).relay, principal_of(http)
    names = sorted(name for name in relay.spaces if principal.may_use(name))
    return JSONResponse({"spaces": [jsonable(space_row(relay, name, with_params=True) or {}) for name in names]})


async def post(http: HttpRequest) -> Response:
    """A new request; its id is the relay's choice."""
    return await _submit(http, secrets.token_hex(16), http.path_params["space"])


class OneRequest(HTTPEndpoint):
    """One request, by its id."""

    async def get(self, http: HttpRequest) -> Response:
        """How it stands. Whoever asks wants it: its resume window begins anew."""
        request = find_request(http, http.path_params["request_id"])
        request.renew(trio.current_time())
        return JSONResponse(status_json(context_of(http).relay, request))

    async def put(self, http: HttpRequest) -> Response:
        """Submit it under an id of the client's own; sent again with the same content it changes nothing."""
        request_id = http.path_params["request_id"]
        principal_of(http)
        if not ID_PATTERN.fullmatch(request_id):
            message = "a request id is 32 lower-case hex digits: 128 random bits, the same again for the same request"
            raise HttpError(ErrorCode.INVALID_PARAMS, message)
        space = http.query_params.get("space")
        if not space:
            raise HttpError(ErrorCode.INVALID_PARAMS, f"say for which space: PUT /v1/requests/{request_id}?space=NAME")
        return await _submit(http, request_id, space)

    async def delete(self, http: HttpRequest) -> Response:
        """Cancel it; a running one ends as soon as its engine has stopped."""
        request = find_request(http, http.path_params["request_id"])
        relay = context_of(http).relay
        if request.live:
            relay.cancel(request, f"cancelled by {principal_of(http).name}")
        return JSONResponse(status_json(relay, request), 202 if request.live else 200)


async def _submit(http: HttpRequest, request_id: str, space_name: str) -> Response:
    space = find_space(http, space_name)
    with open_uploads(http) as uploads:
        body = await uploads.read(input_limits(http, space))
        submit = build_submit(request_id, space, body)
        inputs = {name: upload.data for name, upload in body.uploads.items()}
        async with open_submission(http, submit, inputs, keep=True) as held:
            request = held.request
            status = 202 if request.live else 200
            told = status_json(context_of(http).relay, request)
            return JSONResponse(told, status, headers={"Location": f"/v1/requests/{request_id}"})


async def openapi(http: HttpRequest) -> Response:
    """All of this, for programs."""
    return JSONResponse(DOCUMENT)


async def upgrade_required(http: HttpRequest) -> Response:
    """The WebSocket's path, without asking for one."""
    raise HttpError(
        "upgrade_required",
        f"{PATH} speaks WebSocket",
        status=426,
        headers={"Upgrade": "websocket", "Connection": "upgrade"},
    )
