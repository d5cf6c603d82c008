"""What HTTP clients and scrapers are told of requests that are answered with the frames of equal ones."""

from pathlib import Path
from typing import Any

import pytest
import trio

from tests.relayd.core.equal_requests import CACHE, ONE, PCM, a_relay
from tests.support.fake_worker import FakeWorker, fake_worker
from tests.support.raw_http_client import visitor

POST = "/v1/spaces/tts/requests"
SPEECH = "/v1/audio/speech"
ASKED: dict[str, Any] = {"params": {"text": "hello"}}


async def run_one(worker: FakeWorker) -> None:
    worker.speak(await worker.assigned(), PCM)


@pytest.mark.trio
async def test_an_answer_from_the_cache_says_so_and_is_refused_on_demand(tmp_path: Path) -> None:
    async with a_relay(tmp_path) as relay, fake_worker(relay.url, **ONE) as worker, visitor(relay.url) as http:
        for told in (ASKED, ASKED | {"cache": False}):
            posted = await http.ask("POST", POST, told=told)
            assert "x-relay-cache" not in posted.headers
            await run_one(worker)
            await relay.at_rest()
        posted = await http.ask("POST", POST, told=ASKED)
        assert posted.headers["x-relay-cache"] == "hit"
        heard = await http.get(posted.json["links"]["audio"] + "?format=pcm")
        assert heard.body == b"".join(PCM)
        refused = await http.ask("POST", POST, told=ASKED | {"cache": "no"})
        assert (refused.status, refused.error["code"]) == (422, "invalid_params")
        await relay.at_rest()
        scraped = (await http.get("/metrics")).body.decode()
        assert 'relayd_cache_hits_total{space="tts"} 1.0' in scraped
        assert 'relayd_cache_misses_total{space="tts"} 1.0' in scraped


@pytest.mark.trio
async def test_speech_from_the_cache_says_so_and_is_refused_on_demand(tmp_path: Path) -> None:
    asked = {"model": "tts", "input": "hello", "response_format": "wav"}
    bodies = []
    async with a_relay(tmp_path, CACHE) as relay, fake_worker(relay.url, **ONE) as worker, visitor(relay.url) as http:
        for more, told in (({}, None), ({}, "hit"), ({"cache": False}, None)):
            async with trio.open_nursery() as nursery:
                if told is None:
                    nursery.start_soon(run_one, worker)
                answer = await http.ask("POST", SPEECH, told=asked | more)
            assert (answer.status, answer.headers.get("x-relay-cache")) == (200, told)
            bodies.append(answer.body)
        assert len({*bodies}) == 1
        await relay.at_rest()
