"""Live inputs through a real daemon: what is fed reaches the engine once and in order, and the feeder is told."""

import gc
import weakref
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
from relayd.store.base import StorageFull
from relayd.store.records import AppendInput
from tests.support.fake_worker import FakeWorker, fake_worker, identity, samples
from tests.support.relay import Peer, a_submit, an_id, an_input, daemon, new_token, peer, until

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
        first = await client.next()
        assert first == InputAck(request_id=submit.request_id, name="text", offset=0)
        assert isinstance(await client.next(), Accepted)
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
        await client.next(Accepted)
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


@pytest.mark.trio
@pytest.mark.parametrize(
    ("offset", "data", "last", "code"),
    [
        (6, b"x", None, "input_mismatch"),
        (2, b"xx", None, "id_conflict"),
        (0, b"hel", True, "id_conflict"),
        (5, b"x" * (MAX_UNACKED_BYTES + 1), None, "rate_limited"),
    ],
)
async def test_a_feeder_that_breaks_the_rules_is_let_go_and_the_request_goes_on(
    tmp_path: Path, offset: int, data: bytes, last: bool | None, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with set_up(tmp_path) as (relay, worker, client), peer(relay.url, "client") as other:
        client.send(submit := live())
        await client.next(Accepted)
        feed(client, submit, 0, b"hello")
        await acked(client, 5)
        other.send(submit)
        await acked(other, 5)

        async def never(*_changes: Any) -> None:
            await trio.sleep_forever()

        if code == "rate_limited":  # the disk must not be faster than what follows
            monkeypatch.setattr(relay.relay.store, "commit", never)
        for start in range(0, len(data), 200_000):
            feed(other, submit, offset + start, data[start : start + 200_000], last=last)
        refusal = await other.next(Rejected)
        assert (refusal.request_id, refusal.code) == (submit.request_id, code)
        assert (refusal.retry_after_s is not None) is (code == "rate_limited")
        if code == "rate_limited":
            return
        feed(other, submit, 5, b"not heard any more")
        await other.settled()
        feed(client, submit, 5, b" you", last=True)
        await acked(client, 9, last=True)
        assign = await worker.assigned()
        assert await taken(worker, assign, 9) == b"hello you"
        worker.speak(assign, PCM)
        await client.frames(submit)
        await relay.at_rest()


@pytest.mark.trio
async def test_bytes_beyond_the_end_are_refused(tmp_path: Path) -> None:
    async with set_up(tmp_path) as (_relay, _worker, client):
        client.send(submit := live())
        await client.next(Accepted)
        feed(client, submit, 0, b"all", last=True)
        feed(client, submit, 0, b"all", last=True)
        feed(client, submit, 0, b"a")
        await acked(client, 3, last=True)
        feed(client, submit, 3, b"more")
        refusal = await client.next(Rejected)
        assert refusal.code == "id_conflict"
        assert "3 bytes are known and ends at 3" in refusal.message


@pytest.mark.trio
async def test_older_bytes_are_compared_with_what_the_store_has(tmp_path: Path) -> None:
    text = samples(300_000)
    async with set_up(tmp_path, store="sqlite") as (relay, worker, client), peer(relay.url, "client") as other:
        client.send(submit := live())
        await client.next(Accepted)
        for offset in range(0, 400_000, 100_000):
            feed(client, submit, offset, text[offset : offset + 100_000])
            await acked(client, offset + 100_000)
        feed(client, submit, 0, text[:200_000])
        feed(client, submit, 200_000, text[200_000:350_000])
        feed(client, submit, 350_000, text[350_000:500_000])
        await acked(client, 500_000)
        other.send(submit)
        await acked(other, 500_000)
        feed(other, submit, 1_000, text[1_001:2_000])
        feed(other, submit, 500_000, b"of a liar")
        assert (await other.next(Rejected)).code == "id_conflict"
        feed(client, submit, 500_000, b"", last=True)
        await acked(client, 500_000, last=True)
        assert await taken(worker, await worker.assigned(), 500_000) == text[:500_000]
        assert relay.relay.feeds.pending_bytes == 0


@pytest.mark.trio
async def test_many_small_pieces_of_older_bytes_take_few_looks_into_the_store_and_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = samples(100_000)
    async with set_up(tmp_path, store="sqlite") as (relay, _worker, client), peer(relay.url, "client") as other:
        client.send(submit := live())
        await client.next(Accepted)
        for offset in range(0, 200_000, 100_000):
            feed(client, submit, offset, text[offset : offset + 100_000])
            await acked(client, offset + 100_000)
        other.send(submit)
        await acked(other, 200_000)
        read, go_on, looks = relay.relay.store.read_live_input, trio.Event(), 0

        async def counted(*place: Any) -> bytes:
            nonlocal looks
            looks += 1
            await go_on.wait()
            data: bytes = await read(*place)
            return data

        monkeypatch.setattr(relay.relay.store, "read_live_input", counted)
        for offset in range(0, 20_000, 4):
            feed(client, submit, offset, text[offset : offset + 4])
        await until(lambda: relay.relay.feeds.pending_bytes == 20_000 + 2 * feeds.PIECE_BYTES)
        for _ in range(5_000):  # they do not go on with each other
            feed(other, submit, 0, text[:1])
        refusal = await other.next(Rejected)
        assert (refusal.code, refusal.request_id) == ("rate_limited", submit.request_id)
        assert relay.relay.feeds.pending_bytes <= feeds.MAX_UNCHECKED_BYTES
        go_on.set()
        await until(lambda: not relay.relay.feeds.pending_bytes)
        assert looks < 10
        feed(client, submit, 200_000, b"", last=True)
        await acked(client, 200_000, last=True)


@pytest.mark.trio
@pytest.mark.parametrize("limit", ["relay", "space"])
async def test_too_much_fails_the_request_whole_inputs_included(tmp_path: Path, limit: str) -> None:
    limits = {"max_input_bytes": 1_000} if limit == "relay" else {}
    rule = {"live": True} | ({"max_bytes": 700} if limit == "space" else {})
    async with (
        daemon(tmp_path, limits=limits) as relay,
        fake_worker(relay.url, inputs={"text": rule, "audio": rule, "voice": {}}) as worker,
        peer(relay.url, "client") as client,
    ):
        await until(lambda: bool(relay.relay.workers))
        voice, audio = (b"", b"") if limit == "space" else (b"v" * 200, b"a" * 100)
        client.send(submit := live("text", "audio", inputs={"voice": an_input(voice)}))
        feed(client, submit, 0, voice, name="voice")
        await client.next(Accepted)
        feed(client, submit, 0, audio, name="audio")
        feed(client, submit, 0, b"t" * 700)
        assign = await worker.assigned()
        feed(client, submit, 700, b"t")
        failed = await client.next(Failed)
        assert (failed.code, failed.retryable) == ("input_too_large", False)
        assert "has more than 700 bytes" in failed.message
        await worker.peer.next(Cancel)
        worker.send(Cancelled(**identity(assign, 0)))
        await relay.at_rest()
        assert relay.relay.feeds.pending_bytes == 0
        await relay.goes_on()


@pytest.mark.trio
async def test_a_fast_feeder_is_held_up_and_not_refused(tmp_path: Path) -> None:
    limits = {"live_input_bytes_s": 10_000, "feed_idle_timeout_s": 0.02}
    async with set_up(tmp_path, limits=limits) as (_relay, worker, client):
        client.send(submit := live())
        feed(client, submit, 0, b"x" * 42_000)
        assign = await worker.assigned()
        await taken(worker, assign, 42_000)
        began = trio.current_time()
        feed(client, submit, 42_000, b"x" * 500)
        feed(client, submit, 42_500, b"x" * 1_500, last=True)
        await acked(client, 44_000, last=True)
        assert trio.current_time() - began > 0.1, "which is longer than a feeder may be silent"
        assert len(await taken(worker, assign, 44_000, start=42_000)) == 2_000


@pytest.mark.trio
async def test_a_feeder_that_is_cut_goes_on_from_what_was_stored(tmp_path: Path) -> None:
    async with set_up(tmp_path) as (relay, worker, client):
        client.send(submit := live())
        await client.next(Accepted)
        feed(client, submit, 0, b"one two ")
        assign = await worker.assigned()
        assert await taken(worker, assign, 8) == b"one two "
        await client.cut()
        await until(lambda: not relay.relay.requests[submit.request_id].holders)
        async with peer(relay.url, "client") as again:
            again.send(Attach(request_id=submit.request_id, attempt=1, after_seq=-1))
            ack = await again.next()
            assert (ack.TYPE, ack.offset) == ("input_ack", 8)
            assert isinstance(await again.next(), Accepted)
            feed(again, submit, 8, b"three", last=True)
            await acked(again, 13, last=True)
            assert await taken(worker, assign, 13, start=8) == b"three"
            worker.speak(assign, PCM)
            await again.frames(submit)
        await relay.at_rest()


@pytest.mark.trio
async def test_a_worker_that_is_cut_gets_the_rest_and_nothing_twice(tmp_path: Path) -> None:
    instance = an_id()
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as client:
        async with fake_worker(relay.url, instance=instance, **RULES) as worker:
            await until(lambda: bool(relay.relay.workers))
            client.send(submit := live())
            feed(client, submit, 0, b"one two ")
            assign = await worker.assigned()
            assert await taken(worker, assign, 8, ack=False) == b"one two "
            worker.speak(assign, PCM, end=False)
            await client.next(Audio)
            await worker.peer.cut()
        feed(client, submit, 8, b"three ")
        await acked(client, 14)
        running = (Running(request_id=submit.request_id, attempt=1, next_seq=2, inputs={"text": 8}),)
        async with fake_worker(relay.url, instance=instance, running=running, **RULES) as worker:
            registered = await worker.peer.next(Registered)
            assert [each.request_id for each in registered.resume] == [submit.request_id]
            takes(worker, assign, 8)
            assert await taken(worker, assign, 14, start=8) == b"three "
            feed(client, submit, 14, b"four", last=True)
            assert await taken(worker, assign, 18, start=14) == b"four"
            await worker.peer.cut()
        running = (Running(request_id=submit.request_id, attempt=1, next_seq=2, inputs={"text": 18}),)
        async with fake_worker(relay.url, instance=instance, running=running, **RULES) as worker:
            await end_of(worker, 18)
            worker.speak(assign, PCM, first=2)
            assert [frame.TYPE for frame in await client.frames(submit, first=2)] == ["completed"]
        await relay.at_rest()


@pytest.mark.trio
@pytest.mark.parametrize("whole_log", [False, True])
async def test_a_relay_that_crashes_goes_on_with_what_it_acknowledged(tmp_path: Path, whole_log: bool) -> None:
    instance, text = an_id(), samples(100_000)
    async with (
        daemon(tmp_path, store="sqlite") as relay,
        fake_worker(relay.url, instance=instance, **RULES) as worker,
        peer(relay.url, "client") as client,
    ):
        await until(lambda: bool(relay.relay.workers))
        client.send(submit := live())
        await client.next(Accepted)
        feed(client, submit, 0, text[:120_000])
        await acked(client, 120_000)
        assign = await worker.assigned()
        assert await taken(worker, assign, 120_000) == text[:120_000]
        await relay.relay.store.flush()
    async with daemon(tmp_path, store="sqlite") as relay, peer(relay.url, "client") as client:
        assert relay.relay.scheduler.state.input_bytes.total() == 120_000
        client.send(submit)
        await acked(client, 120_000)
        feed(client, submit, 120_000, text[120_000:], last=True)
        await acked(client, 200_000, last=True)
        received = 0 if whole_log else 120_000
        running = (Running(request_id=submit.request_id, attempt=1, next_seq=0, inputs={"text": received}),)
        async with fake_worker(relay.url, instance=instance, running=running, **RULES) as worker:
            assert (await worker.peer.next(Registered)).resume
            takes(worker, assign, received)
            assert await taken(worker, assign, 200_000, start=received) == text[received:]
            worker.speak(assign, PCM)
            await client.frames(submit)
        await relay.at_rest()
        await relay.relay.finalizer.wait_finalized()
        assert (await relay.relay.store.load()).live_inputs == {}


@pytest.mark.trio
async def test_a_second_attempt_gets_the_input_from_the_beginning(tmp_path: Path) -> None:
    async with set_up(tmp_path) as (relay, worker, client):
        client.send(submit := live())
        feed(client, submit, 0, b"one ")
        assign = await worker.assigned()
        assert await taken(worker, assign, 4) == b"one "
        worker.send(Failed(**identity(assign, 0), code="engine_failed", message="oh", retryable=True))
        assign = await worker.assigned()
        assert assign.attempt == 2
        feed(client, submit, 4, b"two", last=True)
        assert await taken(worker, assign, 7) == b"one two"
        worker.speak(assign, PCM)
        await client.frames(submit)
        await relay.at_rest()


@pytest.mark.trio
async def test_two_holders_may_feed_and_both_are_told(tmp_path: Path) -> None:
    async with set_up(tmp_path) as (relay, worker, client), peer(relay.url, "client") as other:
        client.send(submit := live())
        await acked(client, 0)
        other.send(submit)
        await acked(other, 0)
        feed(client, submit, 0, b"one ")
        await acked(other, 4)
        feed(other, submit, 0, b"one two ")
        await acked(client, 8)
        feed(client, submit, 8, b"three", last=True)
        await acked(other, 13, last=True)
        assert await taken(worker, await worker.assigned(), 13) == b"one two three"


@pytest.mark.trio
async def test_only_holders_feed(tmp_path: Path) -> None:
    async with set_up(tmp_path) as (relay, worker, client), peer(relay.url, "operator") as operator:
        client.send(submit := live())
        await acked(client, 0)
        feed(operator, submit, 0, b"of somebody who does not hold it")
        await operator.settled()
        feed(client, submit, 0, b"mine", last=True)
        assert await taken(worker, await worker.assigned(), 4) == b"mine"


@pytest.mark.trio
async def test_a_worker_is_sent_no_more_than_its_window(tmp_path: Path) -> None:
    text = samples(400_000)
    async with set_up(tmp_path, store="sqlite") as (relay, worker, client):
        client.send(submit := live())
        await client.next(Accepted)
        for offset in range(0, len(text), 200_000):
            feed(client, submit, offset, text[offset : offset + 200_000])
            await acked(client, offset + 200_000)
        assign = await worker.assigned()
        assert len(await taken(worker, assign, MAX_UNACKED_BYTES, ack=False)) == MAX_UNACKED_BYTES
        worker.send(Ping(timestamp=1.0))
        assert isinstance(await worker.peer.next(Input, Pong), Pong), "an engine that takes nothing gets no more"
        takes(worker, assign, 100_000)
        got = await taken(worker, assign, MAX_UNACKED_BYTES + 100_000, ack=False, start=MAX_UNACKED_BYTES)
        assert len(got) == 100_000
        client.send(other := a_submit("of somebody else", space="check"))
        async with fake_worker(relay.url, spaces=("check",), name="checker") as checker:
            checker.speak(await checker.assigned(), PCM)
            await client.frames(other)
        takes(worker, assign, MAX_UNACKED_BYTES + 100_000)
        start = MAX_UNACKED_BYTES + 100_000
        assert await taken(worker, assign, len(text), start=start) == text[start:]


@pytest.mark.trio
async def test_feeders_that_say_nothing_hold_up_no_other_request_of_the_worker(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path) as relay,
        fake_worker(relay.url, slots=12, **RULES) as worker,
        peer(relay.url, "client") as client,
    ):
        await until(lambda: bool(relay.relay.workers))
        for _ in range(8):
            client.send(live())
            await worker.assigned()
        submit = a_submit(inputs={"voice": an_input(b"whole")})
        client.send(submit)
        feed(client, submit, 0, b"whole", name="voice")
        assign = await worker.assigned()
        assert (await worker.peer.next(Input)).data == b"whole"
        worker.speak(assign, PCM)
        await client.frames(submit)
        client.send(talks := live())
        feed(client, talks, 0, b"words")
        assert await taken(worker, await worker.assigned(), 5) == b"words"


@pytest.mark.trio
@pytest.mark.parametrize(
    ("name", "offset", "words"),
    [("text", 6, "input_ack of 6 bytes of input 'text'; 5 were sent"), ("voice", 0, "0 were sent"), ("x", 1, "'x'")],
)
async def test_a_worker_that_took_what_it_never_got_is_disconnected(
    tmp_path: Path, name: str, offset: int, words: str
) -> None:
    async with set_up(tmp_path) as (relay, worker, client):
        client.send(submit := live())
        feed(client, submit, 0, b"hello")
        assign = await worker.assigned()
        assert await taken(worker, assign, 5) == b"hello"
        takes(worker, assign, 2)
        takes(worker, assign, offset, name)
        error = await worker.peer.next()
        assert (error.TYPE, error.code) == ("error", "protocol_error")
        assert words in error.message
        await until(lambda: not relay.relay.workers)
        await relay.goes_on()


@pytest.mark.trio
async def test_a_flood_of_acks_uses_up_the_share_of_the_workers_principal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relayd.core.principals.CPU_SHARE", 0.001)
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as client:
        token = await new_token(relay, "worker", "gpu")
        async with fake_worker(relay.url, token=token, **RULES) as worker:
            await until(lambda: bool(relay.relay.workers))
            client.send(submit := live())
            feed(client, submit, 0, b"hello")
            assign = await worker.assigned()
            for _ in range(5_000):
                takes(worker, assign, 0)
            await until(lambda: relay.relay.principals.usage_of("gpu").cpu.level < 0)
            feed(client, submit, 5, b" you")
            await acked(client, 9)


@pytest.mark.trio
async def test_an_ack_of_an_attempt_that_is_over_is_passed_over(tmp_path: Path) -> None:
    async with set_up(tmp_path) as (relay, worker, client):
        client.send(submit := live())
        assign = await worker.assigned()
        worker.speak(assign, PCM)
        await client.frames(submit)
        for _ in range(100):
            takes(worker, assign, 10**9)
        await worker.peer.settled()
        await relay.goes_on()


@pytest.mark.trio
@pytest.mark.parametrize("inputs", [{"text": 6}, {"nope": 0}])
async def test_a_worker_that_came_back_with_what_was_never_sent_begins_anew(
    tmp_path: Path, inputs: dict[str, int]
) -> None:
    instance = an_id()
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as client:
        async with fake_worker(relay.url, instance=instance, **RULES) as worker:
            await until(lambda: bool(relay.relay.workers))
            client.send(submit := live())
            feed(client, submit, 0, b"hello", last=True)
            assert await taken(worker, await worker.assigned(), 5) == b"hello"
            await worker.peer.cut()
        running = (Running(request_id=submit.request_id, attempt=1, next_seq=0, inputs=inputs),)
        async with fake_worker(relay.url, instance=instance, running=running, **RULES) as worker:
            registered = await worker.peer.next(Registered)
            assert (registered.resume, registered.abandon) == ((), [submit.request_id])
            assign = await worker.assigned()
            assert await taken(worker, assign, 5) == b"hello"
            worker.speak(assign, PCM)
            await client.frames(submit)
        await relay.at_rest()


@pytest.mark.trio
async def test_a_cancelled_or_left_request_takes_no_more(tmp_path: Path) -> None:
    async with set_up(tmp_path, limits={"resume_window_s": 0.05}) as (relay, worker, client):
        client.send(submit := live())
        feed(client, submit, 0, b"hello")
        assign = await worker.assigned()
        await acked(client, 5)
        client.send(Cancel(request_id=submit.request_id))
        await worker.peer.next(Cancel)
        worker.send(Cancelled(**identity(assign, 0)))
        await client.next(Cancelled)
        feed(client, submit, 5, b"too late")
        await client.settled()
        await relay.at_rest()
        client.send(submit := live())
        await worker.assigned()
        await acked(client, 0)
        await client.cut()
        await worker.peer.next(Cancel)


@pytest.mark.trio
async def test_a_detached_request_goes_on_with_its_feeder_away(tmp_path: Path) -> None:
    async with set_up(tmp_path, limits={"resume_window_s": 0}) as (relay, worker, client):
        client.send(submit := live(detach=True))
        feed(client, submit, 0, b"all of it", last=True)
        await acked(client, 9, last=True)
        await client.cut()
        assign = await worker.assigned()
        assert await taken(worker, assign, 9) == b"all of it"
        worker.speak(assign, PCM)
        await relay.at_rest()
        assert relay.relay.requests[submit.request_id].entry.state == "completed"


@pytest.mark.trio
async def test_an_engine_that_waits_for_a_silent_feeder_is_not_held_for_ever(tmp_path: Path) -> None:
    limits = {"feed_idle_timeout_s": 0.2}
    async with set_up(tmp_path, limits=limits, spaces={"tts": {"idle_timeout_s": 0.05}}) as (relay, worker, client):
        client.send(submit := live())
        feed(client, submit, 0, b"hello")
        assign = await worker.assigned()
        await taken(worker, assign, 5)
        failed = await client.next(Failed)
        assert (failed.code, failed.retryable, failed.attempt) == ("feed_timeout", False, 1)
        assert "waits for more of its live input 'text', and nothing came for 0.2 s" in failed.message
        await worker.peer.next(Cancel)
        worker.send(Cancelled(**identity(assign, 0)))
        await relay.at_rest()
        await relay.goes_on()


@pytest.mark.trio
async def test_an_empty_piece_is_a_sign_of_life(tmp_path: Path) -> None:
    async with set_up(tmp_path) as (relay, worker, client):
        client.send(submit := live())
        feed(client, submit, 0, b"hello")
        await taken(worker, await worker.assigned(), 5)
        request = relay.relay.requests[submit.request_id]
        await until(lambda: request.fed["text"].awaits_feeder)
        before = request.deadline(10.0, 5.0, 30.0)
        feed(client, submit, 5, b"")
        await until(lambda: request.deadline(10.0, 5.0, 30.0) > before)
        due_at, expiry = request.deadline(10.0, 5.0, 30.0)
        assert (due_at, expiry.value) == (request.fed["text"].received_at + 30.0, "feed_timeout")
        await relay.goes_on()


@pytest.mark.trio
async def test_a_feeder_may_be_silent_where_the_engine_says_so_while_it_is_there(tmp_path: Path) -> None:
    rules: dict[str, Any] = {"inputs": {"orders": {"live": True, "patient": True}}}
    limits = {"feed_idle_timeout_s": 0.1}
    async with (
        daemon(tmp_path, limits=limits, spaces={"tts": {"idle_timeout_s": 0.05}}) as relay,
        fake_worker(relay.url, **rules) as worker,
        peer(relay.url, "client") as client,
    ):
        await until(lambda: bool(relay.relay.workers))
        client.send(submit := live("orders", params={"text": "x"}, detach=True))
        assign = await worker.assigned()
        await acked(client, 0)
        request = relay.relay.requests[submit.request_id]
        assert request.fed["orders"].is_starving
        assert request.deadline(10.0, 5.0, 0.1)[1].value == "run_timeout"
        feed(client, submit, 0, b"hang up", name="orders")
        await acked(client, 7)
        assert (await worker.peer.next(Input)).data == b"hang up"
        takes(worker, assign, 7, "orders")
        await client.cut()
        await worker.peer.next(Cancel)
        assert (request.code, request.entry.state) == ("feed_timeout", "failed")
        assert "waits for more of its live input 'orders'" in (request.message or "")


@pytest.mark.trio
async def test_a_feeder_may_be_silent_after_a_restart_too(tmp_path: Path) -> None:
    rules: dict[str, Any] = {"inputs": {"orders": {"live": True, "patient": True}}}
    submit = live("orders", params={"text": "x"}, detach=True)
    async with (
        daemon(tmp_path, store="sqlite") as relay,
        fake_worker(relay.url, **rules) as worker,
        peer(relay.url, "client") as client,
    ):
        await until(lambda: bool(relay.relay.workers))
        client.send(submit)
        await worker.assigned()
        await acked(client, 0)
    async with daemon(tmp_path, store="sqlite") as relay:
        assert relay.relay.requests[submit.request_id].fed["orders"].patient


@pytest.mark.trio
async def test_an_engine_that_takes_nothing_of_what_there_is_has_hung(tmp_path: Path) -> None:
    limits = {"feed_idle_timeout_s": 0.05}
    spaces = {"tts": {"idle_timeout_s": 0.2, "max_attempts": 1}}
    async with set_up(tmp_path, limits=limits, spaces=spaces) as (_relay, worker, client):
        client.send(submit := live())
        feed(client, submit, 0, b"hello")
        await taken(worker, await worker.assigned(), 5, ack=False)
        assert (await client.next(Failed)).code == "idle_timeout"


@pytest.mark.trio
@pytest.mark.parametrize(
    ("fields", "code", "details"),
    [
        (
            {"params": {"text": "twice"}},
            "invalid_params",
            {"text": "is given as an input, too; send it only once"},
        ),
        ({"name": "audio"}, "invalid_params", {"text": "is required"}),
        (
            {"name": "voice", "params": {"text": "x"}},
            "invalid_params",
            {"inputs.voice": "must be sent whole, with its size and sha256"},
        ),
        ({"name": "nope", "params": {"text": "x"}}, "invalid_params", {"inputs.nope": "is not accepted"}),
    ],
)
async def test_a_bad_live_input_is_rejected_in_words(
    tmp_path: Path, fields: dict[str, Any], code: str, details: dict[str, str]
) -> None:
    async with set_up(tmp_path) as (relay, _worker, client):
        client.send(live(fields.pop("name", "text"), **fields))
        refusal = await client.next(Rejected, Accepted)
        assert (refusal.code, refusal.details) == (code, details)
        await relay.at_rest()


@pytest.mark.trio
async def test_a_whole_input_stands_for_the_param_of_its_name_as_a_live_one_does(tmp_path: Path) -> None:
    async with set_up(tmp_path) as (_relay, worker, client):
        text = {"text": an_input(b"hello", media_type="text/plain")}
        client.send(a_submit(inputs=text))
        refusal = await client.next(Rejected, Accepted)
        assert (refusal.code, list(refusal.details)) == ("invalid_params", ["text"])
        client.send(submit := a_submit(params={}, inputs=text))
        feed(client, submit, 0, b"hello")
        assert isinstance(await client.next(Rejected, Accepted), Accepted)
        assert (await worker.peer.next(Assign, Input)).params == {}


@pytest.mark.trio
async def test_only_so_many_live_inputs_are_admitted(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as client:
        client.send(live(*(f"i{number}" for number in range(16))))
        assert isinstance(await client.next(Rejected, Accepted), Accepted)
        client.send(live(*(f"i{number}" for number in range(17))))
        refusal = await client.next(Rejected, Accepted)
        assert refusal.code == "invalid_params"
        assert "may have 16 live or piped inputs" in refusal.message


@pytest.mark.trio
async def test_what_is_fed_counts_in_the_share_of_its_principal_while_the_request_lives(tmp_path: Path) -> None:
    limits = {"principal": {"max_input_bytes": 100}}
    async with daemon(tmp_path, limits=limits) as relay, peer(relay.url, "client", await new_token(relay)) as client:
        state = relay.relay.scheduler.state
        client.send(first := live())
        feed(client, first, 0, b"x" * 150)
        await acked(client, 150)
        assert state.input_bytes == {"ann": 150}, "one alone may reach the limit of its request"
        client.send(live())
        refusal = await client.next(Rejected)
        assert (refusal.code, refusal.retry_after_s) == ("rate_limited", 2.0)
        assert "would have 151 bytes, and it may have 100" in refusal.message
        client.send(Cancel(request_id=first.request_id))
        await client.next(Cancelled)
        assert not state.input_bytes
        second, third = live(), live()
        for submit in (second, third):
            client.send(submit)
            feed(client, submit, 0, b"x" * 50)
            await acked(client, 50)
        feed(client, third, 50, b"x")
        failed = await client.next(Failed)
        assert (failed.request_id, failed.code, failed.retryable) == (third.request_id, "rate_limited", True)
        assert state.input_bytes == {"ann": 50}
        assert not state.uploads | state.uploading_bytes
        assert not relay.relay.feeds.pending_bytes


@pytest.mark.trio
async def test_what_is_fed_beside_an_upload_leaves_nothing_behind_in_the_counts(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, peer(relay.url, "client", await new_token(relay)) as client:
        state = relay.relay.scheduler.state
        client.send(submit := live(inputs={"voice": an_input(b"12345")}))
        feed(client, submit, 0, b"x" * 50)
        await until(lambda: state.input_bytes["ann"] == 55)
        assert (state.uploading_bytes["ann"], state.uploads["ann"]) == (5, 1)
        feed(client, submit, 0, b"12345", name="voice")
        await acked(client, 50)
        assert not state.uploads | state.uploading_bytes
        client.send(Cancel(request_id=submit.request_id))
        await client.next(Cancelled)
        assert not state.input_bytes
        await relay.at_rest()


@pytest.mark.trio
async def test_a_request_that_is_never_accepted_leaves_nothing_of_what_was_fed(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as client:
        client.send(submit := live(inputs={"voice": an_input(b"12345")}))
        feed(client, submit, 0, b"x" * 50)
        feed(client, submit, 9, b"of an input with a gap", name="voice")
        assert (await client.next(Rejected)).code == "input_mismatch"
        await until(lambda: not relay.relay.feeds.pending_bytes)
        assert not relay.relay.scheduler.state.input_bytes
        assert not relay.relay.requests


@pytest.mark.trio
async def test_what_waits_for_the_disk_is_bounded_for_all_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "MAX_PENDING_BYTES", 1_000)
    async with daemon(tmp_path, limits={"live_input_bytes_s": 100}) as relay, peer(relay.url, "client") as client:
        first, second = live(), live()
        for submit in (first, second):
            client.send(submit)
            await acked(client, 0)
        feed(client, first, 0, b"x" * 500)
        await acked(client, 500)
        feed(client, first, 500, b"x" * 900)
        feed(client, second, 0, b"y" * 101)
        feed(client, second, 101, b"z")
        fed = relay.relay.requests[second.request_id].fed["text"]
        await until(lambda: fed.waits_for_room)
        assert fed.is_starving
        assert not fed.awaits_feeder  # it is not its feeder that is late
        client.send(Cancel(request_id=first.request_id))
        again = await client.next(InputAck, Rejected)
        assert again == InputAck(request_id=second.request_id, name="text", offset=0, again=True)
        assert not fed.waits_for_room
        feed(client, second, 102, b"!")  # on its way when the relay said that
        feed(client, second, 0, b"y" * 101)
        feed(client, second, 101, b"z!", last=True)
        await acked(client, 103, last=True)
        assert (
            await relay.relay.feeds.read(relay.relay.requests[second.request_id], "text", 0, 999) == b"y" * 101 + b"z!"
        )
        assert not fed.held_back
        client.send(Cancel(request_id=second.request_id))
        await relay.at_rest()
        await until(lambda: relay.relay.feeds.pending_bytes == 0)


@pytest.mark.trio
async def test_many_inputs_share_the_memory_and_the_rest_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "MAX_KEPT_BYTES", 80)
    async with daemon(tmp_path, store="sqlite") as relay, peer(relay.url, "client") as client:
        submits = [live() for _ in range(5)]
        for submit in submits:
            client.send(submit)
            feed(client, submit, 0, submit.request_id.encode())
            await acked(client, 32)
        logs = [relay.relay.requests[submit.request_id].fed["text"] for submit in submits]
        kept = [32 - min(at for at in range(33) if log.kept(at, 1) is not None) for log in logs]
        assert min(kept) == 80 // 5, "of each one the last bytes are there, for the worker that gets them next"
        assert sum(kept) <= 2 * 80
        feed(client, submits[0], 30, submits[0].request_id[30:].encode() + b"more")
        await acked(client, 36)
        async with fake_worker(relay.url, slots=5, **RULES) as worker:
            for _ in submits:
                piece = await worker.peer.next(Input)
                more = b"more" if piece.request_id == submits[0].request_id else b""
                assert piece.data == piece.request_id.encode() + more


@pytest.mark.trio
async def test_nothing_of_an_input_stays_in_memory_when_its_request_has_ended(tmp_path: Path) -> None:
    async with set_up(tmp_path) as (relay, worker, client):
        client.send(submit := live())
        feed(client, submit, 0, b"hello", last=True)
        await acked(client, 5, last=True)
        log = weakref.ref(relay.relay.requests[submit.request_id].fed["text"])
        worker.speak(await worker.assigned(), PCM)
        await client.frames(submit)
        await relay.at_rest()
        gc.collect()
        assert log() is None


@pytest.mark.trio
async def test_a_full_disk_fails_the_request_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with set_up(tmp_path) as (relay, worker, client):
        client.send(submit := live())
        await acked(client, 0)
        commit = relay.relay.store.commit

        async def full(*changes: Any) -> None:
            if isinstance(changes[0], AppendInput):
                raise StorageFull("no space")
            await commit(*changes)

        monkeypatch.setattr(relay.relay.store, "commit", full)
        feed(client, submit, 0, b"hello")
        failed = await client.next(Failed)
        assert (failed.code, failed.retryable) == ("storage_full", True)
        assert "no space left to store input 'text'" in failed.message
        assign = await worker.assigned()
        worker.send(Cancelled(**identity(assign, 0)))
        await relay.at_rest()
        assert relay.relay.feeds.pending_bytes == 0
        await relay.goes_on()
