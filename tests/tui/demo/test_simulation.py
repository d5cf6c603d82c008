"""The demo: what it tells is what a relay tells, and the same seed plays the same piece."""

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from protocol.client.watch import ROW_KEYS
from protocol.wire.codec import encode
from protocol.wire.messages import Delta, Done, Rejected, Snapshot
from tui.demo.scenes import SCENES
from tui.demo.source import Demo
from tui.model.relay_model import RelayModel


def rows(change: Snapshot | Delta, topic: str) -> list[dict[str, Any]]:
    found = change.data.get(topic, [])
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize("scene", list(SCENES))
def test_the_same_seed_plays_the_same_piece(scene: str) -> None:
    one, other = Demo(scene, seed=3), Demo(scene, seed=3)
    assert one.snapshot() == other.snapshot()
    for _ in range(40):
        assert one.step(0.5) == other.step(0.5)


@pytest.mark.parametrize("scene", ["busy", "broken"])
def test_deltas_bring_a_picture_to_where_a_new_snapshot_is(scene: str) -> None:
    demo = Demo(scene)
    told, asked = RelayModel(), RelayModel()
    told.apply(demo.snapshot(), 0.0)
    for _ in range(120):
        told.apply(demo.step(0.5), 0.0)
    asked.apply(demo.snapshot(), 0.0)
    for topic in ("requests", "workers", "talks"):
        states = [{view.key: view.text("state") for view in model.rows(topic)} for model in (told, asked)]
        assert states[0] == states[1]
    for view in asked.rows("requests"):
        assert told.queues.position(view.key) == view.row["position"]


@pytest.mark.parametrize("scene", list(SCENES))
def test_every_row_has_its_key_and_goes_over_the_wire(scene: str) -> None:
    snapshot = Demo(scene).snapshot()
    for topic in snapshot.data:
        for row in rows(snapshot, topic):
            assert row[ROW_KEYS.get(topic, "id")]
            encode(Snapshot(data={topic: [row]}))


def test_no_worker_has_more_than_its_slots_and_no_request_runs_twice() -> None:
    demo = Demo("busy")
    for _ in range(200):
        demo.step(0.5)
        held = [one for worker in demo.play.workers.values() for one in worker.held]
        assert len(held) == len(set(held))
        assert all(len(worker.held) <= worker.part.slots for worker in demo.play.workers.values())


def test_it_may_play_all_night_and_stays_as_small() -> None:
    demo = Demo("broken")
    for _ in range(40):
        demo.step(60)
    assert len(demo.play.requests) < 300
    assert len(demo.play.seconds) < 200


def test_the_scenes_show_what_they_are_named_for() -> None:
    assert {row["state"] for row in rows(Demo("busy").snapshot(), "spaces")} == {"ready"}
    assert rows(Demo("empty").snapshot(), "workers") == []
    broken = Demo("broken").snapshot()
    assert {row["state"] for row in rows(broken, "spaces")} == {"ready", "paused", "no worker"}
    assert {row["state"] for row in rows(broken, "workers")} == {"busy", "draining", "stale", "away"}
    assert any(row["slow"] for row in rows(broken, "clients"))


def test_an_empty_relay_says_nothing() -> None:
    demo = Demo("empty")
    demo.snapshot()
    assert demo.step(30) == Delta()


def first(demo: Demo, topic: str, **wanted: Any) -> dict[str, Any]:
    found = rows(demo.snapshot(), topic)
    return next(row for row in found if all(row[key] == value for key, value in wanted.items()))


def test_it_can_be_steered_and_says_who_did() -> None:
    demo = Demo("busy")
    running = first(demo, "requests", state="running")["request_id"]
    queued = first(demo, "requests", state="queued", position=3)["request_id"]
    worker = first(demo, "workers", state="busy")
    for action, target in [
        ("cancel", running), ("promote", queued), ("drain_worker", worker["worker_id"]), ("pause_space", "tts"),
    ]:  # fmt: skip
        assert isinstance(demo.steer_nowait(action, target), Done)
    assert first(demo, "requests", request_id=queued)["position"] == 1
    assert first(demo, "requests", request_id=running)["stopping"]
    assert first(demo, "workers", worker_id=worker["worker_id"])["state"] == "draining"
    assert first(demo, "spaces", name="tts")["state"] == "paused"
    demo.step(2)
    assert first(demo, "requests", request_id=running)["state"] == "cancelled"
    assert [row["action"] for row in rows(demo.snapshot(), "audit")][-4:] == [
        "cancel",
        "promote",
        "drain_worker",
        "pause_space",
    ]


def test_the_replies_of_a_conversation_can_be_ended_and_others_go_on() -> None:
    demo = Demo("busy")
    talk_id = first(demo, "talks", waiting=1)["talk_id"]
    assert isinstance(demo.steer_nowait("end_talk", talk_id), Done)
    row = first(demo, "talks", talk_id=talk_id)
    assert (row["state"], row["waiting"], row["reply_s"]) == ("idle", 0, None)
    turns = row["turns"]
    states = set()
    for _ in range(100):
        demo.step(0.5)
        states.add(first(demo, "talks", talk_id=talk_id)["state"])
    assert states == {"idle", "thinking", "speaking"}
    assert first(demo, "talks", talk_id=talk_id)["turns"] > turns
    refusal = demo.steer_nowait("end_talk", "nothing")
    assert isinstance(refusal, Rejected)
    assert refusal.code == "request_not_found"


def test_it_refuses_as_a_relay_does() -> None:
    demo = Demo("busy")
    refusal = demo.steer_nowait("cancel", "nothing")
    assert isinstance(refusal, Rejected)
    assert refusal.code == "request_not_found"
    assert rows(demo.snapshot(), "audit")[-1]["outcome"] == "request_not_found"


def test_to_readonly_it_describes_and_does_nothing_else() -> None:
    demo = Demo("busy", readonly=True)
    request_id = first(demo, "requests", state="running")["request_id"]
    told = demo.steer_nowait("describe", request_id)
    assert isinstance(told, Done)
    assert told.data["timeline"]
    refusal = demo.steer_nowait("cancel", request_id)
    assert isinstance(refusal, Rejected)
    assert refusal.code == "forbidden"


@pytest.mark.trio
async def test_by_the_clock_it_tells_a_snapshot_and_then_what_changes(autojump_clock: MockClock) -> None:
    source = Demo("busy").changes()
    with trio.fail_after(60):
        assert isinstance(await anext(source), Snapshot)
        for _ in range(5):
            assert isinstance(await anext(source), Delta)
    await source.aclose()
