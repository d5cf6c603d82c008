"""Joins without clicks, streamed; and samples as PCM."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuworker.engines.voxcpm.crossfade import Samples, join, pcm16

RATE_HZ = 16_000
FADE = 160  # samples of the default fade at RATE_HZ
PAUSE = 2_400  # samples of the default pause at RATE_HZ


def full_scale(length: int) -> Samples:
    """The worst to join: as loud as can be up to its very ends."""
    return np.ones(length, np.float32)


def voiced(length: int, hz: float) -> Samples:
    return (0.9 * np.cos(2 * np.pi * hz * np.arange(length) / RATE_HZ)).astype(np.float32)


def in_chunks(samples: Samples, size: int) -> Iterator[Samples]:
    return (samples[at : at + size] for at in range(0, len(samples), size))


def joined(segments: list[Samples], size: int = 1_280) -> Samples:
    chunks = join((in_chunks(segment, size) for segment in segments), len(segments), RATE_HZ)
    return np.concatenate([np.zeros(0, np.float32), *chunks])


def bend(samples: Samples) -> float:
    """The greatest second difference: what is heard as a click. 1 where a full-scale sound is just cut off."""
    return float(np.abs(np.diff(samples.astype(np.float64), 2)).max())


def test_one_segment_passes_through_chunk_by_chunk_and_at_once() -> None:
    made: list[Samples] = []

    def segment() -> Iterator[Samples]:
        for number in range(5):
            made.append(np.full(number, number, np.float32))
            yield made[-1]

    for number, chunk in enumerate(join([segment()], 1, RATE_HZ)):
        assert chunk is made[number]
        assert len(made) == number + 1
    assert len(made) == 5


def test_a_join_is_faded_out_silent_and_faded_in() -> None:
    first, second, third = full_scale(3_000), full_scale(2_000), full_scale(1_000)
    whole = joined([first, second, third])
    assert len(whole) == 6_000 + 2 * PAUSE
    silent = np.flatnonzero(whole == 0)
    assert np.array_equal(silent, [*range(3_000, 3_000 + PAUSE), *range(5_000 + PAUSE, 5_000 + 2 * PAUSE)])
    # All but FADE samples on either side of a pause are as they were.
    assert (whole[: 3_000 - FADE] == 1).all()
    assert (whole[3_000 + PAUSE + FADE : 5_000 + PAUSE - FADE] == 1).all()
    assert (whole[5_000 + 2 * PAUSE + FADE :] == 1).all()
    # Monotone, and the way in mirrors the way out.
    falling, rising = whole[3_000 - FADE : 3_000], whole[3_000 + PAUSE :][:FADE]
    assert (np.diff(falling) < 0).all()
    assert np.array_equal(falling, rising[::-1])


@given(length=st.integers(0, 1_000), hz=st.floats(0, 400), size=st.integers(1, 500))
def test_no_join_clicks_not_even_with_segments_shorter_than_the_fades(length: int, hz: float, size: int) -> None:
    whole = joined([voiced(1_000, hz), voiced(length, hz), voiced(1_000, hz)], size)
    by_sound = bend(voiced(1_000, hz))
    by_fade = (np.pi / FADE) * (2 * np.pi * hz / RATE_HZ) + 2 * (np.pi / FADE) ** 2
    assert bend(whole) <= by_sound + by_fade
    assert bend(np.concatenate([full_scale(9), np.zeros(9, np.float32)])) == 1  # what the bound would catch


@given(lengths=st.lists(st.integers(0, 700), min_size=1, max_size=4), sizes=st.tuples(*[st.integers(1, 800)] * 2))
def test_the_samples_do_not_depend_on_the_chunks(lengths: list[int], sizes: tuple[int, int]) -> None:
    segments = [voiced(length, 100 + 50 * number) for number, length in enumerate(lengths)]
    one, other = (joined(segments, size) for size in sizes)
    assert np.array_equal(one, other)
    assert len(one) == sum(lengths) + PAUSE * sum(length > 0 for length in lengths[:-1])


def test_streams_and_holds_back_no_more_than_one_fade() -> None:
    given_samples = 0

    def segment(length: int) -> Iterator[Samples]:
        nonlocal given_samples
        for chunk in in_chunks(full_scale(length), 100):
            given_samples += len(chunk)
            yield chunk

    taken, pauses = 0, 0
    for chunk in join((segment(length) for length in (1_000, 500, 800)), 3, RATE_HZ):
        taken += len(chunk)
        pauses += int((chunk == 0).sum())
        assert given_samples - (taken - pauses) <= FADE
        assert pauses < 2 * PAUSE or given_samples == taken - pauses  # of the last segment nothing is held back
    assert taken == 2_300 + 2 * PAUSE


def test_the_end_of_a_segment_and_the_pause_come_before_the_next_is_begun() -> None:
    begun: list[int] = []

    def segments() -> Iterator[Iterator[Samples]]:
        for number in range(2):
            begun.append(number)
            yield in_chunks(full_scale(1_000), 1_000)

    chunks = join(segments(), 2, RATE_HZ)
    assert len(next(chunks)) + len(next(chunks)) == 1_000 + PAUSE
    assert begun == [0]


def test_a_segment_has_ended_and_is_closed_before_the_next_is_asked_for() -> None:
    events: list[str] = []

    def segment(number: int) -> Iterator[Samples]:
        events.append(f"begin {number}")
        try:
            yield full_scale(300)
        finally:
            events.append(f"end {number}")

    def segments() -> Iterator[Iterator[Samples]]:
        for number in range(3):
            events.append(f"ask {number}")
            yield segment(number)

    for _ in join(segments(), 3, RATE_HZ):
        pass
    assert events == [f"{what} {number}" for number in range(3) for what in ("ask", "begin", "end")]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("taken", [1, 2, 3])
def test_closing_closes_the_running_segment_and_the_segments_at_once(count: int, taken: int) -> None:
    still_open: set[str] = set()

    def endless(name: str) -> Iterator[Samples]:
        still_open.add(name)
        try:
            while True:
                yield full_scale(500)
        finally:
            still_open.remove(name)

    def segments() -> Iterator[Iterator[Samples]]:
        still_open.add("segments")
        try:
            for number in range(count):
                yield in_chunks(full_scale(500), 500) if number < min(count, 2) - 1 else endless(str(number))
        finally:
            still_open.remove("segments")

    source = segments()  # held here as well, so that it is not merely collected
    chunks = join(source, count, RATE_HZ)
    for _ in range(taken):
        next(chunks)
    assert "segments" in still_open
    chunks.close()
    assert still_open == set()
    assert list(chunks) == []


def test_a_fault_in_a_segment_comes_through_and_closes_the_rest() -> None:
    closed: list[str] = []

    class Broken:
        def __iter__(self) -> Iterator[Samples]:
            return self

        def __next__(self) -> Samples:
            raise LookupError("no more samples")

        def close(self) -> None:
            closed.append("segment")

    with pytest.raises(LookupError, match="no more samples"):
        list(join([iter([full_scale(300)]), Broken()], 2, RATE_HZ))
    assert closed == ["segment"]


def test_the_chunks_given_are_not_changed_and_may_be_used_again() -> None:
    buffer = full_scale(400)

    def reusing() -> Iterator[Samples]:
        for number in range(1, 4):
            buffer[:] = number
            yield buffer
            assert (buffer == number).all()

    whole = np.concatenate([chunk.copy() for chunk in join((reusing() for _ in range(2)), 2, RATE_HZ)])
    assert np.array_equal(np.unique(whole[FADE : 1_200 - FADE]), [1, 2, 3])
    assert (whole[800 : 1_200 - FADE] == 3).all()


def test_no_fade_and_no_pause_only_string_the_segments_together() -> None:
    segments = [voiced(length, 200) for length in (300, 0, 1, 200)]
    chunks = join((in_chunks(segment, 70) for segment in segments), 4, RATE_HZ, pause_s=0, fade_s=0)
    assert np.array_equal(np.concatenate(list(chunks)), np.concatenate(segments))


def test_a_segment_of_empty_chunks_adds_no_pause() -> None:
    segments = [iter([full_scale(300)]), iter([full_scale(0)] * 2), iter([full_scale(300)])]
    assert sum(map(len, join(segments, 3, RATE_HZ))) == 600 + PAUSE


def test_more_segments_than_told_are_refused() -> None:
    with pytest.raises(ValueError, match="more than the 1"):
        list(join([iter([full_scale(9)]), iter([full_scale(9)])], 1, RATE_HZ))


def test_no_segments_give_nothing() -> None:
    assert list(join([], 0, RATE_HZ)) == []


def test_pcm_is_rounded_clipped_and_little_endian() -> None:
    samples = np.array([0, 1, -1, 1.5, -1.5, 0.5 / 32_767, 1.5 / 32_767, 2.6 / 32_767, 1e-9], np.float64)
    assert np.frombuffer(pcm16(samples[:5].astype(np.float32)), "<i2").tolist() == [0, 32_767, -32_767, 32_767, -32_767]
    assert np.frombuffer(pcm16(samples[7:].astype(np.float32)), "<i2").tolist() == [3, 0]
    assert pcm16(np.ones(1, np.float32)) == b"\xff\x7f"
    assert pcm16(np.zeros(0, np.float32)) == b""


def test_pcm_of_what_is_not_finite_is_silence_and_nothing_is_changed_in_place() -> None:
    samples = np.array([np.nan, np.inf, -np.inf, 0.25], np.float32)
    assert np.frombuffer(pcm16(samples), "<i2").tolist() == [0, 0, 0, 8_192]
    assert np.isnan(samples[0])


@given(st.lists(st.floats(width=32), max_size=50))
def test_pcm_is_within_half_a_step_of_the_sample(values: list[float]) -> None:
    samples = np.array(values, np.float32)
    steps = np.frombuffer(pcm16(samples), "<i2").astype(np.float64)
    finite = np.isfinite(samples)
    wanted = np.clip(samples[finite].astype(np.float64), -1, 1) * 32_767
    assert (np.abs(steps[finite] - wanted) <= 0.5).all()
    assert (steps[~finite] == 0).all()


def test_pcm_of_a_strided_view_is_that_of_its_copy() -> None:
    samples = voiced(100, 300)
    assert pcm16(samples[::3]) == pcm16(samples[::3].copy())
    assert all(a <= b for a, b in pairwise(np.frombuffer(pcm16(np.linspace(-1, 1, 99, dtype=np.float32)), "<i2")))
