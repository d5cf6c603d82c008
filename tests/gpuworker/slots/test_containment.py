"""One attempt never ends the worker: what the wire cannot carry, what nobody can check, what comes a tick late."""

import logging
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from gpuworker import executor as work_module
from gpuworker.attempt import Attempt
from gpuworker.engines.base import (
    AudioChunk,
    Capabilities,
    Chunk,
    EngineError,
    FormatChunk,
    MarkChunk,
    OutputChunk,
    ProgressChunk,
)
from gpuworker.engines.catalog import find_engine, parse_options
from gpuworker.engines.function.engine import FunctionEngine
from gpuworker.executor import Executor
from gpuworker.slots.process_slot import EngineHost, ProcessSlot
from gpuworker.slots.run_engine import RunResult, run_engine
from gpuworker.slots.slot import Job, Slot
from gpuworker.slots.thread_slot import ThreadSlot
from protocol.log_lines import LineFormatter
from protocol.wire.codec import MAX_VALUES, decode
from protocol.wire.errors import EncodeError
from protocol.wire.frames import Cancelled, Completed, Failed, Frame, Output, Started
from protocol.wire.messages import FROM_WORKER, Cancel
from protocol.wire.structs import KIB
from tests.support.scripted_relay import FORMAT, ID, OTHER, Desk, ScriptedSlot, assign, run_with, script
from tests.support.until import until

PATIENCE_S = 20
Emit = Callable[[Chunk], None]
SURROGATE = "caf\udce9.wav"


def frames_of(attempt: Attempt) -> list[Frame]:
    frames = []
    while attempt.has_frames:
        frame = decode(attempt.next_frame(), FROM_WORKER)
        assert isinstance(frame, Frame)
        frames.append(frame)
    return frames


def many_values(count: int) -> dict[str, Any]:
    """A map that adds so many values to a message, its keys and arrays among them."""
    rows = 17
    left = count - 2 * rows
    return {f"row {number}": [0] * (left // rows + (number < left % rows)) for number in range(rows)}


#: Just under each limit of a message: its envelope does not fit beside them any more.
TOO_LARGE = {
    "text": "x" * (KIB * KIB - 40),
    "nested, by bytes": {"rows": [list(range(1000, 1010))] * 2, "pad": b"x" * (64 * KIB - 130)},
    "nested, by values": many_values(MAX_VALUES - 4),
}


def function_slot(kind: str, folder: Path, source: str, **host: Any) -> Slot:
    source = textwrap.dedent(source)
    if kind == "thread":
        space: dict[str, Any] = {}
        exec(source, space)
        return ThreadSlot(0, lambda: FunctionEngine({}, space["call"]))
    (folder / "contained_module.py").write_text(source)
    options = parse_options(find_engine("function").OPTIONS, ("call=contained_module:call",))
    return ProcessSlot(0, EngineHost("function", options, **host))


# -- what the wire cannot carry ----------------------------------------------------------------------------------


@pytest.mark.trio
@pytest.mark.parametrize("kind", ["process", "thread"])
async def test_an_output_too_large_for_a_message_fails_its_request_and_the_slot_runs_the_next(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    slot = function_slot(kind, tmp_path, "def call(size: int):\n    return 'x' * size\n")

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign(params={"size": KIB * KIB - 40}))
        last = (await desk.frames())[-1]
        assert isinstance(last, Failed)
        assert (last.code, last.retryable) == ("engine_failed", False)
        assert "the limit is 1048576" in last.message
        desk.send(assign(OTHER, params={"size": KIB * KIB - KIB}))
        _, output, last = await desk.frames()
        assert isinstance(output, Output)
        assert len(output.data) == KIB * KIB - KIB
        assert isinstance(last, Completed)

    with trio.fail_after(PATIENCE_S):
        await run_with(script(relay), slots=(slot,))


@pytest.mark.parametrize("value", TOO_LARGE.values(), ids=TOO_LARGE)
def test_an_engine_learns_that_an_output_is_too_large_whatever_its_envelope(value: Any) -> None:
    engine = FunctionEngine({}, lambda: value)
    engine.load()
    chunks: list[Chunk] = []
    end = run_engine(engine, {}, {}, lambda: False, chunks.append)
    assert (end.outcome, end.code) == ("failed", "engine_failed")
    assert "cannot be sent" in end.message
    assert chunks == [FormatChunk(None)]


@pytest.mark.parametrize(
    ("text_end", "sample"), [(-1, 0), (0, -1), (1.5, 0), (0, "7"), (True, 0), (0, None), (2**60, 0)]
)
def test_an_engine_learns_that_a_mark_cannot_be_sent(text_end: Any, sample: Any) -> None:
    engine = FunctionEngine({}, lambda: iter([MarkChunk(3, 4), MarkChunk(text_end, sample)]))
    engine.load()
    chunks: list[Chunk] = []
    end = run_engine(engine, {}, {}, lambda: False, chunks.append)
    assert (end.outcome, end.code) == ("failed", "engine_failed")
    assert end.message.startswith("the engine yielded a mark with a number that ")
    assert chunks == [FormatChunk(None), MarkChunk(3, 4)]


def test_a_mark_may_have_the_integers_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    engine = FunctionEngine({}, lambda: iter([MarkChunk(numpy.int64(3), numpy.int32(4))]))
    engine.load()
    chunks: list[Chunk] = []
    assert run_engine(engine, {}, {}, lambda: False, chunks.append).outcome == "completed"
    assert [(type(each.text_end), each) for each in chunks if isinstance(each, MarkChunk)] == [(int, MarkChunk(3, 4))]


@pytest.mark.trio
@pytest.mark.parametrize(
    "chunk",
    [*map(OutputChunk, TOO_LARGE.values()), OutputChunk(object()), AudioChunk(bytearray(4)), FormatChunk(3)],  # type: ignore[arg-type]
    ids=[*TOO_LARGE, "no msgpack", "audio that is no bytes", "no format"],
)
async def test_a_chunk_that_no_frame_can_hold_fails_the_attempt_and_stops_its_engine(chunk: Chunk) -> None:
    attempt = Attempt(assign(), reproducible=False)
    stops: list[str] = []
    attempt.stop_engine = lambda: stops.append("stop")
    attempt.add_chunk(FormatChunk(FORMAT))
    attempt.add_chunk(chunk)
    attempt.add_chunk(AudioChunk(b"\0\0"))  # on its way while the engine stops
    assert stops == ["stop"]
    assert (
        attempt.finish(RunResult(outcome="cancelled")).code == "engine_failed"
    )  # the slot calls a run it stopped cancelled
    started, last = frames_of(attempt)
    assert isinstance(started, Started)
    assert isinstance(last, Failed)
    assert last.message.startswith("the engine's output cannot be sent: ")


@pytest.mark.trio
@pytest.mark.parametrize("kind", ["process", "thread"])
@pytest.mark.parametrize("fault", [EncodeError("too large"), RuntimeError("a bug")], ids=["EncodeError", "any error"])
async def test_what_takes_the_chunks_and_breaks_stops_that_run_and_not_the_slot(
    kind: str, fault: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = """
        def call(cancelled, n: int = 0):
            yield "first"
            while n and not cancelled():
                yield n
        """
    slot = function_slot(kind, tmp_path, source)
    slot_ready = trio.Event()
    slot.on_change = lambda: slot_ready.set() if slot.ready else None

    def broken(chunk: Chunk) -> None:
        raise fault

    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(slot.serve)
            await slot_ready.wait()
            end = await slot.run(Job({"n": 1}), broken)
            assert (end.outcome, end.code) == ("failed", "engine_failed")
            assert str(fault) in end.message
            assert slot.free  # it stopped when told: neither killed nor given up
            chunks: list[Chunk] = []
            assert (await slot.run(Job({}), chunks.append)).outcome == "completed"
            assert chunks == [FormatChunk(None), OutputChunk("first")]
            nursery.cancel_scope.cancel()


# -- ends that the wire cannot carry -----------------------------------------------------------------------------


@pytest.mark.trio
@pytest.mark.parametrize("from_seq", [0, 5])
async def test_details_too_large_for_a_message_are_left_out_wherever_the_last_frame_stands(from_seq: int) -> None:
    attempt = Attempt(assign(attempt=2, from_seq=from_seq), reproducible=True)
    details = {"trace": "x" * (96 * KIB)}
    attempt.finish(RunResult(outcome="failed", code="model_not_loaded", message="no", details=details, retryable=True))
    (last,) = frames_of(attempt)
    assert isinstance(last, Failed)
    assert (last.seq, last.code, last.retryable, last.details) == (from_seq, "model_not_loaded", True, {})
    assert last.message.startswith("no (its details are left out: ")


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even its name")


@pytest.mark.trio
@pytest.mark.parametrize("kind", ["process", "thread"])
async def test_no_exception_of_an_engine_costs_it_its_slot(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = """
        from gpuworker.engines.base import EngineError, OutputChunk, ProgressChunk
        from tests.gpuworker.slots.test_containment import Unspeakable

        def call(how: str):
            if how == "file name":
                open("caf\\udce9.wav")
            if how == "engine error":
                raise EngineError("no caf\\udce9.wav")
            if how == "details":
                raise EngineError("bad", details={"what": object(), "caf\\udce9": 1})
            if how == "unspeakable":
                raise Unspeakable
            if how == "exit":
                raise SystemExit("caf\\udce9")
            if how == "output":
                yield "caf\\udce9"
            if how == "progress":
                yield ProgressChunk(message="caf\\udce9")
        """
    slot = function_slot(kind, tmp_path, source)
    changes: list[bool] = []
    ready = trio.Event()

    def note() -> None:
        changes.append(slot.ready)
        if slot.ready:
            ready.set()

    slot.on_change = note
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(slot.serve)
            await ready.wait()
            said = {}
            for how in ("file name", "engine error", "details", "unspeakable", "exit", "output"):
                end = await slot.run(Job({"how": how}), lambda _: None)
                assert (end.outcome, end.code, end.retryable) == ("failed", "engine_failed", False), how
                said[how] = end.message.encode().decode()
            chunks: list[Chunk] = []
            assert (await slot.run(Job({"how": "progress"}), chunks.append)).outcome == "completed"
            assert False not in changes[changes.index(True) :]
            nursery.cancel_scope.cancel()
    assert "FileNotFoundError: " in said["file name"]
    assert said["engine error"] == "no caf?.wav"
    assert said["details"].startswith("bad (its details are left out: ")
    assert said["unspeakable"] == "Unspeakable: (it has no readable message)"
    assert said["exit"] == "SystemExit: caf?"
    assert chunks[1] == ProgressChunk(message="caf?")


def test_ends_and_errors_hold_no_text_that_utf_8_has_no_bytes_for() -> None:
    assert EngineError(SURROGATE).message == str(EngineError(SURROGATE)) == "caf?.wav"
    assert RunResult.from_error(OSError(SURROGATE)).message == "OSError: caf?.wav"
    assert RunResult.from_error(EngineError("x", details={SURROGATE: 1})).details == {"caf?.wav": 1}


# -- neighbours in a slot ----------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_cancel_as_a_run_ends_does_not_stop_the_next_run_in_its_slot(autojump_clock: MockClock) -> None:
    slot = ScriptedSlot()
    async with trio.open_nursery() as nursery:
        work = Executor([slot], nursery)
        slot.on_change = work.changed
        late: list[bool] = []

        def cancel_late() -> None:
            first = work.attempts.get(ID)
            # The next run is in the slot, and the first has not come to its end yet: one tick, or two.
            if slot.busy and slot._run is not first_run and first is not None and not late:
                late.append(first.ended)
                work.cancel(ID, "too late")

        nursery.start_soon(slot.serve)
        while not slot.free:
            await work.change()
        work.accept(assign(), Capabilities(format=FORMAT), 10**9)
        while not slot.busy:
            await work.change()
        first_run = slot._run
        work.accept(assign(OTHER), Capabilities(format=FORMAT), 10**9)
        work.on_change = cancel_late
        while work.running:
            await work.change()
        assert late == [False]
        assert slot.cancels == 0
        assert work.attempts[ID].outcome == "cancelled"
        assert work.attempts[OTHER].outcome == "completed"
        nursery.cancel_scope.cancel()


# -- schemas and other breakage ----------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_schema_that_breaks_the_check_fails_that_attempt_and_the_worker_serves_the_next(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(schema: dict[str, Any], params: dict[str, Any], _fed: object) -> dict[str, str]:
        if params["text"] == "bad":
            raise RecursionError("a $ref to itself \udce9")
        return {}

    monkeypatch.setattr(work_module, "check_params", check)

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign(params={"text": "bad"}))
        (last,) = await desk.frames()
        assert isinstance(last, Failed)
        assert (last.code, last.retryable) == ("engine_failed", False)
        assert "schema: RecursionError: a $ref to itself ?" in last.message
        desk.send(assign(OTHER))
        assert isinstance((await desk.frames())[-1], Completed)

    await run_with(script(relay))


@pytest.mark.trio
async def test_a_slot_that_breaks_fails_its_attempt_and_the_worker_serves_the_next(autojump_clock: MockClock) -> None:
    class Broken(ScriptedSlot):
        async def _start(self, job: Job, run: Any) -> None:
            if not self.jobs:
                self.jobs.append(job)
                raise OSError("no more pipes")
            await super()._start(job, run)

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign())
        (last,) = await desk.frames()
        assert isinstance(last, Failed)
        assert (last.code, last.retryable) == ("internal", True)
        desk.send(assign(OTHER))
        assert isinstance((await desk.frames())[-1], Completed)

    await run_with(script(relay), slots=(Broken(),))


@pytest.mark.trio
async def test_the_log_tells_why_an_attempt_failed_by_its_frames(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def play(job: Job, emit: Emit) -> RunResult:
        emit(FormatChunk(FORMAT))
        emit(OutputChunk(object()))
        await trio.sleep_forever()
        raise AssertionError

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign())
        await desk.frames()

    await run_with(script(relay), slots=(ScriptedSlot(play),))
    assert "failed: engine_failed: the engine's output cannot be sent" in caplog.text


# -- what is written to the owner's terminal ---------------------------------------------------------------------

EVIL = "\x1b]0;owned\x07\r\n12:00:00 I fake\x9b2J"


def test_no_log_line_carries_a_control_character_and_no_text_makes_a_line_of_its_own() -> None:
    formatter = LineFormatter("%(levelname).1s %(message)s")
    try:
        raise RuntimeError(EVIL)
    except RuntimeError as fault:
        raised = (RuntimeError, fault, fault.__traceback__)
    record = logging.LogRecord("gpuworker", logging.INFO, __file__, 1, "cancelled: %s", (EVIL,), raised)
    first, *rest = formatter.format(record).split("\n")
    assert first == r"I cancelled: \x1b]0;owned\x07\r\n12:00:00 I fake\x9b2J"
    assert rest
    assert all(line.startswith("  | ") and line.isprintable() for line in rest)


# -- what operators are told ---------------------------------------------------------------------------------------

PRINTS = """
import os
import time

def call(text: str, end: str = ""):
    print("heard", text)
    if end == "raise":
        raise RuntimeError("cannot say " + text)
    if end == "die":
        print("dying of", text, flush=True)
        os._exit(3)
    while end == "wait":
        time.sleep(0.01)
    return forever() if end == "tell" else text

def forever():
    while True:
        time.sleep(0.01)
        yield "more"
"""


@pytest.mark.trio
@pytest.mark.parametrize("end", ["raise", "die"])
async def test_what_a_failed_attempt_printed_is_reported_and_nothing_of_another(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    slot = function_slot("process", tmp_path, PRINTS)

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign(params={"text": "alice's secret"}))
        assert isinstance((await desk.frames())[-1], Completed)
        assert not desk.reports
        desk.send(assign(OTHER, params={"text": "bob's words", "end": end}))
        while not isinstance(last := await desk.hear(), Failed):
            pass
        (report,) = desk.reports
        assert (report.request_id, report.attempt) == (OTHER, 1)
        assert "heard bob's words" in report.output
        assert ("Traceback" if end == "raise" else "dying of bob's words") in report.output
        assert "alice" not in report.output
        assert "Traceback" not in last.message
        assert "heard" not in last.message

    with trio.fail_after(PATIENCE_S):
        await run_with(script(relay), slots=(slot,))


@pytest.mark.trio
@pytest.mark.parametrize("run_timeout_s", [0.0, 0.1])
@pytest.mark.parametrize("end", ["wait", "tell"])
async def test_what_an_attempt_printed_that_is_cancelled_or_overdue_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, run_timeout_s: float
) -> None:
    """One that ends when it is asked, and one that is killed because it does not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(work_module, "RUN_TIMEOUT_MARGIN_S", 0.5)
    slot = function_slot("process", tmp_path, PRINTS, cancel_grace_s=0.3)
    assert isinstance(slot, ProcessSlot)

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign(params={"text": "words", "end": end}, run_timeout_s=run_timeout_s))
        if not run_timeout_s:
            await until(lambda: slot.host.child is not None and "words" in slot.host.child.printed)
            desk.send(Cancel(request_id=ID, reason="enough"))
        while not isinstance(await desk.hear(), Failed if run_timeout_s else Cancelled):
            pass
        (report,) = desk.reports
        assert "heard words" in report.output

    with trio.fail_after(PATIENCE_S):
        await run_with(script(relay), slots=(slot,))


@pytest.mark.trio
async def test_the_traceback_of_a_thread_is_reported(tmp_path: Path) -> None:
    slot = function_slot("thread", tmp_path, PRINTS)

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign(params={"text": "words", "end": "raise"}))
        assert isinstance((await desk.frames())[-1], Failed)
        assert "in call" in desk.reports[0].output
        assert "cannot say words" in desk.reports[0].output

    with trio.fail_after(PATIENCE_S):
        await run_with(script(relay), slots=(slot,))
