"""What WebSockets of the HTTP application may send, how long they may be silent, and what they cost."""

from pathlib import Path

import pytest
import trio

from protocol.link.websocket_frames import BINARY, CONTINUATION, PING, TEXT, Close, Ping, Pong
from protocol.wire.messages import MAX_CONTROL_BYTES
from relayd.http.websocket import MAX_MESSAGE_BYTES, MAX_UNREAD_BYTES, MESSAGE_COST_S
from tests.relayd.http.sample_handlers import Logs, faults, make_token
from tests.relayd.http.sample_sockets import closing, raw_socket, socket_to, sockets
from tests.support.relay import until

MIB = 1024 * 1024


@pytest.mark.trio
async def test_fragments_are_joined_whatever_comes_between_them(tmp_path: Path) -> None:
    async with sockets(tmp_path) as (relay, _), raw_socket(relay.urls[0], "/echo", make_token(relay)) as socket:
        snowman = "\N{SNOWMAN}".encode()
        await socket.send(TEXT, b"a" + snowman[:1], last=False)
        await socket.send(PING, b"are you there")
        assert await socket.next(Pong, str) == Pong(b"are you there")
        await socket.send(CONTINUATION, snowman[1:], last=False)
        await socket.send(CONTINUATION, b"")
        assert await socket.next(str) == "a\N{SNOWMAN}"
        for number in range(16):
            await socket.send(CONTINUATION if number else BINARY, bytes(MIB // 16), last=number == 15)
        assert await socket.next(bytes) == bytes(MIB)


@pytest.mark.trio
@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([(BINARY, bytes(MAX_MESSAGE_BYTES + 1), True)], 1009),
        ([(TEXT, b"x" * MAX_MESSAGE_BYTES, False), (CONTINUATION, b"x", True)], 1009),
        ([(TEXT, b"\xff", True)], 1007),
        ([(TEXT, "\N{SNOWMAN}".encode()[:2], False), (CONTINUATION, b"x", True)], 1007),
        ([(CONTINUATION, b"x", True)], 1002),
        ([(TEXT, b"x", False), (TEXT, b"x", True)], 1002),
        ([(3, b"x", True)], 1002),
    ],
)
async def test_what_breaks_a_rule_closes_and_the_endpoint_hears_of_it(
    frames: list[tuple[int, bytes, bool]], code: int, tmp_path: Path, logs: Logs
) -> None:
    async with sockets(tmp_path) as (relay, endpoints):
        token = make_token(relay)
        async with socket_to(relay.urls[0], "/echo", token) as other:
            async with raw_socket(relay.urls[0], "/echo", token) as socket:
                for opcode, payload, last in frames:
                    await socket.send(opcode, payload, last=last)
                assert (await socket.next(Close)).code == code
            await endpoints.left.wait()
            assert (endpoints.code, endpoints.read) == (code, 0)
            await other.send_message("still there")
            assert await other.get_message() == "still there"
    assert not faults(logs)


@pytest.mark.trio
async def test_what_is_not_read_holds_its_peer_up_and_is_not_lost(tmp_path: Path) -> None:
    async with (
        sockets(tmp_path) as (relay, endpoints),
        socket_to(relay.urls[0], "/hears-nothing", make_token(relay)) as socket,
        trio.open_nursery() as nursery,
    ):
        sent = 0

        async def send() -> None:
            nonlocal sent
            for _ in range(64):
                await socket.send_message(bytes(MIB // 2))
                sent += 1

        nursery.start_soon(send)
        await endpoints.entered.wait()
        before = -1
        while before != sent:  # until nothing more gets through
            before = sent
            await trio.sleep(0.3)
        assert sent * MIB // 2 < MAX_UNREAD_BYTES + 24 * MIB, "what is not in the kernel's buffers is bounded"
        assert endpoints.read == 0
        endpoints.go_on.set()
        await until(lambda: endpoints.read == 64)


@pytest.mark.trio
async def test_who_reads_nothing_is_cut_and_costs_nobody_else(tmp_path: Path) -> None:
    async with sockets(tmp_path, limits={"stall_timeout_s": 0.3}) as (relay, endpoints):
        token = make_token(relay)
        async with raw_socket(relay.urls[0], "/endless", token), socket_to(relay.urls[0], "/echo", token) as other:
            await endpoints.left.wait()
            assert endpoints.code == 1006
            await other.send_message("still there")
            assert await other.get_message() == "still there"
        await until(lambda: relay.relay.slow_consumers == 1)


@pytest.mark.trio
async def test_a_silent_peer_is_pinged_and_then_given_up(tmp_path: Path) -> None:
    limits = {"ping_interval_s": 0.05, "dead_after_s": 0.4}
    async with (
        sockets(tmp_path, limits=limits) as (relay, endpoints),
        socket_to(relay.urls[0], "/echo", make_token(relay)) as alive,
    ):
        async with raw_socket(relay.urls[0], "/echo", make_token(relay, "bob")) as silent:
            await silent.next(Ping)
            await endpoints.left.wait()
        assert endpoints.code == 1006
        await alive.send_message("I answer pings")
        assert await alive.get_message() == "I answer pings"


@pytest.mark.trio
async def test_who_does_not_log_in_is_closed(tmp_path: Path) -> None:
    async with sockets(tmp_path, limits={"hello_timeout_s": 0.05}) as (relay, endpoints):
        async with socket_to(relay.urls[0], "/open") as socket:
            assert await closing(socket) == (1008, "no login within 0.05 s")
        await endpoints.left.wait()
        assert endpoints.cancelled == 1
        async with socket_to(relay.urls[0], "/echo", make_token(relay)) as known:
            await trio.sleep(0.1)
            await known.send_message("still there")
            assert await known.get_message() == "still there"


@pytest.mark.trio
async def test_before_the_login_messages_are_short(tmp_path: Path) -> None:
    async with (
        sockets(tmp_path, limits={"hello_timeout_s": 30}) as (relay, endpoints),
        socket_to(relay.urls[0], "/open") as socket,
    ):
        await endpoints.entered.wait()
        await socket.send_message(bytes(MAX_CONTROL_BYTES + 1))
        assert (await closing(socket))[0] == 1009


@pytest.mark.trio
async def test_a_flood_of_messages_is_charged_to_its_principal(tmp_path: Path) -> None:
    async with sockets(tmp_path) as (relay, endpoints):
        token, usage = make_token(relay), relay.relay.principals.usage_of("ann")
        async with socket_to(relay.urls[0], "/counts", token) as socket:
            for _ in range(500):
                await socket.send_message(b"x")
            await until(lambda: endpoints.counted == 500)
            assert usage.charged_s >= 500 * MESSAGE_COST_S
            await until(lambda: not usage.deferred)
            usage.cpu.level, usage.cpu.rate = -1.0, 1e-9  # its share is used up for years
            for _ in range(3):
                await socket.send_message(b"x")
            async with socket_to(relay.urls[0], "/echo", make_token(relay, "bob")) as other:
                for _ in range(10):
                    await other.send_message("not held up")
                    assert await other.get_message() == "not held up"
            assert endpoints.counted <= 501, "but for the one that was waited for"
