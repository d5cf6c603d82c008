"""Freed memory is kept for a while, and returned then."""

import subprocess
import sys
from pathlib import Path

import pytest
import trio

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
print(before, kept, rss_mib())
"""


def test_memory_between_blocks_that_live_on_is_returned() -> None:
    done = subprocess.run([sys.executable, "-c", BURST], capture_output=True, text=True, check=True)
    before, kept, returned = map(float, done.stdout.split())
    assert kept - before > 50
    assert returned - before < 25  # the end of the heap is kept, for the next frames


@pytest.mark.trio
async def test_the_daemon_returns_it_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    returns: list[float] = []
    twice = trio.Event()

    def note() -> bool:
        returns.append(trio.current_time())
        if len(returns) == 2:
            twice.set()
        return True

    monkeypatch.setattr("relayd.service.malloc.RETURN_INTERVAL_S", 0.01)
    monkeypatch.setattr("relayd.service.malloc.return_freed_memory", note)
    async with daemon(tmp_path):
        with trio.fail_after(10):
            await twice.wait()
