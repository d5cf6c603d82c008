"""WebSockets of the HTTP application: handshakes, messages, and their ends."""

import json
from pathlib import Path

import pytest

from tests.relayd.http.sample_handlers import Logs, faults, make_token
from tests.relayd.http.sample_sockets import closing, denial, raw_socket, socket_to, sockets
from tests.support.relay import until
from tests.support.timed_http_client import ask_on, open_stream


@pytest.mark.trio
async def test_messages_go_both_ways_whole_and_in_order(tmp_path: Path) -> None:
    async with sockets(tmp_path) as (relay, endpoints):
        for url in relay.urls:  # the unix socket, too
            token = make_token(relay) if url.startswith("ws") else None
            async with socket_to(url, "/echo?x=1", token) as socket:
                for message in ("", "text \N{SNOWMAN}", b"", b"\0" * 70_000, "x" * 1024 * 1024, bytes(1024 * 1024)):
                    await socket.send_message(message)
                    assert await socket.get_message() == message
                await socket.aclose(1000)
            await endpoints.left.wait()
            assert endpoints.code == 1000
        await until(lambda: not relay.http_context.exchanges and not relay.http_context.connections)
        assert relay.http_context.responses == {101: 2}


@pytest.mark.trio
async def test_paths_without_a_route_are_told_the_relays_own(tmp_path: Path) -> None:
    async with sockets(tmp_path) as (relay, _):
        for path in ("/nothing", "/plain", "/v1/spaces"):
            status, body = await denial(relay.urls[0], path)
            assert status == 404
            assert b"/v1/relay" in body
        async with open_stream(relay.urls[0]) as stream:
            assert (await ask_on(stream, "GET", "/echo")).status == 404


@pytest.mark.trio
@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("GET /echo HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 8", 426),
        ("GET /echo HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13", 400),
        ("GET /echo HTTP/1.1\r\nHost: x\r\nSec-WebSocket-Version: 13", 426),
        ("POST /echo HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13", 405),
        ("GET /echo HTTP/1.0\r\nHost: x\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13", 505),
        ("GET /echo HTTP/1.1\r\nHost: x\r\nHost: y\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13", 400),
    ],
)
async def test_what_is_no_handshake_is_refused(head: str, status: int, tmp_path: Path, logs: Logs) -> None:
    async with sockets(tmp_path) as (relay, endpoints), open_stream(relay.urls[0]) as stream:
        await stream.send_all(f"{head}\r\nUpgrade: websocket\r\n\r\n".encode())
        answer = b""
        while data := await stream.receive_some():
            answer += data
        assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer
        assert not endpoints.entered.is_set()
        await until(lambda: not relay.gateway.budget.open)
    assert not faults(logs)


@pytest.mark.trio
async def test_a_handshake_is_denied_with_a_status_and_a_reason(tmp_path: Path, logs: Logs) -> None:
    async with sockets(tmp_path) as (relay, _):
        url = relay.urls[0]
        status, body = await denial(url, "/echo")
        assert (status, json.loads(body)["error"]["code"]) == (401, "unauthenticated")
        status, body = await denial(url, "/own-words")
        assert (status, "token" in json.loads(body)["detail"]) == (401, True)
        assert await denial(url, "/silent", make_token(relay)) == (403, b"")
        assert await denial(url, "/broken-before") == (500, b"")
        await until(lambda: not relay.http_context.exchanges)
    assert [line["event"] for line in faults(logs)] == ["internal error in WebSocket handler"]


@pytest.mark.trio
async def test_a_fault_of_an_endpoint_costs_only_its_socket(tmp_path: Path, logs: Logs) -> None:
    async with sockets(tmp_path) as (relay, _):
        token = make_token(relay)
        async with socket_to(relay.urls[0], "/echo", token) as other:
            async with socket_to(relay.urls[0], "/broken", token) as socket:
                assert (await closing(socket))[0] == 1011
            await other.send_message("still there")
            assert await other.get_message() == "still there"
    assert [line["event"] for line in faults(logs)] == ["internal error in WebSocket handler"]


@pytest.mark.trio
async def test_an_endpoint_closes_with_a_code_of_its_own(tmp_path: Path) -> None:
    async with sockets(tmp_path) as (relay, _), socket_to(relay.urls[0], "/closes", make_token(relay)) as socket:
        assert await closing(socket) == (4001, "that was all")


@pytest.mark.trio
@pytest.mark.parametrize(("code", "close_code"), [("rate_limited", 1008), ("worker_lost", 1011)])
async def test_a_refusal_after_the_handshake_is_the_reason_of_the_close(
    code: str, close_code: int, tmp_path: Path, logs: Logs
) -> None:
    async with sockets(tmp_path) as (relay, _), socket_to(relay.urls[0], "/refuses", make_token(relay)) as socket:
        await socket.send_message(code)
        assert await closing(socket) == (close_code, "this is why")
    assert not faults(logs)


@pytest.mark.trio
async def test_an_interrupted_send_leaves_no_half_message(tmp_path: Path) -> None:
    async with (
        sockets(tmp_path) as (relay, endpoints),
        raw_socket(relay.urls[0], "/interrupted", make_token(relay)) as socket,
    ):
        await endpoints.left.wait()  # nothing is read until then
        numbers = []
        while isinstance(message := await socket.next(bytes, str), bytes):
            assert message == message[:1] * 60_000
            numbers.append(message[0])
        assert (message, numbers) == ("the end", sorted(set(numbers)))
        assert numbers


@pytest.mark.trio
async def test_an_endpoint_that_stays_is_cancelled_after_its_client_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relayd.http.websocket.LEAVE_S", 0.01)
    async with sockets(tmp_path) as (relay, endpoints):
        async with socket_to(relay.urls[0], "/stubborn", make_token(relay)):
            await endpoints.entered.wait()
        await endpoints.left.wait()
        assert endpoints.cancelled == 1


@pytest.mark.trio
async def test_a_shutdown_closes_with_going_away(tmp_path: Path, logs: Logs) -> None:
    async with sockets(tmp_path) as (relay, endpoints):
        async with socket_to(relay.urls[0], "/echo", make_token(relay)) as socket:
            await endpoints.entered.wait()
            for _ in range(2):  # a drain does not wait for it
                relay.started.shutdown.drain("test")
            assert (await closing(socket))[0] == 1001
        assert endpoints.cancelled == 1
        assert not faults(logs)
