"""Slot processes and slot threads: what they make, and what is left when one crashes, hangs or is orphaned."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from gpuworker.engines.base import (
    AudioChunk,
    Chunk,
    Engine,
    FormatChunk,
    OptionValue,
    OutputChunk,
    RequestContext,
    VideoChunk,
)
from gpuworker.engines.catalog import find_engine, parse_options
from gpuworker.engines.function.engine import FunctionEngine
from gpuworker.engines.mock import MockEngine, Tune, tune_key
from gpuworker.slots.process_slot import CANCEL_GRACE_S, EngineHost, ProcessSlot
from gpuworker.slots.run_engine import RunResult
from gpuworker.slots.slot import Job, Slot
from gpuworker.slots.thread_slot import ThreadSlot
from gpuworker.speaking.speaking import with_live_text
from protocol.wire.structs import VideoFormat
from protocol.wire.validators import Value
from tests.gpuworker.engines.engine_package import NAME, install_engine

#: A process starts in 0.2 s; a loaded machine takes its time.
PATIENCE_S = 20


class Bench:
    """A slot that is served, and how its `ready` changed."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.changes: list[bool] = []
        self._changed = trio.lowlevel.ParkingLot()
        slot.on_change = self._note

    def _note(self) -> None:
        if not self.changes or self.changes[-1] != self.slot.ready:
            self.changes.append(self.slot.ready)
        self._changed.unpark_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.park()

    async def run(
        self, params: dict[str, Value], emit: Callable[[Chunk], None] = lambda _: None, request_id: str = ""
    ) -> RunResult:
        await self.until(lambda: self.slot.free)
        return await self.slot.run(Job(params, context=RequestContext(request_id=request_id)), emit)


@asynccontextmanager
async def serving(slot: Slot) -> AsyncIterator[Bench]:
    bench = Bench(slot)
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(slot.serve)
            yield bench
            nursery.cancel_scope.cancel()


def options(engine: str, *given: str) -> dict[str, OptionValue]:
    return parse_options(find_engine(engine).OPTIONS, given)


def mock_slot(*given: str, **more: Any) -> ProcessSlot:
    return ProcessSlot(0, EngineHost("mock", options("mock", "speed=0", *given), **more))


@pytest.fixture
def function_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ProcessSlot]:
    """A slot that serves `call` of a module with this source."""
    monkeypatch.chdir(tmp_path)

    def make(source: str, *given: str, **more: Any) -> ProcessSlot:
        (tmp_path / "served_module.py").write_text(textwrap.dedent(source))
        return ProcessSlot(0, EngineHost("function", options("function", "call=served_module:call", *given), **more))

    return make


def pcm(chunks: list[Chunk]) -> bytes:
    return b"".join(chunk.pcm for chunk in chunks if isinstance(chunk, AudioChunk))


@pytest.mark.trio
async def test_a_slot_process_streams_what_the_engine_makes_and_runs_one_request_after_another() -> None:
    async with serving(mock_slot()) as bench:
        for text in ("one", "two"):
            chunks: list[Chunk] = []
            end = await bench.run({"text": text, "duration_s": 1.0}, chunks.append)
            assert end == RunResult(outcome="completed")
            assert isinstance(chunks[0], FormatChunk)
            assert len(chunks) == 11
            assert pcm(chunks) == Tune(24_000).pcm(tune_key(text, 0), 0, 24_000)
        assert bench.slot.capabilities == with_live_text(_loaded_mock().capabilities)


@pytest.mark.trio
async def test_a_slot_process_streams_pictures_with_their_format() -> None:
    async with serving(mock_slot()) as bench:
        chunks: list[Chunk] = []
        end = await bench.run({"text": "x", "output": "video", "duration_s": 2, "chunk_ms": 40}, chunks.append)
        assert end == RunResult(outcome="completed")
        assert chunks[0] == FormatChunk(None, VideoFormat(width=16, height=16, fps=25.0))
        made = [(chunk.pts, chunk.key) for chunk in chunks if isinstance(chunk, VideoChunk)]
        assert made == [(number * 3600, number in (0, 25)) for number in range(50)]


def _loaded_mock() -> MockEngine:
    engine = MockEngine(options("mock", "speed=0"))
    engine.load()
    return engine


@pytest.mark.trio
async def test_an_engine_that_raises_fails_its_request_alone_and_keeps_its_process() -> None:
    async with serving(mock_slot()) as bench:
        end = await bench.run({"text": "x", "fail": {"how": "raise", "at": 2, "retryable": True}})
        assert (end.outcome, end.code, end.retryable) == ("failed", "engine_failed", True)
        assert (await bench.run({"text": "x"})).outcome == "completed"
        assert bench.changes == [True]


@pytest.mark.trio
async def test_a_process_that_exits_fails_its_request_with_its_exit_code_and_is_started_again() -> None:
    async with serving(mock_slot()) as bench:
        chunks: list[Chunk] = []
        end = await bench.run({"text": "x", "fail": {"how": "exit", "at": 2, "code": 7}}, chunks.append)
        assert (end.outcome, end.code, end.retryable) == ("failed", "engine_failed", True)
        assert "exit code 7" in end.message
        assert len(chunks) == 3
        assert not bench.slot.ready  # told before the request failed
        assert (await bench.run({"text": "x"})).outcome == "completed"
        assert bench.changes == [True, False, True]


@pytest.mark.trio
async def test_a_process_that_is_killed_fails_its_request_with_the_signals_name() -> None:
    async with serving(mock_slot()) as bench:

        def kill(chunk: Chunk) -> None:
            assert isinstance(bench.slot, ProcessSlot)
            assert bench.slot.host.child is not None
            os.kill(bench.slot.host.child.pid, signal.SIGKILL)

        end = await bench.run({"text": "x", "speed": 1}, kill)
        assert "SIGKILL" in end.message
        assert (await bench.run({"text": "x"})).outcome == "completed"


@pytest.mark.trio
async def test_a_crash_in_c_is_reported_by_its_signal_and_the_log_has_where_in_python_it_was(
    function_slot: Callable[..., ProcessSlot], caplog: pytest.LogCaptureFixture
) -> None:
    slot = function_slot("import ctypes\ndef call():\n    ctypes.string_at(0)\n")
    async with serving(slot) as bench:
        with caplog.at_level("INFO", "gpuworker.slot"):
            end = await bench.run({})
        assert "SIGSEGV" in end.message
        assert "served_module.py" not in end.message, "a client is not told where files of the machine lie"
        assert any("served_module.py" in line for line in caplog.messages)


@pytest.mark.trio
@pytest.mark.parametrize("ends", ["os._exit(3)", "os.kill(os.getpid(), 9)", "ctypes.string_at(0)"])
async def test_nothing_that_one_request_printed_is_in_the_failure_of_another(
    function_slot: Callable[..., ProcessSlot], caplog: pytest.LogCaptureFixture, ends: str
) -> None:
    source = (
        "import ctypes, os, sys\n"
        "def call(text):\n"
        "    print('speaking:', text, flush=True)\n"
        "    print('noted:', text, file=sys.stderr, flush=True)\n"
        "    if text == 'raise':\n"
        "        raise ValueError(text)\n"
        f"    if text == 'crash':\n        {ends}\n"
    )
    async with serving(function_slot(source)) as bench:
        with caplog.at_level("INFO", "gpuworker.slot"):
            assert (await bench.run({"text": "the secret of alice"}, request_id="aaaaaaaaaa")).outcome == "completed"
            assert (await bench.run({"text": "raise"}, request_id="bbbbbbbbbb")).message == "ValueError: raise"
            crash = await bench.run({"text": "crash"}, request_id="cccccccccc")
        assert (crash.outcome, crash.details) == ("failed", {})
        for private in ("alice", "secret", "speaking", "noted", "Traceback", "ValueError", ".py", "/"):
            assert private not in crash.message
        assert "the worker's log" in crash.message
        logged = [line for line in caplog.messages if "speaking: the secret of alice" in line]
        assert logged == [f"{bench.slot.name}, request aaaaaaaa | speaking: the secret of alice"]


@pytest.mark.trio
async def test_a_cancel_stops_the_engine_before_its_next_chunk_and_the_next_request_is_whole() -> None:
    async with serving(mock_slot()) as bench:
        chunks: list[Chunk] = []

        def take(chunk: Chunk) -> None:
            chunks.append(chunk)
            if len(chunks) == 3:
                bench.slot.cancel()

        began = trio.current_time()
        end = await bench.run({"text": "x", "speed": 1, "duration_s": 60}, take)
        assert end.outcome == "cancelled"
        assert trio.current_time() - began < 2
        assert len(chunks) <= 4
        chunks.clear()
        assert (await bench.run({"text": "y", "duration_s": 1.0}, chunks.append)).outcome == "completed"
        assert pcm(chunks) == Tune(24_000).pcm(tune_key("y", 0), 0, 24_000)
        assert bench.changes == [True]  # the same process


@pytest.mark.trio
async def test_a_hang_is_killed_after_the_grace_and_the_slot_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    slot = mock_slot(cancel_grace_s=0.3)

    async def cancel_in_the_hang() -> None:
        await bench.until(lambda: slot.busy)
        while not any("hanging" in line for line in caplog.messages):  # noqa: ASYNC110 - stderr makes no event here
            await trio.sleep(0.01)
        slot.cancel()

    caplog.set_level("INFO", "gpuworker.slot")
    async with serving(slot) as bench, trio.open_nursery() as nursery:
        nursery.start_soon(cancel_in_the_hang)
        began = trio.current_time()
        end = await bench.run({"text": "x", "fail": {"how": "hang", "at": 1}})
        assert end.outcome == "cancelled"
        assert trio.current_time() - began < 5
        assert (await bench.run({"text": "x"})).outcome == "completed"
        assert bench.changes == [True, False, True]


@pytest.mark.trio
async def test_what_an_engine_and_its_libraries_print_does_not_disturb_its_output(
    function_slot: Callable[..., ProcessSlot], caplog: pytest.LogCaptureFixture
) -> None:
    slot = function_slot(
        """
        import os, subprocess, sys
        def call(n: int):
            for i in range(n):
                print("python noise", i)
                os.write(1, b"C noise\\n" * 100)
                subprocess.run(["echo", "noise of a program"])
                yield i
        """
    )
    chunks: list[Chunk] = []
    with caplog.at_level("INFO", "gpuworker.slot"):
        async with serving(slot) as bench:
            assert (await bench.run({"n": 5}, chunks.append)).outcome == "completed"
    assert chunks == [FormatChunk(None), *map(OutputChunk, range(5))]
    assert "slot 0 | C noise" in caplog.text


@pytest.mark.trio
async def test_an_engine_that_asks_for_it_is_started_again_after_its_failure(
    function_slot: Callable[..., ProcessSlot],
) -> None:
    slot = function_slot(
        """
        import os
        from gpuworker.engines.base import EngineError
        def call(bad: bool):
            if bad:
                raise EngineError("CUDA out of memory", retryable=True, restart=True)
            return os.getpid()
        """
    )
    async with serving(slot) as bench:
        pids: list[Chunk] = []
        await bench.run({"bad": False}, pids.append)
        end = await bench.run({"bad": True})
        assert (end.outcome, end.retryable, bench.slot.ready) == ("failed", True, False)
        await bench.run({"bad": False}, pids.append)
        assert pids[1] != pids[3]
        assert bench.changes == [True, False, True]


@pytest.mark.trio
async def test_an_engines_process_has_the_environment_of_its_worker_without_the_ways_to_its_token(
    function_slot: Callable[..., ProcessSlot], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RELAY_TOKEN", "RELAY_TOKEN_FILE", "CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET", "HF_TOKEN"):
        monkeypatch.setenv(name, "secret")
    chunks: list[Chunk] = []
    source = "import os\ndef call():\n    return [name for name, value in os.environ.items() if value == 'secret']\n"
    async with serving(function_slot(source)) as bench:
        assert (await bench.run({}, chunks.append)).outcome == "completed"
    assert chunks[-1] == OutputChunk(["HF_TOKEN"])


@pytest.mark.trio
async def test_a_load_that_fails_or_never_ends_is_told_and_tried_again(
    function_slot: Callable[..., ProcessSlot],
) -> None:
    async with serving(mock_slot("load_fails=true")) as bench:
        await bench.until(lambda: bench.slot.load_fault != "")
        assert "load_fails=true" in bench.slot.load_fault
    async with serving(mock_slot("load_s=600", load_timeout_s=0.5)) as bench:
        await bench.until(lambda: bench.slot.load_fault != "")
        assert "not loaded within 0.5 s" in bench.slot.load_fault
    async with serving(function_slot("raise RuntimeError('no GPU')")) as bench:
        await bench.until(lambda: bench.slot.load_fault != "")
        assert "RuntimeError: no GPU" in bench.slot.load_fault
    async with serving(function_slot("import os\nos._exit(9)")) as bench:
        await bench.until(lambda: bench.slot.load_fault != "")
        assert "exit code 9" in bench.slot.load_fault
    first = Path("second_time")
    source = (
        f"import os\nif not os.path.exists('{first}'):\n    open('{first}', 'w').close()\n    raise OSError('busy')\n"
    )
    async with serving(function_slot(source + "def call():\n    return 1\n")) as bench:
        assert (await bench.run({})).outcome == "completed"


@pytest.mark.trio
async def test_a_load_that_gives_signs_of_life_may_take_longer_and_one_that_falls_silent_may_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = """
        import pathlib, time
        from gpuworker.engines.base import *

        class Made(Engine):
            OPTIONS = {"signs": Option(kind=int)}
            capabilities = Capabilities()

            def load(self):
                for _ in range(self.options["signs"]):
                    self.report(ProgressChunk("loading", 0.5, "fetching"))
                    time.sleep(0.5)
                self.report(ProgressChunk("loading", 1.0, "fetched"))
                time.sleep(0 if self.options["signs"] else 600)

            def generate(self, params, inputs):
                yield OutputChunk(None)
    """
    install_engine(tmp_path, monkeypatch, source)

    def slot(signs: int) -> ProcessSlot:
        return ProcessSlot(0, EngineHost(NAME, {"signs": signs}, load_timeout_s=3.0))

    async with serving(slot(10)) as bench:
        await bench.until(lambda: bench.slot.ready or bench.slot.load_fault != "")
        assert bench.slot.load_fault == ""
    async with serving(slot(0)) as bench:
        await bench.until(lambda: bench.slot.load_fault != "")
        assert "not loaded within 3 s" in bench.slot.load_fault


def _alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def _ignored_signals(pid: int) -> int:
    """A bit each, the lowest for signal 1 (proc(5))."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("SigIgn:")[2].split()[0], 16)


async def _until_dead(pid: int) -> None:
    with trio.fail_after(5):
        while _alive(pid):  # noqa: ASYNC110 - another process's end makes no event here
            await trio.sleep(0.02)


@pytest.mark.trio
async def test_the_slots_process_and_what_it_started_end_with_the_slot(
    function_slot: Callable[..., ProcessSlot],
) -> None:
    slot = function_slot(
        """
        import os, subprocess
        def call():
            yield [os.getpid(), subprocess.Popen(["sleep", "600"]).pid]
            import time
            time.sleep(600)
        """
    )
    pids: list[int] = []

    def take(chunk: Chunk) -> None:
        if isinstance(chunk, OutputChunk):
            pids.extend(chunk.data)

    async with serving(slot) as bench, trio.open_nursery() as nursery:
        nursery.start_soon(bench.run, {}, take)
        while not pids:  # noqa: ASYNC110 - chunks make no event here
            await trio.sleep(0.02)
        nursery.cancel_scope.cancel()
    for pid in pids:
        await _until_dead(pid)


@pytest.mark.trio
async def test_a_slots_process_dies_with_a_parent_that_was_killed_and_ignores_what_the_terminal_sends() -> None:
    parent = textwrap.dedent(
        """
        import trio
        from gpuworker.slots.process_slot import EngineHost, ProcessSlot
        from gpuworker.slots.slot import Job
        async def main():
            slot = ProcessSlot(0, EngineHost("mock", {"speed": 0.0}))
            ready = trio.Event()
            slot.on_change = lambda: slot.ready and ready.set()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(slot.serve)
                await ready.wait()
                print(slot.host.child.pid, flush=True)
                await slot.run(Job({"text": "x", "fail": {"how": "hang"}}), lambda chunk: None)
        trio.run(main)
        """
    )
    async with trio.open_nursery() as nursery:
        process = await nursery.start(
            partial(trio.run_process, [sys.executable, "-c", parent], stdout=subprocess.PIPE, check=False)
        )
        child = int(await process.stdout.receive_some())
        ignored = _ignored_signals(child)
        assert all(ignored >> (number - 1) & 1 for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        process.kill()
    await _until_dead(child)


@pytest.mark.trio
async def test_a_slot_process_waits_when_nobody_reads_what_it_makes(function_slot: Callable[..., ProcessSlot]) -> None:
    """What a slot runs ahead of the worker is the socket's buffer and no more."""
    slot = function_slot(
        """
        def call():
            for i in range(100):
                open("made", "w").write(str(i))
                yield bytes(1_000_000)
        """
    )
    made = Path("made")
    async with serving(slot) as bench:

        def stall(chunk: Chunk) -> None:
            if isinstance(chunk, OutputChunk):
                threading.Event().wait(0.3)  # the worker's own loop stands still
                bench.slot.cancel()

        assert (await bench.run({}, stall)).outcome == "cancelled"
        assert int(await trio.Path(made).read_text()) < 5


# -- threads -----------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_thread_slot_runs_an_engine_all_in_one_thread_of_this_process() -> None:
    threads = set()

    class Noting(MockEngine):
        def load(self) -> None:
            threads.add(threading.current_thread().name)
            super().load()

        def generate(self, *given: Any) -> Any:
            threads.add(threading.current_thread().name)
            return super().generate(*given)

    def make() -> Engine:
        return Noting(options("mock", "speed=0"))

    async with serving(ThreadSlot(3, make)) as bench:
        for _ in range(2):
            chunks: list[Chunk] = []
            assert (await bench.run({"text": "x", "duration_s": 0.5}, chunks.append)).outcome == "completed"
            assert len(chunks) == 6
    assert threads == {"gpuworker-3"}


@pytest.mark.trio
async def test_a_thread_that_stops_when_told_keeps_its_slot_and_one_that_does_not_loses_it_for_a_while() -> None:
    inside, release = threading.Event(), threading.Event()

    def call(deaf: bool, cancelled: Callable[[], bool]) -> Any:
        yield "first"
        inside.set()
        while not (release.is_set() if deaf else cancelled()):
            threading.Event().wait(0.01)
        yield "late"

    slot = ThreadSlot(0, lambda: FunctionEngine({}, call), cancel_grace_s=0.2)
    chunks: list[Chunk] = []

    async def cancel() -> None:
        await trio.to_thread.run_sync(inside.wait)
        inside.clear()
        slot.cancel()

    async with serving(slot) as bench, trio.open_nursery() as nursery:
        nursery.start_soon(cancel)
        assert (await bench.run({"deaf": False}, chunks.append)).outcome == "cancelled"
        assert slot.free
        nursery.start_soon(cancel)
        assert (await bench.run({"deaf": True}, chunks.append)).outcome == "cancelled"
        assert not slot.ready
        release.set()
        await bench.until(lambda: slot.free)
        assert chunks == [FormatChunk(None), OutputChunk("first")] * 2
        assert bench.changes == [True, False, True]


@pytest.mark.trio
async def test_a_thread_slot_tells_why_its_engine_cannot_be_loaded() -> None:
    def make() -> Engine:
        raise RuntimeError("no model")

    async with serving(ThreadSlot(0, make)) as bench:
        await bench.until(lambda: bench.slot.load_fault != "")
        assert bench.slot.load_fault == "RuntimeError: no model"


@pytest.mark.trio
async def test_a_thread_whose_run_ends_as_its_grace_does_keeps_its_slot(autojump_clock: trio.testing.MockClock) -> None:
    slot = ThreadSlot(0, MockEngine)
    for _ in range(20):  # Trio runs what is due at the same time in any order
        slot.ready = True
        ends: list[RunResult] = []

        async def run(ends: list[RunResult] = ends) -> None:
            ends.append(await slot.run(Job({"text": "a"}), lambda _chunk: None))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await trio.testing.wait_all_tasks_blocked()
            slot.cancel()
            await trio.sleep(CANCEL_GRACE_S)
            if slot.stopping is not None:
                slot.stopping.finish(RunResult(outcome="completed"))
        assert slot.free == (ends == [RunResult(outcome="completed")])
