"""Connects an HTTP response or a WebSocket to a request of the relay: submits or attaches to it, holds it and reads
its frames.

Does for one request what `relayd.connections.client` does for a link. To the relay it is the same kind of holder
and sink, so limits, idempotency, positions and the resume window are the same.
"""

from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import attrs
import trio
from starlette.requests import Request as HttpRequest

from protocol.wire.codec import decode
from protocol.wire.errors import ErrorCode
from protocol.wire.frames import Frame
from protocol.wire.messages import (
    FRAMES,
    MAX_INPUT_CHUNK_BYTES,
    Input,
    Queued,
    Rejected,
    Submit,
    WorkerAway,
    WorkerBack,
)
from relayd.auth.tokens import Principal
from relayd.core import access
from relayd.core.principals import too_fast
from relayd.core.relay import Relay
from relayd.frames.frame_log import LOW_WATER_BYTES, FrameReader
from relayd.http.authentication import principal_by_link, principal_of
from relayd.http.context import Exchange, HttpContext, context_of, exchange_of
from relayd.http.errors import HttpError
from relayd.requests.request import Request
from relayd.scheduling.model import QueuePosition, State

#: A frame of the request, its position in the queue, or what became of its worker.
Event = Frame | Queued | WorkerAway | WorkerBack


@attrs.define(eq=False)
class RequestStream:
    """One request, held and read by one response; or by a WebSocket, which has no exchange for it."""

    context: HttpContext
    exchange: Exchange | None
    principal: Principal
    backlog_bytes: int = 0
    _request: Request | None = None
    _frames: deque[bytes] = attrs.field(factory=deque)
    #: The latest position that was not returned yet.
    _place: QueuePosition | None = None
    #: Whether there is news of its worker that was not returned yet.
    _worker_changed: bool = False
    _reader: FrameReader | None = None
    _refusal: HttpError | None = None
    _changed: trio.Event = attrs.field(factory=trio.Event)

    @property
    def relay(self) -> Relay:
        """The relay of the request."""
        return self.context.relay

    @property
    def request(self) -> Request:
        """The held request; set by `submit` or `attach`."""
        assert self._request is not None
        return self._request

    @property
    def live(self) -> bool:
        """Whether more frames may still arrive."""
        return self._refusal is None and not self.request.log.ended

    @property
    def queued(self) -> bool:
        """Whether the request waits for a worker."""
        return self.request.entry.state is State.QUEUED

    def place(self) -> QueuePosition | None:
        """Where it stands in its queue at this moment; None when it is in none."""
        return self.relay.scheduler.position(self.request.entry, trio.current_time())

    def wake(self) -> None:
        """Wake the task that waits for the next event."""
        self._changed.set()

    # -- as a sink

    def send_frames(self, frames: list[bytes], size: int) -> None:
        """Buffer frames for `next_event`."""
        self._frames.extend(frames)
        self.backlog_bytes += size
        self.relay.stats.out_bytes += size
        self.wake()

    def on_all_sent(self, reader: FrameReader) -> None:
        """The reader has delivered all frames."""
        if self._reader is reader:
            self._reader = None
        self.wake()

    def on_read_error(self, reader: FrameReader) -> None:
        """The rest of the result cannot be read."""
        if self._reader is reader:
            self._reader = None
            message = "the relay cannot read the result from its disk; see its log, and submit the request again"
            self._refuse(HttpError(ErrorCode.INTERNAL, message))

    # -- as a holder

    def on_accepted(self, request: Request) -> None:
        """The request is durable in the store."""
        self.wake()

    def on_rejected(self, request: Request, refusal: Rejected) -> None:
        """The request was rejected."""
        self._refuse(HttpError.of(refusal))

    def on_position(self, request: Request, place: QueuePosition) -> None:
        """The request has a new position in the queue; it replaces one that was not returned yet."""
        self._place = place
        self.wake()

    def on_worker(self, request: Request) -> None:
        """The request's worker is away, or a worker runs it again."""
        self._worker_changed = True
        self.wake()

    def on_input_stored(self, request: Request, name: str, *, again: bool = False) -> None:
        """More of a live input is stored, or there is room for more."""
        self.wake()

    def on_ended(self, request: Request) -> None:
        """The request has ended and needs no holder."""
        self.wake()

    def _refuse(self, refusal: HttpError) -> None:
        self._refusal = refusal
        self.wake()

    # -- lifecycle

    async def submit(self, submit: Submit, inputs: Mapping[str, bytes]) -> None:
        """Submit a request, or attach to it if it was submitted before.

        Raises:
            HttpError: the request is rejected.
        """
        request = self.context.admission.submit(submit, self.principal, self)
        if isinstance(request, Rejected):
            raise HttpError.of(request)
        self.attach(request)
        for name, data in inputs.items():
            for offset in range(0, len(data), MAX_INPUT_CHUNK_BYTES):
                piece = data[offset : offset + MAX_INPUT_CHUNK_BYTES]
                chunk = Input(request_id=request.request_id, name=name, offset=offset, data=piece)
                self.context.admission.add_input(request, chunk, self)
                await trio.lowlevel.checkpoint()  # hashing 32 MiB at once would delay all streams

    def attach(self, request: Request) -> None:
        """Hold an existing request."""
        self._request = request
        if request.live and request.principal == self.principal.name:
            request.hold(self)
        self._place = self.place()
        self._worker_changed = request.entry.worker_lost_at is not None
        if self.exchange is not None:
            self.exchange.waits_for = self
        else:
            self.context.streams.add(self)

    def start_reading(self, attempt: int = 0, after_seq: int = -1) -> None:
        """Start reading the frames after `after_seq` of `attempt`; 0 means the current attempt.

        Raises:
            HttpError: the result is no longer kept.
        """
        if not self.request.has_result:
            raise HttpError(
                ErrorCode.REQUEST_NOT_FOUND,
                f"request {self.request.request_id} has {self.request.entry.state}, and its result is no longer kept; "
                "submit it again with a new id",
            )
        if attempt > self.request.entry.attempt and self.request.live:
            self.relay.workers.adopt_later_attempt(self.request, attempt)
        seq = self.request.log.resume_seq(attempt, after_seq)
        self._reader = FrameReader(self.request.request_id, self.request.log, self, seq)
        self.relay.mark_busy("requests", self.request.request_id)
        self._reader.open()

    async def wait_accepted(self) -> None:
        """Wait until the request is accepted, which means durable in the store, or has ended.

        Raises:
            HttpError: the request is rejected, or the relay is shutting down.
        """
        await trio.lowlevel.checkpoint()
        while not self.request.accepted and self.request.live:
            await self._wait()
        if self._refusal is not None:
            raise self._refusal

    async def next_event(self) -> Event | None:
        """Return the next frame, position or news of the worker; None after the last frame.

        Raises:
            HttpError: the request is rejected, its result is lost, or the relay is shutting down.
        """
        await trio.lowlevel.checkpoint()
        while True:
            if self._worker_changed:
                self._worker_changed = False
                if self.request.entry.state is State.RUNNING:
                    return self.request.worker_message()
            if self._frames:
                data = self._frames.popleft()
                self.backlog_bytes -= len(data)
                if self.backlog_bytes < LOW_WATER_BYTES and self._reader is not None:
                    self._reader.pump()
                frame = decode(data, FRAMES)
                assert isinstance(frame, Frame)
                return frame
            place, self._place = self._place, None
            if place is not None and self.queued:
                return self.request.queued_message(place)
            if self.request.log.ended and self._reader is None and self._refusal is None:
                return None
            await self._wait()

    def __aiter__(self) -> "RequestStream":
        return self

    async def __anext__(self) -> Event:
        if (event := await self.next_event()) is None:
            raise StopAsyncIteration
        return event

    async def _wait(self) -> None:
        if self._refusal is not None:
            raise self._refusal
        if self.context.leaving:
            message = "the relay is shutting down and keeps the request; ask again when it is back"
            raise HttpError(ErrorCode.SHUTTING_DOWN, message, retry_after_s=5.0)
        await self._changed.wait()
        self._changed = trio.Event()

    def close(self, *, cancel: str | None = None) -> None:
        """Stop reading and holding the request.

        Args:
            cancel: the reason to cancel the request with, unless it has other holders; None starts its resume window.
        """
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        if self.exchange is not None:
            self.exchange.waits_for = None
        self.context.streams.discard(self)
        request = self._request
        if request is None or self not in request.holders:
            return
        request.release(self, trio.current_time())
        if cancel is not None and request.live and not request.holders:
            self.relay.cancel_group(request, cancel)


@asynccontextmanager
async def open_submission(
    http: HttpRequest,
    submit: Submit,
    inputs: Mapping[str, bytes] | None = None,
    *,
    keep: bool = False,
    known: bool = False,
) -> AsyncIterator[RequestStream]:
    """Submit a request for the client that sent `http`; in the block it is accepted and held.

    Args:
        http: the HTTP request.
        submit: the request to submit.
        inputs: the data of the inputs that `submit` announces, by name.
        keep: if true, no frames are read, and the end of the block leaves the request as a disconnected client does.
            If false, frames are read from the first on, and the end of the block cancels the request.
        known: whether the client chose the id. Then it asks again where it got no answer, and must find the request.

    Raises:
        HttpError: the request is rejected.

    Cancellation: cancels the request, unless it is `known`, or was accepted and `keep` is true.
    """
    principal = principal_of(http)
    reasons = ("the HTTP client disconnected", "the HTTP response ended before the request")
    async with _hold(
        RequestStream(context_of(http), exchange_of(http), principal), submit, inputs, keep, known, reasons
    ) as held:
        yield held


@asynccontextmanager
async def hold_submission(
    context: HttpContext,
    principal: Principal,
    submit: Submit,
    inputs: Mapping[str, bytes] | None = None,
    *,
    keep: bool = False,
    known: bool = False,
) -> AsyncIterator[RequestStream]:
    """As `open_submission`, for a holder that is no HTTP request: a WebSocket may hold several at once.

    Each counts as one of the requests a second that `principal` may send.

    Raises:
        HttpError: the request is rejected.

    Cancellation: as for `open_submission`.
    """
    if wait_s := context.relay.principals.request_wait_s(principal, context.relay.config.limits.principal):
        raise HttpError(ErrorCode.RATE_LIMITED, too_fast(principal.name), retry_after_s=wait_s)
    reasons = ("the client disconnected", "the client has left the request before its end")
    async with _hold(RequestStream(context, None, principal), submit, inputs, keep, known, reasons) as held:
        yield held


@asynccontextmanager
async def _hold(
    held: RequestStream,
    submit: Submit,
    inputs: Mapping[str, bytes] | None,
    keep: bool,
    known: bool,
    reasons: tuple[str, str],
) -> AsyncIterator[RequestStream]:
    """See `open_submission`; `reasons` are those of a cancel, before the block ends in order and then."""
    cancel = None if known else reasons[0]
    try:
        await held.submit(submit, inputs or {})
        if not keep:
            held.start_reading()
        await held.wait_accepted()
        cancel = None if keep else cancel
        yield held
        cancel = cancel and reasons[1]
    finally:
        held.close(cancel=cancel)


@asynccontextmanager
async def open_reader(
    http: HttpRequest, request: Request, attempt: int = 0, after_seq: int = -1
) -> AsyncIterator[RequestStream]:
    """Hold an existing request until the block ends, and read its frames after `after_seq`.

    Raises:
        HttpError: its result is no longer kept.
    """
    held = RequestStream(context_of(http), exchange_of(http), principal_of(http))
    try:
        held.attach(request)
        held.start_reading(attempt, after_seq)
        await trio.lowlevel.checkpoint()
        yield held
    finally:
        held.close()


def cache_header(request: Request) -> dict[str, str]:
    """Return the header that says that the frames of a request are those of an equal one; none if they are not."""
    return {"x-relay-cache": "hit"} if request.entry.copied else {}


def find_request(http: HttpRequest, request_id: str) -> Request:
    """Return the request with this id, if it belongs to the principal.

    Raises:
        HttpError: the request is unknown, or belongs to another principal.
    """
    return _find(http, principal_of(http), request_id)


def find_result(http: HttpRequest, request_id: str) -> Request:
    """Return the request with this id, to read its result: by a token, or by a link that is for this one alone.

    Raises:
        HttpError: as for `find_request`; or the link is not valid.
    """
    return _find(http, principal_by_link(http, request_id), request_id)


def _find(http: HttpRequest, principal: Principal, request_id: str) -> Request:
    request = access.find_request(context_of(http).relay, principal, request_id)
    if isinstance(request, Rejected):
        raise HttpError.of(request)
    return request


async def wait_safe(http: HttpRequest, request: Request) -> None:
    """Wait until the status of a request is stored: a relay that is killed must not forget what it reported.

    Raises:
        HttpError: the disk cannot store it.
    """
    if (refusal := await context_of(http).relay.finalizer.wait_safe(request)) is not None:
        raise HttpError.of(refusal)
