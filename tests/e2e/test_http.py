"""HTTP at real processes: a relay killed under a stream of events, and one asked to leave under one of audio."""

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.relayd.http.requests_api.answers import pcm_of
from tests.support.processes import a_place, a_relay, a_worker
from tests.support.raw_http_client import Answer, events_of, visitor

MOCK = ("--engine", "mock", "--space", "tts")
POST = "/v1/spaces/tts/requests"


def asked(**params: Any) -> dict[str, Any]:
    return {"params": {"text": "goes on", "duration_s": 4} | params}


def path_of(posted: Answer, what: str) -> str:
    assert posted.status == 202, posted.body
    path: str = posted.json["links"][what]
    return path


@pytest.mark.trio
async def test_events_go_on_behind_the_last_one_heard_though_the_relay_was_killed(tmp_path: Path) -> None:
    place = a_place(tmp_path)
    url = f"unix:{tmp_path}/state/relayd.sock"
    before: list[tuple[str, str | None, Any]] = []
    async with a_relay(place) as relay, place.start("gpuworker", "run", *MOCK) as worker:
        await relay.event("worker registered")
        async with visitor(url) as http:
            quick = await http.ask("POST", POST, told=asked(speed=0))
            whole = (await http.get(path_of(quick, "audio") + "?format=pcm")).body
            assert len(whole) == 2 * 4 * 24_000
            posted = await http.ask("POST", POST, told=asked())
            stream = await http.open("GET", path_of(posted, "events"))
            while sum(kind == "audio" for kind, *_ in events_of(stream.body)) < 4:
                await stream.piece()
            relay.send_signal(signal.SIGKILL)
            await relay.ended()
            before = events_of(stream.body)
        async with a_relay(place), visitor(url) as http:
            last = before[-1][1]
            assert last is not None
            rest = await http.get(path_of(posted, "events"), headers={"last-event-id": last})
        after = events_of(rest.body)
        assert worker.process.poll() is None
    assert after[-1][0] == "completed"
    frames = [name for _, name, _ in (*before, *after) if name]
    assert frames == [f"1.{seq}" for seq in range(len(frames))], "none twice, none missing"
    assert pcm_of(stream.body.rpartition(b"\n\n")[0] + b"\n\n") + pcm_of(rest.body) == whole


@pytest.mark.trio
async def test_a_relay_that_is_asked_to_leave_finishes_its_streams_first(tmp_path: Path) -> None:
    place, url = a_place(tmp_path), f"unix:{tmp_path}/state/relayd.sock"
    async with (
        a_relay(place) as relay,
        a_worker(place, relay, *MOCK),
        visitor(url) as http,
        visitor(url) as idle,
    ):
        assert (await idle.get("/v1/spaces")).status == 200
        posted = await http.ask("POST", POST, told=asked())
        answer = await http.open("GET", path_of(posted, "audio"))
        relay.send_signal(signal.SIGTERM)
        await relay.event("draining")
        refused = await idle.ask("POST", POST, told=asked())
        assert (refused.status, refused.error["code"]) == (503, "shutting_down")
        assert len(await answer.rest()) == 44 + 2 * 4 * 24_000
        assert await relay.ended() == 0
        assert await idle.hears_the_end()
        assert await http.hears_the_end()
