"""The scheduler: which request runs where, and what happens to it when its worker is lost. Pure.

Theory of operation
-------------------
Each method handles an event, changes the `SchedulerState` and returns decisions; the caller must carry out all of
them. There is no `await`, no clock and no I/O. Times are arguments, in monotonic seconds.

A slot is busy as long as its worker holds it, and not only as long as a request runs: it is free again only when the
worker releases it or is lost. So a request may have ended (timed out, cancelled) while its slot is still held. Every
method that may free a slot or queue a request ends with `Dispatcher.dispatch`, which starts what can start.

| event | from | to | returns |
| --- | --- | --- | --- |
| `admit` | - | uploading | None or `Rejected` |
| `enqueue` | uploading | queued; one with a pipe waits for its sources | what can start now |
| `hear`, or its sources run | uploading, waits | queued | `Enter`, what can start now |
| a source is queued again | queued, running | uploading, waits | `Stop`?, `Wait` (3) |
| `begin_anew` | queued, running | uploading, waits, nothing of it delivered | `Stop`?, `Wait` (3) |
| `dispatch` | queued | running, the next attempt (after a restart, behind any that may have begun) | `Start` |
| `unlink` | running | running, worker away | the requests, whose grace the caller starts; what can start now |
| `join`, attempt named | running (worker away), or queued too early | running | `Registration.resume` |
| `join`, attempt not named | running | running again, or as `lose` (1) | `Start` ... |
| `lose` | running | queued in its old place, or unchanged (2) | `Stop`?, then `Requeue` or `Finish` |
| `has_begun` | running alone | running, others may start beside it | what can start now |
| `cancel` | uploading, queued, worker away | unchanged until the caller calls `end` | `Finish` cancelled |
| `cancel` | running | running, cancelling | `Stop` |
| `copy` | uploading, queued, running as a copy | running as a copy, a new attempt | what can start now |
| `end_copy` | running as a copy | queued | `Requeue`, what can start now |
| `fail` | any live | unchanged until the caller calls `end` | `Stop`?, `Finish` failed |
| `end` | any live | completed, failed, cancelled | what can start now |
| `release` | any | the slot is free | what can start now |

(1) It runs again from `next_seq` if nothing of it was delivered or the worker makes the same frames.
(2) It is queued again while losses < max_attempts and `retry` allows it; otherwise the caller ends it as failed.
(3) Or `Finish`, if it has begun and `retry` is `never`. In a chain this goes on; it is no loss.

The stateful test (tests/relayd/scheduling/test_scheduler_machine.py) checks this table against random orders of events.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from itertools import islice

import attrs

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import Rejected
from relayd.scheduling import estimate
from relayd.scheduling.dispatch import Dispatcher
from relayd.scheduling.model import (
    Decision,
    Finish,
    QueuePosition,
    Registration,
    Requeue,
    ScheduledRequest,
    SchedulerState,
    SpaceRules,
    SpaceState,
    Start,
    State,
    Stop,
    Wait,
    WorkerState,
)

#: What an attempt is lost with when its engine is at fault.
ENGINE_FAULTS = frozenset({ErrorCode.ENGINE_FAILED, ErrorCode.MODEL_NOT_LOADED, ErrorCode.IDLE_TIMEOUT})
#: Attempts in a row that an engine has to fail until its worker rests, and for how long: at first, and at most.
FAILURES_TO_REST = 3
REST_FIRST_S = 10.0
REST_LONGEST_S = 600.0
#: Innocent losses after which a request runs alone: whoever ends the process late, after its first output, is among
#: those that were called innocent. And how many of them are not counted as losses.
INNOCENT_UNTIL_ALONE = 3
MAX_INNOCENT_LOSSES = 10
#: Names that a misspelt one is compared with, which takes about 10 us each.
MAX_COMPARED = 200


@attrs.define(eq=False)
class Scheduler:
    """Handles the events of spaces, workers and live requests, and returns what follows from them."""

    state: SchedulerState = attrs.field(factory=SchedulerState)
    dispatcher: Dispatcher = attrs.field(
        default=attrs.Factory(lambda scheduler: Dispatcher(scheduler.state), takes_self=True)
    )

    # -- spaces

    def add_space(self, name: str, rules: SpaceRules, *, paused: bool = False) -> None:
        """Open a space."""
        self.state.spaces[name] = SpaceState(name=name, rules=rules, paused=paused)

    def set_rules(self, name: str, rules: SpaceRules, now: float) -> list[Decision]:
        """Change the limits of a space; existing requests and workers stay, even if they exceed a lower limit."""
        self.state.spaces[name].rules = rules
        self.state.moved.add(name)
        return self.dispatcher.dispatch(now)

    def remove_space(self, name: str) -> Rejected | None:
        """Close a space that has no requests and no workers."""
        space = self.state.spaces.get(name)
        if space is None:
            return no_such_space(name, operator=True, known=self.state.spaces)
        if space.queue or space.running or space.admitted:
            return Rejected.because(
                ErrorCode.SPACE_EXISTS,
                f"space {name!r} still has {len(space.queue) + len(space.admitted)} queued and {len(space.running)} "
                "running requests; pause it and wait for them to end, or cancel them, then delete it",
            )
        if workers := self.state.workers_of(name):
            return Rejected.because(
                ErrorCode.SPACE_EXISTS,
                f"space {name!r} is served by {', '.join(w.worker_id for w in workers)}; stop it first, then delete it",
            )
        del self.state.spaces[name]
        return None

    def pause_space(self, name: str) -> Rejected | None:
        """Stop starting and accepting requests in this space."""
        if name not in self.state.spaces:
            return no_such_space(name, operator=True, known=self.state.spaces)
        self.state.spaces[name].paused = True
        self.state.moved.add(name)
        return None

    def resume_space(self, name: str, now: float) -> Rejected | list[Decision]:
        """Undo `pause_space`."""
        if name not in self.state.spaces:
            return no_such_space(name, operator=True, known=self.state.spaces)
        self.state.spaces[name].paused = False
        self.state.moved.add(name)
        return self.dispatcher.dispatch(now)

    # -- workers

    def join(self, worker: WorkerState, running: Mapping[str, int], now: float) -> Rejected | Registration:
        """Register a worker, for the first time or again (same id).

        Args:
            worker: its new state; what a worker with the same id held before is taken over where it still applies.
            running: request id -> attempt of each request of which the worker still has frames.
            now: monotonic seconds.
        """
        for name in worker.spaces:
            if refusal := self._no_room(name, worker.worker_id):
                return refusal
        known = self.state.workers.get(worker.worker_id)
        held_before = known.held if known else {}
        if known:
            worker.last_used, worker.draining = known.last_used, worker.draining or known.draining
            worker.failures, worker.rests, worker.rests_until = known.failures, known.rests, known.rests_until
        self.state.workers[worker.worker_id] = worker
        self.state.moved.update(worker.spaces)
        resume, abandon, decisions = [], [], list[Decision]()
        for request_id, attempt in running.items():
            entry = self._claim(worker, request_id, attempt, now)
            if entry is None:
                abandon.append(request_id)
            else:
                resume.append(entry)
        assigned_but_lost = [request_id for request_id in held_before if request_id not in worker.held]
        for request_id in assigned_but_lost:  # the `assign` was lost with the connection
            entry = self.state.entries.get(request_id)
            if entry is not None and entry.worker_id == worker.worker_id:
                decisions += self._dispatch_again(entry, worker, now)
        return Registration(resume, abandon, [*decisions, *self.dispatcher.dispatch(now)])

    def is_replaced(self, worker: WorkerState) -> bool:
        """Whether a worker that is away could not register again now, because another has taken its place."""
        return any(self._no_room(name, worker.worker_id) for name in worker.spaces)

    def _no_room(self, name: str, worker_id: str) -> Rejected | None:
        space = self.state.spaces.get(name)
        if space is None:
            return no_such_space(name)
        others = [w for w in self.state.workers_of(name) if w.worker_id != worker_id]
        if len(others) < space.rules.max_workers:
            return None
        count = f"{len(others)} worker{'s' if len(others) != 1 else ''}"
        return Rejected.because(
            ErrorCode.SPACE_FULL,
            f"space {name!r} already has its {count} ({', '.join(w.worker_id for w in others)}); "
            "stop that one, or raise max_workers in relayd.toml",
        )

    def _claim(self, worker: WorkerState, request_id: str, attempt: int, now: float) -> ScheduledRequest | None:
        """Mark an attempt that a worker names as running there; None if it is over or runs on another worker."""
        entry = self.state.entries.get(request_id)
        if entry is None or not attempt or entry.copied or entry.space not in worker.spaces:
            return None
        newer = entry.attempt_may_be_newer and entry.attempt < attempt <= entry.highest_attempt
        if attempt != entry.attempt and not newer:
            return None
        if entry.state is State.QUEUED:  # queued again too early, and not started since: it continues on this worker
            self.state.spaces[entry.space].queue.remove(entry)
            if attempt == entry.attempt and not entry.attempt_known_from_client:
                entry.losses = max(0, entry.losses - 1)  # it was not lost after all
        elif entry.waits:  # after a restart
            self.state.remove_admitted(entry)
            entry.waits = False
        elif entry.worker_id not in (None, worker.worker_id):
            if attempt == entry.attempt:
                return None
            self.dispatcher.forget_away(entry)
        # The relay may have been killed before it stored that this attempt began.
        if attempt != entry.attempt or entry.attempt_known_from_client:
            entry.attempt, entry.started_at, entry.reproducible = attempt, now, worker.reproducible
        entry.attempt_may_be_newer = entry.attempt_known_from_client = False
        self.dispatcher.mark_running(entry, worker)
        worker.held[request_id] = attempt
        return entry

    def _dispatch_again(self, entry: ScheduledRequest, worker: WorkerState, now: float) -> list[Decision]:
        """Start an attempt again that a worker was assigned but does not know, if no output would be lost."""
        if entry.cancel_reason is not None:
            return [Finish(entry, None, entry.cancel_reason)]
        continues = bool(entry.reproducible) and entry.reproducible == worker.reproducible
        has_output = entry.next_seq or entry.has_output  # output from before a restart of the relay has no frames here
        if entry.space not in worker.spaces or (has_output and not continues):
            return self.lose(entry.request_id, ErrorCode.WORKER_LOST, "its worker reconnected without it", now)
        self.dispatcher.mark_running(entry, worker)
        if entry.attempt_may_be_newer:
            entry.attempt, entry.attempt_may_be_newer = entry.highest_attempt + 1, False  # as in `Dispatcher._start`
        worker.held[entry.request_id] = entry.attempt
        return [Start(entry, entry.next_seq)]

    def release(self, worker_id: str, request_id: str, attempt: int, now: float) -> list[Decision]:
        """Free the slot of an attempt that a worker has released, however the attempt ended."""
        worker = self.state.workers.get(worker_id)
        if worker is None or worker.held.get(request_id) != attempt:
            return []
        del worker.held[request_id]
        self.dispatcher.mark_used(worker)
        return self.dispatcher.dispatch(now)

    def set_slots(self, worker_id: str, slots: int, now: float) -> list[Decision]:
        """Change a worker's number of slots; running requests continue."""
        worker = self.state.workers[worker_id]
        worker.slots = slots
        self.state.moved.update(worker.spaces)
        return self.dispatcher.dispatch(now)

    def drain(self, worker_id: str, now: float) -> list[Decision]:
        """Stop starting requests on this worker; what waited for it may start on another."""
        worker = self.state.workers[worker_id]
        worker.draining = True
        self.state.moved.update(worker.spaces)
        return self.dispatcher.dispatch(now)

    def undrain(self, worker_id: str, now: float) -> list[Decision]:
        """Undo `drain`."""
        worker = self.state.workers[worker_id]
        worker.draining = False
        self.state.moved.update(worker.spaces)
        return self.dispatcher.dispatch(now)

    def count_completed(self, worker_id: str) -> None:
        """A worker completed an attempt: what its engine failed before counts no more."""
        if (worker := self.state.workers.get(worker_id)) is not None:
            worker.failures, worker.rests, worker.rests_until = 0, 0, 0.0

    def count_engine_failure(self, worker_id: str, now: float) -> float:
        """A worker's engine failed an attempt. From the third in a row on it rests, twice as long each time.

        It fails faster than others work, and so would be free most often and eat the queue.

        Returns:
            for how many seconds it rests from now on; 0 if nothing has changed.
        """
        worker = self.state.workers.get(worker_id)
        if worker is None:
            return 0.0
        worker.failures += 1
        if worker.failures < FAILURES_TO_REST or worker.rests_until:
            return 0.0
        rest_s = min(REST_FIRST_S * 2.0 ** min(worker.rests, 32), REST_LONGEST_S)  # a float has no room for 2 ** 1024
        worker.rests, worker.rests_until = worker.rests + 1, now + rest_s
        return rest_s

    def end_rests(self, now: float) -> tuple[list[str], list[Decision]]:
        """Let workers take requests again whose rest is over: their ids, and what can start now."""
        over = [worker for worker in self.state.workers.values() if 0 < worker.rests_until <= now]
        for worker in over:
            worker.rests_until = 0.0
        return [worker.worker_id for worker in over], self.dispatcher.dispatch(now) if over else []

    def unlink(self, worker_id: str, now: float) -> tuple[list[ScheduledRequest], list[Decision]]:
        """Note that a worker's link ended; the worker may reconnect.

        Returns:
            The requests that ran on it; the caller calls `lose` for each when its grace period is over. And what can
            start now: requests may have waited for this worker, because another had failed them or rests.
        """
        worker = self.state.workers[worker_id]
        worker.linked = False
        self.state.moved.update(worker.spaces)
        away = [entry for entry in map(self.state.entries.get, worker.held) if entry and entry.worker_id == worker_id]
        for entry in away:
            entry.worker_lost_at = now
        # Nothing waits for the other attempts, which are over.
        worker.held = {entry.request_id: entry.attempt for entry in away}
        if not worker.held:
            del self.state.workers[worker_id]
        return away, self.dispatcher.dispatch(now)

    # -- requests

    def admit(self, entry: ScheduledRequest, *, answered: bool = False) -> Rejected | None:
        """Admit a new request if its space has room; `enqueue` queues it once it is complete and stored.

        Args:
            entry: the request.
            answered: whether a result that is kept answers it: it needs no worker, nor a place if it is copied at once.
        """
        space = self.state.spaces.get(entry.space)
        if space is None:
            return no_such_space(entry.space, entry.request_id)
        if space.paused:
            return _refuse(entry, ErrorCode.SPACE_PAUSED, f"space {space.name!r} is paused; try again later")
        if space.rules.refuse_when_empty and not answered and not self.state.workers_of(space.name):
            return _refuse(
                entry, ErrorCode.NO_WORKER, f"space {space.name!r} has no worker; start one with gpuworker run"
            )
        if full := space.why_full(entry.principal, answered=answered):
            retry_after_s = estimate.estimate_retry_s(space, self.state.slots_of(space.name)[1])
            return _refuse(entry, ErrorCode.QUEUE_FULL, full, retry_after_s)
        self.state.add_entry(entry)
        self.state.add_admitted(entry)
        return None

    def enqueue(self, entry: ScheduledRequest, now: float) -> list[Decision]:
        """Queue an admitted request that is complete and stored; one with a pipe once each source has begun."""
        if entry.is_piped:
            self.state.end_upload(entry)
            entry.waits = True
            self.state.unsettle(entry)
        else:
            self.state.remove_admitted(entry)
            self.dispatcher.push(entry)
        return self.dispatcher.dispatch(now)

    def note_source_output(self, entry: ScheduledRequest, source_id: str, now: float) -> list[Decision]:
        """Note that something has come of the output of a source, or its end."""
        if source_id not in entry.silent_sources or entry.request_id not in self.state.entries:
            return []
        self.state.unsettled[entry.request_id] = entry
        entry.silent_sources.discard(source_id)
        return self.dispatcher.dispatch(now)

    def begin_anew(self, entry: ScheduledRequest, source_id: str, now: float) -> list[Decision]:
        """Let a piped request wait for a source once more: what came of that source's output is void."""
        if entry.request_id not in self.state.entries or entry.cancel_reason is not None:
            return []
        message = f"request {source_id}, its source, has begun anew"
        stop = self.dispatcher.stop(entry, message)
        if entry.retry == "never" and entry.attempt:
            message += "; not tried again, because retry is 'never'"
            return [*stop, Finish(entry, ErrorCode.SOURCE_FAILED, message)]
        entry.silent_sources.add(source_id)
        if not entry.waits:
            self.dispatcher.hold_back(entry)
        entry.reproducible, entry.has_output, entry.next_seq = "", False, 0
        return [*stop, Wait(entry), *self.dispatcher.dispatch(now)]

    def restore(self, entry: ScheduledRequest, now: float) -> None:
        """Restore a stored request after a restart, in ascending order of tickets; no worker is connected yet.

        If the store names the worker that ran the attempt, that worker counts as away, since `entry.worker_lost_at` or
        from now on: it may reconnect.
        """
        self.state.add_entry(entry)
        if entry.attempt_may_be_newer:
            entry.highest_attempt = max(entry.highest_attempt, entry.attempt + 1)
        if entry.state is State.RUNNING:
            if entry.worker_lost_at is None and not entry.copied:
                entry.worker_lost_at = now
            self.state.spaces[entry.space].running[entry.request_id] = entry
            if entry.worker_id is not None:
                self.dispatcher.away_worker(entry.worker_id, entry.space).held[entry.request_id] = entry.attempt
        elif entry.is_piped:
            entry.state, entry.waits = State.UPLOADING, True
            self.state.add_admitted(entry)
        else:
            self.dispatcher.push(entry)

    def settle(self, name: str, now: float) -> list[Decision]:
        """Start requests of a space from now on: its workers have had time to come back after a restart."""
        self.state.spaces[name].settling = False
        return self.dispatcher.dispatch(now)

    def end(self, request_id: str, state: State, now: float) -> list[Decision]:
        """A request has its last frame. A slot it may hold is freed by `release`."""
        entry = self.state.pop_entry(request_id)
        if entry is None:
            return []
        space = self.state.spaces[entry.space]
        if entry in space.queue:
            space.queue.remove(entry)
        self.dispatcher.forget_away(entry)
        self.state.remove_admitted(entry)
        if space.running.pop(request_id, None) is not None and state is State.COMPLETED and not entry.copied:
            space.recent_runs_s.append(max(0.0, now - entry.started_at))
        entry.state = state
        self.state.moved.add(space.name)
        return self.dispatcher.dispatch(now)

    def cancel(self, request_id: str, reason: str) -> list[Decision]:
        """Cancel a request: one that waits ends at once; a running one is stopped by its worker."""
        entry = self.state.entries.get(request_id)
        if entry is None:
            return []
        if entry.worker_id and entry.worker_lost_at is None:  # it runs
            if entry.cancel_reason is not None:
                return []
            entry.cancel_reason = reason
            return [Stop(entry.worker_id, request_id, reason)]
        return [*self.dispatcher.stop(entry, reason), Finish(entry, None, entry.cancel_reason or reason)]

    def fail(self, request_id: str, code: ErrorCode, message: str) -> list[Decision]:
        """End a request as failed; its attempt is stopped, and the slot is free when the worker answers."""
        entry = self.state.entries.get(request_id)
        return [] if entry is None else [*self.dispatcher.stop(entry, message), Finish(entry, code, message)]

    def lose(
        self, request_id: str, code: ErrorCode, message: str, now: float, *, innocent: bool | None = None
    ) -> list[Decision]:
        """Handle the loss of an attempt (worker lost, engine crashed or hung): queue the request again, or fail it.

        Args:
            request_id: the id of a running request.
            code: the error code with which the request fails if it is not tried again.
            message: the reason of the loss, for people.
            now: monotonic seconds.
            innocent: for an attempt that ended with the process of a shared engine: whether others that ran there
                caused this rather than it; None for any other loss.
        """
        entry = self.state.entries.get(request_id)
        if entry is None or entry.state is not State.RUNNING:
            return []
        stop = self.dispatcher.stop(entry, message)
        if entry.cancel_reason is not None:
            return [*stop, Finish(entry, None, entry.cancel_reason)]
        if innocent and entry.innocent_losses < MAX_INNOCENT_LOSSES:
            entry.innocent_losses += 1
        else:
            entry.losses += 1
            if code in ENGINE_FAULTS:
                entry.failed_on.add(entry.worker_id or "")
        if innocent is False or entry.innocent_losses >= INNOCENT_UNTIL_ALONE:
            self.state.suspect(entry)
        space = self.state.spaces[entry.space]
        if entry.losses >= space.rules.max_attempts:
            why = f"{entry.losses} attempts have been lost (this was attempt {entry.attempt}), so it is given up"
            return [*stop, Finish(entry, code, f"{message}; {why}")]
        if entry.retry == "never" or (entry.retry == "before_output" and entry.has_output and not entry.reproducible):
            delivered = f"{entry.next_seq} frames were" if entry.next_seq else "some of it was"  # 0 after a restart
            why = "retry is 'never'" if entry.retry == "never" else f"{delivered} delivered already"
            return [*stop, Finish(entry, code, f"{message}; not tried again, because {why}")]
        self.dispatcher.clear_run(entry)
        entry.state = State.QUEUED
        space.queue.requeue(entry)
        self.state.moved.add(space.name)
        return [*stop, Requeue(entry), *self.dispatcher.dispatch(now)]

    def has_begun(self, request_id: str, now: float) -> list[Decision]:
        """An attempt that runs alone has made something: it is not what ends a process as it begins."""
        entry = self.state.entries.get(request_id)
        if entry is None or entry.innocent_losses >= INNOCENT_UNTIL_ALONE:
            return []
        self.state.acquit(entry)
        return self.dispatcher.dispatch(now)

    def copy(self, entry: ScheduledRequest, reproducible: str, now: float) -> list[Decision]:
        """Run a live request, which no worker runs, without one: the caller copies the frames of an equal request.

        Args:
            entry: the request. It continues at its `next_seq` if `reproducible` is that of its last attempt.
            reproducible: `ScheduledRequest.reproducible` of the request that is copied.
            now: monotonic seconds.
        """
        self.state.remove_admitted(entry)
        space = self.state.spaces[entry.space]
        if entry in space.queue:
            space.queue.remove(entry)
        self.dispatcher.start_copy(entry, reproducible, now)
        return self.dispatcher.dispatch(now)  # a worker may have been kept free for it

    def end_copy(self, entry: ScheduledRequest, now: float) -> list[Decision]:
        """Queue a copied request, because the request that it is copied from gives no result.

        This is no loss of its own, so neither `retry` nor `max_attempts` matters. With output it comes before those
        that wait, as its listener is in mid-stream; otherwise it takes the place that it would have had.
        """
        if not entry.copied or entry.state is not State.RUNNING:
            return []
        space = self.state.spaces[entry.space]
        self.dispatcher.clear_run(entry)
        entry.state = State.QUEUED
        (space.queue.requeue if entry.has_output else space.queue.push)(entry)
        self.state.moved.add(space.name)
        return [Requeue(entry), *self.dispatcher.dispatch(now)]

    def adopt_later_attempt(self, entry: ScheduledRequest, attempt: int, now: float) -> list[Decision]:
        """Switch a live request to a later attempt than its own: a client has frames of it, but it was not stored.

        The client drops every frame of the current attempt, so this one cannot continue.
        The worker that runs the later attempt may still connect.

        A client can name only what may have begun before a restart: `highest_attempt` is 0 without one, and below the
        attempt as soon as one starts. At any other time only the scheduler changes the attempt number.
        """
        if not entry.attempt < attempt <= entry.highest_attempt:
            return []
        entry.attempt, entry.next_seq, entry.attempt_known_from_client = attempt, 0, True
        if entry.worker_lost_at is None:  # one that waits has no attempt to lose
            message = "a client has received frames of a later attempt, which was lost when the relay was killed"
            return self.lose(entry.request_id, ErrorCode.WORKER_LOST, message, now)
        self.dispatcher.forget_away(entry)
        entry.worker_id = None
        return []

    def promote(self, request_id: str) -> Rejected | None:
        """Move a queued request to the front of its space's queue."""
        entry = self.state.entries.get(request_id)
        if entry is None or entry.state is not State.QUEUED:
            state = "unknown or ended" if entry is None else entry.state
            return Rejected.because(
                ErrorCode.REQUEST_NOT_FOUND, f"request {request_id} is {state}; only a queued one can be promoted"
            )
        queue = self.state.spaces[entry.space].queue
        entry.promoted = 1 + max(each.promoted for each in queue)
        queue.promote(entry)
        self.state.moved.add(entry.space)
        return None

    def limit_running(self, principal: str, at_most: int | None) -> None:
        """Limit the running requests of `principal` in all spaces together to `at_most`; None removes the limit."""
        if at_most is None:
            self.state.max_running.pop(principal, None)
        else:
            self.state.max_running[principal] = at_most

    def queued_count(self, principal: str) -> int:
        """Requests of `principal` that are admitted or queued, in all spaces together."""
        return sum(space.waiting_count(principal) for space in self.state.spaces.values())

    # -- queries

    def positions(self, name: str, now: float) -> dict[str, QueuePosition]:
        """Return the position of every queued request of a space, by request id."""
        space = self.state.spaces[name]
        of, wait_s = len(space.queue), self._estimate_wait_s(space, now)
        return {
            entry.request_id: QueuePosition(index + 1, of, wait_s(index)) for index, entry in enumerate(space.queue)
        }

    def position(self, entry: ScheduledRequest, now: float) -> QueuePosition | None:
        """The position of one request, without a walk through the queue; None where it is not queued."""
        space = self.state.spaces.get(entry.space)
        if space is None or entry not in space.queue:
            return None
        index = space.queue.position(entry)
        return QueuePosition(index + 1, len(space.queue), self._estimate_wait_s(space, now)(index))

    def _estimate_wait_s(self, space: SpaceState, now: float) -> Callable[[int], float | None]:
        slots = sum(worker.slots for worker in self.state.workers_of(space.name) if not worker.draining)
        return estimate.estimate_wait_s(space, slots, now)


def no_such_space(
    name: str, request_id: str | None = None, *, operator: bool = False, known: Iterable[str] = ()
) -> Rejected:
    """Return the refusal for a space that does not exist.

    Args:
        name: the name that was asked for.
        request_id: the request that asked for it, if any.
        operator: whether to say how the space is created.
        known: the spaces that may be named to whoever asked, for a hint at a misspelt name.
    """
    close = difflib.get_close_matches(name, islice(known, MAX_COMPARED), n=1)
    hint = f"did you mean {close[0]!r}? Otherwise " if close else ""
    hint += f"create it with: relayd space create {name}" if operator else "ask the relay's operator"
    return Rejected.because(ErrorCode.SPACE_NOT_FOUND, f"space {name!r} does not exist; {hint}", request_id=request_id)


def _refuse(entry: ScheduledRequest, code: ErrorCode, message: str, retry_after_s: float | None = None) -> Rejected:
    return Rejected.because(code, message, request_id=entry.request_id, retry_after_s=retry_after_s)
