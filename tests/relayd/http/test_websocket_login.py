"""Who may open WebSockets of the HTTP application, and what becomes of them when a token ends."""

import json
import ssl
import time
from pathlib import Path
from typing import Any

import pytest
import trio

from protocol.link.websocket_frames import TEXT
from protocol.wire.frames import Cancelled
from protocol.wire.messages import Cancel
from relayd.auth.login_throttle import MAX_FAILURES
from relayd.store.records import TokenLimits
from tests.relayd.http.sample_handlers import Logs, faults, make_token
from tests.relayd.http.sample_sockets import closing, denial, shake_hands, socket_to, sockets
from tests.support.fake_worker import fake_worker, identity, samples
from tests.support.relay import Daemon, peer, until
from tests.support.timed_http_client import ask_on, open_stream

TLS = Path(__file__).parents[2] / "support" / "tls"


async def code_of_denial(relay: Daemon, path: str, token: str | None = None, **options: Any) -> tuple[int, str]:
    status, body = await denial(relay.urls[0], path, token, **options)
    return status, json.loads(body)["error"]["code"]


@pytest.mark.trio
async def test_a_token_comes_in_the_header_or_where_the_dialect_has_it(tmp_path: Path) -> None:
    async with sockets(tmp_path) as (relay, _):
        url, token = relay.urls[0], make_token(relay)
        async with socket_to(url, f"/query?token={token}") as socket:
            assert await socket.get_message() == "ann"
        async with socket_to(url, "/query", token) as socket:
            assert await socket.get_message() == "ann"
        offered = ["realtime", f"openai-insecure-api-key.{token}", "openai-beta.realtime-v1"]
        async with socket_to(url, "/echo", subprotocols=offered) as socket:
            assert socket.subprotocol == "realtime"
        assert await code_of_denial(relay, f"/echo?token={token}") == (401, "unauthenticated")
        assert await code_of_denial(relay, "/query?token=rly_c_no") == (401, "unauthenticated")
        wrong = ["realtime", "openai-insecure-api-key.rly_c_no"]
        assert await code_of_denial(relay, "/echo", subprotocols=wrong) == (401, "unauthenticated")
        worker = relay.tokens.create(role="worker", name="box", now=0.0).text
        assert await code_of_denial(relay, "/echo", worker) == (403, "forbidden")


@pytest.mark.trio
@pytest.mark.parametrize("path", ["/echo", "/query?token=rly_c_no"])
async def test_too_many_failed_logins_are_throttled_wherever_the_token_is(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relayd.connections.budget.PENALTY_S", 0.0)
    async with sockets(tmp_path) as (relay, _):
        token = "rly_c_no" if path == "/echo" else None
        told = [await code_of_denial(relay, path, token) for _ in range(MAX_FAILURES + 1)]
        assert told[:-1] == [(401, "unauthenticated")] * MAX_FAILURES
        assert told[-1] == (429, "rate_limited")
        async with socket_to(relay.urls[0], "/query", make_token(relay)) as socket:
            assert await socket.get_message() == "ann", "a valid token is always accepted"


@pytest.mark.trio
async def test_sockets_count_as_connections_with_all_others(tmp_path: Path) -> None:
    async with sockets(tmp_path) as (relay, _):
        token = make_token(relay, limits=TokenLimits(max_connections=1))
        async with socket_to(relay.urls[0], "/echo", token):
            assert await code_of_denial(relay, "/echo", token) == (429, "rate_limited")
            assert relay.gateway.budget.known == 1
        await until(lambda: not relay.http_context.exchanges)
        async with peer(relay.urls[0], "client", token):
            assert await code_of_denial(relay, "/echo", token) == (429, "rate_limited")
        await until(lambda: not relay.gateway.budget.open)


@pytest.mark.trio
async def test_requests_a_second_are_those_of_http_and_of_submissions(tmp_path: Path) -> None:
    limits = {"principal": {"requests_per_s": 0.5}}  # so two at once
    async with sockets(tmp_path, limits=limits) as (relay, _):
        async with socket_to(relay.urls[0], "/speech", make_token(relay)) as socket:
            await socket.send_message("one")
            await until(lambda: len(relay.relay.requests) == 1)
            await socket.send_message("two")
            assert await socket.get_message() == "two rate_limited"
        assert await code_of_denial(relay, "/echo", make_token(relay)) == (429, "rate_limited")


@pytest.mark.trio
async def test_a_revoked_or_expired_token_closes_within_two_seconds(tmp_path: Path, logs: Logs) -> None:
    async with sockets(tmp_path) as (relay, endpoints):
        token, short = make_token(relay), make_token(relay, "bob", expires_at=time.time() + 1.5)
        async with socket_to(relay.urls[0], "/echo", short) as expiring:
            async with socket_to(relay.urls[0], "/echo", token) as socket:
                await socket.send_message("hello")
                assert await socket.get_message() == "hello"
                relay.tokens.revoke("ann", 1.0)
                with trio.fail_after(2):
                    assert await closing(socket) == (1008, "the token has been revoked or has expired")
            with trio.fail_after(4):
                assert (await closing(expiring))[0] == 1008
        await until(lambda: endpoints.cancelled == 2)
        assert await code_of_denial(relay, "/echo", token) == (401, "unauthenticated")
    assert not faults(logs)


@pytest.mark.trio
async def test_only_pages_of_allowed_origins_may_open_one(tmp_path: Path, logs: Logs) -> None:
    async with sockets(tmp_path, allowed_origins=("https://good.example",)) as (relay, _):
        token = make_token(relay)
        evil = {"origin": "https://evil.example"}
        assert await code_of_denial(relay, "/echo", token, headers=evil) == (403, "forbidden")
        for origin in ("https://good.example", relay.urls[0].replace("ws", "http")):
            async with socket_to(relay.urls[0], "/query", token, headers={"origin": origin}) as socket:
                assert await socket.get_message() == "ann"
    assert [line["origin"] for line in logs if line["event"] == "origin refused"] == ["https://evil.example"]


@pytest.mark.trio
@pytest.mark.parametrize("behind_proxy", [True, False])
async def test_failed_logins_count_for_the_client_that_a_trusted_proxy_names(
    behind_proxy: bool, tmp_path: Path, logs: Logs
) -> None:
    async with sockets(tmp_path, behind_proxy=behind_proxy) as (relay, _):
        seen = {"x-forwarded-for": "192.0.2.7"}
        await code_of_denial(relay, "/echo", "rly_c_no", headers=seen)
        async with socket_to(relay.urls[0], "/echo", make_token(relay), headers=seen) as socket:
            await socket.aclose()
        await until(lambda: any(line["event"] == "WebSocket closed" for line in logs))
    (refused,) = [line["peer"] for line in logs if line["event"] == "login refused"]
    (closed,) = [line["peer"] for line in logs if line["event"] == "WebSocket closed"]
    assert (refused == "192.0.2.7", closed == "192.0.2.7") == (behind_proxy, behind_proxy)


@pytest.mark.trio
async def test_tls_and_a_connection_that_was_used_for_http_before(tmp_path: Path) -> None:
    tls = {"cert": TLS / "cert.pem", "key": TLS / "key.pem"}
    trusting = ssl.create_default_context(cafile=str(TLS / "cert.pem"))
    async with sockets(tmp_path, tls=tls) as (relay, _):
        token = make_token(relay)
        async with socket_to(relay.urls[0], "/echo", token, context=trusting) as socket:
            await socket.send_message(b"x" * 300_000)
            assert await socket.get_message() == b"x" * 300_000
        async with open_stream(relay.url) as used:
            assert (await ask_on(used, "GET", "/plain")).status == 200
            raw = await shake_hands(used, "/echo", token)
            await raw.send(TEXT, b"hello")
            assert await raw.next(str) == "hello"


# -- requests of the relay -------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_one_socket_holds_several_requests_and_leaves_none(tmp_path: Path) -> None:
    async with sockets(tmp_path) as (relay, _), fake_worker(relay.url, slots=4) as worker:
        async with socket_to(relay.urls[0], "/speech", make_token(relay)) as socket:
            for text in ("one", "two", "three"):
                await socket.send_message(text)
            assigns = {assign.params["text"]: assign for assign in [await worker.assigned() for _ in range(3)]}
            assert len(relay.http_context.streams) == 3
            worker.speak(assigns["two"], [samples(10)])
            assert await socket.get_message() == "two completed"
            await until(lambda: len(relay.http_context.streams) == 2)
        left = {(await worker.peer.next(Cancel)).request_id for _ in range(2)}
        assert left == {assigns["one"].request_id, assigns["three"].request_id}
        assert not relay.http_context.streams
        for text in ("one", "three"):
            worker.send(Cancelled(**identity(assigns[text], 0)))
        await relay.at_rest()


@pytest.mark.trio
async def test_a_drain_lets_a_socket_have_the_end_of_its_requests(tmp_path: Path) -> None:
    async with (
        sockets(tmp_path) as (relay, _),
        fake_worker(relay.url) as worker,
        socket_to(relay.urls[0], "/speech", make_token(relay)) as socket,
    ):
        await socket.send_message("one")
        assign = await worker.assigned()
        relay.started.shutdown.drain("test")
        worker.speak(assign, [samples(10)])
        assert await socket.get_message() == "one completed"
        assert (await closing(socket))[0] == 1001
