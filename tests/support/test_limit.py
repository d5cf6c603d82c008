"""A test that hangs is a failure with a name."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HANGING = """
import asyncio, threading
import pytest, trio

@pytest.mark.trio
async def test_trio():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep, 1e6)
        await trio.Event().wait()  # hangs in Trio

@pytest.mark.trio
async def test_mock_clock(autojump_clock):
    await trio.Event().wait()  # hangs under a clock that does not go

@pytest.mark.asyncio
async def test_asyncio():
    await asyncio.Event().wait()  # hangs in asyncio

def test_blocking():
    threading.Event().wait()
"""


def run(folder: Path, chosen: str) -> "subprocess.CompletedProcess[str]":
    (folder / "test_hanging.py").write_text(HANGING)
    settings = [f"--override-ini={one}" for one in ("async_limit_s=0.5", "faulthandler_timeout=8")]
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            f"-c{ROOT}/pyproject.toml",
            "-ptests.conftest",
            "-k",
            chosen,
            *settings,
            folder,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def test_an_asynchronous_test_that_hangs_fails_with_the_line_at_which_it_waits(tmp_path: Path) -> None:
    ended = run(tmp_path, "not blocking")
    assert "3 failed" in ended.stdout, ended.stdout
    assert {line.strip() in ended.stdout for line in HANGING.splitlines() if "# hangs" in line} == {True}, ended.stdout


def test_any_other_test_that_hangs_ends_the_process_and_is_named(tmp_path: Path) -> None:
    ended = run(tmp_path, "blocking")
    assert ended.returncode != 0
    assert "in test_blocking" in ended.stderr, ended.stderr
