"""The scheduler as workers join, disconnect and come back: what becomes of their attempts."""

from typing import Any

import pytest

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import Rejected
from relayd.scheduling.model import (
    Decision,
    SpaceRules,
    Start,
    State,
)
from tests.relayd.scheduling.scheduler_bench import TONE, Bench, code_of, kinds, started


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
    (away,), _decisions = bench.scheduler.unlink("box", bench.now)
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


def test_who_comes_back_with_an_attempt_gives_one_loss_back_and_no_more() -> None:
    bench = Bench(max_attempts=5)
    bench.join()
    bench.queue("a")
    bench["a"].losses = 2
    bench.scheduler.unlink("box", bench.now)
    bench.lose("a")
    assert bench["a"].losses == 3
    bench.join(running={"a": 1})
    assert bench["a"].losses == 2


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
