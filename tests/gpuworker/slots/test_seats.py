"""Slots that share one engine process: what a crash, a hang, a cancel or a stall of one costs the others."""

import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from gpuworker.engines.base import AudioChunk, Chunk
from gpuworker.engines.catalog import find_engine, parse_options
from gpuworker.engines.mock import Tune, tune_key
from gpuworker.slots.process_slot import EngineHost, ProcessSlot
from gpuworker.slots.run_engine import RunResult
from gpuworker.slots.slot import Job
from protocol.wire.validators import Value

#: A process starts in 0.2 s; a loaded machine takes its time.
PATIENCE_S = 60


@attrs.define(eq=False)
class Speech:
    """A run, what it has made, and how it ended."""

    slot: ProcessSlot
    text: str
    pcm: bytes = b""
    end: RunResult | None = None
    _changed: trio.Event = attrs.field(factory=trio.Event)

    def add(self, chunk: Chunk) -> None:
        if isinstance(chunk, AudioChunk):
            self.pcm += chunk.pcm
            self.wake()

    def wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def heard(self, more_bytes: int = 1) -> None:
        """Wait until it has made more than it had."""
        wanted = len(self.pcm) + more_bytes
        while len(self.pcm) < wanted:
            await self._changed.wait()

    async def ended(self) -> RunResult:
        while self.end is None:
            await self._changed.wait()
        return self.end

    @property
    def is_whole_tune(self) -> bool:
        return len(self.pcm) > 0 and self.pcm == Tune(24_000).pcm(tune_key(self.text, 0), 0, len(self.pcm) // 2)


@attrs.define(eq=False)
class Room:
    """Slots with one process, which are served."""

    slots: list[ProcessSlot]
    nursery: trio.Nursery
    #: The number of ready slots at each change.
    ready: list[int] = attrs.field(factory=list)
    _changed: trio.Event = attrs.field(factory=trio.Event)

    def note(self) -> None:
        ready = sum(slot.ready for slot in self.slots)
        if self.ready[-1:] != [ready]:
            self.ready.append(ready)
        self._changed.set()
        self._changed = trio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    async def until_ready(self, count: int | None = None) -> None:
        count = len(self.slots) if count is None else count
        await self.until(lambda: sum(slot.free for slot in self.slots) == count)

    @property
    def pid(self) -> int:
        child = self.slots[0].host.child
        assert child is not None
        return child.pid

    def start(self, index: int, text: str = "", **params: Value) -> Speech:
        """Begin to speak in a slot, for longer than any test takes."""
        speech = Speech(self.slots[index], text or f"text {index}")
        given: dict[str, Any] = {"text": speech.text, "duration_s": 600, "chunk_ms": 20, **params}

        async def run() -> None:
            speech.end = await speech.slot.run(Job(given), speech.add)
            speech.wake()

        self.nursery.start_soon(run)
        return speech


async def printed(caplog: pytest.LogCaptureFixture, words: str, times: int = 1) -> None:
    """Wait until engines have printed this so often, be it in one line: only then have they begun to hang."""
    while sum(line.count(words) for line in caplog.messages) < times:  # noqa: ASYNC110 - stderr makes no event here
        await trio.sleep(0.01)


@pytest.fixture(autouse=True)
def _log_all(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "gpuworker.slot")


@asynccontextmanager
async def a_room(count: int, *given: str, **more: Any) -> AsyncIterator[Room]:
    options = parse_options(find_engine("mock").OPTIONS, ("shared=true", *given))
    host = EngineHost("mock", options, shared=True, **more)
    slots = [ProcessSlot(index, host) for index in range(count)]
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            room = Room(slots, nursery)
            for slot in slots:
                slot.on_change = room.note
                nursery.start_soon(slot.serve)
            await room.until_ready()
            yield room
            nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_one_process_serves_all_slots_at_the_same_time_each_with_its_own_samples() -> None:
    async with a_room(8) as room:
        speeches = [room.start(index, duration_s=1.0, speed=4) for index in range(8)]
        async with trio.open_nursery() as nursery:
            for speech in speeches:
                nursery.start_soon(speech.ended)
        assert all(speech.end == RunResult(outcome="completed") for speech in speeches)
        assert [len(speech.pcm) for speech in speeches] == [48_000] * 8
        assert all(speech.is_whole_tune for speech in speeches)
        assert room.ready == [8], "told once, not slot by slot"


@pytest.mark.trio
async def test_a_crash_ends_every_run_of_the_process_and_says_who_had_made_something() -> None:
    async with a_room(4) as room:
        speaking = [room.start(index) for index in range(2)]
        for speech in speaking:
            await speech.heard()
        waiting = room.start(2, delay_s=60)
        poison = room.start(3, "a secret", fail={"how": "exit", "code": 7})
        ends = [await speech.ended() for speech in (*speaking, waiting, poison)]
        assert [end.details for end in ends] == [{"innocent": True}] * 2 + [{"innocent": False}] * 2
        assert {(end.outcome, end.code, end.retryable) for end in ends} == {("failed", "engine_failed", True)}
        (message,) = {end.message for end in ends}
        assert "exit code 7" in message
        assert room.ready == [4, 0], "the relay hears that the slots are gone before it hears of the ends"
        await room.until_ready()
        again = room.start(0, duration_s=1, speed=0)
        assert (await again.ended()).outcome == "completed"
        assert again.is_whole_tune


@pytest.mark.trio
async def test_one_that_ran_by_itself_has_nobody_else_to_blame() -> None:
    async with a_room(4) as room:
        speech = room.start(1, speed=50, fail={"how": "exit", "at": 5})
        assert (await speech.ended()).details == {"innocent": False}
        assert speech.pcm


@pytest.mark.trio
async def test_a_run_that_asks_for_a_new_process_ends_all_and_no_words_of_it_reach_the_others() -> None:
    async with a_room(3) as room:
        speaking = [room.start(index) for index in range(2)]
        for speech in speaking:
            await speech.heard()
        asks = room.start(2, fail={"how": "raise", "restart": True})
        assert (await asks.ended()).message == "the request asked for this failure"
        assert asks.end is not None
        assert (asks.end.details, asks.end.retryable) == ({"innocent": False}, False)
        for speech in speaking:
            end = await speech.ended()
            assert (end.details, end.retryable) == ({"innocent": True}, True)
            assert "asked" not in end.message
        await room.until_ready()


@pytest.mark.trio
async def test_a_run_that_ends_as_its_grace_does_costs_no_neighbour(autojump_clock: trio.testing.MockClock) -> None:
    host = EngineHost("mock", {}, shared=True)
    slot = ProcessSlot(0, host)
    slot.ready = True
    killed: list[bool] = []

    class Child:
        async def send(self, message: dict[str, Value]) -> None:
            if message["do"] == "cancel":
                try:
                    await trio.sleep_forever()
                finally:  # the grace is over
                    assert slot.live_run is not None
                    slot.live_run.finish(RunResult(outcome="completed"))

        def kill(self) -> None:
            killed.append(True)

    host.child = Child()  # type: ignore[assignment]  # the part of it that a run uses
    async with trio.open_nursery() as nursery:
        nursery.start_soon(slot.run, Job({"text": "a"}), lambda _chunk: None)
        await trio.testing.wait_all_tasks_blocked()
        slot.cancel()
    assert not killed
    assert slot.free


@pytest.mark.trio
async def test_an_error_of_one_request_is_that_requests_alone() -> None:
    async with a_room(2) as room:
        neighbour = room.start(0)
        await neighbour.heard()
        failing = room.start(1, fail={"how": "raise", "retryable": True})
        end = await failing.ended()
        assert (end.code, end.retryable, end.details) == ("engine_failed", True, {})
        await neighbour.heard(100_000)
        assert neighbour.is_whole_tune
        assert room.ready == [2]


@pytest.mark.trio
async def test_a_cancel_frees_its_slot_before_the_next_chunk_and_disturbs_no_other() -> None:
    async with a_room(2, "speed=10") as room:
        neighbour, cancelled = room.start(0), room.start(1)
        await cancelled.heard()
        cancelled.slot.cancel()
        assert (await cancelled.ended()).outcome == "cancelled"
        had = len(cancelled.pcm)
        again = room.start(1, "another", duration_s=1)
        assert (await again.ended()).outcome == "completed"
        assert again.is_whole_tune
        assert len(cancelled.pcm) == had
        await neighbour.heard(1_000)
        assert neighbour.is_whole_tune
        assert room.ready == [2], "the same process all the time"


@pytest.mark.trio
async def test_a_slot_that_does_not_stop_goes_out_of_service_while_others_work_and_is_back_with_a_new_process(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with a_room(8, "speed=5", cancel_grace_s=0.5) as room:
        neighbours = [room.start(index) for index in range(7)]
        hung = room.start(7, fail={"how": "hang", "at": 1})
        await printed(caplog, "hanging")
        for speech in neighbours:
            await speech.heard()
        pid = room.pid
        hung.slot.cancel()
        assert (await hung.ended()).outcome == "cancelled"
        assert room.ready == [8, 7]
        assert not hung.slot.free
        for speech in neighbours:
            await speech.heard(2_000)
            assert speech.is_whole_tune
        assert room.pid == pid
        for speech in neighbours:
            speech.slot.cancel()
            assert (await speech.ended()).outcome == "cancelled"
        await room.until_ready()
        assert room.ready == [8, 7, 0, 8], "nothing ran any more, so the process could go"
        assert room.pid != pid


@pytest.mark.trio
async def test_one_that_ran_beside_a_slot_out_of_service_is_innocent_of_the_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with a_room(4, "speed=5", cancel_grace_s=0.2) as room:
        neighbour = room.start(0)
        hung = room.start(1, fail={"how": "hang", "at": 1})
        await printed(caplog, "hanging")
        await neighbour.heard()
        hung.slot.cancel()
        assert (await hung.ended()).outcome == "cancelled"
        os.kill(room.pid, signal.SIGKILL)
        assert (await neighbour.ended()).details == {"innocent": True}


@pytest.mark.trio
async def test_a_slot_that_stops_late_is_in_service_again(caplog: pytest.LogCaptureFixture) -> None:
    async with a_room(4, "speed=5", cancel_grace_s=0.2) as room:
        neighbour = room.start(0)
        slow = room.start(1, fail={"how": "slow", "at": 1, "seconds": 2})
        await printed(caplog, "slow, as the request asked")
        await neighbour.heard()
        pid = room.pid
        slow.slot.cancel()
        assert (await slow.ended()).outcome == "cancelled"
        assert not slow.slot.free
        await room.until(lambda: slow.slot.free)
        again = room.start(1, "another", duration_s=1, speed=0)
        assert (await again.ended()).outcome == "completed"
        assert again.is_whole_tune, "nothing of the run before is in it"
        assert room.pid == pid
        assert neighbour.end is None


@pytest.mark.trio
async def test_a_process_that_has_lost_half_of_its_slots_lets_the_rest_finish_and_starts_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with a_room(4, "speed=5", cancel_grace_s=0.2) as room:
        neighbour = room.start(0)
        for index in (1, 2):
            hung = room.start(index, fail={"how": "hang", "at": 1})
            await printed(caplog, "hanging", times=index)
            await neighbour.heard()
            hung.slot.cancel()
            assert (await hung.ended()).outcome == "cancelled"
        assert room.ready == [4, 3, 0], "it takes no more"
        await neighbour.heard(2_000)
        assert neighbour.is_whole_tune
        neighbour.slot.cancel()
        assert (await neighbour.ended()).outcome == "cancelled"
        await room.until_ready()
        assert room.ready == [4, 3, 0, 4]


@pytest.mark.trio
async def test_a_cancelled_run_that_hangs_with_no_other_alive_is_killed(caplog: pytest.LogCaptureFixture) -> None:
    async with a_room(3, cancel_grace_s=0.3) as room:
        hung, also_hung = (room.start(index, fail={"how": "hang", "at": 1}) for index in range(2))
        await printed(caplog, "hanging", times=2)
        hung.slot.cancel()
        assert (await hung.ended()).outcome == "cancelled"
        assert (await also_hung.ended()).details == {"innocent": True}
        await room.until_ready()


@pytest.mark.trio
async def test_a_process_that_stands_still_with_requests_is_killed_and_one_without_is_not() -> None:
    async with a_room(3, "speed=10", stall_timeout_s=2.5) as room:
        pid = room.pid
        await trio.sleep(3.0)  # longer than that without a request
        assert room.pid == pid
        hung = room.start(0, fail={"how": "hang"})
        neighbour = room.start(1)
        await neighbour.heard()
        time.sleep(3.0)  # noqa: ASYNC251 - here it is the worker that stands still
        await neighbour.heard(100_000)  # 2 s of audio, longer than it may be silent: one that works is enough
        assert hung.end is None
        frozen = room.start(2, fail={"how": "freeze"})
        ends = [await speech.ended() for speech in (neighbour, hung, frozen)]
        assert [end.details["innocent"] for end in ends] == [True, False, False]
        assert all("sent nothing for 2.5 s" in end.message for end in ends)
        await room.until_ready()
        assert room.pid != pid


@pytest.mark.trio
async def test_what_one_request_printed_is_in_no_answer_and_under_no_requests_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with a_room(2) as room:
        neighbour = room.start(0)
        await neighbour.heard()
        crash = room.start(1, fail={"how": "exit", "code": 9})
        for speech in (neighbour, crash):
            end = await speech.ended()
            assert "as the request asked" not in end.message + end.report
    lines = [line for line in caplog.messages if "as the request asked" in line]
    assert lines == ["slots 0-1 | exiting with code 9, as the request asked"]


@pytest.mark.trio
async def test_an_idle_process_uses_no_cpu() -> None:
    def cpu_ns(pid: int) -> int:
        """CPU time of all its threads."""
        return sum(int(stat.read_text().split()[0]) for stat in Path(f"/proc/{pid}/task").glob("*/schedstat"))

    async with a_room(8) as room:
        speeches = [room.start(index, duration_s=1, speed=0) for index in range(8)]
        for speech in speeches:
            assert (await speech.ended()).outcome == "completed"
        before = cpu_ns(room.pid)
        await trio.sleep(2.0)  # what is measured, not waited for
        assert (cpu_ns(room.pid) - before) * 1_000 < before, "a thousandth of what its start and the speech took"
