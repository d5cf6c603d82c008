"""Attempts that are lost: counted, never a fourth, named in the log; and where a lost request stands in the queue."""

from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from protocol.client.stream import Stream
from protocol.wire.frames import (
    Audio,
    Cancelled,
    Failed,
    Frame,
)
from protocol.wire.messages import (
    Ack,
    Attach,
    Cancel,
    Registered,
    Status,
    StatusReply,
)
from protocol.wire.structs import Running
from tests.support.fake_worker import FORMAT, fake_worker, samples
from tests.support.relay import Daemon, Peer, a_submit, an_id, daemon, kept_logs, peer, until

PCM = [samples(1_000, seed) for seed in (1, 2, 3)]
SOON: dict[str, Any] = {"limits": {"worker_grace_s": 0.05}}


async def take_down(relay: Daemon, number: int, **worker: Any) -> int:
    """A worker that is handed a request and dies of it; the attempt."""
    async with fake_worker(relay.url, name=f"box{number}", **worker) as box:
        assign = await box.assigned()
        await box.peer.cut()
    return assign.attempt


async def state_of(client: Peer, request_id: str) -> StatusReply:
    client.send(Status(request_id=request_id))
    reply: StatusReply = await client.next(StatusReply)
    return reply


@pytest.mark.trio
async def test_a_request_that_takes_three_workers_down_fails_and_is_named_in_the_log(tmp_path: Path) -> None:
    with kept_logs() as logs:
        async with daemon(tmp_path, **SOON) as relay, peer(relay.url, "client") as client:
            bad, good = a_submit("kills"), a_submit()
            client.send(bad)
            assert [await take_down(relay, number) for number in (1, 2, 3)] == [1, 2, 3]
            (failed,) = await client.frames(bad)
            assert isinstance(failed, Failed)
            assert failed.code == "worker_lost"
            assert "3 attempts have been lost" in failed.message
            async with fake_worker(relay.url, name="box4") as fourth:
                client.send(good)
                assign = await fourth.assigned()
                assert assign.request_id == good.request_id, "never a fourth"
                fourth.speak(assign, PCM)
                assert len(await client.frames(good)) == 5
            await relay.at_rest()
    (named,) = [line for line in logs if line["event"] == "request failed"]
    assert (named["request_id"], named["code"]) == (bad.request_id, "worker_lost")
    assert "given up" in named["why"]
    started = [line["worker"].rpartition("-")[0] for line in logs if line["event"] == "request started"]
    assert started == ["box1", "box2", "box3", "box4"], "and which workers it took down"


@pytest.mark.trio
async def test_an_attempt_that_goes_on_has_time_to_get_there(tmp_path: Path) -> None:
    async with daemon(tmp_path, **SOON) as relay, peer(relay.url, "client") as client:
        client.send(submit := a_submit())
        async with fake_worker(relay.url, reproducible=True) as first:
            assign = await first.assigned()
            request = relay.relay.requests[submit.request_id]
            await trio.sleep(0.05)  # it works
            first.speak(assign, PCM, end=False)
            await client.next(Audio)
            await first.peer.cut()
        async with fake_worker(relay.url, reproducible=True) as second:
            assign = await second.assigned()
            assert assign.from_seq
            assert 0.05 <= request.made_s < 10.0
            assert request.catches_up_until == request.attempt_started_at + 2 * request.made_s
            second.speak(assign, PCM)
            await client.frames(submit, 2)
        await relay.at_rest()


@pytest.mark.trio
async def test_losses_are_counted_across_a_restart_of_the_relay(tmp_path: Path) -> None:
    bad = a_submit(detach=True)
    sqlite = SOON | {"store": "sqlite"}
    async with daemon(tmp_path, **sqlite) as relay, peer(relay.url, "client") as client:
        client.send(bad)
        for number in (1, 2):
            await take_down(relay, number)
        entry = relay.relay.requests[bad.request_id].entry
        await until(lambda: (entry.state, entry.losses) == ("queued", 2))
        await relay.relay.store.flush()
    async with daemon(tmp_path, **sqlite) as relay, peer(relay.url, "client") as client:
        assert (await state_of(client, bad.request_id)).state == "queued"
        assert await take_down(relay, 3) > 2
        await until(lambda: not relay.relay.requests[bad.request_id].live)
        reply = await state_of(client, bad.request_id)
        assert (reply.state, reply.code) == ("failed", "worker_lost")
        await relay.at_rest()


@pytest.mark.trio
async def test_two_losses_cost_a_reproducible_listener_nothing(tmp_path: Path) -> None:
    same: dict[str, Any] = {"reproducible": True, "fingerprint": "a"}
    async with daemon(tmp_path, **SOON) as relay, peer(relay.url, "client") as client:
        submit = a_submit()
        client.send(submit)
        heard: list[bytes] = []
        for number in (0, 1):
            async with fake_worker(relay.url, name=f"box{number}", **same) as worker:
                assign = await worker.assigned()
                assert (assign.attempt, assign.from_seq) == (number + 1, number + (number > 0))
                worker.speak(assign, PCM[: number + 1], first=assign.from_seq, end=False)
                heard.append((await client.next(Audio)).pcm)
                await worker.peer.cut()
        async with fake_worker(relay.url, name="last", **same) as worker:
            assign = await worker.assigned()
            worker.speak(assign, PCM, first=assign.from_seq)
            frames = await client.frames(submit, first=3)
            await worker.peer.next(Ack)
        assert [*heard, *(frame.pcm for frame in frames if isinstance(frame, Audio))] == PCM
        await relay.at_rest()


@pytest.mark.trio
@pytest.mark.parametrize("restarted", [False, True])
async def test_a_lost_request_keeps_its_priority_and_its_place(tmp_path: Path, restarted: bool) -> None:
    low, low_too, middle, middle_too, high = (a_submit(priority=n, detach=True) for n in (3, 3, 5, 5, 9))
    order = [high, middle, middle_too, low, low_too]
    sqlite = SOON | {"store": "sqlite"}
    async with (
        daemon(tmp_path, **sqlite) as relay,
        peer(relay.url, "client") as client,
        fake_worker(relay.url, slots=2) as worker,
    ):
        await worker.peer.next(Registered)
        for submit in (low, middle):  # they run; the others come later
            client.send(submit)
            await worker.assigned()
        for submit in (low_too, high, middle_too):
            client.send(submit)
        await until(lambda: len(relay.relay.scheduler.state.spaces["tts"].queue) == 3)
        await relay.relay.store.flush()
        if not restarted:
            await worker.peer.cut()
            await until(lambda: len(relay.relay.scheduler.state.spaces["tts"].queue) == 5)
            await _run(relay, order)
    if restarted:
        async with daemon(tmp_path, **sqlite) as relay:
            await until(lambda: len(relay.relay.scheduler.state.spaces["tts"].queue) == 5)
            await _run(relay, order)


async def _run(relay: Daemon, order: list[Any]) -> None:
    async with fake_worker(relay.url, name="next") as worker:
        with trio.fail_after(10):
            for submit in order:
                assign = await worker.assigned()
                assert assign.request_id == submit.request_id
                worker.speak(assign, PCM)
        await relay.at_rest()


@pytest.mark.trio
@pytest.mark.parametrize("retry", ["never", "before_output"])
async def test_an_assignment_that_a_relay_kill_swallowed_is_handed_out_again(tmp_path: Path, retry: str) -> None:
    submit, instance = a_submit(detach=True, retry=retry), an_id()
    sqlite: dict[str, Any] = {"store": "sqlite", "limits": {"worker_grace_s": 60}}
    async with (
        daemon(tmp_path, **sqlite) as relay,
        fake_worker(relay.url, instance=instance) as worker,
        peer(relay.url, "client") as client,
    ):
        client.send(submit)
        first = await worker.assigned()
        await relay.relay.store.flush()
    async with daemon(tmp_path, **sqlite) as relay, peer(relay.url, "client") as client:
        client.send(Attach(request_id=submit.request_id, attempt=0, after_seq=-1))
        async with fake_worker(relay.url, instance=instance) as worker:
            assign = await worker.assigned()
            assert assign.request_id == submit.request_id
            assert assign.attempt > first.attempt
            worker.speak(assign, PCM)
            assert len(await client.frames(submit)) == 5
            await relay.at_rest()


@pytest.mark.trio
async def test_a_worker_that_was_started_anew_while_the_relay_was_away_is_not_awaited(tmp_path: Path) -> None:
    submit = a_submit(detach=True, retry="never")
    sqlite: dict[str, Any] = {"store": "sqlite", "limits": {"worker_grace_s": 60}}
    async with (
        daemon(tmp_path, **sqlite) as relay,
        fake_worker(relay.url) as worker,
        peer(relay.url, "client") as client,
    ):
        client.send(submit)
        await worker.assigned()
        await relay.relay.store.flush()
    async with daemon(tmp_path, **sqlite) as relay, peer(relay.url, "client") as client:
        client.send(Attach(request_id=submit.request_id, attempt=0, after_seq=-1))
        async with fake_worker(relay.url):
            (failed,) = await client.frames(submit)
            assert isinstance(failed, Failed)
            assert "was restarted" in failed.message
            await relay.at_rest()


@pytest.mark.trio
async def test_a_listener_of_an_attempt_before_the_last_hears_the_last_anew_after_a_restart(tmp_path: Path) -> None:
    submit, instance = a_submit(detach=True, retry="always"), an_id()
    sqlite: dict[str, Any] = {"store": "sqlite", "limits": {"worker_grace_s": 0.05}}
    others = [samples(1_000, seed) for seed in (4, 5, 6)]
    async with daemon(tmp_path, **sqlite) as relay, peer(relay.url, "client") as client:
        client.send(submit)
        async with fake_worker(relay.url, name="first") as worker:
            worker.speak(await worker.assigned(), PCM, end=False)
            await until(lambda: relay.relay.requests[submit.request_id].log.next_seq == 4)
            await worker.peer.cut()
        async with fake_worker(relay.url, name="second", instance=instance) as worker:
            assign = await worker.assigned()
            assert assign.attempt == 2
            await relay.relay.store.flush()
    running = (Running(request_id=submit.request_id, attempt=2, next_seq=4),)
    async with (
        daemon(tmp_path, **sqlite) as relay,
        fake_worker(relay.url, name="second", instance=instance, running=running) as worker,
    ):
        worker.speak(assign, others, end=False)
        await until(lambda: relay.relay.requests[submit.request_id].log.next_seq == 4)
        async with peer(relay.url, "client") as client:  # it had all of the first attempt, and nothing of the second
            client.send(Attach(request_id=submit.request_id, attempt=1, after_seq=3))
            worker.speak(assign, others, first=4)
            frames = await client.frames(submit)
        assert [frame.pcm for frame in frames if isinstance(frame, Audio)] == others
        await relay.at_rest()


@pytest.mark.trio
async def test_what_a_worker_takes_up_again_after_it_was_given_up_is_stored_as_running(tmp_path: Path) -> None:
    submit, instance = a_submit(detach=True), an_id()
    async with daemon(tmp_path, **(SOON | {"store": "sqlite"})) as relay, peer(relay.url, "client") as client:

        async def stored() -> tuple[str, str | None, int]:
            (record,) = (await relay.relay.store.load()).requests
            return record.state, record.worker_id, record.losses

        client.send(submit)
        async with fake_worker(relay.url, instance=instance) as worker:
            assign = await worker.assigned()
            await worker.peer.cut()
        request = relay.relay.requests[submit.request_id]
        await until(lambda: request.entry.state == "queued")
        assert request.queued_at > request.entry.started_at, "what it may wait begins anew"
        assert await stored() == ("queued", None, 1)
        running = (Running(request_id=submit.request_id, attempt=1, next_seq=0),)
        async with fake_worker(relay.url, instance=instance, running=running) as worker:
            await worker.peer.next(Registered)
            assert await stored() == ("running", f"box-{instance[:8]}", 0)
            assert relay.relay.stats.space("tts").resumed == 1
            worker.speak(assign, PCM)
            await worker.peer.next(Ack)
        await relay.at_rest()


@pytest.mark.trio
@pytest.mark.parametrize("first_back", ["listener", "former worker", "former worker, not for long"])
@pytest.mark.parametrize("reproducible", [True, False])
async def test_a_listener_that_has_heard_an_attempt_which_was_not_stored_yet_gets_its_end(
    tmp_path: Path, first_back: str, reproducible: bool
) -> None:
    """It drops frames of earlier attempts: were the worker of one to go on, it would hear nothing for ever."""
    submit, former, latter = a_submit(detach=True, retry="always"), an_id(), an_id()
    same: dict[str, Any] = {"reproducible": reproducible, "fingerprint": "a"}
    before = PCM if reproducible else [samples(1_000, seed) for seed in (4, 5, 6)]
    sqlite: dict[str, Any] = {"store": "sqlite", "spaces": {"tts": {"max_workers": 2}}}
    async with (
        daemon(tmp_path, **sqlite) as relay,
        peer(relay.url, "client") as client,
        fake_worker(relay.url, name="former", instance=former, **same) as worker,
    ):
        client.send(submit)
        assign = await worker.assigned()
        await relay.relay.store.flush()
    # As if the second attempt had begun, on another worker, and the relay been killed before that was written:
    named = [(Running(request_id=submit.request_id, attempt=number, next_seq=3),) for number in (1, 2)]
    heard = Attach(request_id=submit.request_id, attempt=2, after_seq=1)
    async with daemon(tmp_path, **sqlite) as relay, peer(relay.url, "client") as client:
        if first_back == "listener":
            client.send(heard)
            await client.settled()
        async with fake_worker(relay.url, name="former", instance=former, running=named[0], **same) as worker:
            told = await worker.peer.next(Registered)
            assert told.abandon == ([submit.request_id] if first_back == "listener" else [])
            if first_back != "listener":
                worker.speak(assign, before, end=False)
                await until(lambda: relay.relay.requests[submit.request_id].log.next_seq == 4)
                if first_back != "former worker":
                    await worker.peer.cut()
                    await until(lambda: not relay.relay.workers)
                client.send(heard)
                if first_back == "former worker":
                    await worker.peer.next(Cancel)
                await client.settled()
            async with fake_worker(relay.url, name="latter", instance=latter, running=named[1], **same) as other:
                await other.peer.next(Registered)
                other.speak(attrs.evolve(assign, attempt=2), PCM)
                listener = Stream(submit.request_id, after_seq=1, attempt=2)
                listener.format = FORMAT
                while not listener.ended:
                    listener.on_message(await client.next(Frame))
                if first_back == "former worker":
                    worker.send(Cancelled(request_id=submit.request_id, attempt=1, seq=4, reason="told so"))
                heard_pcm = [frame.pcm async for frame in listener if isinstance(frame, Audio)]
                assert (heard_pcm, listener.attempt, listener.restarts) == (PCM[1:], 2, 0)
                await relay.at_rest()
