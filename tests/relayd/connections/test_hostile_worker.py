"""A worker that says anything at all: it costs only its own spaces, and whoever runs the relay is told who it is."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest

from protocol.wire.frames import Audio, Cancelled, Completed, Failed, Output, Progress, Started
from protocol.wire.messages import (
    Ack,
    Assign,
    Cancel,
    Done,
    Registered,
    Rejected,
    Steer,
    Submit,
)
from protocol.wire.structs import Running
from tests.relayd.connections.audio_frames import PCM, heard
from tests.support.fake_worker import FORMAT, FakeWorker, fake_worker, identity, samples
from tests.support.relay import Daemon, Peer, a_submit, an_id, daemon, kept_logs, new_token, peer, until

#: Most log lines that an attack leaves behind, those of the honest included.
MAX_LINES = 90


@attrs.define(eq=False)
class Scene:
    """A relay on which an honest worker is speaking in the space `check`, and the attacker may serve `tts`."""

    relay: Daemon
    logs: list[Any]
    worker_token: str
    client: Peer
    #: Of the honest: the worker, what it is doing, and who listens.
    honest: FakeWorker
    assign: Assign
    listener: Peer

    @asynccontextmanager
    async def attacker(self, **register: Any) -> AsyncIterator[FakeWorker]:
        """A worker with the token of the principal `mallory`."""
        async with fake_worker(self.relay.url, token=self.worker_token, **register) as worker:
            yield worker

    @asynccontextmanager
    async def assigned(self, **fields: Any) -> AsyncIterator[tuple[FakeWorker, Assign, Submit]]:
        """The attacker, registered, and a request that it was assigned."""
        async with self.attacker() as worker:
            submit = a_submit(**fields)
            self.client.send(submit)
            yield worker, await worker.assigned(), submit

    def lines(self, *events: str) -> list[Any]:
        """What was logged of these events."""
        return [line for line in self.logs if line["event"] in events]


@asynccontextmanager
async def scene(tmp_path: Path, *, max_lines: int = MAX_LINES, **overrides: Any) -> AsyncIterator[Scene]:
    """An attack is made inside the block; afterwards everybody else must have what they would have had without it."""
    with kept_logs() as logs:
        overrides = {"spaces": {"tts": {"max_workers": 2, "max_attempts": 2}}, **overrides}
        async with daemon(tmp_path, **overrides) as relay:
            good = await new_token(relay, "worker", "good", spaces=["check"])
            mallory = await new_token(relay, "worker", "mallory", spaces=["tts"])
            ann, bob = [await new_token(relay, "client", name) for name in ("ann", "bob")]
            async with (
                fake_worker(relay.url, name="honest", token=good, spaces=("check",)) as honest,
                peer(relay.url, "client", bob) as listener,
                peer(relay.url, "client", ann) as client,
            ):
                submit = a_submit(space="check")
                listener.send(submit)
                assign = await honest.assigned()
                honest.speak(assign, PCM[:2], end=False)
                yield Scene(relay, logs, mallory, client, honest, assign, listener)
                honest.speak(assign, PCM, first=3)
                assert heard(await listener.frames(submit)) == b"".join(PCM), "the honest listener's samples"
                assert (await honest.peer.next(Ack)).request_id == submit.request_id
                assert honest.peer.link.gone is None
        assert [line for line in logs if line["log_level"] in ("error", "critical")] == []
        assert len(logs) < max_lines


def frame_of(assign: Assign, **other: Any) -> dict[str, Any]:
    """The identity of the next frame of an assignment, with what the attacker says instead."""
    return identity(assign, 0) | other


# -- other people's requests


@pytest.mark.trio
@pytest.mark.parametrize("kind", [Started, Progress, Audio, Output, Completed, Failed, Cancelled])
@pytest.mark.parametrize("attempt", [0, 1, 2, 1_000_000])
async def test_no_frame_reaches_a_request_of_another_worker(tmp_path: Path, kind: type, attempt: int) -> None:
    more = {
        Started: {"format": FORMAT},
        Audio: {"pcm": samples(10, 7)},
        Failed: {"code": "engine_failed", "message": "no", "retryable": True},
    }.get(kind, {})
    async with scene(tmp_path) as at, at.attacker() as worker:
        await worker.peer.next(Registered)
        queued = a_submit(space="check")
        at.listener.send(queued)
        for request_id in (at.assign.request_id, queued.request_id, an_id()):
            for seq in (0, 3, 2**31):
                worker.send(kind(request_id=request_id, attempt=attempt, seq=seq, **more))
        await worker.peer.settled()
        entries = at.relay.relay.scheduler.state.entries
        assert entries[at.assign.request_id].state == "running"
        assert at.relay.relay.requests[at.assign.request_id].log.next_seq == 3
        assert entries[queued.request_id].state == "queued"
        at.listener.send(Cancel(request_id=queued.request_id))


@pytest.mark.trio
async def test_a_worker_takes_no_request_of_another_space_by_naming_it_as_running(tmp_path: Path) -> None:
    async with scene(tmp_path) as at:
        queued, known = a_submit(space="check"), at.assign.request_id
        at.listener.send(queued)
        running = [
            Running(request_id=request_id, attempt=attempt, next_seq=seq)
            for request_id in (known, queued.request_id, an_id())
            for attempt in (0, 1, 2, 1_000_000)
            for seq in (0, 2**31)
        ]
        async with at.attacker(running=running) as worker:
            registered = await worker.peer.next(Registered)
            assert registered.resume == ()
            assert set(registered.abandon) >= {known, queued.request_id}
        at.listener.send(Cancel(request_id=queued.request_id))


@pytest.mark.trio
@pytest.mark.parametrize("gone", ["connected", "away", "away with nothing to do"])
async def test_a_worker_id_of_another_principal_cannot_be_taken(tmp_path: Path, gone: str) -> None:
    async with scene(tmp_path) as at:
        token = await new_token(at.relay, "worker", "owner", spaces=["other"])
        async with peer(at.relay.url, "operator") as operator:
            operator.send(Steer(action="create_space", target="other", options={"max_workers": 2}))
            await operator.next(Done)
        submit, instance = a_submit(space="other", detach=True), an_id()
        owner = {"name": "box", "instance": instance, "token": token, "spaces": ("other",)}
        async with fake_worker(at.relay.url, **owner) as worker:
            registered = await worker.peer.next(Registered)
            if gone != "away with nothing to do":
                at.listener.send(submit)
                assign = await worker.assigned()
                worker.speak(assign, PCM[:1], end=False)
                await worker.peer.settled()
            if gone != "connected":
                await worker.peer.cut()
                await until(lambda: not at.relay.relay.workers.get(registered.worker_id))
            async with at.attacker(name="box", instance=instance) as thief:
                refusal = await thief.peer.next(Rejected)
                assert (refusal.code, "another principal" in refusal.message) == ("forbidden", True)
                if gone == "connected":
                    worker.speak(assign, PCM, first=2)
        if gone != "connected":
            running = [Running(request_id=submit.request_id, attempt=1, next_seq=2)]
            async with fake_worker(at.relay.url, **owner, running=running) as worker:
                back = await worker.peer.next(Registered)
                assert back.worker_id == registered.worker_id
                assert len(back.resume) == (gone == "away")
                if gone == "away":
                    worker.speak(assign, PCM, first=2)
                    await until(lambda: not at.relay.relay.requests[submit.request_id].live)
        if gone != "away with nothing to do":
            assert at.relay.relay.requests[submit.request_id].entry.state == "completed"


@pytest.mark.trio
async def test_a_namesake_of_another_principal_does_not_end_what_it_waits_for(tmp_path: Path) -> None:
    async with scene(tmp_path, spaces={"tts": {}, "other": {}}) as at:
        token = await new_token(at.relay, "worker", "owner", spaces=["tts", "other"])
        submit = a_submit(space="other", detach=True)
        async with fake_worker(at.relay.url, name="box", token=token, spaces=("tts", "other")) as worker:
            at.listener.send(submit)
            worker.speak(await worker.assigned(), PCM[:1], end=False)
            await worker.peer.settled()
            await worker.peer.cut()
        async with at.attacker(name="box") as namesake:
            await namesake.peer.next(Registered)
            await namesake.peer.settled()
            assert at.relay.relay.scheduler.state.entries[submit.request_id].state == "running"
        at.listener.send(Cancel(request_id=submit.request_id))


@pytest.mark.trio
async def test_after_a_restart_only_who_may_serve_its_spaces_is_the_worker_that_was_away(tmp_path: Path) -> None:
    settings = {"store": "sqlite", "spaces": {"tts": {}, "other": {}}}
    instance, submit = an_id(), a_submit(space="other", detach=True)
    owner = {"name": "box", "instance": instance, "spaces": ("other",)}
    async with daemon(tmp_path, **settings) as relay, peer(relay.url, "client") as client:
        mallory = await new_token(relay, "worker", "mallory", spaces=["tts"])
        async with fake_worker(relay.url, **owner) as worker:
            client.send(submit)
            assign = await worker.assigned()
            worker.speak(assign, PCM[:1], end=False)
            await client.next(Audio)
    async with daemon(tmp_path, **settings) as relay:
        async with fake_worker(relay.url, name="box", instance=instance, token=mallory) as thief:
            assert (await thief.peer.next(Rejected)).code == "forbidden"
        running = [Running(request_id=submit.request_id, attempt=1, next_seq=2)]
        async with fake_worker(relay.url, **owner, running=running) as worker:
            assert len((await worker.peer.next(Registered)).resume) == 1
            worker.speak(assign, PCM[:1])
            await relay.at_rest()
            assert relay.relay.requests[submit.request_id].entry.state == "completed"
