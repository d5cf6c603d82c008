"""Live inputs through a real daemon: what is fed reaches the engine once and in order, and the feeder is told."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from protocol.wire.frames import Audio, Cancelled, Failed
from protocol.wire.messages import (
    MAX_UNACKED_BYTES,
    Accepted,
    Assign,
    Attach,
    Cancel,
    Input,
    InputAck,
    Ping,
    Pong,
    Registered,
    Rejected,
    Submit,
)
from protocol.wire.structs import InputInfo, Running
from relayd.core import feeds
from tests.support.fake_worker import FakeWorker, fake_worker, identity, samples
from tests.support.relay import Peer, a_submit, an_id, an_input, daemon, peer, until

RULES: dict[str, Any] = {"inputs": {"text": {"live": True}, "audio": {"live": True}, "voice": {}}}
PCM = [samples(100)]


def live(*names: str, **fields: Any) -> Submit:
    """A request with live inputs; one of the name of a param stands for it."""
    inputs = {name: InputInfo(media_type="text/plain", live=True) for name in names or ("text",)}
    return a_submit(**({"params": {}} | fields | {"inputs": inputs | fields.get("inputs", {})}))


def feed(client: Peer, submit: Submit, offset: int, data: bytes, last: bool | None = None, name: str = "text") -> None:
    client.send(Input(request_id=submit.request_id, name=name, offset=offset, data=data, last=last))


async def acked(client: Peer, offset: int, last: bool | None = None) -> None:
    """Wait until the relay has acknowledged so much."""
    while True:
        ack = await client.next(InputAck, Rejected)
        assert isinstance(ack, InputAck), ack
        assert ack.offset <= offset
        if (ack.offset, ack.last) == (offset, last):
            return


async def taken(worker: FakeWorker, assign: Assign, size: int, *, ack: bool = True, start: int = 0) -> bytes:
    """What the worker gets of `text` up to `size` bytes, from `start` on; its engine takes all of it."""
    data = b""
    while start + len(data) < size:
        piece = await worker.peer.next(Input)
        assert (piece.request_id, piece.offset) == (assign.request_id, start + len(data))
        data += piece.data
        if ack:
            takes(worker, assign, start + len(data))
    return data


def takes(worker: FakeWorker, assign: Assign, offset: int, name: str = "text") -> None:
    worker.send(InputAck(request_id=assign.request_id, attempt=assign.attempt, name=name, offset=offset))


async def end_of(worker: FakeWorker, offset: int) -> None:
    """The end comes, alone or with the last bytes."""
    while True:
        piece = await worker.peer.next(Input)
        if piece.last:
            assert piece.offset + len(piece.data) == offset
            return


@asynccontextmanager
async def set_up(tmp_path: Path, **options: Any) -> AsyncIterator[tuple[Any, FakeWorker, Peer]]:
    async with (
        daemon(tmp_path, **options) as relay,
        fake_worker(relay.url, **RULES) as worker,
        peer(relay.url, "client") as client,
    ):
        await until(lambda: bool(relay.relay.workers))
        yield relay, worker, client


@pytest.mark.trio
async def test_what_is_fed_while_it_runs_reaches_the_engine_and_is_acknowledged(tmp_path: Path) -> None:
    async with set_up(tmp_path) as (relay, worker, client):
        assert client.welcome.limits["max_unacked_bytes"] == MAX_UNACKED_BYTES
        assert client.welcome.limits["feed_idle_timeout_s"] == 30.0
        client.send(submit := live())
        assert isinstance(await client.next(), Accepted)
        first = await client.next()
        assert first == InputAck(request_id=submit.request_id, name="text", offset=0)
        assign = await worker.assigned()
        assert (assign.params, assign.inputs["text"].live) == ({}, True)
        for number, words in enumerate((b"Hello, ", b"world", b".")):
            offset = (0, 7, 12)[number]
            feed(client, submit, offset, words)
            await acked(client, offset + len(words))
            assert await taken(worker, assign, offset + len(words), start=offset) == words
        feed(client, submit, 13, b"", last=True)
        await acked(client, 13, last=True)
        await end_of(worker, 13)
        worker.speak(assign, PCM)
        assert (await client.frames(submit))[-1].TYPE == "completed"
        await relay.at_rest()
        assert relay.relay.feeds.pending_bytes == 0
        assert not relay.relay.scheduler.state.input_bytes
        await relay.goes_on()


@pytest.mark.trio
async def test_what_is_fed_before_it_is_accepted_and_while_it_waits_is_there_when_it_starts(tmp_path: Path) -> None:
    async with daemon(tmp_path, store="sqlite") as relay, peer(relay.url, "client") as client:
        client.send(submit := live())
        feed(client, submit, 0, b"before ")
        feed(client, submit, 7, b"it is accepted, ")
        assert isinstance(await client.next(), Accepted)
        await acked(client, 23)
        feed(client, submit, 23, b"and while it waits", last=True)
        await acked(client, 41, last=True)
        async with fake_worker(relay.url, **RULES) as worker:
            assign = await worker.assigned()
            assert await taken(worker, assign, 41) == b"before it is accepted, and while it waits"
            worker.speak(assign, PCM)
            await client.frames(submit)
        await relay.at_rest()


@pytest.mark.trio
async def test_whole_inputs_come_first_and_each_live_one_on_its_own(tmp_path: Path) -> None:
    async with set_up(tmp_path) as (relay, worker, client):
        submit = live("text", "audio", inputs={"voice": an_input(b"whole")})
        client.send(submit)
        feed(client, submit, 0, b"sound", name="audio")
        feed(client, submit, 0, b"whole", name="voice")
        await client.next(Accepted)
        feed(client, submit, 0, b"words", name="text")
        await worker.assigned()
        came: dict[str, bytes] = {}
        while len(b"".join(came.values())) < 15:
            piece = await worker.peer.next(Input)
            assert came or piece.name == "voice"
            came[piece.name] = came.get(piece.name, b"") + piece.data
        assert came == {"voice": b"whole", "audio": b"sound", "text": b"words"}
        await relay.goes_on()
