"""A request over which the relay's own code fails ends by itself: the daemon, and every other request, go on."""

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from protocol.wire.frames import Failed
from protocol.wire.messages import Assign, Attach, Cancel, Error, Rejected, Status, StatusReply
from relayd.core import relay as relay_module
from relayd.requests import final_frame
from relayd.store.database import DATABASE_NAME
from tests.support.fake_worker import fake_worker, identity, samples
from tests.support.relay import Daemon, Peer, a_submit, an_id, daemon, peer, until

PCM = [samples(1_000, seed) for seed in (1, 2)]


class OurMistake(Exception):
    """As a field that does not fit its message would raise."""


def raises_once(real: Callable[..., Any], request_id: str, hits: list[str]) -> Callable[..., Any]:
    """A message class that cannot be built for one request, the first time."""

    def build(**fields: Any) -> Any:
        if fields["request_id"] == request_id and not hits:
            hits.append(request_id)
            raise OurMistake(request_id)
        return real(**fields)

    return build


async def state_of(client: Peer, request_id: str) -> str:
    client.send(Status(request_id=request_id))
    reply: StatusReply = await client.next(StatusReply)
    return reply.state


async def one_more_is_served(relay: Daemon, client: Peer) -> None:
    async with fake_worker(relay.url, name="sound", instance=an_id()) as worker:
        good = a_submit()
        client.send(good)
        worker.speak(await worker.assigned(), PCM)
        assert len(await client.frames(good)) == 4


@pytest.mark.trio
@pytest.mark.parametrize("retry", ["before_output", "never"])
async def test_an_assign_that_cannot_be_built_ends_its_request_and_frees_the_slot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, retry: str
) -> None:
    bad, hits = a_submit(retry=retry), list[str]()
    monkeypatch.setattr("relayd.connections.worker.Assign", raises_once(Assign, bad.request_id, hits))
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as client:
        client.send(bad)
        async with fake_worker(relay.url, instance=an_id()) as worker:
            await until(lambda: bool(hits) and not relay.relay.requests[bad.request_id].live)
            assert await state_of(client, bad.request_id) == "failed"
            good = a_submit()
            client.send(good)
            worker.speak(await worker.assigned(), PCM)
            assert len(await client.frames(good)) == 4, "its one slot is free again"


@pytest.mark.trio
@pytest.mark.parametrize("how", ["cancelled", "queue_timeout", "run_timeout", "nobody holds it", "worker lost"])
async def test_an_end_that_cannot_be_built_ends_its_request_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """In each task that may build the last frame: the connection's, the request's own, the worker's."""
    times = {"queue_timeout": {"queue_timeout_s": 0.1}, "run_timeout": {"run_timeout_s": 0.1}}.get(how, {})
    bad, hits = a_submit(retry="never", **times), list[str]()
    for message in ("Failed", "Cancelled"):
        real = getattr(relay_module, message)
        monkeypatch.setattr(relay_module, message, raises_once(real, bad.request_id, hits))
    limits = {"resume_window_s": 0.1, "worker_grace_s": 0.1}
    async with daemon(tmp_path, limits=limits) as relay, peer(relay.url, "client") as client:
        if how in ("run_timeout", "worker lost"):
            async with fake_worker(relay.url, name="lost", instance=an_id()) as worker:
                client.send(bad)
                await worker.assigned()
                if how == "run_timeout":
                    await until(lambda: bool(hits))
        elif how == "nobody holds it":
            async with peer(relay.url, "client") as other:
                other.send(bad)
                await until(lambda: bad.request_id in relay.relay.requests)
        else:
            client.send(bad)
            if how == "cancelled":
                client.send(Cancel(request_id=bad.request_id))
        await until(lambda: bool(hits) and not relay.relay.requests[bad.request_id].live)
        assert await state_of(client, bad.request_id) == "failed"
        await one_more_is_served(relay, client)


@pytest.mark.trio
async def test_a_request_that_failed_inside_the_relay_tells_its_reader_and_is_not_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = a_submit(queue_timeout_s=0.1)
    sqlite: dict[str, Any] = {"store": "sqlite"}

    def cannot(**_fields: Any) -> Any:
        raise OurMistake

    monkeypatch.setattr(relay_module, "Failed", cannot)
    async with daemon(tmp_path, **sqlite) as relay, peer(relay.url, "client") as client:
        client.send(bad)
        await until(lambda: bad.request_id in relay.relay.requests and not relay.relay.requests[bad.request_id].live)
        rejected = await client.next(Rejected)
        assert rejected.request_id == bad.request_id
        assert not relay.relay.requests[bad.request_id].log.readers, "else it is never forgotten"
        await relay.relay.store.flush()
    monkeypatch.undo()
    async with daemon(tmp_path, **sqlite) as relay, peer(relay.url, "client") as client:
        assert await state_of(client, bad.request_id) == "failed"
        client.send(Attach(request_id=bad.request_id, attempt=1, after_seq=-1))
        assert isinstance(await client.next(Failed), Failed)


@pytest.mark.trio
async def test_an_end_over_which_the_store_breaks_still_reaches_the_listener(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = a_submit(queue_timeout_s=0.2)
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as client:
        client.send(submit)
        await until(lambda: any(request.accepted for request in relay.relay.requests.values()))

        async def broken(*_args: Any) -> None:
            raise OurMistake

        monkeypatch.setattr(relay.relay.store, "commit", broken)
        (frame,) = await client.frames(submit)
        assert (frame.TYPE, frame.code) == ("failed", "queue_timeout")
        assert relay.relay.requests[submit.request_id].log.ended
        monkeypatch.undo()
        await one_more_is_served(relay, client)


@pytest.mark.trio
async def test_attaching_to_later_and_later_attempts_moves_nothing(tmp_path: Path) -> None:
    submit = a_submit()
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as client:
        client.send(submit)
        await until(lambda: submit.request_id in relay.relay.requests)
        for attempt in range(1, 200):
            client.send(Attach(request_id=submit.request_id, attempt=attempt, after_seq=-1))
        await client.settled()
        async with fake_worker(relay.url, instance=an_id()) as worker:
            assign = await worker.assigned()
            assert assign.attempt == 1
            worker.speak(assign, PCM, end=False)
            log = relay.relay.requests[submit.request_id].log
            await until(lambda: log.next_seq == 3)
            client.send(Attach(request_id=submit.request_id, attempt=2, after_seq=-1))
            await client.settled()
            assert log.next_seq == 3


@pytest.mark.trio
@pytest.mark.parametrize("state", ["running", "queued", "failed"])
async def test_a_store_with_a_record_that_cannot_be_restored_opens_all_the_same(tmp_path: Path, state: str) -> None:
    """As a relay that was driven to an attempt beyond the wire's numbers had left it."""
    bad, good = a_submit(detach=True), a_submit(detach=True)
    sqlite: dict[str, Any] = {"store": "sqlite"}
    async with daemon(tmp_path, **sqlite) as relay, peer(relay.url, "client") as client:
        for submit in (bad, good):
            client.send(submit)
        await until(lambda: all(r.accepted for r in relay.relay.requests.values()) and len(relay.relay.requests) == 2)
        await relay.relay.store.flush()
    with sqlite3.connect(tmp_path / DATABASE_NAME) as database:
        change = "UPDATE requests SET attempt = 1000003, state = ? WHERE request_id = ?"
        assert database.execute(change, (state, bad.request_id)).rowcount == 1
    database.close()
    for restart in range(2):
        async with daemon(tmp_path, **sqlite) as relay, peer(relay.url, "client") as client:
            async with fake_worker(relay.url, instance=an_id()) as worker:
                if not restart:
                    assign = await worker.assigned()
                    assert assign.request_id == good.request_id
                    worker.speak(assign, PCM)
            await relay.at_rest()
            await relay.relay.store.flush()
            assert bad.request_id not in relay.relay.requests
            assert relay.relay.records_set_aside == 1, "it is neither restored nor lost"


async def failed_by_worker(relay: Daemon, client: Peer) -> str:
    """A request that its worker has failed in the middle of its audio, so that it has a file of frames."""
    async with fake_worker(relay.url, name="fails", instance=an_id()) as worker:
        submit = a_submit(detach=True)
        client.send(submit)
        assign = await worker.assigned()
        worker.speak(assign, PCM, end=False)
        worker.send(Failed(**identity(assign, 3), code="invalid_params", message="no"))
        assert (await client.frames(submit))[-1].code == "invalid_params"
        await relay.relay.finalizer.wait_finalized()
    return submit.request_id


@pytest.mark.trio
async def test_a_last_frame_that_cannot_be_built_at_the_start_sets_its_request_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sqlite: dict[str, Any] = {"store": "sqlite"}
    async with daemon(tmp_path, **sqlite) as relay, peer(relay.url, "client") as client:
        bad, good = await failed_by_worker(relay, client), await failed_by_worker(relay, client)
    shutil.rmtree(tmp_path / "results")  # their last frames are made from their records
    hits = list[str]()
    monkeypatch.setattr(final_frame, "Failed", raises_once(Failed, bad, hits))
    async with daemon(tmp_path, **sqlite) as relay, peer(relay.url, "client") as client:
        assert hits
        assert relay.relay.records_set_aside == 1
        assert await state_of(client, good) == "failed"
        await one_more_is_served(relay, client)
    async with daemon(tmp_path, **sqlite) as relay, peer(relay.url, "client") as client:
        client.send(Attach(request_id=bad))
        assert (await client.next(Failed)).code == "internal", "it is marked, and comes up no more"


@pytest.mark.trio
async def test_a_last_frame_that_cannot_be_built_when_room_is_made_costs_its_request_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hits = list[str]()
    async with (
        daemon(tmp_path, store="sqlite", results={"disk_bytes": 11_000}) as relay,
        peer(relay.url, "client") as client,
    ):
        bad = await failed_by_worker(relay, client)
        monkeypatch.setattr(final_frame, "Failed", raises_once(Failed, bad, hits))
        others = [await failed_by_worker(relay, client) for _ in range(3)]
        assert hits
        client.send(Attach(request_id=bad))
        assert (await client.next(Rejected)).code == "request_not_found"
        for other in others:
            client.send(Attach(request_id=other))
            assert (await client.next(Failed)).code == "invalid_params"
        await one_more_is_served(relay, client)


@pytest.mark.trio
async def test_an_assign_that_cannot_be_built_for_a_submit_costs_its_connection_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, hits = a_submit(), list[str]()
    monkeypatch.setattr("relayd.core.admission.Assign", raises_once(Assign, bad.request_id, hits))
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as client:
        async with peer(relay.url, "client") as unlucky:
            unlucky.send(bad)
            assert (await unlucky.next(Rejected, Error)).code == "internal"
        assert hits
        assert bad.request_id not in relay.relay.requests
        await one_more_is_served(relay, client)
