"""Live inputs over HTTP: announced with the request, and fed by the body of a PUT as it comes."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import h11
import pytest
import trio

from protocol.wire.frames import Cancelled, Completed, Failed, Output
from protocol.wire.messages import MAX_UNACKED_BYTES, Accepted, Assign, Cancel, Input, InputAck
from protocol.wire.structs import InputInfo
from relayd.core import feeds
from tests.relayd.http.requests_api.answers import ALL, PCM, POST, one
from tests.support.fake_worker import FakeWorker, fake_worker, identity
from tests.support.raw_http_client import Answer, File, Visitor, form, visitor
from tests.support.relay import a_submit, an_id, daemon, peer, until

RULES: dict[str, Any] = {"inputs": {"text": {"live": True}, "audio": {"live": True, "max_bytes": 2**23}, "voice": {}}}
LIVE = {"inputs": {"text": {"media_type": "text/plain", "live": True}}}


@asynccontextmanager
async def set_up(tmp_path: Path, **options: Any) -> AsyncIterator[tuple[Any, FakeWorker, Visitor]]:
    async with (
        daemon(tmp_path, **options) as relay,
        fake_worker(relay.url, **RULES) as worker,
        visitor(relay.url) as http,
    ):
        await until(lambda: bool(relay.relay.workers))
        yield relay, worker, http


@asynccontextmanager
async def a_feeder(url: str, path: str) -> AsyncIterator[Visitor]:
    """A chunked body that has begun and not ended."""
    async with visitor(url) as http:
        headers = [("host", "localhost"), ("transfer-encoding", "chunked")]
        await http.send(h11.Request(method="PUT", target=path, headers=headers))
        yield http


async def write(feeder: Visitor, data: bytes) -> None:
    await feeder.send(h11.Data(data=data))


async def answered(feeder: Visitor) -> Answer:
    answer = await feeder.answer()
    await answer.rest()
    return answer


async def taken(worker: FakeWorker, assign: Assign, size: int, name: str = "text") -> tuple[bytes, bool]:
    """What the engine gets of an input until it has `size` bytes, and whether that is all."""
    data, last = b"", False
    while len(data) < size:
        piece = await worker.peer.next(Input)
        assert (piece.request_id, piece.name, piece.offset) == (assign.request_id, name, len(data))
        data, last = data + piece.data, bool(piece.last)
        ack = InputAck(request_id=assign.request_id, attempt=assign.attempt, name=name, offset=len(data))
        worker.send(ack)
    return data, last


@pytest.mark.trio
async def test_a_body_is_fed_as_it_comes_and_its_end_is_the_end(tmp_path: Path) -> None:
    async with set_up(tmp_path) as (relay, worker, http):
        posted = await http.ask("POST", POST, told=LIVE)
        assert posted.status == 202
        assert posted.json["inputs"]["text"] | {"age_s": 0} == {"bytes": 0, "bytes_s": 0, "age_s": 0, "ended": False}
        assign = await worker.assigned()
        assert assign.inputs["text"] == InputInfo(media_type="text/plain", live=True)
        async with a_feeder(relay.url, one(posted, "/inputs/text")) as feeder:
            await write(feeder, b"Hello, ")
            assert await taken(worker, assign, 7) == (b"Hello, ", False)
            assert (await http.get(one(posted))).json["inputs"]["text"]["bytes"] == 7
            await write(feeder, b"world.")
            await feeder.send(h11.EndOfMessage())
            answer = await answered(feeder)
        assert (answer.status, answer.json) == (
            200,
            {"request_id": assign.request_id, "input": "text", "bytes": 13, "ended": True},
        )
        again = await http.ask("PUT", one(posted, "/inputs/text"), body=b"Hello, world.")
        assert (again.status, again.json["bytes"]) == (200, 13)
        assert (await http.get(one(posted))).json["inputs"]["text"]["ended"] is True
        worker.speak(assign, PCM)
        heard = await http.get(one(posted, "/audio?format=pcm"))
        assert (heard.status, heard.body) == (200, ALL)
        over = await http.ask("PUT", one(posted, "/inputs/text"), body=b"more")
        assert (over.status, over.error["code"]) == (409, "input_closed")
        assert "has completed, and takes no more of input 'text'" in over.error["message"]
        assert (await http.get(one(posted))).json["inputs"] == {}
        await relay.at_rest()
        await relay.goes_on()


@pytest.mark.trio
async def test_a_cut_body_is_not_the_end_and_another_goes_on(tmp_path: Path) -> None:
    async with set_up(tmp_path, store="sqlite") as (_relay, worker, http):
        posted = await http.ask("POST", POST, told=LIVE)
        path = one(posted, "/inputs/text")
        assign = await worker.assigned()
        async with a_feeder(_relay.url, path) as feeder:
            await write(feeder, b"Hello, ")
            await taken(worker, assign, 7)
        has = (await http.get(one(posted))).json["inputs"]["text"]
        assert (has["bytes"], has["ended"]) == (7, False)
        for offset, body, status, code in (
            (8, b"x", 422, "input_mismatch"),  # a gap
            (5, b"?!", 409, "id_conflict"),
            (0, b"Hel", 409, "id_conflict"),  # an end before what is known
        ):
            wrong = await http.ask("PUT", f"{path}?offset={offset}", body=body)
            assert (wrong.status, wrong.error["code"]) == (status, code), wrong.json
        rest = await http.ask("PUT", f"{path}?offset=5", body=b", world.")
        assert (rest.status, rest.json["bytes"], rest.json["ended"]) == (200, 13, True)
        worker.speak(assign, PCM)
        assert (await http.get(one(posted, "/audio?format=pcm"))).body == ALL


@pytest.mark.trio
async def test_a_body_that_begins_again_is_compared_with_what_is_stored(tmp_path: Path) -> None:
    data = bytes(range(256)) * 4096  # more than the window, and than what is kept in memory
    live = {"inputs": {"audio": {"media_type": "audio/pcm", "live": True}}, "params": {"text": "x"}}
    async with daemon(tmp_path, store="sqlite") as relay, visitor(relay.url) as http:
        posted = await http.ask("POST", POST, told=live | {"detach": True})
        path = one(posted, "/inputs/audio")
        async with a_feeder(relay.url, path) as feeder:
            await write(feeder, data[: len(data) // 2])
            fed = relay.relay.requests[posted.json["request_id"]].fed["audio"]
            await until(lambda: fed.size == len(data) // 2)
    async with daemon(tmp_path, store="sqlite") as relay, visitor(relay.url) as http:
        wrong = await http.ask("PUT", path, body=b"\1" + data[1:])
        assert (wrong.status, wrong.error["code"]) == (409, "id_conflict")
    async with daemon(tmp_path, store="sqlite") as relay, visitor(relay.url) as http:
        whole = await http.ask("PUT", path, body=data)
        assert (whole.status, whole.json["bytes"], whole.json["ended"]) == (200, len(data), True)
        async with fake_worker(relay.url, **RULES) as worker:
            assert await taken(worker, await worker.assigned(), len(data), "audio") == (data, True)


@pytest.mark.trio
async def test_a_body_is_not_read_faster_than_it_is_stored(tmp_path: Path) -> None:
    more = {"live_input_bytes_s": 64 * 1024}  # and four seconds of it at once
    async with set_up(tmp_path, limits=more) as (relay, _worker, http):
        posted = await http.ask("POST", POST, told=LIVE)
        async with a_feeder(relay.url, one(posted, "/inputs/text")) as feeder:
            with trio.move_on_after(1.0):
                while True:
                    await write(feeder, bytes(64 * 1024))
            has = (await http.get(one(posted))).json["inputs"]["text"]["bytes"]
            assert relay.relay.feeds.pending_bytes <= MAX_UNACKED_BYTES
            assert has < 2 * 2**20
        await http.ask("DELETE", one(posted))


@pytest.mark.trio
async def test_bodies_that_are_too_many_for_the_memory_are_read_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "MAX_PENDING_BYTES", 2_000)
    async with set_up(tmp_path, limits={"live_input_bytes_s": 400}) as (relay, _worker, http):
        first, second = [await http.ask("POST", POST, told=LIVE) for _ in range(2)]
        async with a_feeder(relay.url, one(first, "/inputs/text")) as greedy:
            await write(greedy, bytes(1_600))
            await until(lambda: relay.relay.requests[first.json["request_id"]].fed["text"].size == 1_600)
            await write(greedy, bytes(1_900))
            await until(lambda: relay.relay.feeds.pending_bytes == 1_900)
            async with a_feeder(relay.url, one(second, "/inputs/text")) as feeder:
                await write(feeder, bytes(300))
                fed = relay.relay.requests[second.json["request_id"]].fed["text"]
                await until(lambda: fed.waits_for_room)
                await http.ask("DELETE", one(first))
                await feeder.send(h11.EndOfMessage())
                answer = await answered(feeder)
                assert (answer.status, answer.json["bytes"], answer.json["ended"]) == (200, 300, True)
        await http.ask("DELETE", one(second))


@pytest.mark.trio
async def test_a_request_that_ends_ends_the_body_that_nobody_needs(tmp_path: Path) -> None:
    async with set_up(tmp_path) as (relay, worker, http):
        for end, told in (("cancel", "cancelled"), ("fail", "has failed, and takes no more of input 'text': it broke")):
            posted = await http.ask("POST", POST, told=LIVE)
            assign = await worker.assigned()
            async with a_feeder(relay.url, one(posted, "/inputs/text")) as feeder:
                await write(feeder, b"Hello")
                await taken(worker, assign, 5)
                if end == "cancel":
                    await http.ask("DELETE", one(posted))
                else:
                    worker.send(Failed(**identity(assign, 0), code="engine_failed", message="it broke"))
                answer = await answered(feeder)
                assert (answer.status, answer.error["code"]) == (409, "input_closed")
                assert told in answer.error["message"]
                if end == "cancel":
                    worker.send(Cancelled(**identity(assign, 0)))
        await relay.at_rest()


@pytest.mark.trio
async def test_a_relay_that_leaves_ends_a_body_and_the_request_goes_on(tmp_path: Path) -> None:
    async with set_up(tmp_path) as (relay, worker, http):
        posted = await http.ask("POST", POST, told=LIVE | {"detach": True})
        async with a_feeder(relay.url, one(posted, "/inputs/text")) as feeder:
            await write(feeder, b"Hello")
            await taken(worker, await worker.assigned(), 5)
            assert not relay.http_context.unfinished
            relay.http_context.begin_shutdown()
            answer = await answered(feeder)
        assert (answer.status, answer.error["code"]) == (503, "shutting_down")
        assert relay.relay.requests[posted.json["request_id"]].live


@pytest.mark.trio
async def test_a_request_of_the_websocket_is_fed_over_http(tmp_path: Path) -> None:
    async with set_up(tmp_path) as (_relay, worker, http), peer(_relay.url, "client") as client:
        info = InputInfo(media_type="text/plain", live=True)
        client.send(submit := a_submit(params={}, inputs={"text": info}))
        await client.next(Accepted)
        answer = await http.ask("PUT", f"/v1/requests/{submit.request_id}/inputs/text", body=b"Hello")
        assert (answer.status, answer.json["ended"]) == (200, True)
        assert await taken(worker, await worker.assigned(), 5) == (b"Hello", True)


@pytest.mark.trio
async def test_a_live_input_comes_beside_a_file(tmp_path: Path) -> None:
    async with set_up(tmp_path) as (_relay, worker, http):
        inputs = '{"text": {"media_type": "text/plain", "live": true}}'
        posted = await http.ask("POST", POST, **form({"voice": File(b"RIFF"), "inputs": inputs, "group": "turn"}))
        assert posted.status == 202, posted.json
        assign = await worker.assigned()
        assert {name: info.live for name, info in assign.inputs.items()} == {"voice": False, "text": True}


@pytest.mark.trio
async def test_what_cannot_be_announced_or_fed_is_told(tmp_path: Path) -> None:
    async with set_up(tmp_path) as (relay, _worker, http):
        inputs: Any
        for inputs, field in (
            ({"text": {"media_type": "text/plain"}}, "inputs.text"),
            ({"text": "hello"}, "inputs.text"),
            ({"voice": {"media_type": "audio/wav", "live": True}}, "inputs.voice"),
            ({"nothing": {"media_type": "a/b", "live": True}}, "inputs.nothing"),
        ):
            refused = await http.ask("POST", POST, told={"inputs": inputs, "params": {"text": "x"}})
            assert (refused.status, refused.error["code"]) == (422, "invalid_params")
            assert field in refused.error["details"], refused.json
        for inputs in (["text"], {"text": {"live": True}}, {"text": {"from": "x"}}):
            refused = await http.ask("POST", POST, told={"inputs": inputs, "params": {"text": "x"}})
            assert (refused.status, refused.error["code"]) == (422, "invalid_params")
        whole = await http.ask("POST", POST, told={"params": {"text": "x"}})
        for path, told in (
            ("/inputs/text", "is not a live input of request"),
            ("/inputs/text?offset=-1", "offset must be the number of bytes"),
        ):
            refused = await http.ask("PUT", one(whole, path), body=b"x")
            assert (refused.status, refused.error["code"]) == (422, "invalid_params")
            assert told in refused.error["message"]
        assert (await http.ask("PUT", f"/v1/requests/{an_id()}/inputs/text", body=b"x")).status == 404
        await relay.goes_on()


@pytest.mark.trio
async def test_a_pipe_is_announced_fed_by_the_relay_alone_and_cancelled_with_its_group(tmp_path: Path) -> None:
    async with set_up(tmp_path) as (relay, worker, http):
        source = await http.ask("POST", POST, told={"params": {"text": "x"}, "group": "turn"})
        pipe = {"inputs": {"text": {"from": source.json["request_id"]}}, "group": "turn"}
        piped = await http.ask("POST", POST, told=pipe)
        assert (piped.status, piped.json["state"]) == (202, "uploading")
        assert piped.json["inputs"]["text"]["from"] == source.json["request_id"]
        refused = await http.ask("PUT", one(piped, "/inputs/text"), body=b"x")
        assert (refused.status, refused.error["code"]) == (422, "invalid_params")
        assert "is not a live input" in refused.error["message"]
        assign = await worker.assigned()
        cancelled = await http.ask("DELETE", one(piped))
        assert cancelled.json["state"] == "cancelled"
        await worker.peer.next(Cancel)
        worker.send(Cancelled(**identity(assign, 0)))
        await relay.at_rest()
        unknown = await http.ask("POST", POST, told={"inputs": {"text": {"from": an_id()}}})
        assert (unknown.status, unknown.error["code"]) == (404, "request_not_found")


@pytest.mark.trio
async def test_marks_are_no_outputs(tmp_path: Path) -> None:
    async with set_up(tmp_path) as (_relay, worker, http):
        for value in (None, "done"):
            posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
            assign = await worker.assigned()
            worker.speak(assign, PCM, end=False)
            worker.send(Output(**identity(assign, 4), mark={"text_end": 1, "sample": 3600}))
            if value is not None:
                worker.send(Output(**identity(assign, 5), data=value))
            worker.send(Completed(**identity(assign, 5 + (value is not None))))
            output = await http.get(one(posted, "/output"))
            assert (output.status, output.body if value else output.error["code"]) == (
                (200, b"done") if value else (404, "no_output")
            )
            assert (await http.get(one(posted))).json["outputs"] == ([value] if value else [])
