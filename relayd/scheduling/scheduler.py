"""The scheduler: which request runs where, and what happens to it when its worker goes away. Pure.

Theory of operation
-------------------
Events come in and decisions go out: no `await`, no clock, no I/O. A method changes the `SchedulerState` and returns
what the caller has to do; the caller must carry out all of it. Times are arguments, in monotonic seconds.

A slot is busy as long as a worker holds it, and not as long as a request runs: it is free again only when the worker
releases it, or is gone. So a request may have ended (timed out, cancelled) while its slot is still held. Every method
that may free a slot, or may add something that waits, ends with `Dispatcher.dispatch`, which starts what can start.

| event | from | to | returns |
| --- | --- | --- | --- |
| `admit` | - | uploading | None or `Rejected` |
| `enqueue` | uploading | queued | what can start now |
| `dispatch` | queued | running, attempt + 1 (+ 2 when a newer attempt may exist after a restart) | `Start` |
| `unlink` | running | running, worker away | the requests; the caller starts their grace |
| `join`, attempt named | running (worker away), or queued too early | running | `Registration.resume` |
| `join`, attempt not named | running | running again, or as `lose` (1) | `Start` ... |
| `lose` | running | queued in its old place, or unchanged (2) | `Stop`?, then `Requeue` or `Finish` |
| `cancel` | uploading, queued, worker away | unchanged until the caller calls `end` | `Finish` cancelled |
| `cancel` | running | running, cancelling | `Stop` |
| `fail` | any live | unchanged until the caller calls `end` | `Stop`?, `Finish` failed |
| `end` | any live | completed, failed, cancelled | what can start now |
| `release` | any | the slot is free | what can start now |

(1) It runs again from `next_seq` if nothing of it was delivered or the worker makes the same frames.
(2) It is queued again while losses < max_attempts and `retry` allows it; otherwise the caller ends it as failed.

The stateful test (tests/relayd/scheduling/test_scheduler_machine.py) holds this table against any order of events.
"""

from collections.abc import Mapping

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
    WorkerState,
)


@attrs.define(eq=False)
class Scheduler:
    """What may happen to spaces, workers and live requests, and what follows from it."""

    state: SchedulerState = attrs.field(factory=SchedulerState)
    dispatcher: Dispatcher = attrs.field(
        default=attrs.Factory(lambda scheduler: Dispatcher(scheduler.state), takes_self=True)
    )

    # -- spaces

    def add_space(self, name: str, rules: SpaceRules, *, paused: bool = False) -> None:
        """Open a space."""
        self.state.spaces[name] = SpaceState(name=name, rules=rules, paused=paused)

    def set_rules(self, name: str, rules: SpaceRules, now: float) -> list[Decision]:
        """Change what a space allows; requests and workers that are in stay, even beyond a limit that is lower now."""
        self.state.spaces[name].rules = rules
        self.state.moved.add(name)
        return self.dispatcher.dispatch(now)

    def remove_space(self, name: str) -> Rejected | None:
        """Close a space that has no requests and no workers."""
        space = self.state.spaces.get(name)
        if space is None:
            return no_such_space(name, operator=True)
        if space.queue or space.running or space.admitted:
            return Rejected.because(
                ErrorCode.SPACE_EXISTS,
                f"space {name!r} still has {len(space.queue) + len(space.admitted)} queued and {len(space.running)} "
                "running requests; pause it and let them end, or cancel them, then delete it",
            )
        if workers := self.state.workers_of(name):
            return Rejected.because(
                ErrorCode.SPACE_EXISTS,
                f"space {name!r} is served by {', '.join(w.worker_id for w in workers)}; stop it first, then delete it",
            )
        del self.state.spaces[name]
        return None

    def pause_space(self, name: str) -> Rejected | None:
        """Start nothing in this space, and accept nothing new."""
        if name not in self.state.spaces:
            return no_such_space(name, operator=True)
        self.state.spaces[name].paused = True
        self.state.moved.add(name)
        return None

    def resume_space(self, name: str, now: float) -> Rejected | list[Decision]:
        """Undo `pause_space`."""
        if name not in self.state.spaces:
            return no_such_space(name, operator=True)
        self.state.spaces[name].paused = False
        self.state.moved.add(name)
        return self.dispatcher.dispatch(now)

    # -- workers

    def join(self, worker: WorkerState, running: Mapping[str, int], now: float) -> Rejected | Registration:
        """A worker registers, for the first time or again (same id).

        Args:
            worker: as it is now; what it held before is taken over from the state of the same id.
            running: request id -> attempt, of all it still has frames of.
            now: monotonic seconds.
        """
        for name in worker.spaces:
            if refusal := self._no_room(name, worker.worker_id):
                return refusal
        known = self.state.workers.get(worker.worker_id)
        held_before = known.held if known else {}
        if known:
            worker.last_used, worker.draining = known.last_used, known.draining
        self.state.workers[worker.worker_id] = worker
        self.state.moved.update(worker.spaces)
        resume, abandon, decisions = [], [], list[Decision]()
        for request_id, attempt in running.items():
            entry = self._claim(worker, request_id, attempt, now)
            if entry is None:
                abandon.append(request_id)
            else:
                resume.append(entry)
        for request_id in [
            held for held in held_before if held not in worker.held
        ]:  # sent, but lost with the connection
            entry = self.state.entries.get(request_id)
            if entry is not None and entry.worker_id == worker.worker_id:
                decisions += self._dispatch_again(entry, worker, now)
        return Registration(resume, abandon, [*decisions, *self.dispatcher.dispatch(now)])

    def is_replaced(self, worker: WorkerState) -> bool:
        """Whether a worker that is away could not come back now, because another has its place."""
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
        """Return the entry of an attempt that a worker continues; None if it is over or runs on another worker."""
        entry = self.state.entries.get(request_id)
        if entry is None or not attempt or entry.space not in worker.spaces:
            return None
        if attempt != entry.attempt and not (entry.attempt_may_be_newer and attempt == entry.attempt + 1):
            return None
        if entry.state is State.QUEUED:  # given up too early: it has not been started again, so it runs where it ran
            self.state.spaces[entry.space].queue.remove(entry)
            if attempt == entry.attempt and not entry.attempt_known_from_client:
                entry.losses = max(0, entry.losses - 1)  # it was not lost after all
        elif entry.worker_id not in (None, worker.worker_id):
            if attempt == entry.attempt:
                return None
            self.dispatcher.forget_away(entry)
        if (
            attempt != entry.attempt or entry.attempt_known_from_client
        ):  # the relay was killed before the store had written that it began
            entry.attempt, entry.started_at, entry.reproducible = attempt, now, worker.reproducible
            entry.may_be_behind = False
        entry.attempt_may_be_newer = entry.attempt_known_from_client = False
        self.dispatcher.mark_running(entry, worker)
        worker.held[request_id] = attempt
        return entry

    def _dispatch_again(self, entry: ScheduledRequest, worker: WorkerState, now: float) -> list[Decision]:
        """A worker came back without an attempt that was sent to it: start it again if no output would be lost."""
        if entry.cancel_reason is not None:
            return [Finish(entry, None, entry.cancel_reason)]
        goes_on = bool(entry.reproducible) and entry.reproducible == worker.reproducible
        begun = entry.next_seq or entry.has_output  # what was heard before a restart has no frames here
        if entry.space not in worker.spaces or (begun and not goes_on):
            return self.lose(entry.request_id, ErrorCode.WORKER_LOST, "its worker came back without it", now)
        self.dispatcher.mark_running(entry, worker)
        if entry.attempt_may_be_newer:
            entry.attempt, entry.attempt_may_be_newer = entry.attempt + 2, False  # as in `_start`
            entry.may_be_behind = False
        worker.held[entry.request_id] = entry.attempt
        return [Start(entry, entry.next_seq)]

    def release(self, worker_id: str, request_id: str, attempt: int, now: float) -> list[Decision]:
        """A worker released an attempt; however that ended, its slot is free."""
        worker = self.state.workers.get(worker_id)
        if worker is None or worker.held.get(request_id) != attempt:
            return []
        del worker.held[request_id]
        self.dispatcher.mark_used(worker)
        return self.dispatcher.dispatch(now)

    def set_slots(self, worker_id: str, slots: int, now: float) -> list[Decision]:
        """A worker has more or fewer slots; what runs goes on."""
        worker = self.state.workers[worker_id]
        worker.slots = slots
        self.state.moved.update(worker.spaces)
        return self.dispatcher.dispatch(now)

    def drain(self, worker_id: str) -> None:
        """Start nothing more on this worker."""
        worker = self.state.workers[worker_id]
        worker.draining = True
        self.state.moved.update(worker.spaces)

    def undrain(self, worker_id: str, now: float) -> list[Decision]:
        """Undo `drain`."""
        worker = self.state.workers[worker_id]
        worker.draining = False
        self.state.moved.update(worker.spaces)
        return self.dispatcher.dispatch(now)

    def unlink(self, worker_id: str, now: float) -> list[ScheduledRequest]:
        """A worker's link is gone; it may come back. Returns what ran there; the caller calls `lose` in due time."""
        worker = self.state.workers[worker_id]
        worker.linked = False
        self.state.moved.update(worker.spaces)
        away = [entry for entry in map(self.state.entries.get, worker.held) if entry and entry.worker_id == worker_id]
        for entry in away:
            entry.worker_lost_at = now
        # Attempts that were fenced off already have nobody waiting for them.
        worker.held = {entry.request_id: entry.attempt for entry in away}
        if not worker.held:
            del self.state.workers[worker_id]
        return away

    # -- requests

    def admit(self, entry: ScheduledRequest) -> Rejected | None:
        """Admit a new request if its space has room; `enqueue` queues it once it is complete and stored."""
        space = self.state.spaces.get(entry.space)
        if space is None:
            return no_such_space(entry.space, entry.request_id)
        rules = space.rules
        if space.paused:
            return _refuse(entry, ErrorCode.SPACE_PAUSED, f"space {space.name!r} is paused; try again later")
        if rules.refuse_when_empty and not self.state.workers_of(space.name):
            return _refuse(
                entry, ErrorCode.NO_WORKER, f"space {space.name!r} has no worker now; start one with gpuworker run"
            )
        if len(space.queue) + len(space.admitted) >= rules.max_queued:
            return _refuse(
                entry,
                ErrorCode.QUEUE_FULL,
                f"space {space.name!r} has its {rules.max_queued} requests queued; try again later",
                estimate.estimate_retry_s(space, self.state.slots_of(space.name)[1]),
            )
        mine = space.queue.count_for(entry.principal)
        mine += sum(principal == entry.principal for principal in space.admitted.values())
        if mine >= rules.max_queued_per_principal:
            return _refuse(
                entry,
                ErrorCode.QUEUE_FULL,
                f"{entry.principal!r} has {mine} requests queued in space {space.name!r}, which is its limit; "
                "wait for one to start",
                estimate.estimate_retry_s(space, self.state.slots_of(space.name)[1]),
            )
        self.state.entries[entry.request_id] = entry
        space.admitted[entry.request_id] = entry.principal
        return None

    def enqueue(self, entry: ScheduledRequest, now: float) -> list[Decision]:
        """An admitted request is complete and stored: it waits for a slot from now on."""
        space = self.state.spaces[entry.space]
        space.admitted.pop(entry.request_id, None)
        entry.state = State.QUEUED
        space.queue.push(entry)
        self.state.moved.add(space.name)
        return self.dispatcher.dispatch(now)

    def restore(self, entry: ScheduledRequest, now: float) -> None:
        """Restore a stored request after a restart, in ascending order of tickets; no worker is connected yet.

        The worker that an attempt ran on, where the store names one, counts as away: it may come back to it.
        """
        space = self.state.spaces[entry.space]
        self.state.entries[entry.request_id] = entry
        entry.may_be_behind = True
        if entry.state is State.RUNNING:
            entry.worker_lost_at = now
            space.running[entry.request_id] = entry
            if entry.worker_id is not None:
                self.dispatcher.away_worker(entry.worker_id, entry.space).held[entry.request_id] = entry.attempt
        else:
            entry.state = State.QUEUED
            space.queue.push(entry)

    def end(self, request_id: str, state: State, now: float) -> list[Decision]:
        """A request has its last frame. A slot it may hold is freed by `release`."""
        entry = self.state.entries.pop(request_id, None)
        if entry is None:
            return []
        space = self.state.spaces[entry.space]
        if entry in space.queue:
            space.queue.remove(entry)
        self.dispatcher.forget_away(entry)
        space.admitted.pop(request_id, None)
        if space.running.pop(request_id, None) is not None and state is State.COMPLETED:
            space.recent_runs_s.append(max(0.0, now - entry.started_at))
        entry.state = state
        self.state.moved.add(space.name)
        return self.dispatcher.dispatch(now)

    def cancel(self, request_id: str, reason: str) -> list[Decision]:
        """Stop a request: what waits ends at once; what runs is stopped by its worker, which answers `cancelled`."""
        entry = self.state.entries.get(request_id)
        if entry is None:
            return []
        if entry.state is State.RUNNING and entry.worker_id and entry.worker_lost_at is None:
            if entry.cancel_reason is not None:
                return []
            entry.cancel_reason = reason
            return [Stop(entry.worker_id, request_id, reason)]
        return [*self.dispatcher.stop(entry, reason), Finish(entry, None, entry.cancel_reason or reason)]

    def fail(self, request_id: str, code: ErrorCode, message: str) -> list[Decision]:
        """End a request as failed; its attempt is stopped, and its slot is free when the worker answers."""
        entry = self.state.entries.get(request_id)
        return [] if entry is None else [*self.dispatcher.stop(entry, message), Finish(entry, code, message)]

    def lose(self, request_id: str, code: ErrorCode, message: str, now: float) -> list[Decision]:
        """An attempt is lost (worker gone, engine crashed or hung): queue it again, or fail it, by its retry policy.

        Args:
            request_id: of a running request.
            code: why; what the request fails with if it is not tried again.
            message: the same in words.
            now: monotonic seconds.
        """
        entry = self.state.entries.get(request_id)
        if entry is None or entry.state is not State.RUNNING:
            return []
        stop = self.dispatcher.stop(entry, message)
        if entry.cancel_reason is not None:
            return [*stop, Finish(entry, None, entry.cancel_reason)]
        entry.losses += 1
        space = self.state.spaces[entry.space]
        if entry.losses >= space.rules.max_attempts:
            words = (
                f"{message}; it was attempt {entry.attempt} and {entry.losses} have been lost now, so it is given up"
            )
            return [*stop, Finish(entry, code, words)]
        if entry.retry == "never" or (entry.retry == "before_output" and entry.has_output and not entry.reproducible):
            heard = f"{entry.next_seq} frames were" if entry.next_seq else "some of it was"  # 0: before a restart
            why = "retry is 'never'" if entry.retry == "never" else f"{heard} delivered already"
            return [*stop, Finish(entry, code, f"{message}; not tried again, because {why}")]
        self.dispatcher.clear_run(entry)
        entry.state = State.QUEUED
        space.queue.requeue(entry)
        self.state.moved.add(space.name)
        return [*stop, Requeue(entry), *self.dispatcher.dispatch(now)]

    def adopt_later_attempt(self, request_id: str, attempt: int, now: float) -> list[Decision]:
        """A listener has frames of the attempt after the current one, which a relay that was killed had not stored yet.

        The listener would drop everything of the current attempt, its end too, so nothing continues behind its frames.
        The worker that runs the later attempt may still connect.

        A listener's word counts once, and only while the store may really be behind: after a restart, until an
        attempt starts. Otherwise the number is the scheduler's alone, and no client can raise it.
        """
        entry = self.state.entries.get(request_id)
        if entry is None or not entry.may_be_behind or attempt != entry.attempt + 1:
            return []
        entry.may_be_behind = False
        entry.attempt, entry.next_seq, entry.attempt_known_from_client = attempt, 0, True
        if entry.state is State.RUNNING and entry.worker_lost_at is None:
            words = "a listener has heard a later attempt, which the relay lost when it was killed"
            return self.lose(request_id, ErrorCode.WORKER_LOST, words, now)
        self.dispatcher.forget_away(entry)
        entry.worker_id = None
        return []

    def promote(self, request_id: str) -> Rejected | None:
        """Put a queued request to the front of its space."""
        entry = self.state.entries.get(request_id)
        if entry is None or entry.state is not State.QUEUED:
            state = "unknown or ended" if entry is None else entry.state
            return Rejected.because(
                ErrorCode.REQUEST_NOT_FOUND, f"request {request_id} is {state}; only a queued one can be promoted"
            )
        self.state.spaces[entry.space].queue.promote(entry)
        self.state.moved.add(entry.space)
        return None

    def limit_running(self, principal: str, at_most: int | None) -> None:
        """Let `principal` have `at_most` running requests in all spaces together; None lifts the limit."""
        if at_most is None:
            self.state.max_running.pop(principal, None)
        else:
            self.state.max_running[principal] = at_most

    def queued_count(self, principal: str) -> int:
        """Requests of `principal` that are admitted or queued, in all spaces together."""
        return sum(
            space.queue.count_for(principal) + list(space.admitted.values()).count(principal)
            for space in self.state.spaces.values()
        )

    # -- questions

    def positions(self, name: str, now: float) -> dict[str, QueuePosition]:
        """Request id -> position, for all that is queued in a space."""
        space = self.state.spaces[name]
        of = len(space.queue)
        slots = sum(worker.slots for worker in self.state.workers_of(name) if not worker.draining)
        waits = estimate.estimate_waits_s(space, slots, of, now)
        return {
            entry.request_id: QueuePosition(index + 1, of, waits[index] if waits else None)
            for index, entry in enumerate(space.queue)
        }


def no_such_space(name: str, request_id: str | None = None, *, operator: bool = False) -> Rejected:
    """The refusal for a space that does not exist; only operators can run the command that makes one."""
    hint = f"make it with: relayd space create {name}" if operator else "ask the relay's operator"
    return Rejected.because(ErrorCode.SPACE_NOT_FOUND, f"space {name!r} does not exist; {hint}", request_id=request_id)


def _refuse(entry: ScheduledRequest, code: ErrorCode, message: str, retry_after_s: float | None = None) -> Rejected:
    return Rejected.because(code, message, request_id=entry.request_id, retry_after_s=retry_after_s)
