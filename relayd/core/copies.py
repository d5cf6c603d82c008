"""Answers requests with the frames of equal ones: of a result that is kept, or of a request that still runs.

A copied request is a request of its own, with its own id, record, result and listeners; only its frames come from the
log of another request, its source, and not from a worker. So resuming, retention and every limit apply to it unchanged,
and neither needs the other once the frames are copied. If the source gives no result, the copied request is queued; if
it has output already, a worker that makes the same frames continues it.
"""

from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

import attrs
import structlog
import trio

from protocol.wire.audio_envelope import PREFIX_BYTES, audio_prefix, match_audio
from protocol.wire.codec import decode, encode
from protocol.wire.frames import Audio, Completed, Frame, Output, Progress, Started, Video
from protocol.wire.messages import FRAMES, Ack, Submit
from protocol.wire.validators import Value
from relayd.core.interfaces import RelayState
from relayd.core.result_cache import ResultCache
from relayd.core.space import Space
from relayd.frames.frame_log import FrameReader, MemoryBudget
from relayd.requests.request import Request, cache_key
from relayd.scheduling.model import SpaceState, State
from relayd.store.records import COPIED

log = structlog.get_logger("relayd")

#: While the frames in memory exceed their limit, one slice (`HIGH_WATER_BYTES`) is copied in this time.
FULL_S = 1.0
POLL_S = 0.05


class CopyingRelay(RelayState, Protocol):
    """The relay's state, as copies see it."""

    @property
    def spaces(self) -> Mapping[str, Space]:
        """The open spaces."""

    def live_requests(self) -> list[Request]:
        """Return the requests that have not ended."""

    def mark_busy(self, topic: str, key: str) -> None:
        """Like `mark_changed`, for a row that changes all the time."""

    def on_first_output(self, request: Request) -> None:
        """Note the first output of a request or of an attempt."""

    def fail_internal(self, request: Request) -> None:
        """Fail a request after an error in the relay's own code."""

    def finish_request(
        self,
        request: Request,
        last_frame: bytes,
        state: State,
        *,
        result: dict[str, Value] | None = None,
        pending_ack: tuple[str, Ack] | None = None,
    ) -> None:
        """End a request with its last frame."""


@attrs.define(eq=False)
class Copies:
    """Finds the sources of requests, and begins to copy them."""

    relay: CopyingRelay
    cache: ResultCache
    memory: MemoryBudget
    _turn: trio.Lock = attrs.field(factory=trio.Lock)
    #: Space -> requests that were queued although they have a source, because as many were copied as may be.
    _passed_over: defaultdict[str, deque[Request]] = attrs.field(factory=lambda: defaultdict(deque))

    def begin(self, request: Request) -> Request | None:
        """Return the source of a request that would be queued otherwise, if it has one; `follow` then copies it."""
        source = self._find(request)
        if source is not None and not self._space_of(request).may_copy(request.principal):
            self._passed_over[request.submit.space].append(request)
            return None
        if source is not None:
            self._start(request, source)
        elif request.cache_key:
            self.relay.stats.space(request.submit.space).cache_misses += 1
        return source

    def has_answer(self, submit: Submit, principal: str) -> bool:
        """Whether a result that is kept answers a request that is not submitted yet."""
        key = cache_key(submit, principal, self.relay.spaces[submit.space].config)
        return bool(key) and self.cache.find(submit.space, key, self._identities(submit.space)) is not None

    def follow(self, request: Request, source: Request) -> None:
        """Copy the frames of `source`, those to come among them."""
        nursery = self.relay.spaces[request.submit.space].nursery
        assert nursery is not None
        copy = Copy(self.relay, self, request, source)
        copy.reader.open()  # at once, so that the source is not forgotten before
        nursery.start_soon(copy.run, name=f"copy of request {source.request_id}")

    def join_waiting(self, source: Request) -> None:
        """Copy the queued requests that equal one which was just started."""
        if not source.cache_key or not source.entry.reproducible:
            return
        for entry in list(self.relay.scheduler.state.spaces[source.submit.space].queue):
            request = self.relay.requests[entry.request_id]
            waits = entry.state is State.QUEUED  # still: the one before may have let it start
            if waits and request.cache_key == source.cache_key and _may_continue(request, source):
                self._start(request, source)
                self.follow(request, source)

    def copy_passed_over(self, space: str) -> None:
        """Copy requests that were queued only because as many were copied as may be, while there is room."""
        passed_over = self._passed_over.get(space)
        while passed_over:
            request = passed_over.popleft()
            try:
                if request.entry.state is not State.QUEUED or (source := self._find(request)) is None:
                    continue
                if not self._space_of(request).may_copy(request.principal):
                    passed_over.appendleft(request)  # until another has ended
                    return
                self._start(request, source)
                self.follow(request, source)
            except Exception:
                log.exception("internal error in request", request_id=request.request_id)
                self.relay.fail_internal(request)

    def restore(self) -> None:
        """Keep what may answer equal requests, and continue to copy, after a restart of the relay."""
        ended = [each for each in self.relay.requests.values() if each.entry.state is State.COMPLETED]
        for request in sorted(ended, key=lambda each: each.ended_at or 0.0):
            self.cache.add(request, self.relay.spaces[request.submit.space].config)
        for request in self.relay.live_requests():
            if request.entry.copied:
                if (source := self._find(request, [request.entry.reproducible])) is not None:
                    self.follow(request, source)
                else:
                    self._queue(request)

    def replace(self, request: Request, source: Request) -> None:
        """Copy a request from another source, because `source` gives no result, or queue it."""
        if (other := self._find(request)) is not None and other is not source:
            self._start(request, other)
            self.follow(request, other)
        else:
            self._queue(request)

    async def wait_for_room(self) -> None:
        """Wait before more is copied that exists already: it comes faster than a disk can take it."""
        async with self._turn:
            with trio.move_on_after(FULL_S):
                while self.memory.over:  # noqa: ASYNC110  there is no event for it
                    await trio.sleep(POLL_S)

    def _space_of(self, request: Request) -> SpaceState:
        return self.relay.scheduler.state.spaces[request.submit.space]

    def _queue(self, request: Request) -> None:
        self.relay.apply(self.relay.scheduler.end_copy(request.entry, trio.current_time()))

    def _identities(self, space: str) -> set[str] | None:
        """Return those of the connected workers of a space; None, which stands for any, while there is none."""
        workers = self.relay.scheduler.state.workers_of(space)
        return {worker.reproducible for worker in workers} if workers else None

    def _find(self, request: Request, identities: Collection[str] | None = None) -> Request | None:
        """Return a source of a request.

        Args:
            request: a live request.
            identities: those of the sources that come into question; None means those of the connected workers, or
                all while none is connected.
        """
        if not request.cache_key:
            return None
        state = self.relay.scheduler.state
        if identities is None:
            identities = self._identities(request.submit.space)
        running = (self.relay.requests[each] for each in state.spaces[request.submit.space].running)
        kept = self.cache.find(request.submit.space, request.cache_key, identities)
        for source in running if kept is None else (kept,):
            its = source.entry
            joinable = its.reproducible and not its.copied and its.cancel_reason is None
            wanted = identities is None or its.reproducible in identities
            equal = source.cache_key == request.cache_key and wanted and _may_continue(request, source)
            if equal and (source is kept or joinable):
                return source
        return None

    def _start(self, request: Request, source: Request) -> None:
        entry, relay, name = request.entry, self.relay, request.submit.space
        audio_bytes = request.audio_bytes
        relay.stats.count_restarted(request)  # what a worker has made of it
        decisions = relay.scheduler.copy(entry, source.entry.reproducible, trio.current_time())
        if entry.attempt > 1:
            request.log.restart(entry.attempt, entry.next_seq)
        request.audio_bytes = audio_bytes if entry.next_seq else 0
        request.last_position_sent = None
        request.add_timeline("copied", attempt=entry.attempt, source=source.request_id)
        relay.stats.space(name).cache_hits += 1
        log.info("request copied", request_id=request.request_id, source=source.request_id, space=name)
        relay.save_status(request)
        request.wake()
        relay.mark_changed("requests", request.request_id)
        relay.apply(decisions)


@attrs.define(eq=False)
class Copy:
    """Copies the frames of `source` to `request`: a sink of a reader of the source's log."""

    relay: CopyingRelay
    copies: Copies
    request: Request
    source: Request
    #: Bytes that were copied since the task last let others run.
    backlog_bytes: int = 0
    reader: FrameReader = attrs.field(init=False)
    _attempt: int = attrs.field(init=False)
    _last: Completed | None = None
    #: Whether the source gives no result.
    _lost: bool = False
    #: First bytes of the audio frames of the source's current attempt, and of the request's own.
    _source_prefix: bytes = b""
    _prefix: bytes = attrs.field(init=False)
    _changed: trio.Event = attrs.field(factory=trio.Event)

    def __attrs_post_init__(self) -> None:
        self._attempt = self.request.entry.attempt
        self._prefix = audio_prefix(self.request.request_id, self._attempt)
        self.reader = FrameReader(self.request.request_id, self.source.log, self, self.request.log.next_seq)

    @property
    def _current(self) -> bool:
        """Whether the request is still copied by this."""
        entry = self.request.entry
        return entry.state is State.RUNNING and entry.copied and entry.attempt == self._attempt

    async def run(self) -> None:
        """Copy until the source or the request has ended."""
        try:
            while self._current and self._last is None and not self._lost:
                await self._changed.wait()
                self._changed = trio.Event()
                if self.reader.seq < self.source.log.next_seq:
                    await self.copies.wait_for_room()
                self.backlog_bytes = 0
                self.reader.pump()
            if self._current:
                self._end()
        except Exception:
            log.exception("internal error in request", request_id=self.request.request_id)
            self.relay.fail_internal(self.request)
        finally:
            self.reader.close()

    def _end(self) -> None:
        request, last = self.request, self._last
        if last is None:
            self.copies.replace(request, self.source)
            return
        # As if a worker had sent it, which has to keep it until it is stored: here it is the source that is kept, and a
        # relay that is killed before copies it again.
        ack = Ack(request_id=request.request_id, attempt=last.attempt, seq=last.seq)
        self.relay.finish_request(request, encode(last), State.COMPLETED, result=last.result, pending_ack=(COPIED, ack))

    # -- as a sink; called by the source's log, to which nothing may happen

    def send_frames(self, frames: list[bytes], size: int) -> None:
        """Copy frames that follow each other."""
        self.backlog_bytes += size
        self._changed.set()
        if self._lost or not self._current:
            return
        try:
            known = self.request.log.next_seq - (self.reader.seq - len(frames))
            self._lost = known < 0 or self.source.entry.reproducible != self.request.entry.reproducible
            if not self._lost:
                self._copy(frames[known:])
        except Exception:
            log.exception("internal error in request", request_id=self.request.request_id)
            self.request.cache_key = b""  # it is not copied once more
            self._lost = True

    def on_all_sent(self, reader: FrameReader) -> None:
        """The source has ended, or its frames were dropped."""
        self._lost = self._lost or self._last is None
        self._changed.set()

    def on_read_error(self, reader: FrameReader) -> None:
        """The source's frames cannot be read back."""
        self._lost = True
        self._changed.set()

    def _copy(self, frames: Iterable[bytes]) -> None:
        request = self.request
        copied: list[bytes] = []
        audio_bytes, is_output = 0, False
        for seq, data in enumerate(frames, request.log.next_seq):
            known = self._prefix and data[:PREFIX_BYTES] == self._source_prefix
            pcm_bytes = match_audio(data, seq) if known else -1
            if pcm_bytes >= 0:
                copied.append(self._prefix + data[PREFIX_BYTES:])
                audio_bytes, is_output = audio_bytes + pcm_bytes, True
                continue
            frame = decode(data, FRAMES)
            assert isinstance(frame, Frame)
            if frame.ENDS:
                self._add_last(frame)
                break
            copied.append(encode(self._renamed(frame)))
            audio_bytes += self._note(frame)
            is_output = is_output or isinstance(frame, Audio | Video | Output)
        if not copied:
            return
        entry = request.entry
        request.log.extend(copied, sum(map(len, copied)))
        entry.next_seq = request.log.next_seq
        request.audio_bytes += audio_bytes
        request.last_frame_at = trio.current_time()
        request.made_s = self.source.last_frame_at - self.source.attempt_started_at
        if is_output and (request.first_frame_at is None or not entry.has_output):
            self.relay.on_first_output(request)
        self.relay.mark_busy("requests", request.request_id)

    def _note(self, frame: Frame) -> int:
        """Note what a frame that is not the last says of its request; returns its bytes of audio."""
        request = self.request
        if isinstance(frame, Audio):
            self._source_prefix = audio_prefix(frame.request_id, frame.attempt)
            return len(frame.pcm)
        if isinstance(frame, Started):
            request.audio_bytes, request.format, request.video = 0, frame.format, frame.video
        elif isinstance(frame, Progress):
            request.fraction = frame.fraction
        elif isinstance(frame, Output) and frame.mark is None:
            request.has_outputs = True
        return 0

    def _add_last(self, frame: Frame) -> None:
        if isinstance(frame, Completed):
            self._last = attrs.evolve(frame, request_id=self.request.request_id, attempt=self._attempt, cached=True)
            encode(self._last)  # so that one that cannot be encoded does not end the request
        else:
            self._lost = True

    def _renamed(self, frame: Frame) -> Frame:
        return attrs.evolve(frame, request_id=self.request.request_id, attempt=self._attempt)


def _may_continue(request: Request, source: Request) -> bool:
    """Whether the frames of a source may follow those that a request has already."""
    entry = request.entry
    return not entry.has_output or entry.reproducible == source.entry.reproducible
