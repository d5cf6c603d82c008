"""Failures with the same space, code and message are one group."""

from typing import Any

from protocol.wire.messages import Delta, Snapshot
from tests.tui.screen import a_request
from tui.model.failures import Failures, summary
from tui.model.relay_model import RelayModel


def failed(key: str, **other: Any) -> dict[str, Any]:
    return a_request(
        key, state="failed", **{"code": "engine_failed", "message": "out of memory", "ended_s": 5.0, **other}
    )


def model_of(*requests: dict[str, Any]) -> RelayModel:
    model = RelayModel()
    model.apply(Snapshot(data={"requests": list(requests)}), 100.0)
    return model


def test_numbers_and_ids_in_the_message_make_no_difference_and_the_latest_is_shown() -> None:
    model = model_of(
        failed("a", message="ran for 120.5 s on gpu 0123456789ab", ended_s=9.0),
        failed("b", message="ran for 7 s on gpu ba9876543210", ended_s=2.0, principal="bob"),
        failed("c", message="ran for 7 s on cpu"),
        failed("d", space="voices", message="ran for 7 s on cpu"),
        failed("e", code="worker_lost", message="ran for 7 s on cpu"),
        a_request("f", state="running"),
        a_request("g", state="cancelled", code="cancelled"),
    )
    groups = Failures().groups(model)
    assert [view.row["count"] for view in groups] == [2, 1, 1, 1]
    assert groups[0].row == {
        "count": 2,
        "space": "tts",
        "code": "engine_failed",
        "message": "ran for 7 s on gpu ba9876543210",
        "ended_s": 2.0,
        "request_id": "b",
        "principal": "2 principals",
    }
    assert groups[1].text("principal") == "alice"
    assert groups[0].aged("ended_s", 103.0) == 5.0


def test_groups_follow_the_requests() -> None:
    failures, model = Failures(), model_of(failed("a"))
    (group,) = failures.groups(model)
    model.apply(Delta(data={"requests": [failed("b")]}), 101.0)
    assert [view.row["count"] for view in failures.groups(model)] == [2]
    assert {view.key for view in failures.requests_of(model, group.key)} == {"a", "b"}
    model.apply(Delta(gone={"requests": ["a", "b"]}), 102.0)
    assert failures.groups(model) == []
    assert failures.requests_of(model, group.key) == []


def test_the_line_has_the_largest_group_first_and_nothing_that_a_terminal_obeys() -> None:
    model = model_of(failed("a", message="rare\x1b[2J"), failed("b"), failed("c"))
    text = "".join(part for part, _ in summary(Failures().groups(model)))
    assert text == "2x tts engine_failed out of memory   1x tts engine_failed rare\\x1b[2J"
    assert summary([]) == []
