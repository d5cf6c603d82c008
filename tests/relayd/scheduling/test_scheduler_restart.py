"""The scheduler after a restart of the relay."""

import pytest

from protocol.wire.errors import ErrorCode
from relayd.scheduling.model import (
    Requeue,
    Start,
    State,
    Stop,
)
from tests.relayd.scheduling.scheduler_bench import TONE, Bench, code_of, started


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


def test_what_is_queued_waits_for_the_worker_that_may_have_run_it_already() -> None:
    bench = Bench(max_workers=2)
    bench.scheduler.restore(bench.entry("a", attempt_may_be_newer=True), bench.now)
    bench.scheduler.state.spaces["tts"].settling = True
    assert bench.join("other").decisions == []
    assert bench.join("old", {"a": 1}).resume == [bench["a"]]
    bench.queue("b")
    assert bench["b"].state is State.QUEUED
    assert started(bench.scheduler.settle("tts", bench.now)) == ["b"]


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
    assert bench.scheduler.adopt_later_attempt(bench["a"], 2, bench.now) == []
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
    bench["a"].next_seq = 3
    assert bench.scheduler.adopt_later_attempt(bench["a"], 1, bench.now) == []
    assert (bench["a"].next_seq, bench["a"].attempt_known_from_client) == (3, False), "it is that attempt already"
    bench.scheduler.adopt_later_attempt(bench["a"], 2, bench.now)
    assert bench["a"].next_seq == 0
    assert code_of(bench.lose("a")) is ErrorCode.WORKER_LOST
    assert bench["a"].attempt == 2, "a listener drops the end of an attempt before its own"
    for attempt in (0, 1, 2, 4):
        assert bench.scheduler.adopt_later_attempt(bench["a"], attempt, bench.now) == []
    assert bench["a"].attempt == 2


def test_a_listener_cannot_raise_the_attempt_of_a_request_that_did_not_come_from_the_store() -> None:
    bench = Bench()
    bench.queue("a")
    for attempt in range(1, 50):
        assert bench.scheduler.adopt_later_attempt(bench["a"], attempt, bench.now) == []
    assert bench["a"].attempt == 0


def test_after_a_restart_a_listener_is_believed_once_and_not_at_all_when_an_attempt_has_started() -> None:
    bench = Bench()
    bench.scheduler.restore(bench.entry("a", attempt=1, attempt_may_be_newer=True), bench.now)
    for attempt in range(2, 50):
        bench.scheduler.adopt_later_attempt(bench["a"], attempt, bench.now)
    assert bench["a"].attempt == 2
    bench.scheduler.restore(bench.entry("b", attempt=1, attempt_may_be_newer=True, ticket=2), bench.now)
    bench.join(slots=2)
    started_with = bench["b"].attempt
    bench.scheduler.adopt_later_attempt(bench["b"], started_with + 1, bench.now)
    assert bench["b"].attempt == started_with


def test_after_two_restarts_each_attempt_that_may_have_begun_is_believed_and_no_number_comes_twice() -> None:
    def restored(name: str) -> Bench:
        bench = Bench()
        bench.scheduler.restore(bench.entry(name, attempt=1, attempt_may_be_newer=True, highest_attempt=3), bench.now)
        return bench

    bench = restored("a")
    assert started(bench.join().decisions) == ["a"]
    assert bench["a"].attempt == 4
    bench = restored("a")
    assert bench.join(running={"a": 3}).resume == [bench["a"]]
    assert bench["a"].attempt == 3
    bench = restored("a")
    bench.scheduler.adopt_later_attempt(bench["a"], 4, bench.now)
    assert bench["a"].attempt == 1
    bench.scheduler.adopt_later_attempt(bench["a"], 3, bench.now)
    assert bench["a"].attempt == 3
    bench = restored("a")
    bench.join(running={"a": 2})
    bench.scheduler.adopt_later_attempt(bench["a"], 3, bench.now)
    assert bench["a"].attempt == 3, "who has heard it would drop every frame of the second"


def test_an_attempt_that_was_taken_up_again_and_then_lost_too_early_is_the_same_run() -> None:
    bench = Bench()
    bench.scheduler.restore(
        bench.entry("a", state=State.RUNNING, attempt=1, started_at=500.0, attempt_may_be_newer=True), bench.now
    )
    bench.join(running={"a": 1})
    bench.scheduler.unlink("box", bench.now)
    bench.lose("a")
    assert bench.join(running={"a": 1}).resume == [bench["a"]]
    assert (bench["a"].losses, bench["a"].started_at) == (0, 500.0)
