"""The HTTP application: its routes, the headers of every response, and the format of errors."""

from collections.abc import Sequence
from typing import Any

import structlog
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketState

from protocol.link.websocket_frames import INTERNAL_ERROR, POLICY_VIOLATION
from protocol.wire.errors import ErrorCode
from protocol.wire.messages import PATH
from relayd.auth.origins import RefusedOrigins, is_listed, may_come_from, refusal_message
from relayd.http import health_routes, sessions, spaces_site, static_page
from relayd.http.context import HttpContext, context_of
from relayd.http.errors import HttpError
from relayd.http.openai import errors as openai_errors
from relayd.http.openai import routes as openai_routes
from relayd.http.requests_api import routes as requests_routes

log = structlog.get_logger("relayd.http")

#: Default headers of every response. No HSTS, because it would apply to all ports of the host.
HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
#: What pages of other, allowed origins may read: all headers, named where `*` is only a name (requests with cookies).
EXPOSED = (
    "*, Accept-Ranges, Content-Length, Content-Range, ETag, Link, Location, Retry-After, X-Relay-Cache, X-Request-Id"
)
#: What they may send is whatever they ask for: client libraries add headers of their own.
CORS = {"access-control-allow-methods": "GET, HEAD, POST, PUT, PATCH, DELETE", "access-control-max-age": "600"}
#: What a page may send that does not say what it wants to send.
USUAL_HEADERS = "Authorization, Content-Type, Last-Event-ID, Range, If-Range"


Routes = Sequence[BaseRoute]


def make_app(context: HttpContext, more: Routes = ()) -> Starlette:
    """Build the application for `context`; `more` are routes of what is above this layer."""
    parts = (requests_routes, openai_routes, sessions, spaces_site, health_routes, static_page)
    routes = [route for part in parts for route in part.routes()]
    hint = f"; WebSocket clients connect to {PATH}, and /openapi.json lists the rest"
    return make_door_app(context, [*more, *routes], hint)


def make_door_app(context: HttpContext, routes: Routes, hint: str = "") -> Starlette:
    """Build the application of a door, with the headers, origins and errors of all HTTP.

    Args:
        context: of the relay.
        routes: all that it serves.
        hint: ends the answer to requests for other paths.
    """
    handlers: dict[Any, Any] = {HttpError: _refused, HTTPException: _unroutable, Exception: _broken}
    app = Starlette(
        routes=routes, middleware=[Middleware(ResponseHeaders, context=context)], exception_handlers=handlers
    )
    app.router.redirect_slashes = False
    app.state.context, app.state.hint = context, hint
    return app


class ResponseHeaders:
    """Middleware that checks the origin of requests, and adds headers to all responses."""

    def __init__(self, app: ASGIApp, context: HttpContext) -> None:
        self.app = app
        self.context = context
        self.refused = RefusedOrigins()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse its origin."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers, allowed = Headers(scope=scope), self.context.relay.config.allowed_origins
        origin, more = headers.get("origin", ""), _headers_for(headers, self.context)

        async def send_with_headers(message: Message) -> None:
            if message["type"].endswith("http.response.start"):
                counts, status = self.context.responses, message["status"]
                counts[status] = counts.get(status, 0) + 1
                response_headers = MutableHeaders(scope=message)
                for name, value in more.items():
                    response_headers.setdefault(name, value)
            await send(message)

        if not may_come_from(origin, headers.get("host", ""), allowed):
            self.refused.add(origin)
            refusal = HttpError(ErrorCode.FORBIDDEN, refusal_message(origin))
            await error_response(scope["path"], refusal)(scope, receive, send_with_headers)
        elif scope["type"] == "http" and scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            asked = headers.get("access-control-request-headers") or USUAL_HEADERS
            cors = CORS | {"access-control-allow-headers": asked}
            await Response(status_code=204, headers=cors)(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive, send_with_headers)


def _headers_for(request_headers: Headers, context: HttpContext) -> dict[str, str]:
    """Return the headers of every response to a request; with those that let a page of a listed origin read it."""
    origin = request_headers.get("origin", "")
    if not origin or not is_listed(origin, context.relay.config.allowed_origins):
        return HEADERS
    return HEADERS | {
        "access-control-allow-origin": origin,
        "access-control-expose-headers": EXPOSED,
        "vary": "Origin, Access-Control-Request-Headers",
    }


def error_response(path: str, refusal: HttpError) -> Response:
    """Convert an error to a response, in the format of the API that `path` belongs to."""
    if path.startswith(openai_routes.PATHS):
        body = openai_errors.error_body(refusal)
    elif path.startswith(spaces_site.PREFIX):
        body = spaces_site.error_body(refusal)
    else:
        body = requests_routes.error_body(refusal)
    return JSONResponse(body, refusal.status, headers=refusal.headers)


async def _refused(request: HTTPConnection, refusal: Exception) -> Response | None:
    assert isinstance(refusal, HttpError)
    if isinstance(request, WebSocket) and request.application_state is not WebSocketState.CONNECTING:
        if request.application_state is WebSocketState.CONNECTED:
            await request.close(POLICY_VIOLATION if refusal.status < 500 else INTERNAL_ERROR, refusal.message)
        return None
    return error_response(request.url.path, refusal)


async def _unroutable(request: Request, fault: Exception) -> Response:
    assert isinstance(fault, HTTPException)
    path = request.url.path
    if fault.status_code == 405:
        allow = (fault.headers or {}).get("Allow", "")
        refusal = HttpError(
            "method_not_allowed", f"{path} allows only {allow}", status=405, headers=dict(fault.headers or {})
        )
    elif fault.status_code == 404:
        refusal = HttpError("not_found", f"there is nothing at {path}{request.app.state.hint}", status=404)
    else:
        refusal = HttpError("bad_request", fault.detail, status=fault.status_code, headers=dict(fault.headers or {}))
    return error_response(path, refusal)


async def _broken(request: Request, fault: Exception) -> Response:
    # Starlette sends this response from outside the middleware, so the headers are added here.
    headers = _headers_for(request.headers, context_of(request))
    refusal = HttpError(ErrorCode.INTERNAL, "internal error; see the relay's log", headers=headers)
    return error_response(request.url.path, refusal)
