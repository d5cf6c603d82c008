"""The reactor, over real sockets: order, batches, turns, faults; and that a link at rest has no task."""

import socket
import time
from typing import Any

import pytest
import structlog.testing
import trio
import trio.testing

from protocol.link.limits import LinkLimits
from protocol.link.websocket_frames import (
    BINARY,
    CLOSE,
    PONG,
    TEXT,
    Parser,
    close_payload,
    make_frame,
)
from protocol.wire.errors import LinkBroken
from protocol.wire.frames import MAX_MESSAGE_BYTES
from relayd.net.reactor import open_reactor
from tests.relayd.net.far_end import FarEnd, Taken, hear_out, linked
from tests.support.relay import until


def stand_still(seconds: float) -> None:
    """As a process that was stopped; it is what is tested."""
    time.sleep(seconds)


@pytest.mark.trio
@pytest.mark.parametrize("tcp", [True, False])
async def test_messages_cross_both_ways_in_order_whatever_their_size(tcp: bool) -> None:
    sizes = [0, 1, 125, 126, 7_680, 65_529, 65_530, 65_535, 65_536, 300_000, MAX_MESSAGE_BYTES, 3]
    async with linked(tcp=tcp) as (_plane, link, far), trio.open_nursery() as nursery:

        async def send() -> None:
            for number, size in enumerate(sizes):
                await far.send(bytes([number]) * size)

        nursery.start_soon(send)
        for number, size in enumerate(sizes):
            message = await link.receive()
            assert message == bytes([number]) * size
            link.send_nowait(message)
            assert await far.next() == message


@pytest.mark.trio
async def test_a_long_message_that_comes_in_dribbles_comes_whole() -> None:
    async with linked() as (_plane, link, far):
        payload = bytes(range(256)) * 400
        data = make_frame(BINARY, payload, masked=True) + make_frame(BINARY, b"next", masked=True)
        for start in range(0, len(data), 9_999):
            await far.stream.send_all(data[start : start + 9_999])
            await trio.sleep(0.001)
        assert await link.receive() == payload
        assert await link.receive() == b"next"


@pytest.mark.trio
async def test_a_taker_gets_what_came_before_it_and_then_whole_batches() -> None:
    async with linked() as (_plane, link, far):
        taken = Taken()
        await far.send(b"0")
        await until(lambda: bool(link._inbox))
        link.set_handler(taken)
        await far.stream.send_all(b"".join(make_frame(BINARY, bytes([n]), masked=True) for n in range(1, 50)))
        await far.send(b"words", TEXT)
        await until(lambda: bool(taken.texts))
        assert taken.messages == [b"0", *(bytes([n]) for n in range(1, 50))]
        assert taken.texts == ["words"]
        assert taken.batches < 10


@pytest.mark.trio
async def test_what_is_sent_while_messages_are_handled_leaves_in_one_call_a_link() -> None:
    async with linked() as (_plane, link, far):
        calls: list[int] = []

        class Counted:
            def sendmsg(self, pieces: list[bytes]) -> int:
                calls.append(len(pieces))
                return sock.sendmsg(pieces)

            def __getattr__(self, name: str) -> Any:
                return getattr(sock, name)

        class Answering(Taken):
            def on_messages(self, messages: list[bytes]) -> None:
                for message in messages:
                    link.send_nowait(message)
                    link.send_frames([message, message])

        sock = link.sock
        link.sock = Counted()  # type: ignore[assignment]
        link.set_handler(Answering())
        await far.stream.send_all(b"".join(make_frame(BINARY, b"x" * 100, masked=True) for _ in range(20)))
        for _ in range(60):
            assert await far.next() == b"x" * 100
        assert sum(calls) == 120
        assert len(calls) <= 3, "a call for what came in one piece, which 20 small frames do"


@pytest.mark.trio
async def test_a_fault_of_ours_over_one_link_ends_that_link_alone() -> None:
    class Broken(Taken):
        def on_messages(self, messages: list[bytes]) -> None:
            raise KeyError("a bug")

    with structlog.testing.capture_logs() as logs:
        async with linked() as (reactor, link, far):
            ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(each)) for each in socket.socketpair())
            other, other_far = reactor.register(ours, "other", LinkLimits()), FarEnd(theirs)
            link.set_handler(Broken())
            await far.send(b"x")
            assert await far.hung_up()
            await other_far.send(b"y")
            assert await other.receive() == b"y"
            await theirs.aclose()
    assert [line["event"] for line in logs] == ["internal error in connection"]


@pytest.mark.trio
async def test_links_at_rest_have_no_task() -> None:
    async with open_reactor() as reactor:
        before = trio.lowlevel.current_statistics().tasks_living
        ends = []
        for _ in range(20):
            ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(each)) for each in socket.socketpair())
            reactor.register(ours, "peer", LinkLimits()).set_handler(Taken())
            ends.append(theirs)
        assert trio.lowlevel.current_statistics().tasks_living == before
        for theirs in ends:
            await theirs.aclose()


@pytest.mark.trio
async def test_who_asks_for_much_at_once_is_served_in_turns_and_in_order() -> None:
    async with linked(max_backlog_bytes=64 * MAX_MESSAGE_BYTES) as (reactor, link, far):
        ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(each)) for each in socket.socketpair())
        other, other_far = reactor.register(ours, "other", LinkLimits()), FarEnd(theirs)
        served: list[str] = []

        class Crowd(Taken):
            def on_messages(self, messages: list[bytes]) -> None:
                super().on_messages(messages)
                served.append("crowd")

        class One(Taken):
            def on_messages(self, messages: list[bytes]) -> None:
                super().on_messages(messages)
                served.append("one")

        crowd, one = Crowd(), One()
        link.set_handler(crowd)
        other.set_handler(one)
        every = [number.to_bytes(2, "big") for number in range(2_000)]
        await far.stream.send_all(b"".join(make_frame(BINARY, each, masked=True) for each in every))
        await far.send(close_payload(1000, "done"), CLOSE)
        await other_far.send(b"me too")
        await until(lambda: crowd.cuts > 0)
        assert crowd.messages == every
        assert crowd.batches >= 2_000 // link.max_messages_per_turn
        assert "crowd" in served[served.index("one") :], "it did not wait for all of them"
        await theirs.aclose()


@pytest.mark.trio
async def test_a_relay_that_stood_still_takes_nobody_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relayd.net.reactor.LATE_S", 0.1)
    async with linked(ping_interval_s=0.2, dead_after_s=0.6) as (_plane, link, far):
        await far.next()
        await far.send(b"here", PONG)
        stand_still(1.5)
        await trio.sleep(0.3)
        assert link.gone is None
        with pytest.raises(LinkBroken, match="nothing received"):
            await hear_out(link)


def test_a_long_frame_fills_the_buffer_that_it_was_given() -> None:
    parser = Parser(masked=True, max_message_bytes=MAX_MESSAGE_BYTES)
    data = make_frame(BINARY, bytes(MAX_MESSAGE_BYTES), masked=True)
    parser.feed(data[:100])
    whole = parser.large_frame
    for start in range(100, 1_000):
        parser.feed(data[start : start + 1])
        assert parser.large_frame is whole
    parser.feed(data[1_000:] + make_frame(BINARY, b"next", masked=True))
    assert parser.pop_events() == [bytes(MAX_MESSAGE_BYTES), b"next"]


@pytest.mark.trio
@pytest.mark.parametrize("trusted", [True, False])
async def test_what_is_too_much_for_one_turn_needs_no_other_event_to_go_on(trusted: bool) -> None:
    async with linked() as (reactor, link, far), trio.open_nursery() as nursery:
        taken = Taken()
        link.max_messages_per_turn = 10
        if trusted:
            link.use_bulk_mode()
            link.max_messages_per_turn = 10
            nursery.start_soon(reactor.serve_worker_link, link, lambda _data: False, link.close_soon)
        link.set_handler(taken)
        every = [bytes([number]) for number in range(100)]
        octets = b"".join(make_frame(BINARY, each, masked=True) for each in every)
        await far.stream.send_all(octets)
        await until(lambda: taken.messages == every)
        link.feed_early(octets)
        assert len(taken.messages) == 110, "it is a turn's worth at once"
        await until(lambda: taken.messages == every * 2)
        nursery.cancel_scope.cancel()
