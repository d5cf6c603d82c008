"""The microphone of a Realtime client: its samples are heard, and what it says becomes items of the conversation."""

import base64
import binascii
import math
import secrets
from collections.abc import Awaitable, Callable
from contextlib import suppress

import attrs
import trio
from starlette.websockets import WebSocketDisconnect

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import Rejected
from protocol.wire.validators import text
from relayd.auth.tokens import Principal
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
from relayd.talk.dialects.realtime_listening import PCM_HZ, Listening
from relayd.talk.dialects.realtime_response import Send
from relayd.talk.ear import Ear, Heard, HearingFailed, Said, SpeechBegan, SpeechEnded
from relayd.talk.place import Place
from relayd.talk.talks import Talk

MEDIA_TYPE = f"audio/L16;rate={PCM_HZ};channels=1"
BYTES_S = 2 * PCM_HZ
#: Least sound that is committed, as with OpenAI.
MIN_COMMIT_S = 0.1
#: A request hears as much, and the next goes on where nobody speaks; in mid-speech, at the latest after the second.
#: So it remains below a space's `run_timeout_s`, and its input below the relay's limit.
STRETCH_S, LONGEST_STRETCH_S = 60.0, 300.0
#: A microphone that sends nothing for so long gives back its slot; in mid-speech, what was said ends there.
MUTED_S, MUTED_SPEECH_S = 30.0, 3.0
#: After a failure, so long nothing is heard.
REST_S = 1.0
TRANSCRIPTION = "conversation.item.input_audio_transcription"
_base64 = text(2**20)


@attrs.define(eq=False)
class _Stretch:
    """A stretch of sound that one request hears.

    Args:
        base: samples that came before it.
        detects: whether it tells itself when somebody speaks.
        before: set when all that was heard before it was told.
    """

    ear: Ear
    base: int
    detects: bool
    before: trio.Event
    began_at: float
    fed_at: float
    is_done: trio.Event = attrs.field(factory=trio.Event)
    #: What is being said, or was said and is not understood yet.
    item: Item | None = None
    previous_id: str | None = None
    is_committed: bool = False
    is_speech: bool = False
    is_cleared: bool = False

    @property
    def muted_at(self) -> float:
        """When it ends by itself unless more sound comes."""
        if not self.detects or self.ear.is_ended:
            return math.inf
        return self.fed_at + (MUTED_SPEECH_S if self.is_speech else MUTED_S)


@attrs.define(eq=False)
class Microphone:
    """Hears one client.

    Args:
        send: sends an event.
        interrupt: ends the response that is being made.
        respond: has what was said answered.
        nursery: in which it listens.
        listening: as the client has set it.
    """

    send: Send
    place: Place
    principal: Principal
    talk: Talk
    items: Items
    interrupt: Callable[[], Awaitable[None]]
    respond: Callable[[], Awaitable[None]]
    nursery: trio.Nursery
    listening: Listening = attrs.field(factory=Listening)
    #: Samples that have come.
    _samples: int = 0
    _now: _Stretch | None = None
    _stretches: list[_Stretch] = attrs.field(factory=list)
    _rests_until: float = 0.0
    #: Items that were committed and are not understood yet.
    _waiting: int = 0
    _settled: trio.Event = attrs.field(factory=trio.Event)

    # -- events of the client

    async def append(self, event: Json) -> None:
        """Hear more."""
        try:
            pcm = base64.b64decode(read_field(event, "audio", _base64, REQUIRED), validate=True)
        except (binascii.Error, ValueError):
            raise EventError("invalid_value", "audio must be base64", "audio") from None
        if len(pcm) % 2:
            raise EventError("invalid_value", "audio must be whole samples of 16 bit", "audio")
        if trio.current_time() < self._rests_until or not pcm:
            return
        stretch = await self._stretch()
        self._samples += len(pcm) // 2
        stretch.fed_at = trio.current_time()
        await stretch.ear.feed(pcm)

    async def commit(self, event: Json) -> None:
        """What was heard so far is what the user says."""
        stretch, fed_s = self._now, 0.0 if self._now is None else self._now.ear.fed_bytes / BYTES_S
        if stretch is None or fed_s < MIN_COMMIT_S:
            message = f"the buffer has {fed_s * 1000:.0f} ms of audio; commit at least {MIN_COMMIT_S * 1000:.0f} ms"
            raise EventError("input_audio_buffer_commit_empty", message)
        if not stretch.ear.is_live:
            self._now = None
            raise EventError("input_audio_buffer_commit_empty", "what was said is not heard any more; say it again")
        if not stretch.detects:
            stretch.item = self._new_item()
            await self._commit(stretch)
        await self.finish()

    async def clear(self, event: Json) -> None:
        """Forget what was heard and not committed."""
        if (stretch := self._now) is not None and stretch.is_committed:
            await self.finish()  # what it has said before is still to be understood
        elif stretch is not None:
            self._now, stretch.is_cleared = None, True
            stretch.ear.close("the client has cleared its sound")
        await self.send("input_audio_buffer.cleared")

    async def change(self, listening: Listening) -> None:
        """Listen in another way from now on."""
        if listening != self.listening:
            await self.finish()
            self.listening = listening

    async def finish(self) -> None:
        """Hear no more in this stretch: the next sound begins another."""
        if (stretch := self._now) is not None:
            self._now = None
            await stretch.ear.end()

    async def settled(self) -> None:
        """Wait until what was said is understood, and a part of the conversation."""
        while self._waiting:
            await self._settled.wait()

    def close(self) -> None:
        """Hear no more at all."""
        for stretch in self._stretches:
            stretch.ear.close()

    # -- stretches

    async def _stretch(self) -> _Stretch:
        """Return the one that hears what comes now.

        Raises:
            EventError: it is refused.
        """
        stretch = self._now
        if stretch is not None and self._is_long(stretch):
            await self.finish()
        if self._now is None or not self._now.ear.is_live:
            self._now = self._begin()
        return self._now

    def _is_long(self, stretch: _Stretch) -> bool:
        age_s = max(stretch.ear.fed_bytes / BYTES_S, trio.current_time() - stretch.began_at)
        is_silent = stretch.ear.has_heard_all and not stretch.is_speech
        return stretch.detects and age_s >= (STRETCH_S if is_silent else LONGEST_STRETCH_S)

    def _begin(self) -> _Stretch:
        settings, relay = self.place.settings, self.place.relay
        if not settings.transcribe:  # since a reload
            raise EventError("unsupported", "nothing is heard here any more ([talk] transcribe in relayd.toml)")
        refused = self.place.refuse_too_fast(self.principal)
        space = relay.spaces.get(settings.transcribe)
        known = space.params.get("properties", {}) if space is not None else {}
        ear = Ear(
            self.place,
            self.principal,
            secrets.token_hex(16),
            settings.transcribe,
            self.listening.params(known),
            MEDIA_TYPE,
        )
        refused = refused or ear.open()
        if refused is not None:
            self._rests_until = trio.current_time() + REST_S
            raise refusal_of(refused)
        detects, now = self.listening.turn_detection is not None, trio.current_time()
        before = self._stretches[-1].is_done if self._stretches else trio.Event()
        if not self._stretches:
            before.set()
        stretch = _Stretch(ear, self._samples, detects, before, now, now)
        self._stretches.append(stretch)
        self.nursery.start_soon(self._listen, stretch)
        return stretch

    async def _listen(self, stretch: _Stretch) -> None:
        """Tell what is heard, once all that was heard before was told."""
        try:
            await stretch.before.wait()
            with suppress(WebSocketDisconnect):  # whoever reads sees it, too
                while (heard := await self._next(stretch)) is not None and not stretch.is_cleared:
                    await self._on_heard(stretch, heard)
                if stretch.is_committed:  # it has ended without a word about it
                    await self._understood(stretch, "", 0.0)
        finally:
            if stretch.is_committed:
                self._settle(stretch)
            stretch.ear.close()
            stretch.is_done.set()
            self._stretches.remove(stretch)

    # -- what is heard

    async def _next(self, stretch: _Stretch) -> Heard | None:
        """Return what is heard next, and end a stretch in which nothing comes any more."""
        while True:
            with trio.move_on_at(stretch.muted_at):
                return await stretch.ear.next()
            if stretch is self._now and trio.current_time() >= stretch.muted_at:
                await self.finish()

    async def _on_heard(self, stretch: _Stretch, heard: Heard) -> None:
        match heard:
            case SpeechBegan(sample=sample) if not stretch.is_committed:
                stretch.is_speech, stretch.item = True, self._new_item()
                ms = (stretch.base + sample) * 1000 // PCM_HZ
                item_id = stretch.item.item_id
                await self.send("input_audio_buffer.speech_started", audio_start_ms=ms, item_id=item_id)
                detection = self.listening.turn_detection
                if detection is None or detection.interrupt_response:
                    await self.interrupt()
            case SpeechEnded(sample=sample) if stretch.item is not None and not stretch.is_committed:
                stretch.is_speech, ms = False, (stretch.base + sample) * 1000 // PCM_HZ
                item_id = stretch.item.item_id
                await self.send("input_audio_buffer.speech_stopped", audio_end_ms=ms, item_id=item_id)
                await self._commit(stretch)
            case Said(text=text, samples=samples) if stretch.is_committed:
                await self._understood(stretch, text, samples / PCM_HZ)
            case HearingFailed(code=code, message=message):
                await self._failed(stretch, code, message)

    def _new_item(self) -> Item:
        return Item(new_id("item"), "user", -1, spoken=True)

    async def _commit(self, stretch: _Stretch) -> None:
        item = stretch.item
        assert item is not None
        previous = stretch.previous_id = self.items.last_id
        self.items.add(item)
        stretch.is_committed = True
        self._waiting += 1
        await self.send("input_audio_buffer.committed", previous_item_id=previous, item_id=item.item_id)
        item_event = item_json(item.item_id, "user", "completed", {"type": "input_audio", "transcript": None})
        await self.send("conversation.item.added", previous_item_id=previous, item=item_event)

    async def _understood(self, stretch: _Stretch, said: str, seconds: float) -> None:
        """Make what was said a part of the conversation, and have it answered."""
        item = stretch.item
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
            await self.send("conversation.item.done", previous_item_id=stretch.previous_id, item=item_event)
        finally:
            self._settle(stretch)
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

    async def _failed(self, stretch: _Stretch, code: str, message: str) -> None:
        kind = SERVER if STATUS.get(code, 500) >= 500 else INVALID
        fault = EventError(code, message, kind=kind)
        if stretch.is_committed and stretch.item is not None:
            try:
                await self._not_understood(stretch.item, fault)
            finally:
                self._settle(stretch)
        elif code != ErrorCode.RUN_TIMEOUT or stretch.is_speech or not stretch.detects:
            await self.send("error", error=error_json(fault))
            self._rests_until = trio.current_time() + REST_S

    async def _not_understood(self, item: Item, fault: EventError) -> None:
        error = {"type": fault.kind, "code": fault.code, "message": fault.message, "param": None}
        await self.send(f"{TRANSCRIPTION}.failed", item_id=item.item_id, content_index=0, error=error)
        await self._forget(item)

    async def _forget(self, item: Item) -> None:
        self.items.forget(item)
        await self.send("conversation.item.deleted", item_id=item.item_id)

    def _settle(self, stretch: _Stretch) -> None:
        stretch.item, stretch.is_committed = None, False
        self._waiting -= 1
        self._settled.set()
        self._settled = trio.Event()
