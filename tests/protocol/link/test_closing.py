"""The end of a link: close, abort and cancellation."""

import random

import pytest
import trio
import trio.testing
from wsproto import ConnectionType, WSConnection
from wsproto.events import BytesMessage, CloseConnection

from protocol.client.address import Address
from protocol.link import base
from protocol.link.base import Link
from protocol.link.dial import open_link
from protocol.wire.errors import LinkBroken, LinkClosed, LinkError
from tests.protocol.link.link_pair import RawPeer, link_pair, link_to_raw_peer
from tests.support.scripted_relay import ADDRESS


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
