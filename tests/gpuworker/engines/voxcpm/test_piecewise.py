"""Engine `voxcpm` speaking a text while it is written: the pieces have one voice, and are one stream."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpuworker.engines.base import AudioChunk, Chunk, EngineInput, LiveInput, MarkChunk, ProgressChunk
from gpuworker.engines.voxcpm.engine import VoxcpmEngine
from gpuworker.slots.run_engine import RunResult, run_engine
from gpuworker.speaking.live_text import pieces_of
from protocol.wire.validators import Value
from tests.gpuworker.engines.voxcpm.engine_runs import QUICK, a_loaded, never, pcm, speech_of

TEXTS = (
    "Hello there, my friend. This is Dr. Smith again, so it is.",
    "你好，今天天气很好。我们去公园散步。好的。",
    "Привет, как дела? Ул. Ленина, дом пять. Всё хорошо.",
    "こんにちは。元気ですか？「はい、元気です。」っていう話。",
)


def speak(
    engine: VoxcpmEngine, text: str, size: int = 0, inputs: dict[str, bytes] | None = None, **params: Value
) -> tuple[RunResult, list[Chunk]]:
    """What the engine makes of a text that comes in parts of `size` bytes, or at once."""
    data = text.encode()
    live = LiveInput("text/plain")
    for start in range(0, len(data), size or len(data)):
        live.feed(data[start : start + (size or len(data))])
    live.feed(b"", last=True)
    given_inputs = {name: EngineInput(item) for name, item in (inputs or {}).items()}
    chunks: list[Chunk] = []
    return run_engine(engine, {**QUICK, **params}, {**given_inputs, "text": live}, never, chunks.append), chunks


def marks(chunks: list[Chunk]) -> list[MarkChunk]:
    return [chunk for chunk in chunks if isinstance(chunk, MarkChunk)]


@pytest.fixture(scope="module")
def seat(checkpoint: Callable[..., Path]) -> Iterator[VoxcpmEngine]:
    """One seat of a batch."""
    engine = a_loaded(checkpoint("voxcpm2"), "batch=2")
    (first, _second) = engine.seats(2)
    assert isinstance(first, VoxcpmEngine)
    yield first
    engine.close()


@settings(deadline=None, max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(TEXTS), st.integers(1, 20), st.sampled_from(["streaming", "non_streaming"]))
def test_any_chunking_makes_the_same_samples(voxcpm2: VoxcpmEngine, text: str, size: int, mode: str) -> None:
    whole = speak(voxcpm2, text, mode=mode, seed=3)
    assert whole[0].outcome == "completed"
    assert speak(voxcpm2, text, size, mode=mode, seed=3) == whole
    assert len(marks(whole[1])) == len(list(pieces_of([text])))


def test_each_architecture_goes_on_in_the_voice_of_the_first_piece(engine: VoxcpmEngine) -> None:
    text = "Hello there, my friend. Again, so it is."
    end, chunks = speak(engine, text, 5, seed=1)
    assert end.outcome == "completed"
    first, second = marks(chunks)
    assert (first.text_end, second.text_end) == (12, len(text))
    rate = engine.capabilities.format.sample_rate if engine.capabilities.format else 0
    samples = np.frombuffer(pcm(chunks), "<i2")
    assert second.sample == len(samples)
    fade = round(0.01 * rate)
    alone = np.frombuffer(speech_of(engine, "Hello there,", seed=1), "<i2")
    assert first.sample == len(alone)
    assert (samples[: first.sample - fade] == alone[:-fade]).all()
    silence = round(0.15 * rate)
    assert not samples[first.sample : first.sample + silence].any()
    later = samples[first.sample + silence :]
    by_itself = np.frombuffer(speech_of(engine, "my friend. Again, so it is.", seed=1), "<i2")
    assert later[fade:-fade].tobytes() != by_itself[fade:-fade].tobytes()  # it was told what came before


def test_a_seat_of_a_batch_speaks_piece_after_piece_too(seat: VoxcpmEngine) -> None:
    whole = speak(seat, TEXTS[0], seed=4)
    assert whole[0].outcome == "completed"
    assert speak(seat, TEXTS[0], 3, seed=4) == whole
    assert len(marks(whole[1])) == 2


def test_a_given_voice_is_that_of_every_piece(voxcpm2: VoxcpmEngine) -> None:
    end, chunks = speak(voxcpm2, TEXTS[0], 9, voice="bob", seed=4)
    assert end.outcome == "completed"
    assert len(marks(chunks)) == 2
    end, described = speak(voxcpm2, TEXTS[0], 9, voice_description="a calm old man", seed=4)
    assert end.outcome == "completed"
    assert pcm(described) == pcm(speak(voxcpm2, "(a calm old man) " + TEXTS[0], 9, seed=4)[1])


def test_a_sentence_that_exceeds_the_context_is_split_further(engine_of: Callable[..., VoxcpmEngine]) -> None:
    engine = engine_of("voxcpm2", context=128)
    text = "The quick brown fox jumps over the lazy dog, again and again. So it does, my friend, it does."
    end, chunks = speak(engine, text, 7, mode="non_streaming")
    assert end.outcome == "completed", end
    fractions = [chunk.fraction for chunk in chunks if isinstance(chunk, ProgressChunk)]
    assert fractions == sorted(fractions)
    assert [mark.text_end for mark in marks(chunks)] == [piece.text_end for piece in pieces_of([text])]
    assert all(chunk.pcm for chunk in chunks if isinstance(chunk, AudioChunk))


def test_faults_of_a_request_are_told_at_its_first_piece(voxcpm2: VoxcpmEngine) -> None:
    end, chunks = speak(voxcpm2, TEXTS[0], prompt_text="without audio")
    assert (end.outcome, end.code) == ("failed", "invalid_params")
    assert "prompt_wav" in end.details
    assert pcm(chunks) == b""
    assert speak(voxcpm2, "  ")[0].message == "text contains nothing to speak"
