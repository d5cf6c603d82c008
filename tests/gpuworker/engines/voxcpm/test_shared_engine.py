"""Engine `voxcpm` with `-o batch`: what it announces, and its seats, each driven in its own thread as by its slot."""

import argparse
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from gpuworker.config import add_run_options, read_config
from gpuworker.engines.base import AudioChunk, Chunk, OptionError
from gpuworker.engines.catalog import parse_options
from gpuworker.engines.voxcpm.batch.rows import Batch
from gpuworker.engines.voxcpm.engine import VoxcpmEngine
from gpuworker.slots.run_engine import RunResult
from protocol.wire.validators import Value
from tests.gpuworker.engines.voxcpm.conftest import encoded, voiced
from tests.gpuworker.engines.voxcpm.engine_runs import a_loaded, never, pcm, run, speech_of

#: In the context of 128 of its checkpoint, this is spoken in three pieces.
LONG = "The quick brown fox jumps over the lazy dog. So it does, it does."


@attrs.frozen(kw_only=True)
class Job:
    """A request."""

    text: str
    params: dict[str, Value] = attrs.field(factory=dict)
    inputs: dict[str, bytes] = attrs.field(factory=dict)


JOBS = (
    Job(text="Hello there."),
    Job(text=LONG, params={"seed": 2}),
    Job(text="Cloned.", params={"voice": "amy", "cfg_value": 1.6, "inference_timesteps": 4}),
    Job(
        text="Going on.",
        params={"prompt_text": "Ah.", "retry_badcase": True, "mode": "non_streaming", "seed": 4},
        inputs={"prompt_wav": encoded(voiced(0.5))},
    ),
    Job(text="Described.", params={"voice_description": "a calm old man", "seed": 5}),
    Job(text="Whole.", params={"mode": "non_streaming", "seed": 6}, inputs={"reference_wav": encoded(voiced(0.5))}),
)


@pytest.fixture(scope="module")
def engine(folders: dict[str, Path], checkpoint: Callable[..., Path]) -> Iterator[VoxcpmEngine]:
    loaded = a_loaded(checkpoint("voxcpm2", context=128), f"voices={folders['voices']}", "batch=4")
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def seats(engine: VoxcpmEngine) -> list[VoxcpmEngine]:
    made = list(engine.seats(4))
    assert all(isinstance(seat, VoxcpmEngine) for seat in made)
    return made  # type: ignore[return-value]  # just checked


@pytest.fixture(scope="module")
def alone(seats: list[VoxcpmEngine]) -> list[bytes]:
    """What each job gives when nothing else is spoken, in the first seat."""
    return [speech_of(seats[0], job.text, job.inputs, **job.params) for job in JOBS]


def at_once(calls: Sequence[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# -- what it announces -------------------------------------------------------------------------------------------


def test_it_announces_rows_context_and_attention_and_that_it_is_reproducible(
    engine: VoxcpmEngine, seats: list[VoxcpmEngine], folders: dict[str, Path]
) -> None:
    told = engine.capabilities
    assert (engine.SHARED, engine.default_slots) == (True, 4)
    assert told.reproducible
    assert told.fingerprint.endswith(" batch=4 context=128 gqa")
    assert all(seat.capabilities is told for seat in seats)
    assert told.params["properties"]["inference_timesteps"]["maximum"] == 16
    plain = VoxcpmEngine(parse_options(VoxcpmEngine.OPTIONS, [f"model={folders['voxcpm2']}"]))
    assert (plain.SHARED, plain.default_slots) == (False, 1)


def test_rows_that_change_each_other_are_not_announced_as_reproducible(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpuworker.engines.voxcpm.batch.shared_model.is_independent", lambda *_: False)
    engine = a_loaded(folders["voxcpm2"], "batch=2", "max_timesteps=50")
    assert not engine.capabilities.reproducible
    assert engine.capabilities.params["properties"]["inference_timesteps"]["maximum"] == 50
    engine.close()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("batch=0", "batch=0: must be 1 to 64"),
        ("batch=65", "batch=65: must be 1 to 64"),
        ("max_timesteps=9", "max_timesteps=9: must be 10 to 50, or 0"),
        ("max_timesteps=51", "max_timesteps=51: must be 10 to 50, or 0"),
    ],
)
def test_options_that_cannot_be_are_refused(option: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        VoxcpmEngine(parse_options(VoxcpmEngine.OPTIONS, [option]))


def test_more_slots_than_rows_are_refused_before_anything_is_loaded(folders: dict[str, Path]) -> None:
    options = parse_options(VoxcpmEngine.OPTIONS, [f"model={folders['voxcpm2']}", "batch=2", "check_memory=false"])
    (lack,) = VoxcpmEngine.check(options, 3)
    assert lack.what == "-o batch=3 for --slots 3, or --slots 2"
    assert VoxcpmEngine.check(options, 1) == []


def test_a_worker_has_a_slot_for_each_row_unless_told(folders: dict[str, Path]) -> None:
    def slots(*more: str) -> int:
        parser = argparse.ArgumentParser()
        add_run_options(parser)
        given = ("--engine", "voxcpm", "-o", f"model={folders['voxcpm2']}", "-o", "check_memory=false", *more)
        config = read_config(parser.parse_args(given), {"RELAY_URL": "unix:relayd.sock"})
        assert config.shared == ("batch=8" in more)
        return config.slots

    assert slots() == 1
    assert slots("-o", "batch=8") == 8
    assert slots("-o", "batch=8", "--slots", "2") == 2


# -- its seats ---------------------------------------------------------------------------------------------------


def test_requests_of_every_kind_at_once_have_the_samples_that_each_has_alone(
    seats: list[VoxcpmEngine], alone: list[bytes]
) -> None:
    waiting, made = list(enumerate(JOBS)), [b""] * len(JOBS)

    def serve(seat: VoxcpmEngine) -> Callable[[], None]:
        def call() -> None:
            while waiting:
                number, job = waiting.pop(0)
                made[number] = speech_of(seat, job.text, job.inputs, **job.params)

        return call

    at_once([serve(seat) for seat in reversed(seats)])
    assert [a == b for a, b in zip(made, alone, strict=True)] == [True] * len(JOBS)


def test_what_fails_or_is_cancelled_in_one_seat_changes_nothing_in_the_others(
    seats: list[VoxcpmEngine], alone: list[bytes]
) -> None:
    ends: dict[int, tuple[RunResult, list[Chunk]]] = {}
    heard = 0

    def cancelled() -> bool:
        nonlocal heard
        heard += 1
        return heard > 10  # asked before and after each chunk

    def call(number: int, *args: Any, **params: Value) -> Callable[[], None]:
        def speak() -> None:
            ends[number] = run(seats[number], *args, **params)

        return speak

    def good() -> None:
        ends[3] = run(seats[3], LONG, seed=2)

    at_once(
        [
            call(0, LONG, cancelled, seed=9),
            call(1, "x", never, {"reference_wav": b"no audio"}),
            call(2, JOBS[0].text, never),
            good,
        ]
    )
    assert ends[0][0].outcome == "cancelled"
    assert 0 < len(pcm(ends[0][1])) < len(alone[1])
    assert (ends[1][0].code, set(ends[1][0].details)) == ("invalid_params", {"reference_wav"})
    assert [pcm(ends[2][1]), pcm(ends[3][1])] == alone[:2]
    for seat in seats[:2]:  # they are right afterwards
        assert speech_of(seat, JOBS[0].text) == alone[0]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "the GPU is out of memory"),
        (RuntimeError("what one of them said"), "a step, which all requests share, failed"),
    ],
)
def test_a_step_that_fails_ends_all_runs_to_be_tried_again_and_the_next_ones_are_right(
    fault: Exception, told: str, seats: list[VoxcpmEngine], alone: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Batch.step
    together = threading.Barrier(2)

    def failing(self: Batch) -> Any:
        made = step(self)
        if self.live == 2 and fails:
            fails.clear()
            raise fault
        return made

    fails = [True]
    monkeypatch.setattr(Batch, "step", failing)
    ends: list[RunResult] = []

    def speak(seat: VoxcpmEngine) -> Callable[[], None]:
        def call() -> None:
            together.wait()
            ends.append(run(seat, LONG)[0])

        return call

    at_once([speak(seats[0]), speak(seats[3])])
    assert [(end.outcome, end.retryable, end.restart) for end in ends] == [("failed", True, True)] * 2
    assert all(told in end.message and "one of them" not in end.message + end.report for end in ends)
    assert speech_of(seats[1], JOBS[0].text) == alone[0]


def test_nothing_is_computed_while_nothing_is_spoken(
    seats: list[VoxcpmEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0
    step = Batch.step

    def counted(self: Batch) -> Any:
        nonlocal steps
        steps += 1
        return step(self)

    monkeypatch.setattr(Batch, "step", counted)
    chunks = [chunk for chunk in run(seats[2], "Hi.")[1] if isinstance(chunk, AudioChunk)]
    assert steps == len(chunks)
    assert seats[0].speakers[0].model.tokens("Hi.") + 10 == steps
