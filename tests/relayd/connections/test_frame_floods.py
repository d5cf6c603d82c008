"""Frames that are no messages (pings, pongs, fragments) use up the share of whoever sends them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from protocol.client.address import parse_address
from protocol.link.connect import connect
from protocol.link.stream_link import StreamLink
from protocol.link.websocket_frames import BINARY, CONTINUATION, PING, PONG, make_frame
from protocol.wire.codec import encode
from protocol.wire.messages import Hello, Ping, Pong, Spaces, SpacesReply
from tests.fuzz.fuzzed_relay import UPGRADE
from tests.support.relay import Daemon, daemon, new_token, peer, until

FIN = 0x80


def unfinished(opcode: int, payload: bytes = b"") -> bytes:
    """A frame behind which more of its message comes."""
    frame = make_frame(opcode, payload, masked=True)
    return bytes([frame[0] & ~FIN]) + frame[1:]


#: 20,000 frames, which take some 20 ms to parse; the fragments are those of one message.
FLOODS = {
    "pings and pongs": (make_frame(PING, b"", masked=True) + make_frame(PONG, b"", masked=True)) * 10_000,
    "fragments": unfinished(BINARY, encode(Ping(timestamp=1.0))) + unfinished(CONTINUATION) * 20_000,
}
END = {"pings and pongs": make_frame(BINARY, encode(Ping(timestamp=1.0)), masked=True)} | {
    "fragments": make_frame(CONTINUATION, b"", masked=True)
}


@pytest.mark.trio
@pytest.mark.parametrize("logged_in", [True, False])
@pytest.mark.parametrize("kind", FLOODS)
async def test_a_flood_is_not_read_beyond_its_share_and_nobody_else_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, logged_in: bool
) -> None:
    # Shares so small that a flood is not read for seconds.
    monkeypatch.setattr("relayd.core.principals.CPU_SHARE", 0.01)
    monkeypatch.setattr("relayd.core.principals.STRANGERS_SHARE", 0.01)
    async with daemon(tmp_path, listen="127.0.0.1:0") as relay, trio.open_nursery() as nursery:
        token = await new_token(relay, name="ann") if logged_in else None
        async with (
            peer(relay.urls[0], "client", await new_token(relay, name="ben")) as other,
            upgraded(relay) as stream,
        ):
            link = relay.gateway.reactor.links[-1]
            if token is not None:
                hello = Hello(version=1, role="client", token=token)
                await stream.send_all(make_frame(BINARY, encode(hello), masked=True))
                await until(lambda: link in [each.link for each in relay.relay.connections.values()])
            nursery.start_soon(stream.send_all, FLOODS[kind])
            await until(lambda: link.reading_paused)
            other.send(Spaces())
            await other.next(SpacesReply)
            assert link.reading_paused
            nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_a_flood_of_strangers_does_not_keep_out_who_comes_by_the_unix_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relayd.core.principals.STRANGERS_SHARE", 1e-6)
    async with daemon(tmp_path) as relay:
        relay.relay.principals.strangers().charge(1.0, trio.current_time())
        async with upgraded(relay) as stream:
            (link,) = relay.gateway.reactor.links
            hello = make_frame(BINARY, encode(Hello(version=1, role="operator")), masked=True)
            before = link.received_at
            await stream.send_all(hello[:20])
            await until(lambda: link.received_at > before)
            await stream.send_all(hello[20:])
            assert b"welcome" in await stream.receive_some()


@asynccontextmanager
async def upgraded(relay: Daemon) -> AsyncIterator[trio.abc.Stream]:
    """A connection behind its handshake."""
    async with await connect(parse_address(relay.urls[0])) as stream:
        await stream.send_all(UPGRADE)
        assert b" 101 " in await stream.receive_some()
        yield stream


@pytest.mark.trio
@pytest.mark.parametrize("kind", FLOODS)
async def test_who_has_sent_a_flood_is_served_in_its_turn(tmp_path: Path, kind: str) -> None:
    async with (
        daemon(tmp_path, listen="127.0.0.1:0") as relay,
        peer(relay.urls[0], "client", await new_token(relay)) as client,
    ):
        assert isinstance(client.link, StreamLink)
        await client.link.stream.send_all(FLOODS[kind] + END[kind])
        assert (await client.next(Pong)).timestamp == 1.0
