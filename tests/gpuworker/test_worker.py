"""The worker against a scripted relay: what it registers, runs, stops and sends."""

import time

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from gpuworker.attempt import FRAME_PCM_BYTES
from gpuworker.engines.base import AudioChunk, FormatChunk, OutputChunk
from gpuworker.slots.run_engine import RunResult
from gpuworker.slots.slot import Job
from protocol.wire.frames import (
    Audio,
    Cancelled,
    Completed,
    Failed,
    Output,
    Started,
)
from protocol.wire.messages import (
    Cancel,
    Register,
)
from protocol.wire.structs import (
    Running,
)
from tests.support.scripted_relay import (
    FORMAT,
    ID,
    OTHER,
    Desk,
    Emit,
    ScriptedSlot,
    assign,
    play_speech,
    run_with,
    script,
    seqs,
)


@pytest.mark.trio
async def test_a_worker_registers_what_its_engine_announced_and_turns_chunks_into_numbered_frames(
    autojump_clock: MockClock,
) -> None:
    async def relay(desk: Desk) -> None:
        register = await desk.register()
        assert (register.spaces, register.slots, register.format) == (["tts"], 1, FORMAT)
        assert register.params == {"type": "object"}
        assert not register.streams, "an engine that declares nothing may be silent"
        desk.send(assign())
        frames = await desk.frames()
        assert [type(frame) for frame in frames] == [Started, Audio, Audio, Audio, Completed]
        assert seqs(frames) == [0, 1, 2, 3, 4]
        last = frames[-1]
        assert isinstance(last, Completed)
        assert last.result == {
            "chunks": 3,
            "run_s": 3.0,
            "first_frame_s": 1.0,
            "duration_s": 0.3,
            "samples": 7200,
            "sample_rate": 24000,
        }
        desk.send(assign(OTHER))  # the slot is free when the end is told
        assert len(await desk.frames()) == 5

    await run_with(script(relay), slots=(ScriptedSlot(params={"type": "object"}),))


@pytest.mark.trio
async def test_an_engine_can_learn_who_asked_and_for_which_request(autojump_clock: MockClock) -> None:
    slot = ScriptedSlot()

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign(principal="ann", attempt=2, run_timeout_s=7.0))
        await desk.frames()

    await run_with(script(relay), slots=(slot,))
    context = slot.jobs[0].context
    assert (context.request_id, context.attempt, context.space, context.principal) == (ID, 2, "tts", "ann")
    assert context.run_timeout_s == 7.0
    assert abs(context.started_unix - time.time()) < 60


@pytest.mark.trio
async def test_an_engine_gets_an_int_for_an_integer_however_it_was_written(autojump_clock: MockClock) -> None:
    slot = ScriptedSlot(params={"type": "object", "properties": {"n": {"type": "integer"}}})

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign(params={"n": 2.0, "x": 2.0}))
        await desk.frames()

    await run_with(script(relay), slots=(slot,))
    assert repr(slot.jobs[0].params) == "{'n': 2, 'x': 2.0}"


@pytest.mark.trio
async def test_a_worker_registers_only_once_its_engine_is_loaded(autojump_clock: MockClock) -> None:
    async def relay(desk: Desk) -> None:
        await desk.silent(59)
        assert (await desk.register()).slots == 1

    await run_with(script(relay), slots=(ScriptedSlot(load_s=60),))


@pytest.mark.trio
@pytest.mark.parametrize("named", [True, False], ids=["in abandon", "in neither list"])
async def test_what_the_relay_abandons_is_stopped_and_its_slot_is_used_again(
    named: bool, autojump_clock: MockClock
) -> None:
    slot = ScriptedSlot()

    async def first(desk: Desk) -> None:
        await desk.register()
        desk.send(assign())
        await desk.expect(Started)
        await desk.connection.cut()

    async def second(desk: Desk) -> None:
        await desk.register(abandon=(ID,) if named else ())
        desk.send(assign(OTHER))
        frames = await desk.frames()
        assert {frame.request_id for frame in frames} == {OTHER}
        assert len(frames) == 5
        assert slot.cancels == 1

    await run_with(script(first), script(second), slots=(slot,))


@pytest.mark.trio
async def test_a_cancel_ends_in_cancelled_and_nothing_is_sent_of_what_the_engine_makes_after_it(
    autojump_clock: MockClock,
) -> None:
    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign())
        await desk.expect(Started)
        await desk.expect(Audio)
        began = trio.current_time()
        desk.send(Cancel(request_id=ID, reason="enough"))
        (last,) = await desk.frames()
        assert isinstance(last, Cancelled)
        assert (last.seq, last.reason) == (2, "enough")
        assert trio.current_time() - began <= 1.0 + 1e-6
        desk.send(Cancel(request_id=ID, reason="again"), Cancel(request_id=OTHER, reason="never came"))
        await desk.silent(5)

    await run_with(script(relay), slots=(ScriptedSlot(stop_s=1.0),))


@pytest.mark.trio
async def test_a_request_that_ends_as_it_is_cancelled_is_cancelled_not_completed_with_a_gap(
    autojump_clock: MockClock,
) -> None:
    async def deaf(job: Job, emit: Emit) -> RunResult:
        scope = trio.CancelScope(shield=True)
        with scope:
            return await play_speech(job, emit)
        raise AssertionError("nobody cancels it")

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign())
        await desk.expect(Started)
        desk.send(Cancel(request_id=ID, reason="x"))
        (last,) = await desk.frames()
        assert isinstance(last, Cancelled)

    await run_with(script(relay), slots=(ScriptedSlot(deaf, stop_s=100),))


@pytest.mark.trio
async def test_params_that_break_the_schema_fail_with_the_fields_and_never_reach_the_engine(
    autojump_clock: MockClock,
) -> None:
    schema = {"type": "object", "properties": {"text": {"type": "string"}}, "additionalProperties": False}
    slot = ScriptedSlot(params=schema)

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign(params={"text": 3, "loud": True}))
        (last,) = await desk.frames()
        assert isinstance(last, Failed)
        assert (last.seq, last.code, set(last.details)) == (0, "invalid_params", {"text", "loud"})
        assert slot.jobs == []

    await run_with(script(relay), slots=(slot,))


@pytest.mark.trio
async def test_the_same_attempt_again_is_ignored_and_a_higher_one_takes_its_place(autojump_clock: MockClock) -> None:
    slot = ScriptedSlot(stop_s=0.5)

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign(), assign())
        await desk.expect(Started)
        desk.send(assign(attempt=2), assign(attempt=1))
        frames = await desk.frames()
        assert {frame.attempt for frame in frames} == {2}
        assert seqs(frames) == [0, 1, 2, 3, 4]
        await desk.silent(5)
        assert len(slot.jobs) == 2

    await run_with(script(relay), slots=(slot,))


@pytest.mark.trio
async def test_a_reproducible_engine_goes_on_at_from_seq_and_another_starts_again_at_0(
    autojump_clock: MockClock,
) -> None:
    async def relay(desk: Desk) -> None:
        register = await desk.register()
        desk.send(assign(attempt=2, from_seq=2))
        assert seqs(await desk.frames()) == ([2, 3, 4] if register.reproducible else [0, 1, 2, 3, 4])

    await run_with(script(relay), slots=(ScriptedSlot(reproducible=True),))
    await run_with(script(relay), slots=(ScriptedSlot(reproducible=False),))


@pytest.mark.trio
async def test_a_worker_is_reproducible_while_all_its_slots_make_the_same_samples(autojump_clock: MockClock) -> None:
    slots = (
        ScriptedSlot(reproducible=True, fingerprint="a"),
        ScriptedSlot(reproducible=True, fingerprint="a", load_s=1),
        ScriptedSlot(reproducible=True, fingerprint="b", load_s=2),
    )

    async def relay(desk: Desk) -> None:
        first = await desk.register()
        told = [first, await desk.expect(Register), await desk.expect(Register)]
        assert [(it.slots, it.reproducible, it.fingerprint) for it in told] == [
            (1, True, "a"),
            (2, True, "a"),
            (3, False, "a"),
        ]
        slots[2].die()  # and comes back as the others are
        slots[2].capabilities = slots[0].capabilities
        told = [await desk.expect(Register), await desk.expect(Register)]
        assert [(it.slots, it.reproducible) for it in told] == [(2, False), (3, True)]

    await run_with(script(relay), slots=slots)


@pytest.mark.trio
async def test_a_slot_whose_engine_does_not_repeat_itself_makes_its_worker_not_reproducible(
    autojump_clock: MockClock,
) -> None:
    slots = (
        ScriptedSlot(reproducible=True, fingerprint="a"),
        ScriptedSlot(reproducible=False, fingerprint="a", load_s=1),
    )

    async def relay(desk: Desk) -> None:
        assert (await desk.register()).reproducible
        told = await desk.expect(Register)
        assert (told.slots, told.reproducible) == (2, False)

    await run_with(script(relay), slots=slots)


@pytest.mark.trio
@pytest.mark.parametrize("from_seq", [2, 9])
async def test_a_relay_that_was_started_again_gets_all_frames_of_a_repeated_attempt_from_0(
    from_seq: int, autojump_clock: MockClock
) -> None:
    async def first(desk: Desk) -> None:
        await desk.register()
        desk.send(assign(attempt=2, from_seq=from_seq))
        await desk.expect(Audio if from_seq == 2 else Failed)
        await desk.connection.cut()

    async def second(desk: Desk) -> None:
        register = await desk.register(Running(request_id=ID, attempt=2, next_seq=0))
        assert [(r.request_id, r.attempt) for r in register.running] == [(ID, 2)]
        frames = await desk.frames()
        assert seqs(frames) == ([0, 1, 2, 3, 4] if from_seq == 2 else [0])
        assert isinstance(frames[-1], Completed if from_seq == 2 else Failed)

    await run_with(script(first), script(second), slots=(ScriptedSlot(reproducible=True),))


@pytest.mark.trio
async def test_an_engine_that_makes_less_than_before_fails_where_the_relay_waits_for_a_frame(
    autojump_clock: MockClock,
) -> None:
    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign(attempt=2, from_seq=9))
        (last,) = await desk.frames()
        assert isinstance(last, Failed)
        assert (last.seq, last.code) == (9, "engine_failed")

    await run_with(script(relay), slots=(ScriptedSlot(reproducible=True),))


@pytest.mark.trio
async def test_a_large_chunk_is_split_into_frames_of_whole_samples(autojump_clock: MockClock) -> None:
    pcm = bytes(range(250)) * 1000

    async def play(job: Job, emit: Emit) -> RunResult:
        emit(FormatChunk(FORMAT))
        emit(AudioChunk(pcm))
        return RunResult(outcome="completed")

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign())
        audio = [frame.pcm for frame in await desk.frames() if isinstance(frame, Audio)]
        assert b"".join(audio) == pcm
        assert all(len(piece) <= FRAME_PCM_BYTES and len(piece) % 4 == 0 for piece in audio[:-1])

    await run_with(script(relay), slots=(ScriptedSlot(play),))


@pytest.mark.trio
async def test_a_file_larger_than_a_message_goes_in_parts_that_say_so(autojump_clock: MockClock) -> None:
    data = bytes(range(256)) * 10_000

    async def play(job: Job, emit: Emit) -> RunResult:
        emit(FormatChunk(None))
        emit(OutputChunk(data, "image/png"))
        emit(OutputChunk(b"small", None))
        return RunResult(outcome="completed")

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign())
        frames = await desk.frames()
        *parts, small = [frame for frame in frames if isinstance(frame, Output)]
        assert b"".join(part.data for part in parts) == data
        assert [(part.media_type, part.more) for part in parts] == [("image/png", True)] * 2 + [("image/png", None)]
        assert (small.data, small.media_type, small.more) == (b"small", None, None)
        assert isinstance(frames[-1], Completed)
        assert frames[-1].result["chunks"] == 2

    await run_with(script(relay), slots=(ScriptedSlot(play, format=None),))


@pytest.mark.trio
async def test_a_result_over_the_relays_limit_fails_and_stops_the_engine(autojump_clock: MockClock) -> None:
    async def play(job: Job, emit: Emit) -> RunResult:
        emit(FormatChunk(FORMAT))
        while True:
            await trio.sleep(0.01)
            emit(AudioChunk(bytes(1024 * 1024)))

    slot = ScriptedSlot(play)

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign())
        frames = await desk.frames()
        last = frames[-1]
        assert isinstance(last, Failed)
        assert last.code == "result_too_large"
        assert slot.cancels == 1
        assert sum(len(frame.pcm) for frame in frames if isinstance(frame, Audio)) <= 66 * 1024 * 1024

    await run_with(script(relay), slots=(slot,))


@pytest.mark.trio
async def test_a_slot_that_dies_is_taken_off_the_count_before_its_request_fails_and_put_back_later(
    autojump_clock: MockClock,
) -> None:
    slot = ScriptedSlot()

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign())
        await desk.expect(Started)
        slot.die(back_s=3)
        assert (await desk.expect(Register)).slots == 0
        (last,) = await desk.frames()
        assert isinstance(last, Failed)
        assert (last.code, last.retryable) == ("engine_failed", True)
        assert (await desk.expect(Register)).slots == 1
        desk.send(assign(attempt=2))
        assert len(await desk.frames()) == 5

    await run_with(script(relay), slots=(slot,))


@pytest.mark.trio
async def test_what_is_assigned_while_a_slot_starts_again_waits_for_it(autojump_clock: MockClock) -> None:
    slot = ScriptedSlot()

    async def relay(desk: Desk) -> None:
        await desk.register()
        slot.die(back_s=3)
        desk.send(assign())
        assert (await desk.expect(Register)).slots == 0
        assert (await desk.expect(Register)).slots == 1
        assert len(await desk.frames()) == 5
        slot.die(back_s=300)
        desk.send(assign(OTHER))
        assert (await desk.expect(Register)).slots == 0
        (last,) = await desk.frames()
        assert isinstance(last, Failed)
        assert (last.code, last.retryable) == ("engine_failed", True)

    await run_with(script(relay), slots=(slot,))


@pytest.mark.trio
@pytest.mark.parametrize("shared", [False, True])
async def test_what_is_assigned_as_the_process_of_all_slots_ends_is_not_to_blame(
    autojump_clock: MockClock, shared: bool
) -> None:
    slot = ScriptedSlot()
    slot.shared = shared

    async def relay(desk: Desk) -> None:
        assert (await desk.register()).shared == shared
        slot.die(back_s=60.0)
        desk.send(assign())
        assert (await desk.expect(Register)).slots == 0
        (last,) = await desk.frames()
        assert isinstance(last, Failed)
        assert (last.code, last.retryable) == ("engine_failed", True)
        assert last.details == ({"innocent": True} if shared else {})

    await run_with(script(relay), slots=(slot,))


@pytest.mark.trio
async def test_the_worker_stops_a_run_whose_time_is_over_when_the_relay_cannot(autojump_clock: MockClock) -> None:
    async def play(job: Job, emit: Emit) -> RunResult:
        emit(FormatChunk(None))
        await trio.sleep_forever()

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign(run_timeout_s=10.0))
        last = (await desk.frames())[-1]
        assert isinstance(last, Failed)
        assert (last.code, last.message.partition(";")[0]) == ("run_timeout", "it ran for more than 15 s")
        assert "split the text" in last.message

    await run_with(script(relay), slots=(ScriptedSlot(play),))


@pytest.mark.trio
async def test_an_output_that_is_no_audio_goes_as_it_is(autojump_clock: MockClock) -> None:
    async def play(job: Job, emit: Emit) -> RunResult:
        emit(FormatChunk(None))
        emit(OutputChunk({"answer": [1, "two", None]}))
        return RunResult(outcome="completed")

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign())
        started, output, _completed = await desk.frames()
        assert isinstance(started, Started)
        assert started.format is None
        assert isinstance(output, Output)
        assert output.data == {"answer": [1, "two", None]}

    await run_with(script(relay), slots=(ScriptedSlot(play, format=None),))
