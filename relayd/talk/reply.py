"""A reply, as those see it who listen to it: any number of listeners, each at its own speed."""

from collections.abc import AsyncIterator, Callable

import attrs
import trio

from protocol.wire.frames import Audio, Frame, Output, Started
from protocol.wire.messages import Rejected
from protocol.wire.structs import AudioFormat
from relayd.requests.request import Request
from relayd.talk.events import (
    Event,
    Extra,
    ReplyEnded,
    Speech,
    SpeechEnded,
    SpeechMark,
    SpeechStarted,
    TextDelta,
    TextEnded,
    TurnFailed,
)
from relayd.talk.held_request import FrameQueue


@attrs.define(eq=False)
class Reply:
    """One reply, from the moment in which it waits for its turn.

    Args:
        number: of its turn.
        text_request: the id of the request that makes its text.
        speech_request: the id of the one that speaks it; None if it is not spoken.
        said_at: when it was asked for, in monotonic seconds.
    """

    number: int
    text_request: str
    speech_request: str | None
    said_at: float
    #: Numbers of what it is a reply to.
    said: tuple[int, ...] = ()
    on_heard: Callable[[int, int], None] = lambda _number, _samples: None
    #: The text so far.
    text: str = ""
    #: The request that speaks it, once there is one.
    speech: Request | None = None
    format: AudioFormat | None = None
    #: What is known of the end of its text; and the same, once its text is whole.
    finish: TextEnded = attrs.field(factory=TextEnded)
    text_ended: TextEnded | None = None
    speech_ended: SpeechEnded | None = None
    #: Whether what the user said, and that there will be a reply, is stored.
    is_stored: bool = False
    ended: ReplyEnded | TurnFailed | None = None
    _changed: trio.Event = attrs.field(factory=trio.Event)

    def wake(self) -> None:
        """Tell the listeners that something has changed."""
        self._changed.set()
        self._changed = trio.Event()

    def end(self, ended: ReplyEnded | TurnFailed) -> None:
        """Tell the listeners how it has ended."""
        self.is_stored = True
        if self.ended is None:
            self.ended = ended
        self.wake()

    def heard(self, samples: int) -> None:
        """Say how many samples of its speech were played; otherwise all that had come were."""
        self.on_heard(self.number, samples)

    async def stored(self) -> TurnFailed | None:
        """Wait until what the user said is stored; returns why it is not."""
        while not self.is_stored:
            await self._changed.wait()
        return self.ended if isinstance(self.ended, TurnFailed) else None

    async def wait_ended(self) -> ReplyEnded | TurnFailed:
        """Wait until it has ended, without listening to it."""
        while self.ended is None:
            await self._changed.wait()
        return self.ended

    async def events(self) -> AsyncIterator[Event]:
        """Listen to it from its beginning: text and speech as they come, then one `ReplyEnded` or `TurnFailed`.

        An interrupted reply ends at once: what had come of its speech and was not given out yet is left out.
        """
        queue = FrameQueue(self.wake)
        sent, told_text, told_speech, told_format = 0, False, False, None
        try:
            while True:
                changed = self._changed
                if self.is_stored:
                    if sent < len(self.text):
                        delta, sent = self.text[sent:], len(self.text)
                        yield TextDelta(delta)
                    if self.text_ended is not None and not told_text and sent == len(self.text):
                        told_text = True
                        yield self.text_ended
                    if self.speech is not None and queue.request is None:
                        queue.open(self.speech)
                    while not self._is_over and (frame := queue.take()) is not None:
                        if (event := _event_of(frame)) is not None and event != told_format:
                            told_format = event if isinstance(event, SpeechStarted) else told_format
                            yield event
                    has_all = self.speech is None or queue.is_read or self._is_over
                    if self.speech_ended is not None and not told_speech and has_all:
                        told_speech = True
                        yield self.speech_ended if queue.refusal is None else _unreadable(queue.refusal)
                    if self.ended is not None and sent == len(self.text) and has_all:
                        yield self.ended
                        return
                if changed is self._changed:
                    await changed.wait()
                else:
                    await trio.lowlevel.checkpoint()
        finally:
            queue.close()

    @property
    def _is_over(self) -> bool:
        """Whether it has ended, and not as it should."""
        return self.ended is not None and not (isinstance(self.ended, ReplyEnded) and self.ended.turn.state == "done")


def _unreadable(refusal: Rejected) -> SpeechEnded:
    return SpeechEnded(refusal.code, refusal.message, refusal.retryable)


def _event_of(frame: Frame) -> Event | None:
    """Return what a listener gets of a frame of the speech."""
    match frame:
        case Started(format=made) if made is not None:
            return SpeechStarted(made)
        case Audio(pcm=pcm):
            return Speech(pcm)
        case Output(mark=dict() as mark):
            return SpeechMark(mark.get("text_end", 0), mark.get("sample", 0))
        case Output(data=data):
            return Extra(data)
    return None
