"""What a client is told while the worker of its request is away, over the WebSocket and over HTTP."""

from pathlib import Path

import pytest

from protocol.wire.frames import Audio, Started
from protocol.wire.messages import Attach, Failed, Message, Queued, Registered, WorkerAway, WorkerBack
from protocol.wire.structs import Running
from tests.relayd.connections.audio_frames import PCM
from tests.support.fake_worker import FORMAT, fake_worker, identity
from tests.support.raw_http_client import events_of, visitor
from tests.support.relay import a_submit, an_id, daemon, peer


@pytest.mark.trio
async def test_a_reader_hears_that_the_worker_is_away_and_that_it_is_back(tmp_path: Path) -> None:
    submit, instance = a_submit(), an_id()
    async with daemon(tmp_path, limits={"worker_grace_s": 60}) as relay, peer(relay.url, "client") as client:
        async with fake_worker(relay.url, instance=instance) as worker:
            client.send(submit)
            assign = await worker.assigned()
            worker.speak(assign, PCM[:1], end=False)
            await client.next(Audio)
            await worker.peer.cut()
        away = await client.next(WorkerAway)
        assert away.request_id == submit.request_id
        assert 55 < away.wait_s <= 60, "it has been heard, so the whole grace period"
        async with peer(relay.url, "client") as later, visitor(relay.url) as http:
            later.send(Attach(request_id=submit.request_id, attempt=1, after_seq=1))
            assert 55 < (await later.next(WorkerAway)).wait_s <= 60, "whoever comes meanwhile hears it as well"
            answer = await http.open("GET", f"/v1/requests/{submit.request_id}/events")
            await answer.until(b"event: audio")
            running = (Running(request_id=submit.request_id, attempt=1, next_seq=2),)
            async with fake_worker(relay.url, instance=instance, running=running) as worker:
                await worker.peer.next(Registered)
                for each in (client, later):
                    assert (await each.next(WorkerBack)).attempt == 1
                await answer.until(b"event: worker_back")
                worker.speak(assign, PCM, first=2)
                await answer.rest()
        told = [kind for kind, *_ in events_of(answer.body)]
        assert told[0] == "worker_away"
        assert told.index("worker_back") < told.index("completed")
        await relay.at_rest()


@pytest.mark.trio
async def test_a_request_that_waits_again_says_why(tmp_path: Path) -> None:
    submit = a_submit()
    async with daemon(tmp_path, limits={"worker_grace_s": 0.05}) as relay, peer(relay.url, "client") as client:
        async with fake_worker(relay.url) as worker:
            client.send(submit)
            worker.send(Started(**identity(await worker.assigned(), 0), format=FORMAT))
            await client.next(Started)
            await worker.peer.cut()
        assert isinstance(await client.next(WorkerAway, Queued), WorkerAway)
        place = await client.next(Queued)
        assert (place.position, place.of, place.code) == (1, 1, "worker_lost")
        assert "did not reconnect" in place.message
        async with visitor(relay.url) as http:
            answer = await http.open("GET", f"/v1/requests/{submit.request_id}/events")
            await answer.until(b'did not reconnect"}\n\n')
            told = next(told for kind, _id, told in events_of(answer.body) if kind == "queued")
            assert (told["code"], told["message"]) == ("worker_lost", place.message)
        async with fake_worker(relay.url, name="other") as worker:
            assign = await worker.assigned()
            assert (await client.next(WorkerBack)).attempt == 2
            worker.speak(assign, PCM)
        await relay.at_rest()


@pytest.mark.trio
async def test_a_first_attempt_and_a_failed_engine_are_told_as_what_they_are(tmp_path: Path) -> None:
    submit = a_submit()
    async with (
        daemon(tmp_path) as relay,
        fake_worker(relay.url) as worker,
        peer(relay.url, "client") as client,
    ):
        client.send(submit)
        assign = await worker.assigned()
        worker.send(Started(**identity(assign, 0), format=FORMAT))
        first: Message = await client.next(Started, WorkerBack, WorkerAway)
        assert isinstance(first, Started)
        crash = "the engine crashed"
        worker.send(Failed(**identity(assign, 1), code="engine_failed", message=crash, retryable=True))
        back = await client.next(WorkerBack, WorkerAway)
        assert isinstance(back, WorkerBack), "the next attempt begins at once: nothing is away"
        assert back.attempt == 2
        worker.speak(await worker.assigned(), PCM)
        await relay.at_rest()
