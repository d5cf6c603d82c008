"""One Realtime session: a client's events, done in order, and the responses that it asks for."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, Protocol

import attrs
import trio
from starlette.websockets import WebSocketDisconnect

from protocol.wire.messages import Rejected
from protocol.wire.validators import array_of, choice, integer, mapping, text
from relayd.auth.tokens import Principal
from relayd.http.context import HttpContext
from relayd.talk.call import Call
from relayd.talk.conversation import played_content
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
from relayd.talk.dialects.realtime_items import Items, parse_message, refusal_of, settle
from relayd.talk.dialects.realtime_listening import changed_listening
from relayd.talk.dialects.realtime_microphone import Microphone
from relayd.talk.dialects.realtime_models import speech_params
from relayd.talk.dialects.realtime_response import Response
from relayd.talk.dialects.realtime_settings import AUDIO, TEXT, Settings, changed, metadata_of, session_json
from relayd.talk.talks import Talk, Talks

#: Responses that one session may have made at once, besides that of its conversation.
MAX_ASIDE = 8
#: Items that a response aside may be given.
MAX_GIVEN = 200
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
    #: None if nothing is heard.
    microphone: Microphone | None = None
    #: Those that are being made; one at most is a part of the conversation.
    _responses: list[Response] = attrs.field(factory=list)

    def __attrs_post_init__(self) -> None:
        self.items = Items(self.talk)
        self.settings = settings_of(self.context, self.talks, {})
        if self.talks.place.settings.transcribe and self.call is None:
            self.microphone = Microphone(
                self.send,
                self.talks.place,
                self.principal,
                self.talk,
                self.items,
                self._interrupt,
                self._respond,
                self.nursery,
            )

    async def serve(self) -> None:
        """Serve it until its client leaves, which interrupts its replies."""
        with suppress(WebSocketDisconnect):  # while something is sent
            await self._serve()
        for response in self._responses:
            response.abandon()
        if self.microphone is not None:
            self.microphone.close()

    async def _serve(self) -> None:
        await self.send("session.created", session=self._json())
        for previous, item in self.items.restore():
            await self.send("conversation.item.added", previous_item_id=previous, item=item)
            await self.send("conversation.item.done", previous_item_id=previous, item=item)
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
    def _has_speech(self) -> bool:
        return bool(self.talks.place.settings.speech)

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
        settings = changed(self.settings, fields, "session.", has_speech=self._has_speech)
        speech_params(self.context, self.talks, settings, "session.")
        if self.microphone is not None:
            listening = changed_listening(self.microphone.listening, fields, "session.")
            await self.microphone.change(listening)
        self.settings = settings
        await self.send("session.updated", session=self._json())

    async def _create_item(self, event: Json) -> None:
        message = parse_message(read_field(event, "item", mapping, REQUIRED))
        await self._settled()
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

    async def _cancel(self, event: Json) -> None:
        wanted = read_field(event, "response_id", _id)
        for response in self._unfinished:
            if response.response_id == wanted or (wanted is None and response.items is not None):
                response.cancel()
                await response.finished.wait()
                return
        raise EventError("response_cancel_not_active", "no such response is being made, so there is none to cancel")

    # -- responses

    @property
    def _unfinished(self) -> list[Response]:
        return [response for response in self._responses if not response.finished.is_set()]

    async def _settled(self) -> None:
        """Wait until what the user has said is a part of the conversation."""
        if self.microphone is not None:
            await self.microphone.settled()

    async def _interrupt(self) -> None:
        """End the response that is being made, because the user speaks."""
        for response in self._unfinished:
            if response.items is not None:
                response.cancel("turn_detected")
                await response.finished.wait()

    async def _respond(self) -> None:
        """Answer what the user has said, after what is being made."""
        for response in self._unfinished:
            if response.items is not None:
                await response.finished.wait()
        await self._create_response({"type": "response.create"})

    async def _ask_response(self, event: Json) -> None:
        await self._settled()
        await self._create_response(event)

    async def _create_response(self, event: Json) -> None:
        fields = read_field(event, "response", mapping, {})
        is_aside = read_field(fields, "conversation", choice("auto", "none"), "auto", "response.") == "none"
        given = read_field(fields, "input", array_of(mapping), None, "response.")
        if given is not None and len(given) > MAX_GIVEN:
            raise EventError("invalid_value", f"response.input may have {MAX_GIVEN} items", "response.input")
        settings = changed(self.settings, fields, "response.", has_speech=self._has_speech)
        metadata, params = metadata_of(fields), speech_params(self.context, self.talks, settings, "response.")
        unfinished = self._unfinished
        if is_aside and len(unfinished) > MAX_ASIDE:
            raise EventError("rate_limit_exceeded", f"{len(unfinished)} responses are being made; wait for one of them")
        if not is_aside and given is not None:
            message = "response.input is only read with response.conversation 'none'"
            raise EventError("unsupported", message, "response.input")
        for other in unfinished:
            if not is_aside and other.items is not None:
                message = f"response {other.response_id} is being made; wait for its response.done, or cancel it"
                raise EventError("conversation_already_has_active_response", message)
        if (refused := self.talks.place.refuse_too_fast(self.principal)) is not None:
            raise refusal_of(refused)
        talk = await self._open_aside(given) if is_aside else self.talk
        reply = talk.say(
            None,
            speak=settings.modality == AUDIO,
            params=settings.language_params(self.context.relay.spaces[self.space].params.get("properties", {})),
            speech_params=params,
            instructions=settings.instructions,
            space=self.space,
            call=self.call,
        )
        if isinstance(reply, Rejected):
            raise refusal_of(reply)
        items = None if is_aside else self.items
        response = Response(
            self.send, talk, reply, settings, items, metadata, on_call=self.nursery if self.call else None
        )
        self._responses.append(response)
        self.nursery.start_soon(self._follow, response)

    async def _open_aside(self, given: list[Json] | None) -> Talk:
        """Open a conversation for one response: with what is given, or else with all of this one."""
        if given is None:
            said = [(turn.role, played_content(turn)) for turn in self.talk.turns if turn.ended]
        else:
            said = [self._said(item, f"response.input[{index}].") for index, item in enumerate(given)]
        talk = self.talks.open_unkept(self.principal)
        if isinstance(talk, Rejected):
            raise refusal_of(talk)
        for role, content in said:
            refused = await talk.add(role, content) if content else None
            if isinstance(refused, Rejected):
                raise refusal_of(refused)
        return talk

    def _said(self, item: Json, path: str) -> tuple[str, str]:
        if item.get("type") == "item_reference":
            return self.items.message_of(self.items.find({"type": "item.reference", "item_id": item.get("id")}))
        message = parse_message(item, path)
        return message.role, message.text

    async def _follow(self, response: Response) -> None:
        try:
            await response.run()
        except WebSocketDisconnect:  # whoever reads sees it, too, but perhaps later
            response.abandon()
        finally:
            self._responses.remove(response)
            if response.items is None:
                await response.wait_played()
                response.talk.session.close("its response has ended")


_EVENTS: dict[str, Callable[[RealtimeSession, Json], Awaitable[None]]] = {
    "session.update": RealtimeSession._update,
    "conversation.item.create": RealtimeSession._create_item,
    "conversation.item.retrieve": RealtimeSession._retrieve_item,
    "conversation.item.truncate": RealtimeSession._truncate_item,
    "conversation.item.delete": RealtimeSession._delete_item,
    "input_audio_buffer.clear": RealtimeSession._clear_input,
    "output_audio_buffer.clear": RealtimeSession._clear_output,
    "response.create": RealtimeSession._ask_response,
    "response.cancel": RealtimeSession._cancel,
}
_HEARING: dict[str, Callable[[Microphone, Json], Awaitable[None]]] = {
    "input_audio_buffer.append": Microphone.append,
    "input_audio_buffer.commit": Microphone.commit,
}
