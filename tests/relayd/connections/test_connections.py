"""Logins, broken rules, and what a connection may see and do: the daemon goes on after each of them."""

import random
from pathlib import Path
from typing import Any

import msgpack
import pytest
import trio

from protocol.client.address import parse_address
from protocol.link.dial import open_link
from protocol.link.stream_link import StreamLink
from protocol.link.websocket_frames import TEXT, make_frame
from protocol.wire.codec import decode
from protocol.wire.errors import ErrorCode, LinkBroken, LinkError, LoginRefused
from protocol.wire.frames import Started
from protocol.wire.messages import (
    FROM_RELAY,
    Attach,
    Cancel,
    Delta,
    Done,
    Error,
    Hello,
    Input,
    Ping,
    Pong,
    Rejected,
    Snapshot,
    Steer,
    Submit,
    Watch,
)
from relayd.store.base import StorageFull, StoreError
from relayd.store.records import UpdateRequest
from tests.support.fake_worker import FORMAT, fake_worker, identity, samples
from tests.support.relay import Daemon, Peer, a_submit, an_input, daemon, new_token, peer, until
from tests.support.tap import Tap

PCM = [samples(1200, seed) for seed in range(3)]


def nested(depth: int) -> bytes:
    return b"\x81\xa1x" * depth + b"\xc0"


def packed(**fields: Any) -> bytes:
    data: bytes = msgpack.packb(fields)
    return data


BAD_BYTES = {
    "nothing": b"",
    "garbage": random.Random(7).randbytes(1024 * 1024 - 64),
    "deep": nested(10_000),
    "an array": b"\x90",
    "no type": packed(a=1),
    "a list as type": packed(type=["submit"]),
    "an integer key": b"\x81\x01\x02",
    "a field missing": packed(type="ping"),
    "a number that is a bool": packed(type="ping", timestamp=True),
}


@pytest.mark.trio
@pytest.mark.parametrize("role", ["client", "worker", "operator"])
async def test_bad_bytes_are_answered_and_close_that_connection_alone(tmp_path: Path, role: str) -> None:
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as witness:
        for what, data in BAD_BYTES.items():
            async with peer(relay.url, role) as bad:
                bad.link.send_nowait(data)
                error = await bad.next(Error)
                assert (what, error.code) == (what, "protocol_error")
                with pytest.raises(LinkBroken):
                    await bad.next(Pong)
                assert bad.link.close_code == 1002
        await witness.settled()
        await until(lambda: len(relay.relay.connections) == 1)
        await relay.goes_on()


@pytest.mark.trio
@pytest.mark.parametrize("role", ["client", "worker", "operator"])
async def test_an_unknown_type_is_answered_and_the_connection_goes_on(tmp_path: Path, role: str) -> None:
    async with daemon(tmp_path) as relay, peer(relay.url, role) as one:
        one.link.send_nowait(packed(type="sing", key=1))
        error = await one.next(Error)
        assert error.code == "unknown_type"
        assert "'sing'" in error.message
        await one.settled()


@pytest.mark.trio
@pytest.mark.parametrize("role", ["client", "worker", "operator"])
async def test_a_text_message_closes_with_1003(tmp_path: Path, role: str) -> None:
    async with daemon(tmp_path) as relay:
        async with peer(relay.url, role) as bad:
            assert isinstance(bad.link, StreamLink)
            await bad.link.stream.send_all(make_frame(TEXT, b"hello?", masked=True))
            assert (await bad.next(Error)).code == "protocol_error"
            with pytest.raises(LinkBroken):
                await bad.next(Pong)
            assert bad.link.close_code == 1003
        await relay.goes_on()


@pytest.mark.trio
async def test_a_hello_that_never_comes_or_is_none(tmp_path: Path) -> None:

    async with daemon(tmp_path, limits={"hello_timeout_s": 0.05}) as relay:
        for data in (None, packed(type="ping", timestamp=1), packed(type="hello", version=9, role="client")):
            async with open_link(parse_address(relay.url)) as link:
                if data is not None:
                    link.send_nowait(data)
                with trio.fail_after(5):
                    error = decode(await link.receive(), FROM_RELAY)
                    assert isinstance(error, Error)
                    if data is None:  # a network that stood still does that too: trying again is right
                        assert ErrorCode(error.code).retryable
                    with pytest.raises(LinkError):
                        await link.receive()
        await until(lambda: not relay.relay.connections)
        await relay.goes_on()


@pytest.mark.trio
async def test_a_peer_that_hangs_up_after_its_hello_leaves_no_connection_behind(tmp_path: Path) -> None:

    async with daemon(tmp_path) as relay:
        for _ in range(10):
            async with open_link(parse_address(relay.url)) as link:
                link.send(Hello(version=1, role="client"))
                await link.drained()
                link.abort("never mind")
        await relay.goes_on()
        await until(lambda: not relay.relay.connections)
        assert not relay.relay.clients


# -- tokens ----------------------------------------------------------------------------------------------------------


async def steer(operator: Peer, action: str, target: str = "", **options: Any) -> Any:
    operator.send(Steer(steer_id="s", action=action, target=target, options=options))
    return await operator.next(Done, Rejected)


@pytest.mark.trio
async def test_who_may_not_log_in(tmp_path: Path) -> None:
    async with daemon(tmp_path, listen="127.0.0.1:0") as relay:
        worker_token = await new_token(relay, "worker")
        for role, token, code in (
            ("client", None, "unauthenticated"),
            ("client", "rly_c_" + "x" * 43, "unauthenticated"),
            ("client", worker_token, "forbidden"),
            ("operator", worker_token, "forbidden"),
        ):
            with pytest.raises(LoginRefused) as refused:
                async with peer(relay.urls[0], role, token):
                    pass
            assert refused.value.code == code
        async with peer(relay.urls[0], "worker", worker_token) as worker:
            assert worker.welcome.principal == "ann"
        await relay.goes_on()


@pytest.mark.trio
async def test_a_token_opens_its_own_spaces_and_requests_alone(tmp_path: Path) -> None:
    async with daemon(tmp_path, listen="127.0.0.1:0") as relay:
        ann = await new_token(relay, "client", "ann", spaces=["tts"])
        bob = await new_token(relay, "client", "bob")
        box = await new_token(relay, "worker", "box", spaces=["other*"])
        url = relay.urls[0]
        async with peer(url, "client", ann) as client, peer(url, "client", bob) as other:
            client.send(a_submit(space="check"))
            assert (await client.next(Rejected)).code == "forbidden"
            submit = a_submit()
            client.send(submit)
            await client.settled()
            for message in (Attach(request_id=submit.request_id), Cancel(request_id=submit.request_id)):
                other.send(message)
                assert (await other.next(Rejected)).code == "request_not_found"
            other.send(submit)
            assert (await other.next(Rejected)).code == "id_conflict"
        async with fake_worker(url, token=box) as worker:
            assert (await worker.peer.next(Rejected)).code == "forbidden"


@pytest.mark.trio
async def test_revoking_a_token_drops_its_connections_also_ones_own(tmp_path: Path) -> None:
    async with daemon(tmp_path, listen="127.0.0.1:0") as relay:
        token = await new_token(relay, "operator")
        async with peer(relay.urls[0], "operator", token) as one, peer(relay.urls[0], "client", token) as two:
            one.send(Steer(action="revoke_token", target="ann"))
            for dropped in (one, two):
                with pytest.raises(LinkBroken):
                    await dropped.next(Done)
        with pytest.raises(LoginRefused, match="revoked"):
            async with peer(relay.urls[0], "client", token):
                pass
        await until(lambda: not relay.relay.connections)
        (record,) = (await relay.relay.store.load()).tokens
        assert record.revoked_at is not None, "the store has heard of it, though who asked was cut off"
        await relay.goes_on()


@pytest.mark.trio
async def test_a_connection_ends_with_its_token(tmp_path: Path) -> None:
    async with daemon(tmp_path, listen="127.0.0.1:0") as relay:
        token = await new_token(relay, "worker", expires="1s")
        async with fake_worker(relay.urls[0], token=token) as worker:
            error = await worker.peer.next(Error)
            assert (error.code, error.message) == ("unauthenticated", "the token has expired")
        await until(lambda: not relay.relay.workers)
        await relay.goes_on()


# -- operators -------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_who_only_looks_changes_nothing(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as client:
        submit = a_submit()
        client.send(submit)
        await client.settled()
        async with peer(relay.url, "operator", readonly=True) as looker:
            for message in (
                a_submit(),
                Cancel(request_id=submit.request_id),
                Steer(action="cancel", target=submit.request_id),
                Steer(action="drain"),
            ):
                looker.send(message)
                assert (await looker.next(Rejected)).code == "forbidden"
            assert (await steer(looker, "list_tokens")).data == {"tokens": [], "more": False}
            looker.send(Watch())
            assert (await looker.next(Snapshot)).data["requests"][0]["state"] == "queued"
            looker.send(Attach(request_id=submit.request_id))
            await looker.settled()
            assert len(relay.relay.requests[submit.request_id].holders) == 1


@pytest.mark.trio
async def test_watching_tells_a_snapshot_and_then_what_changes(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, peer(relay.url, "operator") as watcher:
        watcher.send(Watch(topics=["bogus"]))
        assert (await watcher.next(Snapshot)).data == {}
        watcher.send(Watch(topics=["requests", "workers", "spaces"]))
        snapshot = await watcher.next(Snapshot)
        assert not snapshot.more
        assert sorted(snapshot.data) == ["requests", "spaces", "workers"]
        assert [row["name"] for row in snapshot.data["spaces"]] == ["check", "tts"]
        submit = a_submit()
        async with fake_worker(relay.url) as worker, peer(relay.url, "client") as client:
            client.send(submit)
            worker.speak(await worker.assigned(), PCM)
            await client.frames(submit)
        rows: dict[str, dict[str, Any]] = {}
        gone: set[str] = set()
        while submit.request_id not in rows or not any(name.startswith("box-") for name in gone):
            delta = await watcher.next(Delta)
            for row in delta.data.get("requests", ()):
                rows[row["request_id"]] = row
            gone |= set(delta.gone.get("workers", ()))
        assert rows[submit.request_id]["state"] == "completed"
        assert rows[submit.request_id]["audio_s"] == 0.15
        assert rows[submit.request_id]["frames"] == 5


@pytest.mark.trio
async def test_many_rows_come_in_pages(tmp_path: Path) -> None:
    spaces = {"tts": {"max_queued_per_principal": 250}}
    async with (
        daemon(tmp_path, spaces=spaces) as relay,
        peer(relay.url, "client") as client,
        peer(relay.url, "operator") as watcher,
    ):
        submits = [a_submit() for _ in range(250)]
        for submit in submits:
            client.send(submit)
        await client.settled()
        watcher.send(Watch(topics=["requests"]))
        names, pages = [], 0
        more = True
        while more:
            page = await watcher.next(Snapshot)
            names += [row["request_id"] for row in page.data["requests"]]
            pages, more = pages + 1, page.more
        assert names == [submit.request_id for submit in submits]
        assert pages > 1


@pytest.mark.trio
async def test_steering(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path) as relay,
        fake_worker(relay.url, slots=1) as worker,
        peer(relay.url, "client") as client,
        peer(relay.url, "operator") as operator,
    ):
        submits = [a_submit() for _ in range(4)]
        for submit in submits:
            client.send(submit)
        first = await worker.assigned()
        await client.settled()
        assert (await steer(operator, "promote", submits[3].request_id)).TYPE == "done"
        assert (await steer(operator, "cancel", submits[2].request_id)).data == {"state": "cancelled"}
        (worker_id,) = relay.relay.workers
        assert (await steer(operator, "drain_worker", worker_id)).TYPE == "done"
        assert (await worker.peer.next()).TYPE == "drain"
        worker.speak(first, PCM)
        await worker.peer.next()
        assert (await steer(operator, "pause_space", "tts")).TYPE == "done"
        refused = a_submit()
        client.send(refused)
        while (refusal := await client.next(Rejected)).request_id != refused.request_id:
            pass
        assert refusal.code == "space_paused"
        assert (await steer(operator, "undrain_worker", worker_id)).TYPE == "done"
        assert (await worker.peer.next()).TYPE == "undrain"
        assert (await steer(operator, "resume_space", "tts")).TYPE == "done"
        assigned = await worker.assigned()
        assert assigned.request_id == submits[3].request_id
        worker.speak(assigned, PCM)
        worker.speak(await worker.assigned(), PCM)
        await relay.at_rest()
        (mine,) = [c.connection_id for c in relay.relay.clients.values() if c.principal.role == "client"]
        assert (await steer(operator, "disconnect", mine)).TYPE == "done"
        await until(lambda: client.link.gone is not None)
        await relay.goes_on()


@pytest.mark.trio
async def test_spaces_are_made_and_deleted(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, peer(relay.url, "operator") as operator:
        assert (await steer(operator, "create_space", "new", max_workers=2)).TYPE == "done"
        assert (await steer(operator, "create_space", "new")).code == "space_exists"
        assert (await steer(operator, "create_space", "../x")).code == "invalid_params"
        assert (await steer(operator, "create_space", "x", **{"y" * 9000: 1})).code == "invalid_params"
        async with fake_worker(relay.url, spaces=("new",)):
            await until(lambda: bool(relay.relay.workers))
            assert "served by" in (await steer(operator, "delete_space", "new")).message
        await until(lambda: not relay.relay.workers)
        assert (await steer(operator, "delete_space", "new")).TYPE == "done"
        assert (await steer(operator, "delete_space", "new")).code == "space_not_found"
        assert "relayd.toml" in (await steer(operator, "delete_space", "tts")).message
        await relay.goes_on()


@pytest.mark.trio
@pytest.mark.parametrize(
    ("action", "target", "options"),
    [
        ("explode", "", {}),
        ("cancel", "0" * 32, {}),
        ("promote", "0" * 32, {}),
        ("drain_worker", "nobody", {}),
        ("undrain_worker", "nobody", {}),
        ("pause_space", "nope", {}),
        ("resume_space", "nope", {}),
        ("disconnect", "nobody", {}),
        ("revoke_token", "nobody", {}),
        ("create_token", "x", {"role": ["worker"]}),
        ("create_token", "x", {"role": "worker", "spaces": 5}),
        ("create_token", "x", {"role": "worker", "expires": "y" * 9000}),
    ],
)
async def test_steering_that_cannot_be_is_refused_in_words(
    tmp_path: Path, action: str, target: str, options: dict[str, Any]
) -> None:
    async with daemon(tmp_path) as relay, peer(relay.url, "operator") as operator:
        refusal = await steer(operator, action, target, **options)
        assert isinstance(refusal, Rejected)
        assert refusal.request_id == "s"
        assert refusal.message
        await operator.settled()


# -- at the awaits: the store, and links that go while something waits ------------------------------------------------


class Gate:
    """Holds up the commits of a store, or fails them; but for how requests stand."""

    def __init__(self, relay: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.waiting = trio.Event(), 0
        self.fault: StoreError | None = None
        store = relay.relay.store
        commit = store.commit

        async def gated(*changes: Any) -> None:
            if not any(isinstance(change, UpdateRequest) for change in changes):
                self.waiting += 1
                await self.open.wait()
            if self.fault is not None:
                raise self.fault
            await commit(*changes)

        monkeypatch.setattr(store, "commit", gated)


async def stored(relay: Daemon, submit: Submit) -> str | None:
    states = {record.request_id: record.state for record in (await relay.relay.store.load()).requests}
    return states.get(submit.request_id)


@pytest.mark.trio
@pytest.mark.parametrize("how", ["cancel", "hang up", "queue_timeout"])
async def test_what_ends_while_the_store_writes_it_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    async with daemon(tmp_path, limits={"resume_window_s": 0}) as relay, fake_worker(relay.url) as worker:
        gate = Gate(relay, monkeypatch)
        async with peer(relay.url, "client") as client:
            submit = a_submit(queue_timeout_s=0.05 if how == "queue_timeout" else 60.0)
            client.send(submit)
            await until(lambda: gate.waiting == 1)
            if how == "cancel":
                client.send(Cancel(request_id=submit.request_id))
            if how != "hang up":
                await client.frames(submit)
        await until(lambda: not relay.relay.requests[submit.request_id].live)
        gate.open.set()
        await until(lambda: relay.relay.requests[submit.request_id].accepted)
        assert await stored(relay, submit) in ("cancelled", "failed"), "a restart does not run it either"
        await relay.at_rest()
        await relay.goes_on()
        await worker.peer.settled()


@pytest.mark.trio
async def test_what_is_sent_again_while_the_store_writes_runs_once_for_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        daemon(tmp_path) as relay,
        fake_worker(relay.url, slots=3) as worker,
        peer(relay.url, "client") as one,
        peer(relay.url, "client") as two,
    ):
        gate = Gate(relay, monkeypatch)
        submit = a_submit()
        one.send(submit)
        await until(lambda: gate.waiting == 1)
        two.send(submit)
        await two.settled()
        gate.open.set()
        assert (await one.next()).TYPE == (await two.next()).TYPE == "accepted"
        worker.speak(await worker.assigned(), PCM)
        assert await one.frames(submit) == await two.frames(submit)
        assert gate.waiting == 1
        await relay.at_rest()


@pytest.mark.trio
async def test_the_order_of_arrival_is_kept_over_group_commits(tmp_path: Path) -> None:
    async with daemon(tmp_path, store="sqlite") as relay, peer(relay.url, "client") as client:
        submits = [a_submit(f"number {number}") for number in range(90)]
        for submit in submits:
            client.send(submit)
        await until(lambda: len(relay.relay.scheduler.state.spaces["tts"].queue) == 90)
        assert [entry.request_id for entry in relay.relay.scheduler.state.spaces["tts"].queue] == [
            submit.request_id for submit in submits
        ]
        assert relay.relay.store.transactions < 60


@pytest.mark.trio
async def test_a_full_store_refuses_and_the_daemon_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    async with daemon(tmp_path) as relay, fake_worker(relay.url), peer(relay.url, "client") as client:
        gate = Gate(relay, monkeypatch)
        gate.fault = StorageFull("no room left for /var/lib/relayd/relayd.db: free some space on its disk")
        gate.open.set()
        submits = [a_submit() for _ in range(3)]
        for submit in submits:
            client.send(submit)
        for submit in submits:
            refusal = await client.next(Rejected)
            assert (refusal.request_id, refusal.code, refusal.retryable) == (submit.request_id, "storage_full", True)
            assert "/" not in refusal.message, "a client is not told where files of the relay lie"
        assert not relay.relay.requests
        async with peer(relay.url, "operator") as operator:
            assert (await steer(operator, "create_space", "new")).code == "storage_full"
            assert "new" not in relay.relay.spaces
            assert (await steer(operator, "create_token", "ann", role="client")).code == "storage_full"
            assert (await steer(operator, "list_tokens")).data["tokens"] == []
        gate.fault = None
        await relay.at_rest()
        await relay.goes_on()


@pytest.mark.trio
async def test_an_operator_who_hangs_up_leaves_nothing_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with daemon(tmp_path) as relay:
        gate = Gate(relay, monkeypatch)
        async with peer(relay.url, "operator") as operator:
            operator.send(Steer(action="create_space", target="new"))
            await until(lambda: gate.waiting == 1)
            await operator.cut()
        gate.open.set()
        await until(lambda: "new" in relay.relay.spaces)
        await relay.relay.store.flush()
        assert "new" in [space.name for space in (await relay.relay.store.load()).spaces]
        await relay.goes_on()


@pytest.mark.trio
async def test_a_worker_cut_off_while_inputs_are_on_their_way_troubles_nobody(tmp_path: Path) -> None:

    voice = bytes(12_000_000)  # more than a socket and the worker's inbox hold
    limits = {"worker_grace_s": 0.01}
    async with daemon(tmp_path, limits=limits) as relay, peer(relay.url, "client") as client:
        submit = a_submit(inputs={"voice": an_input(voice)})
        tap = Tap()
        async with fake_worker(relay.url, cable=tap, inputs={"voice": {}}) as worker:
            tap.close()
            client.send(submit)
            for offset in range(0, len(voice), 262_144):
                piece = voice[offset : offset + 262_144]
                client.send(Input(request_id=submit.request_id, name="voice", offset=offset, data=piece))
                await client.link.drained(1_000_000)
            await until(lambda: bool(relay.relay.scheduler.state.spaces["tts"].running))
            await worker.peer.cut()
        async with fake_worker(relay.url, name="other", inputs={"voice": {}}) as worker:
            assign = await worker.assigned()
            assert assign.attempt == 2
            size = 0
            while size < len(voice):
                size += len((await worker.peer.next(Input)).data)
            worker.speak(assign, PCM)
            assert len(await client.frames(submit)) == 5
        await relay.at_rest()
        await relay.goes_on()


@pytest.mark.trio
async def test_a_request_over_which_the_relay_falls_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url), peer(relay.url, "client") as client:
        await until(lambda: bool(relay.relay.workers))
        (port,) = relay.relay.workers.values()

        def fall(*_args: Any) -> None:
            raise RuntimeError("a bug")

        with monkeypatch.context() as patch:
            patch.setattr(type(port), "assign", fall)
            submit = a_submit()
            client.send(submit)
            (frame,) = await client.frames(submit)
            assert frame.code == "internal"
        await relay.goes_on()


@pytest.mark.trio
async def test_two_in_one_turn_of_the_loop_are_both_heard(tmp_path: Path) -> None:
    """A last frame and the cancel of it cross: the slot is free and the listener has one end."""
    async with daemon(tmp_path) as relay, fake_worker(relay.url) as worker, peer(relay.url, "client") as client:
        for _ in range(20):
            submit = a_submit()
            client.send(submit)
            assign = await worker.assigned()
            worker.send(Started(**identity(assign, 0), format=FORMAT))
            client.send(Cancel(request_id=submit.request_id))
            worker.speak(assign, PCM, first=1)
            frames = await client.frames(submit)
            assert frames[-1].TYPE == "completed"
        client.send(Ping(timestamp=2.0))
        assert (await client.next(Pong)).timestamp == 2.0
        await relay.at_rest()
