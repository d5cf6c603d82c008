"""`POST /v1/talks/{talk}/say`: says something, and answers with the whole reply or with events as it is made."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import trio
from starlette.requests import Request
from starlette.responses import JSONResponse

from protocol.audio.encoder import AudioExtraMissing
from protocol.wire.errors import ErrorCode
from protocol.wire.validators import Rule, boolean, mapping, optional, text
from relayd.http.audio.encoded_results import EncodedAudio
from relayd.http.authentication import principal_of
from relayd.http.body_parser import MAX_FIELDS_BYTES
from relayd.http.context import context_of, exchange_of
from relayd.http.errors import HttpError
from relayd.http.json_encoding import format_sse
from relayd.http.requests_api.event_stream import COMMENT_S, HEADERS
from relayd.http.streaming_response import ResponseWriter
from relayd.talk.dialects.access import failure_of, fields_of, open_named, or_refuse
from relayd.talk.dialects.talk_json import event_json, whole_json
from relayd.talk.dialects.whole import whole_reply
from relayd.talk.events import Event, TurnFailed
from relayd.talk.reply import Reply
from relayd.talk.talks import MAX_INSTRUCTIONS_CHARS, MAX_USER_CHARS

_SAY: dict[str, Rule] = {
    "text": text(MAX_FIELDS_BYTES),
    "user": text(MAX_USER_CHARS),
    "interrupt": boolean,
    "speak": boolean,
    "params": mapping,
    "speech_params": mapping,
    "instructions": optional(text(MAX_INSTRUCTIONS_CHARS)),
}


async def say(http: Request, reply: ResponseWriter) -> None:
    """Say something: answered with the whole reply, or with events as it is made.

    The reply goes on if the client leaves.
    """
    principal_of(http)
    fields = await fields_of(http, _SAY, "text")
    settings = context_of(http).relay.config.talk
    talk = await open_named(http, fields.get("user"), create=settings is not None and settings.sessions == "open")
    names = ("interrupt", "speak", "params", "speech_params", "instructions")
    made = or_refuse(talk.say(fields["text"], **{name: fields[name] for name in names if name in fields}))
    async with _listening(http, made):
        if "text/event-stream" in http.headers.get("accept", ""):
            await _send_events(made, reply)
        else:
            await _send_whole(http, made, reply, settings.audio_format if settings else "wav")


async def _send_whole(http: Request, made: Reply, reply: ResponseWriter, coding: str) -> None:
    await made.wait_ended()  # until then its speech is in its log, not here
    encoded, principal = context_of(http).encoded, principal_of(http).name
    try:
        async with encoded.encoding(principal):
            whole = await whole_reply(made, coding)
    except AudioExtraMissing as fault:
        raise HttpError("format_unavailable", str(fault), status=501) from None
    if isinstance(whole, TurnFailed):
        raise failure_of(whole)
    with encoded.sending(principal, EncodedAudio(whole.audio, "")):
        await reply.answer(JSONResponse(whole_json(whole)))


async def _send_events(made: Reply, reply: ResponseWriter) -> None:
    """Send events as they come; the first may be the refusal of the whole, with its status."""
    if (failed := await made.stored()) is not None:
        raise failure_of(failed)
    await reply.start("text/event-stream; charset=utf-8", headers=HEADERS)
    send, receive = trio.open_memory_channel[Event](0)

    async def listen() -> None:
        async with send:
            async for event in made.events():
                await send.send(event)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        while True:
            with trio.move_on_after(COMMENT_S) as silence:
                try:
                    kind, data = event_json(await receive.receive())
                except trio.EndOfChannel:
                    break
                await reply.write(format_sse(kind, data))
            if silence.cancelled_caught:
                await reply.write(b":\n\n")


@attrs.define(eq=False)
class _Listening:
    """What a response waits for: a reply, which goes on without it."""

    reply: Reply
    scope: trio.CancelScope

    @property
    def live(self) -> bool:
        """See `relayd.http.context.Waiting`."""
        return self.reply.ended is None

    def wake(self) -> None:
        """The relay is shutting down."""
        self.scope.cancel()


@asynccontextmanager
async def _listening(http: Request, made: Reply) -> AsyncIterator[None]:
    """Listen to a reply in the block, which ends when the relay shuts down.

    Raises:
        HttpError: it does.
    """
    exchange = exchange_of(http)
    with trio.CancelScope() as scope:
        exchange.waits_for = _Listening(made, scope)
        try:
            yield
        finally:
            exchange.waits_for = None
    if scope.cancelled_caught:
        message = "the relay is shutting down; the reply is among the turns when it is back"
        raise HttpError(ErrorCode.SHUTTING_DOWN, message, retry_after_s=5.0)
