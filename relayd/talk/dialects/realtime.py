"""OpenAI's Realtime API over a WebSocket: `GET /v1/realtime`. docs/realtime.md describes it."""

import trio
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.websockets import WebSocket

from protocol.wire.messages import Rejected
from relayd.auth.tokens import reject_readonly
from relayd.http.context import context_of
from relayd.http.errors import HttpError
from relayd.http.openai.errors import error_body
from relayd.http.websocket_login import deny, principal_of_socket
from relayd.talk.dialects.access import or_refuse, talks_of
from relayd.talk.dialects.realtime_models import language_space
from relayd.talk.dialects.realtime_session import RealtimeSession
from relayd.talk.talks import Talk

#: The subprotocol that is answered; a client need not offer any.
REALTIME = "realtime"
#: The beta, as a header or, from browsers, as a subprotocol.
_BETA_HEADER, _BETA_SUBPROTOCOL = "realtime=v1", "openai-beta.realtime-v1"


def routes() -> list[BaseRoute]:
    """Return the routes."""
    return [WebSocketRoute("/v1/realtime", realtime)]


async def realtime(websocket: WebSocket) -> None:
    """Serve one client, to its end."""
    context, talks, kept = context_of(websocket), talks_of(websocket), "conversation" in websocket.query_params
    try:
        principal = principal_of_socket(websocket)
        if principal.readonly:
            raise HttpError.of(reject_readonly())
        model = websocket.query_params.get("model", "")
        space = language_space(context, talks, principal, model)
        talk = await _open(websocket) if kept else or_refuse(talks.open_unkept(principal))
    except HttpError as refusal:
        await deny(websocket, refusal, error_body(refusal))
        return
    offered = websocket.scope["subprotocols"]
    beta = _BETA_SUBPROTOCOL in offered or _BETA_HEADER in websocket.headers.get("openai-beta", "")
    await websocket.accept(REALTIME if REALTIME in offered else None)
    try:
        async with trio.open_nursery() as nursery:
            session = RealtimeSession(websocket, context, talks, principal, model or space, space, beta, talk, nursery)
            await session.serve()
            nursery.cancel_scope.cancel()
    finally:
        if not kept:
            talk.session.close("its client has left")


async def _open(websocket: WebSocket) -> Talk:
    """Open the stored conversation that the client names by its id or its session, or begin it.

    Raises:
        HttpError: there is none, and none may be begun.
    """
    principal, talks = principal_of_socket(websocket), talks_of(websocket)
    name, user = websocket.query_params["conversation"], websocket.query_params.get("user", "")
    known = talks.find(principal, name, user)
    session, user = (known.session, known.user) if known is not None else (name, user)
    opened = await talks.open(principal, session, user, create=talks.place.settings.sessions == "open")
    assert isinstance(opened, Talk | Rejected)
    return or_refuse(opened)
