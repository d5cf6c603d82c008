"""Hears one stretch of sound: a request of the space that transcribes, fed with samples as they come.

What it has heard is told once, also if a worker was lost and another one hears all of it again.
"""

from typing import Any

import attrs
import trio

from protocol.wire.errors import ErrorCode
from protocol.wire.frames import Cancelled, Failed, Frame, Output, Started
from protocol.wire.messages import MAX_INPUT_CHUNK_BYTES, MAX_UNACKED_BYTES, Input, Rejected, Submit
from protocol.wire.structs import InputInfo
from protocol.wire.validators import Value
from relayd.auth.tokens import Principal
from relayd.requests.live_input import LiveInput
from relayd.scheduling.model import State
from relayd.talk.held_request import PRIORITY, FedRequest
from relayd.talk.place import Place

#: Between two looks whether a worker has come.
LOOK_S = 0.5
#: The live input of a space that transcribes.
AUDIO = "audio"


@attrs.frozen
class SpeechBegan:
    """Somebody began to speak, with this sample."""

    sample: int


@attrs.frozen
class SpeechEnded:
    """Who spoke has fallen silent; known at this sample."""

    sample: int


@attrs.frozen
class Said:
    """What was said; "" if that is nothing. It took so many samples."""

    text: str
    samples: int


@attrs.frozen
class HearingFailed:
    """Nothing more is heard."""

    code: str
    message: str
    retryable: bool = False


Heard = SpeechBegan | SpeechEnded | Said | HearingFailed


@attrs.define(eq=False)
class Ear:
    """One request of the space that transcribes.

    Args:
        principal: whose request it is.
        request_id: of the request.
        space: that transcribes.
        params: of the request.
        rate: samples a second of what it is fed.
    """

    place: Place
    principal: Principal
    request_id: str
    space: str
    params: dict[str, Value]
    rate: int
    is_ended: bool = False
    _fed_bytes: int = 0
    _held: FedRequest = attrs.field(init=False)
    _fed: LiveInput = attrs.field(init=False)
    #: The place of the last thing that was told, the end of what was said last, and the text behind it so far.
    _last_voice: tuple[int, int] = (-1, 0)
    _said_until: int = -1
    _text: str = ""
    _failed: bool = False
    #: Since when nobody is there to begin with it.
    _unserved_since: float | None = None
    _changed: trio.Event = attrs.field(factory=trio.Event)

    def __attrs_post_init__(self) -> None:
        self._held = FedRequest(self._wake, principal=self.principal)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    @property
    def is_live(self) -> bool:
        """Whether it still takes sound."""
        request = self._held.request
        return request is not None and request.live and self._held.refusal is None and not self.is_ended

    @property
    def has_heard_all(self) -> bool:
        """Whether the engine has heard all that was fed, and what it has told of that was told."""
        return self._fed.taken >= self.fed_bytes and not self._held.has_more

    @property
    def fed_bytes(self) -> int:
        """Bytes that were fed."""
        return self._fed_bytes

    @property
    def fed_at(self) -> float:
        """When something was fed last."""
        return self._fed.received_at

    def open(self) -> Rejected | None:
        """Submit the request; returns why it is refused."""
        return self._submit(InputInfo(media_type=self._media_type, live=True))

    @property
    def _media_type(self) -> str:
        return f"audio/L16;rate={self.rate};channels=1"

    def _submit(self, audio: InputInfo, group: str | None = None) -> Rejected | None:
        submit = Submit(
            request_id=self.request_id,
            space=self.space,
            params=self.params,
            inputs={AUDIO: audio},
            priority=PRIORITY,
            retry="always",
            group=group,
        )
        admitted = self.place.admission.submit(submit, self.principal, self._held)
        if isinstance(admitted, Rejected):
            return admitted
        self._fed = admitted.fed[AUDIO]
        self._held.hold(admitted)
        return None

    async def feed(self, data: bytes) -> None:
        """Feed sound; waits while too much of it is not stored. What comes after the request's end is dropped."""
        for start in range(0, len(data), MAX_INPUT_CHUNK_BYTES):
            await self._add(data[start : start + MAX_INPUT_CHUNK_BYTES])

    async def end(self) -> None:
        """Say that no more sound comes."""
        if not self.is_ended:
            await self._add(b"", last=True)
            self.is_ended = True

    async def _add(self, data: bytes, *, last: bool = False) -> None:
        request = self._held.request
        assert request is not None
        piece = Input(
            request_id=self.request_id, name=AUDIO, offset=self._fed_bytes, data=data, last=True if last else None
        )
        fed = self._fed
        while self.is_live and self._fed_bytes + len(data) - fed.size > MAX_UNACKED_BYTES:
            await self._changed.wait()
        if self.is_live:
            self._fed_bytes += len(data)
            self.place.admission.add_input(request, piece, self._held)
        while self.is_live and self._held in fed.held_back:
            await self._changed.wait()
            self.place.admission.add_input(request, piece, self._held)

    async def next(self) -> Heard | None:
        """Return what is heard next; None when everything was."""
        patience_s = self.place.relay.config.http.no_worker_wait_s
        while not self._failed:
            if (refused := self._held.refusal) is not None:
                self._failed = True
                return HearingFailed(refused.code, refused.message, refused.retryable)
            while (frame := self._held.next_frame()) is not None:
                if (heard := self._on_frame(frame)) is not None:
                    return heard
            if self._held.is_read:
                return None
            now = trio.current_time()
            if self._is_unserved:
                self._unserved_since = now if self._unserved_since is None else self._unserved_since
                if now >= self._unserved_since + patience_s:
                    self._failed = True
                    message = f"no worker of space {self.space!r} is connected, so nobody hears you; try again later"
                    self.close(message)
                    return HearingFailed(ErrorCode.NO_WORKER, message, retryable=True)
            else:
                self._unserved_since = None
            with trio.move_on_after(LOOK_S):
                await self._changed.wait()
        return None

    @property
    def _is_unserved(self) -> bool:
        """Whether nobody is there to begin with it."""
        relay, request = self.place.relay, self._held.request
        if self._held.has_begun or request is None or request.entry.state is not State.QUEUED:
            return False
        return not relay.workers.serving(self.space) and not relay.scheduler.state.spaces[self.space].paused

    def _on_frame(self, frame: Frame) -> Heard | None:
        match frame:
            case Started():
                self._text = ""  # of an attempt that was lost
            case Failed(code=code, message=message, retryable=retryable):
                self._failed = True
                return HearingFailed(code, message, retryable)
            case Cancelled(reason=reason):
                self._failed = True
                return HearingFailed("cancelled", reason or "it was cancelled")
            case Output(data=str() as text):
                self._text += text
            case Output(data=dict() as data):
                return self._on_object(data)
        return None

    def _on_object(self, data: dict[str, Any]) -> Heard | None:
        match data:
            case {"speech_started": {"sample": int(sample)}} if (sample, 1) > self._last_voice:
                self._last_voice = sample, 1
                return SpeechBegan(sample)
            case {"speech_stopped": {"sample": int(sample)}} if (sample, 0) > self._last_voice:
                self._last_voice = sample, 0
                return SpeechEnded(sample)
            case {"utterance": {"start": int(start), "end": int(end)}}:
                text, self._text = self._text.strip(), ""
                if end > self._said_until:
                    self._said_until = end
                    return Said(text, end - start)
        return None

    def close(self, reason: str = "the client has left") -> None:
        """Hear no more; what it has not heard is lost."""
        request = self._held.request
        if request is not None and request.live:
            self.place.relay.cancel(request, reason)
        self._held.release(trio.current_time())
        self._wake()
