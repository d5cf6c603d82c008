"""Requests whose frames are copied: they run without a worker, and may have to be queued."""

import pytest

from protocol.wire.errors import ErrorCode
from relayd.scheduling.model import Finish, Requeue, Start, State
from tests.relayd.scheduling.scheduler_bench import TONE, Bench


def copied(bench: Bench, name: str, **fields: str) -> None:
    assert bench.admit(name, **fields) is None
    bench.scheduler.copy(bench[name], TONE, bench.now)


def queue_of(bench: Bench) -> list[str]:
    return [entry.request_id for entry in bench.scheduler.state.spaces["tts"].queue]


def test_a_copy_takes_neither_a_slot_nor_a_run_of_its_principal() -> None:
    bench = Bench(max_running_per_principal=1)
    bench.join(slots=2)
    copied(bench, "a")
    assert (bench["a"].state, bench["a"].attempt, bench["a"].worker_id) == (State.RUNNING, 1, None)
    (start,) = bench.queue("b")
    assert isinstance(start, Start)
    assert not bench.scheduler.state.spaces["tts"].admitted


def test_how_long_a_copy_took_says_nothing_of_the_next_run() -> None:
    bench = Bench()
    copied(bench, "a")
    bench.scheduler.end("a", State.COMPLETED, bench.now + 1.0)
    space = bench.scheduler.state.spaces["tts"]
    assert not space.recent_runs_s
    assert not space.running


def test_a_queued_request_can_become_a_copy() -> None:
    bench = Bench()
    bench.queue("a")
    bench.scheduler.state.moved.clear()
    bench.scheduler.copy(bench["a"], TONE, bench.now)
    assert queue_of(bench) == []
    assert bench.scheduler.state.moved == {"tts"}, "others have another place"
    assert bench["a"].copied
    assert bench.join().decisions == []


def test_a_copy_that_is_cancelled_or_fails_ends_at_once() -> None:
    bench = Bench()
    bench.join()
    for name in ("a", "b"):
        copied(bench, name)
    (cancelled,), (failed,) = bench.scheduler.cancel("a", "why"), bench.scheduler.fail("b", ErrorCode.INTERNAL, "why")
    assert isinstance(cancelled, Finish)
    assert isinstance(failed, Finish)
    assert (cancelled.code, failed.code) == (None, ErrorCode.INTERNAL)


@pytest.mark.parametrize("attempt", [1, 2])
def test_no_worker_can_claim_a_copy(attempt: int) -> None:
    bench = Bench()
    copied(bench, "a")
    bench["a"].attempt_may_be_newer = True
    assert bench.join(running={"a": attempt}).abandon == ["a"]
    assert bench["a"].copied


@pytest.mark.parametrize("has_output", [False, True])
def test_a_copy_that_must_be_run_overtakes_others_only_if_its_listener_is_in_mid_stream(has_output: bool) -> None:
    bench = Bench()
    bench.queue("before")
    copied(bench, "copy", principal="bob")
    bench.queue("after")
    bench["copy"].has_output, bench["copy"].next_seq = has_output, 3 * has_output
    assert bench.scheduler.end_copy(bench["copy"], bench.now) == [Requeue(bench["copy"])]
    assert queue_of(bench) == (["copy", "before", "after"] if has_output else ["before", "copy", "after"])
    assert (bench["copy"].state, bench["copy"].losses, bench["copy"].copied) == (State.QUEUED, 0, False)
    assert bench.scheduler.end_copy(bench["copy"], bench.now) == []


def test_a_copy_that_has_ended_is_not_run_and_what_a_worker_runs_goes_on() -> None:
    bench = Bench()
    bench.join()
    bench.queue("runs")
    assert bench.scheduler.end_copy(bench["runs"], bench.now) == []
    assert bench["runs"].state is State.RUNNING
    copied(bench, "copy")
    ended = bench["copy"]
    bench.scheduler.end("copy", State.CANCELLED, bench.now)
    assert bench.scheduler.end_copy(ended, bench.now) == []
    assert (ended.state, queue_of(bench)) == (State.CANCELLED, [])


def test_a_worker_with_the_same_frames_continues_a_copy() -> None:
    bench = Bench()
    bench.join(reproducible=TONE)
    copied(bench, "a")
    bench["a"].has_output, bench["a"].next_seq = True, 3
    requeue, start = bench.scheduler.end_copy(bench["a"], bench.now)
    assert isinstance(requeue, Requeue)
    assert start == Start(bench["a"], 3)
    assert (bench["a"].attempt, bench["a"].worker_id) == (2, "box")


def test_a_restored_copy_waits_for_no_worker() -> None:
    bench = Bench()
    entry = bench.entry("a", state=State.RUNNING, copied=True, attempt=1, attempt_may_be_newer=True)
    bench.scheduler.restore(entry, bench.now)
    assert entry.worker_lost_at is None
    assert not bench.scheduler.state.workers
    assert bench.scheduler.end_copy(entry, bench.now) == [Requeue(entry)]
    (start,) = bench.join().decisions
    assert isinstance(start, Start)
    assert entry.attempt == 3  # the second may have begun before the restart


# -- what is admitted because its answer is known -----------------------------------------------------------------


def answered(bench: Bench, name: str, principal: str = "ann") -> ErrorCode | None:
    """Admit what a kept result answers; returns why not."""
    refusal = bench.scheduler.admit(bench.entry(name, principal=principal), answered=True)
    return None if refusal is None else ErrorCode(refusal.code)


def test_what_is_answered_needs_no_worker_and_no_place_in_the_queue() -> None:
    bench = Bench(refuse_when_empty=True, max_queued=3, max_queued_per_principal=2)
    assert answered(bench, "a") is None
    bench.scheduler.copy(bench["a"], TONE, bench.now)
    refusal = bench.admit("b")
    assert refusal is not None
    assert refusal.code == ErrorCode.NO_WORKER
    bench = Bench(max_queued=3, max_queued_per_principal=2)
    for name, principal in (("a", "ann"), ("b", "ann"), ("c", "bob")):
        bench.queue(name, principal=principal)
    for name, principal in (("d", "ann"), ("e", "bob")):
        assert bench.admit(name, principal=principal) is not None
        assert answered(bench, name, principal) is None
    assert bench.scheduler.pause_space("tts") is None
    assert answered(bench, "f", "cid") == ErrorCode.SPACE_PAUSED


def test_of_what_is_answered_no_more_is_admitted_at_once_than_may_be_queued() -> None:
    bench = Bench(max_queued=3, max_queued_per_principal=2)
    assert [answered(bench, name) for name in "abc"] == [None, None, ErrorCode.QUEUE_FULL]
    assert [answered(bench, name, "bob") for name in "de"] == [None, ErrorCode.QUEUE_FULL]


@pytest.mark.parametrize(("rules", "principal"), [({"max_queued_per_principal": 2}, "ann"), ({"max_queued": 2}, "bob")])
def test_what_is_answered_needs_a_place_while_as_many_are_copied_as_may_be(
    rules: dict[str, int], principal: str
) -> None:
    bench = Bench(**rules)
    for name in "ab":
        copied(bench, name)
    bench.queue("c", principal=principal)
    assert answered(bench, "d", principal) is None
    bench.scheduler.enqueue(bench["d"], bench.now)
    refusal = bench.scheduler.admit(bench.entry("e", principal=principal), answered=True)
    assert refusal is not None
    assert "2 queued requests" in refusal.message
    bench.scheduler.end("a", State.COMPLETED, bench.now)
    assert answered(bench, "f", principal) is None
