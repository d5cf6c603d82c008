"""The HTTP server: one port for HTTP and WebSocket, and the rules of HTTP/1.1."""

import ssl
from pathlib import Path

import pytest
import trio

from tests.relayd.http.sample_handlers import Logs, faults, make_token, staged
from tests.support.raw_http_client import visitor
from tests.support.relay import daemon, peer, until

TLS = Path(__file__).parents[2] / "support" / "tls"


async def all_from(stream: trio.abc.Stream) -> bytes:
    """All that the relay sends until it closes the connection."""
    heard = b""
    with trio.fail_after(5):
        while piece := await stream.receive_some():
            heard += piece
    return heard


async def some_from(stream: trio.abc.Stream) -> bytes:
    """What the relay sends next."""
    with trio.fail_after(5):
        return bytes(await stream.receive_some())


# -- one port --------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_http_and_websocket_share_tcp_tls_and_unix_doors(tmp_path: Path, logs: Logs) -> None:
    tls = {"cert": TLS / "cert.pem", "key": TLS / "key.pem"}
    trusting = ssl.create_default_context(cafile=str(TLS / "cert.pem"))
    async with daemon(tmp_path, listen="127.0.0.1:0", tls=tls) as relay:
        token = make_token(relay)
        for url, context in ((relay.urls[0], trusting), (relay.url, None)):
            async with (
                visitor(url, token=token, context=context) as http,
                peer(url, "client", token, ssl_context=context) as client,
            ):
                assert (await http.get("/v1/spaces")).status == 200
                await client.settled()
                assert (await http.get("/v1/spaces")).status == 200
    assert not faults(logs)


@pytest.mark.trio
async def test_a_connection_is_used_again_and_ends_when_it_idles_too_long(tmp_path: Path) -> None:
    async with staged(tmp_path, http={"keep_alive_s": 0.2}) as (relay, _), visitor(relay.url) as http:
        for _ in range(3):
            assert (await http.get("/fine")).body == b"fine"
            assert (await http.ask("POST", "/echo", body=b"x" * 100_000)).body == b"x" * 100_000
        assert relay.http_context.connections == 1
        assert await http.hears_the_end()
        await until(lambda: relay.http_context.connections == 0)


@pytest.mark.trio
async def test_the_rest_of_a_refused_body_is_discarded_and_the_connection_used_again(tmp_path: Path) -> None:
    async with staged(tmp_path) as (relay, _), visitor(relay.url) as http:
        for _ in range(3):
            json = {"content-type": "application/json"}
            too_large = await http.ask("POST", "/v1/spaces/tts/requests", body=b" " * 600_000, headers=json)
            assert too_large.status == 413
        await http.stream.send_all(b"POST /nothing/here HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n")
        assert (await some_from(http.stream)).startswith(b"HTTP/1.1 404")
        await http.stream.send_all(b"late")
        assert (await http.get("/fine")).body == b"fine"
        assert relay.http_context.connections == 1


@pytest.mark.trio
@pytest.mark.parametrize("size", [100, 2_000_000])
async def test_a_refused_body_that_does_not_come_ends_the_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr("relayd.http.connection.DISCARD_S", 0.1)
    async with staged(tmp_path) as (relay, _), visitor(relay.url) as http:
        lacks = f"POST /nothing/here HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\nx"
        await http.stream.send_all(lacks.encode())
        assert (await some_from(http.stream)).startswith(b"HTTP/1.1 404")
        assert await http.hears_the_end()
        await until(lambda: relay.http_context.connections == 0)


@pytest.mark.trio
async def test_requests_sent_ahead_are_answered_in_order(tmp_path: Path) -> None:
    async with staged(tmp_path) as (relay, _), visitor(relay.url) as http:
        ask = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n"
        await http.stream.send_all(
            ask + b"one" + ask + b"two" + b"GET /fine HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        )
        heard = b""
        with trio.fail_after(5):
            while piece := await http.stream.receive_some():
                heard += piece
        assert [part.partition(b"\r\n\r\n")[2][:4] for part in heard.split(b"HTTP/1.1 200")[1:]] == [
            b"one",
            b"two",
            b"fine",
        ]


@pytest.mark.trio
async def test_a_head_that_trickles_on_a_used_connection_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with staged(tmp_path) as (relay, _), visitor(relay.url) as http:
        assert (await http.get("/fine")).status == 200
        monkeypatch.setattr("relayd.net.http_head.HEAD_S", 0.1)
        await http.stream.send_all(b"GET /fine HTTP/1.1\r\nHost: x\r\n")
        assert await http.hears_the_end()


@pytest.mark.trio
async def test_a_head_too_long_is_refused_the_first_time_and_later(tmp_path: Path) -> None:
    long = b"GET /fine HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 20_000 + b"\r\n\r\n"
    async with staged(tmp_path) as (relay, _):
        for before in (False, True):
            async with visitor(relay.url) as http:
                if before:
                    await http.get("/fine")
                await http.stream.send_all(long)
                with trio.fail_after(5):
                    assert bytes(await http.stream.receive_some()).startswith(b"HTTP/1.1 431")
                assert await http.hears_the_end()


@pytest.mark.trio
@pytest.mark.parametrize(
    "head",
    [
        b"GET /fine HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAA\r\n\r\n",
        b"GET /fine HTTP/1.1\nHost: x\n\n",
        b"GET /fine HTTP/1.0\r\n\r\n",
    ],
)
async def test_other_ways_to_ask_are_answered_in_plain_http(tmp_path: Path, head: bytes) -> None:
    async with staged(tmp_path) as (relay, _), visitor(relay.url) as http:
        await http.stream.send_all(head)
        with trio.fail_after(5):
            assert bytes(await http.stream.receive_some()).startswith(b"HTTP/1.1 200")


@pytest.mark.trio
async def test_http2_without_asking_is_refused(tmp_path: Path, logs: Logs) -> None:
    async with staged(tmp_path) as (relay, _), visitor(relay.url) as http:
        await http.stream.send_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))
        assert await http.hears_the_end()
        await relay.goes_on()
    assert not faults(logs)


@pytest.mark.trio
async def test_a_body_that_nobody_reads_ends_the_connection_and_not_the_answer(tmp_path: Path) -> None:
    async with staged(tmp_path) as (relay, _), visitor(relay.url) as http:
        await http.stream.send_all(
            b"POST /ignore HTTP/1.1\r\nHost: x\r\nContent-Length: 4000000\r\n\r\n" + bytes(4_000_000)
        )
        heard = b""
        with trio.fail_after(5):
            while piece := await http.stream.receive_some():
                heard += piece
        assert heard.endswith(b"fine")
        await until(lambda: relay.http_context.connections == 0)


# -- HTTP/1.1 --------------------------------------------------------------------------------------------------------


@pytest.mark.trio
@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /echo HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc", 400),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: +3\r\n\r\nabc", 400),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length : 3\r\n\r\nabc", 400),
        (b"GET /fine HTTP/1.1\r\nHost: x\r\nX-Nul: a\0b\r\n\r\n", 400),
        (b"GET /fine HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (b"GET /fine HTTP/1.1\r\n\r\n", 400),
        (b"GET /f\xffne HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /fine HTTP/2.0\r\nHost: x\r\n\r\n", 505),
    ],
)
@pytest.mark.parametrize("before", [False, True])
async def test_a_head_that_can_be_read_in_two_ways_is_refused_and_nothing_behind_it_is_read(
    tmp_path: Path, logs: Logs, head: bytes, status: int, before: bool
) -> None:
    async with staged(tmp_path) as (relay, _), visitor(relay.url) as http:
        if before:
            await http.get("/fine")
        await http.stream.send_all(head + b"GET /fine HTTP/1.1\r\nHost: x\r\n\r\n")
        heard = await all_from(http.stream)
        assert heard.startswith(b"HTTP/1.1 %d " % status)
        assert b"fine" not in heard
    assert not faults(logs)


@pytest.mark.trio
async def test_a_method_is_taken_as_it_is_written(tmp_path: Path) -> None:
    async with staged(tmp_path) as (relay, _), visitor(relay.url) as http:
        assert [(await http.get("/fine")).status, (await http.ask("head", "/fine")).status] == [200, 405]


@pytest.mark.trio
async def test_a_target_may_be_a_whole_uri_whose_host_then_counts(tmp_path: Path, logs: Logs) -> None:
    async with daemon(tmp_path) as relay, visitor(relay.url) as http:
        for target in ("http://relay:1/v1/spaces", "HTTPS://me@relay:1/v1/spaces?a=b", "wss://relay:1/v1/spaces"):
            assert (await http.get(target)).status == 200, target
        assert (await http.get("http://relay")).status == (await http.get("/")).status
        assert (await http.get("http://relay?x")).status == (await http.get("/?x")).status
        assert (await http.get("http:///v1/spaces")).status == 404
        own = await http.get("http://relay:1/v1/spaces", headers={"origin": "http://relay:1"})
        assert own.status == 200
        other = await http.get("http://relay:1/v1/spaces", headers={"origin": "http://localhost", "host": "localhost"})
        assert other.status == 403, "the Host header does not count"
    paths = {line["path"] for line in logs if line["event"] == "response sent"}
    assert paths == {"/v1/spaces", "/", "http:///v1/spaces"}


@pytest.mark.trio
async def test_a_body_may_come_in_chunks(tmp_path: Path) -> None:
    async with staged(tmp_path) as (relay, _), visitor(relay.url) as http:
        head = b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        await http.stream.send_all(head + b"3;a=b\r\none\r\n")
        await http.stream.send_all(b"3\r\ntwo\r\n0\r\nX-Trailer: y\r\n\r\n")
        assert (await some_from(http.stream)).endswith(b"\r\n\r\nonetwo")
        assert (await http.get("/fine")).body == b"fine"


@pytest.mark.trio
async def test_the_head_of_a_body_is_answered_without_it(tmp_path: Path) -> None:
    async with staged(tmp_path) as (relay, stage), visitor(relay.url) as http:
        stage.go_on.set()
        for path in ("/fine", "/slow"):
            whole, head = await http.get(path), await http.ask("HEAD", path)
            assert head.body == b""
            for name in ("content-length", "transfer-encoding", "content-type"):
                assert head.headers.get(name) == whole.headers.get(name)
            assert "date" in head.headers


@pytest.mark.trio
async def test_an_old_client_gets_a_body_that_ends_with_the_connection(tmp_path: Path) -> None:
    async with staged(tmp_path) as (relay, stage), visitor(relay.url) as http:
        stage.go_on.set()
        await http.stream.send_all(b"GET /slow HTTP/1.0\r\n\r\n")
        head, _, body = (await all_from(http.stream)).partition(b"\r\n\r\n")
        assert body == b"begun ended"
        assert b"chunked" not in head


@pytest.mark.trio
async def test_an_old_client_never_takes_half_a_body_for_whole(tmp_path: Path) -> None:
    async with staged(tmp_path, listen="127.0.0.1:0") as (relay, _), visitor(relay.urls[0]) as http:
        await http.stream.send_all(b"GET /half HTTP/1.0\r\n\r\n")
        with pytest.raises(trio.BrokenResourceError):
            await all_from(http.stream)


@pytest.mark.trio
async def test_a_client_that_waits_to_send_its_body_is_asked_for_it_once_somebody_reads_it(tmp_path: Path) -> None:
    async with staged(tmp_path) as (relay, stage), visitor(relay.url) as http:
        head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n"
        for path in (b"/takes", b"/echo"):
            await http.stream.send_all(head % path)
            stage.go_on.set()
            assert (await some_from(http.stream)).startswith(b"HTTP/1.1 100 ")
            await http.stream.send_all(b"abc")
            assert (await some_from(http.stream)).endswith(b"abc")
        await http.stream.send_all(head % b"/ignore")
        heard = await all_from(http.stream)
        assert heard.startswith(b"HTTP/1.1 200 "), "nobody wants the body"
        assert heard.endswith(b"fine")


@pytest.mark.trio
async def test_a_body_that_breaks_off_into_nonsense_ends_its_handler_and_is_refused(tmp_path: Path, logs: Logs) -> None:
    async with staged(tmp_path) as (relay, stage), visitor(relay.url) as http:
        stage.go_on.set()
        await http.stream.send_all(b"POST /takes HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none")
        with trio.fail_after(5):
            await stage.entered.wait()
        await http.stream.send_all(b"nonsense")
        assert (await all_from(http.stream)).startswith(b"HTTP/1.1 400 ")
        assert stage.cancelled == 1
        await until(lambda: not relay.http_context.exchanges)
    assert not faults(logs)


@pytest.mark.trio
async def test_nonsense_behind_a_request_waits_for_its_answer(tmp_path: Path) -> None:
    async with staged(tmp_path) as (relay, stage), visitor(relay.url) as http:
        await http.stream.send_all(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n\0\r\n\r\n")
        with trio.fail_after(5):
            await stage.entered.wait()
        stage.go_on.set()
        answered, _, refused = (await all_from(http.stream)).partition(b"0\r\n\r\n")
        assert b"ended" in answered
        assert refused.startswith(b"HTTP/1.1 400 ")


@pytest.mark.trio
async def test_a_client_that_offers_http2_is_still_heard_to_leave(tmp_path: Path) -> None:
    async with staged(tmp_path) as (relay, stage):
        async with visitor(relay.url) as http:
            await http.begin("GET", "/waits", headers={"connection": "Upgrade", "upgrade": "h2c"})
            with trio.fail_after(5):
                await stage.entered.wait()
        with trio.fail_after(1):
            await stage.left.wait()
