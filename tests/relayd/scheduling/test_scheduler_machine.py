"""The scheduler under every order of events that Hypothesis can think of, against the books a test keeps by itself."""

from collections import Counter
from collections.abc import Iterable
from itertools import count

import attrs
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import Rejected
from relayd.scheduling.model import (
    Decision,
    Finish,
    Registration,
    Requeue,
    ScheduledRequest,
    SpaceRules,
    Start,
    State,
    Stop,
    WorkerState,
)
from relayd.scheduling.scheduler import Scheduler

SPACES = {
    "tts": SpaceRules(max_workers=2, max_queued=8),
    "other": SpaceRules(max_workers=3, max_running_per_principal=1, max_attempts=2),
}
WORKERS = {"one": "", "two": "tone", "three": "tone"}
#: Those whose engine has one process for all slots.
SHARED = {"one", "two"}
picks = st.integers(0, 1000)


def _bytes_per_principal(entries: Iterable[ScheduledRequest]) -> Counter[str]:
    total = Counter[str]()
    for entry in entries:
        total[entry.principal] += entry.input_bytes
    return total


def can_take(entry: ScheduledRequest, worker: WorkerState) -> bool:
    """Whether a worker would make the frames that a client has already, or none are needed."""
    return not entry.has_output or entry.retry == "always" or entry.reproducible == worker.reproducible


@attrs.define
class Box:
    """A worker as it is: what it was handed and has not let go of, linked or not."""

    spaces: tuple[str, ...]
    slots: int
    linked: bool = True
    draining: bool = False
    shared: bool = False
    #: request id -> attempt.
    runs: dict[str, int] = attrs.field(factory=dict)


class SchedulerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler()
        for name, rules in SPACES.items():
            self.scheduler.add_space(name, rules)
        self.boxes: dict[str, Box] = {}
        self.live: dict[str, ScheduledRequest] = {}
        self.ended: dict[str, State] = {}
        self.admitted: set[str] = set()
        self.stopping: set[str] = set()
        self.starts: dict[str, list[int]] = {}
        self.tickets = count(1)
        self.now = 100.0

    # -- what a caller does with decisions

    def carry_out(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            match decision:
                case Start(entry, from_seq):
                    assert entry.request_id in self.live
                    box = self.boxes[entry.worker_id or ""]
                    again = self.starts.setdefault(entry.request_id, [])
                    assert box.linked
                    assert entry.request_id not in box.runs, "one attempt at a time"
                    assert not again or entry.attempt >= again[-1]
                    assert len(again) < 40
                    if box.shared and (not again or entry.attempt > again[-1]):
                        assert not (entry.alone and box.runs), "alone"
                        assert not any(n in self.live and self.live[n].alone for n in box.runs), "beside none alone"
                    if not again or entry.attempt > again[-1]:
                        assert not box.draining
                        assert not self.scheduler.state.spaces[entry.space].paused
                        assert len(box.runs) < box.slots, "never more than slots"
                    assert entry.request_id not in self.stopping
                    assert from_seq == entry.next_seq
                    again.append(entry.attempt)
                    box.runs[entry.request_id] = entry.attempt
                case Stop(worker_id, request_id):
                    assert request_id in self.boxes[worker_id].runs
                    assert self.boxes[worker_id].linked
                case Requeue(entry):
                    assert entry.request_id in self.live
                    assert entry.request_id not in self.stopping
                case Finish(entry, code):
                    assert (code is None) or entry.request_id not in self.stopping
                    self.end(entry.request_id, State.CANCELLED if code is None else State.FAILED)

    def end(self, request_id: str, state: State) -> None:
        assert request_id not in self.ended, "ended once"
        del self.live[request_id]
        self.admitted.discard(request_id)
        self.stopping.discard(request_id)
        self.ended[request_id] = state
        self.carry_out(self.scheduler.end(request_id, state, self.now))
        assert self.scheduler.end(request_id, state, self.now) == []

    def pick(self, names: list[str], choice: int) -> str:
        return names[choice % len(names)]

    def runs(self) -> list[str]:
        """Requests that run on a linked worker."""
        return [
            name for name, e in self.live.items() if e.state is State.RUNNING and e.worker_id and not e.worker_lost_at
        ]

    def copies(self) -> list[str]:
        """Requests whose frames are copied."""
        return [name for name, e in self.live.items() if e.copied]

    @initialize(spaces=st.lists(st.sampled_from([*SPACES]), max_size=5), first=st.sampled_from([*WORKERS]))
    def begin(self, spaces: list[str], first: str) -> None:
        """Something to do from the start: Hypothesis turns rules off at random, also those that make work."""
        self.join(first, 2, ("tts", "other"), set())
        for number, space in enumerate(spaces):
            self.submit(space, "ann" if number % 3 else "bob", 5, "before_output", True)

    # -- clients

    @rule(
        space=st.sampled_from([*SPACES]),
        principal=st.sampled_from(["ann", "bob"]),
        priority=st.sampled_from([5, 5, 9]),
        retry=st.sampled_from(["never", "before_output", "before_output", "always"]),
        whole=st.sampled_from([True, True, True, False]),
    )
    def submit(self, space: str, principal: str, priority: int, retry: str, whole: bool) -> None:
        ticket = next(self.tickets)
        entry = ScheduledRequest(
            request_id=f"r{ticket}",
            space=space,
            principal=principal,
            priority=priority,
            ticket=ticket,
            retry=retry,
            input_bytes=ticket % 3,
        )
        waiting = sum(e.space == space and e.state in (State.QUEUED, State.UPLOADING) for e in self.live.values())
        refusal = self.scheduler.admit(entry)
        full = self.scheduler.state.spaces[space].paused or waiting >= SPACES[space].max_queued
        assert (refusal is not None) == full
        if refusal is None:
            self.live[entry.request_id] = entry
            self.admitted.add(entry.request_id)
            if whole:
                self.enqueue(entry.ticket, entry.request_id)

    @precondition(lambda self: self.admitted)
    @rule(choice=picks)
    def enqueue(self, choice: int, name: str | None = None) -> None:
        name = name or self.pick(sorted(self.admitted), choice)
        self.admitted.discard(name)
        self.carry_out(self.scheduler.enqueue(self.live[name], self.now))

    @rule(choice=picks, reproducible=st.sampled_from(["tone", "other"]))
    def copy(self, choice: int, reproducible: str) -> None:
        waiting = [
            name
            for name, e in self.live.items()
            if e.state in (State.UPLOADING, State.QUEUED) and (not e.has_output or e.reproducible == reproducible)
        ]
        if waiting:
            name = self.pick(waiting, choice)
            attempt = self.live[name].attempt
            self.admitted.discard(name)
            decisions = self.scheduler.copy(self.live[name], reproducible, self.now)
            assert self.live[name].attempt > attempt
            self.carry_out(decisions)

    @precondition(lambda self: self.copies())
    @rule(choice=picks, how=st.sampled_from(["frame", "complete", "run"]))
    def go_on_with_a_copy(self, choice: int, how: str) -> None:
        name = self.pick(self.copies(), choice)
        entry = self.live[name]
        if how == "frame":
            entry.next_seq, entry.has_output = entry.next_seq + 1, True
        elif how == "complete":
            self.end(name, State.COMPLETED)
        else:
            self.carry_out(self.scheduler.end_copy(entry, self.now))
            assert name in self.ended or not entry.copied

    @precondition(lambda self: self.live)
    @rule(choice=picks)
    def cancel(self, choice: int) -> None:
        name = self.pick([*self.live], choice)
        decisions = self.scheduler.cancel(name, "enough")
        if any(isinstance(decision, Stop) for decision in decisions):
            self.stopping.add(name)
        assert decisions or name in self.stopping
        self.carry_out(decisions)

    @precondition(lambda self: self.live)
    @rule(choice=picks)
    def time_out(self, choice: int) -> None:
        name = self.pick([*self.live], choice)
        if name not in self.stopping:
            self.carry_out(self.scheduler.fail(name, ErrorCode.RUN_TIMEOUT, "slow"))
            assert name in self.ended

    @precondition(lambda self: self.live)
    @rule(choice=picks)
    def promote(self, choice: int) -> None:
        name = self.pick([*self.live], choice)
        entry = self.live[name]
        refusal = self.scheduler.promote(name)
        assert (refusal is None) == (entry.state is State.QUEUED)
        if refusal is None:
            assert next(iter(self.scheduler.positions(entry.space, self.now))) == name

    # -- workers

    @rule(
        worker_id=st.sampled_from([*WORKERS]),
        slots=st.sampled_from([2, 1, 3, 0]),
        spaces=st.sampled_from([("tts",), ("other",), ("tts", "other")]),
        forgets=st.sets(picks, max_size=2),
    )
    def join(self, worker_id: str, slots: int, spaces: tuple[str, ...], forgets: set[int]) -> None:
        """A new process, or one that comes back after a cut, perhaps before the cut was seen."""
        before = self.boxes.get(worker_id)
        if before is not None:
            spaces = before.spaces
        runs = dict(before.runs) if before else {}
        for choice in forgets:  # what a cut swallowed on its way
            if runs and (name := self.pick([*runs], choice)) and not self.heard(name):
                del runs[name]
        state = WorkerState(
            worker_id=worker_id,
            instance="i",
            spaces=spaces,
            slots=slots,
            reproducible=WORKERS[worker_id],
            shared=worker_id in SHARED,
        )
        others = {
            name: [b for i, b in self.boxes.items() if i != worker_id and b.linked and name in b.spaces]
            for name in spaces
        }
        joined = self.scheduler.join(state, runs, self.now)
        if any(len(others[name]) >= SPACES[name].max_workers for name in spaces):
            assert isinstance(joined, Rejected)
            assert joined.code == ErrorCode.SPACE_FULL
            return
        assert isinstance(joined, Registration)
        assert {e.request_id for e in joined.resume} | set(joined.abandon) == set(runs)
        resumed = {entry.request_id: entry.attempt for entry in joined.resume}
        assert all(runs[name] == attempt for name, attempt in resumed.items())
        self.boxes[worker_id] = Box(spaces, slots, True, state.draining, state.shared, resumed)
        self.carry_out(joined.decisions)

    def heard(self, name: str) -> bool:
        return name in self.live and self.live[name].next_seq > 0

    @precondition(lambda self: any(box.linked for box in self.boxes.values()))
    @rule(choice=picks)
    def unlink(self, choice: int) -> None:
        worker_id = self.pick([name for name, box in self.boxes.items() if box.linked], choice)
        away, decisions = self.scheduler.unlink(worker_id, self.now)
        self.boxes[worker_id].linked = False
        running = {n for n, e in self.live.items() if e.worker_id == worker_id and e.state is State.RUNNING}
        assert {entry.request_id for entry in away} == running
        self.carry_out(decisions)

    @rule(choice=picks)
    def give_up_on_a_worker_that_is_away(self, choice: int) -> None:
        away = [name for name, e in self.live.items() if e.worker_lost_at is not None]
        if away:
            name = self.pick(away, choice)
            self.carry_out(self.scheduler.lose(name, ErrorCode.WORKER_LOST, "gone", self.now))
            assert name in self.ended or self.live[name].worker_lost_at is None

    @rule(choice=picks)
    def hang(self, choice: int) -> None:
        if runs := [name for name in self.runs() if name not in self.stopping]:
            self.carry_out(self.scheduler.lose(self.pick(runs, choice), ErrorCode.IDLE_TIMEOUT, "hung", self.now))

    @rule(choice=picks)
    def crash(self, choice: int) -> None:
        if runs := self.runs():
            name = self.pick(runs, choice)
            entry = self.live[name]
            worker_id = entry.worker_id or ""
            del self.boxes[worker_id].runs[name]
            del self.scheduler.state.workers[worker_id].held[name]
            self.carry_out(self.scheduler.lose(name, ErrorCode.ENGINE_FAILED, "crashed", self.now))

    @rule(choice=picks, innocents=st.lists(st.booleans(), min_size=3, max_size=3))
    def end_a_shared_process(self, choice: int, innocents: list[bool]) -> None:
        """All that runs there is lost; the worker says who had made something."""
        shared = [w for w, box in self.boxes.items() if box.shared and box.linked and box.runs]
        if not shared:
            return
        worker_id = self.pick(shared, choice)
        box, held = self.boxes[worker_id], self.scheduler.state.workers[worker_id].held
        slots, box.slots = box.slots, 0
        self.carry_out(self.scheduler.set_slots(worker_id, 0, self.now))
        several = len(box.runs) > 1
        for (name, attempt), made_something in zip(list(box.runs.items()), innocents, strict=False):
            entry = self.live.get(name)
            del box.runs[name], held[name]
            if entry is None or (entry.worker_id, entry.attempt) != (worker_id, attempt):
                continue
            innocent, losses = made_something and several, entry.losses
            decisions = self.scheduler.lose(name, ErrorCode.ENGINE_FAILED, "crashed", self.now, innocent=innocent)
            assert entry.losses == losses + (not innocent and name not in self.stopping)
            assert entry.alone or innocent or name in self.stopping
            self.carry_out(decisions)
        box.slots = slots
        self.carry_out(self.scheduler.set_slots(worker_id, slots, self.now))

    @rule(choice=picks)
    def begin_alone(self, choice: int) -> None:
        if alone := [name for name in self.runs() if self.live[name].alone]:
            self.carry_out(self.scheduler.has_begun(self.pick(alone, choice), self.now))

    @rule(choice=picks, audible=st.booleans())
    def put_out_a_frame(self, choice: int, audible: bool) -> None:
        if runs := self.runs():
            entry = self.live[self.pick(runs, choice)]
            entry.next_seq += 1
            entry.has_output |= audible

    @precondition(lambda self: any(box.linked and box.runs for box in self.boxes.values()))
    @rule(choice=picks)
    def finish(self, choice: int) -> None:
        """A worker sends the last frame of an attempt, which may be over here."""
        self.now += 1
        held = [(w, n, a) for w, box in self.boxes.items() if box.linked for n, a in box.runs.items()]
        worker_id, name, attempt = held[choice % len(held)]
        del self.boxes[worker_id].runs[name]
        entry = self.live.get(name)
        if entry is not None and (entry.worker_id, entry.attempt) == (worker_id, attempt):
            self.end(name, State.CANCELLED if name in self.stopping else State.COMPLETED)
        self.carry_out(self.scheduler.release(worker_id, name, attempt, self.now))

    @precondition(lambda self: any(box.linked for box in self.boxes.values()))
    @rule(choice=picks, slots=st.integers(0, 3))
    def set_slots(self, choice: int, slots: int) -> None:
        worker_id = self.pick([name for name, box in self.boxes.items() if box.linked], choice)
        self.boxes[worker_id].slots = slots
        self.carry_out(self.scheduler.set_slots(worker_id, slots, self.now))

    @precondition(lambda self: any(box.linked for box in self.boxes.values()))
    @rule(choice=picks)
    def drain_or_undrain(self, choice: int) -> None:
        worker_id = self.pick([name for name, box in self.boxes.items() if box.linked], choice)
        box = self.boxes[worker_id]
        box.draining = not box.draining
        if box.draining:
            self.carry_out(self.scheduler.drain(worker_id, self.now))
        else:
            self.carry_out(self.scheduler.undrain(worker_id, self.now))

    # -- the relay

    @rule(space=st.sampled_from([*SPACES]))
    def pause_or_resume(self, space: str) -> None:
        if not self.scheduler.state.spaces[space].paused:
            assert self.scheduler.pause_space(space) is None
        else:
            decisions = self.scheduler.resume_space(space, self.now)
            assert not isinstance(decisions, Rejected)
            self.carry_out(decisions)

    @rule()
    def restart(self) -> None:
        """The relay is killed and comes back with what its store has: all that was enqueued."""
        paused = {name for name, space in self.scheduler.state.spaces.items() if space.paused}
        self.scheduler = Scheduler()
        for name, rules in SPACES.items():
            self.scheduler.add_space(name, rules, paused=name in paused)
        for name in self.admitted:
            del self.live[name]
        self.admitted.clear()
        self.stopping.clear()
        for box in self.boxes.values():
            box.linked = box.draining = False
        old, self.live = self.live, {}
        for entry in sorted(old.values(), key=lambda entry: entry.ticket):
            anew = attrs.evolve(
                entry,
                worker_id=None,
                worker_lost_at=None,
                cancel_reason=None,
                next_seq=0,
                alone=False,
                innocent_losses=0,
            )
            self.live[entry.request_id] = anew
            self.scheduler.restore(anew, self.now)

    # -- what always holds

    @invariant()
    def none_is_lost(self) -> None:
        assert self.scheduler.state.entries == self.live
        for name, entry in self.live.items():
            space = self.scheduler.state.spaces[entry.space]
            places = [name in space.admitted, entry in space.queue, name in space.running]
            assert places.count(True) == 1
            assert places.index(True) == [State.UPLOADING, State.QUEUED, State.RUNNING].index(entry.state)
        for space in self.scheduler.state.spaces.values():
            assert len(space.queue) + len(space.running) + len(space.admitted) == sum(
                entry.space == space.name for entry in self.live.values()
            )

    @invariant()
    def its_books_are_the_workers_own(self) -> None:
        for worker_id, box in self.boxes.items():
            state = self.scheduler.state.workers.get(worker_id)
            if box.linked:
                assert state is not None
                assert state.held == box.runs
            else:
                assert state is None or state.held.keys() <= self.live.keys()
                assert state is None or state.held, "a worker that is away with nothing is forgotten"
        for name, entry in self.live.items():
            on = [w for w, box in self.boxes.items() if box.linked and box.runs.get(name) == entry.attempt > 0]
            assert len(on) <= 1, "never two that run the same attempt"
            if entry.state is State.RUNNING and entry.worker_lost_at is None:
                assert on == ([] if entry.copied else [entry.worker_id])
            if entry.state is State.RUNNING and entry.worker_lost_at is not None and entry.worker_id is not None:
                assert name in self.scheduler.state.workers[entry.worker_id].held

    @invariant()
    def no_slot_idles_while_somebody_could_run(self) -> None:
        for space in self.scheduler.state.spaces.values():
            if space.paused:
                continue
            linked = [w for w in self.scheduler.state.workers_of(space.name) if w.free_slots]
            for entry in space.queue:
                if space.name == "other" and any(
                    e.principal == entry.principal and not e.copied for e in space.running.values()
                ):
                    continue
                for worker in linked:
                    assert (
                        entry.request_id in worker.held
                        or not can_take(entry, worker)
                        or (worker.worker_id in entry.failed_on and self.untried(entry))
                        or worker.alone_for not in ("", entry.request_id)
                        or (entry.alone and worker.shared and worker.held)
                    )

    @invariant()
    def workers_are_kept_free_for_those_that_run_alone_and_for_nobody_else(self) -> None:
        state = self.scheduler.state
        assert state.suspects == {name: entry for name, entry in self.live.items() if entry.alone}
        kept = {w.alone_for: w for w in state.workers.values() if w.alone_for}
        assert len(kept) == sum(bool(worker.alone_for) for worker in state.workers.values()), "one each"
        for name, worker in kept.items():
            entry = self.live[name]
            assert entry.alone
            assert worker.shared
            if entry.state is State.QUEUED:
                assert worker.linked
                assert can_take(entry, worker)
                assert not state.spaces[entry.space].paused
        for name, entry in state.suspects.items():
            space = state.spaces[entry.space]
            barred = space.name == "other" and any(e.principal == entry.principal for e in space.running.values())
            if entry.state is not State.QUEUED or space.paused or barred or name in kept:
                continue
            able = [w for w in state.workers_of(space.name) if w.slots and not w.draining and can_take(entry, w)]
            able = [w for w in able if w.worker_id not in entry.failed_on] or able
            assert not able or not all(w.shared for w in able) or all(w.alone_for for w in able)

    def untried(self, entry: ScheduledRequest) -> bool:
        """Whether another worker, free or not, could run a request that has failed on some."""
        return any(
            worker.slots and not worker.draining and worker.worker_id not in entry.failed_on and can_take(entry, worker)
            for worker in self.scheduler.state.workers_of(entry.space)
        )

    @invariant()
    def nothing_waits_for_an_event_that_could_start_it(self) -> None:
        assert self.scheduler.dispatcher.dispatch(self.now) == []

    @invariant()
    def places_are_told_for_all_that_wait(self) -> None:
        for name, space in self.scheduler.state.spaces.items():
            places = list(self.scheduler.positions(name, self.now).values())
            assert [place.position for place in places] == list(range(1, len(space.queue) + 1))
            assert [self.scheduler.position(entry, self.now) for entry in space.queue] == places

    @invariant()
    def what_a_principal_has_is_counted(self) -> None:
        state = self.scheduler.state
        admitted = [entry for space in state.spaces.values() for entry in space.admitted.values()]
        assert state.input_bytes == _bytes_per_principal(self.live.values())
        assert state.uploading_bytes == _bytes_per_principal(admitted)
        for space in state.spaces.values():
            assert space.admitted_per_principal == Counter(entry.principal for entry in space.admitted.values())

    def teardown(self) -> None:
        """Whatever happened, all that waits gets its turn, and ends."""
        for name in SPACES:
            if self.scheduler.state.spaces[name].paused:
                self.pause_or_resume(name)
        for name in sorted(self.admitted):
            self.enqueue(0, name)
        for name, box in list(self.boxes.items()):
            if box.linked:
                self.unlink([n for n, b in self.boxes.items() if b.linked].index(name))
        for name in self.copies():
            if name in self.live:
                self.carry_out(self.scheduler.end_copy(self.live[name], self.now))
        while away := [name for name, e in self.live.items() if e.worker_lost_at is not None]:
            self.carry_out(self.scheduler.lose(away[0], ErrorCode.WORKER_LOST, "gone", self.now))
        assert not self.scheduler.state.workers
        self.boxes.clear()
        self.join("two", 2, ("tts", "other"), set())
        for _ in range(len(self.live)):
            if any(box.runs for box in self.boxes.values()):
                self.finish(0)
        assert not self.live
        assert not self.scheduler.state.workers["two"].held


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=250, stateful_step_count=40)
