"""The scheduler: admission, the queue, who is handed what, and cancelling."""

from typing import Any

import pytest

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import Rejected
from relayd.scheduling.model import (
    Decision,
    Finish,
    SpaceRules,
    State,
)
from relayd.scheduling.scheduler import REST_LONGEST_S
from tests.relayd.scheduling.scheduler_bench import Bench, kinds, started

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


def fail(bench: Bench, name: str, worker_id: str) -> list[Decision]:
    """An engine raises, and the request is not tried again."""
    attempt = bench[name].attempt
    bench.scheduler.count_engine_failure(worker_id, bench.now)
    decisions = bench.scheduler.end(name, State.FAILED, bench.now)
    return [*decisions, *bench.scheduler.release(worker_id, name, attempt, bench.now)]


def test_a_worker_whose_engine_fails_again_and_again_rests_while_another_works_longer_each_time() -> None:
    bench = Bench(max_workers=2)
    bench.join("good", slots=1)
    bench.queue("long")
    bench.join("bad", slots=2)
    bad = bench.scheduler.state.workers["bad"]
    for number in range(20):
        bench.queue(f"r{number}")
    assert started(fail(bench, "r0", "bad")) == ["r2"]
    assert started(fail(bench, "r1", "bad")) == ["r3"]
    assert not bench.scheduler.state.is_resting(bad)
    assert started(fail(bench, "r2", "bad")) == [], "it rests"
    assert bench.scheduler.state.is_resting(bad)
    assert fail(bench, "r3", "bad") == [], "what still ran there makes the rest no longer"
    assert started(bench.complete("long", "good")) == ["r4"]
    bench.now += 9.9
    assert bench.scheduler.end_rests(bench.now) == ([], [])
    bench.now += 0.2
    ids, decisions = bench.scheduler.end_rests(bench.now)
    assert (ids, started(decisions)) == (["bad"], ["r5", "r6"])
    fail(bench, "r5", "bad")
    assert bad.rests_until == bench.now + 20
    bench.scheduler.count_completed("bad")
    assert not bench.scheduler.state.is_resting(bad)


def test_a_worker_that_rests_serves_on_where_no_other_takes_requests() -> None:
    bench = Bench(max_workers=2)
    bench.join("bad")
    for number in range(6):
        bench.queue(f"r{number}")
    for number in range(4):
        assert started(fail(bench, f"r{number}", "bad")) == [f"r{number + 1}"]
    bench.join("leaves")
    bench.scheduler.drain("leaves", bench.now)
    assert not bench.scheduler.state.is_resting(bench.scheduler.state.workers["bad"])


def test_what_an_engine_failed_goes_to_another_worker_and_waits_for_it() -> None:
    bench = Bench(max_workers=2)
    bench.join("good", slots=1)
    bench.queue("long")
    bench.join("bad", slots=4)
    bench.queue("a", retry="always")
    assert bench["a"].worker_id == "bad"
    bench.scheduler.state.workers["bad"].held.pop("a")
    assert kinds(bench.lose("a", ErrorCode.ENGINE_FAILED)) == [("Requeue", "a")]
    assert started(bench.complete("long", "good")) == ["a"]
    assert bench["a"].worker_id == "good"
    bench.scheduler.unlink("good", bench.now)
    assert started(bench.lose("a")) == ["a"], "there is no other left"
    assert bench["a"].worker_id == "bad"


@pytest.mark.parametrize("how", ["unlinked", "drained"])
def test_what_waited_for_a_worker_starts_on_another_when_it_goes(how: str) -> None:
    bench = Bench(max_workers=2)
    bench.join("good", slots=1)
    bench.queue("long")
    bench.join("bad", slots=2)
    bench.queue("a", retry="always")
    bench.scheduler.state.workers["bad"].held.pop("a")
    assert kinds(bench.lose("a", ErrorCode.ENGINE_FAILED)) == [("Requeue", "a")]
    if how == "drained":
        decisions = bench.scheduler.drain("good", bench.now)
    else:
        _away, decisions = bench.scheduler.unlink("good", bench.now)
    assert started(decisions) == ["a"]
    assert bench["a"].worker_id == "bad"


def test_a_request_that_only_a_resting_worker_can_continue_is_continued_there() -> None:
    bench = Bench(max_workers=2)
    bench.join("rests", slots=2, reproducible="tone")
    bench.queue("a")
    bench["a"].has_output, bench["a"].next_seq = True, 5
    bench.join("other", slots=1, reproducible="another tone")
    bench.scheduler.state.workers["rests"].rests_until = bench.now + 600
    bench.scheduler.state.workers["rests"].held.pop("a")
    decisions = bench.lose("a")
    assert kinds(decisions) == [("Requeue", "a"), ("Start", "a")]
    assert bench["a"].worker_id == "rests"


def test_a_rest_has_a_longest_however_often_it_comes() -> None:
    bench = Bench()
    bench.join("bad")
    for _ in range(3):
        bench.scheduler.count_engine_failure("bad", bench.now)
    rests = []
    for _ in range(1100):
        bench.now += 700.0
        bench.scheduler.end_rests(bench.now)
        rests.append(bench.scheduler.count_engine_failure("bad", bench.now))
    assert set(rests[10:]) == {REST_LONGEST_S}


def test_a_worker_that_is_drained_before_it_is_back_takes_nothing() -> None:
    bench = Bench()
    bench.scheduler.restore(bench.entry("a", state=State.RUNNING, attempt=1, worker_id="box"), bench.now)
    bench.queue("b")
    assert started(bench.join("box", {"a": 1}, slots=2, draining=True).decisions) == []


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
    bench.scheduler.drain("box", bench.now)
    bench.queue("a")
    assert bench["a"].state is State.QUEUED
    assert started(bench.scheduler.undrain("box", bench.now)) == ["a"]


def test_a_draining_worker_still_drains_when_it_comes_back() -> None:
    bench = Bench()
    bench.join(slots=2)
    bench.queue("a")
    bench.scheduler.drain("box", bench.now)
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


def test_a_space_that_refuses_while_it_is_empty_lets_in_once_it_has_a_worker() -> None:
    bench = Bench(refuse_when_empty=True)
    bench.join()
    assert bench.admit("a") is None


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


def test_the_pace_is_made_of_completed_runs_alone() -> None:
    bench = Bench(max_workers=2)
    bench.join("one")
    for name, state in (("a", State.FAILED), ("b", State.CANCELLED), ("c", State.COMPLETED)):
        bench.queue(name)
        bench.now += 0.5 if state is State.COMPLETED else 100
        bench.scheduler.end(name, state, bench.now)
        bench.scheduler.release("one", name, bench.scheduler.state.workers["one"].held[name], bench.now)
    bench.queue("d")
    bench.queue("waits")
    bench.queue("ended while it waited")
    bench.now += 0.25
    bench.scheduler.end("ended while it waited", State.COMPLETED, bench.now)
    assert list(bench.scheduler.state.spaces["tts"].recent_runs_s) == [0.5]
    assert bench.scheduler.positions("tts", bench.now)["waits"].eta_s == 0.2


def test_nobody_knows_when_a_paused_space_or_one_without_workers_goes_on() -> None:
    bench = Bench()
    bench.join()
    bench.queue("a")
    bench.complete("a")
    bench.queue("b")
    bench.queue("c")
    assert bench.scheduler.positions("tts", bench.now)["c"].eta_s == 0.0
    bench.scheduler.state.spaces["tts"].paused = True
    assert bench.scheduler.positions("tts", bench.now)["c"].eta_s is None
    bench.scheduler.state.spaces["tts"].paused = False
    bench.scheduler.unlink("box", bench.now)
    assert bench.scheduler.positions("tts", bench.now)["c"].eta_s is None


def test_a_worker_that_has_just_got_a_request_has_not_been_idle() -> None:
    bench = Bench(max_workers=2)
    bench.join("two", slots=3)
    bench.join("one", slots=2)
    bench.queue("a")
    bench.queue("b")
    assert (bench["a"].worker_id, bench["b"].worker_id) == ("two", "one")


def test_what_has_started_is_no_longer_promoted() -> None:
    bench = Bench()
    bench.queue("a")
    bench.queue("b")
    bench.scheduler.promote("b")
    assert bench["b"].promoted
    assert started(bench.join().decisions) == ["b"]
    assert bench["b"].promoted == 0


def test_what_cannot_be_made_again_begins_anew() -> None:
    bench = Bench()
    bench.join()
    bench.queue("a", retry="always")
    bench.heard("a")
    bench.lose("a")
    bench.scheduler.release("box", "a", 1, bench.now)
    assert (bench["a"].attempt, bench["a"].next_seq, bench["a"].has_output) == (2, 0, False)


def test_a_worker_that_is_back_has_been_idle_since_it_let_go() -> None:
    bench = Bench(max_workers=3)
    bench.join("one")
    bench.join("two")
    bench.queue("a")
    bench.complete("a", "one")
    bench.scheduler.unlink("one", bench.now)
    bench.join("one")
    bench.queue("b")
    assert bench["b"].worker_id == "two", "the other has worked less lately, though this one has just come back"
    bench.complete("b", "two")
    bench.queue("c")
    assert bench["c"].worker_id == "one"


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
