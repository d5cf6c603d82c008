"""What becomes of results: acknowledged when safe, found again after a restart, within memory and disk."""

import errno
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from protocol.wire.frames import (
    Audio,
    Cancelled,
    Completed,
    Failed,
    Started,
)
from protocol.wire.messages import (
    Accepted,
    Ack,
    Assign,
    Attach,
    Cancel,
    Registered,
    Rejected,
    Status,
    StatusReply,
    Submit,
)
from protocol.wire.structs import Running
from relayd.core import retention
from relayd.frames.frame_file import ResultFolder
from relayd.frames.spool import Spool
from relayd.store.base import StorageFull
from relayd.store.records import RequestRecord
from relayd.store.sqlite import SqliteStore
from tests.support.cable import Cable
from tests.support.fake_worker import FORMAT, FakeWorker, fake_worker, identity, samples
from tests.support.relay import Daemon, Peer, a_submit, an_id, daemon, kept_logs, peer, until

PCM = [samples(1_000, seed) for seed in (1, 2, 3)]
#: Half a MiB each: more than the kernel takes for a client that does not read.
LONG = [samples(1_000, seed) * 250 for seed in range(1, 9)]
SQLITE = {"store": "sqlite"}


class Held:
    """A step of the relay's that waits for the test, or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: type, name: str) -> None:
        self.began, self.go_on = trio.Event(), trio.Event()
        self.fault: Exception | None = None
        work = getattr(kind, name)

        async def held(*args: Any) -> Any:
            self.began.set()
            await self.go_on.wait()
            if self.fault is not None:
                raise self.fault
            return await work(*args)

        monkeypatch.setattr(kind, name, held)


async def silent(worker: FakeWorker) -> None:
    """The worker is told nothing for as long as a question and its answer take."""
    with pytest.raises(trio.TooSlowError), trio.fail_after(0.1):
        await worker.peer.next(Ack)


async def spoken(worker: FakeWorker, client: Peer, submit: Submit, pcm: list[bytes] = PCM) -> list[Any]:
    """A whole request; its frames."""
    client.send(submit)
    worker.speak(await worker.assigned(), pcm)
    return await client.frames(submit)


async def fetched(relay: Daemon, request_id: str) -> list[Any]:
    async with peer(relay.url, "client") as client:
        client.send(Attach(request_id=request_id))
        return await client.frames(a_submit(request_id=request_id))


async def refused(relay: Daemon, request_id: str) -> Rejected:
    async with peer(relay.url, "client") as client:
        client.send(Attach(request_id=request_id))
        refusal: Rejected = await client.next(Rejected)
        return refusal


async def state_in_store(relay: Daemon, request_id: str) -> str:
    await relay.relay.store.flush()
    return next(r.state for r in (await relay.relay.store.load()).requests if r.request_id == request_id)


def files(folder: Path) -> list[str]:
    return ResultFolder(folder / "results").request_ids()


# -- when it is acknowledged --------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_the_end_is_heard_at_once_and_acknowledged_once_it_is_in_a_file_and_in_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal = Held(monkeypatch, Spool, "seal")
    async with daemon(tmp_path, **SQLITE) as relay, fake_worker(relay.url) as worker, peer(relay.url, "client") as one:
        submit = a_submit()
        assert len(await spoken(worker, one, submit)) == 5
        await silent(worker)
        assert await state_in_store(relay, submit.request_id) == "running"
        commit = Held(monkeypatch, SqliteStore, "commit")
        seal.go_on.set()
        await commit.began.wait()
        assert files(tmp_path) == [submit.request_id]
        await silent(worker)
        commit.go_on.set()
        assert (await worker.peer.next(Ack)).seq == 4
        assert await state_in_store(relay, submit.request_id) == "completed"
        await relay.at_rest()


@pytest.mark.trio
async def test_a_store_that_forgets_has_the_end_acknowledged_at_once(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url) as worker, peer(relay.url, "client") as client:
        await spoken(worker, client, a_submit())
        assert (await worker.peer.next(Ack)).seq == 4
        assert not (tmp_path / "results").exists()


@pytest.mark.trio
@pytest.mark.parametrize(("kind", "step"), [(Spool, "seal"), (SqliteStore, "commit")])
async def test_a_relay_killed_before_the_end_was_safe_takes_all_of_it_from_the_worker_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type, step: str
) -> None:
    instance, submit = an_id(), a_submit()
    with monkeypatch.context() as patch:
        async with (
            daemon(tmp_path, **SQLITE) as relay,
            fake_worker(relay.url, instance=instance) as worker,
            peer(relay.url, "client") as client,
        ):
            client.send(submit)
            assign = await worker.assigned()
            await relay.relay.store.flush()
            last_step = Held(patch, kind, step)
            worker.speak(assign, PCM)
            before = await client.frames(submit)
            await last_step.began.wait()
            assert files(tmp_path) == ([submit.request_id] if step == "commit" else [])
    running = (Running(request_id=submit.request_id, attempt=1, next_seq=5),)
    async with (
        daemon(tmp_path, **SQLITE) as relay,
        fake_worker(relay.url, instance=instance, running=running) as worker,
    ):
        assert files(tmp_path) == []
        registered = await worker.peer.next(Registered)
        assert [(one.request_id, one.next_seq) for one in registered.resume] == [(submit.request_id, 0)]
        worker.speak(assign, PCM)
        assert (await worker.peer.next(Ack)).seq == 4
        assert await fetched(relay, submit.request_id) == before
        assert relay.relay.spaces["tts"].ended == {"completed": 1}
        await relay.at_rest()


@pytest.mark.trio
async def test_a_worker_that_comes_back_while_the_end_is_made_safe_keeps_it_until_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance, submit = an_id(), a_submit()
    seal = Held(monkeypatch, Spool, "seal")
    async with daemon(tmp_path, **SQLITE) as relay:
        async with fake_worker(relay.url, instance=instance) as worker, peer(relay.url, "client") as client:
            client.send(submit)
            assign = await worker.assigned()
            worker.speak(assign, PCM)
            await client.frames(submit)
        running = (Running(request_id=submit.request_id, attempt=1, next_seq=5),)
        async with fake_worker(relay.url, instance=instance, running=running) as worker:
            registered = await worker.peer.next(Registered)
            assert (registered.resume, registered.abandon) == (running, [])
            worker.send(Completed(**identity(assign, 4), result={}))  # sent again all the same
            await silent(worker)
            seal.go_on.set()
            assert (await worker.peer.next(Ack)).seq == 4
        async with fake_worker(relay.url, instance=instance, running=running) as worker:
            assert tuple((await worker.peer.next(Registered)).abandon) == (submit.request_id,)


@pytest.mark.trio
async def test_an_end_that_the_store_does_not_take_is_acknowledged_and_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with daemon(tmp_path, **SQLITE) as relay, fake_worker(relay.url) as worker, peer(relay.url, "client") as one:
        submit = a_submit()
        one.send(submit)
        assign = await worker.assigned()
        with monkeypatch.context() as patch:
            commit = Held(patch, SqliteStore, "commit")
            commit.fault = StorageFull("no room")
            commit.go_on.set()
            worker.speak(assign, PCM)
            assert (await worker.peer.next(Ack)).seq == 4
        assert await state_in_store(relay, submit.request_id) == "completed"


@pytest.mark.trio
async def test_a_drain_waits_until_every_end_is_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seal = Held(monkeypatch, Spool, "seal")
    async with daemon(tmp_path, **SQLITE) as relay, fake_worker(relay.url) as worker:
        async with peer(relay.url, "client") as client:
            await spoken(worker, client, submit := a_submit())
        relay.relay.draining.set()
        await silent(worker)
        assert relay.relay.connections
        seal.go_on.set()
        assert (await worker.peer.next(Ack)).seq == 4
        await until(lambda: not relay.relay.connections)
        assert files(tmp_path) == [submit.request_id]


# -- ends of the relay's own --------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_cancel_is_told_only_once_it_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with daemon(tmp_path, **SQLITE) as relay, peer(relay.url, "client") as client:
        submit = a_submit()
        client.send(submit)
        await client.next(Accepted)
        commit = Held(monkeypatch, SqliteStore, "commit")
        client.send(Cancel(request_id=submit.request_id))
        await commit.began.wait()
        await client.settled()
        assert not relay.relay.requests[submit.request_id].log.ended
        assert not relay.relay.requests[submit.request_id].live
        commit.go_on.set()
        assert (await client.next(Cancelled)).request_id == submit.request_id
        assert await state_in_store(relay, submit.request_id) == "cancelled"
        assert files(tmp_path) == [], "its record says as much"
        await relay.at_rest()


@pytest.mark.trio
async def test_a_cancel_of_what_runs_is_remembered_by_a_relay_that_is_killed(tmp_path: Path) -> None:
    instance, submit = an_id(), a_submit(detach=True)
    async with (
        daemon(tmp_path, **SQLITE) as relay,
        fake_worker(relay.url, instance=instance) as worker,
        peer(relay.url, "client") as client,
    ):
        client.send(submit)
        assign = await worker.assigned()
        client.send(Cancel(request_id=submit.request_id, reason="enough"))
        await worker.peer.next(Cancel)
        await relay.relay.store.flush()
    running = (Running(request_id=submit.request_id, attempt=1, next_seq=1),)
    async with daemon(tmp_path, **SQLITE) as relay:
        (frame,) = await fetched(relay, submit.request_id)
        assert (frame.TYPE, frame.reason) == ("cancelled", "enough")
        async with fake_worker(relay.url, instance=instance, running=running) as worker:
            assert tuple((await worker.peer.next(Registered)).abandon) == (submit.request_id,)
            worker.send(Started(**identity(assign, 0), format=FORMAT))
            await worker.peer.settled()
            assert relay.relay.fenced_frames == 1
        await relay.at_rest()


# -- after a restart ----------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_all_that_has_ended_is_fetched_after_a_restart_to_the_last_frame(tmp_path: Path) -> None:
    told: dict[str, list[Any]] = {}
    states = {}
    lasts: list[Callable[[Assign], Any]] = [
        lambda assign: Completed(**identity(assign, 4), result={"chunks": 3}),
        lambda assign: Failed(**identity(assign, 4), code="invalid_params", message="no", details={"a": "b"}),
        lambda assign: Cancelled(**identity(assign, 4), reason="so it goes"),
    ]
    async with (
        daemon(tmp_path, **SQLITE) as relay,
        fake_worker(relay.url, slots=5) as worker,
        peer(relay.url, "client") as client,
    ):
        for last in lasts:
            submit = a_submit()
            client.send(submit)
            assign = await worker.assigned()
            worker.speak(assign, PCM, end=False)
            worker.send(last(assign))
            told[submit.request_id] = await client.frames(submit)
            states[submit.request_id] = told[submit.request_id][-1].TYPE
        submit = a_submit(run_timeout_s=0.1)
        client.send(submit)
        worker.speak(await worker.assigned(), PCM, end=False)
        told[submit.request_id] = await client.frames(submit)
        assert told[submit.request_id][-1].code == "run_timeout"
        states[submit.request_id] = "failed"
        await until(lambda: not relay.relay.finalizer.unfinalized)
    for _ in range(2):
        async with daemon(tmp_path, **SQLITE) as relay:
            for request_id, frames in told.items():
                assert await fetched(relay, request_id) == frames
                async with peer(relay.url, "client") as client:
                    client.send(Status(request_id=request_id))
                    reply = await client.next(StatusReply)
                    assert (reply.state, reply.next_seq) == (states[request_id], 5)
                    client.send(Attach(request_id=request_id, attempt=1, after_seq=99))
                    assert (await client.next(type(frames[-1]))) == frames[-1]
            await relay.at_rest()
            assert relay.relay.results.memory.held_bytes == 0


@pytest.mark.trio
async def test_a_result_whose_file_is_gone_is_not_kept_but_how_a_request_failed_is_told(tmp_path: Path) -> None:
    done, failed = a_submit(), a_submit()
    async with (
        daemon(tmp_path, **SQLITE) as relay,
        fake_worker(relay.url) as worker,
        peer(relay.url, "client") as client,
    ):
        await spoken(worker, client, done)
        client.send(failed)
        assign = await worker.assigned()
        worker.speak(assign, PCM, end=False)
        worker.send(Failed(**identity(assign, 4), code="engine_failed", message="it burst"))
        await client.frames(failed)
        await until(lambda: not relay.relay.finalizer.unfinalized)
    for path in (tmp_path / "results").iterdir():
        data = path.read_bytes()
        path.write_bytes(data[:-1])
    async with daemon(tmp_path, **SQLITE) as relay:
        assert "has completed, and its result is no longer kept" in (await refused(relay, done.request_id)).message
        async with peer(relay.url, "client") as client:
            client.send(Attach(request_id=failed.request_id, attempt=1, after_seq=2))
            frame = await client.next(Failed)
            assert (frame.code, frame.message, frame.retryable) == ("engine_failed", "it burst", False), (
                "as it was told"
            )
        assert files(tmp_path) == []


# -- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_results_that_have_a_file_leave_the_memory_first_and_are_all_still_fetched(tmp_path: Path) -> None:
    limit = 100_000
    async with (
        daemon(tmp_path, **SQLITE, results={"memory_bytes": limit}) as relay,
        fake_worker(relay.url) as worker,
        peer(relay.url, "client") as client,
    ):
        told = {}
        for number in range(60):  # 7.5 KB each
            submit = a_submit()
            told[submit.request_id] = await spoken(worker, client, submit, [samples(3_000, number)])
        await until(lambda: not relay.relay.finalizer.unfinalized)
        await until(lambda: relay.relay.results.memory.held_bytes <= limit)
        requests = relay.relay.requests.values()
        assert sum(request.log.memory_bytes for request in requests) == relay.relay.results.memory.held_bytes
        assert sum(request.log.memory_bytes > 0 for request in requests) > 10, "and no more of them than must"
        for request_id, frames in told.items():
            assert await fetched(relay, request_id) == frames
        await relay.at_rest()
        assert relay.relay.results.memory.held_bytes <= limit


@pytest.mark.trio
async def test_a_live_request_that_outgrows_the_memory_is_read_from_its_file_by_who_is_behind(tmp_path: Path) -> None:
    limit = 1_000_000
    async with daemon(tmp_path, **SQLITE, results={"memory_bytes": limit}) as relay, fake_worker(relay.url) as worker:
        cable = Cable()
        async with peer(relay.url, "client") as quick, peer(relay.url, "client", connect_to=cable.connect) as slow:
            submit = a_submit()
            quick.send(submit)
            assign = await worker.assigned()
            slow.send(Attach(request_id=submit.request_id))
            await slow.settled()
            cable.pulled = True
            worker.speak(assign, LONG, end=False)
            for pcm in LONG:
                assert (await quick.next(Audio)).pcm == pcm
            request = relay.relay.requests[submit.request_id]
            await until(lambda: relay.relay.results.memory.held_bytes <= limit)
            assert request.live
            assert request.log.size_bytes > 4_000_000
            assert files(tmp_path) == [submit.request_id]
            async with peer(relay.url, "client") as late:
                late.send(Attach(request_id=submit.request_id, attempt=1, after_seq=0))
                for pcm in LONG:
                    assert (await late.next(Audio)).pcm == pcm
                worker.send(Completed(**identity(assign, 9), result={}))
                assert (await late.next(Completed)).seq == 9
            slow.link.abort("done")
        frames = await fetched(relay, submit.request_id)
        assert [frame.pcm for frame in frames[1:-1]] == LONG
        await relay.at_rest()


@pytest.mark.trio
async def test_what_was_spilled_of_a_running_request_is_void_after_a_restart(tmp_path: Path) -> None:
    instance, submit = an_id(), a_submit()
    options = SQLITE | {"results": {"memory_bytes": 100_000}}
    async with (
        daemon(tmp_path, **options) as relay,
        fake_worker(relay.url, instance=instance) as worker,
        peer(relay.url, "client") as client,
    ):
        client.send(submit)
        assign = await worker.assigned()
        worker.speak(assign, LONG, end=False)
        await until(lambda: submit.request_id in files(tmp_path))
        await relay.relay.store.flush()
    running = (Running(request_id=submit.request_id, attempt=1, next_seq=10),)
    async with (
        daemon(tmp_path, **options) as relay,
        fake_worker(relay.url, instance=instance, running=running) as worker,
    ):
        assert files(tmp_path) == []
        assert [one.next_seq for one in (await worker.peer.next(Registered)).resume] == [0]
        worker.speak(assign, LONG)
        await worker.peer.next(Ack)
        assert [frame.pcm for frame in (await fetched(relay, submit.request_id))[1:-1]] == LONG


# -- disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_the_oldest_files_make_room(tmp_path: Path) -> None:
    limits = {"disk_bytes": 20_000, "memory_bytes": 1}
    async with (
        daemon(tmp_path, **SQLITE, results=limits) as relay,
        fake_worker(relay.url) as worker,
        peer(relay.url, "client") as client,
    ):
        submits = [a_submit() for _ in range(5)]  # 6.5 KB each: three of them fit
        for submit in submits:
            await spoken(worker, client, submit)
            await until(lambda: not relay.relay.finalizer.unfinalized)
        await until(lambda: files(tmp_path) == sorted(submit.request_id for submit in submits[2:]))
        assert "is no longer kept" in (await refused(relay, submits[0].request_id)).message
        assert len(await fetched(relay, submits[2].request_id)) == 5
        spool = relay.relay.results.spool
        assert spool is not None
        assert spool.used_bytes == sum(path.stat().st_size for path in (tmp_path / "results").iterdir()) <= 20_000


@pytest.fixture
def _reaps_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "REAP_INTERVAL_S", 0.02)


@pytest.mark.trio
@pytest.mark.usefixtures("_reaps_often")
async def test_what_is_forgotten_leaves_no_file(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path, **SQLITE, results={"retain_s": 0.2}) as relay,
        fake_worker(relay.url) as worker,
        peer(relay.url, "client") as client,
    ):
        await spoken(worker, client, a_submit())
        await until(lambda: bool(files(tmp_path)))
        await until(lambda: not relay.relay.requests and not files(tmp_path))
        assert relay.relay.results.memory.held_bytes == 0
        spool = relay.relay.results.spool
        assert spool is not None
        await until(lambda: not spool._sizes)  # else it grows with each request


class FullDisk:
    """A disk that takes no results while it is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = True

        for name in ("write", "seal"):
            monkeypatch.setattr(ResultFolder, name, self._only_with_room(getattr(ResultFolder, name)))

    def _only_with_room(self, method: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **options: Any) -> None:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            method(*args, **options)

        return call


@pytest.mark.trio
@pytest.mark.usefixtures("_reaps_often")
async def test_what_a_full_disk_does_not_take_is_kept_in_memory_and_written_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(monkeypatch)
    with kept_logs() as logs:
        async with (
            daemon(tmp_path, **SQLITE) as relay,
            fake_worker(relay.url) as worker,
            peer(relay.url, "client") as client,
        ):
            submits = [a_submit(), a_submit()]
            told = []
            for submit in submits:
                told.append(await spoken(worker, client, submit))
                await worker.peer.next(Ack)
            assert await fetched(relay, submits[0].request_id) == told[0]
            assert files(tmp_path) == []
            disk.full = False
            await until(lambda: files(tmp_path) == sorted(submit.request_id for submit in submits))
            await until(lambda: not relay.relay.results.unsaved_count)
    events = [log["event"] for log in logs if log["log_level"] in ("error", "info")]
    assert events.count("results cannot be written to disk; they stay in memory") == 1
    assert events.count("results can be written to disk again") == 1
    async with daemon(tmp_path, **SQLITE) as relay:
        for submit, frames in zip(submits, told, strict=True):
            assert await fetched(relay, submit.request_id) == frames


@pytest.mark.trio
async def test_only_the_request_that_fits_nowhere_fails_and_the_others_stream_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(monkeypatch)
    limit = 2_000_000
    async with (
        daemon(tmp_path, **SQLITE, results={"memory_bytes": limit}) as relay,
        fake_worker(relay.url, slots=2) as worker,
        peer(relay.url, "client") as client,
    ):
        await spoken(worker, client, old := a_submit())
        big, small = a_submit(), a_submit()
        client.send(small)
        going = await worker.assigned()
        worker.speak(going, PCM[:1], end=False)
        client.send(big)
        assign = await worker.assigned()
        worker.speak(assign, LONG, end=False)
        while (frame := await client.next(Failed, Audio)).TYPE != "failed":
            assert frame.request_id in (big.request_id, small.request_id)
        assert (frame.request_id, frame.code, frame.retryable) == (big.request_id, "storage_full", True)
        assert (await worker.peer.next(Cancel)).request_id == big.request_id
        await until(lambda: relay.relay.results.memory.held_bytes <= limit)
        worker.send(Cancelled(**identity(assign, 9)))
        worker.speak(going, PCM, first=2)
        assert (await client.next(Completed)).request_id == small.request_id
        assert [frame.pcm for frame in (await fetched(relay, small.request_id))[1:-1]] == PCM
        client.send(Attach(request_id=big.request_id))
        assert (await client.next(Failed, Audio)).code == "storage_full"
        assert not relay.relay.requests[old.request_id].has_result, "what has ended goes before what runs"
        disk.full = False
        again = a_submit()
        assert len(await spoken(worker, client, again, LONG)) == 10
        await relay.at_rest()


@pytest.mark.trio
async def test_a_result_that_cannot_be_read_back_is_refused_and_a_running_request_fails(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path, **SQLITE, results={"memory_bytes": 1}) as relay,
        fake_worker(relay.url, slots=2) as worker,
        peer(relay.url, "client") as client,
    ):
        done, runs = a_submit(), a_submit()
        await spoken(worker, client, done)
        client.send(runs)
        assign = await worker.assigned()
        worker.speak(assign, PCM, end=False)
        request = relay.relay.requests[runs.request_id]
        await until(lambda: request.log.file_part.frames == 4 and not request.log.memory_bytes)
        await until(lambda: not relay.relay.requests[done.request_id].log.memory_bytes)
        for path in (tmp_path / "results").iterdir():
            path.write_bytes(b"")
        refusal = await refused(relay, done.request_id)
        assert (refusal.code, refusal.request_id) == ("internal", done.request_id)
        assert "is no longer kept" in (await refused(relay, done.request_id)).message
        async with peer(relay.url, "client") as late:
            late.send(Attach(request_id=runs.request_id))
            assert (await late.next(Failed, Audio)).code == "internal"
        await until(lambda: not files(tmp_path))
        await relay.goes_on()


@pytest.mark.trio
async def test_a_relay_that_has_restored_its_requests_keeps_no_second_copy_of_them(tmp_path: Path) -> None:
    async with daemon(tmp_path, **SQLITE) as relay, peer(relay.url, "client") as client:
        for _ in range(3):
            client.send(a_submit(detach=True))
            await client.next(Accepted)
    async with daemon(tmp_path, **SQLITE) as relay:
        assert len(relay.relay.requests) == 3
        gc.collect()
        assert not [each for each in gc.get_objects() if type(each) is RequestRecord]
