"""Piped requests in the scheduler: no slot is held by one whose source waits, in any order of events."""

from itertools import count
from typing import Any

import attrs
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from protocol.wire.errors import ErrorCode
from relayd.scheduling.model import (
    Decision,
    Enter,
    Finish,
    Registration,
    Requeue,
    ScheduledRequest,
    SpaceRules,
    Start,
    State,
    Stop,
    Wait,
    WorkerState,
)
from relayd.scheduling.scheduler import Scheduler

picks = st.integers(0, 1000)
WORKERS = ("one", "two")
SPACES = ("tts", "tell")
RULES = SpaceRules(max_workers=3, max_queued=1000, max_attempts=3)


class PipeMachine(RuleBasedStateMachine):
    """Two spaces, few slots, and chains of requests of which each may read any earlier one."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = self.a_scheduler()
        self.live: dict[str, ScheduledRequest] = {}
        #: Every request that was, the latest last.
        self.known: list[str] = []
        self.sources: dict[str, set[str]] = {}
        #: Worker -> request id -> attempt, of what it was handed and has not let go of.
        self.runs: dict[str, dict[str, int]] = {}
        self.tickets = count(1)
        self.now = 100.0

    @staticmethod
    def a_scheduler() -> Scheduler:
        scheduler = Scheduler()
        for name in SPACES:
            scheduler.add_space(name, RULES)
        return scheduler

    def carry_out(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            match decision:
                case Start(entry):
                    assert not any(self.waits(each) for each in entry.sources), "none starts before its source"
                    runs = self.runs[entry.worker_id or ""]
                    assert entry.request_id not in runs
                    runs[entry.request_id] = entry.attempt
                case Stop(worker_id, request_id):
                    assert request_id in self.runs[worker_id]
                case Wait(entry):
                    assert not entry.has_output or entry.reproducible or entry.retry != "never"
                case Enter(entry) | Requeue(entry):
                    assert entry.request_id in self.live
                case Finish(entry, code):
                    self.end(entry.request_id, State.CANCELLED if code is None else State.FAILED)

    def waits(self, request_id: str) -> bool:
        """Whether a request that has not ended does not run."""
        return request_id in self.live and self.live[request_id].state is not State.RUNNING

    def end(self, request_id: str, state: State) -> None:
        del self.live[request_id]
        self.carry_out(self.scheduler.end(request_id, state, self.now))

    def running(self) -> list[ScheduledRequest]:
        """Requests that run on a linked worker, the attempt of which is the current one."""
        return [each for each in self.live.values() if each.state is State.RUNNING and not each.worker_lost_at]

    def join(self, worker_id: str, slots: int, reproducible: str) -> None:
        worker = WorkerState(
            worker_id=worker_id, instance="1" * 8, spaces=SPACES, slots=slots, reproducible=reproducible
        )
        before = self.runs.get(worker_id, {})
        joined = self.scheduler.join(worker, dict(before), self.now)
        assert isinstance(joined, Registration)
        self.runs[worker_id] = {each.request_id: before[each.request_id] for each in joined.resume}
        self.carry_out(joined.decisions)

    @initialize(slots=st.integers(1, 3))
    def begin(self, slots: int) -> None:
        """Workers, and a chain of three."""
        self.join("one", 1, "tone")
        self.join("two", slots, "tone")
        for pick in (0, 1, 1):
            self.submit(pick, 0, "before_output", False, SPACES[pick])

    @rule(
        pick=picks,
        other=picks,
        retry=st.sampled_from(["never", "before_output", "always"]),
        both=st.booleans(),
        space=st.sampled_from(SPACES),
    )
    def submit(self, pick: int, other: int, retry: str, both: bool, space: str) -> None:
        """Admit and queue a request that reads an earlier one, or two, or none."""
        sources = {self.known[-1 - each % len(self.known)] for each in (pick, other)[: 1 + both] if each and self.known}
        request_id = f"{len(self.known):032x}"
        entry = ScheduledRequest(
            request_id=request_id,
            space=space,
            principal="ann" if other % 2 else "bob",
            priority=5 + pick % 2,
            ticket=next(self.tickets),
            retry=retry,
            input_bytes=pick % 3,
            sources={each for each in sources if each in self.live},
            silent_sources=sources,
        )
        assert self.scheduler.admit(entry) is None
        self.known.append(request_id)
        self.sources[request_id] = sources.copy()
        self.live[request_id] = entry
        self.carry_out(self.scheduler.enqueue(entry, self.now))

    @rule()
    def hear(self) -> None:
        """Something of each source has come that runs, or has ended."""
        for entry in list(self.live.values()):
            for source_id in sorted(entry.silent_sources):
                if source_id not in self.live or self.live[source_id].state is State.RUNNING:
                    self.carry_out(self.scheduler.note_source_output(entry, source_id, self.now))

    @precondition(lambda self: self.running())
    @rule(pick=picks)
    def hang(self, pick: int) -> None:
        """An attempt is lost whose worker still holds its slot."""
        entry = self.running()[pick % len(self.running())]
        lost = self.scheduler.lose(entry.request_id, ErrorCode.IDLE_TIMEOUT, "it hangs", self.now)
        self.carry_out(lost)

    @rule()
    def restart(self) -> None:
        """The relay is killed and started again; its workers are away, and it has heard nothing of any source."""
        before, self.live = self.live, {}
        self.scheduler = self.a_scheduler()
        for old in before.values():
            entry = ScheduledRequest(
                request_id=old.request_id,
                space=old.space,
                principal=old.principal,
                priority=old.priority,
                ticket=old.ticket,
                retry=old.retry,
                state=State.QUEUED if old.state is State.UPLOADING else old.state,
                attempt=old.attempt,
                highest_attempt=max(old.attempt, old.highest_attempt) + 1,
                attempt_may_be_newer=True,
                worker_id=old.worker_id,
                losses=old.losses,
                reproducible=old.reproducible,
                has_output=old.has_output,
                sources=set(old.sources),
                silent_sources=self.sources[old.request_id].copy(),
            )
            self.live[entry.request_id] = entry
            self.scheduler.restore(entry, self.now)
        for runs in self.runs.values():
            for request_id in [each for each in runs if each not in self.live]:
                del runs[request_id]
        self.carry_out(self.scheduler.dispatcher.dispatch(self.now))

    @precondition(lambda self: self.running())
    @rule(pick=picks)
    def speak(self, pick: int) -> None:
        """An attempt makes something."""
        entry = self.running()[pick % len(self.running())]
        entry.has_output, entry.next_seq = True, entry.next_seq + 1

    @precondition(lambda self: any(self.live[each].cancel_reason is None for each in self.live))
    @rule(pick=picks, fails=st.booleans())
    def end_early(self, pick: int, fails: bool) -> None:
        """A request is cancelled, or fails."""
        request_id = list(self.live)[pick % len(self.live)]
        if fails:
            self.carry_out(self.scheduler.fail(request_id, ErrorCode.SOURCE_FAILED, "its source failed"))
        else:
            self.carry_out(self.scheduler.cancel(request_id, "enough"))

    @precondition(lambda self: any(self.runs.values()))
    @rule(pick=picks, completes=st.booleans())
    def let_go(self, pick: int, completes: bool) -> None:
        """A linked worker lets go of an attempt; a current one completes, is cancelled or is lost."""
        held = [
            (worker_id, request_id)
            for worker_id, runs in self.runs.items()
            for request_id in runs
            if (worker := self.scheduler.state.workers.get(worker_id)) is not None and worker.linked
        ]
        if not held:
            return
        worker_id, request_id = held[pick % len(held)]
        attempt = self.runs[worker_id].pop(request_id)
        entry = self.live.get(request_id)
        if entry is not None and (entry.worker_id, entry.attempt) == (worker_id, attempt):
            if completes or entry.cancel_reason is not None:
                self.end(request_id, State.COMPLETED if completes else State.CANCELLED)
            else:
                self.scheduler.state.workers[worker_id].held.pop(request_id)
                lost = self.scheduler.lose(request_id, ErrorCode.ENGINE_FAILED, "it crashed", self.now)
                self.carry_out(lost)
        self.carry_out(self.scheduler.release(worker_id, request_id, attempt, self.now))

    @rule(worker_id=st.sampled_from(WORKERS), slots=st.integers(0, 3), reproducible=st.sampled_from(["", "tone"]))
    def come(self, worker_id: str, slots: int, reproducible: str) -> None:
        """A worker registers, for the first time or again."""
        self.join(worker_id, slots, reproducible)

    @rule(worker_id=st.sampled_from(WORKERS), for_good=st.booleans())
    def go(self, worker_id: str, for_good: bool) -> None:
        """A worker's link ends; its attempts are lost where it does not return in time."""
        worker = self.scheduler.state.workers.get(worker_id)
        if worker is None or not worker.linked:
            return
        away, decisions = self.scheduler.unlink(worker_id, self.now)
        self.carry_out(decisions)
        self.runs[worker_id] = {each.request_id: each.attempt for each in away}
        for entry in away if for_good else ():
            self.carry_out(self.scheduler.lose(entry.request_id, ErrorCode.WORKER_LOST, "it is gone", self.now))
        if for_good:
            self.runs[worker_id] = {}

    @rule(pick=picks)
    def source_begins_anew(self, pick: int) -> None:
        """What came of a source is void."""
        pairs = [
            (entry, source_id)
            for entry in self.live.values()
            for source_id in sorted(entry.sources - entry.silent_sources)
            if self.live[source_id].state is State.RUNNING
        ]
        if pairs:
            entry, source_id = pairs[pick % len(pairs)]
            losses = entry.losses
            decisions = self.scheduler.begin_anew(entry, source_id, self.now)
            self.carry_out(decisions)
            if entry.request_id in self.live and entry.cancel_reason is None:
                assert (entry.waits, entry.has_output, entry.next_seq, entry.losses) == (True, False, 0, losses)

    @rule()
    def pause_and_resume(self) -> None:
        """The relay drains for a moment."""
        self.scheduler.state.draining = not self.scheduler.state.draining

    @invariant()
    def no_slot_is_held_while_a_source_waits(self) -> None:
        for entry in self.running():
            if entry.worker_id and entry.cancel_reason is None:
                assert not any(self.waits(each) for each in entry.sources), entry

    @invariant()
    def each_request_is_where_it_should_be(self) -> None:
        state = self.scheduler.state
        assert state.entries == self.live
        assert not state.unsettled
        for entry in self.live.values():
            space = state.spaces[entry.space]
            ready = not entry.silent_sources and state.flows(entry)
            assert entry.sources <= self.live.keys()
            assert (entry in space.queue) == (entry.state is State.QUEUED)
            assert (entry.request_id in space.admitted) == (entry.state is State.UPLOADING) == entry.waits
            assert (entry.request_id in space.running) == (entry.state is State.RUNNING)
            assert not (entry.waits and ready), "what can be queued is"
            assert not (entry.state is State.QUEUED and not ready)
        assert {(source, each) for source, its in state.piped.items() for each in its} == {
            (source, entry.request_id) for entry in self.live.values() for source in entry.sources
        }
        assert not state.uploads
        assert not state.uploading_bytes
        for space in state.spaces.values():
            assert sum(space.admitted_per_principal.values()) == len(space.admitted)

    def teardown(self) -> None:
        """With one slot and no more faults, every request ends: no chain waits for itself."""
        self.scheduler.state.draining = False
        for worker_id in WORKERS:
            self.go(worker_id, True)
        for entry in [each for each in self.live.values() if each.worker_lost_at]:
            self.carry_out(self.scheduler.lose(entry.request_id, ErrorCode.WORKER_LOST, "it is gone", self.now))
        self.join("three", 1, "tone")
        for _ in range(20 * len(self.known) + 20):
            self.hear()
            self.let_go(0, True)
            self.no_slot_is_held_while_a_source_waits()
        assert not self.live
        assert not self.scheduler.state.piped


PipeMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPipes = PipeMachine.TestCase


# -- one thing at a time


def an_entry(ticket: int, *sources: ScheduledRequest, **fields: Any) -> ScheduledRequest:
    ids = {each.request_id for each in sources}
    return ScheduledRequest(
        request_id=f"{ticket:032x}",
        space="tts",
        principal="ann",
        ticket=ticket,
        sources=ids.copy(),
        silent_sources=ids.copy(),
        **fields,
    )


def a_worker(worker_id: str = "one", slots: int = 1) -> WorkerState:
    return WorkerState(worker_id=worker_id, instance="1" * 8, spaces=("tts",), slots=slots)


def a_scheduler() -> Scheduler:
    scheduler = Scheduler()
    scheduler.add_space("tts", RULES)
    return scheduler


def submit(scheduler: Scheduler, entry: ScheduledRequest) -> list[Decision]:
    assert scheduler.admit(entry) is None
    return scheduler.enqueue(entry, 1.0)


def test_a_source_that_crashed_starts_before_what_is_piped_from_it_whatever_their_priorities() -> None:
    scheduler = a_scheduler()
    scheduler.join(a_worker(), {}, 1.0)
    source = an_entry(1, priority=1)
    target = an_entry(2, source, priority=9)
    assert submit(scheduler, source) == [Start(source, 0)]
    assert submit(scheduler, target) == []
    assert scheduler.note_source_output(target, source.request_id, 1.0) == [Enter(target)]
    del scheduler.state.workers["one"].held[source.request_id]
    decisions = scheduler.lose(source.request_id, ErrorCode.ENGINE_FAILED, "it crashed", 1.0)
    assert decisions == [Requeue(source), Start(source, 0)]
    assert target.state is State.QUEUED


def test_a_slot_is_given_back_for_a_source_that_needs_one_and_the_attempt_cannot_come_back() -> None:
    scheduler = a_scheduler()
    scheduler.join(a_worker("one"), {}, 1.0)
    scheduler.join(a_worker("two"), {}, 1.0)
    source = an_entry(1)
    target, last = an_entry(2, source), an_entry(3, an_entry(2))
    for entry in (source, target, last):
        submit(scheduler, entry)
    scheduler.note_source_output(target, source.request_id, 1.0)
    assert target.worker_id == "two"
    scheduler.note_source_output(last, target.request_id, 1.0)
    scheduler.unlink("one", 1.0)
    decisions = scheduler.lose(source.request_id, ErrorCode.WORKER_LOST, "it is gone", 2.0)
    assert decisions == [
        Requeue(source),
        Stop("two", target.request_id, "its source waits for a worker again"),
        Wait(target),
        Wait(last),
    ]
    joined = scheduler.join(a_worker("two"), {target.request_id: 1}, 3.0)
    assert isinstance(joined, Registration)
    assert joined.abandon == [target.request_id]
    assert joined.decisions == [Start(source, 0), Enter(target)]
    scheduler.unlink("two", 4.0)
    assert scheduler.end(source.request_id, State.COMPLETED, 5.0) == []
    joined = scheduler.join(a_worker("three"), {}, 6.0)
    assert isinstance(joined, Registration)
    assert joined.decisions == [Start(target, 0), Enter(last)]
    assert target.attempt == 3, "its second is not given to any worker"


def test_an_attempt_that_began_just_before_a_restart_goes_on_although_its_request_was_stored_as_waiting() -> None:
    scheduler = a_scheduler()
    source = an_entry(1, state=State.RUNNING, attempt=1, worker_id="one")
    target = an_entry(2, source, state=State.QUEUED, attempt_may_be_newer=True, highest_attempt=1)
    for entry in (source, target):
        scheduler.restore(entry, 1.0)
    assert target.waits
    joined = scheduler.join(a_worker("two"), {target.request_id: 1}, 2.0)
    assert isinstance(joined, Registration)
    assert joined.resume == [target]
    assert (target.state, target.waits) == (State.RUNNING, False)
    assert not scheduler.state.spaces["tts"].admitted
    assert not target.losses


def test_what_goes_on_before_its_source_is_heard_and_is_lost_waits_for_it_like_any_other() -> None:
    scheduler = a_scheduler()
    source = an_entry(1, state=State.RUNNING, attempt=1, worker_id="one")
    target = an_entry(2, source, state=State.QUEUED, attempt_may_be_newer=True, highest_attempt=1)
    for entry in (source, target):
        scheduler.restore(entry, 1.0)
    scheduler.join(a_worker("two"), {target.request_id: 1}, 2.0)
    scheduler.join(a_worker("three"), {}, 2.0)
    scheduler.unlink("two", 3.0)
    decisions = scheduler.lose(target.request_id, ErrorCode.WORKER_LOST, "it is gone", 4.0)
    assert decisions == [Requeue(target), Wait(target)]


def test_a_source_whose_worker_is_away_gives_no_slot_back_so_what_reads_it_starts() -> None:
    scheduler = a_scheduler()
    scheduler.add_space("tell", RULES)
    scheduler.join(attrs.evolve(a_worker("one"), spaces=("tell",)), {}, 1.0)
    scheduler.join(a_worker("two"), {}, 1.0)
    first = attrs.evolve(an_entry(1), space="tell")
    middle, last = an_entry(2, first), an_entry(3, an_entry(2))
    for entry in (first, middle, last):
        submit(scheduler, entry)
    scheduler.note_source_output(middle, first.request_id, 1.0)
    scheduler.note_source_output(last, middle.request_id, 1.0)
    scheduler.unlink("two", 2.0)
    scheduler.unlink("one", 2.0)
    assert scheduler.lose(first.request_id, ErrorCode.WORKER_LOST, "it is gone", 3.0) == [Requeue(first)]
    assert (first.state, middle.state, last.state) == (State.QUEUED, State.RUNNING, State.QUEUED)
    joined = scheduler.join(a_worker("three"), {}, 4.0)
    assert isinstance(joined, Registration)
    assert joined.decisions == [Start(last, 0)]


def test_a_request_that_waits_takes_no_upload_and_counts_as_queued() -> None:
    scheduler = a_scheduler()
    scheduler.join(a_worker(slots=2), {}, 1.0)
    source = an_entry(1)
    target = an_entry(2, source, input_bytes=7)
    submit(scheduler, source)
    assert scheduler.admit(target) is None
    assert scheduler.state.uploads == {"ann": 1}
    assert scheduler.enqueue(target, 1.0) == []
    assert not scheduler.state.uploads
    assert scheduler.queued_count("ann") == 1
    assert scheduler.cancel(target.request_id, "enough") == [Finish(target, None, "enough")]
    assert scheduler.end(target.request_id, State.CANCELLED, 1.0) == []
    assert scheduler.queued_count("ann") == 0
    assert not scheduler.state.piped


def test_a_source_that_begins_anew_changes_nothing_for_what_is_stopped_or_over_and_nothing_twice() -> None:
    scheduler = a_scheduler()
    scheduler.join(a_worker(slots=4), {}, 1.0)
    source = an_entry(1)
    stopped, over, waits = an_entry(2, source), an_entry(3, source), an_entry(4, source)
    for entry in (source, stopped, over, waits):
        submit(scheduler, entry)
    scheduler.note_source_output(stopped, source.request_id, 1.0)
    scheduler.note_source_output(over, source.request_id, 1.0)
    scheduler.cancel(stopped.request_id, "enough")
    scheduler.end(over.request_id, State.FAILED, 1.0)
    for entry in (stopped, over):
        assert scheduler.begin_anew(entry, source.request_id, 1.0) == []
        assert not entry.silent_sources
        assert scheduler.note_source_output(entry, source.request_id, 1.0) == []
    for _ in range(2):
        assert scheduler.begin_anew(waits, source.request_id, 1.0) == [Wait(waits)]
    assert scheduler.state.spaces["tts"].admitted_per_principal["ann"] == 1, "it is counted once"
    scheduler.end(waits.request_id, State.CANCELLED, 1.0)
    for entry in (stopped, waits):
        assert scheduler.note_source_output(entry, source.request_id, 1.0) == []
    assert waits.silent_sources, "what is over is left as it is"


def test_a_request_that_may_not_begin_twice_fails_when_its_source_does() -> None:
    scheduler = a_scheduler()
    scheduler.join(a_worker(slots=2), {}, 1.0)
    source = an_entry(1)
    target, other = an_entry(2, source, retry="never"), an_entry(3, source, retry="never")
    for entry in (source, target, other):
        submit(scheduler, entry)
    scheduler.note_source_output(target, source.request_id, 1.0)
    assert target.attempt == 1
    stopped, finished = scheduler.begin_anew(target, source.request_id, 1.0)
    assert stopped == Stop("one", target.request_id, f"request {source.request_id}, its source, has begun anew")
    assert isinstance(finished, Finish)
    assert (finished.code, finished.entry) == (ErrorCode.SOURCE_FAILED, target)
    assert finished.message.endswith("its source, has begun anew; not tried again, because retry is 'never'")
    assert scheduler.begin_anew(other, source.request_id, 1.0) == [Wait(other)], "it has not begun"


def given_back(scheduler: Scheduler) -> tuple[ScheduledRequest, ScheduledRequest]:
    """A source whose worker `one` was lost, and its target, which has output and gives its slot on `two` back."""
    source = an_entry(1)
    target = an_entry(2, source)
    for entry in (source, target):
        submit(scheduler, entry)
    scheduler.note_source_output(target, source.request_id, 1.0)
    target.has_output, target.next_seq = True, 7
    scheduler.unlink("one", 1.0)
    scheduler.lose(source.request_id, ErrorCode.WORKER_LOST, "it is gone", 2.0)
    assert target.waits
    return source, target


@pytest.mark.parametrize("reproducible", ["", "tone"])
def test_a_slot_that_was_given_back_lets_only_a_reproducible_engine_go_on_where_it_was(reproducible: str) -> None:
    scheduler = a_scheduler()
    for name in ("one", "two"):
        scheduler.join(attrs.evolve(a_worker(name), reproducible=reproducible), {}, 1.0)
    source, target = given_back(scheduler)
    scheduler.release("two", target.request_id, 1, 3.0)
    scheduler.end(source.request_id, State.COMPLETED, 4.0)
    assert scheduler.release("two", source.request_id, 2, 5.0) == [Start(target, 7 if reproducible else 0)]


def test_a_request_that_made_something_before_it_gave_its_slot_back_starts_on_any_engine() -> None:
    scheduler = a_scheduler()
    for name in ("one", "two"):
        scheduler.join(a_worker(name), {}, 1.0)
    source, target = given_back(scheduler)
    scheduler.unlink("two", 3.0)
    scheduler.end(source.request_id, State.COMPLETED, 4.0)
    joined = scheduler.join(attrs.evolve(a_worker("three"), reproducible="tone"), {}, 5.0)
    assert isinstance(joined, Registration)
    assert joined.decisions == [Start(target, 0)]


def test_nothing_is_started_whose_source_is_about_to_give_its_own_slot_back() -> None:
    scheduler = a_scheduler()
    for worker_id in ("one", "two"):
        scheduler.join(attrs.evolve(a_worker(worker_id), reproducible="tone"), {}, 1.0)
    first = an_entry(1)
    second = an_entry(2, first)
    third = an_entry(3, second)
    for entry in (first, second, third):
        submit(scheduler, entry)
    scheduler.note_source_output(second, first.request_id, 1.0)
    scheduler.note_source_output(third, second.request_id, 1.0)
    assert (first.worker_id, second.worker_id, third.state) == ("one", "two", State.QUEUED)
    first.has_output, first.next_seq = True, 3
    scheduler.unlink("one", 1.0)
    # It has forgotten the first, makes other samples now, and has a slot for the third.
    joined = scheduler.join(a_worker("one"), {}, 1.0)
    assert isinstance(joined, Registration)
    kinds = [(type(each).__name__, getattr(each, "entry", None)) for each in joined.decisions]
    assert ("Start", third) not in kinds
    assert (second.waits, third.waits) == (True, True)


def test_a_long_run_of_requests_that_each_read_the_two_before_costs_no_more_than_its_length() -> None:
    scheduler = a_scheduler()
    scheduler.join(a_worker(slots=60), {}, 1.0)
    chain: list[ScheduledRequest] = []
    for number in range(60):
        entry = an_entry(number, *chain[-2:])
        submit(scheduler, entry)
        for source in chain[-2:]:
            scheduler.note_source_output(entry, source.request_id, 1.0)
        chain.append(entry)
    assert all(entry.state is State.RUNNING for entry in chain)  # 2**40 ways lead through them
