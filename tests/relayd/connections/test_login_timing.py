"""How connections come in: before, with and behind their hello, over real sockets."""

import errno
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from protocol.client.address import parse_address
from protocol.link.dial import open_link
from protocol.link.websocket_frames import BINARY, Close, Parser, make_frame
from protocol.wire.codec import decode, encode
from protocol.wire.messages import (
    FROM_RELAY,
    PATH,
    SUBPROTOCOL,
    Error,
    Hello,
    Ping,
    Pong,
    Welcome,
)
from protocol.wire.validators import Message
from relayd.connections import gateway
from relayd.connections.gateway import Gateway
from tests.support.relay import Daemon, daemon, kept_logs, peer, until


@pytest.mark.trio
async def test_each_that_says_no_hello_is_told_in_its_own_time(tmp_path: Path) -> None:
    async with daemon(tmp_path, limits={"hello_timeout_s": 0.6}) as relay, trio.open_nursery() as nursery:
        told_after_s: list[float] = []

        async def stay_silent() -> None:
            async with open_link(parse_address(relay.url)) as link:
                began = trio.current_time()
                error = decode(await link.receive(), FROM_RELAY)
                assert isinstance(error, Error)
                assert error.message.startswith("no hello within 0.6 s")
                told_after_s.append(trio.current_time() - began)

        for _ in range(3):
            nursery.start_soon(stay_silent)
            async with peer(relay.url, "client") as between:  # who does say it is not waited for
                between.send(Ping(timestamp=1.0))
                await between.next(Pong)
        await until(lambda: len(told_after_s) == 3)
        assert min(told_after_s) > 0.5
        await relay.goes_on()


@pytest.mark.trio
@pytest.mark.parametrize("role", ["client", "worker", "operator"])
async def test_what_follows_the_hello_at_once_is_heard(tmp_path: Path, role: str) -> None:
    async with daemon(tmp_path) as relay, open_link(parse_address(relay.url)) as link:
        link.send(Hello(version=1, role=role))
        for number in range(5):
            link.send(Ping(timestamp=float(number)))
        assert isinstance(decode(await link.receive(), FROM_RELAY), Welcome)
        for number in range(5):
            pong = decode(await link.receive(), FROM_RELAY)
            assert isinstance(pong, Pong)
            assert pong.timestamp == float(number)


#: As a client sends it that does not wait for the answer before it speaks.
HANDSHAKE = (
    f"GET {PATH} HTTP/1.1\r\nHost: relay\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    f"Sec-WebSocket-Protocol: {SUBPROTOCOL}\r\n\r\n"
).encode()


def spoken(*messages: Message) -> bytes:
    """Frames of a client's."""
    return b"".join(make_frame(BINARY, encode(message), masked=True) for message in messages)


async def heard(stream: trio.SocketStream, count: int) -> list[Message | Close]:
    """So many messages behind the answer to the handshake; fewer where the relay hangs up."""
    octets, told = b"", list[Message | Close]()
    while len(told) < count:
        data = await stream.receive_some(2**20)
        octets += data
        parser = Parser(masked=False, max_message_bytes=2**24)
        parser.feed(octets.partition(b"\r\n\r\n")[2])
        told = [
            decode(each, FROM_RELAY) if isinstance(each, bytes) else each
            for each in parser.pop_events()
            if isinstance(each, bytes | Close)
        ]
        if not data:
            break
    return told


async def all_left(relay: Daemon, opened: Gateway) -> None:
    """Nothing is kept of any connection but the test's own."""
    await until(lambda: not relay.relay.connections and not relay.relay.clients and not opened.budget.open)


@pytest.mark.trio
@pytest.mark.parametrize("role", ["client", "worker", "operator"])
async def test_who_does_not_wait_for_the_handshake_is_heard_as_any_other(tmp_path: Path, role: str) -> None:
    hello = Hello(version=1, role=role)
    async with daemon(tmp_path) as relay:
        with trio.fail_after(20):
            pings = [Ping(timestamp=float(number)) for number in range(200)]  # more than a turn has
            async with await trio.open_unix_socket(relay.url.removeprefix("unix:")) as stream:
                await stream.send_all(HANDSHAKE + spoken(hello, *pings))
                welcome, *pongs = await heard(stream, 201)
                assert isinstance(welcome, Welcome)
                assert [pong.timestamp for pong in pongs if isinstance(pong, Pong)] == [p.timestamp for p in pings]
            await all_left(relay, relay.gateway)
            async with await trio.open_unix_socket(relay.url.removeprefix("unix:")) as stream:
                await stream.send_all(HANDSHAKE + spoken(*[hello] * 100))
                told = [type(each) for each in await heard(stream, 100)]
                assert told == [Welcome] + [Error] * 99, "one login a connection"
                assert len(relay.relay.connections) == 1
            await all_left(relay, relay.gateway)
        await relay.goes_on()


@pytest.mark.trio
async def test_a_hello_that_comes_byte_by_byte_is_not_waited_for(tmp_path: Path) -> None:
    async def drip(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):  # it was hung up on
            for byte in bytes([0x82, 0x80 | 100, 0, 0, 0, 0]) + bytes(50):  # a message of 100 bytes, RFC 6455, 5.2
                await stream.send_all(bytes([byte]))
                await trio.sleep(0.01)

    async with daemon(tmp_path, limits={"hello_timeout_s": 0.3}) as relay:
        with trio.fail_after(20):
            async with (
                await trio.open_unix_socket(relay.url.removeprefix("unix:")) as stream,
                trio.open_nursery() as nursery,
            ):
                await stream.send_all(HANDSHAKE)
                nursery.start_soon(drip, stream)
                error, close = await heard(stream, 2)
                assert isinstance(error, Error)
                assert error.code == "idle_timeout"
                assert isinstance(close, Close)
        await relay.goes_on()


@pytest.mark.trio
async def test_one_connection_tries_one_token(tmp_path: Path) -> None:
    guesses = [Hello(version=1, role="client", token=f"rly_c_{number:032}") for number in range(100)]
    async with daemon(tmp_path, listen="127.0.0.1:0") as relay:
        address = parse_address(relay.urls[0])
        with kept_logs() as logs:
            stream = await trio.open_tcp_stream(address.host, address.port)
            await stream.send_all(HANDSHAKE + spoken(*guesses))
            told = await heard(stream, 2)
            await stream.aclose()
        assert [type(each) for each in told] == [Error, Close]
        assert sum(entry["event"] == "login refused" for entry in logs) == 1
        await all_left(relay, relay.gateway)


@pytest.mark.trio
@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("role", ["client", "worker", "operator"])
async def test_a_login_over_which_the_relay_falls_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, early: bool, role: str
) -> None:
    def fall(*_args: Any) -> None:
        raise RuntimeError("a mistake")

    async with daemon(tmp_path) as relay:
        with trio.fail_after(20), pytest.MonkeyPatch.context() as patch, kept_logs() as logs:
            patch.setattr(gateway, f"{role.capitalize()}Handler", fall)
            stream = await trio.open_unix_socket(relay.url.removeprefix("unix:"))
            await stream.send_all(HANDSHAKE + (spoken(Hello(version=1, role=role)) if early else b""))
            if not early:
                await stream.receive_some()
                await stream.send_all(spoken(Hello(version=1, role=role)))
            while await stream.receive_some():  # the relay hangs up
                pass
            await stream.aclose()
            await until(lambda: not relay.gateway.budget.open and not relay.gateway.reactor.links)
        assert any(entry["event"] == "internal error in connection" for entry in logs)
        await relay.goes_on()


@pytest.mark.trio
@pytest.mark.parametrize("end", ["stalls", "breaks a rule"])
@pytest.mark.parametrize("role", ["client", "worker", "operator"])
async def test_who_is_closed_with_much_on_its_way_still_hears_why(tmp_path: Path, role: str, end: str) -> None:
    """Whatever the role: what is on its way gets through, then the reason, then the close frame."""
    pings = spoken(*[Ping(timestamp=1.0)] * 2_000)
    async with daemon(tmp_path) as relay:
        stream = await trio.open_unix_socket(relay.url.removeprefix("unix:"))
        await stream.send_all(HANDSHAKE + spoken(Hello(version=1, role=role)))
        await until(lambda: bool(relay.relay.connections))
        (connection,) = relay.relay.connections.values()
        sent = 0
        while not connection.link.stalled and (end == "stalls" or connection.link.backlog_bytes < 100_000):
            with trio.move_on_after(1):
                await stream.send_all(pings)
                sent += 2_000
        if end == "breaks a rule":
            await stream.send_all(make_frame(BINARY, b"\xc1", masked=True))
        with trio.fail_after(10):
            *before, why, close = await heard(stream, 10**9)
        assert isinstance(why, Error)
        assert isinstance(close, Close)
        assert (why.code, close.code) == (("slow_consumer", 1008) if end == "stalls" else ("protocol_error", 1002))
        if end == "breaks a rule":
            assert len(before) == 1 + sent, "a welcome and every answer"
        await stream.aclose()
        await relay.goes_on()


@pytest.mark.trio
async def test_a_system_out_of_descriptors_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, refused = socket.socket.accept, 0

    def accept(listening: socket.socket) -> Any:
        nonlocal refused
        if refused < 2:
            refused += 1
            raise OSError(errno.EMFILE, "Too many open files")
        return real(listening)

    monkeypatch.setattr(socket.socket, "accept", accept)
    async with daemon(tmp_path) as relay:
        await relay.goes_on()
    assert refused == 2
