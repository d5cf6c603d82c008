"""The reactor's backlogs: slow readers, draining, and full inboxes."""

import socket

import pytest
import structlog.testing
import trio
import trio.testing

from protocol.link.limits import LinkLimits
from protocol.link.websocket_frames import (
    CLOSE,
    PING,
    Close,
    Event,
    Pong,
    close_payload,
    make_frame,
)
from protocol.wire.codec import decode
from protocol.wire.errors import LinkBroken, LinkClosed
from protocol.wire.frames import MAX_MESSAGE_BYTES
from protocol.wire.messages import FROM_RELAY, Error
from relayd.net.socket_link import SocketLink
from tests.relayd.net.far_end import FarEnd, Taken, linked
from tests.support.relay import until

FAREWELL = Error(code="slow_consumer", message="connect again")


def overfill(link: SocketLink, data: bytes) -> None:
    """Send without end, to a peer that takes nothing."""
    while True:
        link.send_nowait(data)


async def send_on(stream: trio.SocketStream, data: bytes) -> None:
    """Send until the relay hangs up."""
    while True:
        await stream.send_all(data)


@pytest.mark.trio
@pytest.mark.parametrize("tcp", [True, False])
async def test_a_slow_reader_gets_everything_in_order_and_its_backlog_is_told(tcp: bool) -> None:
    async with linked(tcp=tcp, max_backlog_bytes=64 * MAX_MESSAGE_BYTES) as (_plane, link, far):
        drained: list[int] = []
        link.on_drained(lambda: drained.append(link.backlog_bytes), 1_000_000)
        for number in range(2_000):
            link.send_frames([number.to_bytes(4, "big") * 2_000])
        assert link.backlog_bytes > 1_000_000
        for number in range(2_000):
            assert await far.next() == number.to_bytes(4, "big") * 2_000
        await link.drained()
        assert link.backlog_bytes == 0
        assert len(drained) == 1
        assert drained[0] <= 1_000_000


@pytest.mark.trio
async def test_on_drained_may_refill_the_link_until_a_long_stream_is_through() -> None:
    async with linked() as (_plane, link, far):
        left = 3_000

        def fill() -> None:
            nonlocal left
            while left and link.backlog_bytes < 256_000:
                left -= 1
                link.send_nowait(left.to_bytes(2, "big") * 4_000)

        link.on_drained(fill, 64_000)
        fill()
        for number in reversed(range(3_000)):
            assert await far.next() == number.to_bytes(2, "big") * 4_000


@pytest.mark.trio
async def test_a_peer_that_takes_nothing_reads_why_behind_the_frame_that_was_on_its_way() -> None:
    async with linked(send_timeout_s=0.3, dead_after_s=30, farewell=FAREWELL) as (_plane, link, far):
        taken = Taken()
        link.set_handler(taken)
        for _ in range(14):
            link.send_nowait(bytes(MAX_MESSAGE_BYTES))
        await until(lambda: link.stalled)
        with pytest.raises(LinkClosed, match="slow_consumer"):
            link.send_nowait(b"too late")
        got: list[Event] = []
        while not got or not isinstance(got[-1], Close):
            got.append(await far.next())
        *whole, farewell, close = got
        assert all(message == bytes(MAX_MESSAGE_BYTES) for message in whole)
        assert len(whole) < 14, "the rest was dropped"
        assert isinstance(farewell, bytes)
        assert decode(farewell, FROM_RELAY) == FAREWELL
        assert isinstance(close, Close)
        assert (close.code, close.reason) == (1008, link.reason)
        await far.send(close_payload(1008, ""), CLOSE)
        assert await far.hung_up()
        assert taken.ends == 1, "at once, and not when it had read all"
        await until(lambda: taken.cuts > 0)
        assert link.stopped


@pytest.mark.trio
async def test_more_than_may_wait_ends_a_link_that_has_no_farewell_and_a_ping_flood_does_too() -> None:
    async with linked(max_backlog_bytes=5_000_000) as (_plane, link, _far):
        with pytest.raises(LinkBroken, match="slow_consumer"):
            overfill(link, bytes(500_000))
        assert link.stopped
    async with linked(max_backlog_bytes=100_000) as (_plane, link, far):
        pings = make_frame(PING, b"x" * 125, masked=True) * 1_000
        with pytest.raises(trio.BrokenResourceError):
            await send_on(far.stream, pings)
        assert "slow_consumer" in link.reason


@pytest.mark.trio
async def test_a_full_inbox_holds_the_peer_up_and_loses_nothing() -> None:
    async with linked(max_inbox_bytes=100_000) as (_plane, link, far), trio.open_nursery() as nursery:

        async def send() -> None:
            for number in range(1_000):
                await far.send(number.to_bytes(2, "big") * 5_000)

        nursery.start_soon(send)
        await until(lambda: link.reading_paused)
        for number in range(1_000):
            assert await link.receive() == number.to_bytes(2, "big") * 5_000
            assert link._inbox_bytes < 100_000 + 600_000


@pytest.mark.trio
async def test_a_fault_of_who_waits_for_a_link_to_drain_ends_that_link_and_no_other() -> None:
    def fall() -> None:
        raise KeyError("a bug")

    with structlog.testing.capture_logs() as logs:
        async with linked() as (reactor, link, far):
            pairs = [socket.socketpair() for _ in range(2)]
            others = []
            for ours, theirs in pairs:
                ends = [trio.SocketStream(trio.socket.from_stdlib_socket(each)) for each in (ours, theirs)]
                others.append((reactor.register(ends[0], "other", LinkLimits()), FarEnd(ends[1])))
            (bad, _bad_far), (good, good_far) = others
            bad.on_drained(fall, 0)

            class Telling(Taken):
                def on_messages(self, messages: list[bytes]) -> None:
                    bad.send_nowait(b"x")
                    good.send_nowait(b"y")

            link.set_handler(Telling())
            await far.send(b"go")
            assert await good_far.next() == b"y"
            assert bad.stopped
            assert link.gone is None
            await far.send(PING.to_bytes(1, "big"), PING)
            assert isinstance(await far.next(), Pong)
            for _, far_end in others:
                await far_end.stream.aclose()
    assert [line["event"] for line in logs] == ["internal error in connection"]
