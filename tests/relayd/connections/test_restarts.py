"""The relay is killed or drains, and is started again: what its requests, workers and clients get."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import trio

from protocol.wire.errors import LinkError
from protocol.wire.frames import (
    Audio,
    Cancelled,
    Failed,
)
from protocol.wire.messages import (
    Accepted,
    Assign,
    Attach,
    Cancel,
    Done,
    Input,
    Queued,
    Register,
    Registered,
    Rejected,
    Status,
    StatusReply,
    Steer,
)
from protocol.wire.structs import Running
from relayd.scheduling.model import State
from relayd.store.database import DATABASE_NAME
from relayd.store.records import PutRequest, PutWorker
from tests.relayd.connections.audio_frames import PCM, heard
from tests.support.fake_worker import fake_worker, identity
from tests.support.relay import Daemon, a_submit, an_id, an_input, daemon, peer, until


@pytest.mark.trio
async def test_what_waits_and_what_runs_outlives_the_relay(tmp_path: Path) -> None:
    instance = an_id()
    submits = [a_submit(f"number {number}", inputs={"voice": an_input(PCM[0])}) for number in range(4)]
    rules: dict[str, Any] = {"inputs": {"voice": {}}}
    async with (
        daemon(tmp_path, store="sqlite") as relay,
        fake_worker(relay.url, instance=instance, **rules) as worker,
        peer(relay.url, "client") as client,
    ):
        for submit in submits:
            client.send(submit)
            client.send(Input(request_id=submit.request_id, name="voice", offset=0, data=PCM[0]))
            assert (await client.next(Accepted)).request_id == submit.request_id
        running = await worker.assigned()
        worker.speak(running, PCM[:2], end=False)
        await client.next(Audio)
        await client.next(Audio)
        await relay.relay.store.flush()
    async with daemon(tmp_path, store="sqlite") as relay, peer(relay.url, "client") as client:
        client.send(Attach(request_id=running.request_id, attempt=1, after_seq=2))
        for submit in submits[1:]:
            client.send(submit)
            assert (await client.next(Queued)).request_id == submit.request_id
        named = (Running(request_id=running.request_id, attempt=1, next_seq=3),)
        async with fake_worker(relay.url, instance=instance, running=named, **rules) as worker:
            registered = await worker.peer.next(Registered)
            assert [(r.request_id, r.next_seq) for r in registered.resume] == [(running.request_id, 0)]
            worker.speak(running, PCM)
            assert heard(await client.frames(submits[0])) == b"".join(PCM), "its log is there from the beginning again"
            for submit in submits[1:]:
                assign = await worker.assigned()
                assert assign.request_id == submit.request_id, "in the old order"
                assert (await worker.peer.next(Input)).data == PCM[0]
                worker.speak(assign, PCM)
                assert heard(await client.frames(submit)) == b"".join(PCM)
            await relay.at_rest()
            await relay.goes_on()


@pytest.mark.trio
async def test_what_was_heard_before_a_restart_is_not_tried_anew_and_its_end_is_heard(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path, store="sqlite") as relay,
        fake_worker(relay.url) as worker,
        peer(relay.url, "client") as client,
    ):
        submit = a_submit()
        client.send(submit)
        worker.speak(await worker.assigned(), PCM[:2], end=False)
        await client.next(Audio)
        await relay.relay.store.flush()
    async with (
        daemon(tmp_path, store="sqlite", limits={"worker_grace_s": 0.1}) as relay,
        fake_worker(relay.url, name="other"),
        peer(relay.url, "client") as client,
    ):
        client.send(Attach(request_id=submit.request_id, attempt=1, after_seq=2))
        failed = await client.next(Failed)
        assert (failed.code, failed.attempt, failed.seq) == ("worker_lost", 1, 0)
        await relay.at_rest()


@pytest.mark.trio
@pytest.mark.parametrize("setting", ["queue_timeout_s", "run_timeout_s"])
async def test_a_timeout_that_passed_as_the_relay_was_killed_waits_for_a_worker_with_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.setattr("relayd.requests.request.UNHEARD_GRACE_S", 60.0)
    submit, instance = a_submit(detach=True), an_id()
    async with daemon(tmp_path, store="sqlite") as relay, peer(relay.url, "client") as client:
        if setting == "run_timeout_s":
            async with fake_worker(relay.url, instance=instance) as worker:
                client.send(submit)
                await worker.assigned()
                await relay.relay.store.flush()
        else:  # it is killed before it has stored that an attempt began
            client.send(submit)
            await client.next(Accepted)
    named = (Running(request_id=submit.request_id, attempt=1, next_seq=3),)
    async with (
        daemon(tmp_path, store="sqlite", spaces={"tts": {setting: 0.01}}) as relay,
        peer(relay.url, "client") as client,
        fake_worker(relay.url, instance=instance, running=named) as worker,
    ):
        client.send(Attach(request_id=submit.request_id))
        await worker.peer.next(Registered)
        begun = Assign(
            request_id=submit.request_id, attempt=1, space="tts", principal="root", params={}, run_timeout_s=1.0
        )
        worker.speak(begun, PCM)
        assert heard(await client.frames(submit)) == b"".join(PCM)


@pytest.mark.trio
@pytest.mark.parametrize("are_known", [False, True])
async def test_what_a_killed_relay_had_started_is_not_given_to_another_worker_that_comes_back_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, are_known: bool
) -> None:
    monkeypatch.setattr("relayd.core.restore.UNHEARD_GRACE_S", 60.0)
    submit, instance, others = a_submit(detach=True), an_id(), an_id()
    async with daemon(tmp_path, store="sqlite") as relay, peer(relay.url, "client") as client:
        client.send(submit)  # it is killed before it has stored that an attempt began
        await client.next(Accepted)
        if are_known:
            await relay.relay.store.commit(*(PutWorker(f"box-{each[:8]}", "tts") for each in (instance, others)))
    named = (Running(request_id=submit.request_id, attempt=1, next_seq=3),)
    spaces = {"tts": {"max_workers": 2}}
    async with (
        daemon(tmp_path, store="sqlite", spaces=spaces) as relay,
        peer(relay.url, "client") as client,
        fake_worker(relay.url, instance=others) as other,
    ):
        await other.peer.next(Registered)
        async with fake_worker(relay.url, instance=instance, running=named) as worker:
            assert [each.request_id for each in (await worker.peer.next(Registered)).resume] == [submit.request_id]
            client.send(Attach(request_id=submit.request_id))
            begun = Assign(
                request_id=submit.request_id, attempt=1, space="tts", principal="root", params={}, run_timeout_s=1.0
            )
            worker.speak(begun, PCM)
            assert heard(await client.frames(submit)) == b"".join(PCM)


@pytest.mark.trio
async def test_what_waits_is_started_soon_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relayd.core.restore.UNHEARD_GRACE_S", 0.3)
    submit = a_submit(detach=True)
    async with daemon(tmp_path, store="sqlite") as relay, peer(relay.url, "client") as client:
        client.send(submit)
        await client.next(Accepted)
    async with daemon(tmp_path, store="sqlite") as relay, fake_worker(relay.url) as worker:
        assert (await worker.assigned()).request_id == submit.request_id


@pytest.mark.trio
async def test_what_waits_is_started_as_soon_as_all_workers_are_back_that_were_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relayd.core.restore.UNHEARD_GRACE_S", 60.0)
    submit, instances = a_submit(detach=True), [an_id(), an_id()]
    spaces = {"tts": {"max_workers": 2}}
    async with daemon(tmp_path, store="sqlite", spaces=spaces) as relay, peer(relay.url, "client") as client:
        client.send(submit)
        await client.next(Accepted)
        await relay.relay.store.commit(*(PutWorker(f"box-{each[:8]}", "tts") for each in instances))
    async with daemon(tmp_path, store="sqlite", spaces=spaces) as relay:
        async with fake_worker(relay.url, instance=instances[0]) as cut:
            await cut.peer.next(Registered)
        async with fake_worker(relay.url, instance=instances[1]) as worker:
            assert (await worker.assigned()).request_id == submit.request_id


@pytest.mark.trio
async def test_a_relay_that_ends_in_order_leaves_word_of_its_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relayd.core.restore.UNHEARD_GRACE_S", 60.0)
    submit, instance = a_submit(detach=True), an_id()
    async with (
        daemon(tmp_path, store="sqlite") as relay,
        fake_worker(relay.url, instance=instance, slots=0),
        peer(relay.url, "client") as client,
    ):
        client.send(submit)
        await client.next(Queued)
        relay.relay.draining.set()
        with pytest.raises(LinkError):
            await client.next(Accepted)
    async with daemon(tmp_path, store="sqlite") as relay, fake_worker(relay.url, instance=instance) as worker:
        assert (await worker.assigned()).request_id == submit.request_id


@pytest.mark.trio
async def test_a_worker_that_does_not_come_back_holds_up_its_own_space_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relayd.core.restore.UNHEARD_GRACE_S", 60.0)
    submits, instance = [a_submit(space=space, detach=True) for space in ("tts", "other")], an_id()
    spaces: dict[str, Any] = {"tts": {}, "other": {}, "third": {}}
    async with daemon(tmp_path, store="sqlite", spaces=spaces) as relay, peer(relay.url, "client") as client:
        for submit in submits:
            client.send(submit)
            await client.next(Accepted)
        await relay.relay.store.commit(PutWorker(f"box-{instance[:8]}", "tts"), PutWorker("gone-0", "other"))
    async with daemon(tmp_path, store="sqlite", spaces=spaces) as relay, peer(relay.url, "client") as client:
        everything: dict[str, Any] = {"slots": 3, "spaces": tuple(spaces)}
        async with fake_worker(relay.url, instance=instance, **everything) as worker:
            assert (await worker.assigned()).request_id == submits[0].request_id
            client.send(new := a_submit(space="third"))
            assert (await worker.assigned()).request_id == new.request_id, "nothing waited there"
            await relay.goes_on()
            assert relay.relay.requests[submits[1].request_id].entry.state is State.QUEUED


@pytest.mark.trio
async def test_the_time_in_which_workers_are_waited_for_counts_for_no_queue_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relayd.core.restore.UNHEARD_GRACE_S", 0.4)
    old, new = a_submit(detach=True, queue_timeout_s=30.0), a_submit(detach=True)
    async with daemon(tmp_path, store="sqlite") as relay, peer(relay.url, "client") as client:
        client.send(old)
        await client.next(Accepted)
    async with daemon(tmp_path, store="sqlite") as relay, peer(relay.url, "client") as client:
        client.send(new)
        await client.next(Accepted)
        waiting = [relay.relay.requests[submit.request_id] for submit in (old, new)]
        before = [request.queued_at for request in waiting]
        await until(lambda: not relay.relay.scheduler.state.spaces["tts"].settling)
        waited_s = trio.current_time() - waiting[0].restored_at
        shifts = [request.queued_at - was for request, was in zip(waiting, before, strict=True)]
        assert 0.4 <= shifts[0] <= waited_s
        assert 0.0 < shifts[1] < shifts[0]
        assert waiting[1].queued_at <= trio.current_time()
        queued_at = relay.relay.clock.of(waiting[0].queued_at)
        await relay.relay.store.flush()
        (stored,) = (each for each in (await relay.relay.store.load()).requests if each.request_id == old.request_id)
        assert stored.since == queued_at


@pytest.mark.trio
async def test_the_store_knows_which_workers_are_connected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relayd.core.restore.UNHEARD_GRACE_S", 0.1)

    async def known(relay: Daemon) -> list[tuple[str, str]]:
        await relay.relay.store.flush()
        return sorted((await relay.relay.store.load()).workers)

    spaces: dict[str, Any] = {"tts": {}, "other": {}}
    async with daemon(tmp_path, store="sqlite", spaces=spaces) as relay, peer(relay.url, "client") as client:
        client.send(a_submit(detach=True))
        await client.next(Accepted)
        await relay.relay.store.commit(PutWorker("gone-0", "tts"), PutWorker("gone-0", "other"))
        assert await known(relay) == [("gone-0", "other"), ("gone-0", "tts")]
    async with daemon(tmp_path, store="sqlite", spaces=spaces) as relay:
        async with fake_worker(relay.url, spaces=("tts", "other")) as worker:
            worker.speak(await worker.assigned(), PCM)
            (one,) = relay.relay.workers
            assert await known(relay) == [(one, "other"), (one, "tts")], "the other did not come back"
        await until(lambda: not relay.relay.workers)
        assert await known(relay) == []


@pytest.mark.trio
@pytest.mark.parametrize(
    ("change", "has_ended", "then"),
    [
        ("UPDATE spaces SET config = '[]' WHERE name = 'made'", True, "cancelled"),
        ("DELETE FROM spaces WHERE name = 'made'", False, "queued"),
        ("DELETE FROM spaces WHERE name = 'made'", True, ""),
    ],
)
async def test_of_a_space_that_is_missing_only_what_has_ended_is_forgotten_and_not_if_the_space_is_damaged(
    tmp_path: Path, change: str, has_ended: bool, then: str
) -> None:
    submit = a_submit(space="made", detach=True)

    async def state(relay: Daemon) -> str:
        async with peer(relay.url, "operator") as operator:
            operator.send(Status(request_id=submit.request_id))
            reply = await operator.next(StatusReply, Rejected)
            return str(reply.state) if isinstance(reply, StatusReply) else ""

    async def make_space(relay: Daemon) -> None:
        async with peer(relay.url, "operator") as operator:
            operator.send(Steer(action="create_space", target="made"))
            await operator.next(Done)

    async with daemon(tmp_path, store="sqlite") as relay, peer(relay.url, "client") as client:
        await make_space(relay)
        client.send(submit)
        await client.next(Accepted)
        if has_ended:
            client.send(Cancel(request_id=submit.request_id))
            await client.next(Cancelled)
    with closing(sqlite3.connect(tmp_path / DATABASE_NAME)) as database, database:
        assert database.execute(change).rowcount == 1
    async with daemon(tmp_path, store="sqlite") as relay:
        assert await state(relay) == ""
        await make_space(relay)
    async with daemon(tmp_path, store="sqlite") as relay:
        assert await state(relay) == then


@pytest.mark.trio
async def test_an_input_that_the_store_lost_costs_its_request_alone(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as client:
        submit, after = a_submit(inputs={"voice": an_input(b"abc")}), a_submit()
        client.send(submit)
        client.send(Input(request_id=submit.request_id, name="voice", offset=0, data=b"abc"))
        client.send(after)
        await client.next(Accepted)
        relay.relay.requests[submit.request_id].inputs.clear()
        (record,) = (each for each in (await relay.relay.store.load()).requests if each.request_id == submit.request_id)
        await relay.relay.store.commit(PutRequest(record))
        async with fake_worker(relay.url) as worker:
            assign = await worker.assigned()
            assert (await client.next(Failed)).code == "internal"
            await worker.peer.next(Cancel)
            worker.send(Cancelled(**identity(assign, 0)))
            worker.speak(await worker.assigned(), PCM)
            assert heard(await client.frames(after)) == b"".join(PCM)
            await relay.at_rest()


@pytest.mark.trio
async def test_a_draining_daemon_finishes_what_runs_and_keeps_what_waits(tmp_path: Path) -> None:
    runs, waits, late = a_submit(), a_submit(), a_submit()
    async with (
        daemon(tmp_path, store="sqlite", limits={"resume_window_s": 0}) as relay,
        fake_worker(relay.url) as worker,
        peer(relay.url, "client") as client,
        peer(relay.url, "operator") as operator,
    ):
        client.send(runs)
        assign = await worker.assigned()
        client.send(waits)
        await client.next(Queued)
        operator.send(Steer(action="drain"))
        assert (await operator.next(Done)).data == {"running": 1}
        client.send(late)
        refusal = await client.next(Rejected)
        assert (refusal.code, refusal.retryable) == ("shutting_down", True)
        worker.speak(assign, PCM)
        assert heard(await client.frames(runs)) == b"".join(PCM)
        await until(lambda: all(one.link.gone is not None for one in (client, worker.peer, operator)))
    async with daemon(tmp_path, store="sqlite") as relay, peer(relay.url, "client") as client:
        client.send(Status(request_id=waits.request_id))
        assert (await client.next(StatusReply)).state == "queued"
        client.send(waits)
        async with fake_worker(relay.url) as worker:
            worker.speak(await worker.assigned(), PCM)
            assert heard(await client.frames(waits)) == b"".join(PCM)
        await relay.at_rest()


@pytest.mark.trio
async def test_who_was_cut_off_from_running_work_comes_back_to_it_while_the_relay_drains(tmp_path: Path) -> None:
    submit, instance = a_submit(), an_id()
    async with (
        daemon(tmp_path, store="sqlite") as relay,
        fake_worker(relay.url, instance=instance) as worker,
        peer(relay.url, "client") as client,
        peer(relay.url, "operator") as operator,
    ):
        client.send(submit)
        assign = await worker.assigned()
        operator.send(Steer(action="drain"))
        await operator.next(Done)
        await worker.peer.cut()
        await client.cut()
        async with peer(relay.url, "worker") as idle:
            idle.send(Register(worker="other", instance=an_id(), spaces=["tts"], engine="fake"))
            assert (await idle.next(Rejected)).code == "shutting_down"
        running = [Running(request_id=assign.request_id, attempt=1, next_seq=0)]
        async with (
            fake_worker(relay.url, instance=instance, running=running) as again,
            peer(relay.url, "client") as listener,
        ):
            listener.send(Attach(request_id=submit.request_id, attempt=0, after_seq=-1))
            assert (await again.peer.next(Registered)).resume
            again.speak(assign, PCM)
            assert heard(await listener.frames(submit)) == b"".join(PCM)
            await until(lambda: listener.link.gone is not None)


@pytest.mark.trio
async def test_a_drain_leaves_what_does_not_end_in_time_to_its_worker(tmp_path: Path) -> None:
    instance, submit = an_id(), a_submit()
    async with daemon(tmp_path, store="sqlite", drain_timeout_s=0.1) as relay:
        async with fake_worker(relay.url, instance=instance) as worker, peer(relay.url, "client") as client:
            client.send(submit)
            assign = await worker.assigned()
            async with peer(relay.url, "operator") as operator:
                operator.send(Steer(action="drain"))
                await until(lambda: worker.peer.link.gone is not None)
        await trio.lowlevel.checkpoint()
    named = (Running(request_id=submit.request_id, attempt=1, next_seq=3),)
    async with (
        daemon(tmp_path, store="sqlite") as relay,
        peer(relay.url, "client") as client,
        fake_worker(relay.url, instance=instance, running=named) as worker,
    ):
        client.send(Attach(request_id=submit.request_id))
        worker.speak(assign, PCM)
        assert heard(await client.frames(submit)) == b"".join(PCM)
        await relay.at_rest()


@pytest.mark.trio
async def test_relays_that_are_killed_before_they_store_a_start_never_give_out_the_same_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, attempts = a_submit(detach=True), []
    for _ in range(4):
        async with daemon(tmp_path, store="sqlite") as relay:
            with monkeypatch.context() as killed_before:
                killed_before.setattr(type(relay.relay.store), "post", lambda *_changes: None)
                async with peer(relay.url, "client") as client, fake_worker(relay.url, name=an_id()) as worker:
                    client.send(submit)
                    attempts.append((await worker.assigned()).attempt)
    assert attempts == sorted(set(attempts))
