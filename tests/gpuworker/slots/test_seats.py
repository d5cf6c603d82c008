"""Slots that share one engine process: what a crash, a hang, a cancel or a stall of one costs the others."""

import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import attrs
import pytest
import trio

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
        """Begin to speak for a minute in a slot."""
        speech = Speech(self.slots[index], text or f"text {index}")
        given: dict[str, Any] = {"text": speech.text, "duration_s": 60, "chunk_ms": 20, **params}

        async def run() -> None:
            speech.end = await speech.slot.run(Job(given), speech.add)
            speech.wake()

        self.nursery.start_soon(run)
        return speech


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
