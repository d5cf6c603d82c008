"""The relay's side of links to peers that take nothing, take little at a time, or stop in mid-frame."""

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, BytesMessage, CloseConnection, Event, Ping, Pong, Request

from protocol.link import base, liveness, tcp_info
from protocol.link.base import Link
from protocol.link.stream_link import StreamLink
from protocol.wire.codec import decode
from protocol.wire.errors import LinkBroken, LinkClosed
from protocol.wire.frames import MAX_MESSAGE_BYTES
from protocol.wire.messages import FROM_RELAY, SUBPROTOCOL, Error
from tests.support.scripted_relay import accept_link

FAREWELL = Error(code="slow_consumer", message="connect again")
#: No kernel can say of a stream in memory whether the peer is there, and one that reads nothing answers no ping.
NEVER_DEAD: dict[str, Any] = {"dead_after_s": 1e6}


@attrs.define(eq=False)
class Reader:
    """The other end, frame by frame; it reads only what a test asks it to."""

    stream: trio.abc.Stream
    ws: WSConnection = attrs.field(factory=lambda: WSConnection(ConnectionType.CLIENT))
    events: list[Event] = attrs.field(factory=list)

    async def read(self, size: int) -> int:
        """Take so many bytes at most; what they tell is added to `events`."""
        data = bytes(await self.stream.receive_some(size))
        assert data, "the link closed the connection"
        self.ws.receive_data(data)
        for event in self.ws.events():
            self.events.append(event)
            if isinstance(event, Ping):
                await self.stream.send_all(self.ws.send(event.response()))
        return len(data)

    async def until(self, kind: type[Event]) -> Any:
        """Read up to an event of this kind; returns it."""
        while not any(isinstance(event, kind) for event in self.events):
            await self.read(65_536)
        return next(event for event in self.events if isinstance(event, kind))

    def messages(self) -> list[bytes]:
        """The whole messages so far."""
        whole, part = [], b""
        for event in self.events:
            if isinstance(event, BytesMessage):
                part += event.data
                if event.message_finished:
                    whole.append(part)
                    part = b""
        return whole


@asynccontextmanager
async def link_to_reader(
    pair: Callable[[], tuple[trio.abc.Stream, trio.abc.Stream]] = trio.testing.lockstep_stream_pair, **limits: Any
) -> AsyncIterator[tuple[Link, Reader]]:
    """A link of the relay's, and its peer. A lockstep stream takes nothing that nobody reads."""
    ours, theirs = pair()
    reader = Reader(theirs)
    request = Request(host="relay.test", target="/v1/relay", subprotocols=[SUBPROTOCOL])

    shaken = trio.Event()

    async def shake_hands() -> None:
        await theirs.send_all(reader.ws.send(request))
        await reader.until(AcceptConnection)
        shaken.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(shake_hands)
        async with accept_link(ours, **limits) as link:
            await shaken.wait()
            yield link, reader


async def over(link: Link, kind: type[Exception] = LinkClosed) -> float:
    """Wait until the link gives nothing more; when that was."""
    with pytest.raises(kind):
        await link.receive()
    return trio.current_time()


# -- who takes nothing --------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_peer_that_comes_to_itself_in_time_reads_why_and_nothing_of_what_it_left(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with link_to_reader(send_timeout_s=60, farewell=FAREWELL, **NEVER_DEAD) as (link, reader):
        for number in range(3):
            link.send_nowait(bytes([number]) * 1000)
        began = trio.current_time()
        assert await over(link) - began == pytest.approx(60)
        assert (link.stalled, link.reason) == (True, "slow_consumer: client accepted no data for 60 s")
        with pytest.raises(LinkClosed, match="slow_consumer"):
            link.send_nowait(b"too late")
        with pytest.raises(LinkClosed, match="slow_consumer"):
            await link.drained()
        close = await reader.until(CloseConnection)
        assert (close.code, close.reason) == (1008, link.reason)
        first, farewell = reader.messages()
        assert first == bytes(1000), "what was on its way came whole"
        assert decode(farewell, FROM_RELAY) == FAREWELL
        await reader.stream.send_all(reader.ws.send(close.response()))
    assert link.close_code == 1008
    assert trio.current_time() - began == pytest.approx(60)


@pytest.mark.trio
@pytest.mark.parametrize("waits", [True, False])
async def test_a_peer_that_reads_nothing_at_all_is_cut_off_whether_anybody_closes_the_link_or_not(
    autojump_clock: trio.testing.MockClock, waits: bool
) -> None:
    async with link_to_reader(send_timeout_s=60, farewell=FAREWELL, **NEVER_DEAD) as (link, reader):
        link.send_nowait(b"nobody reads this")
        began = trio.current_time()
        await over(link)
        if waits:
            await trio.sleep(2 * base.CLOSE_S + 0.1)
            with pytest.raises(trio.BrokenResourceError):
                await reader.stream.send_all(b"is it there?")
    assert trio.current_time() - began <= 60 + 2 * base.CLOSE_S + 0.1
    assert link.reason.startswith("slow_consumer")


@pytest.mark.trio
async def test_more_than_may_wait_is_a_slow_consumer_too_and_told(autojump_clock: trio.testing.MockClock) -> None:
    async with link_to_reader(max_backlog_bytes=5_000, farewell=FAREWELL) as (link, reader):
        for _ in range(5):
            link.send_nowait(bytes(1_000))
            await trio.testing.wait_all_tasks_blocked()  # the first is on its way, the others wait
        with pytest.raises(LinkClosed, match="slow_consumer: 5000 bytes are queued"):
            link.send_nowait(b"x")
        await reader.until(CloseConnection)
        first, farewell = reader.messages()
        assert first == bytes(1_000)
        assert decode(farewell, FROM_RELAY) == FAREWELL
        assert link.stalled


@pytest.mark.trio
async def test_a_link_that_has_nothing_to_send_is_never_stalled(autojump_clock: trio.testing.MockClock) -> None:
    pair = trio.testing.memory_stream_pair
    async with link_to_reader(pair, send_timeout_s=10, ping_interval_s=1e6, **NEVER_DEAD) as (link, reader):
        for _ in range(3):
            await trio.sleep(1_000)
            link.send_nowait(b"once in a while")
            await reader.until(BytesMessage)
            reader.events.clear()
        assert link.gone is None


@pytest.mark.trio
async def test_a_stalled_link_sends_nothing_more_for_those_who_wait_for_it_to_drain(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with link_to_reader(send_timeout_s=5, farewell=FAREWELL, **NEVER_DEAD) as (link, reader):
        drained: list[int] = []
        link.on_drained(lambda: drained.append(link.backlog_bytes), 2_000)
        for _ in range(5):
            link.send_nowait(bytes(1_000))
        await over(link)
        await reader.until(CloseConnection)
        assert not drained


# -- who takes little ---------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_reader_that_makes_any_progress_is_never_cut_off(autojump_clock: trio.testing.MockClock) -> None:
    """One message takes 14 times as long as a peer may take nothing."""
    async with link_to_reader(send_timeout_s=60, **NEVER_DEAD) as (link, reader):
        link.send_nowait(bytes(MAX_MESSAGE_BYTES))
        began = trio.current_time()
        while not reader.messages():
            taken = 0
            while taken < 65_536 and not reader.messages():
                taken += await reader.read(65_536 - taken)
            await trio.sleep(50)
        assert trio.current_time() - began > 14 * 50
        assert link.gone is None
        link.abort("seen enough")


@pytest.mark.trio
async def test_an_answered_ping_is_progress(autojump_clock: trio.testing.MockClock) -> None:
    async with link_to_reader(trio.testing.memory_stream_pair, send_timeout_s=8, **NEVER_DEAD) as (link, reader):
        for _ in range(4):
            await reader.until(Ping)
            reader.events.clear()
            before = link.taken_at
            await trio.sleep(0.5)
            assert link.taken_at >= before
        assert trio.current_time() - link.taken_at < 5


@pytest.mark.trio
async def test_what_the_kernel_gets_rid_of_is_progress_though_it_takes_nothing_more_for_long(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that was full takes more only when a third of its buffer is free: minutes, with a slow reader."""
    waiting = 1_000_000
    monkeypatch.setattr(StreamLink, "_in_kernel", lambda _link: waiting)
    async with link_to_reader(send_timeout_s=60, **NEVER_DEAD) as (link, _reader):
        link.send_nowait(b"waits behind them")
        for _ in range(20):
            await trio.sleep(50)
            waiting -= 1
            assert link.gone is None
        began = trio.current_time()
        assert 60 <= await over(link, LinkBroken) - began <= 60 + 60 / liveness.CHECKS


# -- silence ------------------------------------------------------------------------------------------------------


@pytest.mark.trio
@pytest.mark.parametrize("patient", [True, False])
@pytest.mark.parametrize("answered", [True, False])
async def test_a_silent_peer_with_something_to_read_has_longer_where_its_machine_answers(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch, patient: bool, answered: bool
) -> None:
    monkeypatch.setattr(StreamLink, "_peer_acknowledges", lambda _link: answered)
    async with link_to_reader(send_timeout_s=60, dead_after_s=15) as (link, _reader):
        link.tolerate_stall = patient
        link.send_nowait(b"nobody reads this")
        began = trio.current_time()
        waited_s = await over(link, LinkBroken) - began
        if patient and answered:
            assert waited_s == pytest.approx(60)
            assert link.stalled
        else:
            assert waited_s == pytest.approx(15)
            assert not link.stalled
            assert "nothing received" in link.reason


@pytest.mark.trio
async def test_a_machine_that_is_gone_while_its_reader_is_waited_for_is_seen(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = True
    monkeypatch.setattr(StreamLink, "_peer_acknowledges", lambda _link: answered)
    async with link_to_reader(send_timeout_s=60, dead_after_s=15) as (link, _reader):
        link.tolerate_stall = True
        link.send_nowait(b"nobody reads this")
        await trio.sleep(30)
        assert link.gone is None
        answered = False
        assert await over(link, LinkBroken) <= 30 + liveness.RECHECK_S + 0.1


@pytest.mark.trio
async def test_a_silent_peer_with_nothing_to_read_is_not_waited_for(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StreamLink, "_peer_acknowledges", lambda _link: True)
    async with link_to_reader(trio.testing.memory_stream_pair, dead_after_s=15) as (link, _reader):
        link.tolerate_stall = True
        assert await over(link, LinkBroken) == pytest.approx(15, abs=0.1)


@pytest.mark.trio
@pytest.mark.parametrize("part", [1, 4, 20, 900])
async def test_a_peer_that_stops_in_mid_frame_is_seen_when_it_has_been_silent(
    autojump_clock: trio.testing.MockClock, part: int
) -> None:
    async with link_to_reader(trio.testing.memory_stream_pair, dead_after_s=15) as (link, reader):
        await trio.sleep(3)
        began = trio.current_time()
        await reader.stream.send_all(reader.ws.send(BytesMessage(data=bytes(1_000)))[:part])
        assert 14.9 < await over(link, LinkBroken) - began <= 15.0


@pytest.mark.trio
async def test_a_frame_that_comes_byte_by_byte_comes_whole(autojump_clock: trio.testing.MockClock) -> None:
    async with link_to_reader(trio.testing.memory_stream_pair, dead_after_s=15) as (link, reader):
        for byte in reader.ws.send(BytesMessage(data=bytes(range(100)))):
            await reader.stream.send_all(bytes([byte]))
            await trio.sleep(10)
        assert await link.receive() == bytes(range(100))
        await reader.stream.send_all(reader.ws.send(Pong()))
        assert link.gone is None


# -- what the kernel says -----------------------------------------------------------------------------------------


async def _tcp_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        one = await trio.open_tcp_stream(*listener.socket.getsockname()[:2])
        return one, await listener.accept()


async def _fill(stream: trio.SocketStream) -> None:
    with trio.move_on_after(0.2):
        while True:
            await stream.send_all(bytes(65_536))


@pytest.mark.trio
async def test_the_kernel_knows_what_waits_and_that_the_machine_of_a_reader_that_sleeps_is_there() -> None:
    unix = [trio.SocketStream(trio.socket.from_stdlib_socket(sock)) for sock in socket.socketpair()]
    for one, other in (await _tcp_pair(), unix):
        async with one, other:
            assert tcp_info.peer_acknowledges(one.socket)
            assert tcp_info.unsent_bytes(one.socket) == 0
            await _fill(one)
            waiting = tcp_info.unsent_bytes(one.socket)
            assert waiting is not None
            assert waiting > 10_000
            assert tcp_info.peer_acknowledges(one.socket)
            with trio.fail_after(10):
                while (tcp_info.unsent_bytes(one.socket) or 0) >= waiting:
                    await other.receive_some()
        assert tcp_info.unsent_bytes(one.socket) is None
        assert not tcp_info.peer_acknowledges(one.socket) or one.socket.family == socket.AF_UNIX
    memory, _ = trio.testing.memory_stream_pair()
    assert tcp_info.socket_of(memory) is None


@pytest.mark.trio
@pytest.mark.parametrize(
    ("info", "there"),
    [
        ((1, 0, 0, 0), True),
        ((1, 0, 0, 1), True),  # a probe is on its way
        ((1, 4, 2, 0), False),  # cut off with bytes in flight, a second later
        ((1, 2, 0, 2), False),  # cut off behind a closed window, four seconds later
    ],
)
async def test_a_machine_that_leaves_two_tries_without_an_answer_is_gone(
    monkeypatch: pytest.MonkeyPatch, info: tuple[int, ...], there: bool
) -> None:
    """As Linux 6 tells it of a connection over `lo` that was taken down (measured with `unshare -rn`)."""
    one, other = await _tcp_pair()
    async with one, other:
        monkeypatch.setattr(type(one.socket), "getsockopt", lambda *_: bytes(info))
        assert tcp_info.peer_acknowledges(one.socket) is there
