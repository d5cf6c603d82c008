"""Decides which queued request gets a free slot, and on which worker. Pure."""

from collections.abc import Iterable
from functools import partial

import attrs

from protocol.wire.errors import ErrorCode
from relayd.scheduling.model import (
    Decision,
    Enter,
    Finish,
    ScheduledRequest,
    SchedulerState,
    SpaceState,
    Start,
    State,
    Stop,
    Wait,
    WorkerState,
)


@attrs.define(eq=False)
class Dispatcher:
    """Starts queued requests on free slots, and records which request runs on which worker."""

    state: SchedulerState

    def dispatch(self, now: float) -> list[Decision]:
        """Start queued requests on free slots, and see to it that no piped one holds a slot while its source waits."""
        decisions: list[Decision] = []
        self._fill(now, decisions)
        while self.state.unsettled:
            unsettled = sorted(self.state.unsettled.values(), key=lambda entry: entry.ticket)  # sources come first
            self.state.unsettled.clear()
            for entry in unsettled:
                self._settle(entry, decisions)
            self._fill(now, decisions)
        return decisions

    def _fill(self, now: float, decisions: list[Decision]) -> None:
        """Start queued requests on free slots, one per space in turn, so that no space starves another."""
        if self.state.draining:
            return
        self._reserve_workers()
        spaces = self.state.spaces.values()
        waiting = [space for space in spaces if space.queue and not (space.paused or space.settling)]
        while waiting:
            waiting = [space for space in waiting if self._dispatch_one(space, now, decisions) and space.queue]

    def _settle(self, entry: ScheduledRequest, decisions: list[Decision]) -> None:
        """Let a piped request wait for its sources, or no longer.

        One whose source has to wait for a slot itself gives its own back: the source may need just that one.
        """
        flows = self.state.flows(entry)
        if entry.waits and flows and not entry.silent_sources:
            self.state.remove_admitted(entry)
            self.push(entry)
            decisions.append(Enter(entry))
        elif entry.state is State.QUEUED and not self._is_ready(entry):
            self.hold_back(entry)
            decisions.append(Wait(entry))
        elif entry.state is State.RUNNING and not flows and self._can_yield(entry):
            message = "its source waits for a worker again"
            decisions += self.stop(entry, message)
            if entry.retry == "never":
                self.state.detach(entry)  # nothing more is decided about it
                why = f"{message}; not tried again, because retry is 'never'"
                decisions.append(Finish(entry, ErrorCode.SOURCE_FAILED, why))
            else:
                self.hold_back(entry)
                decisions.append(Wait(entry))

    def _is_ready(self, entry: ScheduledRequest) -> bool:
        """Whether a piped request need not wait for its sources."""
        return not entry.silent_sources and self.state.flows(entry)

    def _can_yield(self, entry: ScheduledRequest) -> bool:
        """Whether a running request holds a slot, and is not asked to stop already."""
        return entry.worker_id is not None and entry.worker_lost_at is None and entry.cancel_reason is None

    def push(self, entry: ScheduledRequest) -> None:
        """Queue a request by its ticket."""
        entry.state, entry.waits = State.QUEUED, False
        self.state.spaces[entry.space].queue.push(entry)
        self.state.moved.add(entry.space)
        self.state.unsettle(entry)

    def hold_back(self, entry: ScheduledRequest) -> None:
        """Let a queued or running request wait for its sources. No worker may go on with the attempt that it had."""
        space = self.state.spaces[entry.space]
        if entry.state is State.QUEUED:
            space.queue.remove(entry)
        self.clear_run(entry)
        if entry.attempt or entry.attempt_may_be_newer:
            entry.attempt = max(entry.attempt, entry.highest_attempt) + 1
        entry.attempt_may_be_newer = entry.attempt_known_from_client = False
        if not entry.reproducible:
            entry.has_output, entry.next_seq = False, 0
        entry.state, entry.waits, entry.promoted = State.UPLOADING, True, 0
        self.state.add_admitted(entry)
        self.state.moved.add(entry.space)

    def _reserve_workers(self) -> None:
        """Keep a worker with a shared engine free of others for each request that is to run alone.

        While one waits, the worker that runs least is given nothing else, so that it becomes free.
        """
        suspects = self.state.suspects.values()
        if not suspects:
            return
        for worker in self.state.workers.values():
            worker.alone_for = ""
        for entry in suspects:
            running_on = self.state.workers.get(entry.worker_id or "")
            if running_on is not None and running_on.shared:
                running_on.alone_for = entry.request_id
        for entry in suspects:
            space = self.state.spaces[entry.space]
            held_back = entry.state is not State.QUEUED or space.paused or space.settling
            if held_back or not self._may_run(space, entry.principal):
                continue
            choice = _candidates(entry, self.state.workers_of(space.name), self.state.fit_workers_of(space.name))
            if all(worker.shared for worker in choice):  # otherwise a slot with a process of its own will do
                free = [worker for worker in choice if not worker.alone_for]
                if free:
                    min(free, key=lambda worker: len(worker.held)).alone_for = entry.request_id

    def _dispatch_one(self, space: SpaceState, now: float, decisions: list[Decision]) -> bool:
        linked = self.state.workers_of(space.name)
        if not any(worker.free_slots for worker in linked):
            return False
        fit = self.state.fit_workers_of(space.name)
        entry = space.queue.pop(partial(self._can_dispatch, space, linked, fit))
        if entry is None:
            return False
        worker = _best_worker(entry, linked, fit)
        if worker is None:
            message = f"{entry.next_seq} frames were delivered, and no worker is left that could continue from there"
            decisions.append(Finish(entry, ErrorCode.WORKER_LOST, message))
        else:
            decisions.append(self._start(entry, worker, now))
        return True

    def _can_dispatch(
        self, space: SpaceState, linked: list[WorkerState], fit: list[WorkerState], entry: ScheduledRequest
    ) -> bool:
        """Whether `entry` can be taken off the queue: it can start now, or no linked worker could ever run it."""
        if not self._may_run(space, entry.principal) or entry.silent_sources or not self._will_flow(entry):
            return False
        return _best_worker(entry, linked, fit) is not None or not any(_can_take(entry, worker) for worker in linked)

    def _will_flow(self, entry: ScheduledRequest) -> bool:
        """Whether each source still runs once everything is settled: its own source may wait, and it then gives way."""
        seen: set[str] = set()
        to_visit = [entry]
        while to_visit:
            for source_id in to_visit.pop().sources - seen:
                source = self.state.entries[source_id]
                if source.state is not State.RUNNING:
                    return False
                if self._can_yield(source):
                    to_visit.append(source)
                seen.add(source_id)
        return True

    def _may_run(self, space: SpaceState, principal: str) -> bool:
        limit = space.rules.max_running_per_principal
        if limit is not None and _running_of(principal, space) >= limit:
            return False
        limit = self.state.max_running.get(principal)
        return limit is None or sum(_running_of(principal, each) for each in self.state.spaces.values()) < limit

    def _start(self, entry: ScheduledRequest, worker: WorkerState, now: float) -> Start:
        self.mark_running(entry, worker)
        self._begin_attempt(entry, worker.reproducible, now)
        worker.held[entry.request_id] = entry.attempt
        self.mark_used(worker)
        return Start(entry, entry.next_seq)

    def _begin_attempt(self, entry: ScheduledRequest, reproducible: str, now: float) -> None:
        continues = bool(entry.reproducible) and entry.reproducible == reproducible
        entry.attempt = max(entry.attempt, entry.highest_attempt) + 1  # never a number that may have been used already
        entry.attempt_may_be_newer = entry.attempt_known_from_client = False
        entry.started_at = now
        entry.promoted = 0
        entry.reproducible = reproducible
        if not continues:
            entry.has_output, entry.next_seq = False, 0

    def start_copy(self, entry: ScheduledRequest, reproducible: str, now: float) -> None:
        """Begin an attempt without a worker; see `Scheduler.copy`."""
        entry.state, entry.copied = State.RUNNING, True
        entry.worker_id = entry.worker_lost_at = None
        self.state.spaces[entry.space].running[entry.request_id] = entry
        self.state.moved.add(entry.space)
        self.state.unsettle(entry)
        self._begin_attempt(entry, reproducible, now)

    def mark_running(self, entry: ScheduledRequest, worker: WorkerState) -> None:
        """Note that `entry` runs on `worker`."""
        entry.state, entry.copied = State.RUNNING, False
        entry.worker_id, entry.streams = worker.worker_id, worker.streams
        entry.worker_lost_at = None
        self.state.spaces[entry.space].running[entry.request_id] = entry
        self.state.moved.add(entry.space)
        self.state.unsettle(entry)

    def clear_run(self, entry: ScheduledRequest) -> None:
        """Note that `entry` no longer runs."""
        self.state.spaces[entry.space].running.pop(entry.request_id, None)
        entry.worker_id, entry.worker_lost_at, entry.copied = None, None, False
        self.state.unsettle(entry)

    def stop(self, entry: ScheduledRequest, reason: str) -> Iterable[Stop]:
        """Return the `Stop` for a linked worker; if the worker is away, only remove the attempt from it."""
        worker = self.state.workers.get(entry.worker_id or "")
        if worker is None or entry.request_id not in worker.held:
            return ()
        if worker.linked:
            return (Stop(worker.worker_id, entry.request_id, reason),)
        self.forget_away(entry)
        return ()

    def away_worker(self, worker_id: str, space: str) -> WorkerState:
        """Return the state of a worker that only the store knows so far, and add `space` to its spaces."""
        worker = self.state.workers.get(worker_id)
        if worker is None:
            instance = worker_id.rpartition("-")[2]
            worker = WorkerState(worker_id=worker_id, instance=instance, spaces=(), slots=0, linked=False)
            self.state.workers[worker_id] = worker
        worker.spaces = tuple({*worker.spaces, space})
        return worker

    def forget_away(self, entry: ScheduledRequest) -> None:
        """Remove a request from a disconnected worker; drop the worker once it holds none."""
        worker = self.state.workers.get(entry.worker_id or "")
        if worker is not None and not worker.linked:
            worker.held.pop(entry.request_id, None)
            if not worker.held:
                del self.state.workers[worker.worker_id]

    def mark_used(self, worker: WorkerState) -> None:
        """Note that a worker was used just now; among equals, the worker that was idle longest comes first."""
        self.state.uses += 1
        worker.last_used = self.state.uses


def _can_take(entry: ScheduledRequest, worker: WorkerState) -> bool:
    """Whether `worker` could run `entry` if it had a free slot; after output, it must make the same frames."""
    return not entry.has_output or entry.retry == "always" or entry.reproducible == worker.reproducible


def _best_worker(entry: ScheduledRequest, linked: list[WorkerState], fit: list[WorkerState]) -> WorkerState | None:
    """Return the worker with most free slots, then the longest idle; never one that still holds an attempt of it."""
    free = (worker for worker in _candidates(entry, linked, fit) if worker.can_start(entry))
    return min(free, key=lambda worker: (-worker.free_slots, worker.last_used), default=None)


def _candidates(entry: ScheduledRequest, linked: list[WorkerState], fit: list[WorkerState]) -> list[WorkerState]:
    """Return the workers that `entry` waits for, without those that rest or have failed it where there are others."""
    able = _able(entry, fit) or _able(entry, linked)
    return [worker for worker in able if worker.worker_id not in entry.failed_on] or able


def _able(entry: ScheduledRequest, workers: list[WorkerState]) -> list[WorkerState]:
    """Return the workers that could run `entry`, those without a free slot among them."""
    return [worker for worker in workers if worker.slots and not worker.draining and _can_take(entry, worker)]


def _running_of(principal: str, space: SpaceState) -> int:
    return sum(entry.principal == principal and not entry.copied for entry in space.running.values())
