"""What is being read, or is not safe yet, is left alone by whatever makes room and forgets."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from protocol.wire.frames import Audio, Failed
from protocol.wire.messages import Accepted, Attach
from relayd.core.relay import Relay
from relayd.core.retention import Stored
from relayd.frames.frame_log import FrameLog
from relayd.requests.request import Request
from tests.support.fake_worker import fake_worker, identity, samples
from tests.support.relay import Daemon, a_submit, daemon, peer, until

PCM = [samples(1_000, seed) for seed in (1, 2, 3)]


@asynccontextmanager
async def ended(tmp_path: Path, count: int, **options: Any) -> AsyncIterator[tuple[Daemon, list[Request]]]:
    """A relay with ended requests that nobody reads, oldest first."""
    async with (
        daemon(tmp_path, **options) as relay,
        fake_worker(relay.url) as worker,
        peer(relay.url, "client") as client,
    ):
        requests = []
        for _ in range(count):
            submit = a_submit()
            client.send(submit)
            worker.speak(await worker.assigned(), PCM)
            await client.frames(submit)
            requests.append(relay.relay.requests[submit.request_id])
            await until(lambda: not relay.relay.finalizer.unfinalized)  # so that their order is that of their files
        await until(lambda: not any(request.log.readers for request in requests))
        yield relay, requests


@contextmanager
def read(log: FrameLog) -> Iterator[None]:
    """Somebody reads it in the block, and does not get on."""
    reader: Any = object()
    log.readers.add(reader)
    try:
        yield
    finally:
        log.readers.remove(reader)


def whole(request: Request) -> bool:
    """Whether its frames can be fetched."""
    return request.has_result and request.log.next_seq == len(PCM) + 2


@pytest.mark.trio
async def test_an_ended_request_is_forgotten_when_its_time_is_over_and_never_while_it_is_read(tmp_path: Path) -> None:
    async with ended(tmp_path, 2) as (relay, (first, second)):
        results = relay.relay.results
        retain_s = relay.relay.config.results.retain_s
        assert first.ended_at is not None
        assert second.ended_at is not None
        with read(first.log):
            results._reap(first.ended_at + retain_s)
            assert first.request_id in relay.relay.requests
        results._reap(min(first.ended_at + retain_s - 0.001, second.ended_at + retain_s - 0.001))
        assert {first.request_id, second.request_id} <= set(relay.relay.requests), "not a moment too early"
        results._reap(first.ended_at + retain_s)
        assert first.request_id not in relay.relay.requests
        assert (second.request_id in relay.relay.requests) is (second.ended_at > first.ended_at)


@pytest.mark.trio
async def test_an_end_that_is_not_safe_yet_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with ended(tmp_path, 1) as (relay, (request,)):
        monkeypatch.setattr(Relay, "is_finalizing", lambda _relay, asked: asked is request)
        relay.relay.results._reap(trio.current_time() + 1e6)
        assert request.request_id in relay.relay.requests
        monkeypatch.setattr(Relay, "is_finalizing", lambda _relay, _asked: False)
        relay.relay.results._reap(trio.current_time() + 1e6)
        assert request.request_id not in relay.relay.requests


@pytest.mark.trio
async def test_what_still_waits_is_never_forgotten(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as client:
        submit = a_submit()
        client.send(submit)
        await client.next(Accepted)
        relay.relay.results._reap(trio.current_time() + 1e6)
        assert submit.request_id in relay.relay.requests


@pytest.mark.trio
async def test_over_their_number_the_oldest_go_and_those_that_are_read_stay(tmp_path: Path) -> None:
    async with ended(tmp_path, 3) as (relay, (first, second, third)):
        relay.relay.principals.usage_of("ann").max_retained = 1
        first.principal = second.principal = third.principal = "ann"  # a local user has no limits
        with read(first.log):
            relay.relay.results._reap(trio.current_time())
            assert [request.request_id for request in (first, third)] == list(relay.relay.requests)
        assert whole(third)
        assert second.request_id not in relay.relay.requests


@pytest.mark.trio
async def test_room_on_disk_is_not_made_of_what_is_being_read(tmp_path: Path) -> None:
    async with ended(tmp_path, 3, store="sqlite") as (relay, (first, second, third)):
        results = relay.relay.results
        assert results.spool is not None
        size = results.spool.used_bytes // 3
        results.spool.disk_bytes = results.spool.used_bytes
        assert await results._make_room(0)
        assert all(map(whole, (first, second, third))), "it is full to the last byte, and no more is asked for"
        with read(first.log):
            assert await results._make_room(size)
            assert [whole(request) for request in (first, second, third)] == [True, False, True]
            with read(third.log):
                assert not await results._make_room(2 * size), "what is left is being read"
        assert whole(first)
        assert whole(third)


@pytest.mark.trio
@pytest.mark.parametrize("store", ["memory", "sqlite"])
async def test_of_many_results_several_go_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str) -> None:
    monkeypatch.setattr("relayd.core.retention.ONE_IN", 2)
    async with ended(tmp_path, 6, store=store) as (relay, requests):
        results = relay.relay.results
        with read(requests[0].log), read(requests[1].log):
            if results.spool is None:
                results.memory.limit_bytes = results.memory.held_bytes - 1
                results.memory.add(0)
                await until(lambda: not results.memory.over)
            else:
                results.spool.disk_bytes = results.spool.used_bytes
                assert await results.spool.make_room(1, FrameLog())
        assert list(map(whole, requests)) == [True, True, False, False, True, True]


@pytest.mark.trio
async def test_results_of_an_earlier_relay_make_room_like_any_other(tmp_path: Path) -> None:
    async with ended(tmp_path, 1, store="sqlite") as (_, (request,)):
        pass
    async with daemon(tmp_path, store="sqlite") as relay:
        spool = relay.relay.results.spool
        assert spool is not None
        spool.disk_bytes = spool.used_bytes
        assert await spool.make_room(1, FrameLog())
        assert not relay.relay.requests[request.request_id].has_result


@pytest.mark.trio
async def test_where_no_room_can_be_made_nobody_looks_for_more_again_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relayd.core.retention.RETRY_S", 60.0)
    async with ended(tmp_path, 2, store="sqlite") as (relay, (first, second)):
        spool = relay.relay.results.spool
        assert spool is not None
        spool.disk_bytes = spool.used_bytes
        second.principal = "ann"
        with read(first.log), read(second.log):
            assert not await spool.make_room(10, first.log)
        assert not await spool.make_room(10, first.log)
        assert whole(first)
        assert await spool.make_room(9, first.log), "less was not refused"
        assert (whole(first), whole(second)) == (False, True)
        with read(second.log):
            assert not await spool.make_room(spool.disk_bytes, first.log)
        assert await spool.make_room(spool.disk_bytes, second.log), "nor was another principal"


@pytest.mark.trio
async def test_who_begins_to_read_while_room_is_made_keeps_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ended(tmp_path, 2, store="sqlite") as (relay, (first, second)):
        results = relay.relay.results
        spool = results.spool
        assert spool is not None
        spool.disk_bytes = 0
        remove = type(spool).remove
        reader: Any = object()

        async def read_meanwhile(self: Any, log: FrameLog) -> None:
            second.log.readers.add(reader)
            await remove(self, log)

        monkeypatch.setattr(type(spool), "remove", read_meanwhile)
        assert not await results._make_room(0)
        second.log.readers.remove(reader)
        assert (whole(first), whole(second)) == (False, True)


@pytest.mark.trio
async def test_what_is_forgotten_while_room_is_made_is_left_to_whoever_has_its_id_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ended(tmp_path, 2, store="sqlite") as (relay, (first, second)):
        spool = relay.relay.results.spool
        assert spool is not None
        spool.disk_bytes = 0
        remove = type(spool).remove

        async def forget_meanwhile(self: Any, log: FrameLog) -> None:
            if log is first.log:
                relay.relay.remove_request(second)
            await remove(self, log)

        monkeypatch.setattr(type(spool), "remove", forget_meanwhile)
        await relay.relay.results._make_room(0)
        assert (first.has_result, second.has_result) == (False, True)


@pytest.mark.trio
async def test_memory_is_not_freed_of_what_is_being_read_and_only_as_far_as_needed(tmp_path: Path) -> None:
    async with ended(tmp_path, 3) as (relay, (first, second, third)):
        results = relay.relay.results
        results.memory.limit_bytes = results.memory.held_bytes - 1
        with read(first.log):
            assert results._drop_unsaved()
        assert [whole(request) for request in (first, second, third)] == [True, False, True]
        results.memory.limit_bytes = results.memory.held_bytes
        assert not results._drop_unsaved()
        assert whole(third)


@pytest.mark.trio
async def test_whoever_keeps_most_loses_first(tmp_path: Path) -> None:
    async with ended(tmp_path, 4) as (relay, requests):
        for request, principal in zip(requests, ("ann", "bob", "bob", "bob"), strict=True):
            request.principal = principal
        results = relay.relay.results
        weighed = {request: request.log.memory_bytes for request in requests}
        assert len(set(weighed.values())) == 1
        results.memory.limit_bytes = results.memory.held_bytes - 2 * weighed[requests[0]] + 1
        results._drop_unsaved()
        assert [whole(request) for request in requests] == [True, False, False, True]
        assert attrs.asdict(results.memory)["held_bytes"] == 2 * weighed[requests[0]]


@pytest.mark.trio
async def test_whoever_keeps_most_loses_until_others_have_as_much(tmp_path: Path) -> None:
    async with ended(tmp_path, 5) as (relay, requests):
        for request, principal in zip(requests, ("ann", "bob", "bob", "bob", "ann"), strict=True):
            request.principal = principal
        results = relay.relay.results
        results.memory.limit_bytes = requests[0].log.memory_bytes
        results._drop_unsaved()
        assert [whole(request) for request in requests] == [False, False, False, True, False]


@pytest.mark.trio
async def test_whoever_has_most_on_disk_loses_first(tmp_path: Path) -> None:
    async with ended(tmp_path, 4, store="sqlite") as (relay, requests):
        for request, principal in zip(requests, ("ann", "bob", "bob", "bob"), strict=True):
            request.principal = principal
        spool = relay.relay.results.spool
        assert spool is not None
        spool.disk_bytes = spool.used_bytes
        assert await relay.relay.results._make_room(spool.used_bytes // 2)
        assert [whole(request) for request in requests] == [True, False, False, True]


@pytest.mark.trio
@pytest.mark.parametrize(("limit", "left"), [(4.0, 4), (3.5, 3), (3.2, 2), (0.0, 0)])
async def test_memory_is_freed_to_seven_eighths_of_what_has_a_file_the_oldest_first(
    tmp_path: Path, limit: float, left: int
) -> None:
    async with ended(tmp_path, 4, store="sqlite") as (relay, requests):
        results = relay.relay.results
        results.memory.limit_bytes = (
            limit * 8 / 7 * results.memory.held_bytes / 4 if left == 4 else (limit * results.memory.held_bytes / 4)
        )
        await results._free_memory()
        assert [bool(request.log.memory_bytes) for request in requests] == [False] * (4 - left) + [True] * left
        in_file = [results.stored[request] is Stored.FILE for request in requests]
        assert in_file == [True] * (4 - left) + [False] * left
        assert all(map(whole, requests))


@pytest.mark.trio
async def test_of_what_runs_the_largest_goes_to_disk_first(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path, store="sqlite") as relay,
        fake_worker(relay.url, slots=3) as worker,
        peer(relay.url, "client") as client,
    ):
        logs = []
        for frames in (1, 3, 2):
            submit = a_submit()
            client.send(submit)
            worker.speak(await worker.assigned(), PCM[:frames], end=False)
            for _ in range(frames):
                await client.next(Audio)
            logs.append(relay.relay.requests[submit.request_id].log)
        results = relay.relay.results
        results.memory.limit_bytes = results.memory.held_bytes * 0.7
        await results._free_memory()
        assert [bool(log.memory_bytes) for log in logs] == [True, False, True]
        await results._free_memory()
        assert [bool(log.memory_bytes) for log in logs] == [True, False, True], "that was enough"


@pytest.mark.trio
async def test_what_is_stored_anew_is_the_last_to_go(tmp_path: Path) -> None:
    async with ended(tmp_path, 3, store="sqlite") as (relay, (first, second, third)):
        results = relay.relay.results
        assert list(results.stored) == [first, second, third]
        assert await results.seal(second)
        assert list(results.stored) == [first, second, third], "it was there already"
        results.stored[first] = Stored.MEMORY
        assert results.unsaved_count == 1
        assert await results.seal(first)
        assert list(results.stored) == [second, third, first]
        relay.relay.remove_request(second)
        assert not await results.seal(second)
        assert list(results.stored) == [third, first], "what is forgotten does not come back"


@pytest.mark.trio
async def test_how_a_request_failed_is_told_though_its_frames_made_room(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path) as relay,
        fake_worker(relay.url) as worker,
        peer(relay.url, "client") as client,
    ):
        submit = a_submit()
        client.send(submit)
        assign = await worker.assigned()
        worker.speak(assign, PCM, end=False)
        worker.send(Failed(**identity(assign, 4), code="invalid_params", message="no", retryable=False))
        told = (await client.frames(submit))[-1]
        request = relay.relay.requests[submit.request_id]
        await until(lambda: not relay.relay.finalizer.unfinalized and not request.log.readers)
        results = relay.relay.results
        results.memory.limit_bytes = 0
        assert results._drop_unsaved()
        assert (results.unsaved_count, request.has_result, request.log.first_seq) == (0, True, 4)
        assert results.memory.held_bytes == request.log.memory_bytes > 0
        client.send(Attach(request_id=submit.request_id, attempt=1, after_seq=1))
        assert await client.next(Failed) == told


@pytest.mark.trio
async def test_limits_that_were_reloaded_hold_at_the_next_look(tmp_path: Path) -> None:
    async with ended(tmp_path, 3, store="sqlite") as (relay, (first, second, third)):
        results = relay.relay.results
        assert results.spool is not None
        size = results.disk_bytes // 3
        smaller = attrs.evolve(relay.relay.config.results, memory_bytes=1, disk_bytes=2 * size)
        relay.relay.config = attrs.evolve(relay.relay.config, results=smaller)
        await results._keep_limits()
        assert (results.memory.limit_bytes, results.spool.disk_bytes) == (1, 2 * size)
        assert [whole(request) for request in (first, second, third)] == [False, True, True]
        assert results.disk_bytes <= 2 * size
        await until(lambda: not results.memory.held_bytes)  # it was told that memory is over its limit


@pytest.mark.trio
async def test_what_ended_first_is_forgotten_first_and_by_the_store_too(tmp_path: Path) -> None:
    async with ended(tmp_path, 3, store="sqlite") as (relay, (first, second, third)):
        assert third.ended_at is not None
        first.ended_at = third.ended_at + 1.0  # it ran for longer than those that came after it
        for request in (first, second, third):
            request.principal = "ann"
        relay.relay.principals.usage_of("ann").max_retained = 1
        relay.relay.results._reap(trio.current_time())
        assert list(relay.relay.requests) == [first.request_id]
        await relay.relay.store.flush()
        assert [record.request_id for record in (await relay.relay.store.load()).requests] == [first.request_id]


@pytest.mark.trio
async def test_without_files_nothing_is_on_disk(tmp_path: Path) -> None:
    async with ended(tmp_path, 1) as (relay, (request,)):
        assert relay.relay.results.disk_bytes == 0
        assert not await relay.relay.results.seal(request)
        assert relay.relay.results.stored == {request: Stored.MEMORY}
