"""When a request will start: from the run times of its space, its slots, and what runs."""

import pytest

from relayd.scheduling.estimate import estimate_retry_s, estimate_wait_s
from relayd.scheduling.model import RECENT_RUNS, ScheduledRequest, SpaceRules, SpaceState

NOW = 1000.0


def a_space(*runs_s: float, running_for_s: tuple[float, ...] = ()) -> SpaceState:
    space = SpaceState(name="tts", rules=SpaceRules())
    space.recent_runs_s.extend(runs_s)
    for ticket, run_s in enumerate(running_for_s):
        entry = ScheduledRequest(request_id=f"r{ticket}", space="tts", principal="ann", ticket=ticket)
        entry.started_at = NOW - run_s
        space.running[entry.request_id] = entry
    return space


@pytest.mark.parametrize(
    ("slots", "running_for_s", "waits_s"),
    [
        (1, (4.0,), [6.2, 16.5, 26.8]),  # the mean is 10.25 s
        (2, (4.0, 20.0), [0.0, 6.2, 10.2, 16.5, 20.5]),  # what runs for longer than most may end now
        (3, (4.0,), [0.0, 0.0, 6.2, 10.2, 10.2, 16.5]),
        (1, (4.0, 20.0), [0.0, 10.2]),  # slots were reduced while both ran
    ],
)
def test_slots_take_their_turns_as_they_become_free(
    slots: int, running_for_s: tuple[float, ...], waits_s: list[float]
) -> None:
    wait_s = estimate_wait_s(a_space(10.0, 10.5, running_for_s=running_for_s), slots, NOW)
    assert [wait_s(place) for place in range(len(waits_s))] == waits_s


def test_nothing_is_known_of_a_space_that_has_run_nothing_has_no_slots_or_is_paused() -> None:
    assert estimate_wait_s(a_space(), 1, NOW)(0) is None
    assert estimate_wait_s(a_space(10.0), 0, NOW)(0) is None
    paused = a_space(10.0)
    paused.paused = True
    assert estimate_wait_s(paused, 1, NOW)(0) is None
    assert estimate_retry_s(a_space(), 1) is None


@pytest.mark.parametrize(("slots", "retry_s"), [(0, 10.2), (1, 10.2), (2, 5.1), (4, 2.6)])
def test_whoever_is_refused_comes_back_after_one_start(slots: int, retry_s: float) -> None:
    assert estimate_retry_s(a_space(10.0, 10.5), slots) == retry_s


def test_the_pace_is_that_of_the_latest_twenty_runs() -> None:
    assert RECENT_RUNS == 20
    assert list(a_space(*map(float, range(25))).recent_runs_s) == [float(run) for run in range(5, 25)]
