"""The routes of the WebSocket Spaces site, asked as its documents show it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from protocol.wire.frames import Completed, Failed, Output, Progress, Started
from protocol.wire.structs import InputRule
from tests.support.fake_worker import ENDING, MESSAGES, FakeWorker, fake_worker, identity, samples
from tests.support.raw_http_client import File, Visitor, form, visitor
from tests.support.relay import Daemon, daemon, until

FORM = {"content-type": "application/x-www-form-urlencoded"}
PROMPT = {"type": "object", "properties": {"prompt": {"type": "string"}, "count": {"type": "integer"}}}
INPUTS = {name: InputRule() for name in ("audio", "video", "file")}


@asynccontextmanager
async def a_site(state_dir: Path, **register: Any) -> AsyncIterator[tuple[Daemon, FakeWorker, Visitor]]:
    """A relay with a remote program, and somebody who asks it."""
    told: dict[str, Any] = {"params": PROMPT, "format": None} | register
    async with daemon(state_dir) as relay, fake_worker(relay.url, **told) as worker, visitor(relay.url) as http:
        await until(lambda: relay.relay.workers.serving("tts"))
        yield relay, worker, http


async def submitted(http: Visitor, body: bytes = "prompt=用户的提示词".encode(), **more: Any) -> str:
    """What the documents' own lines submit; returns the id of the request."""
    sent = {"body": body, "headers": FORM} | more
    answer = await http.ask("POST", "/websockets/submit/tts", **sent)
    assert answer.status == 200, answer.body
    assert answer.json.keys() == {"success", "request_id", "status", "queue_size"}
    assert answer.json["success"] is True
    assert answer.json["status"] in ("queued", "processing")
    request_id: str = answer.json["request_id"]
    return request_id


async def status_of(http: Visitor, request_id: str) -> dict[str, Any]:
    answer = await http.get(f"/websockets/status?request_id={request_id}")
    assert answer.status == 200, answer.body
    told: dict[str, Any] = answer.json
    assert (told["success"], told["request_id"]) == (True, request_id.replace("-", ""))
    return told


async def ended(relay: Daemon, http: Visitor, request_id: str) -> dict[str, Any]:
    await until(lambda: not relay.relay.requests[request_id].live)
    return await status_of(http, request_id)


@pytest.mark.trio
async def test_a_prompt_is_queued_processed_and_its_result_is_the_program_s_own(tmp_path: Path) -> None:
    async with a_site(tmp_path) as (relay, worker, http):
        first, second = await submitted(http), await submitted(http, b"prompt=2&count=3&csrf=x")
        assign = await worker.assigned()
        assert (assign.request_id, assign.params) == (first, {"prompt": "用户的提示词"})
        worker.send(Started(**identity(assign, 0), format=None))
        worker.send(Progress(**identity(assign, 1), state="generating", fraction=0.25))
        await until(lambda: relay.relay.requests[first].fraction == 0.25)
        told = await status_of(http, first)
        assert (told["status"], told["progress"], told["result"]) == ("processing", 0.25, None)
        waiting = await status_of(http, second)
        assert (waiting["status"], waiting["queue_position"]) == ("queued", 1)
        result = {"output": "...", "confidence": 0.95}
        worker.send(Output(**identity(assign, 2), data=result))
        worker.send(Completed(**identity(assign, 3), result={}))
        told = await ended(relay, http, first)
        assert (told["status"], told["result"]) == ("completed", result)
        assert told["processing_time"] > 0
        hyphens = f"{first[:8]}-{first[8:12]}-{first[12:16]}-{first[16:20]}-{first[20:]}"
        assert (await status_of(http, hyphens))["status"] == "completed"
        assert (await worker.assigned()).params == {"prompt": "2", "count": 3}


@pytest.mark.trio
async def test_a_failure_has_its_reason_and_so_has_a_cancel(tmp_path: Path) -> None:
    async with a_site(tmp_path) as (relay, worker, http):
        request_id = await submitted(http)
        assign = await worker.assigned()
        worker.send(Started(**identity(assign, 0), format=None))
        worker.send(Failed(**identity(assign, 1), code="engine_failed", message="out of memory"))
        told = await ended(relay, http, request_id)
        assert (told["status"], told["result"]) == ("failed", {"error": "out of memory"})
        request_id, last = await submitted(http), await submitted(http)
        assert (await http.ask("DELETE", f"/v1/requests/{last}")).status == 200
        told = await ended(relay, http, last)
        assert told["status"] == "failed"
        assert "cancelled by" in told["result"]["error"]
        assert (await status_of(http, request_id))["status"] in ("queued", "processing")


@pytest.mark.trio
async def test_a_request_goes_on_although_nobody_asks_for_it(tmp_path: Path) -> None:
    async with a_site(tmp_path) as (relay, worker, http):
        request_id = await submitted(http)
        await worker.assigned()
        request = relay.relay.requests[request_id]
        assert request.submit.detach
        assert not request.holders


@pytest.mark.trio
@pytest.mark.parametrize(
    ("register", "params", "outputs", "result"),
    [
        ({}, {"prompt": "Hi"}, ["a", "b"], {"output": "ab"}),
        ({}, {"prompt": "Hi"}, [[1, 2]], {"output": [1, 2]}),
        ({}, {"prompt": "Hi"}, [1, 2], {"output": [1, 2]}),
        ({}, {"prompt": "Hi"}, [], {"output": []}),
        ({}, {"prompt": "Hi"}, ["x" * 70_000], "link"),
        ({"params": MESSAGES}, {"messages": [{"role": "user", "content": "Hi"}]}, ["Yes."], {"output": "Yes."}),
    ],
)
async def test_a_prompt_is_what_the_space_takes_and_an_output_what_it_makes(
    tmp_path: Path, register: dict[str, Any], params: dict[str, Any], outputs: list[Any], result: Any
) -> None:
    async with a_site(tmp_path, **register) as (relay, worker, http):
        request_id = await submitted(http, b"prompt=Hi")
        assign = await worker.assigned()
        assert assign.params == params
        worker.write(assign, outputs, ending=ENDING if register else None)
        told = (await ended(relay, http, request_id))["result"]
        if result == "link":
            assert (await http.get(told["output"])).status == 200
        else:
            assert told == (result | ENDING if register else result)


@pytest.mark.trio
async def test_speech_is_a_link_and_files_are_inputs(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url, inputs=INPUTS) as worker, visitor(relay.url) as http:
        await until(lambda: relay.relay.workers.serving("tts"))
        fields: dict[str, str | File] = {"prompt": "你好", "audio": File(b"sound", "audio/wav")}
        answer = await http.ask("POST", "/websockets/submit/tts", **form(fields))
        assert answer.status == 200, answer.body
        assign = await worker.assigned()
        assert (assign.params, list(assign.inputs)) == ({"text": "你好"}, ["audio"])
        worker.speak(assign, [samples(24_000)])
        told = await ended(relay, http, answer.json["request_id"])
        assert told["result"]["duration"] == 1.0
        assert told["result"]["output"].startswith(f"/v1/requests/{assign.request_id}/audio?link=")
        assert (await http.get(told["result"]["output"])).body[:4] == b"RIFF"


@pytest.mark.trio
async def test_who_asks_for_what_is_not_there_is_told_so_in_the_site_s_words(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, visitor(relay.url) as http:
        for language, words in (("en", "Remote app not connected"), ("zh-CN,zh", "远程应用未连接")):
            headers = FORM | {"accept-language": language}
            answer = await http.ask("POST", "/websockets/submit/tts", body=b"prompt=x", headers=headers)
            assert (answer.status, answer.json) == (503, {"success": False, "message": words, "error": words})
        for method, path, code in (
            ("POST", "/websockets/submit/nobody", 404),
            ("GET", "/websockets/submit/tts", 405),
            ("GET", "/websockets/status", 400),
            ("GET", "/websockets/status?request_id=uuid-here", 404),
            ("GET", f"/websockets/status?request_id={'0' * 32}", 404),
            ("GET", "/websockets/other", 404),
        ):
            answer = await http.ask(method, path)
            assert answer.status == code, path
            assert answer.json["success"] is False, path
            assert answer.json["error"] == answer.json["message"]


@pytest.mark.trio
async def test_a_token_is_needed_and_sees_only_its_own(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path, listen="127.0.0.1:0") as relay,
        fake_worker(relay.url, params=PROMPT, format=None),
        visitor(relay.urls[0]) as stranger,
    ):
        await until(lambda: relay.relay.workers.serving("tts"))
        tokens = [relay.tokens.create(role="client", name=name, now=0.0).text for name in ("ann", "bob")]
        answer = await stranger.ask("POST", "/websockets/submit/tts", body=b"prompt=x", headers=FORM)
        assert (answer.status, answer.json["success"]) == (401, False)
        async with visitor(relay.urls[0], token=tokens[0]) as ann, visitor(relay.urls[0], token=tokens[1]) as bob:
            request_id = await submitted(ann)
            assert (await status_of(ann, request_id))["status"] in ("queued", "processing")
            assert (await bob.get(f"/websockets/status?request_id={request_id}")).status == 404
            assert (await ann.get(f"/websockets/status?request_id={request_id}&token={tokens[0]}")).status == 401


@pytest.mark.trio
async def test_what_the_space_does_not_take_is_named(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"size": {"type": "integer"}}, "additionalProperties": False}
    async with a_site(tmp_path, params=schema) as (_, _, http):
        answer = await http.ask("POST", "/websockets/submit/tts", body=b"prompt=x", headers=FORM)
        assert answer.status == 422
        assert "prompt is not accepted by space 'tts'; it accepts size" in answer.json["message"]
        answer = await http.ask("POST", "/websockets/submit/tts", told={"prompt": True})
        assert (answer.status, answer.json["message"]) == (422, "prompt must be a string, not boolean")
        answer = await http.ask("POST", "/websockets/submit/tts", body=b"size=big", headers=FORM)
        assert answer.status == 422
        assert "size" in answer.json["error"]
