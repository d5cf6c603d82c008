"""One request from its client's view: the relay's messages about it, in order and each frame once."""

from collections import deque
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Generic, Self, TypeVar

import attrs
import trio

from protocol.client.inputs import Piece, Upload
from protocol.client.live_inputs import LiveInput
from protocol.link.base import Link
from protocol.wire.codec import encode
from protocol.wire.errors import (
    ErrorCode,
    InputClosed,
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
    Video,
)
from protocol.wire.messages import (
    Accepted,
    Attach,
    Cancel,
    InputAck,
    Queued,
    Rejected,
    WorkerAway,
    WorkerBack,
)
from protocol.wire.structs import AudioFormat, VideoFormat
from protocol.wire.validators import Value


@attrs.frozen(kw_only=True)
class Restarted:
    """A new attempt begins below frames already delivered: those from `seq` on are void and will be sent again.

    This happens, usually with seq 0, when the worker of an engine that is not reproducible was lost and the request is
    tried again: `retry="always"` voids everything delivered, "before_output" only `started` and `progress`. It also
    happens when relay and worker have both restarted, so that the earlier frames are lost; a reproducible engine then
    makes the same frames again. It appears among the `events()` of a stream, but is not a message of the wire.
    """

    request_id: str
    attempt: int
    seq: int


FrameT = TypeVar("FrameT", bound=Frame)
Event = Accepted | Queued | WorkerAway | WorkerBack | Restarted | Frame


class AudioRestarted(RequestFailed):
    """The audio starts again, and no `on_restart` was given; see `Stream.audio`."""


class VideoRestarted(RequestFailed):
    """The video starts again, and no `on_restart` was given; see `Stream.video`."""


class Stream:
    """A submitted or attached request; made by `RelayClient.submit` and `RelayClient.attach`.

    `async for frame in stream`, `stream.events()`, `stream.audio()` and `stream.video()` share one position: use one of
    them. Each ends after `completed`. If the request ended otherwise, it raises RequestRejected, RequestFailed or
    RequestCancelled; ProtocolError if the relay left out frames twice; LinkError if the relay is permanently
    unreachable.

    Frames that have not been read are kept here, so that a slow reader of one stream never holds up another. They are
    bounded by the relay's `max_result_bytes` (64 MiB by default).

    Attributes:
        request_id: the request's id.
        accepted: whether the relay has stored it safely.
        place: its last known place in the queue, None before the first and once it runs.
        format: of the audio, once `started` has arrived; None if there is no audio.
        video_format: of the video, likewise.
        attempt: number of the attempt whose frames arrive now; 0 before the first frame.
        next_seq: number of the next expected frame.
        restarts: how often `Restarted` happened.
        queue_s: seconds from the submit to `started`, by the clock of this side.
    """

    def __init__(
        self,
        request_id: str,
        *,
        submit: bytes | None = None,
        inputs: Mapping[str, bytes] | None = None,
        live: Collection[str] = (),
        after_seq: int = -1,
        attempt: int = 0,
    ) -> None:
        self.request_id = request_id
        self.accepted = False
        self.place: Queued | None = None
        self.format: AudioFormat | None = None
        self.video_format: VideoFormat | None = None
        self.attempt = attempt
        self.next_seq = after_seq + 1
        self.restarts = 0
        self.queue_s: float | None = None
        self._submit = submit
        self._inputs = inputs or {}
        self._upload: Upload | None = None
        self._live = {name: LiveInput(request_id, name) for name in live}
        self._began_at = trio.current_time()
        self._link: Link | None = None
        self._cancel: bytes | None = None
        self._left_out = False
        self._consumed_seq = after_seq + 1  # frames below it have been delivered to the consumer
        self._events: deque[Event] = deque()
        self._changed = trio.Event()
        self._result: dict[str, Value] | None = None
        self._fault: Callable[[], Exception] | None = None

    # -- for the consumer ------------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether nothing more will arrive, for whatever reason; what has arrived may still wait to be read."""
        return self._result is not None or self._fault is not None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Frame:
        while True:
            event = await self._next()
            if isinstance(event, Frame):
                return event

    def events(self) -> "Events":
        """Iterate over all about it: Accepted, Queued (only the latest), WorkerAway, WorkerBack, Restarted, frames."""
        return Events(self)

    def audio(self, on_restart: Callable[[], None] | None = None) -> "AudioChunks":
        """Iterate over the PCM only, as bytes of whole samples in `format`, which is known from the first on.

        Args:
            on_restart: called when the audio starts again (see `Restarted`); audio delivered before is then void.
                Without it AudioRestarted is raised, because continuing would play the beginning twice.
        """
        return AudioChunks(MediaFrames(self, Audio, AudioRestarted, on_restart))

    def video(self, on_restart: Callable[[], None] | None = None) -> "MediaFrames[Video]":
        """Iterate over the pictures only; their `video_format` is known from the first on.

        `protocol.wire.ivf` makes a file of them.

        Args:
            on_restart: as for `audio`; without it VideoRestarted is raised.
        """
        return MediaFrames(self, Video, VideoRestarted, on_restart)

    async def result(self) -> dict[str, Value]:
        """Wait for the end; return the figures of `completed`, with `queue_s` if this side could measure it.

        Frames that have not been read can be read afterwards.

        Raises:
            RequestRejected: the relay rejected the request.
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

    async def feed(self, name: str, data: Piece) -> None:
        """Add bytes, or text as UTF-8, to a live input; waits while `MAX_UNACKED_BYTES` are not stored by the relay.

        Bytes that the relay has not stored are kept here, and sent again when the link was lost. With an attached
        request they follow what the relay has stored; see `fed_bytes`.

        Args:
            name: an input that was submitted as `Live()`, or as any live input of an attached request.
            data: the next bytes; in several calls at the same time, pieces get mixed. Empty: a sign of life, for the
                relay's `feed_idle_timeout_s`.

        Raises:
            InputClosed: the request has completed without the rest, or the input was ended.
            RequestRejected: as for `result`. RequestFailed: it failed, or the relay refused what was fed.
            RequestCancelled: it was cancelled.
            ValueError: there is no live input of this name, or the text is not Unicode.

        Cancellation: a part of `data` may have been added.
        """
        live, rest = await self._find_live(name), memoryview(_as_bytes(name, data))
        while True:
            self._raise_fault()
            if live.ended or self._result is not None:
                why = "was ended" if live.ended else f"is closed: request {self.request_id} has completed"
                raise InputClosed(f"input {name!r} {why}; feed no more of it")
            taken = live.write(rest)
            rest = rest[taken:]
            if not rest:
                return
            if not taken:
                await self._change()

    async def end_input(self, name: str) -> None:
        """End a live input, and wait until the relay has stored all of it, or the request has completed without.

        Raises:
            RequestRejected: as for `feed`.
            ValueError: there is no live input of this name.

        Cancellation: the input is ended.
        """
        live = await self._find_live(name)
        live.end()
        while not live.end_stored and self._result is None:
            self._raise_fault()
            await self._change()

    async def fed_bytes(self, name: str) -> int:
        """Return how many bytes of a live input there are: those fed here, after those that the relay had before.

        Raises:
            RequestRejected: as for `feed`.
            ValueError: there is no live input of this name.
        """
        return (await self._find_live(name)).offset

    async def _find_live(self, name: str) -> LiveInput:
        await trio.lowlevel.checkpoint()
        if self._submit is None:  # the relay names the live inputs of a request before it says that it knows it
            await self.wait_accepted()
        if (live := self._live.get(name)) is None:
            self._raise_fault()
            if self._submit is None:
                known = ", ".join(sorted(self._live)) or "none, or it has ended"
                raise ValueError(f"request {self.request_id} takes no live input {name!r}; its live inputs are {known}")
            raise ValueError(f"there is no live input {name!r}; submit it with inputs={{{name!r}: Live()}}")
        return live

    async def wait_accepted(self) -> None:
        """Wait until the relay has stored the request; raises like `result` if it rejects it."""
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
        """Ask for the request over a new link: submit it again while it may be unknown, else ask for missing frames."""
        if self.ended:
            return
        is_new = self._link is None and self._submit is not None
        self._link = link
        if self._submit is not None and not self.accepted:
            link.send_nowait(self._submit)
            self._upload = Upload(link, self.request_id, self._inputs)
        else:
            attach = Attach(request_id=self.request_id, attempt=self.attempt, after_seq=self.next_seq - 1)
            link.send_nowait(encode(attach))
        if self._cancel is not None:
            link.send_nowait(self._cancel)
        for live in self._live.values():
            live.open(link, is_new=is_new)

    def repeat_cancel(self, cancel: Cancel) -> None:
        """Send this again over each new link, until the end: a relay that was killed may have forgotten it."""
        self._cancel = encode(cancel)

    def on_message(self, message: Accepted | Queued | WorkerAway | WorkerBack | Rejected | InputAck | Frame) -> None:
        """Process a message from the relay about this request."""
        if self.ended:
            return
        if isinstance(message, InputAck):
            self._on_ack(message)
            return
        if isinstance(message, Rejected):
            # An accepted request that is now unknown was forgotten: that is a failure, not a rejection.
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
        elif isinstance(message, WorkerAway | WorkerBack) or first:
            self._events.append(message)
        self._changed.set()

    def fail(self, fault: Callable[[], Exception]) -> None:
        """End the stream; `fault` makes a new exception with the reason for each caller."""
        if not self.ended:
            self._fault = fault
            self._stop_sending()
            self._changed.set()

    def _complete(self, frame: Completed) -> None:
        self._result = frame.result
        self._stop_sending()

    def _stop_sending(self) -> None:
        self._stop_upload()
        for live in self._live.values():
            live.stop()

    def _on_ack(self, ack: InputAck) -> None:
        live = self._live.get(ack.name)
        if live is None and self._submit is None and self._link is not None:
            live = self._live[ack.name] = LiveInput(self.request_id, ack.name, goes_on=True)
            live.open(self._link, is_new=False)
        if live is not None and not live.on_ack(ack):
            problem = f"the relay has only {ack.offset} bytes of input {ack.name!r}, and had stored more"
            self.fail(partial(ProtocolError, f"request {self.request_id}: {problem}; submit it again with a new id"))
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
        if isinstance(frame, Failed | Cancelled):
            # Whatever its number: a relay that was killed may have forgotten the attempt and the frames that it sent,
            # one whose disk is full drops frames, and an attach may have named a `seq` beyond the end.
            self._on_end(frame)
            return
        if frame.attempt < self.attempt:  # from an attempt that is over
            if isinstance(frame, Completed):
                self._begin_anew(frame)
            return
        if not self.attempt and self.next_seq:
            self.attempt = frame.attempt  # an attach that named no attempt accepts any
        if frame.seq < self.next_seq and frame.attempt == self.attempt:  # sent twice around a reconnect
            if isinstance(frame, Completed):  # an attach may have named a `seq` beyond the end
                self._events.append(frame)
                self._complete(frame)
            return
        if frame.seq > self.next_seq:
            self._on_gap(frame)
            return
        if frame.seq < self.next_seq:
            self._restart(frame.attempt, frame.seq)
        self.attempt = frame.attempt
        self.next_seq = frame.seq + 1
        self._events.append(frame)
        if isinstance(frame, Started):
            self.format, self.video_format = frame.format, frame.video
            self.place = None
            if self.queue_s is None and self._submit is not None:
                self.queue_s = trio.current_time() - self._began_at
        elif isinstance(frame, Completed):
            self._complete(frame)

    def _begin_anew(self, frame: Completed) -> None:
        """An earlier attempt has completed than the one whose frames are here, which a killed relay has forgotten."""
        self._restart(frame.attempt, 0)
        self.attempt = self.next_seq = 0
        if self._link is not None and self._link.gone is None:  # else `open` asks
            self._link.send(Attach(request_id=self.request_id))

    def _on_gap(self, frame: Frame) -> None:
        """Handle a missing frame, a fault of the relay or on the way: asking again over another link may help, once.

        Raises:
            ProtocolError: the first time; the link is then closed, and `open` is called with the next.
        """
        problem = f"request {self.request_id}: received frame {frame.seq}, expected {self.next_seq}"
        if not self._left_out:
            self._left_out = True
            raise ProtocolError(problem)
        self.fail(partial(ProtocolError, f"{problem}; the result is incomplete"))
        if self._submit is not None and self._link is not None and self._link.gone is None:
            self._link.send(Cancel(request_id=self.request_id, reason="frames were left out twice"))

    def _on_end(self, frame: Failed | Cancelled) -> None:
        if isinstance(frame, Failed):
            failure = (frame.code, frame.message, dict(frame.details), frame.retryable)
            self.fail(partial(RequestFailed, self.request_id, *failure))
        else:
            self.fail(partial(RequestCancelled, self.request_id, frame.reason))

    def _restart(self, attempt: int, seq: int) -> None:
        """Void the frames from `seq` on; the consumer is informed only if it has received some of them."""
        kept = [event for event in self._events if not isinstance(event, Frame) or event.seq < seq]
        self._events = deque(kept)
        if self._consumed_seq > seq:
            self.restarts += 1
            self._events.append(Restarted(request_id=self.request_id, attempt=attempt, seq=seq))


class Events:
    """The iterator returned by `Stream.events`."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        return await self._stream._next()


class MediaFrames(Generic[FrameT]):
    """The iterator returned by `Stream.video`: frames of one kind, and `fault` where they start again."""

    def __init__(
        self, stream: Stream, kind: type[FrameT], fault: type[RequestFailed], on_restart: Callable[[], None] | None
    ) -> None:
        self._stream = stream
        self._kind = kind
        self._fault = fault
        self._on_restart = on_restart
        self._begun = stream._consumed_seq > 1  # `started` is number 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> FrameT:
        while True:
            event = await self._stream._next()
            if isinstance(event, self._kind):
                self._begun = True
                return event
            if isinstance(event, Restarted) and self._begun:
                self._begun = False
                if self._on_restart is None:
                    what = self._kind.TYPE
                    advice = f"the {what} starts again on another worker; pass on_restart to {what}() to follow it"
                    raise self._fault(event.request_id, ErrorCode.WORKER_LOST, advice, {}, True)
                self._on_restart()


class AudioChunks:
    """The iterator returned by `Stream.audio`."""

    def __init__(self, frames: MediaFrames[Audio]) -> None:
        self._frames = frames

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        return (await anext(self._frames)).pcm


def _as_bytes(name: str, data: Piece) -> bytes:
    if not isinstance(data, str):
        return bytes(data)
    try:
        return data.encode()
    except UnicodeEncodeError as fault:
        where = f"at character {fault.start + 1}: cut it between characters"
        raise ValueError(f"the text for input {name!r} is not Unicode {where}") from None


def fresh_error(fault: LinkError) -> Callable[[], LinkError]:
    """A function that makes a new copy of `fault`, so that each caller gets its own traceback."""
    if isinstance(fault, LoginRefused):
        return partial(LoginRefused, fault.code, str(fault))
    return partial(type(fault), str(fault))
