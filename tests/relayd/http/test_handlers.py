"""HTTP handlers: their failures, clients that leave or read slowly, and a drain."""

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from starlette.requests import Request
from starlette.websockets import WebSocket

from protocol.link.stream_link import StreamLink
from protocol.wire.frames import Cancelled
from protocol.wire.messages import Cancel
from relayd.http.connection import Connection, RequestCycle
from relayd.http.context import Exchange
from relayd.http.websocket import WebSocketSession
from tests.relayd.http.sample_handlers import GONE, PCM, Logs, faults, staged
from tests.relayd.http.sample_sockets import raw_socket
from tests.support.fake_worker import fake_worker, identity, samples
from tests.support.raw_http_client import visitor
from tests.support.relay import until

#: What a connection is made of, and what would hold a body.
PARTS = (Connection, RequestCycle, Exchange, Request, WebSocketSession, StreamLink, WebSocket)


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
        "import pathlib, sys, trio; from tests.relayd.http.test_handlers import leave_nothing; "
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
            for _ in range(2):
                async with raw_socket(relay.urls[0], "/socket", "") as socket:
                    await socket.next(str)
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
