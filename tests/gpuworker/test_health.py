"""The worker as a service: when it is ready, how it stands, and when it has lost hold of a slot."""

from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from gpuworker.health import STUCK_S, HealthService, describe_status
from gpuworker.identity import Identity
from gpuworker.slots.slot import Job, Run, Slot
from gpuworker.status import WorkerStatus
from gpuworker.worker import Worker
from protocol.sd_notify import ServiceManager
from tests.support.fake_systemd import fake_systemd
from tests.support.scripted_relay import ADDRESS, ScriptedSlot

GRACE_S = 5.0


def a_service(slots: list[Slot], manager: ServiceManager) -> HealthService:
    worker = Worker(Identity(name="box", spaces=("tts",), engine="fake"), ADDRESS, slots)
    return HealthService(worker, slots, manager, GRACE_S, 120.0)


@pytest.mark.trio
async def test_it_is_ready_once_a_slot_is_loaded_whether_or_not_the_relay_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpuworker.health.STATUS_INTERVAL_S", 0.01)
    slots: list[Slot] = [ScriptedSlot(), ScriptedSlot(load_s=1000)]
    with fake_systemd(tmp_path / "notify") as systemd:
        service = a_service(slots, ServiceManager(systemd.address, 0.2))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.serve)
            said = await systemd.next()
            assert said == {"STATUS": "loading its engine; space tts: 0 of 2 slots ready, 0 running"}
            for _ in range(3):  # it may load for longer than any TimeoutStartSec
                assert (await systemd.until("EXTEND_TIMEOUT_USEC"))["EXTEND_TIMEOUT_USEC"] == "60000000"
            nursery.start_soon(slots[0].serve)
            assert "READY" in await systemd.until("READY")
            for _ in range(3):
                await systemd.until("WATCHDOG")
            service.stopping()
            await systemd.until("STOPPING")
            assert float((await systemd.until("EXTEND_TIMEOUT_USEC"))["EXTEND_TIMEOUT_USEC"]) > 120e6
            nursery.cancel_scope.cancel()


class Deaf(ScriptedSlot):
    """A slot whose force does not work: a run in it goes on for ever."""

    async def _stop_when_asked(self, run: Run) -> None:
        await trio.sleep_forever()


@pytest.mark.trio
async def test_a_run_that_stands_long_after_it_was_to_be_ended_by_force_is_told(autojump_clock: MockClock) -> None:
    async def play(job: Job, emit: object) -> None:
        await trio.sleep_forever()

    slot = Deaf(play)  # type: ignore[arg-type]  # it never ends, so it has no end to return
    service = a_service([slot], ServiceManager())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(slot.serve)
        await trio.sleep(1)
        nursery.start_soon(slot.run, Job({}), lambda _chunk: None)
        await trio.sleep(1000)
        assert await service.check_slots() == ""  # it runs for long, and may
        slot.cancel()
        assert await service.check_slots() == ""
        await trio.sleep(GRACE_S + STUCK_S - 1)
        assert await service.check_slots() == ""
        await trio.sleep(2)
        assert await service.check_slots() == "slot 0 still running, asked to stop more than 35 s ago"
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_one_cancel_after_another_is_no_slot_that_is_stuck(autojump_clock: MockClock) -> None:
    slot = ScriptedSlot(stop_s=0.9)
    service = a_service([slot], ServiceManager())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(slot.serve)
        await trio.sleep(1)
        for _ in range(100):
            async with trio.open_nursery() as one:
                one.start_soon(slot.run, Job({}), lambda _chunk: None)
                await trio.sleep(0.01)
                slot.cancel()
                assert slot.stopping is not None
                assert await service.check_slots() == ""
            assert slot.stopping is None
        nursery.cancel_scope.cancel()


def test_the_status_says_what_is_wrong() -> None:
    status = WorkerStatus(
        state="connecting",
        relay="wss://x:443",
        spaces=("a", "b"),
        slots=2,
        running=1,
        completed=0,
        failed=0,
        cancelled=0,
        fault="refused",
    )
    assert (
        describe_status(status, 3) == "not connected to wss://x:443; space a, b: 2 of 3 slots ready, 1 running; refused"
    )
