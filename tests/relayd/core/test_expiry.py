"""What a request is told whose time is over: why it waited, and what its sender can do."""

from pathlib import Path
from typing import Any

import pytest
import trio

from protocol.wire.messages import Accepted
from relayd.core.positions import INTERVAL_S, MAX_SHARE, send_positions
from relayd.requests.request import UNHEARD_GRACE_S, Expiry, Request
from relayd.scheduling.model import State
from tests.support.fake_worker import fake_worker
from tests.support.relay import Daemon, Peer, a_submit, daemon, peer, until


async def queued(relay: Daemon, client: Peer, **fields: Any) -> Request:
    submit = a_submit(**fields)
    client.send(submit)
    await client.next(Accepted)
    return relay.relay.requests[submit.request_id]


@pytest.mark.trio
async def test_a_request_that_waited_too_long_is_told_why(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as client:

        async def told(**fields: Any) -> str:
            request = await queued(relay, client, queue_timeout_s=90.0)
            for name, value in fields.items():
                setattr(request.entry, name, value)
            relay.relay.expire(request, Expiry.QUEUE_TIMEOUT)
            assert (request.code, request.entry.state) == ("queue_timeout", State.FAILED)
            return request.message or ""

        assert await told() == "no worker is connected to space 'tts'; it waited 90 s: try again when one is"
        async with fake_worker(relay.url, slots=1) as worker:
            client.send(a_submit())
            await worker.assigned()
            assert (await told()).startswith("no slot of space 'tts' was free within 90 s")
            assert (await told(failed_on={"b", "a"})).startswith("its engine failed on a, b, and no slot of another")
            relay.relay.spaces.set_paused("tts", True)
            assert await told_paused(relay) == "space 'tts' is paused; it waited 90 s: try again when it is resumed"


async def told_paused(relay: Daemon) -> str:
    relay.relay.spaces.set_paused("tts", False)
    async with peer(relay.url, "client") as client:
        request = await queued(relay, client, queue_timeout_s=90.0)
        relay.relay.spaces.set_paused("tts", True)
        relay.relay.expire(request, Expiry.QUEUE_TIMEOUT)
        return request.message or ""


@pytest.mark.trio
async def test_a_worker_that_said_nothing_is_waited_for_no_longer_than_a_second_attempt_is_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert UNHEARD_GRACE_S == 1.5
    monkeypatch.setattr("relayd.core.workers.UNHEARD_GRACE_S", UNHEARD_GRACE_S)
    for grace_s, waits_s in ((30.0, 1.5), (1.0, 1.0)):
        async with (
            daemon(tmp_path / str(grace_s), limits={"worker_grace_s": grace_s}) as relay,
            peer(relay.url, "client") as client,
        ):
            async with fake_worker(relay.url, slots=2) as worker:
                silent, heard = await queued(relay, client), await queued(relay, client)
                for _ in range(2):
                    await worker.assigned()
                heard.entry.has_output = True
            await until(lambda: heard.entry.worker_lost_at is not None)  # noqa: B023
            assert (silent.worker_grace_s, heard.worker_grace_s) == (waits_s, grace_s)


@pytest.mark.trio
async def test_positions_are_sent_once_where_they_change(tmp_path: Path) -> None:
    assert (INTERVAL_S, MAX_SHARE) == (0.25, 0.1)
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as client:
        first, second = [await queued(relay, client) for _ in range(2)]
        await trio.sleep(2 * INTERVAL_S)
        assert [each.last_position_sent for each in (first, second)] == [(1, 2), (2, 2)]
        first.last_position_sent = None
        send_positions(relay.relay)
        assert [each.last_position_sent for each in (first, second)] == [None, (2, 2)], "nothing has moved since"
        relay.relay.scheduler.state.moved.update({"tts", "gone"})
        send_positions(relay.relay)
        assert [each.last_position_sent for each in (first, second)] == [(1, 2), (2, 2)]
        assert not relay.relay.scheduler.state.moved
