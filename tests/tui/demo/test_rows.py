"""The demo's rows and the columns against a real relay: what one tells, the other tells, and the screens show."""

from pathlib import Path
from typing import Any

import pytest
import trio

from protocol.client.client import open_relay
from protocol.wire.messages import Accepted, Done, Registered, Snapshot, Submit
from relayd.talk.talks import Talks
from tests.support.fake_worker import fake_worker
from tests.support.relay import a_config, an_id, peer, running
from tests.support.talking import ANN
from tui.demo.source import Demo
from tui.model.actions import TOPIC_OF
from tui.model.columns import COLUMNS

#: Columns made from other keys of the row.
MADE = {"place", "state", "count", "starts"}


async def told_by_a_relay(tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A snapshot with a row in every topic, and the description of its request."""
    config = a_config(tmp_path / "state", spaces={"tts": {}, "llm": {}}, talk={"reply": "llm"})
    async with running(config) as started, fake_worker(started.urls[0]) as worker:
        await worker.peer.next(Registered)
        async with peer(started.urls[0], "client") as client, open_relay(started.urls[0], role="operator") as relay:
            request_id = an_id()
            client.send(Submit(request_id=request_id, space="tts", params={"text": "hello"}))
            await client.next(Accepted)
            await worker.assigned()
            await relay.steer("pause_space", "tts")
            talks = started.http_context.talks
            assert isinstance(talks, Talks)
            talk = await talks.open(ANN, "session-1")
            described = await relay.steer("describe", request_id)
            async with relay.watch() as watch:
                snapshot = await anext(watch)
            del talk
    assert isinstance(snapshot, Snapshot)
    return dict(snapshot.data), described


def keys(rows: Any) -> set[str]:
    assert rows, "a topic without rows proves nothing"
    return set().union(*(row.keys() for row in rows))


@pytest.mark.trio
async def test_the_demo_tells_the_keys_that_a_relay_tells(tmp_path: Path) -> None:
    with trio.fail_after(30):
        told, described = await told_by_a_relay(tmp_path)
    demo = Demo("broken")
    played = demo.snapshot().data
    assert played.keys() == told.keys()
    for topic in told:
        assert (topic, keys(played[topic])) == (topic, keys(told[topic]))
    answer = demo.steer_nowait("describe", next(iter(demo.play.requests)))
    assert isinstance(answer, Done)
    assert answer.data.keys() == described.keys()


@pytest.mark.trio
async def test_every_column_shows_a_key_that_a_relay_tells(tmp_path: Path) -> None:
    with trio.fail_after(30):
        told, _ = await told_by_a_relay(tmp_path)
    for kind, columns in COLUMNS.items():
        known = keys(told[TOPIC_OF.get(kind, kind)]) | MADE | {"worker"}
        assert {column.key for column in columns} <= known
