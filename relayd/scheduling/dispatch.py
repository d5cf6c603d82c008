"""Who gets a free slot: the scheduler's state, and the rules by which what waits is handed out. Pure."""

from collections.abc import Iterable
from functools import partial

import attrs

from protocol.wire.errors import ErrorCode
from relayd.scheduling.model import Decision, Finish, ScheduledRequest, SpaceState, Start, State, Stop, WorkerState


@attrs.define(eq=False)
class Dispatcher:
    """Spaces, workers and live requests; `relayd.scheduling.scheduler` adds what may happen to them."""

    spaces: dict[str, SpaceState] = attrs.field(factory=dict)
    workers: dict[str, WorkerState] = attrs.field(factory=dict)
    entries: dict[str, ScheduledRequest] = attrs.field(factory=dict)
    #: True: hand nothing out any more (the daemon drains).
    draining: bool = False
    #: Spaces whose queue or pace changed since the caller last looked.
    moved: set[str] = attrs.field(factory=set)
    #: Principal -> requests it may have running in all spaces together.
    _max_running: dict[str, int] = attrs.field(factory=dict)
    _uses: int = 0

    def slots_of(self, name: str) -> tuple[int, int]:
        """Slots busy and slots in all of the linked workers of a space."""
        workers = self.workers_of(name)
        return sum(len(w.held) for w in workers), sum(w.slots for w in workers)

    def workers_of(self, name: str) -> list[WorkerState]:
        """Linked workers of a space."""
        return [worker for worker in self.workers.values() if worker.linked and name in worker.spaces]

    # -- for the events

    def dispatch(self, now: float) -> list[Decision]:
        """Give free slots to waiting requests, one space after another, so that no space starves another."""
        decisions: list[Decision] = []
        if self.draining:
            return decisions
        waiting = [space for space in self.spaces.values() if space.queue and not space.paused]
        while waiting:
            waiting = [space for space in waiting if self._dispatch_one(space, now, decisions) and space.queue]
        return decisions

    def _dispatch_one(self, space: SpaceState, now: float, decisions: list[Decision]) -> bool:
        linked = self.workers_of(space.name)
        if not any(worker.free_slots for worker in linked):
            return False
        entry = space.queue.pop(partial(self._can_dispatch, space, linked))
        if entry is None:
            return False
        worker = _best_worker(entry, linked)
        if worker is None:
            message = f"{entry.next_seq} frames were delivered, and no worker that could go on from there is left"
            decisions.append(Finish(entry, ErrorCode.WORKER_LOST, message))
        else:
            decisions.append(self._start(entry, worker, now))
        return True

    def _can_dispatch(self, space: SpaceState, linked: list[WorkerState], entry: ScheduledRequest) -> bool:
        """Whether an entry can be handed out now, or has nobody left who could ever go on with it."""
        if not self._may_run(space, entry.principal):
            return False
        return _best_worker(entry, linked) is not None or not any(_can_take(entry, worker) for worker in linked)

    def _may_run(self, space: SpaceState, principal: str) -> bool:
        limit = space.rules.max_running_per_principal
        if limit is not None and _running_of(principal, space) >= limit:
            return False
        limit = self._max_running.get(principal)
        return limit is None or sum(_running_of(principal, each) for each in self.spaces.values()) < limit

    def _start(self, entry: ScheduledRequest, worker: WorkerState, now: float) -> Start:
        goes_on = bool(entry.reproducible) and entry.reproducible == worker.reproducible
        self._mark_running(entry, worker)
        entry.attempt += 2 if entry.attempt_may_be_newer else 1  # never a number that may have been given out already
        entry.attempt_may_be_newer = entry.attempt_known_from_client = entry.may_be_behind = False
        entry.started_at = now
        entry.reproducible = worker.reproducible
        if not goes_on:
            entry.has_output, entry.next_seq = False, 0
        worker.held[entry.request_id] = entry.attempt
        self._touch(worker)
        return Start(entry, entry.next_seq)

    def _mark_running(self, entry: ScheduledRequest, worker: WorkerState) -> None:
        entry.state = State.RUNNING
        entry.worker_id = worker.worker_id
        entry.worker_lost_at = None
        self.spaces[entry.space].running[entry.request_id] = entry
        self.moved.add(entry.space)

    def _forget_run(self, entry: ScheduledRequest) -> None:
        """The entry runs nowhere any more; a worker that is away has one thing less to come back to."""
        self.spaces[entry.space].running.pop(entry.request_id, None)
        entry.worker_id, entry.worker_lost_at = None, None

    def _stop(self, entry: ScheduledRequest, reason: str) -> Iterable[Stop]:
        """Tell a linked worker to stop; forget what a worker that is away held."""
        worker = self.workers.get(entry.worker_id or "")
        if worker is None or entry.request_id not in worker.held:
            return ()
        if worker.linked:
            return (Stop(worker.worker_id, entry.request_id, reason),)
        self._forget_away(entry)
        return ()

    def _away_worker(self, worker_id: str, space: str) -> WorkerState:
        """The state of a worker that is known from the store alone."""
        worker = self.workers.get(worker_id)
        if worker is None:
            instance = worker_id.rpartition("-")[2]
            worker = WorkerState(worker_id=worker_id, instance=instance, spaces=(), slots=0, linked=False)
            self.workers[worker_id] = worker
        worker.spaces = tuple({*worker.spaces, space})
        return worker

    def _forget_away(self, entry: ScheduledRequest) -> None:
        """A worker that is away has one thing less to come back to; with nothing left it is forgotten."""
        worker = self.workers.get(entry.worker_id or "")
        if worker is not None and not worker.linked:
            worker.held.pop(entry.request_id, None)
            if not worker.held:
                del self.workers[worker.worker_id]

    def _touch(self, worker: WorkerState) -> None:
        self._uses += 1
        worker.last_used = self._uses


def _can_take(entry: ScheduledRequest, worker: WorkerState) -> bool:
    """Whether a worker could run `entry` if it had a slot: what was heard already, only its equal can go on from."""
    return not entry.has_output or entry.retry == "always" or entry.reproducible == worker.reproducible


def _best_worker(entry: ScheduledRequest, linked: list[WorkerState]) -> WorkerState | None:
    """Most free slots, then the longest idle; never one that has not let go of an earlier attempt yet."""
    free = (w for w in linked if w.free_slots and entry.request_id not in w.held and _can_take(entry, w))
    return min(free, key=lambda worker: (-worker.free_slots, worker.last_used), default=None)


def _running_of(principal: str, space: SpaceState) -> int:
    return sum(entry.principal == principal for entry in space.running.values())
