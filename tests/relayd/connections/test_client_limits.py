"""What a client inside its limits cannot make the daemon hold, see or lose."""

from pathlib import Path
from typing import Any

import pytest
import trio

from protocol import RequestRejected
from protocol.client.client import open_relay
from protocol.wire.frames import (
    Audio,
    Cancelled,
    Completed,
)
from protocol.wire.messages import (
    Accepted,
    Attach,
    Cancel,
    Input,
    Leave,
    Rejected,
    Snapshot,
    Status,
    StatusReply,
)
from relayd.core import admission, retention
from relayd.scheduling.model import State
from relayd.store import StoreError
from tests.support.fake_worker import fake_worker, samples
from tests.support.relay import a_submit, an_input, daemon, peer, until

VOICE = b"a voice" * 100
RULES: dict[str, Any] = {"inputs": {"voice": {}}}


@pytest.mark.trio
@pytest.mark.parametrize("runs", [True, False], ids=["running", "queued"])
async def test_an_input_sent_again_after_a_restart_of_the_relay_is_passed_over(tmp_path: Path, runs: bool) -> None:
    submit = a_submit(inputs={"voice": an_input(VOICE)})
    piece = Input(request_id=submit.request_id, name="voice", offset=0, data=VOICE)
    async with daemon(tmp_path, store="sqlite") as relay, peer(relay.url, "client") as client:
        client.send(submit)
        client.send(piece)
        await client.next(Accepted)
    async with daemon(tmp_path, store="sqlite") as relay, peer(relay.url, "client") as client:
        if not runs:
            client.send(submit)
            client.send(piece)
            await client.next(Accepted)
        async with fake_worker(relay.url, **RULES) as worker:
            assign = await worker.assigned()
            assert (await worker.peer.next(Input)).data == VOICE
            if runs:
                client.send(submit)
                client.send(piece)
                await client.next(Accepted)
                await client.settled()
                assert relay.relay.requests[submit.request_id].entry.state is State.RUNNING
            worker.speak(assign, [samples(10)])
            await client.next(Completed)
            await relay.at_rest()
        assert relay.relay.scheduler.queued_count(assign.principal) == 0


@pytest.mark.trio
async def test_an_ended_request_holds_neither_its_params_nor_its_inputs(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path) as relay,
        fake_worker(relay.url, **RULES) as worker,
        peer(relay.url, "client") as client,
    ):
        submit = a_submit("x" * 10_000, inputs={"voice": an_input(VOICE)})
        client.send(submit)
        client.send(Input(request_id=submit.request_id, name="voice", offset=0, data=VOICE))
        assign = await worker.assigned()
        assert not relay.relay.requests[submit.request_id].inputs  # the store has them
        worker.speak(assign, [samples(10)])
        await client.frames(submit)
        request = relay.relay.requests[submit.request_id]
        assert (request.submit.params, request.submit.inputs) == ({}, {})
        client.send(submit)  # and is known for the same all the same
        await client.next(Accepted)
        client.send(a_submit("other", request_id=submit.request_id))
        assert (await client.next(Rejected)).code == "id_conflict"


@pytest.mark.trio
async def test_the_order_of_keys_makes_no_other_request(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as client:
        submit = a_submit(params={"text": "hi", "rate": 1})
        client.send(submit)
        await client.next(Accepted)
        client.send(a_submit(request_id=submit.request_id, params={"rate": 1, "text": "hi"}))
        await client.next(Accepted)


@pytest.mark.trio
async def test_ended_requests_are_bounded_in_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "MAX_ENDED", 3)
    monkeypatch.setattr(retention, "REAP_INTERVAL_S", 0.01)
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as client:
        submits = [a_submit() for _ in range(6)]
        for submit in submits:
            client.send(submit)
            await client.next(Accepted)
            client.send(Cancel(request_id=submit.request_id))
            await client.next(Cancelled)
        await until(lambda: len(relay.relay.requests) == 3)
        assert list(relay.relay.requests) == [submit.request_id for submit in submits[3:]]


@pytest.mark.trio
async def test_uploads_are_bounded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_UPLOADING_BYTES", 1_000)
    async with daemon(tmp_path, limits={"max_input_bytes": 1_000}) as relay, peer(relay.url, "client") as client:
        first, second = (a_submit(inputs={"voice": an_input(VOICE)}) for _ in range(2))
        client.send(first)
        client.send(second)
        refused = await client.next(Rejected)
        assert (refused.request_id, refused.code, refused.retryable) == (second.request_id, "rate_limited", True)
        client.send(Input(request_id=first.request_id, name="voice", offset=0, data=VOICE))
        await client.next(Accepted)
        client.send(second)
        client.send(Input(request_id=second.request_id, name="voice", offset=0, data=VOICE))
        await client.next(Accepted)


@pytest.mark.trio
async def test_a_watch_of_more_rows_than_a_backlog_holds_comes_whole(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path, spaces={"tts": {"max_queued": 20_000, "max_queued_per_principal": 20_000}}) as relay,
        peer(relay.url, "client") as client,
    ):
        template = a_submit()
        client.send(template)
        await client.next(Accepted)
        known = relay.relay.requests[template.request_id]
        # As many rows as no backlog takes at once; they need no life of their own.
        relay.relay.requests |= {f"{number:032x}": known for number in range(40_000)}
        async with open_relay(relay.url, token="", role="operator") as operator, operator.watch(["requests"]) as watch:
            with trio.fail_after(60):
                change = await anext(watch)
        assert isinstance(change, Snapshot)
        assert len(change.data["requests"]) == 40_001
        for number in range(40_000):
            del relay.relay.requests[f"{number:032x}"]


@pytest.mark.trio
async def test_who_leaves_holds_no_more_and_the_request_is_cancelled_when_nobody_does(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path, limits={"resume_window_s": 0.05}) as relay,
        fake_worker(relay.url) as worker,
        peer(relay.url, "client") as client,
        peer(relay.url, "client") as other,
    ):
        submit = a_submit()
        client.send(submit)
        worker.speak(assign := await worker.assigned(), [samples(10)], end=False)
        await client.next(Audio)
        other.send(Attach(request_id=submit.request_id))
        await other.next(Audio)
        client.send(Leave(request_id=submit.request_id))
        client.send(Status(request_id=submit.request_id))
        assert (await client.next(StatusReply)).state == "running"
        other.send(Leave(request_id=submit.request_id))
        await worker.peer.next(Cancel)
        worker.send(Cancelled(request_id=assign.request_id, attempt=1, seq=2, reason="stopped"))
        await relay.at_rest()


@pytest.mark.trio
async def test_leaving_an_attach_block_lets_go_of_the_request(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path, limits={"resume_window_s": 0.05}) as relay,
        fake_worker(relay.url) as worker,
        open_relay(relay.url, token="") as program,
    ):
        async with peer(relay.url, "client") as client:
            submit = a_submit()
            client.send(submit)
            worker.speak(await worker.assigned(), [samples(10)], end=False)
            await client.next(Audio)
            async with program.attach(submit.request_id) as stream:
                await anext(stream)
        await worker.peer.next(Cancel)


@pytest.mark.trio
async def test_a_token_reaches_only_requests_of_its_spaces(tmp_path: Path) -> None:
    spaces: dict[str, Any] = {"tts": {}, "secret": {}}
    async with daemon(tmp_path, listen="127.0.0.1:0", spaces=spaces) as relay:
        async with open_relay(relay.url, token="", role="operator") as operator:
            wide = (await operator.steer("create_token", "ann", role="client"))["token"]
            narrow = (await operator.steer("create_token", "ann", role="client", spaces=["tts"]))["token"]
        async with peer(relay.urls[0], "client", wide) as all_spaces, peer(relay.urls[0], "client", narrow) as one:
            submit = a_submit(space="secret")
            all_spaces.send(submit)
            await all_spaces.next(Accepted)
            for message in (
                Status(request_id=submit.request_id),
                Cancel(request_id=submit.request_id),
                Attach(request_id=submit.request_id),
            ):
                one.send(message)
                assert (await one.next(Rejected)).code == "request_not_found"


@pytest.mark.trio
async def test_a_deleted_space_is_back_when_the_store_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with daemon(tmp_path) as relay, open_relay(relay.url, token="", role="operator") as operator:
        await operator.steer("create_space", "songs")

        async def refuse(*_changes: object) -> None:
            raise StoreError("no")

        with monkeypatch.context() as patch:
            patch.setattr(relay.relay.store, "commit", refuse)
            with pytest.raises(RequestRejected):
                await operator.steer("delete_space", "songs")
        assert "songs" in relay.relay.spaces
        await operator.steer("delete_space", "songs")
