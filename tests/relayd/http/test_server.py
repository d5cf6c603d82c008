"""The HTTP door: one port for all, connections that stay and are cut, handlers that fall, drains, and who may come."""

import gc
import json
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, MutableMapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import h11
import pytest
import trio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from protocol.wire.errors import LoginRefused
from protocol.wire.frames import Audio, Cancelled
from protocol.wire.messages import PATH, Cancel, Submit
from relayd.auth.login_throttle import MAX_FAILURES, WINDOW_S, LoginThrottle, address_of
from relayd.auth.origins import may_come_from
from relayd.http.app import HEADERS, make_app
from relayd.http.connection import Connection, RequestCycle
from relayd.http.context import Exchange, HttpContext
from relayd.http.request_stream import open_submission
from relayd.http.streaming_response import ResponseWriter, StreamingRoute
from relayd.store.records import TokenLimits
from tests.support.raw_http_client import visitor
from tests.support.relay import Daemon, an_id, daemon, fake_worker, identity, kept_logs, peer, samples, until

TLS = Path(__file__).parents[2] / "support" / "tls"
PCM = [samples(1200, seed) for seed in range(3)]
Logs = list[MutableMapping[str, Any]]
#: What a connection is made of, and what would hold a body.
PARTS = (Connection, RequestCycle, Exchange, Request)
GONE = (h11.RemoteProtocolError, trio.BrokenResourceError)


@pytest.fixture
def logs() -> Iterator[Logs]:
    """What the daemon logs."""
    with kept_logs() as kept:
        yield kept


def faults(logs: Logs) -> Logs:
    return [line for line in logs if line["log_level"] in ("error", "critical")]


class Stage:
    """Handlers for tests, and what became of them."""

    def __init__(self) -> None:
        self.entered, self.left = trio.Event(), trio.Event()
        self.go_on = trio.Event()
        self.cancelled = 0

    def routes(self) -> list[Route]:
        return [
            Route("/fine", self.fine),
            Route("/echo", self.echo, methods=["POST"]),
            Route("/ignore", self.fine, methods=["POST"]),
            Route("/broken", self.broken),
            Route("/half", StreamingRoute(self.half)),
            Route("/slow", StreamingRoute(self.slow)),
            Route("/waits", self.waits),
            Route("/endless", StreamingRoute(self.endless)),
            Route("/speech", StreamingRoute(self.speech)),
            Route("/takes", self.takes, methods=["POST"]),
            Route("/silent", Silent()),
        ]

    async def fine(self, request: Request) -> Response:
        return PlainTextResponse("fine")

    async def echo(self, request: Request) -> Response:
        return Response(await request.body())

    async def broken(self, request: Request) -> Response:
        raise RuntimeError("fell over")

    async def half(self, request: Request, reply: ResponseWriter) -> None:
        await reply.start("text/plain")
        await reply.write(b"half")
        raise RuntimeError("fell over")

    async def slow(self, request: Request, reply: ResponseWriter) -> None:
        await reply.start("text/plain")
        await reply.write(b"begun ")
        self.entered.set()
        await self.go_on.wait()
        await reply.write(b"ended")

    async def waits(self, request: Request) -> Response:
        self.entered.set()
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            self.cancelled += 1
            raise
        finally:
            self.left.set()

    async def takes(self, request: Request) -> Response:
        await self.go_on.wait()
        self.entered.set()
        try:
            return Response(await request.body())
        except trio.Cancelled:
            self.cancelled += 1
            raise

    async def endless(self, request: Request, reply: ResponseWriter) -> None:
        await reply.start("text/plain")
        try:
            while True:
                await reply.write(bytes(65536))
        finally:
            self.left.set()

    async def speech(self, request: Request, reply: ResponseWriter) -> None:
        submit = Submit(request_id=an_id(), space="tts", params={"text": "x"})
        async with open_submission(request, submit) as held:
            async for event in held:
                if isinstance(event, Audio):
                    if not reply.started:
                        await reply.start("audio/pcm")
                    await reply.write(event.pcm)


class Silent:
    """Answers nothing."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()


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


@asynccontextmanager
async def staged(state_dir: Path, **overrides: Any) -> AsyncIterator[tuple[Daemon, Stage]]:
    """A daemon with the stage's handlers."""
    stage = Stage()

    def make(context: HttpContext) -> Starlette:
        app = make_app(context)
        app.router.routes[:0] = stage.routes()
        return app

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("relayd.daemon.make_app", make)
        async with daemon(state_dir, **overrides) as relay:
            yield relay, stage


def make_token(relay: Daemon, name: str = "ann", **more: Any) -> str:
    return relay.tokens.create(role="client", name=name, now=0.0, **more).text


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


# -- handlers --------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_handler_that_falls_ends_its_response_alone(tmp_path: Path, logs: Logs) -> None:
    async with staged(tmp_path) as (relay, stage), visitor(relay.url) as other, visitor(relay.url) as http:
        slow = await other.open("GET", "/slow")
        broken = await http.get("/broken")
        assert (broken.status, broken.error["code"]) == (500, "internal")
        assert "fell over" not in broken.body.decode()
        assert (await http.get("/fine")).status == 200, "its connection goes on"
        half = await http.open("GET", "/half")
        with pytest.raises(GONE):
            await half.rest()
        assert (half.body, half.whole) == (b"half", False), "cut short, and not ended"
        stage.go_on.set()
        assert await slow.rest() == b"begun ended"
        await until(lambda: not relay.http_context.exchanges)
    assert [line["path"] for line in faults(logs)] == ["/broken", "/half"]


@pytest.mark.trio
async def test_a_handler_that_answers_nothing_is_answered_for(tmp_path: Path) -> None:
    async with staged(tmp_path) as (relay, _), visitor(relay.url) as http:
        assert (await http.get("/silent")).status == 500
        assert await http.hears_the_end()


def parts_alive() -> set[int]:
    return {id(thing) for thing in gc.get_objects() if isinstance(thing, PARTS)}


def test_nothing_of_a_connection_waits_for_the_garbage_collector(tmp_path: Path) -> None:
    """In a process of its own: what earlier tests have imported and configured keeps things alive, too."""
    script = (
        "import pathlib, sys, trio; from tests.relayd.http.test_server import leave_nothing; "
        "trio.run(leave_nothing, pathlib.Path(sys.argv[1])); print('nothing is left')"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    root = Path(__file__).parents[3]
    alone = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=100, check=False)
    assert (alone.returncode, "nothing is left" in alone.stdout) == (0, True), alone.stdout + alone.stderr


async def leave_nothing(tmp_path: Path) -> None:
    """Connections of all kinds, with the collector off; fails where anything of one stays."""
    async with staged(tmp_path, listen="127.0.0.1:0") as (relay, stage):
        gc.collect()
        gc.disable()
        before = parts_alive()  # what a failed test before this one keeps alive is none of its business
        try:
            async with visitor(relay.urls[0]) as http:
                assert len((await http.ask("POST", "/echo", body=b"x" * 1_000_000)).body) == 1_000_000
                await http.get("/nothing")
            for method, path, body in (("POST", "/ignore", b"x" * 1_000_000), ("GET", "/endless", b"")):
                async with visitor(relay.urls[0]) as http:
                    await http.open(method, path, body=body)
            async with visitor(relay.urls[0]) as http:
                await http.begin("GET", "/waits")
                with trio.fail_after(5):
                    await stage.entered.wait()
            async with visitor(relay.urls[0]) as http:
                await http.stream.send_all(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc")
                await until(lambda: len(relay.http_context.exchanges) == 1)
            await until(lambda: not relay.http_context.connections)
            await until(lambda: not parts_alive() - before)  # a task that has just ended lets go of its own in a moment
        finally:
            gc.enable()


@pytest.mark.trio
@pytest.mark.parametrize("with_reset", [False, True])
async def test_a_client_that_goes_away_has_its_handler_cancelled_at_once(
    tmp_path: Path, logs: Logs, with_reset: bool
) -> None:
    async with staged(tmp_path, listen="127.0.0.1:0") as (relay, stage):
        async with visitor(relay.urls[0]) as http:
            await http.begin("GET", "/waits")
            with trio.fail_after(5):
                await stage.entered.wait()
            if with_reset:
                assert isinstance(http.stream, trio.SocketStream)
                http.stream.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SO_LINGER of no time
        with trio.fail_after(1):
            await stage.left.wait()
        assert stage.cancelled == 1
        await until(lambda: not relay.http_context.connections)
    assert not faults(logs)


@pytest.mark.trio
async def test_a_request_whose_client_went_away_is_cancelled_at_its_worker_at_once(tmp_path: Path) -> None:
    async with staged(tmp_path) as (relay, _), fake_worker(relay.url) as worker:
        async with visitor(relay.url) as http:
            await http.begin("GET", "/speech")
            assign = await worker.assigned()
            worker.speak(assign, PCM[:1], end=False)
            answer = await http.answer()
            await answer.until(PCM[0])
        with trio.fail_after(1):  # and not after its resume window of 30 s
            assert (await worker.peer.next(Cancel)).request_id == assign.request_id
        worker.send(Cancelled(**identity(assign, 2)))
        await relay.at_rest()


@pytest.mark.trio
async def test_a_request_whose_client_went_away_before_it_began_leaves_the_queue(tmp_path: Path) -> None:
    async with staged(tmp_path) as (relay, _):
        async with visitor(relay.url) as http:
            await http.begin("GET", "/speech")
            await until(lambda: bool(relay.relay.scheduler.state.spaces["tts"].queue))
        await until(lambda: not relay.relay.scheduler.state.spaces["tts"].queue)
        await relay.at_rest()


@pytest.mark.trio
async def test_a_client_that_takes_nothing_is_cut_off_in_time(tmp_path: Path, logs: Logs) -> None:
    async with staged(tmp_path, limits={"stall_timeout_s": 0.2}) as (relay, stage), visitor(relay.url) as http:
        await http.open("GET", "/endless")
        with trio.fail_after(5):
            await stage.left.wait()
        await until(lambda: relay.http_context.connections == 0)
        assert relay.relay.slow_consumers == 1
    assert not faults(logs)


@pytest.mark.trio
async def test_a_slow_reader_holds_no_more_of_a_result_than_its_share(tmp_path: Path) -> None:
    pcm = [samples(24_000, seed) for seed in range(60)]  # 2.9 MB
    async with staged(tmp_path) as (relay, _), fake_worker(relay.url) as worker, visitor(relay.url) as http:
        await http.begin("GET", "/speech")
        assign = await worker.assigned()
        worker.speak(assign, pcm)
        answer = await http.answer()
        request = relay.relay.requests[assign.request_id]
        await until(lambda: request.log.ended)
        await trio.testing.wait_all_tasks_blocked(0.05)
        (exchange,) = relay.http_context.exchanges
        held: Any = exchange.waits_for
        assert held.backlog_bytes < 400_000
        assert await answer.rest() == b"".join(pcm)


# -- drain -----------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_drain_lets_streams_finish_hangs_up_on_idlers_and_tells_who_waits(tmp_path: Path, logs: Logs) -> None:
    async with (
        staged(tmp_path) as (relay, _),
        fake_worker(relay.url) as worker,
        visitor(relay.url) as idle,
        visitor(relay.url) as http,
        visitor(relay.url) as late,
    ):
        await idle.get("/fine")
        await http.begin("GET", "/speech")
        assign = await worker.assigned()
        worker.speak(assign, PCM[:1], end=False)
        answer = await http.answer()
        async with visitor(relay.url) as waiting:
            await waiting.begin("GET", "/speech")
            await until(lambda: bool(relay.relay.scheduler.state.spaces["tts"].queue))
            os.kill(os.getpid(), signal.SIGTERM)
            with trio.fail_after(5):
                await relay.relay.draining.wait()
            refused = await late.ask("POST", "/v1/spaces/tts/requests", told={"params": {"text": "y"}})
            assert (refused.status, refused.error["code"]) == (503, "shutting_down")
            assert refused.headers["retry-after"] == "5"
            worker.speak(assign, PCM, first=2)
            assert await answer.rest() == b"".join(PCM)
            told = await waiting.answer()
            await told.rest()
            assert (told.status, told.error["code"]) == (503, "shutting_down")
            assert told.headers["connection"] == "close"
        for connection in (idle, http, late):
            assert await connection.hears_the_end()
    assert not faults(logs)


# -- who may come ----------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_without_a_token_nothing_is_told_beyond_the_unix_socket(tmp_path: Path) -> None:
    async with daemon(tmp_path, listen="127.0.0.1:0") as relay, visitor(relay.urls[0]) as http:
        for method, path in (
            ("GET", "/v1/spaces"),
            ("POST", "/v1/spaces/tts/requests"),
            ("PUT", f"/v1/requests/{an_id()}?space=tts"),
            ("GET", f"/v1/requests/{an_id()}"),
            ("DELETE", f"/v1/requests/{an_id()}"),
            ("GET", f"/v1/requests/{an_id()}/events"),
            ("GET", f"/v1/requests/{an_id()}/audio"),
        ):
            answer = await http.ask(method, path)
            assert (answer.status, answer.error["code"]) == (401, "unauthenticated"), path
            assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.trio
async def test_tokens_that_open_nothing_are_refused_and_after_some_tries_not_looked_at(
    tmp_path: Path, logs: Logs
) -> None:
    async with daemon(tmp_path, listen="127.0.0.1:0") as relay:
        worker = relay.tokens.create(role="worker", name="box", now=0.0).text
        good = make_token(relay)
        async with visitor(relay.urls[0]) as http:
            for value, status in (
                (f"Bearer {worker}", 403),
                ("Basic YTpi", 401),
                ("Bearer", 401),
                ("Bearer " + "x" * 300, 401),
                ("Bearer ~", 401),
            ):
                answer = await http.get("/v1/spaces", headers={"authorization": value})
                assert answer.status == status, value
            answers = [await http.get("/v1/spaces", headers={"authorization": "Bearer rly_c_no"}) for _ in range(20)]
            assert [answer.status for answer in answers][-5:] == [429] * 5
            assert answers[-1].error["code"] == "rate_limited"
            assert 1 <= int(answers[-1].headers["retry-after"]) <= WINDOW_S + 1
            right = await http.get("/v1/spaces", headers={"authorization": f"bearer {good}"})
            assert right.status == 200, "who has a token is never shut out with others of its address"
    told = json.dumps([str(line) for line in logs])
    assert sum(line["event"] == "login refused" for line in logs) <= MAX_FAILURES
    assert good not in told
    assert worker not in told


@pytest.mark.trio
async def test_failures_of_both_kinds_count_together_and_a_good_token_is_always_taken(
    tmp_path: Path, logs: Logs
) -> None:
    async with daemon(tmp_path, listen="127.0.0.1:0") as relay:
        url, good, codes = relay.urls[0], make_token(relay), []
        async with visitor(url, token="rly_c_no") as http:
            for _ in range(MAX_FAILURES // 2):
                assert (await http.get("/v1/spaces")).status == 401
                with pytest.raises(LoginRefused) as refused:
                    async with peer(url, "client", "rly_c_no"):
                        pytest.fail("entered")
                codes.append(refused.value.code)
            assert (await http.get("/v1/spaces")).status == 429
            with pytest.raises(LoginRefused, match="retry later") as refused:
                async with peer(url, "client", "rly_c_no"):
                    pytest.fail("entered")
            codes.append(refused.value.code)
        assert codes == ["unauthenticated"] * (MAX_FAILURES // 2) + ["rate_limited"]
        async with peer(url, "client", good) as client:
            await client.settled()
    assert sum(line["event"] == "login refused" for line in logs) == MAX_FAILURES


@pytest.mark.parametrize(
    ("peer_name", "address"),
    [("1.2.3.4:56", "1.2.3.4"), ("[2001:db8::7]:56", "[2001:db8::7]"), ("2001:db8::7", "2001:db8::7"), ("a", "a")],
)
def test_an_address_is_a_peer_without_its_port(peer_name: str, address: str) -> None:
    assert address_of(peer_name) == address


def test_failures_are_forgotten_in_time_and_counted_by_address() -> None:
    failures = LoginThrottle()
    assert [failures.add("a", float(second)) for second in range(MAX_FAILURES)] == [None] * MAX_FAILURES
    assert failures.add("a", 10.0) == WINDOW_S - 10
    assert failures.add("b", 10.0) is None
    assert failures.add("a", WINDOW_S + 0.5) is None
    for number in range(10_000):
        failures.add(str(number), 100.0)
    assert len(failures._times) <= 4096


@pytest.mark.trio
async def test_behind_a_proxy_failures_are_counted_by_whom_the_proxy_names(tmp_path: Path) -> None:
    async with daemon(tmp_path, listen="127.0.0.1:0", behind_proxy=True) as relay, visitor(relay.urls[0]) as http:
        bad = {"authorization": "Bearer rly_c_no", "x-forwarded-for": "10.0.0.9, 203.0.113.7"}
        answers = [await http.get("/v1/spaces", headers=bad) for _ in range(MAX_FAILURES + 1)]
        assert answers[-1].status == 429
        other = await http.get("/v1/spaces", headers=bad | {"x-forwarded-for": "203.0.113.8"})
        assert other.status == 401


@pytest.mark.trio
@pytest.mark.parametrize("name", ["token", "access_token", "api_key", "Key"])
async def test_a_token_in_a_url_is_refused_and_never_logged(tmp_path: Path, logs: Logs, name: str) -> None:
    async with daemon(tmp_path, listen="127.0.0.1:0") as relay:
        token = make_token(relay)
        async with visitor(relay.urls[0]) as http:
            answer = await http.get(f"/v1/spaces?{name}={token}")
            assert answer.status == 401
            assert "Authorization" in answer.error["message"]
    assert token not in json.dumps([str(line) for line in logs])


@pytest.mark.trio
async def test_a_revoked_token_ends_its_streams_within_two_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with staged(tmp_path, listen="127.0.0.1:0") as (relay, _), fake_worker(relay.url) as worker:
        token = make_token(relay)
        async with visitor(relay.urls[0], token=token) as http:
            await http.begin("GET", "/speech")
            assign = await worker.assigned()
            worker.speak(assign, PCM[:1], end=False)
            answer = await http.answer()
            relay.tokens.revoke("ann", 1.0)
            with trio.fail_after(2), pytest.raises(GONE):
                await answer.rest()
        await worker.peer.next(Cancel)
        worker.send(Cancelled(**identity(assign, 2)))
        await relay.at_rest()


@pytest.mark.trio
async def test_a_tokens_connections_are_counted_over_both_kinds(tmp_path: Path) -> None:
    async with staged(tmp_path, listen="127.0.0.1:0") as (relay, _):
        token = make_token(relay, limits=TokenLimits(max_connections=1))
        async with visitor(relay.urls[0], token=token) as http:
            assert [(await http.get("/v1/spaces")).status for _ in range(2)] == [200, 200]
            async with peer(relay.urls[0], "client", token):
                answer = await http.get("/v1/spaces")
                assert (answer.status, answer.error["code"]) == (429, "rate_limited")


# -- browsers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("origin", "host", "allowed", "may"),
    [
        ("", "relay:1", (), True),
        ("http://relay:1", "relay:1", (), True),
        ("https://Relay", "relay", (), True),
        ("http://evil", "relay:1", (), False),
        ("http://relay:2", "relay:1", (), False),
        ("null", "null", (), False),
        ("file://relay:1", "relay:1", (), False),
        ("http://friend", "relay:1", ("http://friend",), True),
        ("http://friend.evil", "relay:1", ("http://friend",), False),
        ("http://any", "relay:1", ("*",), True),
    ],
)
def test_pages_of_our_own_and_of_listed_origins_may_come(
    origin: str, host: str, allowed: tuple[str, ...], may: bool
) -> None:
    assert may_come_from(origin, host, allowed) is may


@pytest.mark.trio
async def test_origins_are_checked_and_listed_ones_may_read(tmp_path: Path) -> None:
    friend = "https://friend.example"
    async with daemon(tmp_path, allowed_origins=[friend]) as relay, visitor(relay.url) as http:
        evil = await http.ask("POST", "/v1/spaces/tts/requests", headers={"origin": "https://evil.example"}, told={})
        assert (evil.status, evil.error["code"]) == (403, "forbidden")
        assert "access-control-allow-origin" not in evil.headers
        own = await http.get("/v1/spaces", headers={"origin": "http://localhost"})
        assert own.status == 200
        listed = await http.get("/v1/spaces", headers={"origin": friend})
        assert listed.headers["access-control-allow-origin"] == friend
        asked = {"origin": friend, "access-control-request-method": "PUT"}
        preflight = await http.ask("OPTIONS", f"/v1/requests/{an_id()}", headers=asked)
        assert preflight.status == 204
        assert "PUT" in preflight.headers["access-control-allow-methods"]
        assert "Authorization" in preflight.headers["access-control-allow-headers"]


@pytest.mark.trio
async def test_every_answer_has_the_headers_that_keep_browsers_safe(tmp_path: Path) -> None:
    async with staged(tmp_path) as (relay, stage), visitor(relay.url) as http:
        stage.go_on.set()
        for path in ("/v1/spaces", "/nothing", "/broken", "/slow", "/openapi.json", PATH):
            answer = await http.get(path)
            for name, value in HEADERS.items():
                assert answer.headers.get(name) == value, (path, name)
            assert "server" not in answer.headers


@pytest.mark.trio
async def test_connections_of_both_kinds_are_bounded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relayd.connections.gateway.MAX_PENDING", 1)
    async with staged(tmp_path, limits={"max_connections": 1}) as (relay, _):
        async with visitor(relay.url) as one, peer(relay.url, "client"):
            assert (await one.get("/fine")).status == 200
            async with visitor(relay.url) as too_many:
                with suppress(trio.BrokenResourceError):
                    await too_many.stream.send_all(b"GET /fine HTTP/1.1\r\n\r\n")
                assert await too_many.hears_the_end()
        await until(lambda: not relay.relay.connections)
        async with visitor(relay.url) as again:
            assert (await again.get("/fine")).status == 200
