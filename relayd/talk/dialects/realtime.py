"""OpenAI's Realtime API over a WebSocket: `GET /v1/realtime`. docs/realtime.md describes it."""

import trio
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.websockets import WebSocket

from relayd.auth.tokens import reject_readonly
from relayd.http.context import context_of
from relayd.http.errors import HttpError
from relayd.http.openai.errors import error_body
from relayd.http.websocket_login import deny, principal_of_socket
from relayd.talk.dialects import realtime_calls
from relayd.talk.dialects.access import or_refuse, talks_of
from relayd.talk.dialects.json_socket import JsonSocket
from relayd.talk.dialects.realtime_models import language_space
from relayd.talk.dialects.realtime_session import RealtimeSession

#: Its name in the metrics.
DIALECT = "realtime"
#: The subprotocol that is answered; a client need not offer any.
REALTIME = "realtime"
#: The beta, as a header or, from browsers, as a subprotocol.
_BETA_HEADER, _BETA_SUBPROTOCOL = "realtime=v1", "openai-beta.realtime-v1"


def routes() -> list[BaseRoute]:
    """Return the routes."""
    return [WebSocketRoute("/v1/realtime", realtime), *realtime_calls.routes()]


async def realtime(websocket: WebSocket) -> None:
    """Serve one client, to its end."""
    context, talks = context_of(websocket), talks_of(websocket)
    kept = "conversation" in websocket.query_params and talks.place.history != "none"
    try:
        principal = principal_of_socket(websocket)
        if principal.readonly:
            raise HttpError.of(reject_readonly())
        model = websocket.query_params.get("model", "")
        space = language_space(context, talks, principal, model)
        if kept:
            name, is_open = websocket.query_params["conversation"], talks.place.settings.sessions == "open"
            user = websocket.query_params.get("user", "")
            talk = or_refuse(await talks.open_named(principal, name, user, create=is_open))
        else:
            talk = or_refuse(talks.open_unkept(principal))
    except HttpError as refusal:
        await deny(websocket, refusal, error_body(refusal))
        return
    offered = websocket.scope["subprotocols"]
    beta = _BETA_SUBPROTOCOL in offered or _BETA_HEADER in websocket.headers.get("openai-beta", "")
    await websocket.accept(REALTIME if REALTIME in offered else None)
    try:
        with talks.place.stats.connected(DIALECT):
            async with trio.open_nursery() as nursery:
                socket = JsonSocket(websocket)
                session = RealtimeSession(socket, context, talks, principal, model or space, space, beta, talk, nursery)
                await session.serve()
                nursery.cancel_scope.cancel()
    finally:
        if not kept:
            talk.session.close("its client has left")
