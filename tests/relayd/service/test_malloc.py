"""Freed memory is kept for a while, and returned then."""

import subprocess
import sys
from pathlib import Path

import pytest
import trio

from relayd.service.malloc import KEPT_BYTES, serve_memory_return
from tests.support.relay import daemon

#: After a burst, one block of forty lives on; what lies between them is freed.
BURST = """
from pathlib import Path
from random import Random
from relayd.service.malloc import keep_freed_memory, return_freed_memory

def rss_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

assert keep_freed_memory()
random = Random(1)
before = rss_mib()
burst = [bytes(random.choice([2_000, 9_000, 65_000, 700_000])) for _ in range(600)]
live_on = burst[::40]
del burst
kept = rss_mib()
assert return_freed_memory()
returned = rss_mib()
assert return_freed_memory(0)
print(before, kept, returned, rss_mib())
"""


def test_memory_between_blocks_that_live_on_is_returned() -> None:
    done = subprocess.run([sys.executable, "-c", BURST], capture_output=True, text=True, check=True)
    before, kept, returned, idle = map(float, done.stdout.split())
    assert kept - before > 50
    assert returned - before < 25  # the end of the heap is kept, for the next frames
    assert idle - before < 8


@pytest.mark.trio
async def test_all_of_it_is_returned_while_no_frames_come(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    counts, counted = iter([3, 3, 4]), trio.Event()

    def count_frames() -> int:
        if (count := next(counts, None)) is None:
            counted.set()
        return count or 4

    monkeypatch.setattr("relayd.service.malloc.RETURN_INTERVAL_S", 0.01)
    monkeypatch.setattr("relayd.service.malloc.return_freed_memory", kept.append)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_memory_return, count_frames)
        with trio.fail_after(10):
            await counted.wait()
        nursery.cancel_scope.cancel()
    assert kept[:3] == [KEPT_BYTES, 0, KEPT_BYTES]


@pytest.mark.trio
async def test_the_daemon_returns_it_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    twice = trio.Event()

    def note(kept_bytes: int) -> None:
        kept.append(kept_bytes)
        if len(kept) == 2:
            twice.set()

    monkeypatch.setattr("relayd.service.malloc.RETURN_INTERVAL_S", 0.01)
    monkeypatch.setattr("relayd.service.malloc.return_freed_memory", note)
    async with daemon(tmp_path):
        with trio.fail_after(10):
            await twice.wait()
