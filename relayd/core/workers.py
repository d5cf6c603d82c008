"""The connected workers: registration, loss of the connection, draining, and the loss of attempts."""

from collections.abc import Iterator, Mapping

import attrs
import structlog
import trio

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import MAX_TEXT_CHARS, Ack, Register, Rejected
from protocol.wire.validators import Value
from relayd.core.interfaces import RelayState, WorkerPort
from relayd.core.spaces import Spaces
from relayd.requests.request import UNHEARD_GRACE_S, Request
from relayd.scheduling.model import Finish, Registration, State, WorkerState
from relayd.store.records import DeleteDrain, DeleteWorker, PutDrain, PutWorker

log = structlog.get_logger("relayd")

#: Drained workers that are remembered: an id belongs to one process, and most never come back.
MAX_DRAINED = 1_000
#: Worker ids whose principal is remembered, those that came or left last; connected workers' are known anyway.
MAX_OWNERS = 10_000
#: When a worker is to register again whose place may be free soon.
REGISTER_AGAIN_S = 1.0
#: How long a worker may leave a ping unanswered while a new process of the same name wants its place.
TAKE_OVER_S = 3.5
#: Length at which a message in a request's timeline is cut.
MAX_STEP_CHARS = 200


@attrs.define(eq=False)
class Workers(Mapping[str, WorkerPort]):
    """The connected workers by id; a mapping."""

    relay: RelayState
    spaces: Spaces
    #: Those that operators have drained, connected or not, the first comes first; and whether each is cordoned.
    drained: dict[str, bool] = attrs.field(factory=dict)
    _connected: dict[str, WorkerPort] = attrs.field(factory=dict)
    #: Worker id -> its principal.
    _owners: dict[str, str] = attrs.field(factory=dict)
    #: Set, and replaced, when a worker comes, or takes requests again.
    joined: trio.Event = attrs.field(factory=trio.Event)

    def __getitem__(self, worker_id: str) -> WorkerPort:
        return self._connected[worker_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._connected)

    def __len__(self) -> int:
        return len(self._connected)

    # -- workers

    def register(self, port: WorkerPort, register: Register) -> Rejected | Registration:
        """Register a worker.

        Returns:
            What the worker has to resume and abandon (the caller answers, then calls `finish_registration`), or why
            it was refused.
        """
        now = trio.current_time()
        before = self._connected.get(port.worker_id)
        if not self._is_own(port, port.worker_id):
            message = f"worker {port.worker_id!r} belongs to another principal; start this one with another --name"
            return Rejected.because(ErrorCode.FORBIDDEN, message)
        worker = WorkerState(
            worker_id=port.worker_id,
            instance=register.instance,
            spaces=tuple(register.spaces),
            slots=register.slots,
            streams=register.streams,
            shared=register.shared,
            reproducible=_output_identity(register),
            draining=port.worker_id in self.drained,
        )
        joined = self.relay.scheduler.join(worker, {r.request_id: r.attempt for r in register.running}, now)
        if isinstance(joined, Rejected):
            return joined
        self._connected[port.worker_id] = port
        self.relay.store.post(*(PutWorker(port.worker_id, name) for name in register.spaces))
        self._remember_owner(port)
        stats = self.relay.stats.worker(port.worker_id)
        stats.name, stats.engine, stats.agent = register.worker, register.engine, port.agent
        stats.principal, stats.peer = port.principal_name, port.peer
        self.relay.stats.count_registration(port.worker_id, register.spaces)
        if before is not None:
            before.disconnect("the same worker connected again")
        self.spaces.update_engines(register)
        for entry in joined.resume:
            request = self.relay.requests[entry.request_id]
            request.resumed()
            self.relay.stats.count_resumed(request)
            self.relay.save_status(request)  # its state or its attempt may differ from the stored one
            self.relay.mark_changed("requests", entry.request_id)
        self.relay.mark_changed("workers", port.worker_id)
        self.relay.wake_positions()
        self._tell_joined()
        return joined

    def _remember_owner(self, port: WorkerPort) -> None:
        self._owners.pop(port.worker_id, None)  # the latest comes last
        self._owners[port.worker_id] = port.principal_name
        if len(self._owners) > MAX_OWNERS:
            del self._owners[next(iter(self._owners))]

    def _is_own(self, port: WorkerPort, worker_id: str) -> bool:
        """Whether `worker_id` is a worker of this one's principal, or new; connected or not.

        Of a worker that only the store knows, after a restart, the principal is unknown: then whoever may serve its
        spaces may be it, and could have its requests anyway.
        """
        before = self._connected.get(worker_id)
        owner = before.principal_name if before is not None else self._owners.get(worker_id)
        if owner is not None:
            return owner == port.principal_name
        known = self.relay.scheduler.state.workers.get(worker_id)
        return known is None or all(map(port.may_serve, known.spaces))

    def recheck_refusal(self, port: WorkerPort, register: Register, refusal: Rejected, refused_at: float) -> Rejected:
        """A worker was refused; if the space is full of workers that may be gone soon, tell it to try again.

        A machine that was reset leaves its old connection half open for up to `dead_after_s`, and its new worker must
        not give up meanwhile. So whoever has the place is asked for a sign of life, and until it has given one since
        `refused_at`, the refusal may pass; a former process of the same worker is cut off before. It may pass, too,
        if one of them drains.
        """
        if refusal.code != ErrorCode.SPACE_FULL:
            return refusal
        state, mine = self.relay.scheduler.state, _name(port.worker_id, register.instance)
        others = {each.worker_id: each for name in register.spaces for each in state.workers_of(name)}
        others.pop(port.worker_id, None)
        silent = [each for each in others.values() if self._connected[each.worker_id].received_at < refused_at]
        for each in silent:
            before = self._connected[each.worker_id]
            is_former = (_name(each.worker_id, each.instance), before.principal_name) == (mine, port.principal_name)
            if is_former and trio.current_time() - refused_at > TAKE_OVER_S:
                before.disconnect("it does not answer, and a new process of the same worker wants its place")
            else:
                before.ping()
        if not silent and not any(worker.draining for worker in others.values()):
            return refusal
        return attrs.evolve(refusal, retry_after_s=REGISTER_AGAIN_S)

    def finish_registration(self, register: Register, worker_id: str, joined: Registration) -> None:
        """Carry out the decisions of a registration that was answered.

        If another process with the same name is disconnected and this one has taken its place, the relay stops
        waiting for it, and its attempts are lost. If the spaces have room for both, they may be two workers whose
        connections broke at the same time.
        """
        if self.drained.get(worker_id) is False:
            self._connected[worker_id].drain("drained by an operator")  # it may not have received the first message
        own_name, port = _name(worker_id, register.instance), self._connected[worker_id]
        for worker in list(self.relay.scheduler.state.workers.values()):
            name = _name(worker.worker_id, worker.instance)
            is_former = not worker.linked and name == own_name and self._is_own(port, worker.worker_id)
            if is_former and self.relay.scheduler.is_replaced(worker):
                for request_id in list(worker.held):
                    self.lose_attempt(request_id, ErrorCode.WORKER_LOST, f"worker {worker.worker_id} was restarted")
        self.relay.apply(joined.decisions)

    def unlink(self, port: WorkerPort) -> None:
        """Note that the connection of a worker ended; the worker has a grace period to reconnect."""
        if self._connected.get(port.worker_id) is not port:
            return  # it has reconnected already
        del self._connected[port.worker_id]
        if not self.relay.draining.is_set():  # otherwise the next relay waits for it
            self.relay.store.post(DeleteWorker(port.worker_id))
        self._remember_owner(port)  # others may have registered many ids since it came
        self.relay.stats.worker(port.worker_id).heard_at = port.received_at
        away, decisions = self.relay.scheduler.unlink(port.worker_id, trio.current_time())
        for entry in away:
            request = self.relay.requests[entry.request_id]
            request.worker_grace_s = self.relay.config.limits.worker_grace_s
            if not entry.has_output:
                request.worker_grace_s = min(UNHEARD_GRACE_S, request.worker_grace_s)
            request.add_timeline("worker_away", worker_id=port.worker_id)
            request.notify_worker_state()
            request.wake()
            self.relay.save_status(request)  # a relay that is started again goes on waiting, and does not begin anew
            self.relay.mark_changed("requests", entry.request_id)
        self.relay.mark_changed("workers", port.worker_id)
        self.relay.apply(decisions)

    def update_registration(self, port: WorkerPort, register: Register) -> None:
        """Apply a registration that changes a worker's slots, or what its frames depend on."""
        self.relay.scheduler.state.workers[port.worker_id].reproducible = _output_identity(register)
        self.relay.apply(self.relay.scheduler.set_slots(port.worker_id, register.slots, trio.current_time()))
        self.relay.mark_changed("workers", port.worker_id)

    def drain(self, worker_id: str) -> None:
        """Stop starting requests on a worker; nothing happens if it drains already."""
        if self.relay.scheduler.state.workers[worker_id].draining:
            return
        decisions = self.relay.scheduler.drain(worker_id, trio.current_time())
        log.info("worker draining", worker=worker_id)
        self.relay.mark_changed("workers", worker_id)
        self.relay.apply(decisions)

    def drain_by_operator(self, worker_id: str, reason: str) -> None:
        """Drain a connected worker, also after a restart of the relay or a cut."""
        self._remember_drain(worker_id, cordon=False)
        self.drain(worker_id)
        self._connected[worker_id].drain(reason)

    def cordon(self, worker_id: str) -> None:
        """Start no more requests on a connected worker, which stays; also after a restart of the relay or a cut."""
        if self.drained.get(worker_id) is False:
            self._connected[worker_id].undrain()  # it does not leave, if it has not left yet
        self._remember_drain(worker_id, cordon=True)
        self.drain(worker_id)
        self.relay.mark_changed("workers", worker_id)

    def _remember_drain(self, worker_id: str, *, cordon: bool) -> None:
        self.drained[worker_id] = cordon
        self.relay.store.post(PutDrain(worker_id, cordon))
        if len(self.drained) > MAX_DRAINED:
            oldest = next(iter(self.drained))
            del self.drained[oldest]
            self.relay.store.post(DeleteDrain(oldest))

    def undrain(self, worker_id: str) -> None:
        """Start requests on a worker again."""
        if worker_id in self.drained:
            del self.drained[worker_id]
            self.relay.store.post(DeleteDrain(worker_id))
        self.relay.apply(self.relay.scheduler.undrain(worker_id, trio.current_time()))
        log.info("worker accepts requests again", worker=worker_id)
        self.relay.mark_changed("workers", worker_id)
        self._tell_joined()

    def _tell_joined(self) -> None:
        self.joined.set()
        self.joined = trio.Event()

    def serving(self, space: str) -> bool:
        """Whether a worker is connected to `space` that starts requests."""
        return any(not worker.draining for worker in self.relay.scheduler.state.workers_of(space))

    # -- attempts

    def lose_attempt(
        self,
        request_id: str,
        code: ErrorCode,
        message: str,
        *,
        innocent: bool | None = None,
        pending_ack: tuple[str, Ack] | None = None,
    ) -> None:
        """Note that an attempt is lost; depending on its retry policy, the request is tried again or fails.

        Args:
            request_id: the request.
            code: with which it fails if it is not tried again.
            message: the same, for people.
            innocent: as in `Scheduler.lose`.
            pending_ack: for a loss that a worker reports: its id, and the `ack` that it gets before the next attempt is
                assigned, or once the end is stored. A worker that has forgotten the attempt counts as one that never
                received it.
        """
        request = self.relay.requests.get(request_id)
        if request is not None and request.entry.state is State.RUNNING:
            request.add_timeline("lost", code=code.value, why=message[:MAX_STEP_CHARS], innocent=innocent)
            request.lost = code.value, message[:MAX_TEXT_CHARS]
        decisions = self.relay.scheduler.lose(request_id, code, message, trio.current_time(), innocent=innocent)
        ends = any(isinstance(each, Finish) and each.entry.request_id == request_id for each in decisions)
        if pending_ack is not None and not ends:
            self._connected[pending_ack[0]].acknowledge(pending_ack[1])
        self.relay.apply(decisions)
        if pending_ack is not None and ends and request is not None:
            request.pending_ack = pending_ack

    def note_begun(self, request_id: str) -> None:
        """Note that an attempt that runs alone has made something; others may start beside it."""
        self.relay.apply(self.relay.scheduler.has_begun(request_id, trio.current_time()))

    def count_engine_failure(self, worker_id: str) -> None:
        """A worker's engine failed an attempt; one that does so again and again is handed nothing for a while."""
        if rest_s := self.relay.scheduler.count_engine_failure(worker_id, trio.current_time()):
            log.warning("worker rests, as its engine fails again and again", worker=worker_id, rest_s=rest_s)
            self.relay.mark_changed("workers", worker_id)

    def end_rests(self, now: float) -> None:
        """Let workers take requests again whose rest is over."""
        rested, decisions = self.relay.scheduler.end_rests(now)
        for worker_id in rested:
            log.info("worker has rested", worker=worker_id)
            self.relay.mark_changed("workers", worker_id)
        self.relay.apply(decisions)

    def adopt_later_attempt(self, request: Request, attempt: int) -> None:
        """Switch to a later attempt, of which a client has frames: the relay was killed before it was stored."""
        decisions = self.relay.scheduler.adopt_later_attempt(request.entry, attempt, trio.current_time())
        entry = request.entry
        adopted = entry.attempt == attempt and not any(isinstance(each, Finish) for each in decisions)
        if adopted and request.log.next_seq:
            request.log.restart(attempt, 0)  # the frames in the log are of the earlier attempt
            self.relay.stats.count_restarted(request)
        self.relay.apply(decisions)

    def lose_attempt_of_live_worker(
        self,
        request: Request,
        port: WorkerPort,
        ack: Ack,
        code: ErrorCode,
        message: str,
        details: dict[str, Value] | None = None,
        innocent: bool | None = None,
    ) -> None:
        """Treat an attempt as lost whose worker is still connected, for example because its engine crashed."""
        request.details = details or {}
        self.relay.scheduler.state.workers[port.worker_id].held.pop(request.request_id, None)
        self.lose_attempt(request.request_id, code, message, innocent=innocent, pending_ack=(port.worker_id, ack))

    def release(self, port: WorkerPort, request_id: str, attempt: int) -> None:
        """Free the slot of an attempt that a worker has released."""
        self.relay.apply(self.relay.scheduler.release(port.worker_id, request_id, attempt, trio.current_time()))
        self.relay.mark_changed("workers", port.worker_id)


def _name(worker_id: str, instance: str) -> str:
    """The part of a worker's id that all its processes share."""
    return worker_id.removesuffix(instance[:8])


def _output_identity(register: Register) -> str:
    """Describe what a worker's frames depend on: equal text, equal frames; "" if it is not reproducible."""
    return f"{register.engine} {register.format} {register.fingerprint}" if register.reproducible else ""
