"""The worker at its end: drain, undrain and stop."""

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from gpuworker.worker import ACK_S
from protocol.wire.frames import (
    Audio,
    Completed,
    Frame,
    Started,
)
from protocol.wire.messages import (
    Ack,
    Drain,
    Draining,
    Undrain,
)
from tests.support.scripted_relay import (
    ID,
    OTHER,
    Connection,
    Desk,
    ScriptedSlot,
    assign,
    run_with,
    script,
    worker_with,
)


@pytest.mark.trio
async def test_a_drain_finishes_what_runs_delivers_it_and_leaves(autojump_clock: MockClock) -> None:
    heard: list[Frame] = []

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign())
        await desk.expect(Started)
        desk.send(Drain(reason="maintenance"))
        await desk.expect(Draining)
        await desk.expect(Audio)
        heard.extend(await desk.frames())
        async for _ in desk.connection.link:
            raise AssertionError("nothing more was expected")

    async with worker_with(script(relay)) as worker:
        with trio.fail_after(60):
            await worker.run()
    assert isinstance(heard[-1], Completed)
    assert worker.status.state == "stopped"


@pytest.mark.trio
async def test_a_drained_worker_with_nothing_to_do_leaves_at_once_linked_or_not(autojump_clock: MockClock) -> None:
    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(Drain())
        await desk.expect(Draining)
        async for _ in desk.connection.link:
            pass

    async with worker_with(script(relay)) as worker:
        with trio.fail_after(1):
            await worker.run()

    async def never(connection: Connection) -> None:
        await trio.sleep_forever()

    async with worker_with(never, slots=(ScriptedSlot(load_s=60),)) as worker, trio.open_nursery() as nursery:
        nursery.start_soon(worker.run)
        await trio.sleep(5)
        with trio.fail_after(1):
            worker.drain("SIGTERM")
            while worker.status.state != "stopped":
                await trio.testing.wait_all_tasks_blocked()
                await trio.sleep(0.01)


@pytest.mark.trio
async def test_a_drained_worker_waits_for_the_last_ack_only_so_long(autojump_clock: MockClock) -> None:
    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign(), Drain())
        async for _ in desk.connection.link:
            pass  # and no ack

    async with worker_with(script(relay)) as worker:
        began = trio.current_time()
        await worker.run()
        assert 3 + ACK_S <= trio.current_time() - began <= 3.5 + ACK_S


@pytest.mark.trio
async def test_undrain_takes_a_drain_back(autojump_clock: MockClock) -> None:
    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign(), Drain(), Undrain())
        first = await desk.hear()
        assert isinstance(first, Started | Draining)
        frames = [first, *await desk.frames()]
        assert isinstance(frames[-1], Completed)
        desk.send(Ack(request_id=ID, attempt=1, seq=4), assign(OTHER))
        assert len(await desk.frames()) == 5

    await run_with(script(relay))


@pytest.mark.trio
async def test_stop_ends_at_once_whatever_runs(autojump_clock: MockClock) -> None:
    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign())
        await desk.expect(Started)
        worker.stop()
        async for _ in desk.connection.link:
            pass

    async with worker_with(script(relay)) as worker:
        with trio.fail_after(1):
            await worker.run()
