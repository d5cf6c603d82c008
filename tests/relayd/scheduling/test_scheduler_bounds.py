"""The scheduler: what is counted, exact bounds, defaults, and what each guard is there for."""

from collections.abc import Callable
from typing import Any

import attrs
import pytest

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import Submit
from relayd.config.schema import SpaceConfig
from relayd.scheduling.model import Finish, ScheduledRequest, SpaceRules, Start, State, WorkerState
from relayd.scheduling.scheduler import REST_FIRST_S, REST_LONGEST_S, no_such_space
from tests.relayd.scheduling.scheduler_bench import TONE, Bench, code_of, kinds, started


def worker(bench: Bench, worker_id: str = "box") -> WorkerState:
    return bench.scheduler.state.workers[worker_id]


@pytest.mark.parametrize(
    ("retry", "frames", "why"),
    [
        ("never", 0, "retry is 'never'"),
        ("before_output", 3, "3 frames were delivered already"),
        ("before_output", 0, "some of it was delivered already"),
    ],
)
def test_a_loss_that_ends_a_request_says_why_it_is_not_tried_again(retry: str, frames: int, why: str) -> None:
    bench = Bench()
    bench.join()
    bench.queue("a", retry=retry)
    bench.heard("a", frames)
    (finish,) = (decision for decision in bench.lose("a") if isinstance(decision, Finish))
    assert finish.message == f"it broke; not tried again, because {why}"


# -- what others are told of ------------------------------------------------------------------------------------------

CHANGES: list[tuple[str, Callable[[Bench], object]]] = [
    ("rules", lambda bench: bench.scheduler.set_rules("tts", SpaceRules(), bench.now)),
    ("pause", lambda bench: bench.scheduler.pause_space("tts")),
    ("resume", lambda bench: bench.scheduler.resume_space("tts", bench.now)),
    ("join", lambda bench: bench.join("another", slots=0)),
    ("slots", lambda bench: bench.scheduler.set_slots("box", 1, bench.now)),
    ("drain", lambda bench: bench.scheduler.drain("box", bench.now)),
    ("undrain", lambda bench: bench.scheduler.undrain("box", bench.now)),
    ("unlink", lambda bench: bench.scheduler.unlink("box", bench.now)),
    ("enqueue", lambda bench: bench.queue("new")),
    ("end", lambda bench: bench.scheduler.end("waits", State.CANCELLED, bench.now)),
    ("lose", lambda bench: bench.lose("runs")),
    ("promote", lambda bench: bench.scheduler.promote("waits")),
]


@pytest.mark.parametrize("change", [change for _name, change in CHANGES], ids=[name for name, _change in CHANGES])
def test_whatever_changes_a_place_or_an_eta_marks_its_space(change: Callable[[Bench], object]) -> None:
    bench = Bench(max_workers=2)
    bench.join()
    bench.queue("runs")
    bench.queue("waits")
    bench.scheduler.state.moved.clear()
    change(bench)
    assert bench.scheduler.state.moved == {"tts"}


def test_a_start_marks_its_space_and_no_other() -> None:
    bench = Bench()
    bench.scheduler.add_space("other", SpaceRules())
    bench.join(spaces=("tts", "other"))
    bench.queue("runs", space="other")
    bench.queue("waits")
    bench.complete("runs")
    assert bench["waits"].state is State.RUNNING
    bench.scheduler.state.moved.clear()
    bench.queue("more", space="other")
    assert bench.scheduler.state.moved == {"other"}
    bench.scheduler.state.moved.clear()
    bench.scheduler.release("box", "waits", 1, bench.now)
    assert bench.scheduler.state.moved == {"other"}, "its request has started"


def test_a_workers_slots_count_for_the_eta_only_while_it_accepts_requests() -> None:
    bench = Bench(max_workers=2)
    bench.join("one")
    bench.join("two")
    bench.queue("a")
    bench.now += 10
    bench.complete("a", "one")
    bench.queue("b")
    bench.queue("c")
    for name in "de":
        bench.queue(name)
    assert [bench.scheduler.positions("tts", bench.now)[name].eta_s for name in "de"] == [10.0, 10.0]
    bench.scheduler.drain("two", bench.now)
    assert [bench.scheduler.positions("tts", bench.now)[name].eta_s for name in "de"] == [10.0, 20.0]
    assert bench.scheduler.state.slots_of("tts") == (2, 2)


def test_a_place_is_told_of_what_waits_alone() -> None:
    bench = Bench()
    bench.join()
    for name in "abc":
        bench.queue(name)
    for name in "bc":
        assert bench.scheduler.position(bench[name], bench.now) == bench.scheduler.positions("tts", bench.now)[name]
    assert bench.scheduler.position(bench["a"], bench.now) is None
    assert bench.scheduler.position(bench.entry("x", space="gone"), bench.now) is None


def test_a_full_queue_is_told_the_pace_of_all_slots() -> None:
    bench = Bench(max_queued=2, max_queued_per_principal=1)
    bench.join(slots=2)
    bench.queue("a")
    bench.now += 8.0
    bench.complete("a")
    for name in "bc":
        bench.queue(name)
    bench.queue("d")
    own = bench.admit("e")
    assert own is not None
    assert (own.code, own.retry_after_s) == (ErrorCode.QUEUE_FULL, 4.0)
    bench.queue("e", principal="bob")
    full = bench.admit("f", principal="cid")
    assert full is not None
    assert (full.code, full.retry_after_s) == (ErrorCode.QUEUE_FULL, 4.0)


def test_a_refusal_names_the_space_that_was_meant_and_how_to_make_one() -> None:
    def message(*args: Any, **options: Any) -> str:
        refusal = no_such_space(*args, **options)
        assert refusal.code == ErrorCode.SPACE_NOT_FOUND
        return refusal.message

    assert message("tt", operator=True, known=["tts"]) == (
        "space 'tt' does not exist; did you mean 'tts'? Otherwise create it with: relayd space create tt"
    )
    assert message("tt", known=["quite", "different"]) == "space 'tt' does not exist; ask the relay's operator"
    bench = Bench()
    for refusal in (
        bench.scheduler.remove_space("tt"),
        bench.scheduler.pause_space("tt"),
        bench.scheduler.resume_space("tt", bench.now),
    ):
        assert "did you mean 'tts'? Otherwise create it with: relayd space create tt" in refusal.message  # type: ignore[union-attr]


# -- spaces and their limits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("busy", ["admitted", "queued", "running", "worker"])
def test_a_space_that_is_in_use_is_not_removed(busy: str) -> None:
    bench = Bench()
    if busy == "admitted":
        assert bench.admit("a") is None
    elif busy == "queued":
        bench.queue("a")
    elif busy == "running":
        bench.scheduler.restore(bench.entry("a", state=State.RUNNING, attempt=1, worker_id="box"), bench.now)
    else:
        bench.join()
    refusal = bench.scheduler.remove_space("tts")
    assert refusal is not None
    assert refusal.code == ErrorCode.SPACE_EXISTS
    assert "tts" in bench.scheduler.state.spaces


def test_new_rules_hold_at_once() -> None:
    bench = Bench(max_running_per_principal=1)
    bench.join(slots=3)
    for name in "abc":
        bench.queue(name)
    assert started(bench.scheduler.set_rules("tts", SpaceRules(max_running_per_principal=2), bench.now)) == ["b"]


def test_the_rules_without_settings_are_those_of_a_space_without_settings() -> None:
    settings, rules = attrs.asdict(SpaceConfig()), attrs.asdict(SpaceRules())
    assert rules.pop("refuse_when_empty") == (settings["when_empty"] == "refuse")
    assert rules == {name: settings[name] for name in rules}


def test_a_new_request_and_a_new_worker_have_nothing_behind_them() -> None:
    entry = ScheduledRequest(request_id="a", space="tts", principal="ann", ticket=1)
    submit = Submit(request_id="1" * 32, space="tts", params={})
    assert (entry.priority, entry.retry) == (submit.priority, submit.retry)
    assert entry.streams
    assert entry.state is State.UPLOADING
    begun = attrs.asdict(entry, filter=lambda field, value: bool(value) and field.name not in ("state", "streams"))
    assert begun == {
        "request_id": "a", "space": "tts", "principal": "ann", "ticket": 1, "priority": 5, "retry": "before_output"
    }  # fmt: skip
    joined = WorkerState(worker_id="box", instance="i", spaces=("tts",), slots=1)
    assert (joined.linked, joined.streams, joined.draining, joined.held) == (True, True, False, {})
    assert (joined.last_used, joined.failures, joined.rests, joined.rests_until) == (0, 0, 0, 0.0)


def test_a_principals_counts_are_its_own_and_leave_nothing_behind() -> None:
    bench = Bench()
    state = bench.scheduler.state
    bench.scheduler.add_space("other", SpaceRules())
    bench.admit("a", input_bytes=10)
    bench.admit("b", input_bytes=5)
    bench.admit("c")
    bench.admit("d", principal="bob", space="other")
    bench.queue("e", space="other", input_bytes=3)
    assert (bench.scheduler.queued_count("ann"), bench.scheduler.queued_count("bob")) == (4, 1)
    assert (dict(state.uploads), dict(state.uploading_bytes)) == ({"ann": 2}, {"ann": 15})
    assert state.input_bytes["ann"] == 18
    bench.scheduler.enqueue(bench["a"], bench.now)
    assert (dict(state.uploads), dict(state.uploading_bytes)) == ({"ann": 1}, {"ann": 5})
    assert state.input_bytes["ann"] == 18, "the store keeps them until the request ends"
    for name in "abcde":
        bench.scheduler.end(name, State.CANCELLED, bench.now)
    assert (dict(state.uploads), dict(state.uploading_bytes)) == ({}, {})
    assert dict(state.input_bytes) == {"ann": 0} or not state.input_bytes["ann"]
    assert not any(space.admitted_per_principal for space in state.spaces.values())


# -- workers ----------------------------------------------------------------------------------------------------------


def test_a_worker_has_been_idle_since_it_released_its_last_request() -> None:
    bench = Bench(max_workers=2)
    bench.join("one")
    bench.join("two")
    bench.queue("a")
    bench.queue("b")
    bench.complete("b", "two")
    bench.complete("a", "one")
    bench.queue("c")
    assert bench["c"].worker_id == "two"


def test_fewer_slots_than_what_runs_are_none_free() -> None:
    bench = Bench(max_workers=2)
    bench.join("one", slots=3)
    for name in "abc":
        bench.queue(name)
    bench.scheduler.set_slots("one", 1, bench.now)
    assert worker(bench, "one").free_slots == 0
    bench.join("two")
    bench.queue("d")
    assert bench["d"].worker_id == "two"


def test_a_worker_is_replaced_once_another_has_taken_one_of_its_spaces() -> None:
    bench = Bench()
    bench.scheduler.add_space("other", SpaceRules())
    bench.join("one", spaces=("tts", "other"))
    bench.queue("a")
    bench.scheduler.unlink("one", bench.now)
    away = worker(bench, "one")
    assert not bench.scheduler.is_replaced(away)
    bench.join("two", spaces=("other",))
    assert bench.scheduler.is_replaced(away)


def test_a_worker_that_comes_back_is_not_its_own_second() -> None:
    bench = Bench()
    bench.join("one")
    bench.join("one")


def test_a_worker_that_reconnects_goes_on_with_its_rest() -> None:
    bench = Bench(max_workers=2)
    bench.join("bad")
    bench.queue("a")
    assert [bench.scheduler.count_engine_failure("bad", bench.now) for _ in range(4)] == [0.0, 0.0, REST_FIRST_S, 0.0]
    bench.scheduler.unlink("bad", bench.now)
    bench.join("bad", {"a": 1})
    bench.join("good", slots=0)
    assert worker(bench, "bad").rests_until == bench.now + REST_FIRST_S
    bench.now += REST_FIRST_S
    assert bench.scheduler.end_rests(bench.now)[0] == ["bad"]
    assert bench.scheduler.count_engine_failure("bad", bench.now) == 2 * REST_FIRST_S, "twice as long each time"
    assert bench.scheduler.count_engine_failure("unknown", bench.now) == 0.0
    bench.scheduler.count_completed("unknown")


def test_a_completed_attempt_forgives_an_engine_what_it_failed_before() -> None:
    bench = Bench()
    bench.join("bad")
    for _ in range(3):
        bench.scheduler.count_engine_failure("bad", bench.now)
    bench.scheduler.count_completed("bad")
    again = [bench.scheduler.count_engine_failure("bad", bench.now) for _ in range(3)]
    assert again == [0.0, 0.0, REST_FIRST_S]
    assert (REST_FIRST_S, REST_LONGEST_S) == (10.0, 600.0)


@pytest.mark.parametrize("fields", [{"slots": 0}, {"draining": True}, {"spaces": ("other",)}])
def test_a_worker_rests_only_where_another_takes_its_requests(fields: dict[str, Any]) -> None:
    bench = Bench(max_workers=2)
    bench.scheduler.add_space("other", SpaceRules(max_workers=2))
    bench.join("bad", spaces=("tts", "other"))
    bench.join("another", **fields)
    worker(bench, "bad").rests_until = bench.now + 600
    assert not bench.scheduler.state.is_resting(worker(bench, "bad"))
    assert started(bench.queue("a")) == ["a"]
    bench.scheduler.unlink("bad", bench.now)
    worker(bench, "bad").rests_until = 0.0
    assert not bench.scheduler.state.is_resting(worker(bench, "bad")), "it is away"


@pytest.mark.parametrize("fields", [{"slots": 0}, {"draining": True}])
def test_what_an_engine_failed_does_not_wait_for_a_worker_that_takes_nothing(fields: dict[str, Any]) -> None:
    bench = Bench(max_workers=2)
    bench.join("bad", slots=2)
    bench.queue("a")
    bench.join("another", **fields)
    worker(bench, "bad").held.pop("a")
    assert kinds(bench.lose("a", ErrorCode.ENGINE_FAILED)) == [("Requeue", "a"), ("Start", "a")]


def test_what_ended_on_a_worker_that_goes_is_not_waited_for() -> None:
    bench = Bench()
    bench.join(slots=2)
    bench.queue("a")
    bench.queue("b")
    bench.scheduler.end("a", State.FAILED, bench.now)
    away, _decisions = bench.scheduler.unlink("box", bench.now)
    assert [entry.request_id for entry in away] == ["b"]
    assert worker(bench).held == {"b": 1}


def test_a_worker_that_goes_takes_nothing_with_it_that_runs_on_another_by_now() -> None:
    bench = Bench(max_workers=2)
    bench.join("one")
    bench.queue("a")
    bench.join("two")
    assert started(bench.lose("a", ErrorCode.IDLE_TIMEOUT)) == ["a"]
    assert bench.scheduler.unlink("one", bench.now) == ([], [])
    assert (bench["a"].worker_id, bench["a"].worker_lost_at) == ("two", None)
    assert "one" not in bench.scheduler.state.workers


def test_what_waits_again_does_not_count_as_running() -> None:
    bench = Bench(max_running_per_principal=1)
    bench.join("one", reproducible=TONE)
    bench.queue("a")
    bench.heard("a")
    bench.scheduler.drain("one", bench.now)
    bench.lose("a")
    assert not bench.scheduler.state.spaces["tts"].running


# -- attempts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "heard", "again", "outcome"),
    [
        ({}, (False, 0), {}, ("Start", 0)),
        ({}, (True, 3), {}, ErrorCode.WORKER_LOST),  # it cannot be made again
        ({"reproducible": TONE}, (True, 3), {"reproducible": TONE}, ("Start", 3)),
        ({"reproducible": TONE}, (False, 1), {"reproducible": "chime"}, ("Requeue", 0)),
        ({"reproducible": TONE}, (True, 0), {"reproducible": "chime"}, ErrorCode.WORKER_LOST),
        ({}, (False, 0), {"spaces": ("other",)}, ("Requeue", 0)),
    ],
)
def test_what_becomes_of_an_attempt_that_its_worker_does_not_know_when_it_is_back(
    fields: dict[str, Any], heard: tuple[bool, int], again: dict[str, Any], outcome: object
) -> None:
    bench = Bench()
    bench.scheduler.add_space("other", SpaceRules())
    bench.join(**fields)
    bench.queue("a")
    bench["a"].has_output, bench["a"].next_seq = heard
    bench.scheduler.unlink("box", bench.now)
    decisions = bench.join(**again).decisions
    if isinstance(outcome, ErrorCode):
        assert code_of(decisions) is outcome
        return
    first = decisions[0]
    assert (type(first).__name__, first.from_seq if isinstance(first, Start) else 0) == outcome
    if isinstance(first, Start):
        assert (first.entry.attempt, worker(bench).held) == (1, {"a": 1})


def test_an_assignment_after_a_restart_has_a_number_that_was_never_given_out() -> None:
    bench = Bench()
    bench.scheduler.restore(
        bench.entry("a", state=State.RUNNING, attempt=1, worker_id="box", attempt_may_be_newer=True), bench.now
    )
    assert started(bench.join().decisions) == ["a"]
    assert (bench["a"].attempt, worker(bench).held) == (3, {"a": 3})
    assert bench.scheduler.adopt_later_attempt(bench["a"], 4, bench.now) == []
    assert bench["a"].attempt == 3, "the store knows the number now"


def test_a_worker_that_has_an_attempt_which_was_not_stored_is_believed_and_then_nobody_else() -> None:
    bench = Bench()
    bench.scheduler.restore(bench.entry("a", attempt=1, attempt_may_be_newer=True), bench.now)
    bench.join(running={"a": 2})
    assert bench.scheduler.adopt_later_attempt(bench["a"], 3, bench.now) == []
    assert bench["a"].attempt == 2


def test_a_newer_attempt_on_another_worker_takes_the_request_from_the_one_that_is_away() -> None:
    bench = Bench(max_workers=2)
    bench.scheduler.restore(
        bench.entry("a", state=State.RUNNING, attempt=1, worker_id="old", attempt_may_be_newer=True), bench.now
    )
    assert bench.join("new", {"a": 2}).resume == [bench["a"]]
    assert "old" not in bench.scheduler.state.workers


def test_a_listeners_later_attempt_ends_the_one_that_runs_and_leaves_its_worker() -> None:
    bench = Bench()
    bench.scheduler.restore(
        bench.entry("a", state=State.RUNNING, attempt=1, worker_id="box", attempt_may_be_newer=True), bench.now
    )
    bench.join(running={"a": 1})
    assert kinds(bench.scheduler.adopt_later_attempt(bench["a"], 2, bench.now)) == [("Stop", "a"), ("Requeue", "a")]
    assert started(bench.scheduler.release("box", "a", 1, bench.now)) == ["a"]
    assert bench["a"].attempt == 3
    bench.scheduler.restore(
        bench.entry("b", state=State.RUNNING, attempt=1, worker_id="old", attempt_may_be_newer=True), bench.now
    )
    bench.scheduler.adopt_later_attempt(bench["b"], 2, bench.now)
    assert "old" not in bench.scheduler.state.workers


def test_a_loss_is_given_back_only_for_the_attempt_that_was_lost() -> None:
    bench = Bench()
    bench.join()
    bench.queue("a")
    bench.scheduler.unlink("box", bench.now)
    bench.lose("a")
    bench.join(running={"a": 1})
    assert bench["a"].losses == 0
    bench.scheduler.restore(bench.entry("b", attempt=1, losses=1, attempt_may_be_newer=True), bench.now)
    bench.scheduler.adopt_later_attempt(bench["b"], 2, bench.now)
    bench.join(running={"a": 1, "b": 2}, slots=2)
    assert bench["b"].losses == 1


def test_a_restored_request_waits_or_is_awaited_since_its_worker_went() -> None:
    bench = Bench()
    bench.scheduler.add_space("other", SpaceRules())
    for name, space, since in (("a", "tts", 5.0), ("b", "other", None)):
        entry = bench.entry(name, space=space, state=State.RUNNING, attempt=1, worker_id="gpu-1a2b")
        entry.worker_lost_at = since
        bench.scheduler.restore(entry, bench.now)
    assert (bench["a"].worker_lost_at, bench["b"].worker_lost_at) == (5.0, bench.now)
    away = worker(bench, "gpu-1a2b")
    assert (away.instance, set(away.spaces), away.slots, away.linked) == ("1a2b", {"tts", "other"}, 0, False)
    bench.scheduler.restore(bench.entry("c"), bench.now)
    assert bench["c"].state is State.QUEUED


def test_what_has_ended_says_so_and_a_cancel_is_told_with_its_first_reason() -> None:
    bench = Bench()
    bench.join()
    bench.queue("a")
    bench.queue("waits")
    assert bench.scheduler.cancel("waits", "why") == [Finish(bench["waits"], None, "why")]
    bench.scheduler.cancel("a", "first")
    bench.scheduler.unlink("box", bench.now)
    assert bench.scheduler.cancel("a", "second") == [Finish(bench["a"], None, "first")]
    entry = bench["a"]
    bench.scheduler.end("a", State.CANCELLED, bench.now)
    assert entry.state is State.CANCELLED
    assert bench.scheduler.fail("a", ErrorCode.INTERNAL, "") == bench.scheduler.end("a", State.FAILED, 0.0) == []


def test_of_two_that_were_promoted_the_later_has_the_higher_number() -> None:
    bench = Bench()
    for name in "abc":
        bench.queue(name)
    for name in "bca":
        bench.scheduler.promote(name)
    assert bench["b"].promoted < bench["c"].promoted < bench["a"].promoted


def test_a_limit_of_all_spaces_counts_only_the_principals_own() -> None:
    bench = Bench()
    bench.scheduler.limit_running("ann", 1)
    bench.join(slots=9)
    bench.queue("x", principal="bob")
    assert started(bench.queue("a")) == ["a"]
    assert started(bench.queue("b")) == []


def test_an_attempt_that_runs_on_one_worker_is_not_another_ones() -> None:
    bench = Bench(max_workers=2)
    bench.join("one", slots=2)
    bench.queue("a")
    assert bench.join("two", {"a": 1}).abandon == ["a"]
    assert (bench["a"].worker_id, worker(bench, "two").held) == ("one", {})
    assert worker(bench, "one").free_slots == 1
    bench.scheduler.drain("one", bench.now)
    assert worker(bench, "one").free_slots == 0
    live = {state for state in State if state.live}
    assert live == {State.UPLOADING, State.QUEUED, State.RUNNING}
