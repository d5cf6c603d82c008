"""The samples of engine `voxcpm`, compared with those of the package; and cancelled runs."""

from collections.abc import Callable

import numpy as np
import pytest

from gpuworker.engines.base import AudioChunk, FormatChunk, ProgressChunk
from gpuworker.engines.voxcpm.engine import VoxcpmEngine
from protocol.wire.validators import Value
from tests.gpuworker.engines.voxcpm.conftest import encoded, voiced
from tests.gpuworker.engines.voxcpm.engine_runs import QUICK, STEP_SAMPLES, Samples, as_pcm, pcm, run, speech_of

CHINESE = "你好，世界。今天天气很好。"


# -- samples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "text"),
    [
        ("voxcpm2", "Hello."),
        ("voxcpm2", CHINESE),
        ("voxcpm2", " Two\n\nlines\t here "),
        ("voxcpm2", "a\0b <|audio_start|> \N{PILE OF POO}"),
        ("voxcpm1.5", " Two\n\nlines\t here "),
        ("voxcpm", CHINESE),
    ],
)
def test_a_stream_is_what_the_package_streams_with_the_same_seed_chunk_by_chunk(
    arch: str, engine: VoxcpmEngine, package: Callable[..., list[Samples]], text: str
) -> None:
    end, chunks = run(engine, text, seed=11)
    assert end.outcome == "completed"
    assert chunks[0] == FormatChunk(engine.capabilities.format)
    made = [chunk.pcm for chunk in chunks[1:] if isinstance(chunk, AudioChunk)]
    assert made == as_pcm(package(arch, text, seed=11))
    assert {len(chunk) for chunk in made} == {2 * STEP_SAMPLES[arch]}


def test_made_whole_it_is_what_the_package_makes_whole(
    arch: str, engine: VoxcpmEngine, package: Callable[..., list[Samples]]
) -> None:
    params: dict[str, Value] = {"cfg_value": 3.5, "inference_timesteps": 3, "retry_badcase_ratio_threshold": 1.5}
    text = "Hi, 你好。"
    for more in ({"retry_badcase": False}, {"retry_badcase": True, "retry_badcase_max_times": 2}):
        made = speech_of(engine, text, mode="non_streaming", seed=5, **params, **more)
        assert made == as_pcm(package(arch, text, seed=5, streaming=False, **params, **more))[0]


def test_streamed_and_made_whole_are_the_same_speech(arch: str, engine: VoxcpmEngine) -> None:
    """As far as the package promises: VoxCPM2 alone decodes chunk by chunk what it decodes in one go, but for rounding.

    The others decode each chunk from the last three steps alone.
    """
    streamed = np.frombuffer(speech_of(engine, "Same.", seed=2), "<i2").astype(int)
    whole = np.frombuffer(speech_of(engine, "Same.", seed=2, mode="non_streaming"), "<i2").astype(int)
    assert len(streamed) == len(whole)
    assert np.abs(streamed).max() > 1_000
    if arch == "voxcpm2":
        assert np.abs(streamed - whole).max() <= 1


def test_the_seed_picks_the_take_and_is_0_where_it_is_not_given(voxcpm2: VoxcpmEngine) -> None:
    takes = [speech_of(voxcpm2, "Take.", **seed) for seed in ({}, {"seed": 0}, {"seed": 1}, {"seed": 2**32 - 1})]
    assert takes[0] == takes[1]
    assert len(set(takes)) == 3


def test_guidance_and_steps_reach_the_model(voxcpm2: VoxcpmEngine) -> None:
    takes = [speech_of(voxcpm2, "Take.", **more) for more in ({}, {"cfg_value": 0.1}, {"inference_timesteps": 3})]
    assert len(set(takes)) == 3
    longer = speech_of(voxcpm2, "Take.", retry_badcase_ratio_threshold=2)
    assert len(longer) > len(takes[0])


def test_bad_cases_are_made_again_as_often_as_asked(voxcpm2: VoxcpmEngine) -> None:
    """The checkpoint never stops by itself, so with retry every take is a bad case."""

    def steps(**more: Value) -> int:
        end, chunks = run(voxcpm2, "Steps.", mode="non_streaming", **more)
        assert end.outcome == "completed"
        return sum(isinstance(chunk, ProgressChunk) for chunk in chunks)

    once = steps(retry_badcase=False)
    assert once > 1
    assert steps(retry_badcase=True, retry_badcase_max_times=0) == once
    assert steps(retry_badcase=True, retry_badcase_max_times=1) == once
    assert steps(retry_badcase=True, retry_badcase_max_times=4) >= 4 * once


def test_progress_is_told_by_steps_so_that_a_repeated_run_has_the_same_frames(voxcpm2: VoxcpmEngine) -> None:
    _, chunks = run(voxcpm2, "How?", mode="non_streaming")
    _, again = run(voxcpm2, "How?", mode="non_streaming")
    assert chunks == again
    fractions = [chunk.fraction for chunk in chunks if isinstance(chunk, ProgressChunk)]
    assert len(fractions) == len(pcm(chunks)) // 2 // STEP_SAMPLES["voxcpm2"] // 5
    assert fractions == sorted(set(fractions))
    assert all(len(chunk.pcm) <= 65_536 for chunk in chunks if isinstance(chunk, AudioChunk))


def test_normalized_text_is_spoken_as_the_package_normalizes_it(
    voxcpm2: VoxcpmEngine, package: Callable[..., list[Samples]]
) -> None:
    text = "It costs $5,\nor 3 pounds."
    made = speech_of(voxcpm2, text, normalize=True)
    assert made == b"".join(as_pcm(package("voxcpm2", text, normalize=True)))
    assert made != speech_of(voxcpm2, text)


# -- cancel ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "chunks_heard"), [("voxcpm2", 0), ("voxcpm2", 1), ("voxcpm2", 3), ("voxcpm1.5", 2), ("voxcpm", 2)]
)
def test_a_stream_that_is_cancelled_leaves_the_next_one_right(engine: VoxcpmEngine, chunks_heard: int) -> None:
    whole = speech_of(engine, "Next.", seed=3)
    chunks = engine.generate({"text": "Cancelled in mid-stream.", **QUICK}, {})
    for _ in range(chunks_heard):
        next(chunks)
    chunks.close()  # type: ignore[attr-defined]  # a generator
    assert speech_of(engine, "Next.", seed=3) == whole


def test_what_is_made_whole_stops_within_a_step_of_the_cancel_and_leaves_the_next_one_right(
    engine: VoxcpmEngine,
) -> None:
    whole = speech_of(engine, "Next.", seed=3)
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > 8

    end, chunks = run(engine, "Cancelled while it is made. " * 3, cancelled, mode="non_streaming")
    assert end.outcome == "cancelled"
    assert pcm(chunks) == b""
    assert asked < 16  # a few on its way out; the whole would have asked a hundred times
    assert speech_of(engine, "Next.", seed=3) == whole


def test_a_cancel_while_a_prompt_is_encoded_makes_nothing(voxcpm2: VoxcpmEngine) -> None:
    answers = iter([False, True])
    data = {"reference_wav": encoded(voiced(0.9, pitch=77.0))}
    end, chunks = run(voxcpm2, "x", lambda: next(answers, True), data)
    assert (end.outcome, len(chunks)) == ("cancelled", 1)
