"""`GET /v1/talk/ice`: the servers by which a browser reaches calls, as its `RTCPeerConnection` takes them."""

import base64
import hashlib
import hmac
import time
from typing import Any

import trio
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from protocol.wire.errors import ErrorCode
from relayd.config.schema import WebRtc
from relayd.http.authentication import principal_of
from relayd.http.context import context_of
from relayd.http.errors import HttpError


async def ice_servers(http: Request) -> Response:
    """Answer with the servers, and credentials for them that are valid for a while."""
    return JSONResponse({"iceServers": await servers_of(http)})


async def servers_of(http: Request) -> list[dict[str, Any]]:
    """Return the servers for whoever asks.

    Raises:
        HttpError: the secret of the TURN servers cannot be read.
    """
    principal, settings = principal_of(http), context_of(http).relay.config.webrtc
    try:
        secret = await trio.Path(settings.turn_secret_file).read_bytes() if settings.turn_urls else b""
    except OSError as fault:
        message = f"the secret of the TURN servers (webrtc.turn_secret_file) cannot be read: {fault.strerror}"
        raise HttpError(ErrorCode.INTERNAL, message) from None
    return servers(settings, secret.strip(), principal.name, int(time.time()))


def servers(settings: WebRtc, secret: bytes, user: str, now: int) -> list[dict[str, Any]]:
    """Return the servers.

    The credentials are those of "A REST API For Access To TURN Services" (draft-uberti-behave-turn-rest-00), which
    coturn checks with `use-auth-secret`: the HMAC-SHA1 of `expiry:user`.
    """
    found: list[dict[str, Any]] = []
    if settings.stun_urls:
        found.append({"urls": list(settings.stun_urls)})
    if settings.turn_urls:
        username = f"{now + settings.turn_s}:{user}"
        mac = hmac.digest(secret, username.encode(), hashlib.sha1)
        found.append(
            {"urls": list(settings.turn_urls), "username": username, "credential": base64.b64encode(mac).decode()}
        )
    return found
