"""A WebSocket on a connection that was used for HTTP before, as proxies send it that keep their connections."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from protocol.wire.codec import encode
from protocol.wire.messages import PROTOCOL_VERSION, Hello
from relayd.config.schema import Config
from relayd.net import http_head
from relayd.net.http_head import forwarded_for
from relayd.net.proxies import client_of
from tests.relayd.http.sample_handlers import make_token
from tests.support.relay import daemon, kept_logs, until
from tests.support.timed_http_client import ask_on, open_stream

TCP: dict[str, Any] = {"listen": "127.0.0.1:0"}
UPGRADE = (
    b"GET /v1/relay HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Protocol: relay.v1.msgpack\r\nX-Forwarded-For: 203.0.113.9, 192.0.2.7\r\n\r\n"
)


@asynccontextmanager
async def used_connection(url: str) -> AsyncIterator[trio.abc.Stream]:
    """One on which a request was answered."""
    with trio.fail_after(20):
        async with open_stream(url) as stream:
            for _ in range(2):
                answer = await ask_on(stream, "GET", "/health")
                assert (answer.status, (await answer.json())["status"]) == (200, "healthy")
            yield stream


async def switched(stream: trio.abc.Stream) -> None:
    """Wait until the connection is a WebSocket."""
    said = b""
    while b"\r\n\r\n" not in said:
        said += await stream.receive_some() or pytest.fail(f"it hung up, and said {said!r}")
    assert said.startswith(b"HTTP/1.1 101 "), said


@pytest.mark.trio
@pytest.mark.parametrize("size", [1, 100, len(UPGRADE)])
async def test_a_websocket_may_come_behind_other_requests(size: int, tmp_path: Path) -> None:
    async with daemon(tmp_path, **TCP) as relay, used_connection(relay.urls[0]) as stream:
        for begin in range(0, len(UPGRADE), size):
            await stream.send_all(UPGRADE[begin : begin + size])
        await switched(stream)


@pytest.mark.trio
async def test_a_slow_head_behind_other_requests_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_head, "HEAD_S", 0.05)
    async with daemon(tmp_path, **TCP) as relay, used_connection(relay.urls[0]) as stream:
        await stream.send_all(UPGRADE[:40])
        assert await stream.receive_some() == b""


@pytest.mark.trio
@pytest.mark.parametrize("behind_proxy", [True, False])
async def test_who_came_is_what_the_proxy_says_where_there_is_one(behind_proxy: bool, tmp_path: Path) -> None:
    nil = bytes([0x82, 0x81, 0, 0, 0, 0, 0xC0])  # this message is no hello: it is refused, and the log names the peer
    with kept_logs() as logs:
        behind: dict[str, Any] = TCP | {"behind_proxy": behind_proxy}
        async with daemon(tmp_path, **behind) as relay, used_connection(relay.urls[0]) as stream:
            await stream.send_all(UPGRADE)
            await switched(stream)
            await stream.send_all(nil)
            await until(lambda: any(line["event"] == "peer violated the protocol" for line in logs))
    ((peer, why),) = [(line["peer"], line["why"]) for line in logs if line["event"] == "peer violated the protocol"]
    assert "no hello within" not in why
    assert (peer == "192.0.2.7") is behind_proxy
    assert peer.startswith("127.0.0.1:") is not behind_proxy


@pytest.mark.trio
async def test_who_comes_through_a_proxy_can_log_in(tmp_path: Path) -> None:
    async with daemon(tmp_path, **TCP, behind_proxy=True) as relay, used_connection(relay.urls[0]) as stream:
        await stream.send_all(UPGRADE)
        await switched(stream)
        hello = encode(Hello(version=PROTOCOL_VERSION, role="client", token=make_token(relay), agent=""))
        await stream.send_all(bytes([0x82, 0x80 + len(hello)]) + bytes(4) + hello)
        await until(lambda: bool(relay.relay.connections))
        (connection,) = relay.relay.connections.values()
        assert connection.link.peer == "192.0.2.7"
        assert (relay.gateway.budget.known, len(relay.gateway.budget)) == (1, 0)


def test_only_the_last_address_that_a_trusted_proxy_names_counts() -> None:
    def named(*lines: bytes, peer: str = "127.0.0.1:5", trusted: tuple[str, ...] = ()) -> str | None:
        head = b"GET / HTTP/1.1\r\n" + b"".join(line + b"\r\n" for line in lines) + b"\r\nX-Forwarded-For: 9.9.9.9"
        config = Config(state_dir=Path(), behind_proxy=True, trusted_proxies=trusted)
        assert client_of(peer, forwarded_for(head), attrs.evolve(config, behind_proxy=False)) is None
        return client_of(peer, forwarded_for(head), config)

    assert named(b"Host: a") is None
    assert named(b"X-Forwarded-For: 192.0.2.7") == "192.0.2.7"
    assert named(b"x-forwarded-for:1.1.1.1,2001:db8::7 ") == "2001:db8::7"
    assert named(b"X-Forwarded-For: 1.1.1.1", b"Host: a", b"X-Forwarded-For: 2.2.2.2") == "2.2.2.2"
    assert named(b"X-Forwarded-For: 1.1.1.1, <b>") is None
    assert named(b"X-Forwarded-For: ") is None
    line = b"X-Forwarded-For: 1.1.1.1, 8.8.8.8, 10.0.0.7"
    for peer in ("127.0.0.1:5", "10.0.0.1:5", "[::1]:5", "[fd00::1]:5", "[::ffff:192.168.1.1]:5"):
        assert named(line, peer=peer) == "10.0.0.7", peer
    for peer in ("9.9.9.9:5", "[2a00::1]:5", "[::ffff:9.9.9.9]:5", "unix (pid 1)"):
        assert named(line, peer=peer) is None, peer
    proxies = ("9.9.9.9", "10.0.0.0/8", "2a00::/16")
    for peer in ("9.9.9.9:5", "[2a00::1]:5", "10.0.0.1:5"):
        assert named(line, peer=peer, trusted=proxies) == "8.8.8.8", peer
    assert named(line, peer="127.0.0.1:5", trusted=proxies) is None, "what is not listed is not trusted"
    assert named(b"X-Forwarded-For: 1.1.1.1, <b>, 10.0.0.7", peer="10.0.0.1:5", trusted=proxies) == "10.0.0.7"
