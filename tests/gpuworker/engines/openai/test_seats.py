"""Engine `openai` in the seats of one process: what becomes of one request costs the others nothing."""

import os
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import pytest
import trio

from gpuworker.engines.base import Chunk
from gpuworker.engines.catalog import parse_options
from gpuworker.engines.openai.engine import OpenAiEngine
from gpuworker.slots.process_slot import EngineHost, ProcessSlot
from gpuworker.slots.run_engine import RunResult
from gpuworker.slots.slot import Job
from tests.gpuworker.engines.openai.speech_server import PATIENCE_S, PCM, Call, Places, SpeechServer, pcm, plays
from tests.support.relay import until


@attrs.define(eq=False)
class Scene:
    """A script that treats each request by its text, and says what it saw."""

    asked: dict[str, threading.Event] = attrs.field(factory=dict)
    given_up: dict[str, threading.Event] = attrs.field(factory=dict)
    go_on: threading.Event = attrs.field(factory=threading.Event)

    def of(self, text: str) -> threading.Event:
        return self.asked.setdefault(text, threading.Event())

    def end_of(self, text: str) -> threading.Event:
        return self.given_up.setdefault(text, threading.Event())

    def __call__(self, call: Call) -> None:
        text = call.body["input"]
        if text == "plays":
            plays(call)
            return
        if text == "refused":
            call.answer(b'{"error":{"message":"no such voice"}}', "400 X", "Content-Type: application/json")
            return
        if text != "silent":
            call.head("200 OK", f"Content-Length: {len(PCM)}", "Content-Type: audio/pcm")
            call.send(PCM[:1000])
        self.of(text).set()
        if text == "waits":
            self.go_on.wait(PATIENCE_S)
            call.send(PCM[1000:])
        else:  # stalls
            call.until_given_up()
            self.end_of(text).set()


@attrs.define(eq=False)
class Seat:
    """A slot, and the run in it."""

    slot: ProcessSlot
    chunks: list[Chunk] = attrs.field(factory=list)
    end: RunResult | None = None
    ended: trio.Event = attrs.field(factory=trio.Event)

    async def run(self, text: str) -> None:
        self.end = await self.slot.run(Job({"text": text}), self.chunks.append)
        self.ended.set()


async def seen(event: threading.Event) -> None:
    assert await trio.to_thread.run_sync(event.wait, PATIENCE_S)


async def loaded(host: EngineHost) -> None:
    while not all(slot.free for slot in host.slots):
        changed = trio.Event()
        for slot in host.slots:
            slot.on_change = changed.set
        await changed.wait()


@asynccontextmanager
async def the_seats(server: SpeechServer, count: int, *given: str) -> AsyncIterator[tuple[list[Seat], trio.Nursery]]:
    """Slots of one process in front of a server, and a nursery to run requests in."""
    options = parse_options(OpenAiEngine.OPTIONS, [f"url={server.url}", "wait_s=0", *given])
    host = EngineHost("openai", options, shared=OpenAiEngine(options).SHARED)
    slots = [ProcessSlot(index, host) for index in range(count)]
    with trio.fail_after(2 * PATIENCE_S):
        async with trio.open_nursery() as nursery:
            for slot in slots:
                nursery.start_soon(slot.serve)
            await loaded(host)
            yield [Seat(slot) for slot in slots], nursery
            nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_a_cancel_closes_only_its_own_connection() -> None:
    scene = Scene()
    with SpeechServer(scene) as server:
        async with the_seats(server, 3) as ((stalls, silent, waits), nursery):
            for seat, text in ((stalls, "stalls"), (silent, "silent"), (waits, "waits")):
                nursery.start_soon(seat.run, text)
                await seen(scene.of(text))
            for seat, text in ((stalls, "stalls"), (silent, "silent")):
                seat.slot.cancel()
                await seen(scene.end_of(text))
                await seat.ended.wait()
                assert seat.end == RunResult(outcome="cancelled")
                assert seat.slot.free, "no process was ended for it"
            scene.go_on.set()
            await waits.ended.wait()
            assert waits.end == RunResult(outcome="completed")
            assert pcm(waits.chunks) == PCM


@pytest.mark.trio
async def test_a_stalled_or_refused_request_costs_no_other_seat_anything() -> None:
    scene = Scene()
    with SpeechServer(scene) as server:
        async with the_seats(server, 4) as ((stalls, silent, refused, other), nursery):
            for seat, text in ((stalls, "stalls"), (silent, "silent")):
                nursery.start_soon(seat.run, text)
                await seen(scene.of(text))
            for _ in range(8):
                await refused.run("refused")
                assert refused.end is not None
                assert (refused.end.code, refused.end.report) == (
                    "invalid_params",
                    "it answered HTTP 400: no such voice",
                )
                other.chunks.clear()
                await other.run("plays")
                assert other.end == RunResult(outcome="completed")
                assert pcm(other.chunks) == PCM
            assert stalls.end is silent.end is None


@pytest.mark.trio
async def test_whoever_cannot_connect_ends_no_request_that_the_server_answers() -> None:
    scene = Scene()
    with SpeechServer(scene) as server:
        async with the_seats(server, 2) as ((waits, late), nursery):
            nursery.start_soon(waits.run, "waits")
            await seen(scene.of("waits"))
            server.hide()
            await late.run("plays")
            assert late.end is not None
            assert (late.end.retryable, late.end.restart, late.end.details) == (True, False, {})
            scene.go_on.set()
            await waits.ended.wait()
            assert (waits.end, pcm(waits.chunks)) == (RunResult(outcome="completed"), PCM)


@pytest.mark.trio
async def test_a_server_that_is_away_blames_no_request_and_no_seat_is_ready_until_it_is_back() -> None:
    with SpeechServer(Scene()) as server:
        port = int(server.url.rpartition(":")[2].partition("/")[0])
        async with the_seats(server, 2, "wait_s=0.3") as ((first, second), nursery):
            host = first.slot.host
            server.kill()
            nursery.start_soon(first.run, "plays")
            await second.run("plays")
            await first.ended.wait()
            for seat in (first, second):
                assert seat.end is not None
                assert (seat.end.retryable, seat.end.details["innocent"]) == (True, True)
            assert not first.slot.ready
            assert not second.slot.ready
            with SpeechServer(plays, port=port):
                await loaded(host)
                await first.run("plays")
                assert first.end == RunResult(outcome="completed")


@pytest.mark.trio
async def test_a_killed_process_ends_all_its_requests_and_the_next_one_serves_all_slots() -> None:
    scene = Scene()
    with SpeechServer(scene) as server:
        async with the_seats(server, 2) as ((speaks, silent), nursery):
            host = speaks.slot.host
            nursery.start_soon(speaks.run, "stalls")
            nursery.start_soon(silent.run, "silent")
            await until(lambda: bool(pcm(speaks.chunks)))
            await seen(scene.of("silent"))
            assert host.child is not None
            os.kill(host.child.pid, signal.SIGKILL)
            for seat, innocent in ((speaks, True), (silent, False)):
                await seat.ended.wait()
                assert seat.end is not None
                assert (seat.end.retryable, seat.end.details) == (True, {"innocent": innocent})
            await seen(scene.end_of("stalls"))
            await seen(scene.end_of("silent"))
            await loaded(host)
            await silent.run("plays")
            assert silent.end == RunResult(outcome="completed")


@pytest.mark.trio
async def test_sixteen_seats_before_a_server_with_four_places_all_end_well() -> None:
    with SpeechServer(places := Places(4)) as server:
        async with the_seats(server, 16, f"wait_s={PATIENCE_S}") as (seats, nursery):
            for seat in seats:
                nursery.start_soon(seat.run, "plays")
            for seat in seats:
                await seat.ended.wait()
                assert seat.end == RunResult(outcome="completed")
                assert pcm(seat.chunks) == PCM
    assert places.refused.is_set()
