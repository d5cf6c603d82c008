"""Workers whose engine has one process for all slots: who counts a loss when it ends, and who then runs alone."""

import pytest

from protocol.wire.errors import ErrorCode
from relayd.scheduling.model import Decision, Requeue, State
from relayd.scheduling.scheduler import INNOCENT_UNTIL_ALONE, MAX_INNOCENT_LOSSES
from tests.relayd.scheduling.scheduler_bench import TONE, Bench, code_of, kinds, started

ENGINE = ErrorCode.ENGINE_FAILED


def a_bench(slots: int = 3, **rules: object) -> Bench:
    bench = Bench(**({"max_workers": 3} | rules))
    bench.join("box", slots=slots, shared=True, reproducible=TONE)
    return bench


def crash(bench: Bench, worker_id: str = "box", **innocent: bool) -> list[Decision]:
    """The process ends: its worker has no slots for a moment, then ends these runs, then has its slots again."""
    worker = bench.scheduler.state.workers[worker_id]
    slots = worker.slots
    decisions = bench.scheduler.set_slots(worker_id, 0, bench.now)
    for name, is_innocent in innocent.items():
        del worker.held[name]
        decisions += bench.scheduler.lose(name, ENGINE, "it ended", bench.now, innocent=is_innocent)
    return [*decisions, *bench.scheduler.set_slots(worker_id, slots, bench.now)]


def test_only_who_had_made_nothing_counts_a_loss() -> None:
    bench = a_bench()
    for name in "abc":
        bench.queue(name)
    crash(bench, a=True, b=True, c=False)
    assert [(bench[name].losses, bench[name].innocent_losses) for name in "abc"] == [(0, 1), (0, 1), (1, 0)]
    assert [bench[name].alone for name in "abc"] == [False, False, True]
    assert not bench["a"].failed_on


def test_a_suspect_runs_alone_until_it_has_made_something_and_the_others_after_it() -> None:
    bench = a_bench()
    for name in "abc":
        bench.queue(name)
    decisions = crash(bench, a=True, b=False, c=True)
    assert started(decisions) == ["b"]
    assert bench.queue("d") == []
    assert started(bench.scheduler.has_begun("b", bench.now)) == ["a", "c"]
    assert not bench["b"].alone


def test_a_suspect_waits_for_those_that_run_and_nothing_new_starts_before_it() -> None:
    bench = a_bench()
    for name in "ab":
        bench.queue(name)
    bench.scheduler.state.workers["box"].held.pop("b")
    assert kinds(bench.scheduler.lose("b", ENGINE, "it ended", bench.now, innocent=False)) == [("Requeue", "b")]
    assert bench.queue("c") == []
    assert started(bench.complete("a")) == ["b"]
    assert started(bench.complete("b")) == ["c"]


def test_the_worker_kept_for_a_suspect_is_the_one_that_is_free_soonest() -> None:
    bench = a_bench()
    bench.join("second", slots=3, shared=True, reproducible=TONE)
    bench.join("third", slots=3, shared=True, reproducible=TONE)
    for name in "abcdef":  # in turn on "box", "second" and "third"
        bench.queue(name)
    bench.complete("e", "second")
    bench.scheduler.state.workers["box"].held.pop("d")
    bench.scheduler.lose("d", ENGINE, "it ended", bench.now, innocent=False)  # and so does not run on "box" again
    for name in "gh":
        bench.queue(name)
    assert started(bench.complete("b", "second")) == ["d"]


def test_a_worker_kept_for_a_suspect_is_free_again_when_that_is_cancelled() -> None:
    bench = a_bench()
    for name in "ab":
        bench.queue(name)
    bench.scheduler.state.workers["box"].held.pop("b")
    bench.scheduler.lose("b", ENGINE, "it ended", bench.now, innocent=False)
    bench.queue("c")
    bench.scheduler.cancel("b", "enough")
    assert started(bench.scheduler.end("b", State.CANCELLED, bench.now)) == ["c"]


def test_a_poison_is_given_up_after_three_losses_of_which_two_were_its_own() -> None:
    bench = a_bench()
    for name in ("poison", "a", "b"):
        bench.queue(name)
    assert started(crash(bench, poison=False, a=True, b=True)) == ["poison"]
    assert started(crash(bench, poison=False)) == ["poison"]
    decisions = crash(bench, poison=False)
    assert code_of(decisions) is ENGINE
    assert [bench[name].losses for name in "ab"] == [0, 0]
    assert started([*decisions, *bench.scheduler.end("poison", State.FAILED, bench.now)]) == ["a", "b"]


def test_a_late_poison_runs_alone_after_three_innocent_losses_and_its_neighbours_outlive_it() -> None:
    bench = a_bench()
    for name in ("poison", "a"):
        bench.queue(name)
    crashes = [crash(bench, poison=True, a=True) for _ in range(INNOCENT_UNTIL_ALONE)]
    assert started(crashes[-1]) == ["poison"]
    assert bench.scheduler.has_begun("poison", bench.now) == [], "it is what happens later that counts here"
    for _ in range(2):
        assert started(crash(bench, poison=False)) == ["poison"]
    assert code_of(crash(bench, poison=False)) is ENGINE
    assert started(bench.scheduler.end("poison", State.FAILED, bench.now)) == ["a"]
    assert bench["a"].losses == 0


def test_no_worker_can_call_a_request_innocent_for_ever() -> None:
    bench = a_bench(max_attempts=2)
    bench.queue("a")
    for _ in range(MAX_INNOCENT_LOSSES):
        assert bench["a"].losses == 0
        crash(bench, a=True)
    crash(bench, a=True)
    assert bench["a"].losses == 1
    assert code_of(crash(bench, a=True)) is ENGINE


def test_an_innocent_request_that_may_not_be_tried_again_fails() -> None:
    bench = a_bench()
    bench.queue("a", retry="never")
    assert code_of(crash(bench, a=True)) is ENGINE


def test_a_suspect_needs_no_worker_for_itself_where_each_slot_has_its_process() -> None:
    bench = a_bench()
    for name in "ab":
        bench.queue(name)
    bench.join("plain", slots=2, reproducible=TONE)
    bench.queue("c")  # runs at `plain`, which has most free slots
    bench.queue("d")
    assert {bench[name].worker_id for name in "cd"} == {"plain", "box"}
    (requeue, start) = [d for d in crash(bench, a=False) if d.entry.request_id == "a"]  # type: ignore[union-attr]
    assert isinstance(requeue, Requeue)
    assert started([start]) == ["a"]
    assert bench["a"].worker_id == "plain"
    assert bench["c"].state is State.RUNNING


@pytest.mark.parametrize("end", ["drain", "pause"])
def test_a_suspect_that_cannot_start_keeps_no_worker_from_others(end: str) -> None:
    bench = a_bench(max_running_per_principal=1)
    bench.queue("a")
    bench.queue("b", principal="bob")
    bench.scheduler.state.workers["box"].held.pop("b")
    bench.scheduler.lose("b", ENGINE, "it ended", bench.now, innocent=False)
    assert bench.queue("c", principal="carl") == []
    if end == "pause":
        bench.scheduler.add_space("other", bench.scheduler.state.spaces["tts"].rules)
        bench.scheduler.state.workers["box"].spaces = ("tts", "other")
        bench.scheduler.pause_space("tts")
        assert started(bench.queue("d", space="other", principal="dora")) == ["d"]
    else:
        bench.scheduler.drain("box", bench.now)
        bench.join("second", slots=2, shared=True, reproducible=TONE)
        assert bench["b"].worker_id == "second"
