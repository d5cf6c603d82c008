"""Long texts, which engine `voxcpm` speaks in pieces."""

from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import pytest

from gpuworker.engines.base import ProgressChunk
from gpuworker.engines.voxcpm.engine import VoxcpmEngine
from tests.gpuworker.engines.voxcpm.conftest import encoded, voiced
from tests.gpuworker.engines.voxcpm.engine_runs import STEP_SAMPLES, pcm, run, speech_of

#: 1,500 tokens of the tiny tokenizer, which has few Chinese characters.
LONG = "The quick brown fox jumps over the lazy dog, again and again. " * 10 + "今天天气很好，我们去公园散步吧。" * 20
#: 220 of them.
MIXED = "The quick brown fox jumps over the lazy dog. So it does. " * 2 + "今天天气很好。我们去公园散步吧。"


def test_a_long_text_is_one_stream_in_pieces_without_clicks(engine_of: Callable[..., VoxcpmEngine]) -> None:
    engine = engine_of("voxcpm2", context=128)
    samples = np.frombuffer(speech_of(engine, MIXED[:100]), "<i2").astype(int)
    pause = round(0.15 * 48_000)
    # Where silence begins, and where it ends.
    edges = np.flatnonzero(np.diff((samples == 0).astype(int), prepend=0, append=0)).reshape(-1, 2)
    pauses = [(start, stop) for start, stop in edges if stop - start >= pause]
    assert len(pauses) >= 3  # so there are pieces
    millisecond = 48
    for start, stop in pauses:
        around = samples[start - millisecond : start + 1], samples[stop - 1 : stop + millisecond]
        assert max(np.abs(np.diff(side)).max() for side in around) < 400
    # What the model says is noise: there samples lie further from one another.
    assert np.abs(np.diff(samples)).max() > 4_000


def test_a_long_text_is_the_same_again_and_as_long_when_made_whole(engine_of: Callable[..., VoxcpmEngine]) -> None:
    engine = engine_of("voxcpm2", context=128)
    text = MIXED[:60]
    streamed = [speech_of(engine, text, seed=6) for _ in range(2)]
    assert streamed[0] == streamed[1]
    end, chunks = run(engine, text, seed=6, mode="non_streaming")
    assert end.outcome == "completed"
    assert len(pcm(chunks)) == len(streamed[0])
    fractions = [chunk.fraction for chunk in chunks if isinstance(chunk, ProgressChunk)]
    assert fractions == sorted(fractions)
    assert fractions[-1] > 0.9


@attrs.frozen
class Given:
    """What a model was asked to speak: `prompt` is the room that its prompt takes."""

    text: str
    prompt: int
    room: int


def asked_of(engine: VoxcpmEngine, monkeypatch: pytest.MonkeyPatch) -> list[Given]:
    """Fills with each piece that the model is given, for the time of the test."""
    model = engine.speakers[0].model
    stream = type(model).stream
    given: list[Given] = []

    def noted(self: Any, text: str, cache: Any, settings: Any) -> Any:
        tokens = self.tokens(text)
        prompt = cache.patches if cache else 0
        most = min(int(tokens * settings.ratio_threshold + 10), settings.max_len)
        given.append(Given(text, prompt, self.context - prompt - tokens - 1 - most))
        return stream(self, text, cache, settings)

    monkeypatch.setattr(type(model), "stream", noted)
    return given


def test_phonemes_in_braces_reach_the_model_as_they_are_written(
    engine_of: Callable[..., VoxcpmEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of("voxcpm2")
    given = asked_of(engine, monkeypatch)
    text = "他姓{dan1}。{HH AH0 L OW1}, he said."
    speech_of(engine, text)
    assert [piece.text for piece in given] == [text]


@pytest.mark.parametrize(
    ("arch", "ratio", "chars"),
    [("voxcpm2", 1, 5_000), ("voxcpm2", 6, 500), ("voxcpm1.5", 6, 500), ("voxcpm", 6, 500), ("voxcpm2", 20, 200)],
)
def test_pieces_fit_the_model_and_go_on_from_the_first(
    engine_of: Callable[..., VoxcpmEngine], monkeypatch: pytest.MonkeyPatch, arch: str, ratio: int, chars: int
) -> None:
    engine = engine_of(arch, stop="always")  # a few steps a piece: the longest text is spoken in no time
    given = asked_of(engine, monkeypatch)
    text = (LONG * 6)[:chars]
    speech_of(engine, text, retry_badcase_ratio_threshold=ratio)
    assert "".join(piece.text for piece in given).replace(" ", "") == text.replace(" ", "")
    assert given[0].prompt == 0
    assert {piece.prompt for piece in given[1:]} == {given[1].prompt}
    assert given[1].prompt > 0
    assert all(piece.room >= 0 for piece in given)
    if ratio != 20:  # each ends with its sentence, as all of these are short enough
        assert all(piece.text.endswith((".", "。")) for piece in given[:-1])


def test_pieces_that_speak_to_the_end_of_their_steps_do_not_overflow_the_model(
    engine_of: Callable[..., VoxcpmEngine],
) -> None:
    engine = engine_of("voxcpm", context=256)
    speech = speech_of(engine, MIXED[:60], retry_badcase_ratio_threshold=4)
    assert len(speech) // 2 // STEP_SAMPLES["voxcpm"] > 4 * 60


def test_pieces_of_a_cloned_voice_each_have_its_reference_and_description(
    engine_of: Callable[..., VoxcpmEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of("voxcpm2", stop="always")
    given = asked_of(engine, monkeypatch)
    data = {"reference_wav": encoded(voiced(0.8))}
    speech_of(engine, LONG, data, voice_description="calm")
    assert len(given) > 2
    assert all(piece.text.startswith("(calm)") for piece in given)
    assert len({piece.prompt for piece in given}) == 1
    given.clear()
    speech_of(engine, "(calm) " + LONG)
    assert [piece.text.startswith("(calm)") for piece in given] == [True] + [False] * (len(given) - 1)
    given.clear()
    speech_of(engine, "One line\nand another " + LONG[:200])
    assert [piece.text for piece in given] == ["One line and another " + LONG[:200]]


def test_a_long_text_that_is_cancelled_in_its_second_piece_leaves_the_next_one_right(
    engine_of: Callable[..., VoxcpmEngine],
) -> None:
    engine = engine_of("voxcpm2", context=128)
    whole = speech_of(engine, "Next.", seed=3)
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > 2 * 50  # the loop asks twice a chunk

    end, chunks = run(engine, MIXED, cancelled)
    assert end.outcome == "cancelled"
    assert len(chunks) > 40
    assert speech_of(engine, "Next.", seed=3) == whole
