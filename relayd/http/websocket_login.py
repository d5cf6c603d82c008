"""Authenticates WebSockets of the HTTP application, and denies their handshakes."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse
from starlette.websockets import WebSocket

from relayd.auth.tokens import Principal
from relayd.http.authentication import principal_by_token, principal_of
from relayd.http.context import exchange_of
from relayd.http.errors import HttpError
from relayd.http.json_encoding import error_json

#: Subprotocol with a token behind it, as OpenAI's clients send it from browsers, which can set no headers.
TOKEN_SUBPROTOCOL = "openai-insecure-api-key."


def principal_of_socket(websocket: WebSocket, token: str | None = None) -> Principal:
    """Authenticate the sender of `websocket`, before or after its handshake is accepted.

    The token is `token`, or that of the `Authorization` header, or that of a subprotocol. A connection to the unix
    socket needs none. If the token is revoked or expires, the WebSocket is closed with 1008.

    Args:
        websocket: the WebSocket.
        token: the token, where the dialect has another place for it.

    Raises:
        HttpError: as for `principal_of`. An endpoint that does not catch it denies the handshake.
    """
    exchange = exchange_of(websocket)
    if token is None and "authorization" not in websocket.headers:
        token = _offered_token(websocket)
    if token is None or exchange.principal is not None:
        return principal_of(websocket)
    return principal_by_token(websocket, token)


def _offered_token(websocket: WebSocket) -> str | None:
    offered: list[str] = websocket.scope["subprotocols"]
    tokens = (name.removeprefix(TOKEN_SUBPROTOCOL) for name in offered if name.startswith(TOKEN_SUBPROTOCOL))
    return next(tokens, None)


async def deny(websocket: WebSocket, refusal: HttpError, body: Mapping[str, Any] | None = None) -> None:
    """Answer a handshake with the status of `refusal` instead of accepting it.

    Args:
        websocket: a WebSocket that is not accepted yet.
        refusal: why it is denied.
        body: in the format of the dialect; None for that of the requests API.
    """
    content = {"error": error_json(refusal)} if body is None else body
    await websocket.send_denial_response(JSONResponse(content, refusal.status, headers=refusal.headers))
