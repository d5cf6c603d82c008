"""What the relay answers is in the store first: a relay that is killed right behind an answer has not forgotten it."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from protocol.wire.frames import Cancelled, Failed
from protocol.wire.messages import (
    Accepted,
    Ack,
    Assign,
    Cancel,
    Done,
    Drain,
    Input,
    Ping,
    Pong,
    Queued,
    Registered,
    Rejected,
    Status,
    StatusReply,
    Steer,
)
from protocol.wire.structs import InputRule
from protocol.wire.validators import Message
from relayd.core import finalize
from relayd.store.base import StorageFull
from relayd.store.database import Database
from relayd.store.records import Loaded
from relayd.store.sqlite import SqliteStore
from tests.support.fake_worker import fake_worker, identity
from tests.support.raw_http_client import visitor
from tests.support.relay import Daemon, Peer, a_submit, an_id, an_input, daemon, peer, until

SQLITE: dict[str, Any] = {"store": "sqlite"}


class Disk:
    """A disk that stands still, or is full, when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._turns, self.full = threading.Event(), False
        self._turns.set()
        write = Database.write

        def slow(database: Database, statements: Sequence[Any]) -> Any:
            self._turns.wait(20)
            return StorageFull("no room left") if self.full and statements else write(database, statements)

        monkeypatch.setattr(Database, "write", slow)

    @contextmanager
    def stands(self) -> Iterator[None]:
        """Nothing is written inside the block."""
        self._turns.clear()
        try:
            yield
        finally:
            self._turns.set()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


async def heard(client: Peer) -> list[Message]:
    """All that comes while the relay reads what was sent, and does what it does without its disk."""
    messages: list[Message] = []
    for _ in range(5):
        await trio.sleep(0.01)
        client.send(Ping(timestamp=1.0))
        while not isinstance(message := await client.next(), Pong):
            messages.append(message)
    return [message for message in messages if not isinstance(message, Queued)]


def in_store(relay: Daemon) -> Loaded:
    """What is committed at this moment, as a relay that is killed leaves it."""
    store = relay.relay.store
    assert isinstance(store, SqliteStore)
    return store._database.load()


async def accepted(client: Peer, **fields: Any) -> str:
    """A request that waits in the store."""
    submit = a_submit(detach=True, **fields)
    client.send(submit)
    while (await client.next(Accepted)).request_id != submit.request_id:
        pass
    return submit.request_id


def holds(loaded: Loaded, steer: Steer) -> bool:
    """Whether the store knows what a steer has done."""
    requests = {record.request_id: record for record in loaded.requests}
    spaces = {record.name: record for record in loaded.spaces}
    match steer.action:
        case "cancel":
            return requests[steer.target].state == "cancelled"
        case "promote":
            return requests[steer.target].promoted > 0
        case "pause_space" | "resume_space":
            return steer.target in spaces and spaces[steer.target].paused == (steer.action == "pause_space")
        case "create_space" | "delete_space":
            return (steer.target in spaces) == (steer.action == "create_space")
        case "create_token":
            return [token.principal for token in loaded.tokens] == [steer.target]
    return [token.revoked_at is not None for token in loaded.tokens] == [True]


@pytest.mark.trio
@pytest.mark.parametrize(
    "action",
    [
        "cancel",
        "promote",
        "pause_space",
        "resume_space",
        "create_space",
        "delete_space",
        "create_token",
        "revoke_token",
    ],
)
async def test_a_steer_is_done_when_the_store_has_it(tmp_path: Path, disk: Disk, action: str) -> None:
    async with daemon(tmp_path, **SQLITE) as relay, peer(relay.url, "operator") as operator:
        target, options = "check", dict[str, Any]()
        if action in ("cancel", "promote"):
            target = await accepted(operator)
        elif action == "resume_space":
            operator.send(Steer(action="pause_space", target=target))
            await operator.next(Done)
        elif action.endswith("token"):
            target, options = "ann", {"role": "client"}
            if action == "revoke_token":
                operator.send(Steer(action="create_token", target=target, options=options))
                await operator.next(Done)
        elif action != "pause_space":
            target = "fresh"
            if action == "delete_space":
                operator.send(Steer(action="create_space", target=target))
                await operator.next(Done)
        steer = Steer(action=action, target=target, options=options, steer_id="x")
        with disk.stands():
            operator.send(steer)
            assert await heard(operator) == []
            assert not holds(in_store(relay), steer)
        done = await operator.next(Done, Rejected)
        assert isinstance(done, Done)
        assert holds(in_store(relay), steer)


@pytest.mark.trio
@pytest.mark.parametrize("action", ["cancel", "promote", "pause_space", "revoke_token"])
async def test_a_steer_that_a_full_disk_does_not_take_is_told_so_and_stored_once_there_is_room(
    tmp_path: Path, disk: Disk, action: str
) -> None:
    async with daemon(tmp_path, **SQLITE) as relay, peer(relay.url, "operator") as operator:
        target = "check"
        if action in ("cancel", "promote"):
            target = await accepted(operator)
        elif action == "revoke_token":
            target = "ann"
            operator.send(Steer(action="create_token", target=target, options={"role": "client"}))
            await operator.next(Done)
        steer = Steer(action=action, target=target, steer_id="x")
        disk.full = True
        operator.send(steer)
        refusal = await operator.next(Done, Rejected)
        assert (refusal.request_id, refusal.code) == ("x", "storage_full")
        assert "not stored" in refusal.message
        disk.full = False
        await until(lambda: holds(in_store(relay), steer))


@pytest.mark.trio
@pytest.mark.parametrize("where", ["queued", "running"])
async def test_a_status_behind_a_cancel_comes_when_the_store_has_the_cancel(
    tmp_path: Path, disk: Disk, where: str
) -> None:
    async with (
        daemon(tmp_path, **SQLITE) as relay,
        peer(relay.url, "client") as client,
        fake_worker(relay.url, spaces=("check",)) as worker,
        visitor(relay.url) as http,
    ):
        request_id = await accepted(client, space="check" if where == "running" else "tts")
        if where == "running":
            await worker.assigned()
            await relay.relay.store.flush()
        with disk.stands():
            client.send(Cancel(request_id=request_id))
            for _ in range(3):
                client.send(Status(request_id=request_id))
            await http.begin("GET", f"/v1/requests/{request_id}")
            assert await heard(client) == []
            with trio.move_on_after(0.05):
                raise AssertionError(f"HTTP answered {await http.next_event()}")
        for _ in range(3):
            status = await client.next(StatusReply)
            assert status.state == ("cancelled" if where == "queued" else "running")
        assert (await http.answer()).status == 200
        (record,) = in_store(relay).requests
        assert record.state == "cancelled" if where == "queued" else record.stopping is not None


@pytest.mark.trio
async def test_a_cancel_over_http_is_answered_when_the_store_has_it(tmp_path: Path, disk: Disk) -> None:
    async with daemon(tmp_path, **SQLITE) as relay, peer(relay.url, "client") as client, visitor(relay.url) as http:
        request_id = await accepted(client)
        with disk.stands():
            await http.begin("DELETE", f"/v1/requests/{request_id}")
            with trio.move_on_after(0.05):
                raise AssertionError(f"HTTP answered {await http.next_event()}")
        answer = await http.answer()
        await answer.rest()
        assert (answer.status, answer.json["state"]) == (200, "cancelled")
        assert in_store(relay).requests[0].state == "cancelled"


@pytest.mark.trio
async def test_cancelled_from_a_worker_is_told_when_the_store_has_it(tmp_path: Path, disk: Disk) -> None:
    """A relay that had forgotten the cancel would take the repeated frame for a lost attempt, and run it again."""
    async with (
        daemon(tmp_path, **SQLITE) as relay,
        peer(relay.url, "client") as client,
        fake_worker(relay.url) as worker,
    ):
        request_id = await accepted(client)
        assign = await worker.assigned()
        await relay.relay.store.flush()
        with disk.stands():
            client.send(Cancel(request_id=request_id))
            await worker.peer.next(Cancel)
            worker.send(Cancelled(**identity(assign, 0), reason="stopped"))
            await worker.peer.settled()
            assert await heard(client) == []
        assert (await client.next(Cancelled)).reason == "stopped"
        assert in_store(relay).requests[0].state == "cancelled"
        await relay.at_rest()


@pytest.mark.trio
async def test_cancelled_while_the_request_is_being_stored_is_told_when_its_end_is_stored(
    tmp_path: Path, disk: Disk
) -> None:
    async with daemon(tmp_path, **SQLITE) as relay, peer(relay.url, "client") as client:
        submit = a_submit(detach=True)
        with disk.stands():
            client.send(submit)
            await client.settled()
            client.send(Cancel(request_id=submit.request_id))
            assert await heard(client) == []
        await client.next(Cancelled)
        assert [record.state for record in in_store(relay).requests] == ["cancelled"]


@pytest.mark.trio
async def test_a_cancel_that_a_full_disk_does_not_take_is_told_once_there_is_room(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finalize, "RETRY_S", 0.02)
    monkeypatch.setattr(finalize, "SAFE_S", 0.1)
    async with daemon(tmp_path, **SQLITE) as relay, peer(relay.url, "client") as client:
        request_id = await accepted(client)
        disk.full = True
        client.send(Cancel(request_id=request_id))
        client.send(Status(request_id=request_id))
        refusal = await client.next(StatusReply, Rejected, Cancelled)
        assert (refusal.request_id, refusal.code) == (request_id, "storage_full")
        disk.full = False
        assert (await client.next(Cancelled)).request_id == request_id
        assert in_store(relay).requests[0].state == "cancelled"


@pytest.mark.trio
async def test_promoted_requests_keep_their_order_over_restarts(tmp_path: Path) -> None:
    async with daemon(tmp_path, **SQLITE) as relay, peer(relay.url, "operator") as operator:
        first, second, third, fourth = [await accepted(operator) for _ in range(4)]
        for request_id in (third, second):
            operator.send(Steer(action="promote", target=request_id))
            await operator.next(Done)
    async with daemon(tmp_path, **SQLITE) as relay, peer(relay.url, "operator") as operator:
        operator.send(Steer(action="promote", target=fourth))
        await operator.next(Done)
    async with daemon(tmp_path, **SQLITE) as relay:
        queue = relay.relay.scheduler.state.spaces["tts"].queue
        assert [entry.request_id for entry in queue] == [fourth, second, third, first]
        async with fake_worker(relay.url, instance=an_id()) as worker:
            assert (await worker.assigned()).request_id == fourth


@pytest.mark.trio
async def test_a_worker_stays_drained_over_a_restart_until_it_is_undrained(tmp_path: Path, disk: Disk) -> None:
    instance = an_id()
    async with (
        daemon(tmp_path, **SQLITE) as relay,
        fake_worker(relay.url, instance=instance) as worker,
        peer(relay.url, "operator") as operator,
    ):
        worker_id = (await worker.peer.next(Registered)).worker_id
        with disk.stands():
            operator.send(Steer(action="drain_worker", target=worker_id))
            assert await heard(operator) == []
        await operator.next(Done)
        assert in_store(relay).drains == ((worker_id, False),)
        await accepted(operator)
    async with (
        daemon(tmp_path, **SQLITE) as relay,
        peer(relay.url, "operator") as operator,
        fake_worker(relay.url, instance=instance) as worker,
    ):
        await worker.peer.next(Drain)
        assert relay.relay.scheduler.state.workers[worker_id].draining
        operator.send(Steer(action="undrain_worker", target=worker_id))
        await operator.next(Done)
        assert in_store(relay).drains == ()
        await worker.assigned()


@pytest.mark.trio
@pytest.mark.parametrize("lost", ["it fails", "it is stopped"])
async def test_a_loss_that_ends_a_request_is_acknowledged_when_the_store_has_it(
    tmp_path: Path, disk: Disk, lost: str
) -> None:
    """A worker that had forgotten the attempt would be handed it again by a relay that is started again."""
    async with (
        daemon(tmp_path, **SQLITE) as relay,
        peer(relay.url, "client") as client,
        fake_worker(relay.url) as worker,
    ):
        await accepted(client, retry="never")
        told = identity(await worker.assigned(), 0)
        await relay.relay.store.flush()
        with disk.stands():
            failed = Failed(**told, code="engine_failed", message="broke", retryable=True)
            worker.send(failed if lost == "it fails" else Cancelled(**told, reason="stopped"))
            assert not [message for message in await heard(worker.peer) if isinstance(message, Ack)]
        await worker.peer.next(Ack)
        assert in_store(relay).requests[0].state == "failed"
        await relay.at_rest()


@pytest.mark.trio
async def test_a_request_that_must_not_be_tried_again_starts_when_the_store_has_its_start(
    tmp_path: Path, disk: Disk
) -> None:
    """A relay that is killed behind the start, and its worker with it, must not begin it a second time."""
    async with daemon(tmp_path, **SQLITE) as relay, peer(relay.url, "client") as client:
        await accepted(client, retry="never")
        async with fake_worker(relay.url) as worker:
            with disk.stands():
                assert not [message for message in await heard(worker.peer) if isinstance(message, Assign)]
                assert in_store(relay).requests[0].state == "queued"
            worker.speak(await worker.assigned(), [])
            (record,) = in_store(relay).requests
            assert (record.state in ("running", "completed"), record.attempt) == (True, 1)
            await relay.at_rest()


@pytest.mark.trio
@pytest.mark.parametrize("end", ["cancel", "run_timeout"])
async def test_a_request_that_ends_while_its_start_is_stored_never_runs(tmp_path: Path, disk: Disk, end: str) -> None:
    limits = {"cancel_grace_s": 60.0}
    async with daemon(tmp_path, **SQLITE, limits=limits) as relay, peer(relay.url, "client") as client:
        request_id = await accepted(client, retry="never", run_timeout_s=0.2 if end == "run_timeout" else None)
        async with fake_worker(relay.url) as worker:
            with disk.stands():
                await worker.peer.next(Registered)
                if end == "cancel":
                    client.send(Cancel(request_id=request_id))
                await worker.peer.next(Cancel)
            await client.next(Cancelled if end == "cancel" else Failed)
            await relay.at_rest()
            request_id = await accepted(client)
            assert (await worker.assigned()).request_id == request_id, "the slot is free, and nothing ran in it"


@pytest.mark.trio
async def test_a_worker_that_reconnects_while_a_start_is_stored_is_assigned_it_once(tmp_path: Path, disk: Disk) -> None:
    instance = an_id()
    async with daemon(tmp_path, **SQLITE) as relay, peer(relay.url, "client") as client:
        request_id = await accepted(client, retry="never")
        with ExitStack() as stack:
            stack.enter_context(disk.stands())
            async with fake_worker(relay.url, instance=instance) as worker:
                await worker.peer.next(Registered)
                await worker.peer.cut()
            await until(lambda: not relay.relay.workers)
            async with fake_worker(relay.url, instance=instance) as worker:
                await worker.peer.next(Registered)
                stack.close()
                assert (await worker.assigned()).request_id == request_id
                assert not [message for message in await heard(worker.peer) if isinstance(message, Assign)]


@pytest.mark.trio
async def test_a_worker_that_goes_while_a_start_is_stored_is_assigned_it_when_it_is_back(
    tmp_path: Path, disk: Disk
) -> None:
    inputs, rules = {"voice": an_input(b"abc")}, {"voice": InputRule()}
    instance, submit = an_id(), a_submit(retry="never", inputs=inputs)
    async with daemon(tmp_path, **SQLITE) as relay, peer(relay.url, "client") as client:
        client.send(submit)
        client.send(Input(request_id=submit.request_id, name="voice", offset=0, data=b"abc"))
        await client.next(Accepted)
        with disk.stands():
            async with fake_worker(relay.url, instance=instance, inputs=rules) as worker:
                await worker.peer.next(Registered)
            await until(lambda: not relay.relay.workers)
        await relay.relay.store.flush()
        await relay.goes_on()
        async with fake_worker(relay.url, instance=instance, inputs=rules) as worker:
            assert (await worker.assigned()).request_id == submit.request_id
            assert (await worker.peer.next(Input)).data == b"abc"


@pytest.mark.trio
async def test_that_an_attempt_starts_is_stored_soon(tmp_path: Path) -> None:
    async with daemon(tmp_path, **SQLITE) as relay, peer(relay.url, "client") as client:
        await accepted(client)
        async with fake_worker(relay.url) as worker:
            await worker.assigned()
            await relay.relay.store.flush()
            (record,) = in_store(relay).requests
            assert (record.state, record.attempt) == ("running", 1)
            assert record.worker_id in relay.relay.workers


@pytest.mark.trio
async def test_a_start_that_a_full_disk_does_not_take_is_stored_once_there_is_room(tmp_path: Path, disk: Disk) -> None:
    async with daemon(tmp_path, **SQLITE) as relay, peer(relay.url, "client") as client:
        await accepted(client, retry="never")
        disk.full = True
        async with fake_worker(relay.url) as worker:
            await worker.assigned()
            assert in_store(relay).requests[0].state == "queued"
            disk.full = False
            await relay.relay.store.flush()
            assert in_store(relay).requests[0].state == "running"


@pytest.mark.trio
@pytest.mark.parametrize("method", ["PUT", "POST"])
async def test_a_request_over_http_that_is_cut_before_its_answer_lives_on_if_its_client_knows_its_id(
    tmp_path: Path, disk: Disk, method: str
) -> None:
    request_id = an_id()
    path = f"/v1/requests/{request_id}?space=tts" if method == "PUT" else "/v1/spaces/tts/requests"
    told = {"params": {"text": "hello"}, "detach": True}
    async with daemon(tmp_path, **SQLITE) as relay:
        with disk.stands():
            async with visitor(relay.url) as http:
                await http.begin(method, path, told=told)
                await until(lambda: any(each.holders for each in relay.relay.requests.values()))
            await until(lambda: not any(each.holders for each in relay.relay.requests.values()))
        if method == "PUT":
            async with visitor(relay.url) as http:
                assert (await http.ask(method, path, told=told)).status == 202, "it is live"
        else:
            await until(lambda: [each.entry.state for each in relay.relay.requests.values()] == ["cancelled"])
