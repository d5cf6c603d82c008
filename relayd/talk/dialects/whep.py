"""Calls of a conversation by WHEP: a browser or a player sends its offer, and hears and sees the replies.

WHEP is draft-ietf-wish-whep; its candidates, and the end of a session, are those of WHIP (RFC 9725).
"""

import re
from typing import Any

from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import Response

from protocol.wire.errors import ErrorCode
from relayd.http.authentication import principal_of
from relayd.http.body_parser import read_all
from relayd.http.errors import HttpError
from relayd.talk.call import Call
from relayd.talk.calls import MAX_OFFER_BYTES
from relayd.talk.dialects.access import open_named, or_refuse, talks_of
from relayd.talk.dialects.ice import servers_of

SDP, FRAGMENT = "application/sdp", "application/trickle-ice-sdpfrag"
#: Candidates of one fragment that are passed on.
MAX_CANDIDATES = 100
_UFRAG = re.compile(r"^a=ice-ufrag:(\S+)", re.MULTILINE)
_LINE = re.compile(r"[a-z]=.+")


async def call_by_whep(http: Request) -> Response:
    """Begin a call with an offer, which takes the place of the conversation's call before; or say what is taken."""
    if http.method == "OPTIONS":
        return Response(headers={"Allow": "OPTIONS, POST", "Accept-Post": SDP})
    principal = principal_of(http)
    offer = await _sdp_of(http, SDP)
    links = ", ".join(_links(await servers_of(http)))
    talk, talks = await open_named(http), talks_of(http)
    calls = talks.place.calls
    call = or_refuse(calls.open(principal, talk.session.call_key, offer, listen=True))
    call.hold(calls)  # its player says nothing over HTTP for as long as the call lasts
    headers = {"Content-Type": SDP} | ({"Link": links} if links else {})
    answer = or_refuse(await call.wait_answer())
    talks.listen(talk, call)
    headers |= {"Location": f"/v1/talks/{talk.talk_id}/whep/{call.request_id}", "ETag": _etag(call)}
    return Response(answer, 201, headers=headers)


class OneCall(HTTPEndpoint):
    """One call, at the address that its answer has told."""

    async def patch(self, http: Request) -> Response:
        """Take candidates of the player (trickle ICE); an ICE restart is refused: begin another call instead."""
        call = _call_of(http)
        fragment = await _sdp_of(http, FRAGMENT)
        if (match := http.headers.get("if-match")) is None:
            message = "send If-Match with the ETag of the answer: it says to which session of ICE candidates belong"
            raise HttpError("precondition_required", message, status=428)
        if not {_etag(call), "*"} & {each.strip() for each in match.split(",")}:
            raise HttpError("conflict", "If-Match names another session of ICE; begin another call", status=412)
        if bad := next((line for line in fragment.splitlines() if line.strip() and not _LINE.match(line)), None):
            message = f"this is no SDP fragment: {bad[:40]!r}; send candidates as RFC 8840 has them"
            raise HttpError(ErrorCode.INVALID_PARAMS, message)
        known = set(_UFRAG.findall(call.offer))
        if set(_UFRAG.findall(fragment)) - known:
            message = "ICE cannot be restarted in a call: hang it up, and begin another one"
            raise HttpError(ErrorCode.INVALID_PARAMS, message)
        for candidate in candidates_of(fragment)[:MAX_CANDIDATES]:
            call.command(candidate=candidate)
        return Response(status_code=204)  # without an ETag, as the draft wants where ICE goes on as it was

    async def options(self, http: Request) -> Response:
        """Say what is taken here."""
        return Response(headers={"Allow": "DELETE, OPTIONS, PATCH", "Accept-Patch": FRAGMENT})

    async def delete(self, http: Request) -> Response:
        """Hang up."""
        _call_of(http).hang_up("the client hung up")
        return Response(status_code=200)


def candidates_of(fragment: str) -> list[dict[str, Any]]:
    """Return the candidates of an SDP fragment (RFC 8840), each as a browser's `RTCIceCandidateInit`."""
    found: list[dict[str, Any]] = []
    line, mid = -1, None
    for text in fragment.splitlines():
        if text.startswith("m="):
            line, mid = line + 1, None
        elif text.startswith("a=mid:"):
            mid = text[6:].strip()
        elif text.startswith("a=candidate:"):
            found.append({"candidate": text[2:].strip(), "sdpMid": mid, "sdpMLineIndex": max(0, line)})
    return found


def _call_of(http: Request) -> Call:
    principal = principal_of(http)
    call = talks_of(http).place.calls.with_id(principal, http.path_params["call"])
    if call is None or call.ended.is_set():
        raise HttpError("not_found", "there is no such call, or it has ended; begin another one", status=404)
    return call


async def _sdp_of(http: Request, media_type: str) -> str:
    given = http.headers.get("content-type", "").split(";")[0].strip().lower()
    if given != media_type:
        raise HttpError("unsupported_media_type", f"send {media_type}, not {given or 'nothing'}", status=415)
    return (await read_all(http, MAX_OFFER_BYTES)).decode(errors="replace")


def _etag(call: Call) -> str:
    return f'"{call.request_id}"'


def _links(servers: list[dict[str, Any]]) -> list[str]:
    """Return the values of `Link` that name ICE servers (RFC 9725, section 4.6)."""
    return [
        f'<{url}>; rel="ice-server"'
        + (f'; username="{server["username"]}"; credential="{server["credential"]}"' if "credential" in server else "")
        + ('; credential-type="password"' if "credential" in server else "")
        for server in servers
        for url in server["urls"]
    ]
