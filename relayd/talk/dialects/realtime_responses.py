"""The responses of one Realtime session: one at a time in its conversation, and some aside."""

from typing import TYPE_CHECKING

import attrs
from starlette.websockets import WebSocketDisconnect

from protocol.wire.messages import Rejected
from protocol.wire.validators import array_of, choice, mapping
from relayd.talk.conversation import played_content
from relayd.talk.dialects.realtime_events import EventError, Json, read_field
from relayd.talk.dialects.realtime_items import parse_message, refusal_of
from relayd.talk.dialects.realtime_models import speech_params
from relayd.talk.dialects.realtime_response import Response
from relayd.talk.dialects.realtime_settings import AUDIO, changed, metadata_of
from relayd.talk.talks import Talk

if TYPE_CHECKING:
    from relayd.talk.dialects.realtime_session import RealtimeSession

#: Responses that one session may have made at once, besides that of its conversation.
MAX_ASIDE = 8
#: Items that a response aside may be given.
MAX_GIVEN = 200


@attrs.define(eq=False)
class Responses:
    """Those that are being made; one at most is a part of the conversation."""

    session: "RealtimeSession"
    _all: list[Response] = attrs.field(factory=list)

    @property
    def _unfinished(self) -> list[Response]:
        return [response for response in self._all if not response.finished.is_set()]

    async def interrupt(self) -> None:
        """End the response that is being made or heard, because the user speaks."""
        talk, making = self.session.talk, [each for each in self._unfinished if each.items is not None]
        is_heard = talk.session.is_playing
        if is_heard:
            talk.interrupt("the user has begun to speak")
        for response in making:
            response.cancel("turn_detected")
        for response in making:
            await response.finished.wait()
        if is_heard:
            await self.session.send("output_audio_buffer.cleared")

    async def respond(self) -> None:
        """Answer what the user has said, after what is being made."""
        for response in self._unfinished:
            if response.items is not None:
                await response.finished.wait()
        await self.create({"type": "response.create"})

    async def cancel(self, wanted: str | None) -> None:
        """End the one with this id, or that of the conversation.

        Raises:
            EventError: there is none.
        """
        for response in self._unfinished:
            if response.response_id == wanted or (wanted is None and response.items is not None):
                response.cancel()
                await response.finished.wait()
                return
        raise EventError("response_cancel_not_active", "no such response is being made, so there is none to cancel")

    def abandon(self) -> None:
        """End all of them: the client has left."""
        for response in self._all:
            response.abandon()

    async def create(self, event: Json) -> None:
        """Have one made.

        Raises:
            EventError: it is refused.
        """
        session = self.session
        fields = read_field(event, "response", mapping, {})
        is_aside = read_field(fields, "conversation", choice("auto", "none"), "auto", "response.") == "none"
        given = read_field(fields, "input", array_of(mapping), None, "response.")
        if given is not None and len(given) > MAX_GIVEN:
            raise EventError("invalid_value", f"response.input may have {MAX_GIVEN} items", "response.input")
        settings = changed(session.settings, fields, "response.", has_speech=session.has_speech)
        metadata, params = metadata_of(fields), speech_params(session.context, session.talks, settings, "response.")
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
        if (refused := session.talks.place.refuse_too_fast(session.principal)) is not None:
            raise refusal_of(refused)
        talk = await self._open_aside(given) if is_aside else session.talk
        known = session.context.relay.spaces[session.space].params.get("properties", {})
        reply = talk.say(
            None,
            speak=settings.modality == AUDIO,
            params=settings.language_params(known),
            speech_params=params,
            instructions=settings.instructions,
            space=session.space,
            call=session.call,
        )
        if isinstance(reply, Rejected):
            raise refusal_of(reply)
        items, on_call = None if is_aside else session.items, session.nursery if session.call else None
        response = Response(session.send, talk, reply, settings, items, metadata, on_call=on_call)
        self._all.append(response)
        session.nursery.start_soon(self._follow, response)

    async def _open_aside(self, given: list[Json] | None) -> Talk:
        """Open a conversation for one response: with what is given, or else with all of this one."""
        session = self.session
        if given is None:
            said = [(turn.role, played_content(turn)) for turn in session.talk.turns if turn.ended]
        else:
            said = [self._said(item, f"response.input[{index}].") for index, item in enumerate(given)]
        talk = session.talks.open_unkept(session.principal)
        if isinstance(talk, Rejected):
            raise refusal_of(talk)
        for role, content in said:
            refused = await talk.add(role, content) if content else None
            if isinstance(refused, Rejected):
                raise refusal_of(refused)
        return talk

    def _said(self, item: Json, path: str) -> tuple[str, str]:
        if item.get("type") == "item_reference":
            items = self.session.items
            return items.message_of(items.find({"type": "item.reference", "item_id": item.get("id")}))
        message = parse_message(item, path)
        return message.role, message.text

    async def _follow(self, response: Response) -> None:
        try:
            await response.run()
        except WebSocketDisconnect:  # whoever reads sees it, too, but perhaps later
            response.abandon()
        finally:
            self._all.remove(response)
            if response.items is None:
                await response.wait_played()
                response.talk.session.close("its response has ended")
