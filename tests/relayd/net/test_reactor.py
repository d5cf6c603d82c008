"""The data plane, over real sockets: order, backlogs, batches, ends; and that a link at rest has no task."""

import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import attrs
import pytest
import structlog.testing
import trio
import trio.testing

from protocol.link import base
from protocol.link.limits import LinkLimits
from protocol.link.websocket_frames import (
    BINARY,
    CLOSE,
    PING,
    PONG,
    TEXT,
    Close,
    Event,
    Parser,
    Ping,
    Pong,
    close_payload,
    make_frame,
)
from protocol.wire.codec import decode
from protocol.wire.errors import LinkBroken, LinkClosed
from protocol.wire.frames import MAX_MESSAGE_BYTES
from protocol.wire.messages import FROM_RELAY, Error
from relayd.net.reactor import Reactor, open_reactor
from relayd.net.socket_link import SocketLink
from tests.support.relay import until

FAREWELL = Error(code="slow_consumer", message="connect again")


@attrs.define(eq=False)
class Taken:
    """Whoever takes a link's messages."""

    messages: list[bytes] = attrs.field(factory=list)
    batches: int = 0
    texts: list[str] = attrs.field(factory=list)
    ends: int = 0
    cuts: int = 0

    def on_messages(self, messages: list[bytes]) -> None:
        self.batches += 1
        self.messages += messages

    def has(self, count: int) -> bool:
        return len(self.messages) == count

    def on_text(self, text: str) -> None:
        self.texts.append(text)

    def on_closed(self) -> None:
        self.ends += 1

    def on_transport_closed(self) -> None:
        self.cuts += 1


@attrs.define(eq=False)
class FarEnd:
    """The client's socket, frame by frame."""

    stream: trio.SocketStream
    parser: Parser = attrs.field(factory=lambda: Parser(masked=False, max_message_bytes=2 * MAX_MESSAGE_BYTES))
    events: list[Event] = attrs.field(factory=list)

    async def send(self, payload: bytes, opcode: int = BINARY) -> None:
        await self.stream.send_all(make_frame(opcode, payload, masked=True))

    async def next(self) -> Event:
        """The next thing that comes; fails where the relay hung up."""
        while not self.events:
            data = await self.stream.receive_some(65_536)
            assert data, "the relay hung up"
            self.parser.feed(data)
            self.events += self.parser.pop_events()
        return self.events.pop(0)

    async def hung_up(self) -> bool:
        """Whether the relay closes the connection without another byte."""
        return not self.events and not await self.stream.receive_some()


@asynccontextmanager
async def linked(*, tcp: bool = True, **limits: Any) -> AsyncIterator[tuple[Reactor, SocketLink, FarEnd]]:
    """A plane, a link of it, and the far end."""
    with trio.fail_after(30):
        async with open_reactor() as reactor:
            if tcp:
                (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
                async with listener:
                    theirs = await trio.open_tcp_stream(*listener.socket.getsockname()[:2])
                    ours = await listener.accept()
            else:
                ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(each)) for each in socket.socketpair())
            async with theirs:
                yield reactor, reactor.register(ours, "peer", LinkLimits(**limits)), FarEnd(theirs)


def overfill(link: SocketLink, data: bytes) -> None:
    """Send without end, to a peer that takes nothing."""
    while True:
        link.send_nowait(data)


def stand_still(seconds: float) -> None:
    """As a process that was stopped; it is what is tested."""
    time.sleep(seconds)


async def send_on(stream: trio.SocketStream, data: bytes) -> None:
    """Send until the relay hangs up."""
    while True:
        await stream.send_all(data)


async def hear_out(link: SocketLink) -> None:
    """Take messages until there are no more."""
    while True:
        await link.receive()


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
async def test_pings_go_out_and_their_pongs_tell_the_round_trip() -> None:
    async with linked(ping_interval_s=0.1) as (_plane, link, far):
        for _ in range(3):
            ping = await far.next()
            assert isinstance(ping, Ping)
            await far.send(ping.payload, PONG)
        await until(lambda: link.rtt_s is not None)
        await far.send(b"are you there", PING)
        while not isinstance(event := await far.next(), Pong):
            pass
        assert event.payload == b"are you there"


@pytest.mark.trio
async def test_a_silent_peer_is_taken_for_dead_and_one_that_sends_anything_is_not() -> None:
    async with linked(ping_interval_s=0.1, dead_after_s=0.5) as (_plane, link, far):
        for _ in range(8):
            await trio.sleep(0.1)
            await far.send(b"here")
        assert link.gone is None
        last = trio.current_time()
        with pytest.raises(LinkBroken, match="nothing heard"):
            await hear_out(link)
        assert trio.current_time() - last > 0.2
        assert link.close_code == 1006


@pytest.mark.trio
async def test_a_peer_that_closes_is_answered_and_hung_up_on_and_its_last_messages_are_kept() -> None:
    async with linked() as (_plane, link, far):
        await far.stream.send_all(
            make_frame(BINARY, b"last words", masked=True)
            + make_frame(CLOSE, close_payload(4001, "bye"), masked=True)
            + make_frame(BINARY, b"too late", masked=True)
        )
        assert await far.next() == Close(4001, "")
        assert await far.hung_up()
        assert await link.receive() == b"last words"
        with pytest.raises(LinkBroken, match="4001: bye"):
            await link.receive()
        taken = Taken()
        link.set_handler(taken)  # who comes late is told all the same
        await until(lambda: taken.ends > 0)
        assert (taken.messages, taken.ends) == ([], 1)


@pytest.mark.trio
async def test_closing_sends_the_backlog_and_the_code_and_waits_for_the_answer() -> None:
    async with linked(max_backlog_bytes=64 * MAX_MESSAGE_BYTES) as (_plane, link, far), trio.open_nursery() as nursery:
        for _ in range(20):
            link.send_nowait(bytes(MAX_MESSAGE_BYTES))
        nursery.start_soon(link.aclose, 1001, "going away")
        for _ in range(20):
            assert await far.next() == bytes(MAX_MESSAGE_BYTES)
        assert await far.next() == Close(1001, "going away")
        assert not link.stopped
        await far.send(close_payload(1001, ""), CLOSE)
        assert await far.hung_up()
    assert link.close_code == 1001
    assert isinstance(link.gone, LinkClosed)


@pytest.mark.trio
async def test_closing_ends_in_time_when_the_peer_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "CLOSE_S", 0.2)
    async with linked() as (_plane, link, far):
        await link.aclose(1001, "going away")
        assert link.stopped
        assert await far.next() == Close(1001, "going away")
        assert await far.hung_up()


@pytest.mark.trio
@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\x82\x05hello", 1002),  # not masked
        (b"\x82\xff\x00\x00\x00\x00\x40\x00\x00\x00\x00\x00\x00\x00", 1009),  # announces a GiB
        (make_frame(BINARY, bytes(MAX_MESSAGE_BYTES + 1), masked=True) * 4, 1009),
    ],
)
async def test_who_breaks_a_rule_reads_why_and_is_hung_up_on(data: bytes, code: int) -> None:
    async with linked() as (_plane, link, far):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(far.stream.send_all, data)
            close = await far.next()
        assert isinstance(close, Close)
        assert close.code == code
        assert await far.hung_up()
        await far.stream.aclose()
        await link.aclose()
        assert link.close_code == code


@pytest.mark.trio
async def test_an_end_in_the_middle_of_a_send_is_told_later_and_once() -> None:
    async with linked() as (_plane, link, far):
        taken = Taken()
        link.set_handler(taken)
        far.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await far.stream.aclose()  # a reset
        while link.gone is None:
            link.send_nowait(b"x" * 1_000)
            assert taken.ends == 0, "not within the send"
            await trio.lowlevel.checkpoint()
        await until(lambda: taken.ends > 0)
        link.abort("again")
        await link.aclose()
        await until(lambda: taken.cuts > 0)
        assert (taken.ends, taken.cuts) == (1, 1)


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
async def test_a_full_inbox_holds_the_peer_up_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "MAX_INBOX_BYTES", 100_000)
    async with linked() as (_plane, link, far), trio.open_nursery() as nursery:

        async def send() -> None:
            for number in range(1_000):
                await far.send(number.to_bytes(2, "big") * 5_000)

        nursery.start_soon(send)
        await until(lambda: link.reading_paused)
        for number in range(1_000):
            assert await link.receive() == number.to_bytes(2, "big") * 5_000
            assert link._inbox_bytes < 100_000 + 600_000


@pytest.mark.trio
async def test_what_is_connected_when_the_plane_closes_is_cut_and_told() -> None:
    async with open_reactor() as reactor:
        ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(each)) for each in socket.socketpair())
        link, taken = reactor.register(ours, "peer", LinkLimits()), Taken()
        link.set_handler(taken)
    assert taken.ends == 1
    async with theirs:
        assert await FarEnd(theirs).hung_up()


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
@pytest.mark.parametrize("tcp", [True, False])
async def test_the_last_words_of_a_peer_that_is_gone_are_heard_though_a_send_fails_first(tcp: bool) -> None:
    async with linked(tcp=tcp) as (_plane, link, far):
        taken = Taken()
        link.set_handler(taken)
        sock = socket.socket(fileno=far.stream.socket.detach())
        words = make_frame(BINARY, b"last words", masked=True)
        sock.sendall(words + make_frame(CLOSE, close_payload(4001, "bye"), masked=True))
        sock.close()
        for _ in range(3):  # before the plane has its turn; the kernel says no by the second at the latest
            link.send_nowait(b"too late")
        await until(lambda: taken.cuts > 0)
        assert taken.messages == [b"last words"]
        assert (link.close_code, link.reason) == (4001, "peer closed the connection (4001: bye)")


@pytest.mark.trio
async def test_what_a_peer_said_before_it_closed_is_given_to_who_takes_its_messages_later() -> None:
    async with linked() as (_plane, link, far):
        await far.send(b"one")
        await far.send(b"words", TEXT)
        await far.send(close_payload(1000, ""), CLOSE)
        await until(lambda: link.gone is not None)
        taken = Taken()
        link.set_handler(taken)
        assert (taken.messages, taken.texts) == ([b"one"], ["words"])
        await until(lambda: taken.ends > 0)


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


@pytest.mark.trio
async def test_a_relay_that_stood_still_takes_nobody_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relayd.net.reactor.LATE_S", 0.1)
    async with linked(ping_interval_s=0.2, dead_after_s=0.6) as (_plane, link, far):
        await far.next()
        await far.send(b"here", PONG)
        stand_still(1.5)
        await trio.sleep(0.3)
        assert link.gone is None
        with pytest.raises(LinkBroken, match="nothing heard"):
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
async def test_a_trusted_link_is_read_by_a_task_of_its_own_to_its_end() -> None:
    async with linked() as (reactor, link, far), trio.open_nursery() as nursery:
        taken = Taken()
        link.use_bulk_mode()
        link.set_handler(taken)
        nursery.start_soon(reactor.serve_worker_link, link, lambda _data: False, link.close_soon)
        link.max_messages_per_turn = 10
        every = [number.to_bytes(2, "big") * 3_000 for number in range(500)]
        for each in every:
            await far.send(each)
            link.send_nowait(each)
        for each in every:
            assert await far.next() == each
        await until(lambda: len(taken.messages) == len(every))
        assert taken.messages == every
        await far.send(close_payload(1000, "done"), CLOSE)
        assert await far.next() == Close(1000, "")
        await far.stream.aclose()
        await until(lambda: taken.cuts > 0)
        # The nursery ends: so has its task.


@pytest.mark.trio
async def test_a_link_that_is_attended_no_more_is_read_on_by_the_plane() -> None:
    async with linked() as (reactor, link, far):
        taken = Taken()
        link.use_bulk_mode()
        link.set_handler(taken)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reactor.serve_worker_link, link, lambda _data: False, link.close_soon)
            await far.send(b"1")
            await until(lambda: taken.messages == [b"1"])
            nursery.cancel_scope.cancel()
        await far.send(b"2")
        await until(lambda: taken.messages == [b"1", b"2"])
        link.close_soon(1001, "bye")
        assert await far.next() == Close(1001, "bye")
        await far.send(close_payload(1001, ""), CLOSE)
        with trio.fail_after(1):  # and not after `CLOSE_S`: its answer was read
            assert await far.hung_up()


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


@pytest.mark.trio
async def test_what_comes_alone_is_passed_on_and_all_else_is_handed_over_in_order() -> None:
    async with linked() as (reactor, link, far), trio.open_nursery() as nursery:
        taken = Taken()
        passed: list[bytes] = []

        def pass_on(data: bytes) -> bool:
            if data.startswith(b"no"):
                return False
            taken.messages.append(data)
            passed.append(data)
            return True

        link.use_bulk_mode()
        link.set_handler(taken)
        nursery.start_soon(reactor.serve_worker_link, link, pass_on, link.close_soon)
        alone, refused, short = b"yes" * 100, b"no!" * 100, b"short"
        sent = [[alone], [refused], [short], [alone, alone], [alone]]
        for number, messages in enumerate(sent):
            await far.stream.send_all(b"".join(make_frame(BINARY, each, masked=True) for each in messages))
            so_far = sum(map(len, sent[: number + 1]))
            await until(partial(taken.has, so_far))
        assert taken.messages == [message for messages in sent for message in messages]
        assert passed == [alone, alone], "of the five, two came alone and were wanted"
        await far.send(b"", CLOSE)
        await far.next()
        await far.stream.aclose()


@pytest.mark.trio
async def test_a_fault_of_who_passes_on_is_told_and_ends_that_link_alone() -> None:
    def fall(_data: bytes) -> bool:
        raise RuntimeError("a mistake")

    def tell() -> None:
        link.close_soon(1011, "a mistake")

    async with linked() as (reactor, link, far), trio.open_nursery() as nursery:
        link.use_bulk_mode()
        link.set_handler(Taken())
        with structlog.testing.capture_logs() as logs:
            nursery.start_soon(reactor.serve_worker_link, link, fall, tell)
            await far.send(b"x" * 200)
            assert await far.next() == Close(1011, "a mistake")
            await far.send(close_payload(1011, ""), CLOSE)
            assert await far.hung_up()
        assert [each["event"] for each in logs] == ["internal error in connection"]


@pytest.mark.trio
@pytest.mark.parametrize("size", [130, 7_680, 300_000])
async def test_one_by_one_a_full_kernel_loses_nothing_of_frames_and_pings(size: int) -> None:
    async with linked(max_backlog_bytes=64 * MAX_MESSAGE_BYTES) as (_plane, link, far):
        sent: list[Event] = []
        while link.backlog_bytes < 1_000_000:
            number = len(sent).to_bytes(4, "big")
            link.send_frames([number * (size // 4)])
            link._put_control(PING, number)
            sent += [number * (size // 4), Ping(number)]
        for each in sent:
            assert await far.next() == each
        assert link.backlog_bytes == 0


@pytest.mark.trio
async def test_messages_that_are_kept_go_to_who_takes_them_next() -> None:
    async with linked() as (_plane, link, far):
        first, second = Taken(), Taken()
        link.set_handler(first)
        await far.send(b"1")
        await until(lambda: first.messages == [b"1"])
        link.buffer_again([b"1"])
        await far.send(b"2")
        assert await link.receive() == b"1"
        await far.send(b"3")
        assert await link.receive() == b"2"
        await far.send(b"4")
        await until(lambda: len(link._inbox or ()) == 2)
        link.set_handler(second)
        assert second.messages == [b"3", b"4"]
        assert first.messages == [b"1"]


@pytest.mark.trio
@pytest.mark.parametrize("ours", [True, False])
async def test_a_trusted_link_that_is_cut_ends_its_task(ours: bool) -> None:
    async with linked() as (reactor, link, far), trio.open_nursery() as nursery:
        link.use_bulk_mode()
        link.set_handler(Taken())
        nursery.start_soon(reactor.serve_worker_link, link, lambda _data: False, link.close_soon)
        await trio.testing.wait_all_tasks_blocked()
        if ours:
            link.abort("enough")
        else:
            await far.stream.aclose()
