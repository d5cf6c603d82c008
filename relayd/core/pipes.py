"""Pipes: feeds the output of one request, the source, to an input of another, while both run.

A pipe is a reader of the source's frame log and the feeder of an ordinary input log: what it brings is stored like what
a client feeds, so attempts, restarts and limits are the same, and neither request needs the other once it is copied
(docs/decisions/0025-a-pipe-is-fed-by-the-relay.md). The scheduler lets the request wait until each source has begun.
"""

from collections import deque
from typing import Protocol

import attrs
import structlog
import trio

from protocol.wire.codec import decode
from protocol.wire.errors import ErrorCode
from protocol.wire.frames import MAX_TEXT_CHARS, Audio, Cancelled, Completed, Failed, Frame, Output, Started, Video
from protocol.wire.ivf import IVF, ivf_header, ivf_picture
from protocol.wire.media_types import accepts, essence
from protocol.wire.messages import FRAMES, MAX_UNACKED_BYTES
from protocol.wire.structs import AudioFormat
from protocol.wire.validators import Value
from relayd.core.feeds import Feeds
from relayd.core.interfaces import FeedingRelay
from relayd.frames.frame_log import FrameReader
from relayd.requests.live_input import Fault, PipedInput
from relayd.requests.request import Request
from relayd.store.base import StoreError
from relayd.store.records import ClearInput, UpdateRequest

log = structlog.get_logger("relayd")

TEXT = "text/plain; charset=utf-8"
#: The `code` in `details` where the source's frames are not kept any more.
GONE = ErrorCode.REQUEST_NOT_FOUND.value


class PipingRelay(FeedingRelay, Protocol):
    """The relay's state, as pipes see it."""

    @property
    def feeds(self) -> Feeds:
        """Stores what is fed."""

    def status_update(self, request: Request) -> UpdateRequest:
        """Return the status of a request as a record for the store."""


def open_pipes(relay: PipingRelay, request: Request) -> None:
    """Begin to feed the piped inputs of a new or restored request.

    Its sources are older, and requests are restored in their order: one that has got the id of a source since then is
    not known yet.
    """
    for name, fed in request.fed.items():
        if isinstance(fed, PipedInput):
            source = relay.requests.get(fed.source_id)
            if source is not None and not source.has_result:
                source = None
            pipe = Pipe(relay, request, name, fed, source)
            pipe.begin()
            relay.nursery.start_soon(pipe.run)


@attrs.define(eq=False)
class Pipe:
    """Feeds one input of `request` from the frame log of `source`: a sink of a reader of that log.

    As a sink it only keeps the frames, as nothing may happen to the log that calls it; its task does the rest.
    """

    relay: PipingRelay
    request: Request
    name: str
    fed: PipedInput
    #: None if it is not known, or has no result any more.
    source: Request | None
    #: Bytes of the frames that are not passed on and stored yet.
    backlog_bytes: int = 0
    _reader: FrameReader | None = None
    #: The frames that are not passed on yet, and the number of the next one to come.
    _frames: deque[bytes] = attrs.field(factory=deque)
    _next_seq: int = 0
    #: Bytes of the source's output before those frames, and whether any of them were fed.
    _offset: int = 0
    _has_fed: bool = False
    #: Whether what was fed is not the source's output any longer.
    _is_void: bool = False
    #: Whether frames of it are missing, and why.
    _lost: str | None = None
    _format: AudioFormat | None = None
    #: Whether the source's video is passed on, and nothing else; and what comes before its first picture.
    _takes_video: bool = False
    _ivf_header: bytes = b""
    _ended: bool = False
    _changed: trio.Event = attrs.field(factory=trio.Event)

    def begin(self) -> None:
        """Read the source from now on, so that it is not forgotten before the request is stored."""
        self.request.pipes.append(self)
        self._read_from_start()

    def _read_from_start(self) -> None:
        self._frames.clear()
        self._next_seq = self._offset = self.backlog_bytes = 0
        self._has_fed = self._is_void = False
        if self.source is not None:
            before, self._reader = self._reader, FrameReader(self.request.request_id, self.source.log, self)
            self._reader.open()  # before the other is closed: what nobody reads may be dropped
            if before is not None:
                before.close()

    def wake(self) -> None:
        """The request may have ended."""
        self._changed.set()

    # -- as a sink

    def send_frames(self, frames: list[bytes], size: int) -> None:
        """Keep frames that follow each other."""
        assert self._reader is not None
        first = self._reader.seq - len(frames)
        if first != self._next_seq:
            if first > self._next_seq:
                self._lost = "its frames were dropped"
            self._is_void = self._is_void or self._has_fed
            self._frames.clear()
            self.backlog_bytes = 0
        self._frames.extend(frames)
        self._next_seq = self._reader.seq
        self.backlog_bytes += size
        self._changed.set()

    def on_all_sent(self, reader: FrameReader) -> None:
        """All frames of the source have come, or what was left of them."""
        self._changed.set()

    def on_read_error(self, reader: FrameReader) -> None:
        """The source's frames cannot be read back."""
        self._lost = "its frames cannot be read back from the relay's disk"
        self._changed.set()

    # -- the task

    async def run(self) -> None:
        """Feed the input until it or the request has ended."""
        request = self.request
        try:
            while request.live and not request.accepted:
                await request.changed.wait()
            while request.live and not self._ended:
                if self._is_void:
                    await self._begin_anew()
                elif self._frames:
                    await self._pass_on()
                elif not self._fail_if_lost():
                    await self._changed.wait()
                    self._changed = trio.Event()
        except StoreError as fault:
            self.relay.feeds.fail(request, self.name, fault)
        except Exception:
            log.exception("internal error in request", request_id=request.request_id)
            self.relay.fail_internal(request)
        finally:
            if self._reader is not None:
                self._reader.close()

    def _fail_if_lost(self) -> bool:
        """End what cannot go on: the input, if the store has all of it, or else the request."""
        if self._reader is not None and self._reader.is_open and self._lost is None:
            return False
        if self.fed.ended:  # after a restart of the relay, which has forgotten the source meanwhile
            self._note_output()
            self._ended = True
        else:
            self._fail(GONE, self._lost or "its result is no longer kept")
        return True

    async def _pass_on(self) -> None:
        """Store the bytes of the next frames, and the end if it is among them; then let more frames come."""
        data, size, last = bytearray(), 0, None
        while self._frames and last is None and len(data) < MAX_UNACKED_BYTES:
            frame = decode(packed := self._frames.popleft(), FRAMES)
            assert isinstance(frame, Frame)
            size += len(packed)
            if frame.ENDS:
                last = frame
            elif content := self._content(frame):
                if not self._is_accepted(frame):
                    return
                data += content
        if last is not None and not isinstance(last, Completed):
            code, message = (last.code, last.message) if isinstance(last, Failed) else _cancelled(last)
            self._fail(code, message)
        elif self._lost is not None:
            self._fail_if_lost()
        elif await self._feed(bytes(data), last=last is not None):
            self.backlog_bytes = max(0, self.backlog_bytes - size)
            self._ended = last is not None
            if self._reader is not None and self._reader.is_open:
                self._reader.pump()

    def _content(self, frame: Frame) -> bytes:
        """Return the bytes of a frame that are passed on."""
        if isinstance(frame, Started):
            self._format = frame.format
            self._takes_video = frame.video is not None and self._wants_video()
            self._ivf_header = ivf_header(frame.video) if frame.video is not None else b""
        elif isinstance(frame, Video):
            if self._takes_video:
                header, self._ivf_header = self._ivf_header, b""
                return header + ivf_picture(frame.data, frame.pts)
        elif self._takes_video:
            return b""
        elif isinstance(frame, Audio):
            return frame.pcm
        elif isinstance(frame, Output) and frame.mark is None:
            if isinstance(frame.data, str):
                return frame.data.encode()
            return frame.data if isinstance(frame.data, bytes) else b""
        return b""

    def _wants_video(self) -> bool:
        """Whether the input takes the video of a source that makes some, and not its audio."""
        request, name = self.request, self.name
        rule = self.relay.spaces[request.submit.space].inputs.get(name)
        if media_type := request.submit.inputs[name].media_type:
            return essence(media_type) == IVF
        accepted = rule.media_types if rule is not None else []
        return self._format is None or (bool(accepted) and accepts(accepted, IVF))

    def _is_accepted(self, frame: Frame) -> bool:
        """Say what kind of input it is, if the submit left it open; whether the space accepts that."""
        request, name = self.request, self.name
        info = request.submit.inputs[name]
        media_type = self._media_type_of(frame)
        if info.media_type or not media_type:
            return True
        rule = self.relay.spaces[request.submit.space].inputs.get(name)
        if rule is not None and not accepts(rule.media_types, media_type):
            what = f"is {media_type!r}, as its source makes it; accepted are {', '.join(rule.media_types)}"
            request.details = {f"inputs.{name}": what[:MAX_TEXT_CHARS]}
            message = f"space {request.submit.space!r}: input {name!r} {what}"
            self.relay.fail(request, ErrorCode.INVALID_PARAMS, message)
            return False
        inputs = request.submit.inputs | {name: attrs.evolve(info, media_type=media_type)}
        request.submit = attrs.evolve(request.submit, inputs=inputs)
        return True

    def _media_type_of(self, frame: Frame) -> str:
        if isinstance(frame, Output):
            return TEXT if isinstance(frame.data, str) else frame.media_type or ""
        if isinstance(frame, Video):
            return IVF
        if self._format is None:
            return ""
        return f"audio/L16;rate={self._format.sample_rate};channels={self._format.channels}"

    async def _feed(self, data: bytes, *, last: bool) -> bool:
        """Feed the next bytes of the source's output; False if the request has ended, or has to begin anew."""
        for begin in range(0, max(1, len(data)), MAX_UNACKED_BYTES):
            piece = data[begin : begin + MAX_UNACKED_BYTES]
            is_last = last and begin + len(piece) == len(data)
            if not piece and not is_last:
                break
            self._has_fed = True
            fault = await self.relay.feeds.feed(self.request, self.name, self._offset, piece, last=is_last)
            if self._is_void or not self.request.live:
                return False
            if fault is not None:  # other bytes than those that were stored before the relay was restarted
                assert fault is Fault.CONFLICT, fault
                self._is_void = True
                return False
            self._offset += len(piece)
            self._note_output()
        return True

    def _note_output(self) -> None:
        """Tell the scheduler that something has come, or the end."""
        decisions = self.relay.scheduler.note_source_output(self.request.entry, self.fed.source_id, trio.current_time())
        if decisions:
            self.relay.apply(decisions)

    async def _begin_anew(self) -> None:
        """Empty the input and read the source from its beginning; the request waits until something comes again."""
        request, relay, fed = self.request, self.relay, self.fed
        log.info("source of a request begins anew", request_id=request.request_id, source=fed.source_id)
        request.details = self._details(ErrorCode.WORKER_LOST.value, "its attempt was lost, and it begins anew")
        relay.apply(relay.scheduler.begin_anew(request.entry, fed.source_id, trio.current_time()))
        if not request.entry.waits:  # it fails, or is being cancelled
            self._ended = True
            return
        request.details = {}
        relay.scheduler.state.add_fed(request.entry, -fed.known)
        fed.clear()
        self._read_from_start()
        await relay.store.commit(ClearInput(request.request_id, self.name), relay.status_update(request))

    def _fail(self, code: str, message: str) -> None:
        """End the request, because its source gives no more."""
        request = self.request
        request.details = self._details(code, message)
        what = f"request {self.fed.source_id}, the source of input {self.name!r}, gave no result ({code}): {message}"
        self.relay.fail(request, ErrorCode.SOURCE_FAILED, what)
        self._ended = True

    def _details(self, code: str, message: str) -> dict[str, Value]:
        return {"request_id": self.fed.source_id, "code": code, "message": message}


def _cancelled(frame: Frame) -> tuple[str, str]:
    return "cancelled", frame.reason if isinstance(frame, Cancelled) else ""
