"""The link, over streams in memory: messages, liveness, faults, and other implementations."""

import pytest
import trio
import trio.testing
from trio_websocket import wrap_client_stream, wrap_server_stream
from wsproto.events import BytesMessage, Ping, Pong

from protocol.client.address import Address
from protocol.link.base import Link
from protocol.link.dial import open_link
from protocol.link.limits import LinkLimits
from protocol.wire.errors import LinkBroken, ProtocolError
from protocol.wire.frames import MAX_MESSAGE_BYTES
from protocol.wire.messages import SUBPROTOCOL
from tests.protocol.link.link_pair import link_pair, link_to_raw_peer
from tests.support.scripted_relay import ADDRESS, Connection, FakeRelay, accept_link


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
        with pytest.raises(LinkBroken, match="nothing received"):
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
    async with link_to_raw_peer(lockstep=True) as (link, peer):
        link.send_nowait(b"x" * 600_000)
        # 64 KiB every 4 s: 40 s for the whole, and not one byte back.
        for _ in range(9):
            for _ in range(64):
                await peer.stream.receive_some(1024)
            await trio.sleep(4)
        assert trio.current_time() > 30
        assert link.gone is None
        link.abort("seen enough")


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
