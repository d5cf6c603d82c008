"""The judge: what it lets pass and, above all, what it does not."""

import itertools
import json
import random
from collections.abc import Callable

import attrs
import pytest
import trio

from tests.chaos.faults import CLIENT_FAULTS, RELAY_FAULTS, WORKER_FAULTS, draw_faults
from tests.chaos.report import REPLACED, Fault, Ledger, Windows
from tests.chaos.verdict import Cause, Reception, judge, judge_attempts, lost_and_doubled
from tests.chaos.workload import KINDS, WEB_KINDS, Plan, draw_plan

PLAN = Plan(
    name="x", kind="plain", space="tts", seed=1, duration_s=1.0, speed=1.0, retry="before_output", fail=None,
    progress=0, at_frame=0, later_s=0.0,
)  # fmt: skip
LOOSE = attrs.evolve(PLAN, space="loose")
TOLD = attrs.evolve(PLAN, space="tell", text="One. Two. Three. Four.")
FRAIL = attrs.evolve(PLAN, space="frail", fail={"how": "exit", "at": 2})
NOTHING: frozenset[Cause] = frozenset()
#: All that happens to a request that completes.
HARMLESS = frozenset(Cause) - {Cause.CANCELLED, Cause.SOURCE_ENDED}
KILLED = frozenset({Cause.WORKER_KILLED})


def received(plan: Plan = PLAN, end: str = "completed", *, chunk: int = 800, chunks: int | None = None) -> Reception:
    pcm = plan.expected()
    pieces = [(seq, pcm[at : at + chunk]) for seq, at in enumerate(range(0, len(pcm), chunk), 1)]
    return Reception("listener", end=end, attempt=1, pieces=pieces[:chunks])


def test_all_samples_and_a_completed_is_what_was_promised() -> None:
    assert judge(PLAN, received(), NOTHING) == []
    assert judge(PLAN, received(), HARMLESS) == []


def test_a_lost_a_doubled_a_swapped_and_a_changed_chunk_are_seen() -> None:
    for spoil in (
        lambda pieces: pieces[:5] + pieces[6:],
        lambda pieces: pieces[:5] + pieces[4:],
        lambda pieces: [*pieces[:4], pieces[5], pieces[4], *pieces[6:]],
        lambda pieces: [*pieces[:4], (4, pieces[4][1][:-2] + b"\1\1"), *pieces[5:]],
        lambda pieces: pieces[:-1],
        lambda pieces: pieces + pieces,
    ):
        reception = received()
        reception.pieces = spoil(reception.pieces)
        assert len(judge(PLAN, reception, HARMLESS)) == 1


@pytest.mark.parametrize(
    ("spoil", "lost", "doubled"),
    [
        (lambda pieces: pieces, 0, 0),
        (lambda pieces: pieces[:5] + pieces[6:], 424, 0),
        (lambda pieces: pieces[:-2], 424 + 368, 0),
        (lambda pieces: pieces[:5] + pieces[4:], 0, 424),
        (lambda pieces: [*pieces[:4], (4, b"\1" * 848), *pieces[5:]], 424, 424),
    ],
)
def test_what_is_wrong_with_samples_is_counted(
    spoil: Callable[[list[tuple[int, bytes]]], list[tuple[int, bytes]]], lost: int, doubled: int
) -> None:
    reception = received(chunk=848)  # as the mock cuts it
    reception.pieces = spoil(reception.pieces)
    assert lost_and_doubled(PLAN, reception) == (lost, doubled)


@pytest.mark.trio
async def test_a_request_that_was_accepted_and_then_forgotten_is_counted_as_lost() -> None:
    ledger = Ledger(Windows(worker_grace_s=5.0, unheard_grace_s=1.5, resume_window_s=8.0, promised_s=15.0), 0.0)
    for number, end in enumerate(("completed", "failed request_not_found")):
        case = ledger.open_case(PLAN, f"{number:032x}", "client 1")
        case.accepted_at = case.began_at
        case.receptions.append(received(end=end))
        ledger.close_case(case)
        assert ledger.counts["accepted requests lost"] == number


def test_what_came_before_a_failure_must_be_the_beginning() -> None:
    never = attrs.evolve(PLAN, retry="never")
    reception = received(never, "failed worker_lost", chunks=4)
    assert judge(never, reception, KILLED) == []
    reception.pieces = reception.pieces[1:]
    assert "the same up to sample 0" in judge(never, reception, KILLED)[0]


@pytest.mark.parametrize(
    ("plan", "end", "causes", "allowed"),
    [
        (PLAN, "failed worker_lost", KILLED, False),  # reproducible: it goes on elsewhere
        (attrs.evolve(PLAN, retry="never"), "failed worker_lost", KILLED, True),
        (attrs.evolve(PLAN, retry="never"), "failed worker_lost", NOTHING, False),
        (attrs.evolve(PLAN, retry="never"), "failed worker_lost", frozenset({Cause.WORKER_AWAY}), False),
        (attrs.evolve(PLAN, retry="never"), "failed worker_lost", frozenset({Cause.WORKER_LONG_AWAY}), True),
        (LOOSE, "failed worker_lost", KILLED, True),
        (attrs.evolve(LOOSE, retry="always"), "failed worker_lost", KILLED, False),
        (LOOSE, "failed engine_failed", KILLED, False),
        (LOOSE, "failed engine_failed", frozenset({Cause.SLOT_KILLED}), True),
        (PLAN, "failed queue_timeout", frozenset(Cause) - {Cause.PAUSED, Cause.RELAY_AWAY}, False),
        (PLAN, "failed queue_timeout", frozenset({Cause.PAUSED}), True),
        (PLAN, "failed queue_timeout", frozenset({Cause.RELAY_AWAY}), True),
        (PLAN, "failed internal", frozenset(Cause), False),
        (PLAN, "rejected request_not_found", frozenset(Cause), False),
        (PLAN, "ProtocolError", frozenset(Cause), False),
        (PLAN, "cancelled", KILLED, False),
        (PLAN, "cancelled", frozenset({Cause.UNHELD}), True),
        (PLAN, "cancelled", frozenset({Cause.CANCELLED}), True),
        (PLAN, "failed source_failed", NOTHING, False),
        (PLAN, "failed source_failed", frozenset({Cause.SOURCE_LOST, Cause.SOURCE_ANEW}), False),
        (PLAN, "failed source_failed", frozenset({Cause.SOURCE_ENDED}), True),
        (attrs.evolve(PLAN, retry="never"), "failed source_failed", frozenset({Cause.SOURCE_LOST}), True),
        (TOLD, "failed engine_failed", NOTHING, False),
        (attrs.evolve(TOLD, fail={"how": "raise"}), "failed engine_failed", NOTHING, True),
        (FRAIL, "failed engine_failed", NOTHING, True),
        (FRAIL, "failed idle_timeout", NOTHING, True),
        (FRAIL, "failed worker_lost", NOTHING, False),
        (FRAIL, "failed worker_lost", KILLED, True),
    ],
)
def test_each_end_needs_its_cause(plan: Plan, end: str, causes: frozenset[Cause], allowed: bool) -> None:
    assert (judge(plan, received(plan, end, chunks=3), causes) == []) is allowed


def test_a_request_may_time_out_in_the_queue_only_after_the_time_that_it_asked_for() -> None:
    brief = attrs.evolve(PLAN, queue_timeout_s=2.0)
    for waited_s, allowed in ((1.9, False), (2.1, True)):
        reception = received(brief, "failed queue_timeout", chunks=0)
        reception.ended_at = waited_s
        assert (judge(brief, reception, NOTHING) == []) is allowed


def test_an_attempt_without_output_is_awaited_for_less() -> None:
    never = attrs.evolve(PLAN, retry="never")
    reception = received(never, "failed worker_lost", chunks=0)
    for reception.pieces in ([], [(0, b"")]):  # the second is a download that ended before its first sample
        assert judge(never, reception, frozenset({Cause.WORKER_AWAY})) == []


def test_a_cancelled_request_must_not_complete_and_a_failing_engine_neither() -> None:
    assert judge(PLAN, received(), frozenset({Cause.CANCELLED}))
    assert judge(FRAIL, received(FRAIL), NOTHING)
    assert judge(PLAN, received(), frozenset({Cause.SOURCE_ENDED}))


def test_audio_begins_anew_only_where_nobody_has_it_any_more_or_it_was_asked_for() -> None:
    def restarted(plan: Plan, causes: frozenset[Cause]) -> bool:
        reception = received(plan)
        assert reception.void(3) > 0
        reception.pieces = received(plan).pieces
        return judge(plan, reception, causes) == []

    assert not restarted(PLAN, KILLED)
    assert not restarted(PLAN, frozenset({Cause.RELAY_RESTARTED}))
    assert restarted(PLAN, KILLED | {Cause.RELAY_RESTARTED})
    assert not restarted(LOOSE, KILLED)
    assert not restarted(attrs.evolve(LOOSE, retry="always"), NOTHING)
    assert restarted(attrs.evolve(LOOSE, retry="always"), KILLED)
    assert not restarted(PLAN, frozenset({Cause.SOURCE_LOST}))
    assert restarted(PLAN, frozenset({Cause.SOURCE_LOST, Cause.SOURCE_ANEW}))
    assert restarted(LOOSE, frozenset({Cause.SOURCE_LOST}))


def test_runs_that_nobody_counted_are_seen() -> None:
    assert judge_attempts(PLAN, [1], 0, 0) == []
    assert judge_attempts(PLAN, [1, 2], 1, 0) == []
    assert judge_attempts(PLAN, [1, 3], 0, 1) == []
    assert judge_attempts(PLAN, [1, 1], 5, 5)
    assert judge_attempts(PLAN, [1, 2], 0, 0)
    assert judge_attempts(attrs.evolve(PLAN, retry="never"), [1, 2], 1, 0)
    assert judge_attempts(FRAIL, [1, 2, 3], 2, 0) == []
    assert judge_attempts(FRAIL, [1, 2, 3, 4], 3, 0)


def test_the_same_seed_draws_the_same_plans_and_faults_and_all_kinds_of_them() -> None:
    def plans(seed: int) -> list[Plan]:
        draws = random.Random(seed)
        return [draw_plan(draws, f"#{number}") for number in range(400)]

    assert plans(5) == plans(5) != plans(6)
    assert {plan.kind for plan in plans(5)} == set(KINDS)
    draws = random.Random(5)
    assert {draw_plan(draws, "web", WEB_KINDS).kind for _ in range(100)} == set(WEB_KINDS)
    for kinds in (RELAY_FAULTS, WORKER_FAULTS, CLIENT_FAULTS):
        track, again = (draw_faults(random.Random(5), kinds, (1.0, 2.0)) for _ in range(2))
        drawn = list(itertools.islice(track, 400))
        assert drawn == list(itertools.islice(again, 400))
        assert {planned.kind for planned in drawn} == set(kinds)


def test_a_worker_is_away_by_what_the_relay_said_and_anew_after_each_restart() -> None:
    ledger = Ledger(Windows(worker_grace_s=5.0, unheard_grace_s=1.5, resume_window_s=8.0, promised_s=15.0), 0.0)
    ledger.linked["a"] = [[0.0, 10.0], [14.0, 20.0], [30.0, float("inf")]]
    assert not ledger._was_away("a", 1.0, 19.0, 5.0)
    assert ledger._was_away("a", 1.0, 19.0, 3.0)
    assert ledger._was_away("a", 1.0, 29.0, 5.0)
    assert not ledger._was_away("a", 31.0, 99.0, 0.1)
    ledger.relay_starts = [22.0, 26.0]
    assert not ledger._was_away("a", 15.0, 40.0, 5.0)
    assert ledger._was_away("a", 15.0, 40.0, 5.0, over_restarts=True)
    assert ledger._was_away("b", 0.0, 9.0, 5.0)


@pytest.mark.trio
async def test_a_worker_whose_link_was_replaced_or_told_late_is_away_when_its_last_link_has_ended() -> None:
    ledger = Ledger(Windows(worker_grace_s=5.0, unheard_grace_s=1.5, resume_window_s=8.0, promised_s=15.0), 0.0)

    def told(event: str, **more: object) -> None:
        ledger.record_line("relay", json.dumps({"event": event, "worker": "a-1", **more}))

    told("worker registered")
    told("worker registered")
    told("worker disconnected", why=REPLACED)
    now = trio.current_time()
    assert not ledger._was_away("a", now, now + 9.0, 5.0)
    ledger.relay_gone()
    told("worker registered")
    told("listening")
    assert ledger._was_away("a", now, now + 9.0, 5.0)


@pytest.mark.trio
async def test_faults_of_workers_that_did_not_run_it_excuse_nothing() -> None:
    ledger = Ledger(Windows(worker_grace_s=5.0, unheard_grace_s=1.5, resume_window_s=8.0, promised_s=15.0), 0.0)
    case = ledger.open_case(PLAN, "00" * 16, "client 1")
    ledger.linked |= {"a": [[0.0, float("inf")]], "client 1": [[0.0, float("inf")]]}
    ledger.record_line("a", f"12:00:00 I request {case.short} of chaos-client: attempt 1 in space 'tts'")
    assert case.begun == [(1, "a")]
    now = case.began_at
    ledger.faults = [Fault("kill -9", "worker b", now, now + 1)]
    assert ledger.causes(case, now + 2) == NOTHING
    ledger.faults.append(Fault("kill -9", "worker a", now, now + 1))
    assert ledger.causes(case, now + 2) == KILLED
    ledger.close_case(case)
    assert ledger.complaints == [f"x ({case.request_id}): attempt 1 ran on a, which the relay has not logged"]


@pytest.mark.trio
async def test_an_end_may_be_forgotten_only_where_the_relay_was_killed_and_the_worker_did_not_come_back(
    autojump_clock: trio.testing.MockClock,
) -> None:
    await trio.sleep(30.0)

    def ledger_with(*faults: Fault, away_s: float = 0.0) -> bool:
        ledger = Ledger(Windows(worker_grace_s=5.0, unheard_grace_s=1.5, resume_window_s=8.0, promised_s=15.0), 0.0)
        now = trio.current_time()
        ledger.linked["a"] = [[0.0, now - 15.0], [now - 15.0 + away_s, float("inf")]]
        case = ledger.open_case(PLAN, "00" * 16, "client 1")
        case.started = [(1, "a")]
        case.receptions = [received(end="completed"), received(end="failed worker_lost", chunks=0)]
        ledger.close_reception(case, case.receptions[0])
        case.first_ended_at = now - 20.0  # the other is heard after the faults
        ledger.faults = list(faults)
        before = len(ledger.complaints)
        ledger.close_reception(case, case.receptions[1])
        assert ledger.may_end_anew(case) is not any("received" in each for each in ledger.complaints[before:])
        return ledger.may_end_anew(case)

    at = trio.current_time() - 20.0
    relay, worker = Fault("kill -9 behind an answer", "relay", at + 1), Fault("kill -9", "worker a", at + 2)
    assert ledger_with(relay, worker)
    assert not ledger_with(relay)
    assert not ledger_with(worker)
    assert not ledger_with(relay, Fault("kill -9", "worker b", at + 2))
    assert not ledger_with(relay, Fault("kill -9", "worker a", at - 5, at - 4))
    assert ledger_with(relay, away_s=6.0)
    assert not ledger_with(relay, away_s=3.0)
    assert not ledger_with(away_s=6.0)


@pytest.mark.trio
async def test_only_a_long_pause_of_its_own_space_lets_a_request_time_out() -> None:
    ledger = Ledger(Windows(worker_grace_s=5.0, unheard_grace_s=1.5, resume_window_s=8.0, promised_s=15.0), 0.0)
    case = ledger.open_case(PLAN, "00" * 16, "client 1")
    case.detached, now = True, case.began_at
    for target, began_s, healed_s, excused in (
        ("space tts", 0.0, 70.0, True),
        ("space tts", 0.0, 40.0, False),
        ("space tts", -40.0, 40.0, False),
        ("space loose", 0.0, 70.0, False),
        ("space tts", 30.0, float("inf"), True),
    ):
        ledger.faults = [Fault("paused", target, now + began_s, now + healed_s)]
        assert (Cause.PAUSED in ledger.causes(case, now + 100.0)) is excused


@pytest.mark.trio
async def test_only_a_relay_that_was_long_away_lets_a_request_time_out() -> None:
    ledger = Ledger(Windows(worker_grace_s=5.0, unheard_grace_s=1.5, resume_window_s=8.0, promised_s=15.0), 0.0)
    case = ledger.open_case(PLAN, "00" * 16, "client 1")
    case.detached, now = True, case.began_at
    for spans, target, excused in (
        ([(0.0, 8.0), (20.0, 27.0), (40.0, 46.0)], "relay", True),
        ([(0.0, 8.0), (20.0, 27.0)], "relay", False),
        ([(-15.0, 8.0), (20.0, 27.0)], "relay", False),
        ([(0.0, 60.0)], "worker a", False),
    ):
        ledger.faults = [Fault("kill -9", target, now + began_s, now + healed_s) for began_s, healed_s in spans]
        assert (Cause.RELAY_AWAY in ledger.causes(case, now + 61.0)) is excused


@pytest.mark.trio
async def test_an_attempt_whose_inputs_never_arrived_did_not_run() -> None:
    ledger = Ledger(Windows(worker_grace_s=5.0, unheard_grace_s=1.5, resume_window_s=8.0, promised_s=15.0), 0.0)
    case = ledger.open_case(PLAN, "00" * 16, "client 1")
    ledger.record_line("a", f"INFO request {case.short} of alice: attempt 1 in space 'tts'")
    dropped = "dropped: the link was lost before its inputs had arrived"
    for who in ("b", "a", "a"):
        ledger.record_line(who, f"INFO request {case.short}: attempt 1 {dropped}")
    ledger.record_line("a", f"INFO request {case.short} of alice: attempt 2 in space 'tts'")
    assert case.begun == [(2, "a")]


@pytest.mark.trio
async def test_a_request_may_be_forgotten_when_its_end_is_old_or_was_never_stored(autojump_clock: object) -> None:
    windows = Windows(worker_grace_s=5.0, unheard_grace_s=1.5, resume_window_s=8.0, promised_s=15.0, retain_s=50.0)

    async def forgotten(accepted: bool, after_s: float, *, restarted: bool = False) -> bool:
        ledger = Ledger(windows, 0.0)
        case = ledger.open_case(PLAN, "00" * 16, "client 1")
        case.detached, case.accepted_at = True, case.began_at
        for event in ("request accepted",) * accepted + ("request completed",):
            ledger.record_line("relay", json.dumps({"event": event, "request_id": case.request_id}))
        await trio.sleep(after_s)
        if restarted:
            ledger.record_line("relay", json.dumps({"event": "listening"}))
        reception = received(end="failed request_not_found", chunks=0)
        case.receptions.append(reception)
        ledger.close_reception(case, reception)
        ledger.close_case(case)
        assert ledger.counts["accepted requests lost"] == len(ledger.complaints)
        return not ledger.complaints

    assert await forgotten(True, 60.0)
    assert not await forgotten(True, 5.0, restarted=True)
    assert await forgotten(False, 5.0, restarted=True)
    assert not await forgotten(False, 5.0)


@pytest.mark.trio
async def test_what_happened_to_a_source_excuses_what_is_piped_from_it() -> None:
    ledger = Ledger(Windows(worker_grace_s=5.0, unheard_grace_s=1.5, resume_window_s=8.0, promised_s=15.0), 0.0)
    case = ledger.open_case(PLAN, "01" * 16, "client 1")
    case.detached, now = True, case.began_at
    ledger.linked["a"] = [[0.0, float("inf")]]
    loose = attrs.evolve(TOLD, space="muse")
    for source_plan, kill_s, end, causes in (
        (TOLD, None, "completed", NOTHING),
        (TOLD, None, "failed engine_failed", {Cause.SOURCE_ENDED}),
        (TOLD, None, "cancelled", {Cause.SOURCE_ENDED}),
        (TOLD, 1.0, "completed", {Cause.SOURCE_LOST}),
        (loose, 1.0, "completed", {Cause.SOURCE_LOST, Cause.SOURCE_ANEW}),
    ):
        case.source = ledger.open_case(source_plan, "02" * 16, "client 1")
        case.source.detached, case.source.started = True, [(1, "a")]
        case.source.receptions = [received(source_plan, end)]
        ledger.faults = [] if kill_s is None else [Fault("kill -9", "worker a", now + kill_s, now + kill_s)]
        assert ledger.causes(case, now + 2) == causes


@pytest.mark.trio
@pytest.mark.parametrize("restarted", [True, False])
async def test_a_request_whose_end_was_forgotten_may_run_again(restarted: bool) -> None:
    ledger = Ledger(Windows(worker_grace_s=5.0, unheard_grace_s=1.5, resume_window_s=8.0, promised_s=15.0), 0.0)
    case = ledger.open_case(PLAN, "00" * 16, "client 1")
    case.receptions, case.started = [received()], [(1, "a"), (2, "b")]
    ledger.close_reception(case, case.receptions[0])
    if restarted:
        ledger.record_line("relay", json.dumps({"event": "listening"}))
    case.begun = [(1, "a"), (2, "b")]
    ledger.close_case(case)
    assert bool(ledger.complaints) is not restarted
