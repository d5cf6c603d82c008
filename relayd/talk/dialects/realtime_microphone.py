"""The microphone of a Realtime client, or of its call: what it says becomes items of the conversation."""

import base64
import binascii
from collections.abc import Awaitable, Callable
from contextlib import suppress

import attrs
import trio
from starlette.websockets import WebSocketDisconnect

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import Rejected
from protocol.wire.validators import text
from relayd.http.errors import STATUS
from relayd.talk.dialects.realtime_events import (
    INVALID,
    REQUIRED,
    SERVER,
    EventError,
    Json,
    error_json,
    item_json,
    new_id,
    read_field,
)
from relayd.talk.dialects.realtime_items import Item, Items, refusal_of
from relayd.talk.dialects.realtime_response import Send
from relayd.talk.ear import Heard, HearingFailed, Said, SpeechBegan, SpeechEnded
from relayd.talk.listening import Listening
from relayd.talk.microphone import Microphone, Stretch
from relayd.talk.talks import Talk

#: Least sound that is committed, as with OpenAI.
MIN_COMMIT_S = 0.1
TRANSCRIPTION = "conversation.item.input_audio_transcription"
_base64 = text(2**20)


@attrs.define(eq=False)
class _Utterance:
    """What is being said in a stretch, or was said and is not understood yet."""

    item: Item | None = None
    previous_id: str | None = None
    is_committed: bool = False


@attrs.define(eq=False)
class RealtimeMicrophone:
    """Tells one client what is heard of it.

    Args:
        send: sends an event.
        interrupt: ends the response that is being made.
        respond: has what was said answered.
    """

    send: Send
    talk: Talk
    items: Items
    interrupt: Callable[[], Awaitable[None]]
    respond: Callable[[], Awaitable[None]]
    heard: Microphone = attrs.field(init=False)
    _utterances: dict[Stretch, _Utterance] = attrs.field(factory=dict)
    #: Items that were committed and are not understood yet.
    _waiting: int = 0
    _settled: trio.Event = attrs.field(factory=trio.Event)

    @property
    def listening(self) -> Listening:
        """As the client has set it."""
        return self.heard.listening

    # -- events of the client

    async def append(self, event: Json) -> None:
        """Hear more."""
        if self.heard.call is not None:
            raise EventError("unsupported", "what is said is heard on the call; send no audio as events", "type")
        try:
            pcm = base64.b64decode(read_field(event, "audio", _base64, REQUIRED), validate=True)
        except (binascii.Error, ValueError):
            raise EventError("invalid_value", "audio must be base64", "audio") from None
        if len(pcm) % 2:
            raise EventError("invalid_value", "audio must be whole samples of 16 bit", "audio")
        if (refused := await self.heard.feed(pcm)) is not None:
            raise refusal_of(refused)

    async def commit(self, event: Json) -> None:
        """What was heard so far is what the user says."""
        stretch = self.heard.now
        fed_s = 0.0 if stretch is None else stretch.seconds
        if stretch is None or fed_s < MIN_COMMIT_S:
            message = f"the buffer has {fed_s * 1000:.0f} ms of audio; commit at least {MIN_COMMIT_S * 1000:.0f} ms"
            raise EventError("input_audio_buffer_commit_empty", message)
        if not stretch.ear.is_live:
            raise EventError("input_audio_buffer_commit_empty", "what was said is not heard any more; say it again")
        if not stretch.detects:
            utterance = self._utterances.setdefault(stretch, _Utterance())
            utterance.item = _new_item()
            await self._commit(utterance)
        await self.heard.finish()

    async def clear(self, event: Json) -> None:
        """Forget what was heard and not committed."""
        stretch = self.heard.now
        if stretch is not None and stretch in self._utterances and self._utterances[stretch].is_committed:
            await self.heard.finish()  # what it has said before is still to be understood
        else:
            self.heard.forget()
        await self.send("input_audio_buffer.cleared")

    async def settled(self) -> None:
        """Wait until what was said is understood, and a part of the conversation."""
        while self._waiting:
            await self._settled.wait()

    async def listen(self) -> None:
        """Hear the call."""

        async def refuse(refused: Rejected) -> None:
            await self.send("error", error=error_json(refusal_of(refused)))

        await self.heard.listen(refuse)

    # -- what is heard

    async def report(self, stretch: Stretch, heard: Heard | None) -> None:
        """Report what is heard in a stretch, and what has become of it at its end."""
        utterance = self._utterances.setdefault(stretch, _Utterance())
        with suppress(WebSocketDisconnect):  # whoever reads sees it, too
            if heard is not None:
                await self._on_heard(stretch, utterance, heard)
            elif utterance.is_committed:  # it has ended without a word about it
                await self._understood(stretch, utterance, "", 0.0)
        if heard is None:
            del self._utterances[stretch]

    async def _on_heard(self, stretch: Stretch, utterance: _Utterance, heard: Heard) -> None:
        match heard:
            case SpeechBegan(sample=sample) if not utterance.is_committed:
                utterance.item = _new_item()
                place = {"audio_start_ms": stretch.ms(sample), "item_id": utterance.item.item_id}
                await self.send("input_audio_buffer.speech_started", **place)
                detection = self.listening.turn_detection
                if detection is None or detection.interrupt_response:
                    await self.interrupt()
            case SpeechEnded(sample=sample) if utterance.item is not None and not utterance.is_committed:
                place = {"audio_end_ms": stretch.ms(sample), "item_id": utterance.item.item_id}
                await self.send("input_audio_buffer.speech_stopped", **place)
                await self._commit(utterance)
            case Said(text=text, samples=samples) if utterance.is_committed:
                await self._understood(stretch, utterance, text, samples / stretch.ear.rate)
            case HearingFailed(code=code, message=message):
                await self._failed(stretch, utterance, code, message)

    async def _commit(self, utterance: _Utterance) -> None:
        item = utterance.item
        assert item is not None
        previous = utterance.previous_id = self.items.last_id
        self.items.add(item)
        utterance.is_committed = True
        self._waiting += 1
        await self.send("input_audio_buffer.committed", previous_item_id=previous, item_id=item.item_id)
        item_event = item_json(item.item_id, "user", "completed", {"type": "input_audio", "transcript": None})
        await self.send("conversation.item.added", previous_item_id=previous, item=item_event)

    async def _understood(self, stretch: Stretch, utterance: _Utterance, said: str, seconds: float) -> None:
        """Make what was said a part of the conversation, and have it answered."""
        item = utterance.item
        if item is None:
            return
        try:
            added = await self.talk.add("user", said) if said else None
            if isinstance(added, Rejected):
                await self._not_understood(item, refusal_of(added))
                return
            if self.listening.transcription:
                await self._send_transcript(item, said, seconds)
            if added is None:
                await self._forget(item)
                return
            item.number = added.number
            item_event = self.items.json(item)
            await self.send("conversation.item.done", previous_item_id=utterance.previous_id, item=item_event)
        finally:
            self._settle(utterance)
        detection = self.listening.turn_detection
        if stretch.detects and (detection is None or detection.create_response):
            try:
                await self.respond()
            except EventError as fault:
                await self.send("error", error=error_json(fault))

    async def _send_transcript(self, item: Item, said: str, seconds: float) -> None:
        place = {"item_id": item.item_id, "content_index": 0}
        if said:
            await self.send(f"{TRANSCRIPTION}.delta", **place, delta=said)
        usage = {"type": "duration", "seconds": round(seconds, 3)}
        await self.send(f"{TRANSCRIPTION}.completed", **place, transcript=said, usage=usage)

    async def _failed(self, stretch: Stretch, utterance: _Utterance, code: str, message: str) -> None:
        kind = SERVER if STATUS.get(code, 500) >= 500 else INVALID
        fault = EventError(code, message, kind=kind)
        #: On a call something always comes, whether it will be committed or not.
        is_usual = code == ErrorCode.RUN_TIMEOUT and (stretch.detects or self.heard.call is not None)
        if utterance.is_committed and utterance.item is not None:
            try:
                await self._not_understood(utterance.item, fault)
            finally:
                self._settle(utterance)
        elif stretch.is_speech or not is_usual:
            await self.send("error", error=error_json(fault))
            self.heard.rest()

    async def _not_understood(self, item: Item, fault: EventError) -> None:
        error = {"type": fault.kind, "code": fault.code, "message": fault.message, "param": None}
        await self.send(f"{TRANSCRIPTION}.failed", item_id=item.item_id, content_index=0, error=error)
        await self._forget(item)

    async def _forget(self, item: Item) -> None:
        self.items.forget(item)
        await self.send("conversation.item.deleted", item_id=item.item_id)

    def _settle(self, utterance: _Utterance) -> None:
        utterance.item, utterance.is_committed = None, False
        self._waiting -= 1
        self._settled.set()
        self._settled = trio.Event()


def _new_item() -> Item:
    return Item(new_id("item"), "user", -1, spoken=True)
