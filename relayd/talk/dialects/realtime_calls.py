"""OpenAI's Realtime API over WebRTC: `POST /v1/realtime/calls`. Events go over the data channel, speech as media."""

import json
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Any

import attrs
import structlog
import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from relayd.http.authentication import principal_of
from relayd.http.body_parser import json_object, open_uploads, read_all
from relayd.http.context import context_of
from relayd.http.errors import HttpError
from relayd.http.openai.json_body import invalid
from relayd.talk.call import Call
from relayd.talk.calls import MAX_OFFER_BYTES, SESSION, key_of
from relayd.talk.dialects.access import or_refuse, talks_of
from relayd.talk.dialects.realtime_events import EventError
from relayd.talk.dialects.realtime_models import language_space
from relayd.talk.dialects.realtime_session import RealtimeSession, settings_of
from relayd.talk.talks import Talk, Talks

log = structlog.get_logger("relayd.talk.calls")

#: Its name in the metrics.
DIALECT = "realtime_call"
SDP = "application/sdp"
#: Events of a client that wait for those before.
MAX_WAITING = 64


def routes() -> list[BaseRoute]:
    """Return the routes."""
    calls = "/v1/realtime/calls"
    return [Route(calls, call, methods=["POST"]), Route(f"{calls}/{{call}}/hangup", hang_up, methods=["POST"])]


@attrs.define(eq=False)
class DataChannel:
    """The events of one call."""

    call: Call
    _send: trio.MemorySendChannel[str]
    _receive: trio.MemoryReceiveChannel[str]

    @classmethod
    def of(cls, call: Call) -> "DataChannel":
        """Take over the data channel of a call."""
        channel = cls(call, *trio.open_memory_channel[str](MAX_WAITING))
        call.on_event = channel._on_event
        return channel

    def _on_event(self, text: str) -> None:
        try:
            self._send.send_nowait(text)
        except trio.WouldBlock:
            self.call.hang_up(f"more than {MAX_WAITING} events waited; send them more slowly")

    async def messages(self) -> AsyncIterator[str | bytes]:
        """Return what comes, until the call ends."""
        async for text in self._receive:
            yield text

    async def send(self, event: dict[str, Any]) -> None:
        """Send a JSON object; nobody gets it once the call has ended."""
        await self.call.send(json.dumps(event, ensure_ascii=False).encode(errors="replace").decode())

    async def wait_ended(self) -> None:
        """Wait for the end of the call, which ends `messages`."""
        await self.call.ended.wait()
        self._send.close()


async def call(http: Request) -> Response:
    """Answer an offer; the session lasts as long as the call."""
    principal, talks = principal_of(http), talks_of(http)
    offer, fields = await _read(http)
    model = fields.get("model") or http.query_params.get("model") or ""
    if not isinstance(model, str):
        raise invalid({"session.model": "must be a string"}, status=400)
    context = context_of(http)
    space = language_space(context, talks, principal, model)
    try:
        settings = settings_of(context, talks, fields)
    except EventError as fault:
        raise invalid({fault.param or "session": fault.message}, status=400) from None
    calls, key = talks.place.calls, key_of(SESSION, secrets.token_hex(16))
    begun = or_refuse(calls.open(principal, key, offer, listen=True))
    channel, talk = DataChannel.of(begun), or_refuse(talks.open_unkept(principal))

    def begin(nursery: trio.Nursery) -> RealtimeSession:
        named = model or space
        session = RealtimeSession(channel, context, talks, principal, named, space, False, talk, nursery, begun)
        session.settings = settings
        return session

    talks.place.nursery.start_soon(_serve, channel, talks, talk, begin, name="realtime call")
    answer = or_refuse(await begun.wait_answer())
    headers = {"Content-Type": SDP, "Location": f"/v1/realtime/calls/{begun.request_id}"}
    return Response(answer, 201, headers=headers)


async def _serve(
    channel: DataChannel, talks: Talks, talk: Talk, begin: Callable[[trio.Nursery], RealtimeSession]
) -> None:
    channel.call.hold(channel)
    try:
        with talks.place.stats.connected(DIALECT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(channel.wait_ended)
                await begin(nursery).serve()
                nursery.cancel_scope.cancel()
    except Exception:
        log.exception("internal error in a call", request_id=channel.call.request_id)
    finally:
        channel.call.hang_up("its session has ended")
        talk.session.close("its client has left")


async def hang_up(http: Request) -> Response:
    """End a call."""
    principal = principal_of(http)
    found = talks_of(http).place.calls.with_id(principal, http.path_params["call"])
    if found is None or found.ended.is_set():
        raise HttpError("not_found", "there is no such call, or it has ended", status=404)
    found.hang_up("the client hung up")
    return Response(status_code=200)


async def _read(http: Request) -> tuple[str, dict[str, Any]]:
    """Return the offer, and the fields of the session."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == SDP:
        return (await read_all(http, MAX_OFFER_BYTES)).decode(errors="replace"), {}
    with open_uploads(http) as uploads:
        body = await uploads.read(lambda _name, _kind: MAX_OFFER_BYTES)
        fields: dict[str, Any] = {name: upload.data.decode(errors="replace") for name, upload in body.uploads.items()}
        fields |= body.fields
    offer, session = fields.get("sdp"), fields.get("session", {})
    if not isinstance(offer, str) or not offer:
        raise invalid({"sdp": "is required: the SDP of the offer"}, status=400)
    if isinstance(session, str):
        session = json_object(session.encode())
    if not isinstance(session, dict):
        raise invalid({"session": "must be an object"}, status=400)
    return offer, session
