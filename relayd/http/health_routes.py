"""Health, readiness and metrics: for load balancers, service managers and Prometheus."""

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

#: When to look again whether a relay that leaves is back.
RETRY_AFTER_S = 5


def routes() -> list[BaseRoute]:
    """What it serves."""
    return [Route("/health", _health), Route("/ready", _ready), Route("/metrics", _Metrics().answer)]


async def _health(request: Request) -> Response:
    """That it answers says that its event loop turns; what else may be wrong, the metrics tell."""
    context = context_of(request)
    visitors = sum(exchange.principal is not None for exchange in context.exchanges)
    told = {
        "status": "healthy",
        "service": "relayd",
        "active_connections": len(context.relay.connections) + visitors,
        "draining": context.relay.draining.is_set(),
    }
    return JSONResponse(told)


async def _ready(request: Request) -> Response:
    """Whether new requests are taken here."""
    if not context_of(request).relay.draining.is_set():
        return JSONResponse({"ready": True})
    told = {"ready": False, "why": "the relay is shutting down"}
    return JSONResponse(told, 503, headers={"Retry-After": str(RETRY_AFTER_S)})


@attrs.define(eq=False)
class _Metrics:
    """One scrape at a time is put into words, in a thread: with a hundred spaces that takes 0.1 s."""

    _limiter: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(1))

    async def answer(self, request: Request) -> Response:
        context = context_of(request)
        _let_in(request, context)
        http = HttpReading(context.connections, len(context.exchanges), context.responses)
        scrape = Scrape.of(context.relay, context.tokens, http)
        accept = request.headers.get("accept", "")
        body, content_type = await trio.to_thread.run_sync(
            scrape.encode, accept, limiter=self._limiter, abandon_on_cancel=True
        )
        return Response(body, headers={"Content-Type": content_type})


def _let_in(request: Request, context: HttpContext) -> None:
    """Keep out who may not see the figures of all spaces.

    Raises:
        HttpError: 401, 403 or 429.
    """
    match context.relay.config.http.metrics:
        case "operator":
            principal_of(request, "operator")
        case "token":
            principal = principal_of(request)
            if principal.spaces:
                words = f"the token of {principal.name!r} is for some spaces, and metrics tell of all: use one for all"
                raise HttpError(ErrorCode.FORBIDDEN, words)
