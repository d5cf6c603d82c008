"""Requests that join an equal one which still runs, and what becomes of them."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from protocol.wire.frames import Audio, Cancelled, Completed, Failed, Frame, Started
from protocol.wire.messages import (
    Accepted,
    Attach,
    Cancel,
    Queued,
    Registered,
    Rejected,
    Status,
    StatusReply,
)
from protocol.wire.structs import Running
from relayd.core import copies
from tests.relayd.core.equal_requests import CACHE, ONE, PCM, a_relay, a_stage, cached, digest, joined, spoken
from tests.support.fake_worker import FORMAT, fake_worker, identity, samples
from tests.support.relay import a_submit, an_id, peer, until

# -- one that still runs ------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_an_equal_request_joins_one_that_runs(tmp_path: Path) -> None:
    async with (
        a_relay(tmp_path) as relay,
        fake_worker(relay.url, slots=2, **ONE) as worker,
        joined(relay, worker) as (one, assign, other, submit),
    ):
        worker.speak(assign, PCM, first=3)
        rest = await other.frames(submit, first=3)
        assert [frame.TYPE for frame in rest] == ["audio", "completed"]
        assert rest[-1].cached
        last = await one.next(Completed)
        assert not last.cached
        assert relay.relay.requests[submit.request_id].audio_s == 0.125
        await relay.at_rest()
        assert relay.relay.stats.space("tts").run_s.sum > 0.0
        assert sum(relay.relay.stats.space("tts").run_s.counts) == 1


@pytest.mark.trio
async def test_a_queued_request_joins_an_equal_one_that_starts(tmp_path: Path) -> None:
    async with a_stage(tmp_path) as (relay, worker, client):
        client.send(before := a_submit("before"))
        assign = await worker.assigned()
        equal = [a_submit() for _ in range(3)]
        for submit in equal:
            client.send(submit)
            assert not (await client.next(Accepted)).cached or submit is before
        worker.speak(assign, PCM)
        assign = await worker.assigned()
        assert assign.request_id == equal[0].request_id
        worker.speak(assign, PCM)
        ends: dict[str, bool | None] = {}
        while len(ends) < 4:
            end = await client.next(Completed)
            ends[end.request_id] = end.cached
        assert ends == {before.request_id: None, equal[0].request_id: None} | {
            each.request_id: True for each in equal[1:]
        }
        await relay.at_rest()


@pytest.mark.trio
@pytest.mark.parametrize("retry", ["never", "before_output"])
@pytest.mark.parametrize("end", ["failed", "cancelled"])
async def test_a_joined_request_goes_on_when_the_first_gives_no_result(tmp_path: Path, end: str, retry: str) -> None:
    """A worker that makes the same frames continues it: none is heard twice."""
    async with (
        a_relay(tmp_path) as relay,
        fake_worker(relay.url, **ONE) as worker,
        joined(relay, worker, retry=retry) as (one, assign, other, submit),
    ):
        if end == "failed":
            worker.send(Failed(**identity(assign, 3), code="engine_failed", message="no"))
        else:
            one.send(Cancel(request_id=assign.request_id))
            await worker.peer.next(Cancel)
            worker.send(Cancelled(**identity(assign, 3)))
        again = await worker.assigned()
        assert (again.request_id, again.from_seq) == (submit.request_id, 3)
        request = relay.relay.requests[submit.request_id]
        assert request.attempt_started_at < request.catches_up_until < request.attempt_started_at + 60.0
        worker.speak(again, PCM, first=3)
        rest = await other.frames(submit, first=3)
        assert [frame.TYPE for frame in rest] == ["audio", "completed"]
        assert not rest[-1].cached
        assert relay.relay.requests[submit.request_id].entry.losses == 0
        await relay.at_rest()


@pytest.mark.trio
async def test_of_many_that_joined_one_is_run_when_the_first_gives_no_result(tmp_path: Path) -> None:
    async with (
        a_relay(tmp_path) as relay,
        fake_worker(relay.url, **ONE) as worker,
        joined(relay, worker) as (_one, assign, other, submit),
        peer(relay.url, "client") as third,
    ):
        third.send(last := a_submit())
        assert (await third.next(Accepted)).cached
        worker.send(Failed(**identity(assign, 3), code="engine_failed", message="no"))
        again = await worker.assigned()
        assert again.request_id in (submit.request_id, last.request_id)
        worker.speak(again, PCM, first=again.from_seq)
        assert digest([*(await other.frames(submit, first=3))]) == digest([Audio(**identity(again, 1), pcm=PCM[2])])
        frames = await third.frames(last)
        assert digest(frames) == hashlib.sha256(b"".join(PCM)).hexdigest()
        await relay.at_rest()


@pytest.mark.trio
async def test_a_lost_attempt_of_the_first_is_heard_on_by_the_joined(tmp_path: Path) -> None:
    async with (
        a_relay(tmp_path, CACHE | {"max_workers": 2}, limits={"worker_grace_s": 0.1}) as relay,
        fake_worker(relay.url, name="second", **ONE) as second,
    ):
        await second.peer.next(Registered)
        relay.relay.workers.drain(next(iter(relay.relay.workers)))
        async with (
            fake_worker(relay.url, **ONE) as worker,
            joined(relay, worker) as (_one, assign, other, submit),
        ):
            relay.relay.workers.undrain(next(iter(relay.relay.workers)))
            await worker.peer.cut()
            again = await second.assigned()
            assert (again.request_id, again.from_seq) == (assign.request_id, 3)
            second.speak(again, PCM, first=3)
            rest = await other.frames(submit, first=3)
            assert [frame.TYPE for frame in rest] == ["audio", "completed"]
            await relay.at_rest()


@pytest.mark.trio
async def test_a_joined_request_can_be_cancelled_alone(tmp_path: Path) -> None:
    async with (
        a_relay(tmp_path) as relay,
        fake_worker(relay.url, **ONE) as worker,
        joined(relay, worker) as (one, assign, other, submit),
    ):
        other.send(Cancel(request_id=submit.request_id))
        assert isinstance((await other.frames(submit, first=3))[-1], Cancelled)
        worker.speak(assign, PCM, first=3)
        await one.next(Completed)
        await relay.at_rest()


@pytest.mark.trio
async def test_joined_requests_use_no_slot_and_none_of_the_requests_a_principal_may_run(tmp_path: Path) -> None:
    async with (
        a_relay(tmp_path, CACHE | {"max_running_per_principal": 2}) as relay,
        fake_worker(relay.url, slots=2, **ONE) as worker,
        joined(relay, worker) as (one, assign, _other, _submit),
    ):
        one.send(a_submit("other"))
        more = await worker.assigned()
        for each in (assign, more):
            worker.speak(each, PCM, first=3 if each is assign else 0)
        await relay.at_rest()


@pytest.mark.trio
async def test_what_waits_does_not_join_a_request_whose_frames_are_never_the_same(tmp_path: Path) -> None:
    async with a_relay(tmp_path) as relay, peer(relay.url, "client") as client:
        submits = [a_submit(), a_submit()]
        for submit in submits:
            client.send(submit)
        async with fake_worker(relay.url) as worker:
            for submit in submits:
                assign = await worker.assigned()
                assert assign.request_id == submit.request_id
                worker.speak(assign, PCM)


@pytest.mark.trio
@pytest.mark.parametrize("why_not", ["other frames each time", "it is being cancelled"])
async def test_what_runs_is_not_joined_if_its_frames_are_not_to_be_had(tmp_path: Path, why_not: str) -> None:
    kind: dict[str, Any] = ONE if why_not == "it is being cancelled" else {}
    async with (
        a_relay(tmp_path, limits={"cancel_grace_s": 60.0}) as relay,
        fake_worker(relay.url, slots=2, **kind) as worker,
        peer(relay.url, "client") as client,
    ):
        client.send(first := a_submit())
        assert (await worker.assigned()).request_id == first.request_id
        if why_not == "it is being cancelled":
            client.send(Cancel(request_id=first.request_id))
            await worker.peer.next(Cancel)
        client.send(second := a_submit())
        assert (await worker.assigned()).request_id == second.request_id


@pytest.mark.trio
async def test_what_runs_on_a_worker_that_is_away_is_not_joined_where_another_makes_other_frames(
    tmp_path: Path,
) -> None:
    async with a_relay(tmp_path, CACHE | {"max_workers": 2}) as relay, peer(relay.url, "client") as client:
        async with fake_worker(relay.url, **ONE) as worker:
            client.send(a_submit())
            worker.speak(await worker.assigned(), PCM[:1], end=False)
            await client.next(Audio)
        async with fake_worker(relay.url, name="second", reproducible=True, fingerprint="two") as worker:
            await worker.peer.next(Registered)
            client.send(second := a_submit())
            assert (await worker.assigned()).request_id == second.request_id


@pytest.mark.trio
async def test_what_lost_the_request_that_it_joined_goes_on_only_with_the_same_frames(tmp_path: Path) -> None:
    instance, two = an_id(), ONE | {"fingerprint": "two"}
    async with (
        a_relay(tmp_path, CACHE | {"max_workers": 2}) as relay,
        peer(relay.url, "client") as client,
        peer(relay.url, "client") as other,
    ):
        async with fake_worker(relay.url, instance=instance, **ONE) as worker:
            client.send(a_submit())
            first = await worker.assigned()
            worker.speak(first, PCM[:1], end=False)
            await client.next(Audio)
            other.send(joins := a_submit())
            await other.next(Audio)
        async with fake_worker(relay.url, name="second", **two) as second:
            await second.peer.next(Registered)
            client.send(a_submit())
            second.speak(await second.assigned(), PCM[:2], end=False)
            running = (Running(request_id=first.request_id, attempt=1, next_seq=2),)
            async with fake_worker(relay.url, instance=instance, running=running, **ONE) as worker:
                await worker.peer.next(Registered)
                worker.send(
                    Failed(**identity(first, 2), code="invalid_params", message="", details={}, retryable=False)
                )
                assign = await worker.assigned()
                assert (assign.request_id, assign.from_seq) == (joins.request_id, 2)


@pytest.mark.trio
async def test_what_was_begun_elsewhere_and_joins_another_is_heard_from_its_beginning(tmp_path: Path) -> None:
    async with (
        a_relay(tmp_path, limits={"worker_grace_s": 0.05}) as relay,
        peer(relay.url, "client") as one,
        peer(relay.url, "client") as other,
    ):
        async with fake_worker(relay.url, **ONE) as worker:
            one.send(submit := a_submit())
            worker.send(Started(**identity(await worker.assigned(), 0), format=FORMAT))
            await one.next(Started)
            await worker.peer.cut()
        await until(lambda: relay.relay.requests[submit.request_id].entry.state == "queued")
        other.send(first := a_submit(priority=9))
        await other.next(Queued)
        async with fake_worker(relay.url, name="second", reproducible=True, fingerprint="two") as worker:
            assign = await worker.assigned()
            assert assign.request_id == first.request_id
            worker.speak(assign, PCM)
            frames = await one.frames(submit)
        assert {(frame.attempt, frame.TYPE) for frame in frames} == {(2, "started"), (2, "audio"), (2, "completed")}


@pytest.mark.trio
async def test_as_many_requests_are_copied_as_may_be_queued(tmp_path: Path) -> None:
    async with (
        a_relay(tmp_path, CACHE | {"max_queued_per_principal": 1}) as relay,
        fake_worker(relay.url, **ONE) as worker,
        joined(relay, worker) as (one, assign, _other, _submit),
    ):
        one.send(queued := a_submit())
        assert not (await one.next(Accepted)).cached
        one.send(a_submit())
        assert (await one.next(Rejected)).code == "queue_full"
        worker.speak(assign, PCM, first=3)
        await one.next(Completed)
        again = await worker.assigned()
        assert again.request_id == queued.request_id
        worker.speak(again, PCM)
        await relay.at_rest()


@pytest.mark.trio
async def test_what_was_queued_because_too_many_were_copied_is_copied_once_one_has_ended(tmp_path: Path) -> None:
    async with (
        a_relay(tmp_path, CACHE | {"max_queued_per_principal": 1}) as relay,
        fake_worker(relay.url, **ONE) as worker,
        joined(relay, worker) as (_one, assign, other, submit),
        peer(relay.url, "client") as late,
    ):
        late.send(queued := a_submit())
        assert not (await late.next(Accepted)).cached
        other.send(Cancel(request_id=submit.request_id))
        assert isinstance((await other.frames(submit, 3))[-1], Cancelled)
        assert [(await late.next(Frame)).seq for _ in range(3)] == [0, 1, 2]  # from the one that still runs
        worker.speak(assign, PCM, first=3)
        frames = await late.frames(queued, 3)
        assert frames[-1].cached
        await relay.at_rest()


@pytest.mark.trio
async def test_what_is_copied_waits_while_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of it at least: it does not stop for good, as it may itself be what fills the memory."""
    monkeypatch.setattr(copies, "FULL_S", 0.01)
    monkeypatch.setattr(copies, "POLL_S", 0.001)
    long = [samples(1_000, seed) * 100 for seed in range(1, 9)]  # 1.6 MB
    async with a_stage(tmp_path, results={"memory_bytes": 2_000_000}) as (relay, worker, client):
        await spoken(worker, client, a_submit(), long)
        await cached(client, a_submit(), long)
        await relay.at_rest()


@pytest.mark.trio
async def test_a_copy_whose_source_goes_before_memory_has_room_for_the_rest_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "FULL_S", 60.0)
    monkeypatch.setattr(copies, "POLL_S", 0.001)
    long = [samples(1_000, seed) * 100 for seed in range(1, 9)]  # 1.6 MB
    async with a_stage(tmp_path, store="sqlite") as (relay, worker, client):
        await spoken(worker, client, first := a_submit(), long)
        await until(lambda: not relay.relay.finalizer.unfinalized)
        memory = relay.relay.results.memory
        memory.limit_bytes = -1
        client.send(second := a_submit())
        assert (await client.next(Accepted)).cached
        source, copy = (relay.relay.requests[each.request_id] for each in (first, second))
        await until(lambda: copy.log.next_seq > 0)
        for _ in range(20):  # longer than the rest would take
            await worker.peer.settled()
        assert copy.log.next_seq < source.log.next_seq
        relay.relay.remove_request(source)
        memory.limit_bytes = 10_000_000
        worker.speak(await worker.assigned(), long, first=copy.log.next_seq)
        assert digest(await client.frames(second)) == hashlib.sha256(b"".join(long)).hexdigest()


# -- restarts -----------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_results_answer_after_a_restart(tmp_path: Path) -> None:
    async with a_stage(tmp_path, store="sqlite") as (relay, worker, client):
        await spoken(worker, client, a_submit())
        await cached(client, second := a_submit())
        await relay.at_rest()
        await until(lambda: not relay.relay.finalizer.unfinalized)
    async with a_relay(tmp_path, store="sqlite") as relay, peer(relay.url, "client") as client:
        assert relay.relay.results.cache.has(relay.relay.requests[second.request_id])
        client.send(Attach(request_id=second.request_id))
        assert (await client.next(Accepted)).cached
        assert digest(await client.frames(second)) == hashlib.sha256(b"".join(PCM)).hexdigest()
        await cached(client, a_submit())


@pytest.mark.trio
@pytest.mark.parametrize("comes_back", [True, False])
async def test_a_joined_request_survives_a_restart_of_the_relay(tmp_path: Path, comes_back: bool) -> None:
    instance = an_id()
    async with (
        a_relay(tmp_path, store="sqlite") as relay,
        fake_worker(relay.url, instance=instance, **ONE) as worker,
        joined(relay, worker) as (_one, assign, _other, submit),
    ):
        await relay.relay.store.flush()
        await until(lambda: relay.relay.requests[submit.request_id].entry.has_output)
        await relay.relay.store.flush()
    running = (Running(request_id=assign.request_id, attempt=1, next_seq=3),) if comes_back else ()
    async with (
        a_relay(tmp_path, store="sqlite", limits={"worker_grace_s": 0.1}) as relay,
        peer(relay.url, "client") as client,
        fake_worker(relay.url, instance=instance, running=running, **ONE) as worker,
    ):
        client.send(Attach(request_id=submit.request_id, attempt=1, after_seq=2))
        await client.settled()
        if comes_back:
            assert relay.relay.requests[submit.request_id].entry.worker_id is None, "else it could not be cancelled"
            worker.speak(assign, PCM)
        else:
            again = await worker.assigned()
            assert again.from_seq == 0
            worker.speak(again, PCM)
        frames: list[Frame] = []
        while not frames or not frames[-1].ENDS:
            frames.append(await client.next(Frame))
        assert isinstance(frames[-1], Completed)
        # With its source, the attempt that the client knows goes on; another may begin anew.
        assert [frame.seq for frame in frames] == [0, 1, 2, 3, 4]
        assert {frame.attempt for frame in frames} == {1 if comes_back else frames[-1].attempt}
        assert digest(frames) == hashlib.sha256(b"".join(PCM)).hexdigest()
        await relay.at_rest()


@pytest.mark.trio
async def test_a_joined_request_is_queued_after_a_restart_that_knows_nothing_of_the_first(tmp_path: Path) -> None:
    async with (
        a_relay(tmp_path, store="sqlite") as relay,
        fake_worker(relay.url, **ONE) as worker,
        joined(relay, worker) as (_one, _assign, _other, submit),
    ):
        await until(lambda: relay.relay.requests[submit.request_id].entry.has_output)
        await relay.relay.store.flush()
    async with a_relay(tmp_path, {}, store="sqlite") as relay, peer(relay.url, "client") as client:
        client.send(Status(request_id=submit.request_id))
        assert (await client.next(StatusReply)).state == "queued"
