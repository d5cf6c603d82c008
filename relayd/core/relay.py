"""The relay's state: spaces, workers, requests and clients, and every change to them.

Changes are made by plain functions, in one piece; what the scheduler decides is carried out here, by messages that are
queued on links and by changes posted to the store. See `relayd.core.admission` for how a request gets in,
`relayd.core.space` and `relayd.requests.deadlines` for the tasks.
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
    Register,
    Rejected,
)
from protocol.wire.validators import Value
from relayd.config.schema import Config, SpaceConfig
from relayd.core.interfaces import ClientPort, ConnectionPort, Watcher, WorkerPort
from relayd.core.retention import Retention
from relayd.core.space import Space as Space
from relayd.core.space import rules_of, serve_space
from relayd.frames.frame_log import FrameReader
from relayd.logs.recent import MAX_AUDIT, MAX_EVENTS, RecentRows
from relayd.requests.deadlines import watch_deadlines
from relayd.requests.request import UNHEARD_GRACE_S, Expiry, Request
from relayd.scheduling.model import Decision, Finish, Registration, Requeue, Start, State, Stop, WorkerState
from relayd.scheduling.scheduler import Scheduler
from relayd.stats.counters import Stats
from relayd.store.base import Store, StoreError
from relayd.store.records import PutSpace, SpaceRecord, UpdateRequest

log = structlog.get_logger("relayd")

#: Of the words in a request's steps.
MAX_STEP_CHARS = 200
#: The whole message of a request over which the relay's own code failed.
BROKEN = "internal error in this request; see the relay's log"


@attrs.define(eq=False)
class Relay:
    """All that the daemon knows."""

    config: Config
    store: Store
    nursery: trio.Nursery
    scheduler: Scheduler = attrs.field(factory=Scheduler)
    spaces: dict[str, Space] = attrs.field(factory=dict)
    requests: dict[str, Request] = attrs.field(factory=dict)
    workers: dict[str, WorkerPort] = attrs.field(factory=dict)
    connections: dict[str, ConnectionPort] = attrs.field(factory=dict)
    clients: dict[str, ClientPort] = attrs.field(factory=dict)
    watchers: set[Watcher] = attrs.field(factory=set)
    #: Set whenever a queue moved: places are to be told.
    positions_changed: trio.Event = attrs.field(factory=trio.Event)
    #: Set when the daemon takes nothing new and leaves once what runs has ended.
    draining: trio.Event = attrs.field(factory=trio.Event)
    started_at: float = attrs.field(factory=trio.current_time)
    results: Retention = attrs.field(init=False)
    stats: Stats = attrs.field(factory=Stats)
    #: What was logged, and what was steered, of late.
    events: RecentRows = attrs.field(factory=lambda: RecentRows(MAX_EVENTS))
    audit: RecentRows = attrs.field(factory=lambda: RecentRows(MAX_AUDIT))
    #: Of its doors, once they are open.
    urls: list[str] = attrs.field(factory=list)
    #: Frames of attempts that were over: dropped.
    fenced_frames: int = 0
    #: Connections that were cut off because they took nothing.
    slow_consumers: int = 0
    _ticket: int = 0

    def __attrs_post_init__(self) -> None:
        self.results = Retention(self)

    # -- spaces

    async def open_space(self, space: Space, *, paused: bool = False) -> None:
        """Open a space that is not open."""
        await self.nursery.start(serve_space, space)  # first: a request that finds the space needs its nursery
        self.spaces[space.name] = space
        self.scheduler.add_space(space.name, rules_of(space.config), paused=paused)
        self.mark_changed("spaces", space.name)

    def close_space(self, name: str) -> Rejected | None:
        """Close a space that is at rest."""
        if refusal := self.scheduler.remove_space(name):
            return refusal
        self.spaces.pop(name).closed.set()
        self.mark_changed("spaces", name)
        return None

    def change_space(self, space: Space, config: SpaceConfig) -> None:
        """Give an open space other settings. Requests that are there keep the timeouts that they came in with."""
        space.config = config
        self.apply(self.scheduler.set_rules(space.name, rules_of(config), trio.current_time()))
        self.store.post(PutSpace(self.space_record(space)))
        self.mark_changed("spaces", space.name)

    def set_paused(self, name: str, paused: bool) -> Rejected | None:
        """Pause or resume a space."""
        if not paused:
            decisions = self.scheduler.resume_space(name, trio.current_time())
            if isinstance(decisions, Rejected):
                return decisions
            self.apply(decisions)
        elif refusal := self.scheduler.pause_space(name):
            return refusal
        self._wake_positions()
        self.store.post(PutSpace(self.space_record(self.spaces[name])))
        log.info("space paused" if paused else "space resumed", space=name)
        return None

    def space_record(self, space: Space) -> SpaceRecord:
        """A space as the store keeps it."""
        return SpaceRecord(
            name=space.name,
            config=space.config,
            paused=self.scheduler.state.spaces[space.name].paused,
            made_by=space.made_by,
            engine=space.engine,
            params=space.params,
            inputs=space.inputs,
            format=space.format,
            created_at=space.created_at,
        )

    # -- workers

    def register(self, port: WorkerPort, register: Register) -> Rejected | Registration:
        """A worker registers; what it is to resume and abandon comes back, what else follows is carried out."""
        now = trio.current_time()
        before = self.workers.get(port.worker_id)
        if before is not None and before.principal_name != port.principal_name:
            message = f"worker {port.worker_id!r} belongs to another principal; give this one another --name"
            return Rejected.because(ErrorCode.FORBIDDEN, message)
        worker = WorkerState(
            worker_id=port.worker_id,
            instance=register.instance,
            spaces=tuple(register.spaces),
            slots=register.slots,
            reproducible=_words_of_output(register),
        )
        joined = self.scheduler.join(worker, {r.request_id: r.attempt for r in register.running}, now)
        if isinstance(joined, Rejected):
            return joined
        self.workers[port.worker_id] = port
        stats = self.stats.worker(port.worker_id)
        stats.name, stats.engine, stats.agent = register.worker, register.engine, port.agent
        stats.principal, stats.peer = port.principal_name, port.peer
        self.stats.count_registration(port.worker_id, register.spaces)
        if before is not None:
            before.disconnect("the same worker connected anew")
        for name in register.spaces:
            space = self.spaces[name]
            space.engine, space.params, space.inputs = register.engine, register.params, register.inputs
            space.format = register.format
            self.store.post(PutSpace(self.space_record(space)))
            self.mark_changed("spaces", name)
        for entry in joined.resume:
            request = self.requests[entry.request_id]
            request.resumed()
            self.stats.count_resumed(request)
            self.save_status(request)  # it may have been queued again, or be further than the store knew
            self.mark_changed("requests", entry.request_id)
        self.mark_changed("workers", port.worker_id)
        self._wake_positions()
        return joined

    def finish_registration(self, register: Register, worker_id: str, joined: Registration) -> None:
        """Carry out what follows from a registration that was answered.

        A process of the same name that is away is not awaited any longer if this one has its place: what ran there
        is lost. Where there is room for both, they may be two that were cut off together.
        """
        mine = worker_id.removesuffix(register.instance[:8])
        for worker in list(self.scheduler.state.workers.values()):
            name = worker.worker_id.removesuffix(worker.instance[:8])
            if not worker.linked and name == mine and self.scheduler.is_replaced(worker):
                for request_id in list(worker.held):
                    self.lose_attempt(request_id, ErrorCode.WORKER_LOST, f"worker {worker.worker_id} was started anew")
        self.apply(joined.decisions)

    def unlink(self, port: WorkerPort) -> None:
        """A worker's connection is gone; it has its time to come back."""
        if self.workers.get(port.worker_id) is not port:
            return  # it has come back already
        del self.workers[port.worker_id]
        self.stats.worker(port.worker_id).heard_at = port.received_at
        for entry in self.scheduler.unlink(port.worker_id, trio.current_time()):
            request = self.requests[entry.request_id]
            request.worker_grace_s = self.config.limits.worker_grace_s
            if not entry.has_output:
                request.worker_grace_s = min(UNHEARD_GRACE_S, request.worker_grace_s)
            request.add_timeline("worker_away", worker_id=port.worker_id)
            request.wake()
            self.mark_changed("requests", entry.request_id)
        self.mark_changed("workers", port.worker_id)
        self._wake_positions()

    def update_registration(self, port: WorkerPort, register: Register) -> None:
        """A worker has more or fewer slots than before, or others, which make other samples."""
        self.scheduler.state.workers[port.worker_id].reproducible = _words_of_output(register)
        self.apply(self.scheduler.set_slots(port.worker_id, register.slots, trio.current_time()))
        self.mark_changed("workers", port.worker_id)

    def drain_worker(self, worker_id: str) -> None:
        """Hand a worker nothing new."""
        self.scheduler.drain(worker_id)
        log.info("worker drains", worker=worker_id)
        self.mark_changed("workers", worker_id)
        self._wake_positions()

    def undrain_worker(self, worker_id: str) -> None:
        """Hand a worker requests again."""
        self.apply(self.scheduler.undrain(worker_id, trio.current_time()))
        log.info("worker takes requests again", worker=worker_id)
        self.mark_changed("workers", worker_id)

    # -- requests

    def now_unix(self) -> float:
        """The wall clock, Unix seconds; for people alone, never for a deadline."""
        return time.time()

    def next_ticket(self) -> int:
        """The next number in order of arrival."""
        self._ticket += 1
        return self._ticket

    def add_request(self, request: Request) -> None:
        """Take a request in whose entry the scheduler has; its task watches its deadlines from now on."""
        self.requests[request.request_id] = request
        self.results.track(request)
        self._ticket = max(self._ticket, request.entry.ticket)
        nursery = self.spaces[request.submit.space].nursery
        assert nursery is not None
        nursery.start_soon(
            watch_deadlines,
            request,
            self.config.limits,
            self.expire,
            self.fail_internal,
            name=f"request {request.request_id}",
        )
        self.mark_changed("requests", request.request_id)

    def remove_request(self, request: Request) -> None:
        """Drop a request that has ended, or was never accepted."""
        self.requests.pop(request.request_id, None)
        self.results.forget(request)
        self.mark_changed("requests", request.request_id)

    def cancel(self, request: Request, reason: str) -> None:
        """Stop a request, wherever it is."""
        self.apply(self.scheduler.cancel(request.request_id, reason))

    def fail(self, request: Request, code: ErrorCode, message: str) -> None:
        """End a request as failed, and stop what runs of it."""
        self.apply(self.scheduler.fail(request.request_id, code, message))

    def fail_internal(self, request: Request) -> None:
        """End a request over which the relay's own code failed, however broken it is. Never raises."""
        try:
            self.fail(request, ErrorCode.INTERNAL, BROKEN)
        except Exception:
            log.exception("internal error in request", request_id=request.request_id)
        self._drop_broken(request)

    def set_aside(self, request_id: str) -> None:
        """Give up a stored request that cannot be restored, so that no later start tries it again. Never raises."""
        if (request := self.requests.get(request_id)) is not None:
            self._drop_broken(request)
        else:
            self.scheduler.end(request_id, State.FAILED, trio.current_time())
            self.store.post(_broken_update(request_id))

    def _drop_broken(self, request: Request) -> None:
        """End a live request without encoding anything of it: what failed once would fail again here.

        Its readers learn that there are no more frames, and the store that it failed, so that no restart takes it up
        again. Each step stands alone: one that fails keeps none of the others from being done.
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
            if request.accepted:
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
        entry.state = State.FAILED  # whatever becomes of the steps: its task ends
        for step in steps:
            try:
                step()
            except Exception:
                log.exception("internal error in request", request_id=request_id)

    def live_requests(self) -> list[Request]:
        """Those that have not ended."""
        return [self.requests[request_id] for request_id in self.scheduler.state.entries]

    @property
    def running_count(self) -> int:
        """Requests that run, in all spaces together."""
        return sum(len(space.running) for space in self.scheduler.state.spaces.values())

    def acknowledge(self, worker_id: str, ack: Ack) -> None:
        """Have a worker forget an attempt, if it is there."""
        if port := self.workers.get(worker_id):
            port.acknowledge(ack)

    def sample(self, now: float) -> None:
        """Make rates of what was counted."""
        self.stats.sample(now, self.live_requests(), self.clients, self.spaces, self.scheduler.state.workers)

    def expire(self, request: Request, expiry: Expiry) -> None:
        """Carry out what a deadline says."""
        request_id = request.request_id
        match expiry:
            case Expiry.NOBODY_HOLDS:
                self.cancel(request, "its client went away and did not come back")
            case Expiry.QUEUE_TIMEOUT:
                self.fail(
                    request,
                    ErrorCode.QUEUE_TIMEOUT,
                    f"no slot of space {request.submit.space!r} was free within {request.queue_timeout_s:g} s; "
                    "try again later, or with a longer queue_timeout_s",
                )
            case Expiry.RUN_TIMEOUT:
                self.fail(
                    request,
                    ErrorCode.RUN_TIMEOUT,
                    f"it ran for {request.run_timeout_s:g} s; ask for less, or raise run_timeout_s",
                )
            case Expiry.IDLE_TIMEOUT:
                message = f"its worker sent nothing for {request.idle_timeout_s:g} s"
                self.lose_attempt(request_id, ErrorCode.IDLE_TIMEOUT, message)
            case Expiry.WORKER_GONE:
                message = f"worker {request.entry.worker_id or '(before the restart)'} is gone"
                self.lose_attempt(request_id, ErrorCode.WORKER_LOST, message)
            case Expiry.CANCEL_UNANSWERED:
                self.apply([Finish(request.entry, None, "its worker did not answer the cancel")])

    def lose_attempt(self, request_id: str, code: ErrorCode, message: str) -> None:
        """An attempt is lost: tried again, or the request fails, by its retry policy."""
        request = self.requests.get(request_id)
        if request is not None and request.entry.state is State.RUNNING:
            request.add_timeline("lost", code=code.value, why=message[:MAX_STEP_CHARS])
        self.apply(self.scheduler.lose(request_id, code, message, trio.current_time()))

    def adopt_later_attempt(self, request: Request, attempt: int) -> None:
        """A listener has frames of an attempt that the store did not know yet when an earlier relay was killed."""
        decisions = self.scheduler.adopt_later_attempt(request.request_id, attempt, trio.current_time())
        entry = request.entry
        awaited = entry.attempt == attempt and not any(isinstance(each, Finish) for each in decisions)
        if awaited and request.log.next_seq:
            request.log.restart(attempt, 0)  # what has come is the attempt's before it
            self.stats.count_restarted(request)
        self.apply(decisions)

    def apply(self, decisions: Iterable[Decision]) -> None:
        """Do what the scheduler decided; a decision that cannot be carried out ends its own request and no other."""
        for decision in decisions:
            try:
                self._carry_out_one(decision)
            except Exception:
                request_id = decision.request_id if isinstance(decision, Stop) else decision.entry.request_id
                log.exception("internal error in request", request_id=request_id)
                if (request := self.requests.get(request_id)) is not None:
                    # What cannot be started can still be told its end; what cannot be stopped or ended is dropped.
                    end = self.fail_internal if isinstance(decision, Start | Requeue) else self._drop_broken
                    end(request)
                if isinstance(decision, Start):  # its worker has not heard of it, so it will not give the slot back
                    entry, now = decision.entry, trio.current_time()
                    self.apply(self.scheduler.release(entry.worker_id or "", request_id, entry.attempt, now))
        self._wake_positions()

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
                        self.save_status(request)  # a relay that is started again must not let it run on
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
            case Finish():
                self._finish(self.requests[decision.entry.request_id], decision.code, decision.message)

    def _start(self, request: Request, from_seq: int) -> None:
        entry = request.entry
        request.last_frame_at = trio.current_time()
        request.stopped_at = None
        request.last_position_sent = None
        self.stats.count_started(request, from_seq)
        if entry.attempt and (entry.attempt > 1 or request.log.next_seq > from_seq):
            request.log.restart(entry.attempt, from_seq)
        request.add_timeline("started", attempt=entry.attempt, worker_id=entry.worker_id, from_seq=from_seq or None)
        request.wake()
        self.mark_changed("workers", entry.worker_id or "")
        self._log_request(request, "request started", attempt=entry.attempt, worker=entry.worker_id)
        self.save_status(request)
        self.workers[entry.worker_id or ""].assign(request, from_seq)

    def _finish(self, request: Request, code: ErrorCode | None, message: str) -> None:
        """End a request by a frame of the relay's own."""
        request_id, attempt, seq = request.request_id, request.entry.attempt, request.log.next_seq
        message = message[:MAX_TEXT_CHARS]  # a worker's or a client's words may be in it
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
            except EncodeError:  # the details are a worker's
                data = encode(attrs.evolve(failed, details=request.delivered()))
            self.finish_request(request, data, State.FAILED, code=code, message=message)

    def finish_request(
        self,
        request: Request,
        last_frame: bytes,
        state: State,
        *,
        code: str | None = None,
        message: str | None = None,
        owed: tuple[str, Ack] | None = None,
    ) -> None:
        """A request has its last frame: tell its readers, and give what it held to others.

        Args:
            request: a live one; else nothing happens.
            last_frame: as its readers get it.
            state: how it ended.
            code: why it failed.
            message: the same in words.
            owed: the acknowledgement of a frame of a worker's, and the worker's id; sent once all of it is safe.
        """
        if not request.live:
            return
        request.pending_ack = owed
        now = trio.current_time()
        request.ended_at, request.code, request.message = now, code, message
        request.add_timeline(
            "ended", state=str(state), code=code and str(code), why=message and message[:MAX_STEP_CHARS]
        )
        request.release_run_data()
        self.stats.count_ended(request, state, now)
        decisions = self.scheduler.end(request.request_id, state, now)
        known = owed is not None or not request.accepted  # a restart would find it out again, or needs not know
        if known:
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
        if request.accepted:
            self.results.finalize(request, None if known else last_frame)
        self.apply(decisions)

    def has_pending_ack(self, request_id: str, attempt: int) -> bool:
        """Whether this attempt has ended its request, and is acknowledged as soon as that is safe."""
        request = self.requests.get(request_id)
        return request is not None and request.pending_ack is not None and request.pending_ack[1].attempt == attempt

    def save_status(self, request: Request) -> None:
        """Post how a request stands to the store."""
        self.store.post(self.status_update(request))

    def status_update(self, request: Request) -> UpdateRequest:
        """How a request stands, as the store keeps it."""
        entry = request.entry
        return UpdateRequest(
            request_id=request.request_id,
            state=entry.state,
            attempt=entry.attempt,
            losses=entry.losses,
            has_output=entry.has_output,
            reproducible=entry.reproducible,
            stopping=entry.cancel_reason,
            worker_id=entry.worker_id,
            ended_at=time.time() if request.ended_at is not None else None,
            code=request.code,
            message=request.message,
        )

    # -- from the worker's frames

    def attempt_of(self, port: WorkerPort, request_id: str, attempt: int) -> Request | None:
        """The live request that this worker runs as this attempt; None if that attempt is over."""
        request = self.requests.get(request_id)
        if request is None or not request.live:
            return None
        entry = request.entry
        return request if (entry.attempt, entry.worker_id) == (attempt, port.worker_id) else None

    def lose_attempt_of_live_worker(
        self,
        request: Request,
        port: WorkerPort,
        code: ErrorCode,
        message: str,
        details: dict[str, Value] | None = None,
    ) -> None:
        """An attempt ended and its worker lives (its engine crashed, say): tried again, or failed, as at its loss."""
        request.details = details or {}
        self.scheduler.state.workers[port.worker_id].held.pop(request.request_id, None)
        self.lose_attempt(request.request_id, code, message)

    def release(self, port: WorkerPort, request_id: str, attempt: int) -> None:
        """A worker let go of an attempt."""
        self.apply(self.scheduler.release(port.worker_id, request_id, attempt, trio.current_time()))
        self.mark_changed("workers", port.worker_id)

    async def read_input(self, request: Request, name: str) -> bytes | None:
        """An input of an accepted request, which lies in the store; None if the request is over."""
        try:
            data = await self.store.read_input(request.request_id, name)
        except (StoreError, KeyError) as fault:
            if request.live:
                log.error("input lost", request_id=request.request_id, input=name, why=repr(fault))
                self.fail(request, ErrorCode.INTERNAL, f"the relay lost input {name!r}; send the request again")
            return None
        return data if request.live else None

    # -- who wants to know

    def mark_changed(self, topic: str, key: str) -> None:
        """Tell the watchers that a row may look otherwise."""
        for watcher in self.watchers:
            watcher.mark_changed(topic, key)

    def mark_busy(self, topic: str, key: str) -> None:
        """As `touch`, for what changes all the time, and is told once a second."""
        for watcher in self.watchers:
            watcher.mark_busy(topic, key)

    def _wake_positions(self) -> None:
        if self.scheduler.state.moved:
            self.positions_changed.set()

    def _log_request(self, request: Request, event: str, **more: object) -> None:
        tell = log.warning if request.entry.state is State.FAILED else log.info
        tell(
            event,
            request_id=request.request_id,
            space=request.submit.space,
            principal=request.principal,
            **{key: value for key, value in more.items() if value is not None},
        )
        self.mark_changed("requests", request.request_id)


def _broken_update(request_id: str) -> UpdateRequest:
    """What the store keeps of a request that was given up; its attempt's number may be what was wrong with it."""
    return UpdateRequest(
        request_id=request_id,
        state=State.FAILED,
        attempt=1,
        losses=0,
        ended_at=time.time(),
        code=ErrorCode.INTERNAL.value,
        message=BROKEN,
    )


def _words_of_output(register: Register) -> str:
    """What the frames of a reproducible worker depend on, "" of any other: who has the same words makes the same."""
    return f"{register.engine} {register.format} {register.fingerprint}" if register.reproducible else ""
