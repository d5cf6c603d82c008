"""The client library feeds live inputs to a real daemon: over cuts, and from a program that was started again."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from protocol import InputClosed, Live, RelayClient, RequestFailed, open_relay
from protocol.client.address import Address
from protocol.link.backoff import Backoff
from protocol.link.connect import connect
from protocol.wire.messages import Assign, Input, InputAck
from relayd.core import feeds
from relayd.requests.live_input import LiveInput
from relayd.store.records import AppendInput, Change
from tests.support.fake_worker import FakeWorker, fake_worker, samples
from tests.support.relay import an_id, daemon, until

RULES: dict[str, Any] = {"inputs": {"text": {"live": True}}}
PCM = [samples(100)]


async def each(data: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        await trio.lowlevel.checkpoint()
        yield data[start : start + size]


async def taken(worker: FakeWorker, assign: Assign) -> bytes:
    """All of the input, which the engine takes as it comes."""
    data, last = b"", False
    while not last:
        piece = await worker.peer.next(Input)
        data, last = data + piece.data, bool(piece.last)
        ack = InputAck(request_id=assign.request_id, attempt=assign.attempt, name="text", offset=len(data))
        worker.send(ack)
    return data


@pytest.mark.trio
async def test_an_iterator_that_is_faster_than_the_relay_is_held_up_and_loses_nothing(tmp_path: Path) -> None:
    data = bytes(range(256)) * 4_096
    async with daemon(tmp_path) as relay, fake_worker(relay.url, **RULES) as worker, open_relay(relay.url) as client:
        await until(lambda: bool(relay.relay.workers))
        async with client.submit("tts", inputs={"text": each(data, 50_000)}) as stream:
            assign = await worker.assigned()
            assert await taken(worker, assign) == data
            worker.speak(assign, PCM)
            assert b"".join([pcm async for pcm in stream.audio()]) == PCM[0]
        await relay.at_rest()


@pytest.mark.trio
async def test_links_that_are_lost_in_mid_input_lose_and_double_nothing(tmp_path: Path) -> None:
    data = bytes(range(256)) * 4_096
    links: list[trio.abc.Stream] = []

    async def connect_and_keep(address: Address) -> trio.abc.Stream:
        links.append(await connect(address))
        return links[-1]

    async def cut() -> AsyncIterator[bytes]:
        async for piece in each(data, 30_000):
            yield piece
            if len(links) < 4:
                await trio.aclose_forcefully(links[-1])

    async with (
        daemon(tmp_path) as relay,
        fake_worker(relay.url, **RULES) as worker,
        open_relay(relay.url, connect_to=connect_and_keep, backoff=Backoff(draw=lambda: 0.01)) as client,
    ):
        await until(lambda: bool(relay.relay.workers))
        async with client.submit("tts", inputs={"text": cut()}) as stream:
            assign = await worker.assigned()
            assert await taken(worker, assign) == data
            worker.speak(assign, PCM)
            await stream.result()
    assert len(links) == 4


@pytest.mark.trio
async def test_a_program_that_attaches_feeds_what_is_missing(tmp_path: Path) -> None:
    data = bytes(range(256)) * 4_096
    async with daemon(tmp_path) as relay, fake_worker(relay.url, **RULES) as worker:
        await until(lambda: bool(relay.relay.workers))
        async with (
            open_relay(relay.url) as client,
            client.submit("tts", inputs={"text": Live()}, detach=True) as stream,
        ):
            assert await stream.fed_bytes("text") == 0
            await stream.feed("text", data[:400_000])
            assert await stream.fed_bytes("text") == 400_000
            request_id = stream.request_id
            fed = relay.relay.requests[request_id].fed["text"]
            await until(lambda: fed.size == 400_000)
        async with open_relay(relay.url) as client, client.attach(request_id) as stream:
            assert await stream.fed_bytes("text") == 400_000
            await stream.feed("text", data[400_000:])
            with pytest.raises(ValueError, match="takes no live input 'audio'; its live inputs are text"):
                await stream.feed("audio", b"x")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.end_input, "text")
                assign = await worker.assigned()
                assert await taken(worker, assign) == data
            worker.speak(assign, PCM)
            await stream.result()
            with pytest.raises(InputClosed):
                await stream.feed("text", b"more")
        async with open_relay(relay.url) as client, client.attach(request_id) as stream:
            with pytest.raises(ValueError, match="its live inputs are none, or it has ended"):
                await stream.feed("text", b"more")


@pytest.mark.trio
async def test_an_attached_stream_goes_on_behind_what_others_have_fed_until_it_feeds(tmp_path: Path) -> None:
    links: list[trio.abc.Stream] = []

    async def connect_and_keep(address: Address) -> trio.abc.Stream:
        links.append(await connect(address))
        return links[-1]

    backoff = Backoff(draw=lambda: 0.01)
    async with (
        daemon(tmp_path) as relay,
        open_relay(relay.url) as first,
        open_relay(relay.url, connect_to=connect_and_keep, backoff=backoff) as second,
        first.submit("check", inputs={"text": Live()}) as stream,
        second.attach(stream.request_id) as attached,
    ):
        assert await attached.fed_bytes("text") == 0
        await stream.feed("text", b"from the first, ")
        await until(lambda: relay.relay.requests[stream.request_id].fed["text"].size == 16)
        while await attached.fed_bytes("text") < 16:
            await trio.lowlevel.checkpoint()
        await trio.aclose_forcefully(links[-1])
        await attached.feed("text", b"and the second")
        await attached.end_input("text")
        fed = relay.relay.requests[stream.request_id].fed["text"]
        assert fed.ended
        assert fed.kept(0, 99) == b"from the first, and the second"


@pytest.mark.trio
async def test_feeders_that_are_too_many_for_the_memory_are_held_back_and_go_on_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "MAX_PENDING_BYTES", 300_000)
    held_back: list[object] = []
    hold_back = LiveInput.hold_back

    def noted(fed: LiveInput, feeder: object) -> None:
        held_back.append(feeder)
        hold_back(fed, feeder)

    monkeypatch.setattr(LiveInput, "hold_back", noted)

    async def submit(client: RelayClient, number: int) -> None:
        data = bytes([number]) * 600_000
        async with client.submit("check", inputs={"text": each(data, 70_000)}, detach=True) as stream:
            fed = relay.relay.requests[stream.request_id].fed["text"]
            await until(lambda: fed.ended)
            got = [
                await relay.relay.store.read_live_input(stream.request_id, "text", at, 99_000)
                for at in range(0, 600_000, 99_000)
            ]
            assert b"".join(got) == data

    async with (
        daemon(tmp_path) as relay,
        open_relay(relay.url) as first,
        open_relay(relay.url) as second,
    ):
        commit = relay.relay.store.commit

        async def slow(*changes: Change) -> None:
            if any(isinstance(change, AppendInput) for change in changes):
                await until(lambda: bool(held_back))
            await commit(*changes)

        monkeypatch.setattr(relay.relay.store, "commit", slow)
        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(submit, (first, second)[number % 2], number)


@pytest.mark.trio
async def test_a_program_that_is_started_again_feeds_the_same_request(tmp_path: Path) -> None:
    data, request_id = bytes(range(256)) * 8_192, an_id()
    options: dict[str, Any] = {"request_id": request_id, "detach": True}
    async with (
        daemon(tmp_path, store="sqlite") as relay,
        open_relay(relay.url) as client,
        client.submit("tts", inputs={"text": Live("text/plain")}, **options) as stream,
    ):
        await stream.feed("text", data[:1_500_000])
    async with daemon(tmp_path, store="sqlite") as relay:
        fed = relay.relay.requests[request_id].fed["text"]
        assert 1_200_000 < fed.size <= 1_500_000
        async with open_relay(relay.url) as client:
            async with client.submit("tts", inputs={"text": each(b"\1" + data[1:], 9_000)}, **options) as stream:
                with pytest.raises(RequestFailed, match="id_conflict"):
                    await stream.result()
            async with (
                fake_worker(relay.url, **RULES) as worker,
                client.submit("tts", inputs={"text": each(data, 9_000)}, **options) as stream,
            ):
                assign = await worker.assigned()
                assert await taken(worker, assign) == data
                worker.speak(assign, PCM)
                await stream.result()
