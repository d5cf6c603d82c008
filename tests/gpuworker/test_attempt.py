"""An attempt by itself: chunks become numbered frames, within limits, and one end of them all."""

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from gpuworker.attempt import FRAME_PCM_BYTES, MAX_RESULT_BYTES, Attempt
from gpuworker.engines.base import AudioChunk, FormatChunk, OutputChunk, ProgressChunk
from gpuworker.slots.run_engine import RunResult
from protocol.wire.codec import decode
from protocol.wire.errors import ErrorCode
from protocol.wire.frames import MAX_BINARY_BYTES, Audio, Cancelled, Completed, Failed, Output, Progress, Started
from protocol.wire.messages import FROM_WORKER
from tests.support.scripted_relay import FORMAT, ID, assign

DONE = RunResult(outcome="completed")


class Bench:
    """An attempt whose frames the test takes, and what it asks of its engine."""

    def __init__(self, *, reproducible: bool = True, from_seq: int = 0, **options: Any) -> None:
        self.told = self.stops = 0
        self.attempt = Attempt(
            assign(from_seq=from_seq), reproducible=reproducible, on_frames=lambda _attempt: self._count(), **options
        )

    def _count(self) -> None:
        self.told += 1

    def runs(self) -> None:
        def stop() -> None:
            self.stops += 1

        self.attempt.stop_engine = stop

    def sent(self) -> list[Any]:
        frames: list[Any] = []
        while self.attempt.has_frames:
            is_last = self.attempt.at_last_frame
            frames.append(decode(self.attempt.next_frame(), FROM_WORKER))
            assert is_last == frames[-1].ENDS
        return frames


def text(value: str) -> OutputChunk:
    return OutputChunk(value)


@pytest.mark.trio
async def test_each_kind_of_chunk_becomes_its_frame_and_the_figures_come_last(autojump_clock: MockClock) -> None:
    bench = Bench()
    attempt = bench.attempt
    assert attempt.result(7.0) == {"chunks": 0, "run_s": 0.0}
    await trio.sleep(9)
    attempt.begin(trio.current_time())
    await trio.sleep(0.12345678)
    attempt.add_chunk(FormatChunk(FORMAT))
    attempt.add_chunk(ProgressChunk(state="loading", fraction=0.5, message="wait"))
    await trio.sleep(1)
    attempt.add_chunk(AudioChunk(b"ab" * 12_001))
    await trio.sleep(1)
    attempt.add_chunk(AudioChunk(b"cd"))
    assert attempt.finish(DONE) is DONE
    assert (attempt.ended, attempt.outcome, attempt.next_seq, bench.told) == (True, "completed", 5, 5)
    started, progress, first, second, end = bench.sent()
    envelope: dict[str, Any] = {"request_id": ID, "attempt": 1}
    assert started == Started(**envelope, seq=0, format=FORMAT)
    assert progress == Progress(**envelope, seq=1, state="loading", fraction=0.5, message="wait")
    assert [(frame.seq, frame.pcm) for frame in (first, second)] == [(2, b"ab" * 12_001), (3, b"cd")]
    assert end == Completed(
        **envelope,
        seq=4,
        result={
            "chunks": 2,
            "run_s": 2.123457,
            "first_frame_s": 1.123457,
            "duration_s": 0.500083,
            "samples": 12_002,
            "sample_rate": 24_000,
        },
    )
    assert attempt.finish(RunResult(outcome="cancelled")).outcome == "cancelled"
    assert (attempt.outcome, attempt.next_seq) == ("completed", 5), "only the first end counts"
    assert attempt.running.next_seq == 5


@pytest.mark.parametrize(
    ("size", "frames"),
    [
        (2, [2]),
        (FRAME_PCM_BYTES, [FRAME_PCM_BYTES]),
        (FRAME_PCM_BYTES + 2, [FRAME_PCM_BYTES, 2]),
        (3 * FRAME_PCM_BYTES, [FRAME_PCM_BYTES] * 3),
    ],
)
def test_long_audio_is_cut_into_frames_of_64_kib(size: int, frames: list[int]) -> None:
    assert FRAME_PCM_BYTES == 65_536
    bench = Bench()
    with trio_time():
        bench.attempt.add_chunk(AudioChunk(bytes(size)))
    sent = bench.sent()
    assert [len(frame.pcm) for frame in sent if isinstance(frame, Audio)] == frames
    assert [frame.seq for frame in sent] == list(range(len(frames)))


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ({"a": 1}, [{"a": 1}]),
        (b"", [b""]),
        (b"x" * MAX_BINARY_BYTES, [b"x" * MAX_BINARY_BYTES]),
        (b"x" * (2 * MAX_BINARY_BYTES + 1), [b"x" * MAX_BINARY_BYTES] * 2 + [b"x"]),
        ("x" * (MAX_BINARY_BYTES + 1), ["x" * (MAX_BINARY_BYTES + 1)]),
    ],
)
def test_large_binary_is_sent_in_parts_and_says_which_is_the_last(data: Any, parts: list[Any]) -> None:
    bench = Bench()
    with trio_time():
        bench.attempt.add_chunk(OutputChunk(data, media_type="text/x"))
    sent = bench.sent()
    assert [frame.data for frame in sent if isinstance(frame, Output)] == parts
    assert [frame.more for frame in sent] == [True] * (len(parts) - 1) + [None]
    assert {frame.media_type for frame in sent} == {"text/x"}


@pytest.mark.parametrize(("from_seq", "reproducible", "first"), [(2, True, 2), (2, False, 0), (0, True, 0)])
def test_frames_that_the_relay_has_are_made_and_not_sent_unless_they_would_differ(
    from_seq: int, reproducible: bool, first: int
) -> None:
    bench = Bench(from_seq=from_seq, reproducible=reproducible)
    with trio_time():
        for number in range(4):
            bench.attempt.add_chunk(text(str(number)))
    assert bench.attempt.from_seq == first
    assert [frame.data for frame in bench.sent()] == [str(number) for number in range(first, 4)]
    bench.attempt.resume_from(1)
    assert [frame.data for frame in bench.sent()] == ["1", "2", "3"]


def test_an_engine_that_makes_less_than_before_has_failed_and_its_end_goes_where_the_relay_asks() -> None:
    bench = Bench(from_seq=3)
    with trio_time():
        bench.attempt.add_chunk(text("0"))
        end = bench.attempt.finish(DONE)
        assert (end.outcome, end.code) == ("failed", "engine_failed")
        assert "not reproducible" in end.message
        (sent,) = bench.sent()
        assert (type(sent), sent.seq, bench.attempt.next_seq) == (Failed, 3, 4)
        bench.attempt.resume_from(0)  # a relay that has restarted and has nothing
        (sent,) = bench.sent()
        assert (type(sent), sent.seq, bench.attempt.next_seq) == (Failed, 0, 1)
        bench.attempt.resume_from(1)  # one that has it all
        assert not bench.attempt.has_frames
        assert bench.attempt.next_seq == 1


def test_an_engine_that_makes_as_much_as_before_has_completed() -> None:
    bench = Bench(from_seq=1)
    with trio_time():
        bench.attempt.add_chunk(text("0"))
        assert bench.attempt.finish(DONE) is DONE
    (sent,) = bench.sent()
    assert (type(sent), sent.seq) == (Completed, 1)
    bench.attempt.resume_from(0)
    assert [frame.seq for frame in bench.sent()] == [0, 1]


def test_a_short_attempt_that_was_cancelled_is_cancelled() -> None:
    bench = Bench(from_seq=3)
    bench.attempt.cancel("enough")
    with trio_time():
        assert bench.attempt.finish(DONE).outcome == "cancelled"
    (sent,) = bench.sent()
    assert (type(sent), sent.seq, sent.reason) == (Cancelled, 3, "enough")


@pytest.mark.trio
async def test_a_cancel_stops_the_engine_that_runs_or_the_wait_for_a_slot_once() -> None:
    waits, runs, ended = Bench(), Bench(), Bench()
    waits.attempt.cancel("enough")
    assert waits.attempt.scope.cancel_called
    runs.runs()
    for reason in ("first", "second"):
        runs.attempt.cancel(reason)
    assert (runs.stops, runs.attempt.cancel_reason, runs.attempt.scope.cancel_called) == (1, "first", False)
    ended.attempt.finish(DONE)
    ended.attempt.cancel("too late")
    assert (ended.attempt.cancel_reason, ended.attempt.scope.cancel_called) == (None, False)


def test_a_worker_that_stops_an_attempt_says_so() -> None:
    bench = Bench()
    with trio_time():
        bench.attempt.finish(RunResult(outcome="cancelled"))
    (sent,) = bench.sent()
    assert sent.reason == "the worker stopped it"


@pytest.mark.parametrize("why", ["ended", "dropped", "fault", "cancelled"])
def test_chunks_after_the_end_are_lost(why: str) -> None:
    bench = Bench()
    with trio_time():
        bench.attempt.add_chunk(text("heard"))
        if why == "ended":
            bench.attempt.finish(DONE)
        elif why == "dropped":
            bench.attempt.dropped = True
        elif why == "fault":
            bench.attempt.fail(RunResult.failed(ErrorCode.INTERNAL, "no"))
        else:
            bench.attempt.cancel("enough")
        count = bench.attempt.next_seq
        bench.attempt.add_chunk(text("lost"))
        assert bench.attempt.next_seq == count


def test_what_is_dropped_has_no_frames_and_no_end() -> None:
    bench = Bench()
    with trio_time():
        bench.attempt.add_chunk(text("0"))
        bench.attempt.dropped = True
        assert not bench.attempt.has_frames
        assert bench.attempt.finish(DONE) is DONE
    assert (bench.attempt.next_seq, bench.attempt.ended) == (1, False)


def test_the_first_fault_counts_and_stops_the_engine_and_a_cancel_does_not_hide_it() -> None:
    bench = Bench()
    bench.runs()
    first = RunResult.failed(ErrorCode.ENGINE_FAILED, "first")
    bench.attempt.fail(first)
    bench.attempt.fail(RunResult.failed(ErrorCode.ENGINE_FAILED, "second"))
    assert bench.stops == 2
    bench.attempt.cancel("enough")
    with trio_time():
        assert bench.attempt.finish(DONE) == first


def test_a_chunk_that_cannot_be_sent_fails_the_attempt() -> None:
    for chunk in (OutputChunk(object()), ProgressChunk(state="nonsense"), ProgressChunk(fraction=2.0)):
        bench = Bench()
        bench.runs()
        with trio_time():
            bench.attempt.add_chunk(chunk)
            end = bench.attempt.finish(DONE)
        assert (bench.stops, end.code) == (1, "engine_failed")
        assert "cannot be sent" in end.message


def test_what_is_no_chunk_is_passed_over() -> None:
    bench = Bench()
    bench.attempt.add_chunk("no chunk")  # type: ignore[arg-type]
    assert (bench.attempt.next_seq, bench.attempt.assign.request_id) == (0, ID)


def test_details_that_cannot_be_sent_are_left_out() -> None:
    bench = Bench()
    with trio_time():
        bench.attempt.finish(RunResult(outcome="failed", code="x", message="y", details={"a": 2**99}, retryable=True))
    (sent,) = bench.sent()
    assert (sent.code, sent.retryable, "a" in sent.details) == ("x", True, False)
    assert sent.message.startswith("y")


@pytest.mark.parametrize("over", [0, 1])
def test_a_result_may_have_exactly_its_largest_size(over: int) -> None:
    assert MAX_RESULT_BYTES == 64 * 1024 * 1024
    size = Bench()
    with trio_time():
        for _ in range(2):
            size.attempt.add_chunk(text("x" * 1_000))
        frames = [size.attempt.next_frame() for _ in range(2)]
        bench = Bench(max_bytes=sum(map(len, frames)) - over)
        bench.runs()
        for _ in range(2):
            bench.attempt.add_chunk(text("x" * 1_000))
        end = bench.attempt.finish(DONE)
    assert (end.outcome, bench.stops) == (("failed", 1) if over else ("completed", 0))
    if over:
        assert (end.code, f"exceeds {sum(map(len, frames)) - 1} bytes" in end.message) == ("result_too_large", True)


class trio_time:  # noqa: N801 - reads like a function
    """In its block there is a time, which stands still."""

    def __enter__(self) -> None:
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(trio, "current_time", lambda: 100.0)

    def __exit__(self, *_exc: object) -> None:
        self._patch.undo()
