"""The link's backlog: its bound, draining, and a peer that reads slowly."""

import pytest
import trio
import trio.testing

from protocol.link.limits import LinkLimits
from protocol.wire.errors import LinkBroken
from protocol.wire.frames import MAX_MESSAGE_BYTES
from tests.protocol.link.link_pair import link_pair, link_to_raw_peer


@pytest.mark.trio
async def test_backlog_over_its_bound_breaks_the_link_as_a_slow_consumer(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with link_to_raw_peer(limits=LinkLimits(max_backlog_bytes=5000), lockstep=True) as (link, _peer):
        for _ in range(5):
            link.send_nowait(b"x" * 1000)
        assert link.backlog_bytes == 5000
        with pytest.raises(LinkBroken, match="slow_consumer"):
            link.send_nowait(b"x")
        with pytest.raises(LinkBroken, match="slow_consumer"):
            await link.receive()


@pytest.mark.trio
async def test_a_send_that_makes_no_way_ends_the_link_at_its_deadline(autojump_clock: trio.testing.MockClock) -> None:
    async with link_to_raw_peer(limits=LinkLimits(send_timeout_s=3), lockstep=True) as (link, _peer):
        link.send_nowait(b"nobody takes this")
        began = trio.current_time()
        with pytest.raises(LinkBroken, match="accepted no data for 3 s"):
            await link.receive()
        assert trio.current_time() - began == pytest.approx(3)


@pytest.mark.trio
async def test_on_drained_is_called_once_for_each_fall_to_low_water(autojump_clock: trio.testing.MockClock) -> None:
    async with link_pair() as (client, _relay):
        calls: list[int] = []
        remove = client.on_drained(lambda: calls.append(client.backlog_bytes), 2000)
        for _ in range(5):
            client.send_nowait(b"x" * 1000)
        await client.drained()
        assert calls == [2000]
        client.send_nowait(b"x" * 1000)  # never above low water
        await client.drained()
        assert calls == [2000]
        remove()
        for _ in range(5):
            client.send_nowait(b"x" * 1000)
        await client.drained()
        assert calls == [2000]


@pytest.mark.trio
async def test_on_drained_may_refill_the_link_until_a_long_stream_is_through(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with link_pair() as (client, relay):
        left = 500

        def fill() -> None:
            nonlocal left
            while left and client.backlog_bytes < 8000:
                left -= 1
                client.send_nowait(bytes(1000))

        client.on_drained(fill, 4000)
        fill()
        assert left == 492
        assert sum([len(await relay.receive()) for _ in range(500)]) == 500_000


@pytest.mark.trio
async def test_a_full_inbox_holds_the_peer_up_and_loses_nothing(autojump_clock: trio.testing.MockClock) -> None:
    async with link_pair(max_inbox_bytes=10_000) as (client, relay):
        for number in range(50):
            client.send_nowait(bytes([number]) * 1000)
        await trio.testing.wait_all_tasks_blocked()
        assert relay._inbox is not None
        assert len(relay._inbox) < 15
        assert [(await relay.receive())[0] for _ in range(50)] == list(range(50))


@pytest.mark.trio
async def test_a_link_that_is_cut_while_its_inbox_is_full_ends(autojump_clock: trio.testing.MockClock) -> None:
    with trio.fail_after(60):
        async with link_pair(max_backlog_bytes=64 * MAX_MESSAGE_BYTES) as (client, relay):
            for _ in range(24):
                relay.send_nowait(b"x" * MAX_MESSAGE_BYTES)
            await trio.testing.wait_all_tasks_blocked()
            client.abort("done with it")


@pytest.mark.trio
async def test_a_cancelled_wait_for_drained_leaves_the_link_whole(autojump_clock: trio.testing.MockClock) -> None:
    async with link_pair() as (client, relay):
        client.send_nowait(b"x" * 100_000)
        with trio.CancelScope() as scope:
            scope.cancel()
            await client.drained()
        assert scope.cancelled_caught
        assert len(await relay.receive()) == 100_000
