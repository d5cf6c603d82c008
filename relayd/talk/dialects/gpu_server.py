"""The protocol of the GPU server: JSON messages, each with exactly one answer (docs/gpu-server-compat.md).

`/ws/{connection_id}` and `/ws/ws/{connection_id}` are the same. The connection `user_6` is that of a user, whose
messages name their sessions; any other connection is that of one session. Names, error texts and log lines are those of
the server that this one replaces.
"""

import json
import re

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import Rejected
from relayd.auth.tokens import Principal
from relayd.http.app import make_door_app
from relayd.http.context import HttpContext, context_of
from relayd.http.errors import HttpError
from relayd.http.websocket_login import deny, principal_of_socket
from relayd.talk.dialects.access import talks_of
from relayd.talk.dialects.gpu_server_connection import DIALECT, GpuServerConnection
from relayd.talk.dialects.json_socket import JsonSocket
from relayd.talk.talks import USER_RULE, Talks, is_user

SERVICE = "GPU Server WebSocket API"
_USER = re.compile(r"user_(.+)", re.DOTALL)


def routes() -> list[BaseRoute]:
    """Return the routes of both doors."""
    paths = ("/ws/{connection_id}", "/ws/ws/{connection_id}")
    return [WebSocketRoute(path, serve) for path in paths]


def make_app(context: HttpContext) -> Starlette:
    """Make the application of the door of its own."""
    hint = "; WebSocket clients connect to /ws/CONNECTION_ID or /ws/ws/CONNECTION_ID, and /health is the rest"
    return make_door_app(context, [*routes(), Route("/health", health)], hint)


async def health(http: Request) -> Response:
    """Answer as the GPU server; its connections are those of users."""
    connections = talks_of(http).place.stats.websockets.get(DIALECT, 0)
    health = {"status": "healthy", "service": SERVICE, "active_connections": connections}
    return Response(json.dumps(health), media_type="application/json")


async def serve(websocket: WebSocket) -> None:
    """Serve one connection; the token may be in its URL, which is never logged."""
    talks = talks_of(websocket)
    try:
        principal = principal_of_socket(websocket, websocket.query_params.get("token"))
        name = websocket.path_params["connection_id"]
        user, session = await _who(talks, principal, name)
    except HttpError as refusal:
        await deny(websocket, _forbidden(refusal))
        return
    socket, encoded = JsonSocket(websocket), context_of(websocket).encoded
    connection = GpuServerConnection(socket, talks, encoded, principal, name, user, session)
    connection.log_mode()
    await websocket.accept()
    await connection.run()


async def _who(talks: Talks, principal: Principal, name: str) -> tuple[str | None, str | None]:
    """Return the user of a connection, or its session.

    Raises:
        HttpError: there is no such session, or no such user can be.
    """
    if (user := _USER.fullmatch(name)) is not None:
        if not is_user(user[1]):
            raise HttpError(ErrorCode.FORBIDDEN, f"the id of a user {USER_RULE}")
        return user[1], None
    talk = await talks.open(principal, name, create=talks.place.settings.sessions == "open")
    if isinstance(talk, Rejected):
        raise HttpError.of(talk)
    return None, name


def _forbidden(refusal: HttpError) -> HttpError:
    """Return a refusal with the status that clients of the GPU server know: 403, except where they may come later."""
    if refusal.retryable:
        return refusal
    return HttpError(refusal.code, refusal.message, status=403, details=refusal.details)
