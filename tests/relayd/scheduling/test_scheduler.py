from itertools import count
from typing import Any

import pytest

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

TONE = "tone 24000"


class Bench:
    """A scheduler with a clock in the test's hand."""

    def __init__(self, **rules: Any) -> None:
        self.scheduler = Scheduler()
        self.scheduler.add_space("tts", SpaceRules(**rules))
        self.now = 1000.0
        self._tickets = count(1)

    def admit(self, name: str, **fields: Any) -> Rejected | None:
        return self.scheduler.admit(self.entry(name, **fields))

    def entry(self, name: str, **fields: Any) -> ScheduledRequest:
        plain: dict[str, Any] = {"space": "tts", "principal": "ann", "ticket": next(self._tickets)}
        return ScheduledRequest(request_id=name, **(plain | fields))

    def queue(self, name: str, **fields: Any) -> list[Decision]:
        entry = self.entry(name, **fields)
        assert self.scheduler.admit(entry) is None
        return self.scheduler.enqueue(entry, self.now)

    def join(self, worker_id: str = "box", running: dict[str, int] | None = None, **fields: Any) -> Registration:
        joined = self.try_join(worker_id, running, **fields)
        assert isinstance(joined, Registration)
        return joined

    def try_join(
        self, worker_id: str = "box", running: dict[str, int] | None = None, **fields: Any
    ) -> Rejected | Registration:
        plain: dict[str, Any] = {"instance": "i", "spaces": ("tts",), "slots": 1}
        return self.scheduler.join(WorkerState(worker_id=worker_id, **(plain | fields)), running or {}, self.now)

    def complete(self, name: str, worker_id: str = "box") -> list[Decision]:
        attempt = self[name].attempt
        decisions = self.scheduler.end(name, State.COMPLETED, self.now)
        return [*decisions, *self.scheduler.release(worker_id, name, attempt, self.now)]

    def lose(self, name: str, code: ErrorCode = ErrorCode.WORKER_LOST) -> list[Decision]:
        return self.scheduler.lose(name, code, "it broke", self.now)

    def order(self) -> list[str]:
        return list(self.scheduler.positions("tts", self.now))

    def heard(self, name: str, frames: int = 3) -> None:
        self[name].has_output, self[name].next_seq = True, frames

    def __getitem__(self, name: str) -> ScheduledRequest:
        return self.scheduler.state.entries[name]


def kinds(decisions: list[Decision]) -> list[tuple[str, str]]:
    """Each decision as (kind, request id)."""
    return [(type(d).__name__, d.request_id if isinstance(d, Stop) else d.entry.request_id) for d in decisions]


def started(decisions: list[Decision]) -> list[str]:
    return [name for kind, name in kinds(decisions) if kind == "Start"]


def code_of(decisions: list[Decision]) -> ErrorCode | None:
    (finish,) = (d for d in decisions if isinstance(d, Finish))
    return finish.code


# -- handing out -----------------------------------------------------------------------------------------------------


def test_requests_wait_for_a_worker_and_start_one_after_another() -> None:
    bench = Bench()
    assert bench.queue("a") == []
    assert bench.queue("b") == []
    assert started(bench.join().decisions) == ["a"]
    assert bench["a"].attempt == 1
    assert bench.order() == ["b"]
    assert started(bench.complete("a")) == ["b"]


def test_a_slot_is_free_only_when_the_worker_lets_go() -> None:
    bench = Bench()
    bench.join()
    bench.queue("a")
    bench.queue("b")
    assert kinds(bench.scheduler.fail("a", ErrorCode.RUN_TIMEOUT, "slow")) == [("Stop", "a"), ("Finish", "a")]
    assert bench.scheduler.end("a", State.FAILED, bench.now) == []
    assert bench.scheduler.release("box", "a", 2, bench.now) == [], "another attempt's answer frees nothing"
    assert started(bench.scheduler.release("box", "a", 1, bench.now)) == ["b"]
    assert bench.scheduler.release("box", "a", 1, bench.now) == []
    assert bench.scheduler.release("nobody", "a", 1, bench.now) == []


def test_the_worker_with_most_free_slots_gets_it_then_the_longest_idle() -> None:
    bench = Bench(max_workers=3)
    bench.join("one", slots=1)
    bench.join("two", slots=2)
    bench.join("three", slots=2)
    bench.queue("a")
    assert bench["a"].worker_id == "two"
    bench.queue("b")
    assert bench["b"].worker_id == "three"
    bench.complete("a", "two")
    bench.complete("b", "three")
    bench.queue("c")
    assert bench["c"].worker_id == "two", "it has been idle longer"


def test_spaces_share_a_worker_in_turns() -> None:
    bench = Bench()
    bench.scheduler.add_space("other", SpaceRules())
    for name in "abc":
        bench.queue(name)
    bench.queue("x", space="other")
    decisions = bench.join(spaces=("tts", "other"), slots=2).decisions
    assert started(decisions) == ["a", "x"]


def test_more_slots_take_more_and_fewer_slots_stop_nothing() -> None:
    bench = Bench()
    bench.join()
    for name in "abcd":
        bench.queue(name)
    assert started(bench.scheduler.set_slots("box", 3, bench.now)) == ["b", "c"]
    assert bench.scheduler.set_slots("box", 1, bench.now) == []
    assert bench.complete("a") == []
    assert bench.complete("b") == []
    assert started(bench.complete("c")) == ["d"]


def test_a_draining_worker_gets_nothing_new_until_it_is_undrained() -> None:
    bench = Bench()
    bench.join()
    bench.scheduler.drain("box")
    bench.queue("a")
    assert bench["a"].state is State.QUEUED
    assert started(bench.scheduler.undrain("box", bench.now)) == ["a"]


def test_a_draining_worker_still_drains_when_it_comes_back() -> None:
    bench = Bench()
    bench.join(slots=2)
    bench.queue("a")
    bench.scheduler.drain("box")
    bench.scheduler.unlink("box", bench.now)
    bench.join(running={"a": 1}, slots=2)
    bench.queue("b")
    assert bench["b"].state is State.QUEUED


def test_a_draining_relay_hands_nothing_out() -> None:
    bench = Bench()
    bench.scheduler.state.draining = True
    bench.join()
    assert bench.queue("a") == []


def test_a_paused_space_takes_nothing_and_hands_nothing_out() -> None:
    bench = Bench()
    bench.queue("a")
    assert bench.scheduler.pause_space("tts") is None
    assert bench.join().decisions == []
    refusal = bench.admit("b")
    assert refusal is not None
    assert (refusal.code, refusal.request_id) == (ErrorCode.SPACE_PAUSED, "b")
    resumed = bench.scheduler.resume_space("tts", bench.now)
    assert not isinstance(resumed, Rejected)
    assert started(resumed) == ["a"]
    for refused in (bench.scheduler.pause_space("x"), bench.scheduler.resume_space("x", bench.now)):
        assert isinstance(refused, Rejected)
        assert refused.code == ErrorCode.SPACE_NOT_FOUND


def test_limits_on_what_one_principal_runs() -> None:
    bench = Bench(max_running_per_principal=1)
    bench.scheduler.add_space("other", SpaceRules())
    bench.join(spaces=("tts", "other"), slots=9)
    bench.queue("a")
    assert bench.queue("b") == []
    assert started(bench.queue("x", principal="bob")) == ["x"]
    bench.scheduler.limit_running("ann", 2)
    assert started(bench.queue("c", space="other")) == ["c"]
    assert bench.queue("d", space="other") == [], "two in all spaces together"
    assert started(bench.complete("c")) == ["d"]
    bench.scheduler.limit_running("ann", None)
    assert started(bench.queue("e", space="other")) == ["e"]
    assert started(bench.complete("a")) == ["b"]


# -- getting in ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "fields", "code"),
    [
        ({}, {"space": "nope"}, ErrorCode.SPACE_NOT_FOUND),
        ({"refuse_when_empty": True}, {}, ErrorCode.NO_WORKER),
        ({"max_queued": 2}, {"principal": "bob"}, ErrorCode.QUEUE_FULL),
        ({"max_queued_per_principal": 2}, {}, ErrorCode.QUEUE_FULL),
        ({"max_queued_per_principal": 2}, {"principal": "bob"}, None),
        ({"max_queued": 3}, {}, None),
    ],
)
def test_who_is_let_in(rules: dict[str, Any], fields: dict[str, Any], code: ErrorCode | None) -> None:
    bench = Bench(**rules)
    if not rules.get("refuse_when_empty"):
        bench.queue("a")
        assert bench.admit("b") is None, "what is admitted counts as queued"
    refusal = bench.admit("c", **fields)
    assert (refusal.code if refusal else None) == code
    assert ("c" in bench.scheduler.state.entries) == (code is None)


def test_a_full_queue_says_when_to_try_again() -> None:
    bench = Bench(max_queued=1)
    bench.join()
    bench.queue("a")
    bench.now += 8.0
    bench.complete("a")
    bench.queue("b")
    bench.queue("c")
    refusal = bench.admit("d")
    assert refusal is not None
    assert refusal.retryable
    assert refusal.retry_after_s == 8.0


def test_promoting() -> None:
    bench = Bench()
    for name in "abc":
        bench.queue(name)
    assert bench.scheduler.promote("c") is None
    assert bench.order() == ["c", "a", "b"]
    bench.join()
    for name in ("c", "nobody"):
        refusal = bench.scheduler.promote(name)
        assert refusal is not None
        assert refusal.code == ErrorCode.REQUEST_NOT_FOUND


def test_places_and_eta_come_from_the_spaces_own_pace() -> None:
    bench = Bench(max_workers=2)
    bench.join("one")
    bench.join("two")
    for name in "abcde":
        bench.queue(name)
    assert [place.eta_s for place in bench.scheduler.positions("tts", bench.now).values()] == [None] * 3
    bench.now += 10
    bench.complete("a", "one")  # c starts there
    bench.now += 4
    places = bench.scheduler.positions("tts", bench.now)
    assert [(name, p.position, p.of, p.eta_s) for name, p in places.items()] == [("d", 1, 2, 0.0), ("e", 2, 2, 6.0)]


def test_a_space_closes_only_when_it_is_at_rest() -> None:
    bench = Bench()
    bench.queue("a")
    assert bench.scheduler.remove_space("tts") is not None
    bench.scheduler.end("a", State.CANCELLED, bench.now)
    bench.join()
    refusal = bench.scheduler.remove_space("tts")
    assert refusal is not None
    assert "box" in refusal.message
    bench.scheduler.unlink("box", bench.now)
    assert bench.scheduler.remove_space("tts") is None
    assert isinstance(bench.try_join(), Rejected)


# -- workers come and go ---------------------------------------------------------------------------------------------


def test_a_second_worker_is_refused_by_the_spaces_name() -> None:
    bench = Bench()
    bench.join("one")
    refusal = bench.try_join("two")
    assert isinstance(refusal, Rejected)
    assert refusal.code == ErrorCode.SPACE_FULL
    assert "'tts' already has its 1 worker (one)" in refusal.message
    assert "two" not in bench.scheduler.state.workers
    bench.scheduler.unlink("one", bench.now)
    bench.join("two")


def test_an_unknown_space_refuses_the_worker_from_all_its_spaces() -> None:
    bench = Bench()
    refusal = bench.try_join(spaces=("tts", "nope"))
    assert isinstance(refusal, Rejected)
    assert refusal.code == ErrorCode.SPACE_NOT_FOUND
    assert not bench.scheduler.state.workers


def test_a_worker_that_comes_back_goes_on_with_what_it_ran() -> None:
    bench = Bench()
    bench.join()
    bench.queue("a")
    bench.queue("b")
    (away,) = bench.scheduler.unlink("box", bench.now)
    assert (away.request_id, away.worker_lost_at) == ("a", bench.now)
    joined = bench.join(running={"a": 1, "of another life": 4})
    assert [entry.request_id for entry in joined.resume] == ["a"]
    assert joined.abandon == ["of another life"]
    assert joined.decisions == []
    assert bench["a"].worker_lost_at is None
    assert started(bench.complete("a")) == ["b"]


def test_an_assignment_that_the_cut_swallowed_is_made_again() -> None:
    bench = Bench()
    bench.join()
    bench.queue("a")
    bench.scheduler.unlink("box", bench.now)
    joined = bench.join()
    assert kinds(joined.decisions) == [("Start", "a")]
    assert (bench["a"].attempt, bench["a"].losses) == (1, 0)


def test_an_attempt_that_came_too_late_is_abandoned_and_the_newer_one_handed_out_again() -> None:
    bench = Bench()
    bench.join()
    bench.queue("a")
    bench["a"].attempt = 2
    bench.scheduler.state.workers["box"].held["a"] = 2
    joined = bench.join(running={"a": 1})
    assert joined.abandon == ["a"]
    assert kinds(joined.decisions) == [("Start", "a")]
    assert bench["a"].attempt == 2


def test_what_was_given_up_too_early_runs_where_it_ran() -> None:
    bench = Bench()
    bench.join()
    bench.queue("a")
    bench.scheduler.unlink("box", bench.now)
    assert kinds(bench.lose("a")) == [("Requeue", "a")]
    assert not bench.scheduler.state.workers, "nothing to come back to"
    joined = bench.join(running={"a": 1})
    assert [entry.request_id for entry in joined.resume] == ["a"]
    assert bench["a"].state is State.RUNNING
    assert bench.order() == []


@pytest.mark.parametrize("claim", [0, 2])
def test_nobody_claims_what_never_ran_there(claim: int) -> None:
    bench = Bench()
    bench.scheduler.state.draining = True
    bench.queue("a")
    assert bench.join(running={"a": claim}).abandon == ["a"]


def test_a_worker_claims_nothing_of_a_space_it_does_not_serve() -> None:
    bench = Bench()
    bench.scheduler.add_space("other", SpaceRules())
    entry = bench.entry("a", state=State.RUNNING, attempt=1)
    bench.scheduler.restore(entry, bench.now)
    assert bench.join(spaces=("other",), running={"a": 1}).abandon == ["a"]


def test_a_new_attempt_elsewhere_fences_the_old_worker() -> None:
    bench = Bench(max_workers=2)
    bench.join("one")
    bench.queue("a")
    bench.scheduler.unlink("one", bench.now)
    bench.join("two")
    assert started(bench.lose("a")) == ["a"]
    assert (bench["a"].worker_id, bench["a"].attempt) == ("two", 2)
    assert bench.join("one", running={"a": 1}).abandon == ["a"]
    assert bench["a"].worker_id == "two"


def test_a_retried_request_keeps_its_place() -> None:
    bench = Bench()
    bench.join()
    for name in "abc":
        bench.queue(name)
    bench.scheduler.unlink("box", bench.now)
    bench.lose("a")
    assert bench.order() == ["a", "b", "c"]


def test_a_lost_attempt_is_not_handed_to_a_worker_that_has_not_let_go_of_it() -> None:
    bench = Bench()
    bench.join(slots=2)
    bench.queue("a")
    assert kinds(bench.lose("a", ErrorCode.IDLE_TIMEOUT)) == [("Stop", "a"), ("Requeue", "a")]
    assert started(bench.queue("b")) == ["b"], "others may have the other slot"
    assert bench.scheduler.state.workers["box"].held == {"a": 1, "b": 1}
    assert started(bench.scheduler.release("box", "a", 1, bench.now)) == ["a"]
    assert bench["a"].attempt == 2


REPRODUCIBLE: dict[str, Any] = {"reproducible": TONE}
OTHER: dict[str, Any] = {"reproducible": "chime 8000"}


@pytest.mark.parametrize(
    ("retry", "worker", "heard", "outcome"),
    [
        ("before_output", {}, False, "Requeue"),
        ("before_output", {}, True, ErrorCode.WORKER_LOST),
        ("before_output", REPRODUCIBLE, True, "Requeue"),
        ("always", {}, True, "Requeue"),
        ("never", {}, False, ErrorCode.WORKER_LOST),
        ("never", REPRODUCIBLE, True, ErrorCode.WORKER_LOST),
    ],
)
def test_what_becomes_of_a_lost_attempt(retry: str, worker: dict[str, Any], heard: bool, outcome: object) -> None:
    bench = Bench()
    bench.join(**worker)
    bench.queue("a", retry=retry)
    if heard:
        bench.heard("a")
    bench.scheduler.unlink("box", bench.now)
    decisions = bench.lose("a")
    if outcome == "Requeue":
        assert kinds(decisions) == [("Requeue", "a")]
    else:
        assert code_of(decisions) is outcome
        assert not bench.scheduler.state.workers


@pytest.mark.parametrize(
    ("retry", "second", "from_seq"),
    [("before_output", REPRODUCIBLE, 3), ("always", REPRODUCIBLE, 3), ("always", OTHER, 0), ("always", {}, 0)],
)
def test_where_the_second_attempt_begins(retry: str, second: dict[str, Any], from_seq: int) -> None:
    bench = Bench()
    bench.join("one", **REPRODUCIBLE)
    bench.queue("a", retry=retry)
    bench.heard("a")
    bench.scheduler.unlink("one", bench.now)
    bench.lose("a")
    (start,) = bench.join("two", **second).decisions
    assert isinstance(start, Start)
    assert start.from_seq == from_seq
    assert bench["a"].has_output == (from_seq > 0)


def test_nobody_goes_on_from_what_another_kind_of_worker_began() -> None:
    bench = Bench(max_workers=2)
    bench.join("one", **REPRODUCIBLE)
    bench.queue("a")
    bench.heard("a")
    bench.scheduler.unlink("one", bench.now)
    bench.lose("a")
    assert code_of(bench.join("two", **OTHER).decisions) is ErrorCode.WORKER_LOST


def test_what_was_heard_waits_for_a_busy_equal_and_lets_others_by() -> None:
    bench = Bench(max_workers=3)
    bench.join("equal", **REPRODUCIBLE)
    bench.queue("busy")
    bench.join("one", **REPRODUCIBLE)
    bench.queue("a")
    bench.heard("a")
    bench.scheduler.unlink("one", bench.now)
    bench.lose("a")
    assert bench.join("other", **OTHER).decisions == []
    assert bench["a"].state is State.QUEUED
    assert started(bench.complete("busy", "equal")) == ["a"]


def test_a_request_is_given_up_after_its_last_attempt() -> None:
    bench = Bench(max_attempts=3)
    bench.queue("a")
    decisions: list[Decision] = []
    for attempt in (1, 2, 3):
        bench.join(f"box{attempt}")
        assert bench["a"].attempt == attempt
        bench.scheduler.unlink(f"box{attempt}", bench.now)
        decisions = bench.lose("a")
    assert code_of(decisions) is ErrorCode.WORKER_LOST
    assert "given up" in decisions[-1].message  # type: ignore[union-attr]


def test_losing_what_does_not_run_changes_nothing() -> None:
    bench = Bench()
    bench.queue("a")
    assert bench.lose("a") == bench.lose("unknown") == []
    assert bench["a"].losses == 0


# -- cancelling ------------------------------------------------------------------------------------------------------


def test_what_waits_is_cancelled_at_once_and_what_runs_by_its_worker() -> None:
    bench = Bench()
    bench.join()
    bench.queue("a")
    bench.queue("b")
    bench.admit("uploading")
    for name in ("b", "uploading"):
        assert kinds(bench.scheduler.cancel(name, "enough")) == [("Finish", name)]
    assert kinds(bench.scheduler.cancel("a", "enough")) == [("Stop", "a")]
    assert bench.scheduler.cancel("a", "again") == [], "it is told once"
    assert bench.scheduler.cancel("unknown", "") == []


def test_what_its_worker_left_behind_is_cancelled_at_once() -> None:
    bench = Bench()
    bench.join()
    bench.queue("a")
    bench.scheduler.unlink("box", bench.now)
    assert kinds(bench.scheduler.cancel("a", "enough")) == [("Finish", "a")]
    assert not bench.scheduler.state.workers


@pytest.mark.parametrize("how", ["engine crashed", "worker gone", "came back without it"])
def test_a_cancelled_request_is_never_tried_again(how: str) -> None:
    bench = Bench()
    bench.join()
    bench.queue("a")
    bench.scheduler.cancel("a", "enough")
    if how == "came back without it":
        decisions = bench.join().decisions
    else:
        if how == "worker gone":
            bench.scheduler.unlink("box", bench.now)
        decisions = bench.lose("a", ErrorCode.ENGINE_FAILED)
    assert Finish(bench["a"], None, "enough") in decisions
    assert not started(decisions)


def test_a_worker_that_is_away_is_forgotten_with_its_last_request() -> None:
    bench = Bench()
    bench.join(slots=2)
    bench.queue("a")
    bench.queue("b")
    bench.scheduler.unlink("box", bench.now)
    bench.scheduler.end("a", State.CANCELLED, bench.now)
    assert bench.scheduler.state.workers["box"].held == {"b": 1}
    bench.scheduler.end("b", State.CANCELLED, bench.now)
    assert not bench.scheduler.state.workers


# -- after a restart -------------------------------------------------------------------------------------------------


def test_a_restart_keeps_order_and_takes_running_requests_up_again() -> None:
    bench = Bench()
    bench.scheduler.restore(bench.entry("a", state=State.RUNNING, attempt=2, losses=1), bench.now)
    for name in "bc":
        bench.scheduler.restore(bench.entry(name), bench.now)
    assert bench["a"].worker_lost_at == bench.now
    joined = bench.join(running={"a": 2})
    assert [entry.request_id for entry in joined.resume] == ["a"]
    assert bench.order() == ["b", "c"]
    assert started(bench.complete("a")) == ["b"]


def test_after_a_restart_what_nobody_runs_is_tried_again_first() -> None:
    bench = Bench()
    bench.scheduler.restore(bench.entry("a", state=State.RUNNING, attempt=1), bench.now)
    bench.scheduler.restore(bench.entry("b"), bench.now)
    bench.scheduler.state.draining = True
    bench.join()
    bench.lose("a")
    assert bench.order() == ["a", "b"]


@pytest.mark.parametrize("state", [State.QUEUED, State.RUNNING])
def test_an_attempt_that_the_store_had_not_written_goes_on_where_it_runs(state: State) -> None:
    bench = Bench()
    bench.scheduler.restore(bench.entry("a", state=state, attempt=1, attempt_may_be_newer=True), bench.now)
    joined = bench.join(running={"a": 2}, reproducible="mock")
    assert [entry.request_id for entry in joined.resume] == ["a"]
    assert (bench["a"].attempt, bench["a"].reproducible, bench["a"].state) == (2, "mock", State.RUNNING)
    assert bench.join(running={"a": 3}).abandon == ["a"], "and never a second time"


def test_an_attempt_after_a_restart_has_a_number_that_was_never_given_out() -> None:
    bench = Bench()
    bench.scheduler.restore(bench.entry("a", attempt=1, attempt_may_be_newer=True), bench.now)
    assert started(bench.join().decisions) == ["a"]
    assert bench["a"].attempt == 3


def test_requeueing_says_so_before_it_starts_anew() -> None:
    bench = Bench(max_workers=2)
    bench.join("one")
    bench.queue("a")
    bench.join("two")
    decisions = bench.lose("a", ErrorCode.IDLE_TIMEOUT)
    assert [type(decision) for decision in decisions] == [Stop, Requeue, Start]


def test_an_attempt_that_was_begun_after_a_loss_and_not_stored_gives_no_loss_back() -> None:
    bench = Bench()
    bench.scheduler.restore(
        bench.entry("a", state=State.QUEUED, attempt=1, losses=1, attempt_may_be_newer=True), bench.now
    )
    assert bench.join(running={"a": 2}).resume == [bench["a"]]
    assert (bench["a"].attempt, bench["a"].losses) == (2, 1)


@pytest.mark.parametrize("state", [State.QUEUED, State.RUNNING])
def test_an_attempt_that_only_a_listener_knows_of_is_awaited_and_those_before_it_are_over(state: State) -> None:
    bench = Bench(max_workers=2)
    away = {"worker_id": "old"} if state is State.RUNNING else {}
    bench.scheduler.restore(bench.entry("a", state=state, attempt=1, attempt_may_be_newer=True, **away), bench.now)
    assert bench.scheduler.adopt_later_attempt("a", 2, bench.now) == []
    assert bench.join("old", {"a": 1}, slots=0).abandon == ["a"]
    bench.now += 5
    assert bench.join("new", {"a": 2}, reproducible=TONE).resume == [bench["a"]]
    entry = bench["a"]
    assert (entry.attempt, entry.worker_id, entry.reproducible, entry.started_at) == (2, "new", TONE, bench.now)


def test_an_attempt_that_only_a_listener_knows_of_and_nobody_runs_ends_under_its_own_number() -> None:
    bench = Bench()
    bench.scheduler.restore(
        bench.entry("a", state=State.RUNNING, attempt=1, attempt_may_be_newer=True, retry="never"), bench.now
    )
    bench.scheduler.adopt_later_attempt("a", 2, bench.now)
    assert code_of(bench.lose("a")) is ErrorCode.WORKER_LOST
    assert bench["a"].attempt == 2, "a listener drops the end of an attempt before its own"
    for attempt in (0, 1, 2, 4):
        assert bench.scheduler.adopt_later_attempt("a", attempt, bench.now) == []
    assert bench["a"].attempt == 2


def test_a_listener_cannot_raise_the_attempt_of_a_request_that_did_not_come_from_the_store() -> None:
    bench = Bench()
    bench.queue("a")
    for attempt in range(1, 50):
        assert bench.scheduler.adopt_later_attempt("a", attempt, bench.now) == []
    assert bench["a"].attempt == 0


def test_after_a_restart_a_listener_is_believed_once_and_not_at_all_when_an_attempt_has_started() -> None:
    bench = Bench()
    bench.scheduler.restore(bench.entry("a", attempt=1, attempt_may_be_newer=True), bench.now)
    for attempt in range(2, 50):
        bench.scheduler.adopt_later_attempt("a", attempt, bench.now)
    assert bench["a"].attempt == 2
    bench.scheduler.restore(bench.entry("b", attempt=1, attempt_may_be_newer=True, ticket=2), bench.now)
    bench.join(slots=2)
    started_with = bench["b"].attempt
    bench.scheduler.adopt_later_attempt("b", started_with + 1, bench.now)
    assert bench["b"].attempt == started_with
