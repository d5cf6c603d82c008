"""The HTTP API for requests to any space: submit them, query their status, read and cancel them."""

import secrets
import time

import trio
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import PATH
from protocol.wire.structs import ID_PATTERN
from protocol.wire.validators import Value
from relayd.auth.result_links import LinkGrant
from relayd.auth.tokens import iso_time
from relayd.http.authentication import LINK, principal_of, result_name
from relayd.http.body_parser import open_uploads
from relayd.http.context import context_of
from relayd.http.errors import HttpError
from relayd.http.json_encoding import error_json, jsonable, status_json
from relayd.http.request_stream import cache_header, find_request, open_submission, wait_safe
from relayd.http.requests_api.audio_download import send_audio
from relayd.http.requests_api.event_stream import send_events
from relayd.http.requests_api.input_feed import feed_input
from relayd.http.requests_api.openapi import DOCUMENT
from relayd.http.requests_api.output_download import send_output
from relayd.http.requests_api.outputs import outputs_of
from relayd.http.requests_api.submission import build_submit, find_space, input_limits
from relayd.http.requests_api.video_download import send_video
from relayd.http.streaming_response import StreamingRoute
from relayd.scheduling.model import State
from relayd.views.rows import space_row

#: How long a link lasts if its maker does not say.
DEFAULT_LINK_S = 3600
MAX_DIGITS = 10


def error_body(refusal: HttpError) -> dict[str, Value]:
    """Return the body of an error response of this API."""
    return {"error": error_json(refusal)}


def routes() -> list[BaseRoute]:
    """Return the routes of this API."""
    one = "/v1/requests/{request_id}"
    return [
        Route("/v1/spaces", spaces),
        Route("/v1/spaces/{space}/requests", post, methods=["POST"]),
        Route(one, OneRequest),
        Route(f"{one}/events", StreamingRoute(send_events), methods=["GET"]),
        Route(f"{one}/inputs/{{name}}", feed_input, methods=["PUT"]),
        Route(f"{one}/link", link),
        Route(f"{one}/audio", StreamingRoute(send_audio), methods=["GET"]),
        Route(f"{one}/video", StreamingRoute(send_video), methods=["GET"]),
        Route(f"{one}/output", StreamingRoute(send_output), methods=["GET"]),
        Route(f"{one}/output/{{number}}", StreamingRoute(send_output), methods=["GET"]),
        Route("/openapi.json", openapi),
        Route(PATH, upgrade_required),
    ]


async def spaces(http: HttpRequest) -> Response:
    """List the spaces that the principal may use, with the schemas of their params and inputs."""
    relay, principal = context_of(http).relay, principal_of(http)
    names = sorted(name for name in relay.spaces if principal.may_use(name))
    return JSONResponse({"spaces": [jsonable(space_row(relay, name, with_params=True) or {}) for name in names]})


async def post(http: HttpRequest) -> Response:
    """Submit a new request, with an id chosen by the relay."""
    return await _submit(http, secrets.token_hex(16), http.path_params["space"])


class OneRequest(HTTPEndpoint):
    """One request, by its id."""

    async def get(self, http: HttpRequest) -> Response:
        """Return its status, with its outputs once it has completed, and restart its resume window."""
        request = find_request(http, http.path_params["request_id"])
        request.renew(trio.current_time())
        await wait_safe(http, request)
        outputs = await outputs_of(http, request) if request.entry.state is State.COMPLETED else None
        return JSONResponse(status_json(context_of(http).relay, request) | {"outputs": outputs})

    async def put(self, http: HttpRequest) -> Response:
        """Submit it with an id chosen by the client; repeating it with the same content changes nothing."""
        request_id = http.path_params["request_id"]
        principal_of(http)
        if not ID_PATTERN.fullmatch(request_id):
            message = "a request id must be 32 lower-case hex digits: 128 random bits, reused only for the same request"
            raise HttpError(ErrorCode.INVALID_PARAMS, message)
        space = http.query_params.get("space")
        if not space:
            raise HttpError(ErrorCode.INVALID_PARAMS, f"name the space: PUT /v1/requests/{request_id}?space=NAME")
        return await _submit(http, request_id, space)

    async def delete(self, http: HttpRequest) -> Response:
        """Cancel it; a running request ends as soon as its engine has stopped."""
        request = find_request(http, http.path_params["request_id"])
        relay, principal = context_of(http).relay, principal_of(http)
        for each in [request, *relay.cancel_group(request, f"cancelled by {principal.name}")]:
            await wait_safe(http, each)
        return JSONResponse(status_json(relay, request), 202 if request.live else 200)


async def _submit(http: HttpRequest, request_id: str, space_name: str) -> Response:
    space = find_space(http, space_name)
    with open_uploads(http) as uploads:
        body = await uploads.read(input_limits(http, space))
        submit = build_submit(request_id, space, body)
        inputs = {name: upload.data for name, upload in body.uploads.items()}
        async with open_submission(http, submit, inputs, keep=True, known=http.method == "PUT") as held:
            request = held.request
            await wait_safe(http, request)
            status = 202 if request.live else 200
            content = status_json(context_of(http).relay, request)
            headers = {"Location": f"/v1/requests/{request_id}"} | cache_header(request)
            return JSONResponse(content, status, headers=headers)


async def link(http: HttpRequest) -> Response:
    """Make a link to the result of a request, which needs no token until it expires."""
    principal, request_id = principal_of(http), http.path_params["request_id"]
    request = find_request(http, request_id)
    most = context_of(http).relay.config.http.link_s
    text = http.query_params.get("expires_s", str(min(most, DEFAULT_LINK_S)))
    if not (text.isascii() and text.isdigit() and len(text) < MAX_DIGITS and 0 < int(text) <= most):
        message = f"expires_s must be a whole number of seconds from 1 to {most}, not {text[:32]!r}"
        if most == 0:
            message = "this relay makes no links ([http] link_s = 0); read the result with a token"
        raise HttpError(ErrorCode.INVALID_PARAMS, message, details={"expires_s": message})
    grant = LinkGrant(int(time.time()) + int(text), principal.link_id)
    signed = f"{LINK}={context_of(http).links.make(result_name(request), grant)}"
    links = {name: f"/v1/requests/{request_id}/{name}?{signed}" for name in ("audio", "video", "output")}
    made = "audio"
    if request.audio_s is None and request.makes_video:
        made = "video"
    elif request.audio_s is None and request.entry.state is State.COMPLETED:
        made = "output"
    return JSONResponse({"url": links[made], "expires_at": iso_time(grant.expires_at), "links": links})


async def openapi(http: HttpRequest) -> Response:
    """Return the OpenAPI document."""
    return JSONResponse(DOCUMENT | {"paths": DOCUMENT["paths"] | context_of(http).more_paths})


async def upgrade_required(http: HttpRequest) -> Response:
    """Refuse a request to the WebSocket path that is not a WebSocket handshake."""
    raise HttpError(
        "upgrade_required",
        f"{PATH} accepts only WebSocket connections",
        status=426,
        headers={"Upgrade": "websocket", "Connection": "upgrade"},
    )
