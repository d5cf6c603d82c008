"""Trio as a guest of asyncio: it starts, hears, and ends, however the two loops interleave."""

import asyncio
import random
import subprocess
import sys
from typing import Any

import pytest
import trio

from tui.terminal import trio_bridge
from tui.terminal.trio_bridge import Bridge

#: Bounds a whole test, far above what it takes: a wake-up that is lost is waited for without end.
LIMIT_S = 60.0


def ignore(_fault: BaseException) -> None:
    pass


@pytest.mark.asyncio
async def test_a_thousand_guests_hear_everything_and_end() -> None:
    chance = random.Random(7)
    async with asyncio.timeout(LIMIT_S):
        for _ in range(1_000):
            bridge, heard = Bridge(), asyncio.Queue[int]()
            send, receive = trio.open_memory_channel[int](4)

            async def guest(receive: Any = receive, heard: Any = heard) -> None:
                async for item in receive:
                    heard.put_nowait(item)

            bridge.start(guest, ignore)
            for _ in range(chance.randrange(3)):  # into each phase of the guest: starting, ticking, waiting in a thread
                await asyncio.sleep(chance.choice((0, 0.000_1)))
            for item in range(chance.randrange(3)):
                send.send_nowait(item)
                assert await heard.get() == item
            assert await bridge.stop()


@pytest.mark.asyncio
async def test_a_guest_ends_though_whoever_hears_of_its_fault_raises(caplog: pytest.LogCaptureFixture) -> None:
    async def guest() -> None:
        raise OSError("no relay")

    def failed(fault: BaseException) -> None:
        raise RuntimeError("the screen has gone") from fault

    bridge = Bridge()
    bridge.start(guest, failed)
    async with asyncio.timeout(LIMIT_S):
        assert await bridge.stop()
    assert isinstance(bridge.fault, OSError)
    assert "the screen has gone" in caplog.text


WITHOUT_THREADS = """
import asyncio, trio
from tui.terminal.trio_bridge import Bridge

def refuse(*_arguments):
    raise RuntimeError("can't start new thread")

async def host():
    bridge, faults = Bridge(), asyncio.Queue()
    trio._core._run.start_thread_soon = refuse
    bridge.start(trio.sleep_forever, faults.put_nowait)
    print(await faults.get(), await bridge.stop())

asyncio.run(host())
"""


def test_a_guest_that_cannot_have_a_thread_ends_as_failed() -> None:
    # In a process of its own, as Trio remembers a guest that broke off.
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THREADS], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.stdout == "can't start new thread True\n"


@pytest.mark.asyncio
async def test_a_guest_that_does_not_end_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trio_bridge, "STOP_S", 0.05)
    may_end = trio.Event()

    async def guest() -> None:
        with trio.CancelScope(shield=True):
            await may_end.wait()

    bridge = Bridge()
    bridge.start(guest, ignore)
    async with asyncio.timeout(LIMIT_S):
        assert not await bridge.stop()
        may_end.set()
        assert await bridge.stop()
