"""The worker and inputs that come while their request runs."""

import hashlib

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from gpuworker.engines.base import FormatChunk, MarkChunk, OutputChunk
from gpuworker.slots.run_engine import RunResult
from gpuworker.slots.slot import Job
from protocol.wire.errors import ErrorCode
from protocol.wire.frames import Cancelled, Completed, Failed, Frame, Output, Started
from protocol.wire.messages import MAX_UNACKED_BYTES, Ack, Cancel, Input, InputAck, Registered
from protocol.wire.structs import InputInfo, InputRule, Running
from tests.support.scripted_relay import ID, Desk, Emit, ScriptedSlot, assign, run_with, script

LIVE = InputInfo(media_type="text/plain", live=True)
RULES = {"words": InputRule(live=True, max_bytes=1_000_000), "file": InputRule()}


def piece(offset: int, data: bytes, *, last: bool = False, name: str = "words") -> Input:
    return Input(request_id=ID, name=name, offset=offset, data=data, last=last or None)


def whole(data: bytes) -> InputInfo:
    return InputInfo(media_type="text/plain", size=len(data), sha256=hashlib.sha256(data).hexdigest())


async def until_ended(job: Job, emit: Emit) -> RunResult:
    """An engine that makes something at the end of its live input."""
    emit(FormatChunk(None))
    while not all(feed.ended for feed in job.feeds.values()):  # noqa: ASYNC110 - the clock jumps
        await trio.sleep(0.1)
    emit(OutputChunk("done"))
    emit(MarkChunk(5, 0))
    return RunResult(outcome="completed")


def a_slot() -> ScriptedSlot:
    return ScriptedSlot(until_ended, inputs=RULES)


async def hear_all(desk: Desk) -> tuple[list[Frame], list[int]]:
    """The frames up to the last one, which is acknowledged, and the offsets of the acknowledgements before it."""
    frames: list[Frame] = []
    taken = []
    while not frames or not frames[-1].ENDS:
        message = await desk.hear()
        if isinstance(message, InputAck):
            assert (message.request_id, message.name, message.last) == (ID, "words", None)
            taken.append(message.offset)
        else:
            assert isinstance(message, Frame)
            frames.append(message)
    desk.send(Ack(request_id=ID, attempt=frames[-1].attempt, seq=frames[-1].seq))
    return frames, taken


@pytest.mark.trio
async def test_it_starts_without_its_live_input_which_then_goes_on_as_it_comes(autojump_clock: MockClock) -> None:
    slot = a_slot()

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign(inputs={"words": LIVE, "file": whole(b"abc")}), piece(0, b"be"))
        await desk.silent(5)
        assert slot.jobs == []  # its whole input is not there
        desk.send(piece(0, b"abc", name="file"))
        await desk.expect(InputAck)
        await desk.expect(Started)
        assert slot.jobs[0].inputs["file"].data == b"abc"
        assert slot.fed == {"words": [(b"be", False)]}
        desk.send(piece(2, b"gin"), piece(5, b"", last=True))
        frames, taken = await hear_all(desk)
        assert slot.fed["words"] == [(b"be", False), (b"gin", False), (b"", True)]
        assert taken == [5]
        assert [type(frame) for frame in frames] == [Output, Output, Completed]
        assert isinstance(frames[1], Output)
        assert frames[1].mark == {"text_end": 5, "sample": 0}

    await run_with(script(relay), slots=(slot,))


@pytest.mark.trio
async def test_what_came_before_is_passed_over(autojump_clock: MockClock) -> None:
    slot = a_slot()

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign(inputs={"words": LIVE}), piece(0, b"abc"), piece(0, b"abc"), piece(1, b"bcde"), piece(2, b"c"))
        desk.send(piece(5, b"f", last=True), piece(5, b"f", last=True), piece(6, b"", last=True), piece(0, b"abc"))
        frames, _taken = await hear_all(desk)
        assert isinstance(frames[-1], Completed)
        assert b"".join(data for data, _last in slot.fed["words"]) == b"abcdef"
        assert [last for _data, last in slot.fed["words"]] == [False, False, True]

    await run_with(script(relay), slots=(slot,))


@pytest.mark.trio
@pytest.mark.parametrize("takes", [True, False])
@pytest.mark.parametrize(
    ("pieces", "code", "retryable"),
    [
        ([piece(0, b"abc"), piece(4, b"e")], "input_mismatch", True),
        ([piece(0, b"abc", last=True), piece(3, b"d")], "input_mismatch", True),
        ([piece(0, b"abc", last=True), piece(0, b"ab", last=True)], "input_mismatch", True),
        ([piece(start, bytes(200_000)) for start in range(0, 1_200_000, 200_000)], "input_too_large", False),
    ],
    ids=["a gap", "more than its end", "another end", "too large"],
)
async def test_a_piece_that_does_not_fit_fails_its_attempt_alone(
    pieces: list[Input], code: str, retryable: bool, takes: bool, autojump_clock: MockClock
) -> None:
    slot, other = a_slot(), a_slot()
    slot.takes = takes
    if code == "input_too_large" and not takes:
        code, retryable = "input_mismatch", True  # the relay sent more than the engine had room for

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign(inputs={"words": LIVE}))
        await desk.expect(Started)
        desk.send(assign("b" * 32, inputs={"words": LIVE}), *pieces)
        failed = await desk.hear()
        while not isinstance(failed, Failed):
            failed = await desk.hear()
        assert (failed.request_id, failed.code, failed.retryable) == (ID, code, retryable)
        assert slot.cancels == 1
        desk.send(Input(request_id="b" * 32, name="words", offset=0, data=b"", last=True))
        last = await desk.hear()
        while not isinstance(last, Completed):
            last = await desk.hear()

    await run_with(script(relay), slots=(slot, other))


@pytest.mark.trio
async def test_a_relay_may_be_ahead_of_the_engine_by_the_window_and_no_more(autojump_clock: MockClock) -> None:
    slot = a_slot()
    slot.takes = False

    async def relay(desk: Desk) -> None:
        await desk.register()
        half = MAX_UNACKED_BYTES // 2
        desk.send(assign(inputs={"words": LIVE}), piece(0, bytes(half)), piece(half, bytes(half)))
        await desk.expect(Started)
        await desk.silent(5)  # nothing was taken, so nothing is acknowledged
        slot.jobs[0].feeds["words"].note_taken(half)
        assert (await desk.expect(InputAck)).offset == half
        desk.send(piece(2 * half, bytes(half)))
        await desk.silent(5)
        desk.send(piece(3 * half, b"x"))
        frames, _taken = await hear_all(desk)
        assert isinstance(frames[-1], Failed)
        assert "taken only 131072" in frames[-1].message

    await run_with(script(relay), slots=(slot,))


@pytest.mark.trio
@pytest.mark.parametrize(
    ("inputs", "params", "code", "field"),
    [
        ({"file": LIVE}, {"words": "x"}, "invalid_params", "cannot be live"),
        ({"words": LIVE}, {"words": "x"}, "invalid_params", "words is given"),
        ({}, {}, "invalid_params", "words is required"),
        ({"words": InputInfo(media_type="audio/wav", live=True)}, {}, "invalid_params", "must be text/plain"),
    ],
)
async def test_the_engines_rules_hold_for_live_inputs(
    inputs: dict[str, InputInfo], params: dict[str, str], code: str, field: str, autojump_clock: MockClock
) -> None:
    rules = {**RULES, "words": InputRule(live=True, media_types=["text/plain"])}
    schema = {"properties": {"words": {"type": "string"}}, "required": ["words"]}
    slot = ScriptedSlot(until_ended, inputs=rules, params=schema)

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign(inputs=inputs, params=params))
        (last,) = await desk.frames()
        assert isinstance(last, Failed)
        assert last.code == code
        assert field in last.message
        assert slot.jobs == []
        desk.send(assign(attempt=2, inputs={"words": LIVE}, params={}), piece(0, b"", last=True))
        assert isinstance((await desk.frames())[-1], Completed)  # it takes the place of the param

    await run_with(script(relay), slots=(slot,))


@pytest.mark.trio
async def test_a_cut_link_drops_no_attempt_that_is_fed_and_the_relay_goes_on_where_it_was(
    autojump_clock: MockClock,
) -> None:
    slot = a_slot()

    async def first(desk: Desk) -> None:
        await desk.register()
        desk.send(assign(inputs={"words": LIVE}), piece(0, b"abc"))
        assert (await desk.expect(InputAck)).offset == 3
        await desk.expect(Started)
        desk.send(piece(3, b"de"))
        await trio.testing.wait_all_tasks_blocked()
        await desk.connection.cut()

    async def second(desk: Desk) -> None:
        running = Running(request_id=ID, attempt=1, next_seq=1, inputs={"words": 5})
        assert (await desk.hear()).to_map()["running"] == [running.to_map()]
        desk.send(Registered(worker_id="w1", resume=(Running(request_id=ID, attempt=1, next_seq=1),)))
        assert (await desk.expect(InputAck)).offset == 5  # its first answer was lost with the link
        desk.send(piece(3, b"de"), piece(5, b"f", last=True))
        frames, taken = await hear_all(desk)
        assert taken == [6]
        assert isinstance(frames[-1], Completed)
        assert b"".join(data for data, _last in slot.fed["words"]) == b"abcdef"
        assert len(slot.jobs) == 1

    await run_with(script(first), script(second), slots=(slot,))


@pytest.mark.trio
async def test_another_attempt_gets_its_live_input_from_the_beginning(autojump_clock: MockClock) -> None:
    slot = a_slot()

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign(inputs={"words": LIVE}), piece(0, b"abc"))
        assert (await desk.expect(InputAck)).attempt == 1
        await desk.expect(Started)
        desk.send(assign(attempt=2, inputs={"words": LIVE}), piece(0, b"abc"))
        ack = await desk.expect(InputAck)
        assert (ack.attempt, ack.offset) == (2, 3)
        desk.send(piece(3, b"", last=True))
        frames, _taken = await hear_all(desk)
        assert frames[-1].attempt == 2
        assert isinstance(frames[-1], Completed)
        assert [job.context.attempt for job in slot.jobs] == [1, 2]

    await run_with(script(relay), slots=(slot,))


@pytest.mark.trio
async def test_a_gap_before_there_is_a_slot_fails_it_without_one(autojump_clock: MockClock) -> None:
    slot = a_slot()

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign("b" * 32, inputs={"words": LIVE}))
        await desk.expect(Started)
        desk.send(assign(inputs={"words": LIVE}), piece(7, b"x"), Cancel(request_id="b" * 32, reason="no"))
        ends: list[Frame] = []
        while len(ends) < 2:
            frame = await desk.hear()
            assert isinstance(frame, Frame)
            ends.append(frame)
        (failed,) = [frame for frame in ends if isinstance(frame, Failed)]
        assert failed.code == ErrorCode.INPUT_MISMATCH
        assert [type(frame) for frame in ends if frame is not failed] == [Cancelled]
        assert len(slot.jobs) == 1

    await run_with(script(relay), slots=(slot,))
