"""Live inputs in slots: an engine reads what comes, and whatever it does with it costs nobody else."""

import hashlib
import os
import signal
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from gpuworker.engines.base import Chunk, EngineError, EngineInput, LiveInput, OutputChunk, RunStopped
from gpuworker.engines.catalog import find_engine, parse_options
from gpuworker.engines.function.engine import FunctionEngine
from gpuworker.slots.feed import Feed
from gpuworker.slots.process_slot import EngineHost, ProcessSlot
from gpuworker.slots.run_engine import RunResult
from gpuworker.slots.slot import Job, Slot
from gpuworker.slots.thread_slot import ThreadSlot
from protocol.wire.structs import InputRule
from protocol.wire.validators import Value

#: A process starts in 0.2 s; a loaded machine takes its time.
PATIENCE_S = 60

SOURCE = """
import os
import threading
from gpuworker.engines.base import LiveInput, RunStopped

threads = []

def read(audio):
    try:
        list(audio)
    except RunStopped:
        pass

def call(audio: LiveInput, how: str = "all"):
    if how == "nothing":
        return
    if how == "aside":
        threads.append(threading.Thread(target=read, args=(audio,), daemon=True))
        threads[0].start()
        return
    if how == "join":
        threads[0].join(10)
        yield threads[0].is_alive()
        return
    if how == "first":
        yield next(iter(audio)).decode()
        return
    for text in audio.text():
        yield text
        if how == "exit":
            os._exit(3)
    yield "the end"
"""


@attrs.define(eq=False)
class Hearing:
    """A run with a live input, what it has put out, and how much of its input it has taken."""

    slot: Slot
    name: str
    chunks: list[Value] = attrs.field(factory=list)
    taken: int = 0
    end: RunResult | None = None
    feed: Feed = attrs.field(init=False)
    _changed: trio.Event = attrs.field(factory=trio.Event)

    def __attrs_post_init__(self) -> None:
        self.feed = Feed("text/plain", self._on_taken)

    def _on_taken(self, taken: int) -> None:
        self.taken = taken
        self._wake()

    def _on_chunk(self, chunk: Chunk) -> None:
        if isinstance(chunk, OutputChunk):
            self.chunks.append(chunk.data)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def run(self, params: dict[str, Value]) -> None:
        self.end = await self.slot.run(Job(params, feeds={self.name: self.feed}), self._on_chunk)
        self._wake()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    async def ended(self) -> RunResult:
        await self.until(lambda: self.end is not None)
        assert self.end is not None
        return self.end


@attrs.define(eq=False)
class Room:
    """Slots that are served."""

    slots: list[Slot]
    nursery: trio.Nursery
    _changed: trio.Event = attrs.field(factory=trio.Event)

    def note(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def start(self, index: int = 0, name: str = "audio", **params: Value) -> Hearing:
        while not self.slots[index].free:
            await self._changed.wait()
        hearing = Hearing(self.slots[index], name)
        self.nursery.start_soon(hearing.run, params)
        return hearing


@asynccontextmanager
async def serving(*slots: Slot) -> AsyncIterator[Room]:
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            room = Room(list(slots), nursery)
            for slot in slots:
                slot.on_change = room.note
                nursery.start_soon(slot.serve)
            yield room
            nursery.cancel_scope.cancel()


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The options of engine `function` that serve `SOURCE`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "live_module.py").write_text(textwrap.dedent(SOURCE))
    return parse_options(find_engine("function").OPTIONS, ["call=live_module:call"])


@pytest.fixture(params=["process", "thread"])
def slot(request: pytest.FixtureRequest, call: dict[str, Any]) -> Slot:
    """A slot of each kind. Its grace is longer than a test may take: whatever needs force fails."""
    if request.param == "thread":
        return ThreadSlot(0, partial(FunctionEngine, call), cancel_grace_s=10 * PATIENCE_S)
    return ProcessSlot(0, EngineHost("function", call, cancel_grace_s=10 * PATIENCE_S))


@pytest.mark.trio
async def test_an_engine_reads_what_comes_and_says_what_it_has_taken(slot: Slot) -> None:
    async with serving(slot) as room:
        early = await room.start()
        early.feed.add("é".encode()[:1], last=False)  # half a character
        await early.until(lambda: early.taken == 1)
        assert early.chunks == []
        early.feed.add("é".encode()[1:] + b"a", last=False)
        await early.until(lambda: early.chunks == ["éa"])
        early.feed.add(b"", last=False)
        early.feed.add(b"b", last=True)
        assert (await early.ended()).outcome == "completed"
        assert early.chunks == ["éa", "b", "the end"]
        assert slot.capabilities is not None
        assert slot.capabilities.inputs == {"audio": InputRule(required=True, live=True)}


@pytest.mark.trio
async def test_a_cancel_wakes_an_engine_that_waits_for_its_input(slot: Slot) -> None:
    async with serving(slot) as room:
        hearing = await room.start()
        hearing.feed.add(b"a", last=False)
        await hearing.until(lambda: hearing.taken == 1)  # it waits for more
        slot.cancel()
        assert await hearing.ended() == RunResult(outcome="cancelled")
        again = await room.start()
        again.feed.add(b"b", last=True)
        await again.ended()
        assert again.chunks == ["b", "the end"]


@pytest.mark.trio
@pytest.mark.parametrize("how", ["nothing", "first"])
async def test_an_engine_need_not_read_its_input_to_the_end(how: str, slot: Slot) -> None:
    async with serving(slot) as room:
        for _ in range(2):
            hearing = await room.start(how=how)
            for _piece in range(4):
                hearing.feed.add(b"x" * 60_000, last=False)
            assert (await hearing.ended()).outcome == "completed"
            assert hearing.taken == 0
            hearing.feed.add(b"late", last=True)
        last = await room.start()
        last.feed.add(b"c", last=True)
        await last.ended()
        assert last.chunks == ["c", "the end"]


@pytest.mark.trio
async def test_a_thread_of_an_engine_waits_for_its_input_no_longer_than_the_run(slot: Slot) -> None:
    async with serving(slot) as room:
        hearing = await room.start(how="aside")
        assert (await hearing.ended()).outcome == "completed"
        join = await room.start(how="join")
        assert (await join.ended()).outcome == "completed"
        assert join.chunks == [False]


@pytest.mark.trio
async def test_what_a_run_took_is_not_taken_for_what_the_next_one_took(call: dict[str, Any]) -> None:
    slot = ProcessSlot(0, EngineHost("function", call))
    async with serving(slot) as room:
        await (await room.start(how="nothing")).ended()
        hearing = await room.start()
        slot.on_ask(1, "audio", 100)  # the thread of an engine was late
        assert (hearing.feed.taken, slot.asks) == (0, None)
        hearing.feed.add(b"a", last=True)
        await hearing.ended()


@pytest.mark.trio
async def test_a_process_that_ends_in_mid_input_is_followed_by_one_that_reads_from_the_beginning(
    call: dict[str, Any],
) -> None:
    slot = ProcessSlot(0, EngineHost("function", call))
    async with serving(slot) as room:
        for how in ("exit", "all"):
            hearing = await room.start(how=how)
            hearing.feed.add(b"ab", last=False)
            if how == "all":
                await hearing.until(lambda hearing=hearing: hearing.taken == 2)  # type: ignore[misc]
                assert slot.host.child is not None
                os.kill(slot.host.child.pid, signal.SIGKILL)
            end = await hearing.ended()
            assert (end.outcome, end.retryable) == ("failed", True)
            hearing.feed.add(b"c", last=True)
        last = await room.start()
        last.feed.add(b"abc", last=True)
        await last.ended()
        assert last.chunks == ["abc", "the end"]


@pytest.mark.trio
@pytest.mark.parametrize("text", [b"\xff\xfe", b"ab\xc3"])
async def test_text_that_is_none_fails_its_run_in_words(text: bytes, slot: Slot) -> None:
    async with serving(slot) as room:
        hearing = await room.start()
        hearing.feed.add(text, last=True)
        end = await hearing.ended()
        assert (end.outcome, end.code) == ("failed", "input_mismatch")
        assert "not UTF-8" in end.message


def mock_seats(count: int, **more: Any) -> list[Slot]:
    options = parse_options(find_engine("mock").OPTIONS, ["shared=true", "speed=0"])
    host = EngineHost("mock", options, shared=True, **more)
    return [ProcessSlot(index, host) for index in range(count)]


@pytest.mark.trio
async def test_seats_read_their_own_inputs_side_by_side() -> None:
    async with serving(*mock_seats(3)) as room:
        hearings = [await room.start(index, "file", text="x", output="text") for index in range(3)]
        parts = {index: bytes([index]) * 70_000 for index in range(3)}
        for _ in range(3):
            for index, hearing in enumerate(hearings):
                hearing.feed.add(parts[index], last=False)
        await hearings[1].until(lambda: hearings[1].taken == 210_000)
        room.slots[1].cancel()
        assert (await hearings[1].ended()).outcome == "cancelled"
        for index in (0, 2):
            hearings[index].feed.add(b"", last=True)
            assert (await hearings[index].ended()).outcome == "completed"
            digest = hashlib.sha256(parts[index] * 3).hexdigest()
            told = {"file": {"media_type": "text/plain", "size": 210_000, "sha256": digest}}
            assert hearings[index].chunks == [told, "x"]


@pytest.mark.trio
async def test_a_seat_that_waits_for_its_feeder_is_not_a_hung_one_but_a_hung_one_beside_it_is() -> None:
    stall_s = 2.0
    async with serving(*mock_seats(2, stall_timeout_s=stall_s)) as room:
        waiting = await room.start(0, "file", text="x", output="text")
        waiting.feed.add(b"a", last=False)
        await waiting.until(lambda: waiting.taken == 1)
        with trio.move_on_after(2 * stall_s):  # as long as it takes to call a process hung, and more
            await waiting.ended()
        assert waiting.end is None
        waiting.feed.add(b"b", last=False)
        await waiting.until(lambda: waiting.taken == 2)
        hung = await room.start(1, "file", text="x", fail={"how": "hang"})
        hung.feed.add(b"", last=True)
        for each in (waiting, hung):
            assert "sent nothing for 2 s" in (await each.ended()).message


# -- what an engine sees ---------------------------------------------------------------------------------------------


@given(st.text(), st.lists(st.integers(1, 5), max_size=20), st.booleans())
def test_its_text_is_that_of_its_bytes_however_they_are_cut(text: str, sizes: list[int], is_live: bool) -> None:
    data = text.encode()
    asked: list[int] = []
    live = LiveInput("text/plain", asked.append)
    at = 0
    for size in sizes:
        live.feed(data[at : at + size])
        at += size
    live.feed(data[at:], last=True)
    given_input = live if is_live else EngineInput(data, "text/plain")
    assert "".join(given_input.text()) == text
    if is_live:
        assert asked == sorted(asked)
        assert asked[-1] == len(data)
        assert list(live) == []  # it stays at its end


def test_a_stop_is_seen_before_what_has_come() -> None:
    live = LiveInput("text/plain")
    live.feed(b"a")
    assert next(live) == b"a"
    live.feed(b"b")
    live.stop()
    for _ in range(2):
        with pytest.raises(RunStopped):
            next(live)
    assert issubclass(RunStopped, EngineError)  # so no traceback is printed
