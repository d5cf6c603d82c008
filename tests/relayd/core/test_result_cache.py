"""Requests that are answered with the frames of equal ones: which, with what, for whom and for how long."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from protocol.wire.frames import Audio, Cancelled, Completed, Failed, Output, Started
from protocol.wire.messages import Accepted, Cancel, Input, Registered, Rejected, Submit
from relayd.config.schema import SpaceConfig
from relayd.core import result_cache
from relayd.core.retention import Retention
from relayd.store.database import DATABASE_NAME
from tests.relayd.core.equal_requests import (
    ANY,
    CACHE,
    ONE,
    PCM,
    a_relay,
    a_stage,
    cached,
    digest,
    hits,
    missed,
    spoken,
)
from tests.support.fake_worker import FORMAT, fake_worker, identity, samples
from tests.support.relay import Daemon, Peer, a_submit, an_input, new_token, peer, until

# -- what is answered ---------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_an_equal_request_has_the_same_samples_and_no_worker(tmp_path: Path) -> None:
    async with a_stage(tmp_path) as (relay, worker, client):
        first, second = a_submit(), a_submit()
        made = await spoken(worker, client, first)
        frames = await cached(client, second)
        assert [frame.TYPE for frame in frames] == ["started", "audio", "audio", "audio", "completed"]
        assert frames[0].format == FORMAT
        assert frames[-1].result == made[-1].result
        assert digest(frames) == digest(made)
        assert hits(relay) == (1, 1)
        await cached(client, a_submit())  # with the result of the second
        request = relay.relay.requests[second.request_id]
        assert request.audio_s == 0.125
        assert relay.relay.stats.space("tts").audio_ms == 125  # what a worker has made
        await relay.at_rest()


@pytest.mark.trio
async def test_the_order_of_params_does_not_matter(tmp_path: Path) -> None:
    async with a_stage(tmp_path) as (_relay, worker, client):
        await spoken(worker, client, a_submit(params={"text": "a", "rate": 1}))
        await cached(client, a_submit(params={"rate": 1, "text": "a"}, priority=3, run_timeout_s=5.0, detach=True))


@pytest.mark.trio
@pytest.mark.parametrize(
    "other",
    [
        a_submit("other"),
        a_submit(params={"text": "hello", "rate": 0}),
        a_submit(space="other"),
        a_submit(cache=False),
    ],
    ids=["text", "param", "space", "no cache"],
)
async def test_another_request_is_run(tmp_path: Path, other: Submit) -> None:
    async with (
        a_relay(tmp_path) as relay,
        fake_worker(relay.url, spaces=("tts", "other"), **ONE) as worker,
        peer(relay.url, "client") as client,
    ):
        await spoken(worker, client, a_submit())
        await missed(worker, client, other)


@pytest.mark.trio
async def test_a_result_of_a_request_without_cache_answers_none(tmp_path: Path) -> None:
    async with a_stage(tmp_path) as (relay, worker, client):
        await spoken(worker, client, a_submit(cache=False))
        await missed(worker, client, a_submit())
        assert hits(relay) == (0, 1)


async def uploaded(client: Peer, name: str, data: bytes, media_type: str = "audio/wav") -> Submit:
    submit = a_submit(inputs={name: an_input(data, media_type=media_type)})
    client.send(submit)
    client.send(Input(request_id=submit.request_id, name=name, offset=0, data=data))
    return submit


@pytest.mark.trio
async def test_inputs_count_by_name_type_and_content(tmp_path: Path) -> None:
    async with (
        a_relay(tmp_path) as relay,
        fake_worker(relay.url, inputs={"voice": ANY, "style": ANY}, **ONE) as worker,
        peer(relay.url, "client") as client,
    ):
        for args in (("voice", b"a"), ("voice", b"b"), ("style", b"a"), ("voice", b"a", "text/plain")):
            submit = await uploaded(client, *args)
            assign = await worker.assigned()
            assert assign.request_id == submit.request_id
            worker.speak(assign, PCM)
            assert not (await client.frames(submit))[-1].cached
        submit = await uploaded(client, "voice", b"a")
        assert (await client.frames(submit))[-1].cached
        assert hits(relay) == (1, 4)


@pytest.mark.trio
@pytest.mark.parametrize(
    "register",
    [{"reproducible": True, "fingerprint": "two"}, {"reproducible": True, "fingerprint": "one", "engine": "other"}, {}],
    ids=["fingerprint", "engine", "not reproducible"],
)
async def test_a_worker_that_makes_other_samples_is_asked(tmp_path: Path, register: dict[str, Any]) -> None:
    async with a_relay(tmp_path) as relay, peer(relay.url, "client") as client:
        async with fake_worker(relay.url, **ONE) as worker:
            await spoken(worker, client, a_submit())
        await until(lambda: not relay.relay.workers)
        async with fake_worker(relay.url, name="second", **register) as worker:
            await missed(worker, client, a_submit())
            if not register:
                await missed(worker, client, a_submit())


@pytest.mark.trio
async def test_without_a_worker_the_latest_result_answers(tmp_path: Path) -> None:
    async with a_relay(tmp_path) as relay, peer(relay.url, "client") as client:
        for fingerprint, pcm in (("one", PCM), ("two", PCM[:1])):
            async with fake_worker(relay.url, reproducible=True, fingerprint=fingerprint) as worker:
                await spoken(worker, client, a_submit(), pcm)
            await until(lambda: not relay.relay.workers)
        await cached(client, a_submit(), PCM[:1])


@pytest.mark.trio
async def test_what_is_kept_is_answered_although_no_worker_or_no_place_in_the_queue_is_there(tmp_path: Path) -> None:
    own = {"when_empty": "refuse", "max_queued": 3, "max_queued_per_principal": 2}
    other = a_submit(params={"text": "other"})
    async with a_relay(tmp_path, CACHE | own) as relay, peer(relay.url, "client") as client:
        async with fake_worker(relay.url, **ONE) as worker:
            await worker.peer.next(Registered)
            await spoken(worker, client, a_submit())
            client.send(attrs.evolve(other, request_id=a_submit().request_id))
            await client.next(Accepted)
            busy = await worker.assigned()
            for number in range(2):
                client.send(a_submit(params={"text": f"queued {number}"}))
                await client.next(Accepted)
            await refused(client, other, "queue_full")
            await cached(client, a_submit())  # although this principal may not queue another
            assert len(relay.relay.scheduler.state.spaces["tts"].queue) == 2
            worker.speak(busy, PCM)
            for _ in range(2):
                worker.speak(await worker.assigned(), PCM)
            await relay.at_rest()
        await until(lambda: not relay.relay.workers)
        await refused(client, a_submit(params={"text": "not known"}), "no_worker")
        await refused(client, a_submit(cache=False), "no_worker")
        await cached(client, a_submit())


@pytest.mark.trio
async def test_what_is_kept_is_answered_although_its_principal_may_queue_nothing_more(tmp_path: Path) -> None:
    limits = {"principal": {"max_queued": 1}}
    async with (
        a_relay(tmp_path, limits=limits) as relay,
        peer(relay.url, "client", await new_token(relay)) as client,
        fake_worker(relay.url, **ONE) as worker,
    ):
        await spoken(worker, client, a_submit())
        client.send(a_submit(params={"text": "runs"}))
        await client.next(Accepted)
        busy = await worker.assigned()
        client.send(a_submit(params={"text": "waits"}))
        await client.next(Accepted)
        await refused(client, a_submit(params={"text": "one too many"}), "queue_full")
        await cached(client, a_submit())
        worker.speak(busy, PCM)
        worker.speak(await worker.assigned(), PCM)
        await relay.at_rest()


@pytest.mark.trio
async def test_a_space_that_refuses_answers_what_is_kept_after_a_restart(tmp_path: Path) -> None:
    own = CACHE | {"when_empty": "refuse"}
    async with a_stage(tmp_path, own, store="sqlite") as (relay, worker, client):
        await worker.peer.next(Registered)
        await spoken(worker, client, a_submit())
        await relay.at_rest()
        await until(lambda: not relay.relay.finalizer.unfinalized)
    async with a_relay(tmp_path, own, store="sqlite") as relay, peer(relay.url, "client") as client:
        await refused(client, a_submit(params={"text": "not known"}), "no_worker")
        await cached(client, a_submit())


async def refused(client: Peer, submit: Submit, code: str) -> None:
    client.send(submit)
    refusal = await client.next(Accepted, Rejected)
    assert isinstance(refusal, Rejected)
    assert refusal.code == code


@pytest.mark.trio
async def test_after_a_restart_the_result_that_ended_last_answers(tmp_path: Path) -> None:
    async with a_relay(tmp_path, store="sqlite") as relay, peer(relay.url, "client") as client:
        for fingerprint, pcm in (("one", PCM), ("two", PCM[:1])):
            async with fake_worker(relay.url, reproducible=True, fingerprint=fingerprint) as worker:
                await spoken(worker, client, a_submit(), pcm)
                await until(lambda: not relay.relay.finalizer.unfinalized)
            await until(lambda: not relay.relay.workers)
    with closing(sqlite3.connect(tmp_path / DATABASE_NAME)) as database, database:
        database.execute("UPDATE requests SET ticket = 3 - ticket")  # the one that came last had ended first
    async with a_relay(tmp_path, store="sqlite") as relay, peer(relay.url, "client") as client:
        await cached(client, a_submit(), PCM[:1])


@pytest.mark.trio
async def test_what_failed_or_was_cancelled_answers_none(tmp_path: Path) -> None:
    async with a_stage(tmp_path) as (_relay, worker, client):
        for kind in (Failed, Cancelled):
            client.send(submit := a_submit())
            assign = await worker.assigned()
            worker.send(Started(**identity(assign, 0), format=FORMAT))
            if kind is Failed:
                worker.send(Failed(**identity(assign, 1), code="engine_failed", message="no"))
            else:
                client.send(Cancel(request_id=submit.request_id))
                await worker.peer.next(Cancel)
                worker.send(Cancelled(**identity(assign, 1)))
            assert isinstance((await client.frames(submit))[-1], kind)
        await missed(worker, client, a_submit())


@pytest.mark.trio
async def test_outputs_of_any_kind_are_answered(tmp_path: Path) -> None:
    async with a_stage(tmp_path) as (relay, worker, client):
        client.send(submit := a_submit())
        assign = await worker.assigned()
        worker.send(Started(**identity(assign, 0)))
        worker.send(Output(**identity(assign, 1), data={"words": [1, "two"]}))
        worker.send(Output(**identity(assign, 2), data=b"png", media_type="image/png"))
        worker.send(Completed(**identity(assign, 3)))
        made = await client.frames(submit)
        client.send(again := a_submit())
        frames = await client.frames(again)
        assert [attrs.evolve(frame, request_id=submit.request_id) for frame in frames[:-1]] == made[:-1]
        assert relay.relay.requests[again.request_id].has_outputs


# -- for whom -----------------------------------------------------------------------------------------------------


@pytest.mark.trio
@pytest.mark.parametrize("shared", [False, True])
async def test_principals_see_each_others_results_only_where_they_are_shared(tmp_path: Path, shared: bool) -> None:
    async with a_relay(tmp_path, CACHE | {"cache_shared": shared}) as relay:
        ann, bob = [await new_token(relay, name=name) for name in ("ann", "bob")]
        async with (
            fake_worker(relay.url, **ONE) as worker,
            peer(relay.url, "client", ann) as first,
            peer(relay.url, "client", bob) as second,
        ):
            await spoken(worker, first, a_submit())
            if shared:
                await cached(second, a_submit())
            else:
                await missed(worker, second, a_submit())
            await cached(first, a_submit())


# -- for how long -------------------------------------------------------------------------------------------------


def keep(relay: Daemon, **settings: Any) -> None:
    space = relay.relay.spaces["tts"]
    relay.relay.spaces.change(space, SpaceConfig.from_map(space.config.to_map() | settings))


async def reaped(relay: Daemon, monkeypatch: pytest.MonkeyPatch, after_s: float) -> None:
    """Let the relay forget what it would forget after some time."""
    ended = [request for request in relay.relay.requests.values() if request.ended_at is not None]
    await until(lambda: not any(map(relay.relay.is_finalizing, ended)))
    for request in ended:
        request.ended_at = (request.ended_at or 0.0) - after_s
    task = trio.Event()

    async def sleep(_seconds: float) -> None:
        if task.is_set():
            await trio.sleep_forever()
        task.set()

    async with trio.open_nursery() as nursery:
        with monkeypatch.context() as patch:
            patch.setattr("relayd.core.retention.trio.sleep", sleep)
            retention = relay.relay.results
            nursery.start_soon(Retention.serve_retention, retention)
            await trio.testing.wait_all_tasks_blocked(0.01)
        nursery.cancel_scope.cancel()


@pytest.mark.trio
@pytest.mark.parametrize("store", ["memory", "sqlite"])
async def test_a_result_answers_after_its_own_time_until_the_time_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    async with a_stage(tmp_path, store=store, results={"retain_s": 10.0}) as (relay, worker, client):
        first = a_submit()
        await spoken(worker, client, first)
        await reaped(relay, monkeypatch, 100.0)
        assert first.request_id in relay.relay.requests
        second = a_submit()
        await cached(client, second)
        await until(lambda: not relay.relay.requests[first.request_id].log.readers)
        await reaped(relay, monkeypatch, 550.0)  # the first has been replaced by its copy
        assert list(relay.relay.requests) == [second.request_id]
        await reaped(relay, monkeypatch, 51.0)
        assert not relay.relay.requests
        await missed(worker, client, a_submit())


@pytest.mark.trio
async def test_a_cache_that_is_turned_off_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_stage(tmp_path, results={"retain_s": 10.0}) as (relay, worker, client):
        await spoken(worker, client, a_submit())
        keep(relay, cache_s=0.0)
        await reaped(relay, monkeypatch, 20.0)
        assert not relay.relay.requests
        await missed(worker, client, a_submit())
        assert hits(relay) == (0, 1)


@pytest.mark.trio
async def test_the_result_used_longest_ago_goes_first_when_the_bytes_are_used(tmp_path: Path) -> None:
    async with a_stage(tmp_path, CACHE | {"cache_bytes": 15_000}) as (_relay, worker, client):
        await spoken(worker, client, a_submit("one"))  # 6.4 KB each
        await spoken(worker, client, a_submit("two"))
        await cached(client, a_submit("one"))
        await spoken(worker, client, a_submit("three"))
        await cached(client, a_submit("one"))
        await missed(worker, client, a_submit("two"))
        await spoken(worker, client, a_submit("huge"), PCM * 3)
        await missed(worker, client, a_submit("huge"))


@pytest.mark.trio
async def test_the_number_of_results_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_cache, "MAX_ENTRIES", 2)
    async with a_stage(tmp_path) as (_relay, worker, client):
        for text in ("one", "two", "three"):
            await spoken(worker, client, a_submit(text))
        await cached(client, a_submit("three"))
        await missed(worker, client, a_submit("one"))


@pytest.mark.trio
async def test_what_only_the_cache_keeps_goes_before_the_results_of_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does not count as the client's own, whose limit of retained requests holds for the others."""
    limits = {"principal": {"max_retained": 2}}
    async with a_relay(tmp_path, store="sqlite", results={"retain_s": 50.0}, limits=limits) as relay:
        ann = await new_token(relay)
        async with (
            fake_worker(relay.url, spaces=("tts", "check"), **ONE) as worker,
            peer(relay.url, "client", ann) as client,
        ):
            old = a_submit()
            await spoken(worker, client, old)
            await reaped(relay, monkeypatch, 60.0)
            own = [a_submit(space="check") for _ in range(2)]
            for submit in own:
                await spoken(worker, client, submit)
            await reaped(relay, monkeypatch, 0.0)
            assert list(relay.relay.requests) == [each.request_id for each in (old, *own)]
            results = relay.relay.results
            await until(lambda: results.disk_bytes > 0 and not results.unsaved_count)
            assert results.spool is not None
            results.spool.disk_bytes = results.disk_bytes - 1
            assert await results.spool.make_room(0, relay.relay.requests[old.request_id].log)
            kept = {key for key, request in relay.relay.requests.items() if request.has_result}
            assert kept == {each.request_id for each in own}
            await missed(worker, client, a_submit())


@pytest.mark.trio
async def test_a_result_whose_file_is_damaged_costs_no_request(tmp_path: Path) -> None:
    async with a_stage(tmp_path, store="sqlite") as (relay, worker, client):
        first, second = a_submit(), a_submit()
        await spoken(worker, client, first)
        request = relay.relay.requests[first.request_id]
        await until(lambda: request.log.file_part.sealed)
        request.log.release_written()
        path = tmp_path / "results" / f"{first.request_id}.frames"
        path.write_bytes(b"x" * path.stat().st_size)
        client.send(second)
        assign = await worker.assigned()
        assert assign.request_id == second.request_id
        worker.speak(assign, PCM, first=assign.from_seq)
        assert digest(await client.frames(second)) == digest([Audio(**identity(assign, 0), pcm=b"".join(PCM))])
        assert not request.has_result
        await relay.at_rest()


@pytest.mark.trio
async def test_a_long_result_is_copied_from_its_file(tmp_path: Path) -> None:
    long = [samples(1_000, seed) * 200 for seed in range(1, 9)]  # 3.2 MB
    async with a_stage(tmp_path, store="sqlite") as (relay, worker, client):
        first = a_submit()
        await spoken(worker, client, first, long)
        request = relay.relay.requests[first.request_id]
        await until(lambda: request.log.file_part.sealed)
        request.log.release_written()
        await cached(client, a_submit(), long)
        await relay.at_rest()
