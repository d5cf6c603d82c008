"""What is told of a live input: to its client, to operators, and to Prometheus."""

from pathlib import Path
from typing import Any

import pytest

from protocol.wire.messages import Accepted, Input, InputAck, Status, StatusReply
from protocol.wire.structs import InputInfo
from tests.relayd.http.test_prometheus import Told
from tests.relayd.views.test_watch import screen
from tests.support.fake_worker import fake_worker, samples
from tests.support.relay import Peer, a_submit, an_input, daemon, peer, until

RULES: dict[str, Any] = {"inputs": {"text": {"live": True}, "voice": {}}}


async def status(client: Peer, request_id: str) -> StatusReply:
    client.send(Status(request_id=request_id))
    reply: StatusReply = await client.next(StatusReply)
    return reply


@pytest.mark.trio
async def test_what_came_of_a_live_input_is_told_while_it_lives_and_its_size_afterwards(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path) as relay,
        fake_worker(relay.url, **RULES) as worker,
        peer(relay.url, "client") as client,
        screen(relay, readonly=True) as shown,
    ):
        await until(lambda: bool(relay.relay.workers))
        text = InputInfo(media_type="text/plain", live=True)
        submit = a_submit(params={}, inputs={"text": text, "voice": an_input(b"12")})
        request_id = submit.request_id
        client.send(submit)
        client.send(Input(request_id=request_id, name="voice", offset=0, data=b"12"))
        await client.next(Accepted)
        for number in range(2):
            client.send(Input(request_id=request_id, name="text", offset=5 * number, data=b"hello"))
        while (await client.next(InputAck)).offset < 10:
            pass
        told = (await status(client, request_id)).inputs
        assert told.keys() == {"text"}
        assert (told["text"]["bytes"], told["text"]["ended"]) == (10, False)
        assert told["text"]["bytes_s"] > 0
        assert 0 <= told["text"]["age_s"] < 10
        await shown.sees(lambda: shown.row("requests")["inputs"]["text"]["bytes"] == 10)
        detail = await shown.operator.steer("describe", request_id)
        assert detail["request"]["inputs"]["text"]["bytes"] == 10
        assert {each["name"]: each["size"] for each in detail["inputs"]} == {"text": 10, "voice": 2}
        client.send(Input(request_id=request_id, name="text", offset=10, data=b"!", last=True))
        await until(lambda: relay.relay.requests[request_id].fed["text"].ended)
        assert (await status(client, request_id)).inputs["text"]["ended"]
        worker.speak(await worker.assigned(), [samples(10)])
        await client.frames(submit)
        await shown.sees(lambda: "inputs" not in shown.row("requests"))
        assert (await status(client, request_id)).inputs == {}
        detail = await shown.operator.steer("describe", request_id)
        assert {each["name"]: each["size"] for each in detail["inputs"]} == {"text": 11, "voice": 2}
        prometheus = Told(relay.relay)
        assert prometheus("live_input_bytes_total") == 11
        assert prometheus("live_input_pieces_total") == 3


@pytest.mark.trio
async def test_a_piped_input_says_what_it_comes_from_and_a_request_its_group(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path) as relay,
        peer(relay.url, "client") as client,
        screen(relay, readonly=True) as shown,
    ):
        client.send(source := a_submit())
        submit = a_submit(params={}, inputs={"text": InputInfo(from_=source.request_id)}, group="turn")
        client.send(submit)
        while (await client.next(Accepted)).request_id != submit.request_id:
            pass
        reply = await status(client, submit.request_id)
        assert (reply.state, reply.inputs["text"]["from"]) == ("uploading", source.request_id)
        detail = await shown.operator.steer("describe", submit.request_id)
        assert detail["group"] == "turn"
        assert detail["request"]["inputs"]["text"]["from"] == source.request_id
        assert detail["request"]["queued_s"] is None
