"""One response of a Realtime session: a reply, told as its events."""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import attrs
import trio

from protocol.audio.encoder import PCM, AudioExtraMissing
from protocol.wire.errors import ErrorCode
from protocol.wire.structs import AudioFormat
from relayd.http.audio.threaded_encoder import Transcoder, open_transcoder
from relayd.http.errors import STATUS
from relayd.talk.conversation import TurnState
from relayd.talk.dialects.realtime_events import (
    INVALID,
    SERVER,
    Json,
    audio_pieces,
    content_json,
    item_json,
    new_id,
    part_json,
    usage_json,
)
from relayd.talk.dialects.realtime_items import Item, Items
from relayd.talk.dialects.realtime_settings import AUDIO, Settings, output_json
from relayd.talk.events import Event, ReplyEnded, Speech, SpeechEnded, SpeechStarted, TextDelta, TextEnded, TurnFailed
from relayd.talk.playback import Playback
from relayd.talk.reply import Reply
from relayd.talk.talks import Talk

#: What the reasons for which a model ends are called.
_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}


async def first_of(*waits: Callable[[], Awaitable[object]]) -> None:
    """Wait for the first of several things."""
    async with trio.open_nursery() as nursery:

        async def wait(for_it: Callable[[], Awaitable[object]]) -> None:
            await for_it()
            nursery.cancel_scope.cancel()

        for each in waits:
            nursery.start_soon(wait, each)


class Send(Protocol):
    """Sends an event."""

    async def __call__(self, kind: str, /, **fields: Any) -> None:
        """Send one of this type, with these fields."""


@attrs.define(eq=False)
class Response:
    """Tells a client of one reply, as it is made.

    Args:
        talk: in which it is a reply.
        items: of the conversation; None if it is not a part of that.
        metadata: as the client has attached it.
        on_call: in which it is told how it is played on a call; None if its speech is sent as events.
    """

    send: Send
    talk: Talk
    reply: Reply
    settings: Settings
    items: Items | None
    metadata: dict[str, str] | None
    on_call: trio.Nursery | None = None
    response_id: str = attrs.field(factory=lambda: new_id("resp"))
    finished: trio.Event = attrs.field(factory=trio.Event)
    item: Item = attrs.field(init=False)
    _scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    _transcoder: Transcoder | None = None
    _text: str = ""
    _is_begun: bool = False
    _previous_id: str | None = None
    #: Why there is no speech, or not all of it.
    _unspoken: SpeechEnded | None = None
    _status: str = "completed"
    _details: Json | None = None
    _usage: Json = attrs.field(factory=dict)

    def __attrs_post_init__(self) -> None:
        spoken = self.settings.modality == AUDIO
        self.item = Item(new_id("item"), "assistant", self.reply.number, spoken, speed=self.settings.speed)

    async def run(self) -> None:
        """Tell of it, to its end."""
        try:
            await self.send("response.created", response=self._json("in_progress"))
            with self._scope:
                listener = self.reply.events()
                try:
                    async for event in listener:
                        await self._on_event(event)
                finally:
                    listener.close()
            if self._scope.cancelled_caught:
                await self.reply.wait_ended()
            await self._finish()
        finally:
            self.finished.set()

    def cancel(self, reason: str = "client_cancelled") -> None:
        """End it: the client has heard what was sent, unless it has said that it has heard less."""
        self._note("cancelled", reason=reason)
        self.abandon("cancelled by the client" if reason == "client_cancelled" else "the user has begun to speak")
        self._scope.cancel()

    def abandon(self, reason: str = "the client has left") -> None:
        """End the reply, which nobody will be told of."""
        if self.item.spoken and not self.item.truncated and self.on_call is None:
            self.talk.note_played(self.reply.number, self.item.samples)
        self.talk.cancel(self.reply, reason)

    async def wait_played(self) -> None:
        """Wait until it is played on the call, or cut off there."""
        if self.reply.playback is not None:
            await self.reply.playback.ended.wait()

    async def _report_playback(self, playback: Playback) -> None:
        """Tell when it is heard on the call, and when it is not any more."""
        await first_of(playback.started.wait, playback.ended.wait)
        if playback.started.is_set():
            await self.send("output_audio_buffer.started", response_id=self.response_id)
            await playback.ended.wait()
            await self.send("output_audio_buffer.stopped", response_id=self.response_id)

    # -- what comes

    async def _on_event(self, event: Event) -> None:
        match event:
            case TextDelta(text=text):
                await self._begin_item()
                self._text += text
                kind = "response.output_audio_transcript.delta" if self.item.spoken else "response.output_text.delta"
                await self.send(kind, **self._place, delta=text)
            case TextEnded(finish_reason=reason):
                self._usage = dict(event.usage)
                if reason in _INCOMPLETE:
                    self._note("incomplete", reason=_INCOMPLETE[reason])
            case SpeechStarted(format=made) if self.on_call is None:
                await self._begin_speech(made)
            case SpeechStarted() if self.on_call is not None and self.reply.playback is not None:
                self.on_call.start_soon(self._report_playback, self.reply.playback)
            case Speech(pcm=pcm) if self._transcoder is not None:
                await self._begin_item()
                await self._send_audio(await self._transcoder.feed(pcm))
            case SpeechEnded(code=code):
                if self._transcoder is not None:
                    await self._send_audio(await self._transcoder.finish())
                self._unspoken = event if code is not None and self.item.spoken else None
            case ReplyEnded(turn=turn) if turn.state == TurnState.INTERRUPTED:
                self._note("cancelled", reason="client_cancelled")
            case TurnFailed(code=code, message=message):
                self._fail(code, message)

    async def _begin_speech(self, made: AudioFormat) -> None:
        try:
            self._transcoder = await open_transcoder("pcm", made, self.settings.speed)
        except AudioExtraMissing as fault:
            self._fail("format_unavailable", str(fault))
        else:
            self.item.rate = made.sample_rate

    async def _send_audio(self, pcm: bytes) -> None:
        assert self._transcoder is not None
        encoder, item = self._transcoder.encoder, self.item
        item.samples = round(encoder.fed_s * encoder.source.sample_rate)
        item.sent_s += len(pcm) / PCM.sample_bytes / PCM.sample_rate
        for piece in audio_pieces(pcm):
            await self.send("response.output_audio.delta", **self._place, delta=piece)

    # -- what is told

    @property
    def _place(self) -> Json:
        return {"response_id": self.response_id, "item_id": self.item.item_id, "output_index": 0, "content_index": 0}

    async def _begin_item(self) -> None:
        if self._is_begun:
            return
        self._is_begun = True
        item = self._item_json("in_progress")
        await self.send("response.output_item.added", response_id=self.response_id, output_index=0, item=item)
        if self.items is not None:
            self._previous_id = self.items.last_id
            self.items.add(self.item)
            await self.send("conversation.item.added", previous_item_id=self._previous_id, item=item)
        part = part_json("", spoken=self.item.spoken)
        await self.send("response.content_part.added", **self._place, part=part)

    async def _finish(self) -> None:
        if self._unspoken is not None and self._status in ("completed", "incomplete"):
            why = f"the text is whole, but its speech is not: {self._unspoken.message}"
            self._fail(self._unspoken.code or ErrorCode.INTERNAL, why)
        if self._is_begun:
            text, place = self._text, self._place
            if self.item.spoken:
                await self.send("response.output_audio.done", **place)
                await self.send("response.output_audio_transcript.done", **place, transcript=text)
            else:
                await self.send("response.output_text.done", **place, text=text)
            await self.send("response.content_part.done", **place, part=part_json(text, spoken=self.item.spoken))
            item = self._item_json(self._item_status)
            if self.items is not None:
                await self.send("conversation.item.done", previous_item_id=self._previous_id, item=item)
            await self.send("response.output_item.done", response_id=self.response_id, output_index=0, item=item)
        self.finished.set()  # whoever hears of its end may ask for the next
        await self.send("response.done", response=self._json(self._status))

    @property
    def _item_status(self) -> str:
        return "completed" if self._status == "completed" else "incomplete"

    def _item_json(self, status: str) -> Json:
        content = content_json("assistant", self._text, spoken=self.item.spoken)
        return item_json(self.item.item_id, "assistant", status, content if status != "in_progress" else None)

    def _fail(self, code: str, message: str) -> None:
        kind = SERVER if STATUS.get(code, 500) >= 500 else INVALID
        self._note("failed", error={"type": kind, "code": code, "message": message})

    def _note(self, status: str, **details: Any) -> None:
        """Note how it ends; what comes first counts, but for the reason for which its text has ended."""
        if self._details is None or self._status == "incomplete":
            self._status, self._details = status, {"type": status, **details}

    def _json(self, status: str) -> Json:
        ended = status != "in_progress"
        fed_s = self._transcoder.encoder.fed_s if self._transcoder is not None else 0.0
        return {
            "object": "realtime.response",
            "id": self.response_id,
            "status": status,
            "status_details": self._details if ended else None,
            "output": [self._item_json(self._item_status)] if ended and self._is_begun else [],
            "conversation_id": None if self.items is None else self.talk.talk_id,
            "output_modalities": [self.settings.modality],
            "max_output_tokens": self.settings.max_output_tokens or "inf",
            "audio": {"output": output_json(self.settings)},
            "metadata": self.metadata,
            "usage": usage_json(self._usage, fed_s) if ended else None,
        }
