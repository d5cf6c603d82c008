"""What HTTP clients and scrapers are told of requests that are answered with the frames of equal ones."""

import base64
from pathlib import Path
from typing import Any

import pytest
import trio

from protocol.wire.messages import Registered
from tests.relayd.core.equal_requests import ANY, CACHE, ONE, PCM, a_relay
from tests.support.fake_worker import SCHEMA, FakeWorker, fake_worker
from tests.support.raw_http_client import visitor
from tests.support.relay import until

POST = "/v1/spaces/tts/requests"
SPEECH = "/v1/audio/speech"
ASKED: dict[str, Any] = {"params": {"text": "hello"}}
RECORDING = base64.b64encode(b"RIFF and so on").decode()


def speaker(voice: str) -> dict[str, Any]:
    """The params of a worker that has this voice, and takes what is said in a recording."""
    text = {"type": "string"}
    return SCHEMA | {"properties": SCHEMA["properties"] | {"voice": {"enum": [voice]}, "ref_text": text}}


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


@pytest.mark.trio
@pytest.mark.parametrize("when_empty", ["queue", "refuse"])
async def test_what_is_kept_is_answered_although_no_worker_is_connected(tmp_path: Path, when_empty: str) -> None:
    space: dict[str, Any] = CACHE | {"when_empty": when_empty}
    settings: dict[str, Any] = {"store": "sqlite", "http": {"no_worker_wait_s": 3600.0}}
    told: dict[str, Any] = {"model": "tts", "input": "hello", "response_format": "pcm", "voice": "anna"}
    told |= {"ref_audio": RECORDING, "ref_text": "so it sounds"}
    async with a_relay(tmp_path, space, **settings) as relay, visitor(relay.url) as http:
        async with fake_worker(relay.url, params=speaker("anna"), inputs={"ref_audio": ANY}, **ONE) as worker:
            await worker.peer.next(Registered)
            bodies: list[bytes] = []
            for _ in range(2):
                async with trio.open_nursery() as nursery:
                    if not bodies:
                        nursery.start_soon(run_one, worker)
                    bodies.append((await http.ask("POST", SPEECH, told=told)).body)
            assert bodies[0] == bodies[1]
        await until(lambda: not relay.relay.workers)
        again = await http.ask("POST", SPEECH, told=told)
        assert (again.status, again.headers.get("x-relay-cache"), again.body) == (200, "hit", bodies[0])
        await relay.at_rest()
        await until(lambda: not relay.relay.finalizer.unfinalized)
    # After a restart no worker has come, and the store knows what the space accepts.
    async with a_relay(tmp_path, space, **settings) as relay, visitor(relay.url) as http:
        again = await http.ask("POST", SPEECH, told=told)
        assert (again.status, again.headers.get("x-relay-cache"), again.body) == (200, "hit", bodies[0])
        posted = await http.ask("POST", POST, told={"params": {"text": "hello"}})
        assert (posted.status, "x-relay-cache" in posted.headers) == (503 if when_empty == "refuse" else 202, False)


@pytest.mark.trio
async def test_the_requests_api_answers_from_the_cache_in_a_space_that_refuses(tmp_path: Path) -> None:
    async with a_relay(tmp_path, CACHE | {"when_empty": "refuse"}) as relay, visitor(relay.url) as http:
        async with fake_worker(relay.url, **ONE) as worker:
            await worker.peer.next(Registered)
            await http.ask("POST", POST, told=ASKED)
            await run_one(worker)
            await relay.at_rest()
        await until(lambda: not relay.relay.workers)
        assert (await http.ask("POST", POST, told=ASKED | {"cache": False})).status == 503
        posted = await http.ask("POST", POST, told=ASKED)
        assert posted.headers["x-relay-cache"] == "hit"
        heard = await http.get(posted.json["links"]["audio"] + "?format=pcm")
        assert heard.body == b"".join(PCM)


@pytest.mark.trio
async def test_speech_that_the_last_worker_would_not_take_waits_for_the_next_one(tmp_path: Path) -> None:
    told = {"model": "tts", "input": "hello", "response_format": "pcm", "voice": "bert"}
    async with a_relay(tmp_path, openai={"strict": True}) as relay, visitor(relay.url) as http:
        async with fake_worker(relay.url, params=speaker("anna"), **ONE) as first:
            await first.peer.next(Registered)
            assert (await http.ask("POST", SPEECH, told=told)).status == 422
        await until(lambda: not relay.relay.workers)
        async with trio.open_nursery() as nursery:

            async def hear() -> None:
                assert (await http.ask("POST", SPEECH, told=told)).status == 200

            nursery.start_soon(hear)
            await until(lambda: bool(relay.http_context.exchanges))
            async with fake_worker(relay.url, params=speaker("bert"), **ONE) as worker:
                await run_one(worker)
                await relay.at_rest()
