"""The relay's state, and how requests start and end. Spaces and workers have modules of their own.

Plain functions change the state, without a checkpoint in between; `apply` carries out the scheduler's decisions by
queueing messages on links and posting changes to the store. `relayd.core.admission` admits requests,
`relayd.requests.deadlines` has their tasks.
"""

import time
from collections.abc import Callable, Iterable
from functools import partial

import attrs
import structlog
import trio

from protocol.wire.codec import encode
from protocol.wire.errors import EncodeError, ErrorCode
from protocol.wire.frames import (
    MAX_TEXT_CHARS,
    Cancelled,
    Failed,
)
from protocol.wire.messages import (
    Ack,
)
from protocol.wire.validators import Value
from relayd.config.schema import Config
from relayd.core.clock import RelayClock
from relayd.core.copies import Copies
from relayd.core.feeds import Feeds
from relayd.core.finalize import Finalizer
from relayd.core.interfaces import ClientPort, ConnectionPort, TalksPort, Watcher, WorkerPort
from relayd.core.principals import Principals
from relayd.core.retention import Retention
from relayd.core.spaces import Spaces
from relayd.core.timeout_messages import feed_timeout_message, queue_timeout_message, run_timeout_message
from relayd.core.workers import MAX_STEP_CHARS, Workers
from relayd.frames.frame_log import FrameReader
from relayd.logs.recent import MAX_AUDIT, MAX_EVENTS, RecentRows
from relayd.requests.deadlines import watch_deadlines
from relayd.requests.outcome import Outcome
from relayd.requests.request import Expiry, Request
from relayd.scheduling.model import Decision, Enter, Finish, Requeue, Start, State, Stop, Wait
from relayd.scheduling.scheduler import Scheduler
from relayd.stats.counters import Stats
from relayd.store.base import Store, StoreError
from relayd.store.records import COPIED, UpdateRequest

log = structlog.get_logger("relayd")

#: The message of a request that failed because of an error in the relay's own code.
BROKEN = "internal error in this request; see the relay's log"


@attrs.define(eq=False)
class Relay:
    """The daemon's state: requests and connections here; `spaces`, `workers` and `results` as fields."""

    config: Config
    store: Store
    nursery: trio.Nursery
    scheduler: Scheduler = attrs.field(factory=Scheduler)
    requests: dict[str, Request] = attrs.field(factory=dict)
    connections: dict[str, ConnectionPort] = attrs.field(factory=dict)
    clients: dict[str, ClientPort] = attrs.field(factory=dict)
    watchers: set[Watcher] = attrs.field(factory=set)
    #: The conversations; None without [talk].
    talks: TalksPort | None = None
    #: Set whenever a queue has moved, so that positions have to be sent.
    positions_changed: trio.Event = attrs.field(factory=trio.Event)
    #: Set when the daemon accepts nothing new and exits once the running requests have ended.
    draining: trio.Event = attrs.field(factory=trio.Event)
    started_at: float = attrs.field(factory=trio.current_time)
    clock: RelayClock = attrs.field(factory=RelayClock)
    spaces: Spaces = attrs.field(init=False)
    workers: Workers = attrs.field(init=False)
    results: Retention = attrs.field(init=False)
    finalizer: Finalizer = attrs.field(init=False)
    copies: Copies = attrs.field(init=False)
    feeds: Feeds = attrs.field(init=False)
    stats: Stats = attrs.field(factory=Stats)
    principals: Principals = attrs.field(factory=Principals)
    #: Recent log events, and recent actions of operators.
    events: RecentRows = attrs.field(factory=lambda: RecentRows(MAX_EVENTS))
    #: Recent actions of operators.
    audit: RecentRows = attrs.field(factory=lambda: RecentRows(MAX_AUDIT))
    #: The URLs on which the relay listens; empty until it does.
    urls: list[str] = attrs.field(factory=list)
    #: Number of frames that were dropped because their attempt was over.
    fenced_frames: int = 0
    #: Number of connections that were closed because their clients read nothing.
    slow_consumers: int = 0
    #: Records of the store that could not be read or restored when the relay started.
    records_set_aside: int = 0
    _ticket: int = 0

    def __attrs_post_init__(self) -> None:
        self.spaces = Spaces(self)
        self.workers = Workers(self, self.spaces)
        self.results = Retention(self)
        self.finalizer = Finalizer(self, self.results)
        self.copies = Copies(self, self.results.cache, self.results.memory)
        self.feeds = Feeds(self)

    # -- requests

    def now_unix(self) -> float:
        """Return the wall-clock time in Unix seconds: for display only, never for a deadline."""
        return time.time()

    def next_ticket(self) -> int:
        """Return the next number in the order of arrival."""
        self._ticket += 1
        return self._ticket

    def add_request(self, request: Request) -> None:
        """Add a request whose entry is in the scheduler already, and start the task that watches its deadlines."""
        self.requests[request.request_id] = request
        self.results.track(request)
        self._ticket = max(self._ticket, request.entry.ticket)
        nursery = self.spaces[request.submit.space].nursery
        assert nursery is not None
        nursery.start_soon(
            watch_deadlines,
            request,
            lambda: self.config.limits,
            self.expire,
            self.fail_internal,
            name=f"request {request.request_id}",
        )
        self.mark_changed("requests", request.request_id)

    def remove_request(self, request: Request) -> None:
        """Remove a request that has ended or was never accepted."""
        self.requests.pop(request.request_id, None)
        self.results.forget(request)
        self.mark_changed("requests", request.request_id)

    def cancel(self, request: Request, reason: str) -> None:
        """Cancel a request, whether it is queued or running."""
        self.apply(self.scheduler.cancel(request.request_id, reason))

    def cancel_group(self, request: Request, reason: str) -> list[Request]:
        """Cancel a request that somebody wants to end, and the others of its group; returns those that were live."""
        group = request.submit.group
        live = [request] if request.live else []
        if group is not None:
            others = [each for each in self.live_requests() if each is not request and each.submit.group == group]
            live += [each for each in others if each.principal == request.principal]
        for each in live:
            if each.live:
                self.cancel(each, reason)
        return live

    def fail(self, request: Request, code: ErrorCode, message: str) -> None:
        """End a request as failed, and stop its attempt if it is running."""
        self.apply(self.scheduler.fail(request.request_id, code, message))

    def fail_internal(self, request: Request) -> None:
        """Fail a request after an error in the relay's own code, whatever state it is in. Never raises."""
        try:
            self.fail(request, ErrorCode.INTERNAL, BROKEN)
        except Exception:
            log.exception("internal error in request", request_id=request.request_id)
        self._drop_broken(request)

    def set_aside(self, request_id: str) -> None:
        """Fail a stored request that cannot be restored, so that no later start tries it again. Never raises."""
        if (request := self.requests.get(request_id)) is not None:
            self._drop_broken(request)
        else:
            self.scheduler.end(request_id, State.FAILED, trio.current_time())
            self.store.post(_broken_update(request_id))

    def _drop_broken(self, request: Request) -> None:
        """End a live request without encoding anything of it, as that may be what failed before.

        Its readers are closed, and its failure is stored, so that it is not restored after a restart.
        The steps are independent: if one fails, the others are still done.
        """
        if not request.live:
            return
        request_id, entry, holders = request.request_id, request.entry, tuple(request.holders)
        worker_id, now = entry.worker_id or "", trio.current_time()
        request.holders.clear()
        request.ended_at, request.code, request.message = now, ErrorCode.INTERNAL.value, BROKEN
        request.has_result = False

        def stop() -> None:
            if (port := self.workers.get(worker_id)) is not None:
                port.cancel(request_id, BROKEN)

        def store() -> None:
            if request.uploaded:
                self.store.post(_broken_update(request_id))

        def close(reader: FrameReader) -> None:
            reader.close()
            reader.sink.on_read_error(reader)

        steps: list[Callable[[], object]] = [
            stop,
            store,
            lambda: self.stats.count_ended(request, State.FAILED, now),
            *(partial(close, reader) for reader in tuple(request.log.readers)),
            *(partial(holder.on_ended, request) for holder in holders),
            request.release_run_data,
            lambda: self.apply(self.scheduler.end(request_id, State.FAILED, now)),
            request.wake,
            lambda: self.mark_changed("requests", request_id),
        ]
        entry.state = State.FAILED  # so that its task ends even if a step fails
        for step in steps:
            try:
                step()
            except Exception:
                log.exception("internal error in request", request_id=request_id)

    def live_requests(self) -> list[Request]:
        """Return the requests that have not ended."""
        return [self.requests[request_id] for request_id in self.scheduler.state.entries]

    @property
    def has_live_requests(self) -> bool:
        """Whether any has not ended."""
        return bool(self.scheduler.state.entries)

    @property
    def running_count(self) -> int:
        """Number of running requests in all spaces together."""
        return sum(len(space.running) for space in self.scheduler.state.spaces.values())

    def acknowledge(self, worker_id: str, ack: Ack) -> None:
        """Send `ack` to a worker, if it is connected: it may forget the attempt."""
        if port := self.workers.get(worker_id):
            port.acknowledge(ack)

    def sample(self, now: float) -> None:
        """Compute rates from the counters, and end the rests that are over."""
        self.workers.end_rests(now)
        self.stats.sample(now, self.live_requests(), self.clients, self.spaces, self.scheduler.state.workers)

    def expire(self, request: Request, expiry: Expiry) -> None:
        """Carry out the consequence of a deadline that has passed."""
        request_id = request.request_id
        match expiry:
            case Expiry.NOBODY_HOLDS:
                self.cancel(request, "its client disconnected and did not return")
            case Expiry.QUEUE_TIMEOUT:
                space = request.submit.space
                message = queue_timeout_message(
                    request,
                    is_paused=self.scheduler.state.spaces[space].paused,
                    is_served=self.workers.serving(space),
                )
                self.fail(request, ErrorCode.QUEUE_TIMEOUT, message)
            case Expiry.RUN_TIMEOUT:
                self.fail(request, ErrorCode.RUN_TIMEOUT, run_timeout_message(request))
            case Expiry.IDLE_TIMEOUT:
                message = f"its worker sent nothing for {request.idle_timeout_s:g} s, its space's idle_timeout_s"
                self.workers.count_engine_failure(request.entry.worker_id or "")
                self.workers.lose_attempt(request_id, ErrorCode.IDLE_TIMEOUT, message)
            case Expiry.FEED_TIMEOUT:
                message = feed_timeout_message(request, self.config.limits.feed_idle_timeout_s)
                self.fail(request, ErrorCode.FEED_TIMEOUT, message)
            case Expiry.WORKER_GONE:
                message = f"worker {request.entry.worker_id or '(before the restart)'} did not reconnect"
                self.workers.lose_attempt(request_id, ErrorCode.WORKER_LOST, message)
            case Expiry.CANCEL_UNANSWERED:
                self.apply([Finish(request.entry, None, "its worker did not answer the cancel message")])

    def apply(self, decisions: Iterable[Decision]) -> None:
        """Carry out the scheduler's decisions; one that cannot be carried out ends its own request and no other."""
        for decision in decisions:
            try:
                self._carry_out_one(decision)
            except Exception:
                request_id = decision.request_id if isinstance(decision, Stop) else decision.entry.request_id
                log.exception("internal error in request", request_id=request_id)
                if (request := self.requests.get(request_id)) is not None:
                    # A request that cannot be started can still be ended with a frame; one that cannot be stopped or
                    # ended is dropped.
                    can_end = isinstance(decision, Start | Requeue | Wait | Enter)
                    end = self.fail_internal if can_end else self._drop_broken
                    end(request)
                if isinstance(decision, Start):  # the worker never received it, so it will not release the slot
                    entry, now = decision.entry, trio.current_time()
                    self.apply(self.scheduler.release(entry.worker_id or "", request_id, entry.attempt, now))
        self.wake_positions()

    def _carry_out_one(self, decision: Decision) -> None:
        match decision:
            case Start():
                self._start(self.requests[decision.entry.request_id], decision.from_seq)
            case Stop():
                if request := self.requests.get(decision.request_id):
                    request.stopped_at = trio.current_time()
                    request.add_timeline("stopping", why=decision.reason[:MAX_STEP_CHARS])
                    request.wake()
                    self.mark_changed("requests", request.request_id)
                    if request.entry.cancel_reason is not None:
                        self.finalizer.remember_cancel(request)
                if port := self.workers.get(decision.worker_id):
                    port.cancel(decision.request_id, decision.reason)
            case Requeue():
                request = self.requests[decision.entry.request_id]
                request.queued_at = trio.current_time()
                request.stopped_at = None
                request.details = {}
                request.add_timeline("requeued", losses=decision.entry.losses)
                self.stats.count_retried(request)
                request.wake()
                self._log_request(request, "request queued again", losses=decision.entry.losses)
                self.save_status(request)
            case Wait():
                request = self.requests[decision.entry.request_id]
                request.stopped_at = request.last_position_sent = None
                request.add_timeline("waits", sources=len(decision.entry.sources | decision.entry.silent_sources))
                request.wake()
                self._log_request(request, "request waits for its source again")
                self.save_status(request)
            case Enter():
                request = self.requests[decision.entry.request_id]
                request.queued_at = trio.current_time()
                request.add_timeline("queued")
                request.wake()
                self.mark_changed("requests", request.request_id)
            case Finish():
                self._finish(self.requests[decision.entry.request_id], decision.code, decision.message)

    def _start(self, request: Request, from_seq: int) -> None:
        entry = request.entry
        request.begin_attempt(from_seq, trio.current_time())
        request.stopped_at = None
        request.last_position_sent = None
        for name, fed in request.fed.items():
            fed.begin_attempt(patient=self.feeds.is_patient(request, name))
        self.stats.count_started(request, from_seq)
        if entry.attempt > 1:  # nothing of a first one is there before it starts
            request.log.restart(entry.attempt, from_seq)
        request.add_timeline("started", attempt=entry.attempt, worker_id=entry.worker_id, from_seq=from_seq or None)
        if entry.attempt > 1:
            request.notify_worker_state()
        request.wake()
        self.mark_changed("workers", entry.worker_id or "")
        self._log_request(request, "request started", attempt=entry.attempt, worker=entry.worker_id)
        port = self.workers[entry.worker_id or ""]
        if request.submit.retry == "never":
            self.nursery.start_soon(self._assign_once_stored, request, port, entry.attempt, from_seq)
        else:
            self.save_status(request)
            port.assign(request, from_seq)
        self.copies.join_waiting(request)

    async def _assign_once_stored(self, request: Request, port: WorkerPort, attempt: int, from_seq: int) -> None:
        """Assign an attempt once the store knows of it: a relay that is killed must not begin it a second time."""
        try:
            await self.store.commit(self.status_update(request))
        except StoreError as fault:
            log.warning("start of a request not stored", request_id=request.request_id, why=str(fault))
            self.save_status(request)
        if self.workers.get(port.worker_id) is not port:
            return  # its worker is away, or has registered again without it
        try:
            if self.attempt_of(port, request.request_id, attempt) is not None:
                if request.entry.cancel_reason is None:
                    port.assign(request, from_seq)
                    return
                self.apply([Finish(request.entry, None, request.entry.cancel_reason)])
        except Exception:
            log.exception("internal error in request", request_id=request.request_id)
            self.fail_internal(request)
        self.workers.release(port, request.request_id, attempt)  # nothing of it was sent to the worker

    def _finish(self, request: Request, code: ErrorCode | None, message: str) -> None:
        """End a request with a last frame that the relay makes."""
        request_id, attempt, seq = request.request_id, request.entry.attempt, request.log.next_seq
        message = message[:MAX_TEXT_CHARS]  # it may contain text from a worker or a client
        if code is None:
            cancelled = Cancelled(request_id=request_id, attempt=attempt, seq=seq, reason=message)
            self.finish_request(request, encode(cancelled), State.CANCELLED, message=message)
        else:
            failed = Failed(
                request_id=request_id,
                attempt=attempt,
                seq=seq,
                code=code,
                message=message,
                details=request.details | request.delivered(),
                retryable=code.retryable,
            )
            try:
                data = encode(failed)
            except EncodeError:  # the details come from a worker
                failed = attrs.evolve(failed, details=request.delivered())
                data = encode(failed)
            self.finish_request(
                request,
                data,
                State.FAILED,
                code=code,
                message=message,
                details=failed.details,
                retryable=failed.retryable,
            )

    def finish_request(
        self,
        request: Request,
        last_frame: bytes,
        state: State,
        *,
        code: str | None = None,
        message: str | None = None,
        details: dict[str, Value] | None = None,
        retryable: bool | None = None,
        result: dict[str, Value] | None = None,
        pending_ack: tuple[str, Ack] | None = None,
    ) -> None:
        """End a request with its last frame: send it to the readers, store the end and start what can start now.

        Args:
            request: the request; if it has ended already, nothing happens.
            last_frame: the encoded last frame.
            state: how it ended.
            code: the error code if it failed.
            message: the reason of a failure or cancellation, for people.
            details: of a failure.
            retryable: whether a failed request may succeed later.
            result: of a completed request.
            pending_ack: for a last frame from a worker: the worker's id, and the `ack` to send once the end is stored.
        """
        if not request.live:
            return
        request.pending_ack = pending_ack
        now = trio.current_time()
        request.ended_at, request.code, request.message = now, code, message
        request.outcome = Outcome(
            details=details or {},
            retryable=retryable,
            result=result or {},
            run_s=round(now - request.entry.started_at, 3) if request.entry.state is State.RUNNING else None,
            audio_s=request.audio_s,
            has_video=request.video is not None,
            has_outputs=request.has_outputs,
            report=request.report,
        )
        request.details = request.outcome.details
        request.add_timeline(
            "ended", state=str(state), code=code and str(code), why=message and message[:MAX_STEP_CHARS]
        )
        request.release_run_data()
        self.stats.count_ended(request, state, now)
        decisions = self.scheduler.end(request.request_id, state, now)
        # A worker sends its last frame again after a restart, and a request that was not uploaded is not in the store.
        # A repeated `cancelled` would not end the request: see `relayd.core.finalize`.
        send_now = (pending_ack is not None and state is not State.CANCELLED) or not request.uploaded
        if send_now:
            request.log.append(last_frame, ends=True)
        for holder in request.holders:
            holder.on_ended(request)
        request.holders.clear()
        request.wake()
        space = self.spaces[request.submit.space]
        space.ended[state] = space.ended.get(state, 0) + 1
        self._log_request(
            request, f"request {state}", code=code, why=message, took_s=round(now - request.created_at, 3)
        )
        if state is State.COMPLETED:
            self.results.cache.add(request, space.config)
        if request.uploaded:  # it is in the store, or about to be
            self.finalizer.finalize(request, None if send_now else last_frame)
        self.apply(decisions)
        self.copies.copy_passed_over(space.name)

    def add_report(self, request: Request, text: str) -> None:
        """Add what an attempt printed, which may come after the end that the relay has made."""
        request.add_report(text)
        if not request.live and request.has_result:  # without one it may be broken, and nothing of it is encoded again
            request.outcome = attrs.evolve(request.outcome, report=request.report)
            self.save_status(request)
            self.mark_changed("requests", request.request_id)

    def is_finalizing(self, request: Request) -> bool:
        """Whether the end of a request is not stored yet."""
        return request in self.finalizer.unfinalized

    def has_pending_ack(self, request_id: str, attempt: int) -> bool:
        """Whether this attempt has ended its request, and is acknowledged as soon as the end is stored."""
        request = self.requests.get(request_id)
        return request is not None and request.pending_ack is not None and request.pending_ack[1].attempt == attempt

    def save_status(self, request: Request) -> None:
        """Post the status of a request to the store."""
        self.store.post(self.status_update(request))

    def status_update(self, request: Request) -> UpdateRequest:
        """Return the status of a request as a record for the store."""
        entry = request.entry
        since = request.ended_at or (entry.started_at if entry.state is State.RUNNING else request.queued_at)
        return UpdateRequest(
            request_id=request.request_id,
            state=entry.state,
            attempt=entry.attempt,
            highest_attempt=entry.highest_attempt,
            losses=entry.losses,
            has_output=entry.has_output,
            reproducible=entry.reproducible,
            stopping=entry.cancel_reason,
            worker_id=COPIED if entry.copied else entry.worker_id,
            promoted=entry.promoted,
            since=self.clock.of(since),
            away_since=None if entry.worker_lost_at is None else self.clock.of(entry.worker_lost_at),
            ended_at=time.time() if request.ended_at is not None else None,
            code=request.code,
            message=request.message,
            outcome=request.outcome.pack() if request.ended_at is not None else None,
        )

    # -- frames from workers; in this class, since another lookup would cost time for every frame

    def attempt_of(self, port: WorkerPort, request_id: str, attempt: int) -> Request | None:
        """Return the live request that this worker runs as this attempt; None if that attempt is over."""
        request = self.requests.get(request_id)
        if request is None or not request.live:
            return None
        entry = request.entry
        return request if (entry.attempt, entry.worker_id) == (attempt, port.worker_id) else None

    def on_first_output(self, request: Request) -> None:
        """Note the first output of a request or of an attempt."""
        if not request.entry.has_output:
            request.entry.has_output = True
            self.save_status(request)  # after a restart, the relay must know that output was delivered
        if request.first_frame_at is None:
            request.first_frame_at = now = request.last_frame_at
            request.add_timeline("first_frame")
            self.stats.observe_first_frame(request, now)
            self.mark_changed("requests", request.request_id)

    async def read_input(self, request: Request, name: str) -> bytes | None:
        """Read an input of an accepted request from the store; None if the request has ended."""
        try:
            data = await self.store.read_input(request.request_id, name)
            if len(data) != request.submit.inputs[name].size:  # its worker would wait for the rest
                raise StoreError(f"it has {len(data)} bytes; {request.submit.inputs[name].size} were announced")
        except (StoreError, KeyError) as fault:
            if request.live:
                log.error("input lost", request_id=request.request_id, input=name, why=repr(fault))
                self.fail(request, ErrorCode.INTERNAL, f"the relay lost input {name!r}; send the request again")
            return None
        return data if request.live else None

    # -- watchers

    def mark_changed(self, topic: str, key: str) -> None:
        """Notify the watchers that a row may have changed."""
        for watcher in self.watchers:
            watcher.mark_changed(topic, key)

    def mark_busy(self, topic: str, key: str) -> None:
        """Like `mark_changed`, for a row that changes all the time and is sent once a second."""
        for watcher in self.watchers:
            watcher.mark_busy(topic, key)

    def wake_positions(self) -> None:
        """Wake the task that sends positions if a queue has moved."""
        if self.scheduler.state.moved:
            self.positions_changed.set()

    def _log_request(self, request: Request, event: str, **more: object) -> None:
        log_event = log.warning if request.entry.state is State.FAILED else log.info
        log_event(
            event,
            request_id=request.request_id,
            space=request.submit.space,
            principal=request.principal,
            **{key: value for key, value in more.items() if value is not None},
        )
        self.mark_changed("requests", request.request_id)


def _broken_update(request_id: str) -> UpdateRequest:
    """Return the stored status of a request that was dropped; its attempt number may be the fault, so it is 1."""
    return UpdateRequest(
        request_id=request_id,
        state=State.FAILED,
        attempt=1,
        losses=0,
        ended_at=time.time(),
        code=ErrorCode.INTERNAL.value,
        message=BROKEN,
    )
