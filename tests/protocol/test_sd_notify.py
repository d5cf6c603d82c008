"""What is told to systemd, and when no sign of life is given."""

import logging
import os
import secrets
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from protocol.sd_notify import MAX_STATUS_CHARS, Check, ServiceManager, run_checks, serve_watchdog
from tests.support.fake_systemd import fake_systemd


@pytest.mark.parametrize("abstract", [False, True])
@pytest.mark.trio
async def test_a_manager_is_told_at_a_path_and_at_an_abstract_name(tmp_path: Path, abstract: bool) -> None:
    with fake_systemd(f"@relayd-{secrets.token_hex(8)}" if abstract else tmp_path / "notify") as systemd:
        manager = ServiceManager.from_environment({"NOTIFY_SOCKET": systemd.address})
        assert manager.present
        manager.ready("all well")
        assert await systemd.next() == {"READY": "1", "STATUS": "all well"}
        manager.status("all well")  # told already
        manager.status("busy")
        assert await systemd.next() == {"STATUS": "busy"}
        manager.reloading()
        assert int((await systemd.next())["MONOTONIC_USEC"]) > 0
        manager.stopping("leaving", 12.5)
        assert await systemd.next() == {"STOPPING": "1", "STATUS": "leaving"}
        assert await systemd.next() == {"EXTEND_TIMEOUT_USEC": "12500000"}
        manager.alive()
        assert await systemd.next() == {"WATCHDOG": "1"}


@pytest.mark.trio
async def test_a_status_cannot_say_anything_but_itself(tmp_path: Path) -> None:
    with fake_systemd(tmp_path / "notify") as systemd:
        ServiceManager(systemd.address).status("hostile\nMAINPID=1\0\x1b[2J" + "x" * 10_000)
        (words,) = (await systemd.next()).values()
        assert words.startswith("hostile MAINPID=1")
        assert words.isprintable()
        assert len(words) == MAX_STATUS_CHARS


@pytest.mark.parametrize("address", ["", "/nowhere/at/all", "@", "/" + "x" * 200, "vsock:2:1234", "/dev/null"])
def test_a_manager_that_is_not_there_costs_nothing(address: str) -> None:
    manager = ServiceManager(address)
    manager.ready("x")
    manager.reloading()
    manager.stopping("x", 1.0)
    manager.alive()


@pytest.mark.trio
async def test_a_manager_that_takes_nothing_is_not_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with fake_systemd(tmp_path / "notify") as systemd:
        manager = ServiceManager(systemd.address)
        for _ in range(2_000):  # the kernel queues at most net.unix.max_dgram_qlen
            manager.alive()
            if caplog.records:
                break
    assert "systemd could not be notified of WATCHDOG=1" in caplog.text


@pytest.mark.parametrize(
    ("environ", "watchdog_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": str(os.getpid())}, 0.5),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-5"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_counts_for_the_process_that_it_is_meant_for(
    environ: dict[str, str], watchdog_s: float | None
) -> None:
    assert ServiceManager.from_environment(environ).watchdog_s == watchdog_s


class _Told(ServiceManager):
    """Counts signs of life."""

    def __init__(self, watchdog_s: float | None) -> None:
        super().__init__("@told", watchdog_s)
        self.times: list[float] = []

    def alive(self) -> None:
        self.times.append(trio.current_time())


async def _well() -> str:
    return ""


@pytest.mark.trio
async def test_signs_of_life_come_at_half_the_time_while_all_is_well(autojump_clock: MockClock) -> None:
    manager, began = _Told(30.0), trio.current_time()
    with trio.move_on_after(100):
        await serve_watchdog(manager, {"a": _well, "b": _well})
    assert [at - began for at in manager.times] == [0, 15, 30, 45, 60, 75, 90]


@pytest.mark.trio
async def test_without_a_watchdog_there_are_no_signs_of_life_and_no_checks(autojump_clock: MockClock) -> None:
    async def never() -> str:
        raise AssertionError

    with trio.fail_after(1):
        await serve_watchdog(_Told(None), {"a": never})


@pytest.mark.trio
async def test_a_slow_check_that_ends_in_time_never_makes_a_sign_of_life_late(autojump_clock: MockClock) -> None:
    took = iter([0.0, 7.4, 0.0, 7.4, 7.4, 0.0, 0.0, 0.0])

    async def slow() -> str:
        await trio.sleep(next(took))
        return ""

    manager = _Told(30.0)
    with trio.move_on_after(100):
        await serve_watchdog(manager, {"slow": slow})
    assert len(manager.times) == 7
    assert max(b - a for a, b in zip(manager.times, manager.times[1:], strict=False)) < 30


@pytest.mark.parametrize("how", ["says", "hangs", "breaks"])
@pytest.mark.trio
async def test_no_sign_of_life_while_one_check_fails_and_again_when_it_is_well(
    how: str, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    ill = True

    async def check() -> str:
        if not ill:
            return ""
        if how == "hangs":
            await trio.sleep_forever()
        if how == "breaks":
            raise RuntimeError("a mistake")
        return "it is ill"

    manager = _Told(30.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_watchdog, manager, {"well": _well, "part": check})
        await trio.sleep(50)
        assert manager.times == []
        words = {"says": "part: it is ill", "hangs": "part: no answer within 7.5 s", "breaks": "a mistake"}[how]
        assert words in caplog.text
        assert "well:" not in caplog.text
        ill = False
        with caplog.at_level(logging.WARNING):
            await trio.sleep(20)
        assert len(manager.times) == 1
        assert "healthy again" in caplog.text
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_checks_run_side_by_side(autojump_clock: MockClock) -> None:
    async def slow() -> str:
        await trio.sleep(0.9)
        return ""

    checks: dict[str, Check] = {"a": slow, "b": slow, "c": slow}
    assert await run_checks(checks, 1.0) == []
