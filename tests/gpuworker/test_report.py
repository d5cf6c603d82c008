"""`Engine.report`: progress from inside work that is long before its next chunk."""

import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from gpuworker.engines.base import (
    AudioChunk,
    Capabilities,
    Chunk,
    Engine,
    EngineInput,
    FormatChunk,
    ProgressChunk,
)
from gpuworker.slots.process_slot import EngineHost, ProcessSlot
from gpuworker.slots.run_engine import run_engine
from gpuworker.slots.slot import Job, Slot
from gpuworker.slots.thread_slot import ThreadSlot
from protocol.wire.frames import MAX_TEXT_CHARS
from protocol.wire.structs import AudioFormat
from protocol.wire.validators import Value
from tests.gpuworker.engines.engine_package import NAME, install_engine

MONO = AudioFormat(sample_rate=24_000)
PATIENCE_S = 20


class Reporting(Engine):
    """Reports steps before each of two chunks; `late` tells its format only before the second report."""

    late = False

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(format=None if self.late else MONO, late_format=self.late)

    def load(self) -> None:
        pass

    def generate(self, params: dict[str, Value], inputs: Any) -> Iterator[Chunk]:
        self.report(ProgressChunk("generating", 0.25))
        if self.late:
            yield FormatChunk(MONO)
        self.report(ProgressChunk("dancing", 7.0, "x" * 9_000))
        yield AudioChunk(b"\0\0")
        self.report(ProgressChunk("encoding", 0.75))
        yield AudioChunk(b"\1\0")


class ReportingLate(Reporting):
    late = True


def test_a_report_goes_out_at_once_and_is_held_to_what_the_wire_takes() -> None:
    made: list[Chunk] = []
    assert run_engine(Reporting(), {}, {}, lambda: False, made.append).outcome == "completed"
    assert made[0] == FormatChunk(MONO)
    assert made[1] == ProgressChunk("generating", 0.25)
    assert isinstance(made[2], ProgressChunk)
    assert (made[2].state, made[2].fraction) == ("generating", 1.0)
    assert len(made[2].message) == MAX_TEXT_CHARS
    assert made[3:] == [AudioChunk(b"\0\0"), ProgressChunk("encoding", 0.75), AudioChunk(b"\1\0")]


def test_what_is_reported_before_a_late_format_is_not_sent() -> None:
    made: list[Chunk] = []
    assert run_engine(ReportingLate(), {}, {}, lambda: False, made.append).outcome == "completed"
    assert made[0] == FormatChunk(MONO)
    assert len([chunk for chunk in made if isinstance(chunk, ProgressChunk)]) == 2


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4])
def test_nothing_is_reported_after_a_cancel(after: int) -> None:
    made: list[Chunk] = []
    end = run_engine(Reporting(), {}, {}, lambda: len(made) >= after, made.append)
    assert end.outcome == "cancelled"
    assert len(made) == max(1, after)  # the format comes whatever happens


def test_a_report_between_two_runs_goes_nowhere() -> None:
    made: list[Chunk] = []
    engine = Reporting()
    engine.report(ProgressChunk())
    run_engine(engine, {}, {}, lambda: False, made.append)
    count = len(made)
    engine.report(ProgressChunk())
    assert len(made) == count


def test_a_report_that_is_no_progress_fails_the_run() -> None:
    class Wrong(Reporting):
        def generate(self, params: dict[str, Value], inputs: Any) -> Iterator[Chunk]:
            self.report(AudioChunk(b"\0"))  # type: ignore[arg-type]  # what an engine without types may do
            yield AudioChunk(b"\0\0")

    end = run_engine(Wrong(), {}, {}, lambda: False, lambda _: None)
    assert (end.outcome, end.code) == ("failed", "engine_failed")


SOURCE = """
    from gpuworker.engines.base import *
    from protocol.wire.messages import AudioFormat

    class Made(Engine):
        capabilities = Capabilities(format=AudioFormat(sample_rate=24_000), reproducible=True, fingerprint="a tiny one")

        def load(self):
            pass

        def generate(self, params, inputs):
            step = 0
            while not self.cancelled():  # no chunk for ever: only its reports come out
                step += 1
                self.report(ProgressChunk("generating", 0.0, f"step {step}"))
                if step == params.get("steps"):
                    yield AudioChunk(bytes(2))
                    return
"""


def process_slot(folder: Path, patch: pytest.MonkeyPatch) -> Slot:
    install_engine(folder, patch, SOURCE)
    return ProcessSlot(0, EngineHost(NAME, {}))


def thread_slot(folder: Path, patch: pytest.MonkeyPatch) -> Slot:
    names: dict[str, Any] = {}
    exec(textwrap.dedent(SOURCE), names)
    return ThreadSlot(0, names["Made"])


@pytest.mark.trio
@pytest.mark.parametrize("make", [process_slot, thread_slot])
async def test_reports_of_a_slot_come_while_its_engine_works_and_end_with_a_cancel(
    make: Callable[[Path, pytest.MonkeyPatch], Slot], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = make(tmp_path, monkeypatch)
    ready = trio.Event()
    slot.on_change = lambda: ready.set() if slot.ready else None
    made: list[Chunk] = []

    def take(chunk: Chunk) -> None:
        made.append(chunk)
        if len(made) == 4:
            slot.cancel()

    inputs: dict[str, EngineInput] = {}
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(slot.serve)
            await ready.wait()
            assert slot.capabilities is not None
            assert slot.capabilities.fingerprint == "a tiny one"
            assert (await slot.run(Job({}, inputs), take)).outcome == "cancelled"
            assert made[:4] == [FormatChunk(MONO), *(ProgressChunk("generating", 0.0, f"step {n}") for n in (1, 2, 3))]
            made.clear()
            assert (await slot.run(Job({"steps": 2}, inputs), made.append)).outcome == "completed"
            assert [type(chunk) for chunk in made] == [FormatChunk, ProgressChunk, ProgressChunk, AudioChunk]
            nursery.cancel_scope.cancel()
