"""The worker and its connection: cuts, refusals, and a relay that restarts or breaks the rules."""

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from gpuworker.attempt import FRAME_PCM_BYTES
from gpuworker.engines.base import AudioChunk, FormatChunk
from gpuworker.frame_sender import FEED_BYTES
from gpuworker.slots.run_engine import RunResult
from gpuworker.slots.slot import Job
from gpuworker.status import WorkerError
from protocol.wire.errors import ErrorCode
from protocol.wire.frames import (
    Audio,
    Frame,
    Started,
)
from protocol.wire.messages import (
    Error,
    Register,
    Rejected,
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
    refuse,
    run_with,
    script,
    seqs,
    worker_with,
)


@pytest.mark.trio
async def test_after_a_cut_the_frames_go_on_where_the_relay_has_them_none_twice_none_missing(
    autojump_clock: MockClock,
) -> None:
    got: list[Frame] = []

    async def first(desk: Desk) -> None:
        await desk.register()
        desk.send(assign())
        got.append(await desk.expect(Started))
        await trio.sleep(1.5)  # frame 1 is on its way, and lost
        await desk.connection.cut()

    async def second(desk: Desk) -> None:
        register = await desk.register(Running(request_id=ID, attempt=1, next_seq=1))
        (running,) = register.running
        assert (running.request_id, running.attempt, running.next_seq) == (ID, 1, 2)
        got.extend(await desk.frames())
        assert seqs(got) == [0, 1, 2, 3, 4]
        assert [frame.pcm[:1] for frame in got if isinstance(frame, Audio)] == [b"\0", b"\1", b"\2"]

    await run_with(script(first), script(second))


@pytest.mark.trio
async def test_a_relay_that_lost_everything_gets_every_frame_again(autojump_clock: MockClock) -> None:
    async def first(desk: Desk) -> None:
        await desk.register()
        desk.send(assign())
        await trio.sleep(10)
        await desk.connection.cut()

    async def second(desk: Desk) -> None:
        register = await desk.register(Running(request_id=ID, attempt=1, next_seq=0))
        assert register.running == (Running(request_id=ID, attempt=1, next_seq=5),)
        assert seqs(await desk.frames()) == [0, 1, 2, 3, 4]
        await desk.connection.cut()

    async def third(desk: Desk) -> None:
        assert (await desk.register()).running == ()  # acknowledged to its end: forgotten

    await run_with(script(first), script(second), script(third))


@pytest.mark.trio
async def test_two_requests_share_a_link_and_a_replay_never_overfills_it(autojump_clock: MockClock) -> None:
    size = 3 * 1024 * 1024
    backlogs: list[int] = []

    async def play(job: Job, emit: Emit) -> RunResult:
        emit(FormatChunk(FORMAT))
        for _ in range(size // FRAME_PCM_BYTES):
            emit(AudioChunk(bytes(FRAME_PCM_BYTES)))
        return RunResult(outcome="completed")

    async def first(desk: Desk) -> None:
        await desk.register()
        desk.send(assign(), assign(OTHER))
        await trio.testing.wait_all_tasks_blocked()
        await desk.connection.cut()

    ids: list[str] = []

    async def second(desk: Desk) -> None:
        await desk.register(
            Running(request_id=ID, attempt=1, next_seq=0), Running(request_id=OTHER, attempt=1, next_seq=0)
        )
        ends = 0
        while ends < 2:
            message = await desk.hear()
            assert isinstance(message, Frame)
            assert worker._link is not None
            backlogs.append(worker._link.backlog_bytes)
            ids.append(message.request_id)
            ends += message.ENDS
        done.set()

    done = trio.Event()
    slots = (ScriptedSlot(play), ScriptedSlot(play))
    async with worker_with(script(first), script(second), slots=slots) as worker, trio.open_nursery() as nursery:
        nursery.start_soon(worker.run)
        await done.wait()
        nursery.cancel_scope.cancel()
    assert max(backlogs) <= FEED_BYTES + FRAME_PCM_BYTES + 1024
    assert all(ids[start : start + 2] in ([ID, OTHER], [OTHER, ID]) for start in range(2, len(ids) - 4, 2))


@pytest.mark.trio
@pytest.mark.parametrize("code", ["space_not_found", "forbidden", "space_full", "invalid_params"])
async def test_a_refused_first_registration_ends_the_worker_with_the_relays_words(
    code: str, autojump_clock: MockClock
) -> None:
    async def relay(desk: Desk) -> None:
        await desk.expect(Register)
        desk.send(Rejected.because(ErrorCode(code), "space 'tts' says no; do this"))
        await trio.sleep_forever()

    async with worker_with(script(relay)) as worker:
        with pytest.raises(WorkerError, match="says no; do this") as caught:
            await worker.run()
    assert caught.value.code == code
    assert worker.status.state == "stopped"


@pytest.mark.trio
async def test_a_relay_that_shuts_down_is_asked_again_and_so_is_one_that_took_the_worker_before(
    autojump_clock: MockClock,
) -> None:
    async def first(desk: Desk) -> None:
        await desk.expect(Register)
        desk.send(Rejected.because(ErrorCode.SHUTTING_DOWN, "later"))
        await desk.register()
        await desk.connection.cut()

    async def second(desk: Desk) -> None:
        await desk.expect(Register)
        desk.send(Rejected.because(ErrorCode.SPACE_FULL, "space 'tts' already has its 1 worker"))
        await desk.register()
        desk.send(assign())
        assert len(await desk.frames()) == 5

    await run_with(script(first), script(second))


@pytest.mark.trio
async def test_a_worker_asks_again_for_as_long_as_the_relay_wants_it_to_and_says_so_once(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    refusal = Rejected.because(ErrorCode.SPACE_FULL, "space 'tts' already has its 1 worker", retry_after_s=2.0)

    async def relay(desk: Desk) -> None:
        began = trio.current_time()
        for _ in range(20):
            await desk.expect(Register)
            desk.send(refusal)
        await desk.register()
        assert trio.current_time() - began == pytest.approx(40.0)
        desk.send(assign())
        assert len(await desk.frames()) == 5

    await run_with(script(relay))
    assert caplog.text.count("already has its 1 worker") == 1


@pytest.mark.trio
async def test_a_refused_login_ends_the_worker(autojump_clock: MockClock) -> None:
    async with worker_with(refuse) as worker:
        with pytest.raises(WorkerError, match="not known") as caught:
            await worker.run()
    assert caught.value.code == "unauthenticated"


@pytest.mark.trio
async def test_an_engine_that_cannot_be_loaded_ends_the_worker(autojump_clock: MockClock) -> None:
    class Broken(ScriptedSlot):
        async def serve(self) -> None:
            await trio.sleep(1)
            self._set_ready(False, "no such model")
            await trio.sleep_forever()

    async def relay(desk: Desk) -> None:
        await trio.sleep_forever()

    async with worker_with(script(relay), slots=(Broken(),)) as worker:
        with pytest.raises(WorkerError, match="no such model") as caught:
            await worker.run()
    assert caught.value.code == "model_not_loaded"


@pytest.mark.trio
async def test_what_the_relay_says_that_a_worker_does_not_know_is_passed_over(autojump_clock: MockClock) -> None:
    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.connection.link.send_nowait(b"\x81\xa4type\xa6future")
        desk.send(Error(code="unknown_type", message="what?"))
        desk.send(assign())
        assert len(await desk.frames()) == 5

    await run_with(script(relay))


@pytest.mark.trio
async def test_a_relay_that_breaks_the_rules_is_left_and_connected_to_anew(autojump_clock: MockClock) -> None:
    async def first(desk: Desk) -> None:
        await desk.register()
        desk.connection.link.send_nowait(b"\xc1 garbage")
        async for _ in desk.connection.link:
            pass
        assert desk.connection.link.close_code == 1002

    async def second(desk: Desk) -> None:
        await desk.register()

    await run_with(script(first), script(second))
