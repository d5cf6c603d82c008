"""A reply, as those see it who listen to it: any number of listeners, each at its own speed."""

from collections.abc import Callable

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
from relayd.talk.playback import Playback


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
    on_played: Callable[[int, int], bool] = lambda _number, _samples: False
    #: The text so far.
    text: str = ""
    #: The request that speaks it, once there is one.
    speech: Request | None = None
    #: What plays it on a call, once something does.
    playback: Playback | None = None
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

    def note_played(self, samples: int) -> None:
        """Say how many samples of its speech were played; otherwise all that had come were."""
        self.on_played(self.number, samples)

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

    def events(self) -> "Listener":
        """Listen to it from its beginning: text and speech as they come, then one `ReplyEnded` or `TurnFailed`.

        An interrupted reply ends at once: what had come of its speech and was not given out yet is left out.
        """
        return Listener(self)

    @property
    def changed(self) -> trio.Event:
        """Set when there is something new."""
        return self._changed

    @property
    def is_over(self) -> bool:
        """Whether it has ended, and not as it should."""
        return self.ended is not None and not (isinstance(self.ended, ReplyEnded) and self.ended.turn.state == "done")


@attrs.define(eq=False)
class Listener:
    """One who listens to a reply: an iterator over its events, which reads its speech at its own speed."""

    _reply: Reply
    _queue: FrameQueue = attrs.field(init=False)
    #: Characters that were told.
    _sent: int = 0
    _format: SpeechStarted | None = None
    _told_text: bool = False
    _told_speech: bool = False
    _told_end: bool = False

    def __attrs_post_init__(self) -> None:
        self._queue = FrameQueue(self._reply.wake)

    def __aiter__(self) -> "Listener":
        return self

    async def __anext__(self) -> Event:
        await trio.lowlevel.checkpoint()
        while not self._told_end:
            changed = self._reply.changed
            if (event := self._next()) is not None:
                return event
            await changed.wait()
        self.close()
        raise StopAsyncIteration

    def close(self) -> None:
        """Listen no longer."""
        self._told_end = True
        self._queue.close()

    def __del__(self) -> None:
        self._queue.close()

    def _next(self) -> Event | None:
        """Return the next event; None if there is none now."""
        reply, queue = self._reply, self._queue
        if not reply.is_stored:
            return None
        if self._sent < len(reply.text):
            text, self._sent = reply.text[self._sent :], len(reply.text)
            return TextDelta(text)
        if reply.text_ended is not None and not self._told_text:
            self._told_text = True
            return reply.text_ended
        if reply.speech is not None and queue.request is None:
            queue.open(reply.speech)
        while not reply.is_over and (frame := queue.next_frame()) is not None:
            if (event := _event_of(frame)) is not None and event != self._format:
                self._format = event if isinstance(event, SpeechStarted) else self._format
                return event
        if not (reply.speech is None or queue.is_read or reply.is_over):
            return None
        if reply.speech_ended is not None and not self._told_speech:
            self._told_speech = True
            return reply.speech_ended if queue.refusal is None else _unreadable(queue.refusal)
        if reply.ended is not None:
            self.close()
        return reply.ended


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
