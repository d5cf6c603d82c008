"""Why a request waits, and when it is likely to start."""

from typing import Any

import pytest

from protocol.wire.messages import Snapshot
from tests.tui.screen import a_request, a_space
from tui.model.relay_model import RelayModel, RowView
from tui.model.waiting import starts_s, why

DONE = [a_request(f"d{number}", state="completed", ended_s=float(number), run_s=16.0) for number in range(3)]


def queued(*principals: str) -> list[dict[str, Any]]:
    return [
        a_request(f"q{place}", state="queued", position=place, principal=name)
        for place, name in enumerate(principals, 1)
    ]


def model_of(*requests: dict[str, Any], **space: Any) -> RelayModel:
    model = RelayModel()
    model.apply(Snapshot(data={"spaces": [a_space("tts", **space)], "requests": list(requests)}), 100.0)
    return model


def request(model: RelayModel, key: str) -> RowView:
    view = model.get("requests", key)
    assert view is not None
    return view


def test_it_starts_when_those_ahead_have_taken_as_long_as_usual_and_counts_down() -> None:
    running = [a_request("r1", run_s=12.0), a_request("r2", run_s=2.0)]
    model = model_of(*DONE, *running, *queued("alice", "alice", "bob"), slots=2)
    assert [starts_s(request(model, f"q{place}"), 100.0) for place in (1, 2, 3)] == [4.0, 14.0, 20.0]
    assert [starts_s(request(model, f"q{place}"), 103.0) for place in (1, 2, 3)] == [1.0, 11.0, 17.0]
    assert starts_s(request(model, "q1"), 200.0) == 0.0, "what takes longer than usual may end at any moment"


def test_a_free_slot_is_taken_at_once() -> None:
    assert starts_s(request(model_of(*DONE, *queued("alice"), slots=2**63), "q1"), 100.0) == 0.0
    model = model_of(*DONE, *queued("alice", "alice"), slots=1)
    assert [starts_s(request(model, f"q{place}"), 100.0) for place in (1, 2)] == [0.0, 16.0]


@pytest.mark.parametrize(("done", "slots"), [([], 1), (DONE, 0)])
def test_without_a_worker_or_an_example_it_is_not_known(done: list[dict[str, Any]], slots: int) -> None:
    model = model_of(*done, *queued("alice"), slots=slots)
    assert starts_s(request(model, "q1"), 100.0) is None


def test_the_latest_requests_say_what_is_usual() -> None:
    old = [a_request(f"o{number}", state="completed", ended_s=500.0, run_s=900.0) for number in range(30)]
    new = [a_request(f"n{number}", state="completed", ended_s=1.0, run_s=2.0) for number in range(20)]
    model = model_of(*old, *new, *queued("alice"))
    assert model.usual_run_s("tts") == 2.0


def test_one_line_says_why() -> None:
    model = model_of(*DONE, a_request("r1", run_s=6.0), *queued("alice", "bob", "alice", "carol"), slots=1)
    text = "#4, starts in 58 s: 3 ahead on 1 slot at 16.0 s; alice has 2 of them"
    assert why(request(model, "q4"), 100.0) == text
    assert why(request(model_of(*queued("alice"), slots=2), "q1"), 100.0) == "#1: 0 ahead on 2 slots"
    paused = model_of(*queued("alice"), state="paused", slots=2)
    assert why(request(paused, "q1"), 100.0) == "#1: 0 ahead on 2 slots; the space is paused"
    nobody = model_of(*queued("alice"), state="no worker", slots=0)
    assert why(request(nobody, "q1"), 100.0) == "#1: 0 ahead on 0 slots; it has no worker"
