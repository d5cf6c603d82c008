"""One Realtime session: a client's events, done in order, and the responses that it asks for."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, Protocol

import attrs
import trio
from starlette.websockets import WebSocketDisconnect

from protocol.wire.validators import integer, mapping, text
from relayd.auth.tokens import Principal
from relayd.http.context import HttpContext
from relayd.talk.call import Call
from relayd.talk.dialects.realtime_events import (
    REQUIRED,
    EventError,
    Json,
    error_json,
    new_id,
    parse_event,
    read_field,
    to_beta,
)
from relayd.talk.dialects.realtime_items import Items, parse_message, settle
from relayd.talk.dialects.realtime_listening import changed_listening
from relayd.talk.dialects.realtime_microphone import RealtimeMicrophone
from relayd.talk.dialects.realtime_models import speech_params
from relayd.talk.dialects.realtime_responses import Responses
from relayd.talk.dialects.realtime_settings import AUDIO, TEXT, Settings, changed, session_json
from relayd.talk.microphone import Microphone
from relayd.talk.talks import Talk, Talks

_id = text(2**20)


class Carrier(Protocol):
    """Brings events: a WebSocket, or the data channel of a call."""

    def messages(self) -> AsyncIterator[str | bytes]:
        """Return what comes, until its end."""

    async def send(self, event: Json) -> None:
        """Send an event."""


def settings_of(context: HttpContext, talks: Talks, fields: Json) -> Settings:
    """Return the settings with which a session begins.

    Args:
        context: of the relay.
        talks: whose settings name the space that speaks.
        fields: of `session`, as the client has sent them.

    Raises:
        EventError: a setting is not valid.
    """
    has_speech = bool(talks.place.settings.speech)
    settings = changed(Settings(modality=AUDIO if has_speech else TEXT), fields, "session.", has_speech=has_speech)
    if fields:
        speech_params(context, talks, settings, "session.")
    return settings


@attrs.define(eq=False)
class RealtimeSession:
    """Serves one client.

    Args:
        model: as the client has named it; `space` is what it stands for.
        beta: whether events have the names of the beta.
        talk: the conversation.
        nursery: in which responses run.
        call: on which responses are heard; None where they are sent as events.
    """

    carrier: Carrier
    context: HttpContext
    talks: Talks
    principal: Principal
    model: str
    space: str
    beta: bool
    talk: Talk
    nursery: trio.Nursery
    call: Call | None = None
    session_id: str = attrs.field(factory=lambda: new_id("sess"))
    items: Items = attrs.field(init=False)
    settings: Settings = attrs.field(init=False)
    responses: Responses = attrs.field(init=False)
    #: None if nothing is heard.
    microphone: RealtimeMicrophone | None = None

    def __attrs_post_init__(self) -> None:
        place, made = self.talks.place, Responses(self)
        self.items, self.responses = Items(self.talk), made
        self.settings = settings_of(self.context, self.talks, {})
        if place.settings.transcribe if self.call is None else self.call.listens:
            microphone = RealtimeMicrophone(self.send, self.talk, self.items, made.interrupt, made.respond)
            microphone.heard = Microphone(place, self.principal, self.nursery, microphone.report, self.call)
            self.microphone = microphone

    async def serve(self) -> None:
        """Serve it until its client leaves, which interrupts its replies."""
        with suppress(WebSocketDisconnect):  # while something is sent
            await self._serve()
        self.responses.abandon()
        if self.microphone is not None:
            self.microphone.heard.close()

    async def _serve(self) -> None:
        await self.send("session.created", session=self._json())
        for previous, item in self.items.restore():
            await self.send("conversation.item.added", previous_item_id=previous, item=item)
            await self.send("conversation.item.done", previous_item_id=previous, item=item)
        if self.microphone is not None and self.call is not None:
            self.nursery.start_soon(self.microphone.listen)
        async for message in self.carrier.messages():
            event: Json = {}
            try:
                event = parse_event(message)
                await self._do(event)
            except EventError as fault:
                await self.send("error", error=error_json(fault, event.get("event_id")))

    async def send(self, kind: str, /, **fields: Any) -> None:
        """Send an event."""
        event: Json = {"type": kind, "event_id": new_id("event"), **fields}
        message = to_beta(event) if self.beta else event
        if message is not None:
            await self.carrier.send(message)

    @property
    def has_speech(self) -> bool:
        """Whether there is a space that speaks."""
        return bool(self.talks.place.settings.speech)

    async def settled(self) -> None:
        """Wait until what the user has said is a part of the conversation."""
        if self.microphone is not None:
            await self.microphone.settled()

    def _json(self) -> Json:
        instructions = self.settings.instructions
        if instructions is None:
            instructions = self.talk.record.instructions or self.talks.place.settings.instructions
        listening = None if self.microphone is None else self.microphone.listening
        ears = self.talks.place.settings.transcribe
        return session_json(self.session_id, self.model, self.settings, instructions, listening, ears)

    # -- events of the client

    async def _do(self, event: Json) -> None:
        kind = read_field(event, "type", _id, REQUIRED)
        if kind in _EVENTS:
            await _EVENTS[kind](self, event)
        elif kind in _HEARING and self.microphone is not None:
            await _HEARING[kind](self.microphone, event)
        elif kind.startswith("input_audio_buffer."):
            message = (
                f"{kind}: nothing is heard here ([talk] transcribe in relayd.toml); send what is said as text "
                "(conversation.item.create)"
            )
            raise EventError("unsupported", message, "type")
        else:
            known = ", ".join((*_EVENTS, *_HEARING))
            raise EventError("unknown_event", f"{kind[:64]!r} is not an event; known are {known}", "type")

    async def _clear_output(self, event: Json) -> None:
        """Silence the call."""
        if self.call is None:
            raise EventError("unsupported", "there is no call; truncate the item instead", "type")
        await self.talk.interrupt_for_good("the client cleared what was to be heard")
        await self.send("output_audio_buffer.cleared")

    async def _clear_input(self, event: Json) -> None:
        if self.microphone is not None:
            await self.microphone.clear(event)
        else:
            await self.send("input_audio_buffer.cleared")  # clients that interrupt clear it, even if it is empty

    async def _update(self, event: Json) -> None:
        fields = read_field(event, "session", mapping, REQUIRED)
        if fields.get("model", self.model) not in (self.model, self.space):
            raise EventError("unsupported", "the model of a session stays; connect again for another", "session.model")
        settings = changed(self.settings, fields, "session.", has_speech=self.has_speech)
        speech_params(self.context, self.talks, settings, "session.")
        if self.microphone is not None:
            listening = changed_listening(self.microphone.listening, fields, "session.")
            await self.microphone.heard.change(listening)
        self.settings = settings
        await self.send("session.updated", session=self._json())

    async def _create_item(self, event: Json) -> None:
        message = parse_message(read_field(event, "item", mapping, REQUIRED))
        await self.settled()
        previous = self.items.last_id
        item = self.items.json(await self.items.create(message, read_field(event, "previous_item_id", _id)))
        await self.send("conversation.item.added", previous_item_id=previous, item=item)
        await self.send("conversation.item.done", previous_item_id=previous, item=item)

    async def _delete_item(self, event: Json) -> None:
        item = self.items.find(event)
        self.items.delete(item)
        await settle(self.talks)
        await self.send("conversation.item.deleted", item_id=item.item_id)

    async def _retrieve_item(self, event: Json) -> None:
        await self.send("conversation.item.retrieved", item=self.items.json(self.items.find(event)))

    async def _truncate_item(self, event: Json) -> None:
        item = self.items.find(event)
        read_field(event, "content_index", integer(0, 0), 0)
        end_ms = read_field(event, "audio_end_ms", integer(0), REQUIRED)
        if not item.rate:
            message = "this item has no audio of this session; only what was spoken in it can be truncated"
            raise EventError("invalid_value", message, "item_id")
        sent_ms = int(item.sent_s * 1000)
        if end_ms > sent_ms:
            message = f"the audio of this item, {sent_ms} ms, is shorter than {end_ms} ms"
            raise EventError("invalid_value", message, "audio_end_ms")
        item.truncated = True
        if self.talk.note_played(item.number, item.samples_until(end_ms)):
            await settle(self.talks)
        await self.send("conversation.item.truncated", item_id=item.item_id, content_index=0, audio_end_ms=end_ms)

    async def _ask_response(self, event: Json) -> None:
        await self.settled()
        await self.responses.create(event)

    async def _cancel_response(self, event: Json) -> None:
        await self.responses.cancel(read_field(event, "response_id", _id))


_EVENTS: dict[str, Callable[[RealtimeSession, Json], Awaitable[None]]] = {
    "session.update": RealtimeSession._update,
    "conversation.item.create": RealtimeSession._create_item,
    "conversation.item.retrieve": RealtimeSession._retrieve_item,
    "conversation.item.truncate": RealtimeSession._truncate_item,
    "conversation.item.delete": RealtimeSession._delete_item,
    "input_audio_buffer.clear": RealtimeSession._clear_input,
    "output_audio_buffer.clear": RealtimeSession._clear_output,
    "response.create": RealtimeSession._ask_response,
    "response.cancel": RealtimeSession._cancel_response,
}
_HEARING: dict[str, Callable[[RealtimeMicrophone, Json], Awaitable[None]]] = {
    "input_audio_buffer.append": RealtimeMicrophone.append,
    "input_audio_buffer.commit": RealtimeMicrophone.commit,
}
