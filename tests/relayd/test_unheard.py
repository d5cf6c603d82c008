"""A request that has ended is safe until its listeners have heard the end: the worker keeps its frames until then."""

from pathlib import Path

import pytest
import trio

from protocol.messages import (
    Accepted,
    Ack,
    Assign,
    Attach,
    Audio,
    Completed,
    Registered,
    Running,
    Submit,
)
from relayd import app
from relayd.requests import Request
from tests.relayd.harness import Cable, Daemon, FakeWorker, a_submit, an_id, daemon, fake_worker, peer, samples, until

#: Half a MiB each: more than the kernel takes for a client that does not read.
PCM = [samples(1_000, seed) * 250 for seed in (1, 2, 3)]


async def silent(worker: FakeWorker) -> None:
    """The worker is told nothing for as long as a question and its answer take."""
    with pytest.raises(trio.TooSlowError), trio.fail_after(0.1):
        await worker.peer.next(Ack)


async def begun(worker: FakeWorker, submit: Submit, pcm: list[bytes] = PCM) -> Assign:
    assign = await worker.assigned()
    assert assign.request_id == submit.request_id
    worker.speak(assign, pcm, end=False)
    return assign


def finish(worker: FakeWorker, assign: Assign) -> None:
    worker.send(Completed(request_id=assign.request_id, attempt=assign.attempt, seq=4, result={"chunks": 3}))


@pytest.mark.trio
async def test_the_end_is_acknowledged_once_the_listener_has_it(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url) as worker, peer(relay.url, "client") as client:
        submit = a_submit()
        client.send(submit)
        finish(worker, await begun(worker, submit))
        await client.next(Completed)
        assert (await worker.peer.next(Ack)).seq == 4
        await relay.at_rest()


@pytest.mark.trio
async def test_the_end_of_a_detached_request_is_acknowledged_at_once(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url) as worker:
        async with peer(relay.url, "client") as client:
            submit = a_submit(detach=True)
            client.send(submit)
            await client.next(Accepted)
        assign = await begun(worker, submit)
        await until(lambda: not relay.relay.requests[submit.request_id].holders)
        finish(worker, assign)
        assert (await worker.peer.next(Ack)).seq == 4


@pytest.mark.trio
async def test_the_end_of_one_that_nobody_asks_for_again_is_acknowledged_after_the_resume_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "REAP_INTERVAL_S", 0.02)
    async with daemon(tmp_path, limits={"resume_window_s": 0.3}) as relay, fake_worker(relay.url) as worker:
        request = await ended_unheard(relay, worker)
        await until(lambda: request.owed is None)
        assert (await worker.peer.next(Ack)).seq == 4


async def ended_unheard(relay: Daemon, worker: FakeWorker) -> Request:
    """A request that ends while its client takes nothing, and whose client is then cut off."""
    cable = Cable()
    async with peer(relay.url, "client", connect_to=cable.connect) as client:
        submit = a_submit()
        client.send(submit)
        assign = await begun(worker, submit, PCM[:1])
        await client.next(Audio)
        cable.pulled = True
        worker.speak(assign, PCM, first=2)
        request = relay.relay.requests[submit.request_id]
        await until(lambda: not request.live)
        assert request.owed is not None
        (link,) = [each for each in relay.relay.clients.values() if each.principal.role == "client"]
        link.link.abort("the network is gone")
    return request


@pytest.mark.trio
async def test_a_relay_killed_before_the_end_was_heard_gets_it_from_the_worker_again(tmp_path: Path) -> None:
    instance = an_id()
    async with (
        daemon(tmp_path, store="sqlite") as relay,
        fake_worker(relay.url, instance=instance) as worker,
    ):
        request = await ended_unheard(relay, worker)
        await silent(worker)
        await relay.relay.store.flush()
    request_id = request.request_id
    running = (Running(request_id=request_id, attempt=1, next_seq=5),)
    async with (
        daemon(tmp_path, store="sqlite") as relay,
        peer(relay.url, "client") as client,
        fake_worker(relay.url, instance=instance, running=running) as worker,
    ):
        registered = await worker.peer.next(Registered)
        assert [(one.request_id, one.next_seq) for one in registered.resume] == [(request_id, 0)]
        client.send(Attach(request_id=request_id, attempt=1, after_seq=1))
        await client.next(Accepted)
        assign = Assign(request_id=request_id, attempt=1, space="tts", principal="x", run_timeout_s=1.0)
        worker.speak(assign, PCM)
        heard: dict[int, bytes] = {}
        while True:
            frame = await client.next(Audio, Completed)
            if isinstance(frame, Completed):
                break
            heard[frame.seq] = frame.pcm
        assert [heard[seq] for seq in (2, 3)] == PCM[1:]
        assert (await worker.peer.next(Ack)).seq == 4
        await relay.at_rest()


@pytest.mark.trio
async def test_a_worker_that_comes_back_is_told_to_forget_what_has_ended(tmp_path: Path) -> None:
    instance = an_id()
    async with daemon(tmp_path) as relay:
        async with fake_worker(relay.url, instance=instance) as worker:
            request = await ended_unheard(relay, worker)
        running = (Running(request_id=request.request_id, attempt=1, next_seq=5),)
        async with fake_worker(relay.url, instance=instance, running=running) as worker:
            assert (await worker.peer.next(Registered)).abandon == [request.request_id]
            assert request.owed is None
        async with peer(relay.url, "client") as client:  # the relay has it all
            client.send(Attach(request_id=request.request_id))
            assert (await client.next(Completed)).seq == 4


@pytest.mark.trio
async def test_one_that_ends_while_its_client_is_away_waits_for_it_through_the_resume_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "REAP_INTERVAL_S", 0.01)
    async with daemon(tmp_path) as relay, fake_worker(relay.url) as worker:
        async with peer(relay.url, "client") as client:
            submit = a_submit()
            client.send(submit)
            assign = await begun(worker, submit)
            await client.next(Audio)
        request = relay.relay.requests[submit.request_id]
        await until(lambda: not request.holders)
        finish(worker, assign)
        await until(lambda: not request.live)
        await silent(worker)
        async with peer(relay.url, "client") as client:
            client.send(Attach(request_id=submit.request_id))
            await client.next(Completed)
            assert (await worker.peer.next(Ack)).seq == 4


@pytest.mark.trio
async def test_a_slow_listener_that_is_cut_long_after_the_end_has_its_whole_resume_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "REAP_INTERVAL_S", 0.01)
    async with daemon(tmp_path, results={"retain_s": 10_000}) as relay, fake_worker(relay.url) as worker:
        request = await ended_unheard(relay, worker)
        await until(lambda: request.unheld_at is not None)
        request.ended_at = trio.current_time() - 1_000  # it read for that long before it was cut
        await silent(worker)
        assert request.owed is not None
