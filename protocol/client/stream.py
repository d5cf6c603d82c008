"""One request as its client sees it: what the relay sends about it, put in order and each frame once."""

from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Self

import attrs
import trio

from protocol.client.inputs import Upload
from protocol.link.base import Link
from protocol.wire.codec import encode
from protocol.wire.errors import (
    ErrorCode,
    LinkError,
    LoginRefused,
    ProtocolError,
    RequestCancelled,
    RequestFailed,
    RequestRejected,
)
from protocol.wire.frames import (
    Audio,
    Cancelled,
    Completed,
    Failed,
    Frame,
    Started,
)
from protocol.wire.messages import (
    Accepted,
    Attach,
    Cancel,
    Queued,
    Rejected,
)
from protocol.wire.structs import AudioFormat
from protocol.wire.validators import Value


@attrs.frozen(kw_only=True)
class Restarted:
    """A new attempt begins below frames that were given out already: those from `seq` on are void, and come anew.

    It comes, as a rule with seq 0, when the worker of an engine that is not reproducible was lost and the request is
    tried again: `retry="always"` voids whatever was given out, "before_output" no more than `started` and `progress`.
    And it comes when the relay and the worker were both started anew, after which nobody holds the earlier frames; a
    reproducible engine then makes the same ones again. It stands among the `events()` of a stream and is no message
    of the wire.
    """

    request_id: str
    attempt: int
    seq: int


Event = Accepted | Queued | Restarted | Frame


class AudioRestarted(RequestFailed):
    """The audio begins anew, and who takes it has not said what to do then; see `Stream.audio`."""


class Stream:
    """A submitted or attached request; made by `Relay.submit` and `Relay.attach`.

    `async for frame in stream`, `stream.events()` and `stream.audio()` share one position: take one of them. Each
    ends after `completed`, and raises where the request ended otherwise: RequestRejected, RequestFailed,
    RequestCancelled; ProtocolError where the relay left out frames twice; LinkError where the relay is gone for good.

    What is not taken yet is kept here, so that a slow reader of one stream never holds up another. It is bounded by
    the relay's `max_result_bytes` (64 MiB by default).

    Attributes:
        request_id: its id.
        accepted: whether the relay has it safe in its store.
        place: its last known place in the queue, None before the first and once it runs.
        format: of the audio, once `started` said it; None where there is none.
        attempt: number of the attempt whose frames come now; 0 before the first frame.
        next_seq: of the next frame expected.
        restarts: how often `Restarted` happened.
        queue_s: seconds from the submit to `started`, by this side's clock.
    """

    def __init__(
        self,
        request_id: str,
        *,
        submit: bytes | None = None,
        inputs: Mapping[str, bytes] | None = None,
        after_seq: int = -1,
        attempt: int = 0,
    ) -> None:
        self.request_id = request_id
        self.accepted = False
        self.place: Queued | None = None
        self.format: AudioFormat | None = None
        self.attempt = attempt
        self.next_seq = after_seq + 1
        self.restarts = 0
        self.queue_s: float | None = None
        self._submit = submit
        self._inputs = inputs or {}
        self._upload: Upload | None = None
        self._began_at = trio.current_time()
        self._link: Link | None = None
        self._cancel: bytes | None = None
        self._left_out = False
        self._consumed_seq = after_seq + 1  # below it, frames are in the hands of the consumer
        self._events: deque[Event] = deque()
        self._changed = trio.Event()
        self._result: dict[str, Value] | None = None
        self._fault: Callable[[], Exception] | None = None

    # -- for the consumer ------------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether nothing more is to come, for whatever reason; what came may still wait to be taken."""
        return self._result is not None or self._fault is not None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Frame:
        while True:
            event = await self._next()
            if isinstance(event, Frame):
                return event

    def events(self) -> "Events":
        """Everything about the request: Accepted, Queued (the latest alone, if several came), Restarted, frames."""
        return Events(self)

    def audio(self, on_restart: Callable[[], None] | None = None) -> "AudioChunks":
        """The PCM alone, as bytes of whole samples in `format`, which is known from the first of them on.

        Args:
            on_restart: called when the audio begins anew (see `Restarted`); what was given out before is then void.
                Without it AudioRestarted is raised, because going on would play the beginning twice.
        """
        return AudioChunks(self, on_restart)

    async def result(self) -> dict[str, Value]:
        """Wait for the end and return the figures of `completed`, and `queue_s` where this side could measure it.

        Frames not taken yet can be taken afterwards.

        Raises:
            RequestRejected: the relay did not take the request.
            RequestFailed: it failed.
            RequestCancelled: it was cancelled.
        """
        await trio.lowlevel.checkpoint()
        while not self.ended:
            await self._change()
        if self._result is None:
            self._raise_fault()
        result = dict(self._result or {})
        if self.queue_s is not None:
            result.setdefault("queue_s", round(self.queue_s, 3))
        return result

    async def wait_accepted(self) -> None:
        """Wait until the relay has the request in its store; raises as `result` where it does not take it."""
        await trio.lowlevel.checkpoint()
        while not self.accepted and not self.ended:
            await self._change()
        if not self.accepted:
            self._raise_fault()

    async def _next(self) -> Event:
        await trio.lowlevel.checkpoint()
        while not self._events:
            if self._result is not None:
                raise StopAsyncIteration
            self._raise_fault()
            await self._change()
        event = self._events.popleft()
        if isinstance(event, Frame):
            self._consumed_seq = event.seq + 1
        return event

    async def _change(self) -> None:
        if self._changed.is_set():
            self._changed = trio.Event()
        await self._changed.wait()

    def _raise_fault(self) -> None:
        if self._fault is not None:
            raise self._fault()

    # -- for the relay's reader, none of which waits ---------------------------------------------------------

    def open(self, link: Link) -> None:
        """Ask for the request over a new link: again as a whole while it may be unknown, else for what is missing."""
        if self.ended:
            return
        self._link = link
        if self._submit is not None and not self.accepted:
            link.send_nowait(self._submit)
            self._upload = Upload(link, self.request_id, self._inputs)
        else:
            attach = Attach(request_id=self.request_id, attempt=self.attempt, after_seq=self.next_seq - 1)
            link.send_nowait(encode(attach))
        if self._cancel is not None:
            link.send_nowait(self._cancel)

    def repeat_cancel(self, cancel: Cancel) -> None:
        """Say this again over each new link, until the end: a relay that was killed may have forgotten it."""
        self._cancel = encode(cancel)

    def on_message(self, message: Accepted | Queued | Rejected | Frame) -> None:
        """Take what the relay says of this request."""
        if self.ended:
            return
        if isinstance(message, Rejected):
            # Taken once, it can only be forgotten: that is a failure, and not a refusal.
            kind = RequestFailed if self.accepted else RequestRejected
            details = dict(message.details)
            self.fail(partial(kind, self.request_id, message.code, message.message, details, message.retryable))
            return
        first = not self.accepted
        self._accept()
        if isinstance(message, Frame):
            self._on_frame(message)
        elif isinstance(message, Queued):
            self.place = message
            if self._events and isinstance(self._events[-1], Queued):
                self._events.pop()
            self._events.append(message)
        elif first:
            self._events.append(message)
        self._changed.set()

    def fail(self, fault: Callable[[], Exception]) -> None:
        """Nothing more will come; `fault` makes the exception that says why, anew for each who asks."""
        if not self.ended:
            self._fault = fault
            self._stop_upload()
            self._changed.set()

    def _accept(self) -> None:
        if not self.accepted:
            self.accepted = True
            self._inputs = {}  # they can be large, and the relay has them
            self._stop_upload()

    def _stop_upload(self) -> None:
        if self._upload is not None:
            self._upload.stop()
            self._upload = None

    def _on_frame(self, frame: Frame) -> None:
        if frame.attempt < self.attempt:
            return  # of an attempt that is over
        if not self.attempt and self.next_seq:
            self.attempt = frame.attempt  # who attached did not say whose frames it has: of whichever there is
        if frame.seq < self.next_seq and frame.attempt == self.attempt:
            # Sent twice around a reconnect. But the last frame always counts: a relay that was restarted, and lost
            # the frames before it, may end the request itself; and who attached may have named a `seq` beyond the end.
            if isinstance(frame, Failed | Cancelled):
                self._on_end(frame)
            elif isinstance(frame, Completed):
                self._events.append(frame)
                self._result = frame.result
            return
        if frame.seq > self.next_seq:
            if isinstance(frame, Failed | Cancelled):
                self._on_end(frame)  # the relay had to let go of the frames before it
            else:
                self._on_gap(frame)
            return
        if frame.seq < self.next_seq:
            self._restart(frame)
        self.attempt = frame.attempt
        self.next_seq = frame.seq + 1
        self._events.append(frame)
        if isinstance(frame, Started):
            self.format = frame.format
            self.place = None
            if self.queue_s is None and self._submit is not None:
                self.queue_s = trio.current_time() - self._began_at
        elif isinstance(frame, Completed):
            self._result = frame.result
        elif isinstance(frame, Failed | Cancelled):
            self._events.remove(frame)  # it is told by the exception
            self._on_end(frame)

    def _on_gap(self, frame: Frame) -> None:
        """A fault of the relay's, or on the way: asking anew over another link may mend it, once.

        Raises:
            ProtocolError: the first time; the link is then closed, and `open` called with the next.
        """
        words = f"request {self.request_id}: frame {frame.seq} came where {self.next_seq} was due"
        if not self._left_out:
            self._left_out = True
            raise ProtocolError(words)
        self.fail(partial(ProtocolError, f"{words}; the result is incomplete"))
        if self._submit is not None and self._link is not None and self._link.gone is None:
            self._link.send(Cancel(request_id=self.request_id, reason="frames were left out twice"))

    def _on_end(self, frame: Failed | Cancelled) -> None:
        if isinstance(frame, Failed):
            told = (frame.code, frame.message, dict(frame.details), frame.retryable)
            self.fail(partial(RequestFailed, self.request_id, *told))
        else:
            self.fail(partial(RequestCancelled, self.request_id, frame.reason))

    def _restart(self, frame: Frame) -> None:
        """Frames from `frame.seq` on are void. If the consumer has none of them yet, it need not know."""
        kept = [event for event in self._events if not isinstance(event, Frame) or event.seq < frame.seq]
        self._events = deque(kept)
        if self._consumed_seq > frame.seq:
            self.restarts += 1
            self._events.append(Restarted(request_id=self.request_id, attempt=frame.attempt, seq=frame.seq))


class Events:
    """What `Stream.events` returns."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        return await self._stream._next()


class AudioChunks:
    """What `Stream.audio` returns."""

    def __init__(self, stream: Stream, on_restart: Callable[[], None] | None) -> None:
        self._stream = stream
        self._on_restart = on_restart
        self._begun = stream._consumed_seq > 1  # `started` is number 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        while True:
            event = await self._stream._next()
            if isinstance(event, Audio):
                self._begun = True
                return event.pcm
            if isinstance(event, Restarted) and self._begun:
                self._begun = False
                if self._on_restart is None:
                    words = "the audio begins anew on another worker; pass on_restart to audio() to follow it"
                    raise AudioRestarted(event.request_id, ErrorCode.WORKER_LOST, words, {}, True)
                self._on_restart()


def fresh_error(fault: LinkError) -> Callable[[], LinkError]:
    """Makes the exception `fault` anew, so that each who raises it has a traceback of its own."""
    if isinstance(fault, LoginRefused):
        return partial(LoginRefused, fault.code, str(fault))
    return partial(type(fault), str(fault))
