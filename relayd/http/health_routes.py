"""Health, readiness and metrics: for load balancers, service managers and Prometheus."""

from contextlib import suppress

import attrs
import trio
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from protocol.wire.errors import ErrorCode
from relayd.http.authentication import principal_of
from relayd.http.context import HttpContext, context_of
from relayd.http.errors import HttpError
from relayd.http.prometheus import HttpReading, Scrape

#: `Retry-After` of a relay that is shutting down.
RETRY_AFTER_S = 5


def routes() -> list[BaseRoute]:
    """Return the routes of this module."""
    return [Route("/health", _health), Route("/ready", _ready), Route("/metrics", _Metrics().answer)]


async def _health(request: Request) -> Response:
    """Report that the event loop runs, and to those who may log in how many have; the metrics show other problems."""
    context = context_of(request)
    body = {"status": "healthy", "service": "relayd", "draining": context.relay.draining.is_set()}
    http_clients = sum(exchange.principal is not None for exchange in context.exchanges)
    with suppress(HttpError):
        principal_of(request)
        body["active_connections"] = len(context.relay.connections) + http_clients
    return JSONResponse(body)


async def _ready(request: Request) -> Response:
    """Report whether the relay accepts new requests."""
    if not context_of(request).relay.draining.is_set():
        return JSONResponse({"ready": True})
    body = {"ready": False, "why": "the relay is shutting down"}
    return JSONResponse(body, 503, headers={"Retry-After": str(RETRY_AFTER_S)})


@attrs.define(eq=False)
class _Metrics:
    """Encodes one scrape at a time, in a thread: with a hundred spaces that takes 0.1 s."""

    _limiter: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(1))

    async def answer(self, request: Request) -> Response:
        context = context_of(request)
        _check_access(request, context)
        http = HttpReading(context.connections, len(context.exchanges), context.responses)
        scrape = Scrape.of(context.relay, context.tokens, http)
        accept = request.headers.get("accept", "")
        body, content_type = await trio.to_thread.run_sync(
            scrape.encode, accept, limiter=self._limiter, abandon_on_cancel=True
        )
        return Response(body, headers={"Content-Type": content_type})


def _check_access(request: Request, context: HttpContext) -> None:
    """Check that the client may see the metrics of all spaces.

    Raises:
        HttpError: 401, 403 or 429.
    """
    match context.relay.config.http.metrics:
        case "operator":
            principal_of(request, "operator")
        case "token":
            principal = principal_of(request)
            if principal.spaces:
                message = f"the token of {principal.name!r} is limited to some spaces; metrics need one for all spaces"
                raise HttpError(ErrorCode.FORBIDDEN, message)
