"""Engine `openai` before a server that is slow, busy, away or gone, and requests that are cancelled meanwhile."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import trio

from gpuworker.engines.base import Chunk, EngineError, OptionValue
from gpuworker.engines.catalog import parse_options
from gpuworker.engines.model_server.upstream import Upstream
from gpuworker.engines.openai.engine import OpenAiEngine
from gpuworker.slots.process_slot import EngineHost, ProcessSlot
from gpuworker.slots.run_engine import RunResult
from gpuworker.slots.slot import Job
from gpuworker.slots.thread_slot import ThreadSlot
from tests.gpuworker.engines.openai.speech_server import (
    PATIENCE_S,
    PCM,
    Call,
    Places,
    SpeechServer,
    an_engine,
    pcm,
    plays,
    run,
)


class Cancel:
    """A script that waits at one point of its answer for the connection to be given up; the run is cancelled there."""

    def __init__(self, before: Callable[[Call], None]) -> None:
        self._before = before
        self.asked = threading.Event()
        self.given_up = threading.Event()

    def __call__(self, call: Call) -> None:
        self._before(call)
        self.asked.set()
        call.until_given_up()
        self.given_up.set()


def no_head(_call: Call) -> None:
    pass


def half_a_head(call: Call) -> None:
    call.send(b"HTTP/1.1 200 OK\r\nContent-")


def no_body(call: Call) -> None:
    call.head("200 OK", "Content-Type: audio/pcm")


def half_a_body(call: Call) -> None:
    call.head("200 OK", "Content-Length: 1000000", "Content-Type: audio/pcm")
    call.send(PCM[:1001])


def half_an_error(call: Call) -> None:
    call.head("500 X", "Content-Length: 1000000", "Content-Type: application/json")
    call.send(b"{")


@pytest.mark.parametrize("before", [no_head, half_a_head, no_body, half_a_body, half_an_error])
def test_a_cancel_closes_the_connection_whatever_is_awaited(before: Callable[[Call], None]) -> None:
    script = Cancel(before)
    with SpeechServer(script) as server, an_engine(server.url) as engine:
        end, _ = run(engine, cancelled=script.asked.is_set)
        assert end.outcome == "cancelled"
        assert script.given_up.wait(PATIENCE_S)
        server.script = plays
        assert run(engine)[0].outcome == "completed"


def test_a_cancel_ends_a_body_without_end_in_mid_stream() -> None:
    given_up = threading.Event()

    def script(call: Call) -> None:
        call.head("200 OK", "Content-Type: audio/pcm")
        with contextlib.suppress(OSError):
            while True:
                call.send(PCM)
        given_up.set()

    with SpeechServer(script) as server, an_engine(server.url) as engine:
        chunks: list[Chunk] = []
        end, _ = run(engine, cancelled=lambda: len(pcm(chunks)) >= 10 * len(PCM), chunks=chunks)
        assert end.outcome == "cancelled"
        assert given_up.wait(PATIENCE_S)
        assert pcm(chunks).startswith(10 * PCM)


@pytest.mark.trio
@pytest.mark.parametrize("kind", [ProcessSlot, ThreadSlot])
async def test_a_slot_s_cancel_is_seen_by_the_server_and_costs_no_process(kind: type) -> None:
    script = Cancel(half_a_body)
    with SpeechServer(script) as server:
        slot = a_slot(kind, server.url)
        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(slot.serve)
                await ready(slot)
                nursery.start_soon(cancel_when, script.asked, slot)
                end = await slot.run(Job({"text": "Hello."}), lambda _: None)
                assert end == RunResult(outcome="cancelled")
                assert slot.ready  # it was not killed for it
                assert await trio.to_thread.run_sync(script.given_up.wait, PATIENCE_S)
                server.script = plays
                chunks: list[Chunk] = []
                assert (await slot.run(Job({"text": "Hello."}), chunks.append)).outcome == "completed"
                assert pcm(chunks) == PCM
                nursery.cancel_scope.cancel()


def a_slot(kind: type, url: str, *given: str) -> ProcessSlot | ThreadSlot:
    options: dict[str, OptionValue] = parse_options(OpenAiEngine.OPTIONS, [f"url={url}", *given])
    if kind is ProcessSlot:
        return ProcessSlot(0, EngineHost("openai", options))
    return ThreadSlot(0, lambda: OpenAiEngine(options))


async def ready(slot: ProcessSlot | ThreadSlot) -> None:
    changed = trio.Event()

    def note() -> None:
        if slot.free:
            changed.set()

    slot.on_change = note
    note()
    await changed.wait()


async def cancel_when(asked: threading.Event, slot: ProcessSlot | ThreadSlot) -> None:
    await trio.to_thread.run_sync(asked.wait, PATIENCE_S)
    slot.cancel()


# -- a server that is gone


def cut_off(call: Call) -> None:
    half_a_body(call)


def reset_before(call: Call) -> None:
    call.reset()


def closed_before(_call: Call) -> None:
    pass


def reset_within(call: Call) -> None:
    half_a_body(call)
    call.reset()


def cut_off_in_chunks(call: Call) -> None:
    call.head("200 OK", "Transfer-Encoding: chunked", "Content-Type: audio/pcm")
    call.chunk(PCM)
    call.send(b"ffff\r\n" + PCM[:101])


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (closed_before, "lost before it answered"),
        (reset_before, "lost before it answered"),
        (cut_off, "lost in mid-stream"),
        (reset_within, "lost in mid-stream"),
        (cut_off_in_chunks, "lost in mid-stream"),
    ],
)
def test_a_lost_connection_is_no_end_and_may_be_tried_again(script: Callable[[Call], None], words: str) -> None:
    with SpeechServer(script) as server, an_engine(server.url) as engine:
        end, chunks = run(engine)
        assert (end.outcome, end.code, end.retryable, end.restart) == ("failed", "engine_failed", True, False)
        assert words in end.message
        assert pcm(chunks) == (PCM + PCM)[: len(pcm(chunks))]
        server.script = plays
        assert run(engine)[0].outcome == "completed"


def kill_when(begun: threading.Event, server: SpeechServer) -> None:
    begun.wait(PATIENCE_S)
    server.kill()


def test_a_server_killed_in_mid_stream_ends_the_run_and_the_next_one_learns_that_it_is_away() -> None:
    begun = threading.Event()

    def script(call: Call) -> None:
        half_a_body(call)
        begun.set()
        call.until_given_up()

    with SpeechServer(script) as server, an_engine(server.url) as engine:
        killer = threading.Thread(target=kill_when, args=(begun, server))
        killer.start()
        end, chunks = run(engine)
        killer.join(PATIENCE_S)
        assert (end.retryable, pcm(chunks)) == (True, PCM[:1000])
        assert "lost in mid-stream" in end.message
        end, _ = run(engine)
        # Its slot is not ready either, so requests wait at the relay until the server is back.
        assert (end.retryable, end.restart) == (True, True)
        assert "cannot be reached" in end.message


@pytest.mark.parametrize("script", [Cancel(no_head), Cancel(half_a_body)], ids=["no head", "half a body"])
def test_a_silent_server_is_given_up(script: Cancel) -> None:
    with SpeechServer(script) as server, an_engine(server.url, "silence_s=0.2") as engine:
        end, _ = run(engine)
        assert (end.outcome, end.retryable) == ("failed", True)
        assert "was silent for too long" in end.message
        assert script.given_up.wait(PATIENCE_S)


@pytest.mark.trio
async def test_a_slot_waits_for_its_server_and_is_ready_once_it_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
    slot = a_slot(ThreadSlot, f"http://127.0.0.1:{port}/v1")
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            failed = trio.Event()
            slot.on_change = failed.set
            nursery.start_soon(slot.serve)
            await failed.wait()
            assert "cannot be reached" in slot.load_fault
            with SpeechServer(plays, port=port):
                await ready(slot)
            nursery.cancel_scope.cancel()


# -- a server that is busy


@pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Service Unavailable", "502 Bad Gateway"])
def test_a_busy_server_is_asked_again_until_it_has_a_place(status: str) -> None:
    answers = iter([status, status, ""])

    def script(call: Call) -> None:
        if busy := next(answers):
            call.answer(b"", busy)
        else:
            plays(call)

    with SpeechServer(script) as server, an_engine(server.url, f"wait_s={PATIENCE_S}") as engine:
        end, chunks = run(engine)
        assert (end.outcome, pcm(chunks), len(server.calls)) == ("completed", PCM, 3)


def test_the_server_s_retry_after_is_kept_to_and_told_if_it_is_too_long() -> None:
    def script(call: Call) -> None:
        call.answer(b"", "429 X", "Retry-After: 1")

    with SpeechServer(script) as server, an_engine(server.url, "wait_s=1.5") as engine:
        end, _ = run(engine)
        # At once, after the second it asked for, and once more when the wait was over.
        assert (end.retryable, end.restart, len(server.calls)) == (True, False, 3)
        assert end.details == {"retry_after_s": 1.0}


def test_a_cancel_ends_the_wait_for_a_busy_server() -> None:
    asked = threading.Event()

    def script(call: Call) -> None:
        call.answer(b"", "503 X", "Retry-After: 1000")
        asked.set()

    with SpeechServer(script) as server, an_engine(server.url, "wait_s=1000") as engine:
        assert run(engine, cancelled=asked.is_set)[0].outcome == "cancelled"


def test_one_client_serves_many_threads_and_more_of_them_than_the_server_has_places() -> None:
    ends: list[tuple[str, bool]] = []
    with SpeechServer(Places(4)) as server, an_engine(server.url, f"wait_s={PATIENCE_S}") as engine:

        def one() -> None:
            chunks = list(engine.generate({"text": "a"}, {}))
            ends.append(("ended", pcm(chunks) == PCM))

        threads = [threading.Thread(target=one) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * PATIENCE_S)
        assert ends == [("ended", True)] * 16


# -- the client itself


def clients() -> Iterator[threading.Thread]:
    return (thread for thread in threading.enumerate() if thread.name == "model-server")


def test_an_engine_that_is_closed_leaves_no_thread_and_says_so() -> None:
    with SpeechServer(plays) as server:
        with an_engine(server.url) as engine:
            assert len(list(clients())) == 1
            upstream = Upstream(server.url, None, 1.0, "the server")
            upstream.open()
        upstream.close()
        for thread in clients():
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        with pytest.raises(EngineError, match="has ended") as caught, upstream.ask("GET", "/models") as answer:
            answer.head()
        assert caught.value.restart
        assert engine.capabilities.params


def test_lists_that_never_come_are_not_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpuworker.engines.model_server.engine.LIST_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        with pytest.raises(EngineError, match="does not answer: it was silent"), an_engine(url):
            pass


def test_the_whole_first_second_is_passed_on_although_the_engine_reads_slowly() -> None:
    def script(call: Call) -> None:
        call.stream([PCM[start : start + 100] for start in range(0, len(PCM), 100)])

    with SpeechServer(script) as server, an_engine(server.url) as engine:
        chunks: list[Chunk] = []
        for chunk in engine.generate({"text": "a"}, {}):
            chunks.append(chunk)
            time.sleep(0.001)
        assert pcm(chunks) == PCM
