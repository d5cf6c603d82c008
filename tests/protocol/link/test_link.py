"""The link, over streams in memory: what it promises of draining, liveness, backlog and closing."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from trio_websocket import wrap_client_stream, wrap_server_stream
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, BytesMessage, CloseConnection, Event, Ping, Pong, Request

from protocol.client.address import Address
from protocol.link import base
from protocol.link.backoff import Backoff
from protocol.link.base import Link
from protocol.link.dial import log_in, open_link, run_with_reconnect
from protocol.link.limits import LinkLimits
from protocol.wire.codec import encode
from protocol.wire.errors import ConnectError, LinkBroken, LinkClosed, LinkError, LoginRefused, ProtocolError
from protocol.wire.frames import MAX_MESSAGE_BYTES
from protocol.wire.messages import SUBPROTOCOL, Error, Hello, Welcome
from tests.support.scripted_relay import ADDRESS, Connection, FakeRelay, accept_link

HELLO = Hello(version=1, role="client")


@asynccontextmanager
async def link_pair(**server_rules: float) -> AsyncIterator[tuple[Link, Link]]:
    """A client's link and the relay's end of it."""
    ours, theirs = trio.testing.memory_stream_pair()

    async def connect(_address: Address) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        return ours

    served: list[Link] = []
    ready, over = trio.Event(), trio.Event()

    async def serve() -> None:
        async with accept_link(theirs, **server_rules) as link:
            served.append(link)
            ready.set()
            await over.wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        async with open_link(ADDRESS, connect_to=connect) as link:
            await ready.wait()
            yield link, served[0]
        over.set()


class RawPeer:
    """The relay's end by hand, frame by frame, for what no well-behaved peer does."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.ws = WSConnection(ConnectionType.SERVER)
        self.events: list[Event] = []

    async def until(self, kind: type[Event]) -> Event:
        """Read up to the next event of this kind."""
        while True:
            for number, event in enumerate(self.events):
                if isinstance(event, kind):
                    del self.events[: number + 1]
                    return event
            data = await self.stream.receive_some()
            assert data, "the link hung up"
            self.ws.receive_data(bytes(data))
            self.events += self.ws.events()

    async def accept(self) -> None:
        await self.until(Request)
        await self.send(AcceptConnection(subprotocol=SUBPROTOCOL))

    async def send(self, event: Event) -> None:
        await self.stream.send_all(self.ws.send(event))


@asynccontextmanager
async def link_to_raw_peer() -> AsyncIterator[tuple[Link, RawPeer]]:
    """A client's link to a `RawPeer`."""
    ours, theirs = trio.testing.memory_stream_pair()
    peer = RawPeer(theirs)

    async def connect(_address: Address) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        return ours

    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.accept)
        async with open_link(ADDRESS, connect_to=connect) as link:
            yield link, peer


@pytest.mark.trio
async def test_messages_cross_both_ways_in_order(autojump_clock: trio.testing.MockClock) -> None:
    async with link_pair() as (client, relay):
        for number in range(100):
            client.send_nowait(bytes([number]) * 1000)
            relay.send_nowait(bytes([number]))
        assert [await relay.receive() for _ in range(100)] == [bytes([number]) * 1000 for number in range(100)]
        assert [await client.receive() for _ in range(100)] == [bytes([number]) for number in range(100)]
        await client.drained()
        assert client.backlog_bytes == 0


@pytest.mark.trio
async def test_a_message_of_one_mebibyte_crosses_and_a_longer_one_is_not_queued(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with link_pair() as (client, relay):
        client.send_nowait(b"x" * MAX_MESSAGE_BYTES)
        assert len(await relay.receive()) == MAX_MESSAGE_BYTES
        with pytest.raises(ValueError, match="limit"):
            client.send_nowait(b"x" * (MAX_MESSAGE_BYTES + 1))
        client.send_nowait(b"still fine")
        assert await relay.receive() == b"still fine"


@pytest.mark.trio
async def test_a_message_that_is_too_long_closes_with_1009_and_the_sender_learns_why() -> None:
    # Real sockets: over unread bytes a kernel would reset the connection, and the close frame would be lost.
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    seen: list[Link] = []

    async def handler(stream: trio.SocketStream) -> None:
        async with accept_link(stream) as link:
            seen.append(link)
            with pytest.raises(LinkBroken, match="1024 KiB"):
                await link.receive()

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, handler, listeners)
            limits = LinkLimits(max_message_bytes=4 * MAX_MESSAGE_BYTES)
            async with open_link(Address(kind="tcp", host="127.0.0.1", port=port), limits=limits) as link:
                link.send_nowait(b"x" * (3 * MAX_MESSAGE_BYTES))
                with pytest.raises(LinkBroken):
                    await link.receive()
            assert link.close_code == 1009
            nursery.cancel_scope.cancel()
    assert seen[0].close_code == 1009


@pytest.mark.trio
async def test_pings_are_answered_while_the_consumer_sleeps(autojump_clock: trio.testing.MockClock) -> None:
    async with link_pair() as (client, relay):
        client.send_nowait(b"unread for long")
        await trio.sleep(120)
        assert client.gone is None
        assert relay.gone is None
        assert client.rtt_s is not None
        assert await relay.receive() == b"unread for long"


@pytest.mark.trio
async def test_a_peer_that_falls_silent_is_seen_within_15_s(autojump_clock: trio.testing.MockClock) -> None:
    async with link_to_raw_peer() as (link, _peer):
        began = trio.current_time()
        with pytest.raises(LinkBroken, match="nothing heard"):
            await link.receive()
        assert 14.9 < trio.current_time() - began <= 15.0


@pytest.mark.trio
async def test_a_pong_alone_keeps_a_link_alive(autojump_clock: trio.testing.MockClock) -> None:
    async with link_to_raw_peer() as (link, peer):
        for _ in range(12):
            ping = await peer.until(Ping)
            assert isinstance(ping, Ping)
            await peer.send(Pong(payload=ping.payload))
        assert trio.current_time() > 50
        assert link.gone is None


@pytest.mark.trio
async def test_one_message_that_takes_longer_than_the_dead_time_to_arrive_keeps_the_link(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with link_to_raw_peer() as (link, peer):
        data = peer.ws.send(BytesMessage(data=b"x" * 100_000))
        for start in range(0, len(data), 10_000):
            await peer.stream.send_all(data[start : start + 10_000])
            await trio.sleep(10)
        assert len(await link.receive()) == 100_000


@pytest.mark.trio
async def test_a_peer_that_takes_one_long_message_slowly_is_not_taken_for_dead(
    autojump_clock: trio.testing.MockClock,
) -> None:
    ours, theirs = trio.testing.lockstep_stream_pair()
    peer = RawPeer(theirs)

    async def connect(_address: Address) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        return ours

    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.accept)
        async with open_link(ADDRESS, connect_to=connect) as link:
            link.send_nowait(b"x" * 600_000)
            # 64 KiB every 4 s: 40 s for the whole, and not one byte back.
            for _ in range(9):
                for _ in range(64):
                    await theirs.receive_some(1024)
                await trio.sleep(4)
            assert trio.current_time() > 30
            assert link.gone is None
            link.abort("seen enough")


@pytest.mark.trio
async def test_backlog_over_its_bound_breaks_the_link_as_a_slow_consumer(
    autojump_clock: trio.testing.MockClock,
) -> None:
    ours, theirs = trio.testing.lockstep_stream_pair()  # takes nothing that nobody reads
    peer = RawPeer(theirs)

    async def connect(_address: Address) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        return ours

    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.accept)
        async with open_link(ADDRESS, connect_to=connect, limits=LinkLimits(max_backlog_bytes=5000)) as link:
            for _ in range(5):
                link.send_nowait(b"x" * 1000)
            assert link.backlog_bytes == 5000
            with pytest.raises(LinkBroken, match="slow_consumer"):
                link.send_nowait(b"x")
            with pytest.raises(LinkBroken, match="slow_consumer"):
                await link.receive()


@pytest.mark.trio
async def test_a_send_that_makes_no_way_ends_the_link_at_its_deadline(autojump_clock: trio.testing.MockClock) -> None:
    ours, theirs = trio.testing.lockstep_stream_pair()
    peer = RawPeer(theirs)

    async def connect(_address: Address) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        return ours

    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.accept)
        async with open_link(ADDRESS, connect_to=connect, limits=LinkLimits(send_timeout_s=3)) as link:
            link.send_nowait(b"nobody takes this")
            began = trio.current_time()
            with pytest.raises(LinkBroken, match="took no data for 3 s"):
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
async def test_a_full_inbox_holds_the_peer_up_and_loses_nothing(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "MAX_INBOX_BYTES", 10_000)
    async with link_pair() as (client, relay):
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
async def test_a_cancelled_block_sends_what_was_queued_and_no_half_frame(
    autojump_clock: trio.testing.MockClock,
) -> None:
    rng = random.Random(7)
    for _ in range(20):
        got = bytearray()
        ours, theirs = trio.testing.lockstep_stream_pair()
        peer = RawPeer(theirs)

        async def connect(_address: Address, stream: trio.abc.Stream = ours) -> trio.abc.Stream:
            await trio.lowlevel.checkpoint()
            return stream

        async def drain(peer: RawPeer = peer, got: bytearray = got) -> None:
            await peer.accept()
            while True:
                event = await peer.until((BytesMessage, CloseConnection))  # type: ignore[arg-type]
                if isinstance(event, CloseConnection):
                    await peer.send(event.response())
                    return
                assert isinstance(event, BytesMessage)
                got += event.data
                await trio.sleep(0.001)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain)
            with trio.move_on_after(rng.random() * 0.01):
                async with open_link(ADDRESS, connect_to=connect) as link:
                    link.send_nowait(b"a" * 20_000)
                    link.send_nowait(b"b" * 20_000)
                    await trio.sleep_forever()
            if not got:
                nursery.cancel_scope.cancel()  # cancelled before the handshake was through
        assert bytes(got) in (b"", b"a" * 20_000 + b"b" * 20_000)


@pytest.mark.trio
async def test_closing_sends_the_backlog_and_then_the_code(autojump_clock: trio.testing.MockClock) -> None:
    async with link_pair() as (client, relay):
        for number in range(10):
            relay.send_nowait(bytes([number]))
        await relay.aclose(1003, "text message")
        await relay.aclose(1000, "a second time is harmless")
        assert (relay.close_code, relay.reason) == (1003, "text message")
        assert [message async for message in client] == [bytes([number]) for number in range(10)]
        assert client.close_code == 1003
        assert "text message" in client.reason
        with pytest.raises(LinkBroken):
            client.send_nowait(b"x")
        with pytest.raises(LinkClosed):
            relay.send_nowait(b"x")
        with pytest.raises(LinkClosed):
            await relay.receive()


@pytest.mark.trio
async def test_closing_both_ends_at_once_ends_both_quickly(autojump_clock: trio.testing.MockClock) -> None:
    async with link_pair() as (client, relay):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.aclose)
            nursery.start_soon(relay.aclose)
        assert isinstance(client.gone, LinkClosed)
        assert isinstance(relay.gone, LinkClosed)
        assert trio.current_time() < 1


@pytest.mark.trio
async def test_closing_ends_within_its_deadline_when_the_peer_does_not_read(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with link_to_raw_peer() as (link, _peer):
        link.send_nowait(b"x")
        began = trio.current_time()
        await link.aclose()
        assert trio.current_time() - began <= 2 * base.CLOSE_S


@pytest.mark.trio
async def test_a_ping_that_meets_our_close_frame_harms_nobody(autojump_clock: trio.testing.MockClock) -> None:
    async with link_to_raw_peer() as (link, peer):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.aclose)
            await peer.until(CloseConnection)
            # The peer sent these before it saw our close frame.
            peer.ws = WSConnection(ConnectionType.SERVER)
            await peer.stream.send_all(b"\x89\x00" * 3 + b"\x88\x02\x03\xe8")
        assert isinstance(link.gone, LinkClosed)


@pytest.mark.trio
async def test_a_cancelled_receive_loses_nothing(autojump_clock: trio.testing.MockClock) -> None:
    async with link_pair() as (client, relay):
        for number in range(30):
            with trio.move_on_after(0.01 * (number % 3)):
                await relay.receive()
                pytest.fail("nothing was sent")
            client.send_nowait(bytes([number]))
            await trio.testing.wait_all_tasks_blocked()
            with trio.CancelScope() as scope:
                scope.cancel()
                await relay.receive()
            assert scope.cancelled_caught
            assert await relay.receive() == bytes([number])


@pytest.mark.trio
async def test_a_cancelled_wait_for_drained_leaves_the_link_whole(autojump_clock: trio.testing.MockClock) -> None:
    async with link_pair() as (client, relay):
        client.send_nowait(b"x" * 100_000)
        with trio.CancelScope() as scope:
            scope.cancel()
            await client.drained()
        assert scope.cancelled_caught
        assert len(await relay.receive()) == 100_000


@pytest.mark.trio
async def test_a_cancelled_close_still_sends_the_backlog_and_the_close_frame(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with link_pair() as (client, relay):
        client.send_nowait(b"the last words")
        with trio.CancelScope() as scope:
            scope.cancel()
            await client.aclose(1001, "going away")
        assert await relay.receive() == b"the last words"
        with pytest.raises(LinkBroken, match="1001: going away"):
            await relay.receive()


@pytest.mark.trio
async def test_ctrl_c_is_not_delivered_into_the_links_own_tasks(autojump_clock: trio.testing.MockClock) -> None:
    async with link_pair() as (client, _relay):
        protected: list[bool] = []
        client.on_drained(lambda: protected.append(trio.lowlevel.currently_ki_protected()), 0)
        client.send_nowait(b"x")
        await client.drained()
    assert protected == [True]


@pytest.mark.trio
async def test_abort_cuts_the_transport_and_wakes_everyone(autojump_clock: trio.testing.MockClock) -> None:
    async with link_pair() as (client, relay):

        async def wait_for_it(link: Link, kind: type[LinkError]) -> None:
            with pytest.raises(kind):
                await link.receive()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_for_it, client, LinkClosed)
            nursery.start_soon(wait_for_it, relay, LinkBroken)
            await trio.testing.wait_all_tasks_blocked()
            client.abort("enough")
        assert client.reason == "enough"
        assert relay.close_code == 1006
        with pytest.raises(LinkClosed, match="enough"):
            await client.drained()


@pytest.mark.trio
async def test_a_text_message_is_a_protocol_error(autojump_clock: trio.testing.MockClock) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:

        async def talk() -> None:
            # It is declared to take sockets, and takes any stream.
            ws = await wrap_client_stream(nursery, ours, "localhost", "/", subprotocols=[SUBPROTOCOL])  # type: ignore[arg-type]
            await ws.send_message("hello")
            with pytest.raises(Exception, match="1003"):
                await ws.get_message()
            await ws.aclose()

        nursery.start_soon(talk)
        async with accept_link(theirs) as link:
            with pytest.raises(ProtocolError, match="text"):
                await link.receive()
            await link.aclose(1003, "text message")


@pytest.mark.trio
async def test_trio_websocket_is_understood_at_either_end(autojump_clock: trio.testing.MockClock) -> None:
    """An implementation that shares nothing with ours."""
    messages = [b"", b"x" * 125, b"y" * 126, b"z" * 70_000]

    async def connect(_address: Address) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        return ours

    async def serve() -> None:
        async with trio.open_nursery() as ws_nursery:
            request = await wrap_server_stream(ws_nursery, theirs)
            ws = await request.accept(subprotocol=SUBPROTOCOL)
            for _ in messages:
                await ws.send_message(await ws.get_message())
            await ws.aclose(1000, "done")

    async with trio.open_nursery() as nursery:
        ours, theirs = trio.testing.memory_stream_pair()
        nursery.start_soon(serve)
        async with open_link(ADDRESS, connect_to=connect) as link:
            for message in messages:
                link.send_nowait(message)
                assert await link.receive() == message
            with pytest.raises(LinkBroken, match="1000: done"):
                await link.receive()

    async with trio.open_nursery() as nursery:
        ours, theirs = trio.testing.memory_stream_pair()

        async def talk() -> None:
            ws = await wrap_client_stream(nursery, ours, "localhost", "/", subprotocols=[SUBPROTOCOL])  # type: ignore[arg-type]
            for message in messages:
                await ws.send_message(message)
                assert await ws.get_message() == message
            await ws.ping()
            await ws.aclose(1000, "done")

        nursery.start_soon(talk)
        async with accept_link(theirs) as link:
            for message in messages:
                assert await link.receive() == message
                link.send_nowait(message)
            with pytest.raises(LinkBroken, match="1000: done"):
                await link.receive()


@pytest.mark.trio
async def test_an_exception_of_the_block_comes_out_as_it_is(autojump_clock: trio.testing.MockClock) -> None:
    fault = KeyError("the caller's own")
    async with trio.open_nursery() as nursery:
        relay = FakeRelay(nursery, Connection.hold)
        with pytest.raises(KeyError) as caught:
            async with open_link(ADDRESS, connect_to=relay.connect):
                raise fault
        assert caught.value is fault


@pytest.mark.trio
async def test_connect_errors_say_what_is_wrong(tmp_path: object) -> None:
    listener = trio.socket.socket()
    await listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]  # bound and not listening: refused
    cases = [
        (Address(kind="unix", path=f"{tmp_path}/none.sock"), "no relay listens at unix:"),
        (Address(kind="tcp", host="127.0.0.1", port=port), "no relay listens at ws://127.0.0.1:"),
        (Address(kind="unix", path="/" + "long" * 50), "cannot reach unix:"),
    ]
    for address, words in cases:
        with pytest.raises(ConnectError, match=words):
            async with open_link(address):
                pass
    listener.close()


@pytest.mark.trio
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 14\r\n\r\norigin refused", "HTTP 403: origin refused"),
        (b"", "hung up"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "no relay"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "HTTP 200"),
    ],
)
async def test_whatever_else_answers_is_a_connect_error(
    answer: bytes, words: str, autojump_clock: trio.testing.MockClock
) -> None:
    ours, theirs = trio.testing.memory_stream_pair()

    async def connect(_address: Address) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        return ours

    async def other_server() -> None:
        await theirs.receive_some()
        await theirs.send_all(answer)
        await theirs.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other_server)
        with pytest.raises(ConnectError, match=words):
            async with open_link(ADDRESS, connect_to=connect):
                pass
    assert trio.current_time() < 1


@pytest.mark.trio
async def test_a_server_that_never_answers_is_given_up_at_the_deadline(autojump_clock: trio.testing.MockClock) -> None:
    ours, _theirs = trio.testing.memory_stream_pair()

    async def connect(_address: Address) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        return ours

    with pytest.raises(ConnectError, match="within 10 s"):
        async with open_link(ADDRESS, connect_to=connect):
            pass

    async def never(_address: Address) -> trio.abc.Stream:
        await trio.sleep_forever()
        raise AssertionError

    with pytest.raises(ConnectError, match="within 10 s"):
        async with open_link(ADDRESS, connect_to=never):
            pass


@pytest.mark.trio
async def test_a_login_that_is_refused_or_not_answered_says_so(autojump_clock: trio.testing.MockClock) -> None:
    async with link_pair() as (client, relay):
        relay.send(Error(code="unauthenticated", message="this token is not known"))
        with pytest.raises(LoginRefused, match="not known") as refusal:
            await log_in(client, HELLO)
        assert refusal.value.code == "unauthenticated"
    async with link_pair() as (client, relay):
        with pytest.raises(LinkBroken, match="did not answer the login"):
            await log_in(client, HELLO)
    async with link_pair() as (client, relay):
        relay.send_nowait(encode(Welcome(connection_id="c", principal="p"))[:-1])
        with pytest.raises(ProtocolError):
            await log_in(client, HELLO)


@pytest.mark.trio
async def test_keep_linked_comes_back_after_each_loss_and_starts_over_after_one_that_held(
    autojump_clock: trio.testing.MockClock,
) -> None:
    waits: list[float] = []
    logins = 0

    async def serve(link: Link, welcome: Welcome) -> None:
        nonlocal logins
        assert welcome.principal == "tester"
        logins += 1
        async for _data in link:
            pass
        if logins == 9:
            await link.aclose()
            raise_end.append(True)

    raise_end: list[bool] = []

    async def lasting(connection: Connection) -> None:
        await trio.sleep(60)
        await connection.cut()

    async with trio.open_nursery() as nursery:
        relay = FakeRelay(nursery, *[Connection.cut] * 7, lasting, Connection.cut)

        def on_down(fault: LinkError, delay_s: float) -> None:
            assert isinstance(fault, LinkBroken)
            waits.append(delay_s)
            if len(waits) == 10:
                nursery.cancel_scope.cancel()

        backoff = Backoff(draw=lambda: 1.0)
        await run_with_reconnect(ADDRESS, HELLO, serve, on_down=on_down, backoff=backoff, connect_to=relay.connect)
    assert waits == [0.5, 1, 2, 4, 8, 10, 10, 0.5, 1, 2]


@pytest.mark.trio
async def test_keep_linked_returns_when_serve_does_and_lets_a_refusal_through(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def serve(_link: Link, _welcome: Welcome) -> None:
        await trio.lowlevel.checkpoint()

    def on_down(fault: LinkError, delay_s: float) -> None:
        pytest.fail(f"{fault}")

    async with trio.open_nursery() as nursery:
        relay = FakeRelay(nursery, Connection.hold)
        await run_with_reconnect(ADDRESS, HELLO, serve, on_down=on_down, connect_to=relay.connect)
        wrong = Hello(version=1, role="client", token="wrong")
        with pytest.raises(LoginRefused):
            await run_with_reconnect(ADDRESS, wrong, serve, on_down=on_down, connect_to=relay.connect)


@pytest.mark.trio
async def test_keep_linked_closes_with_1002_on_bytes_that_are_no_protocol_and_tries_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    reasons: list[str] = []
    codes: list[int | None] = []

    async def serve(link: Link, _welcome: Welcome) -> None:
        await link.receive()
        raise ProtocolError("cut short")

    async def babble(connection: Connection) -> None:
        connection.link.send_nowait(b"\xc1")
        await connection.hold()
        codes.append(connection.link.close_code)

    async with trio.open_nursery() as nursery:
        relay = FakeRelay(nursery, babble)

        def on_down(fault: LinkError, _delay_s: float) -> None:
            reasons.append(str(fault))
            if len(reasons) == 2:
                nursery.cancel_scope.cancel()

        await run_with_reconnect(ADDRESS, HELLO, serve, on_down=on_down, connect_to=relay.connect)
    assert "cut short" in reasons[0]
    assert codes[0] == 1002


def test_backoff_doubles_to_its_longest_with_full_jitter() -> None:
    rng = random.Random(1)
    backoff = Backoff(draw=rng.random)
    for ceiling in (0.5, 1, 2, 4, 8, 10, 10):
        assert 0 <= backoff.next_s() <= ceiling
    backoff.note_uptime(4.9)
    assert backoff._ceiling_s == 10
    backoff.note_uptime(5)
    assert backoff._ceiling_s == 0.5
