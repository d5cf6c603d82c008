"""The real processes: a relay that is restarted repeatedly, and workers; their output is kept and passed on."""

import json
import os
import re
import shutil
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import trio

#: Time for a process to start, on a busy machine.
START_S = 240.0
#: Time between two looks whether a process that starts has ended instead.
LOOK_S = 0.2
#: Lines kept of a process, for the report on a failure.
KEPT_LINES = 4_000
_REPO = Path(__file__).parents[2]

OnLine = Callable[[str, str], None]


@attrs.define(eq=False)
class Actor:
    """A command that is started, killed and started again.

    Args:
        name: for people.
        command: module and arguments.
        environ: environment of the process.
        folder: its working directory.
        on_line: called with its name and each line of its stderr.
        ready_words: text in the line that shows that it is ready.
        may_leave: whether it may end by itself, with exit code 0.
    """

    name: str
    command: Sequence[str]
    environ: dict[str, str]
    folder: Path
    on_line: OnLine
    ready_words: str
    may_leave: bool = False
    process: trio.Process | None = None
    starts: int = 0
    #: Exits that nobody caused.
    surprises: list[str] = attrs.field(factory=list)
    ready: trio.Event = attrs.field(factory=trio.Event)
    lines: deque[str] = attrs.field(factory=lambda: deque(maxlen=KEPT_LINES))
    _doomed: bool = False

    @property
    def pid(self) -> int:
        """The id of the running process."""
        assert self.process is not None
        return self.process.pid

    async def start(self, nursery: trio.Nursery) -> None:
        """Start it; `ready` is set when it can be used."""
        self.starts += 1
        self.ready = trio.Event()
        environ = {**os.environ, **self.environ, "PYTHONPATH": f"{_REPO}:{self.folder}", "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", *self.command]
        process = await trio.lowlevel.open_process(command, stderr=-1, stdin=-3, env=environ, cwd=self.folder)
        # Wait for both: the end of the previous process may be noticed only now.
        self.process, self._doomed = process, False
        nursery.start_soon(self._listen, process)

    async def wait_ready(self) -> None:
        """Wait until it can be used."""
        with trio.move_on_after(START_S):
            while not self.left:
                with trio.move_on_after(LOOK_S):
                    await self.ready.wait()
                    return
        raise AssertionError(f"{self.name} did not come up; it said:\n" + "\n".join(list(self.lines)[-30:]))

    async def _listen(self, process: trio.Process) -> None:
        assert process.stderr is not None
        left = b""
        with suppress(trio.ClosedResourceError):
            async for data in process.stderr:
                *whole, left = (left + data).split(b"\n")
                for line in whole:
                    self._take(line.decode("utf-8", "replace"))
        code = await process.wait()
        if process is self.process and not self._doomed and not (self.may_leave and code == 0):
            self.surprises.append(f"{self.name} ended by itself with {code}: {' | '.join(list(self.lines)[-3:])}")

    def _take(self, line: str) -> None:
        self.lines.append(line)
        self.on_line(self.name, line)
        if self.ready_words in line:
            self.ready.set()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; SIGKILL and SIGTERM are expected to end it."""
        if number in (signal.SIGKILL, signal.SIGTERM):
            self._doomed = True
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    async def kill(self) -> None:
        """Kill it with SIGKILL, and wait for the end."""
        self.signal(signal.SIGKILL)
        if self.process is not None:
            with trio.CancelScope(shield=True):
                await self.process.wait()

    @property
    def left(self) -> bool:
        """Whether its process has ended."""
        return self.process is not None and self.process.poll() is not None

    async def ended(self) -> int | None:
        """Wait for its end; returns its exit code."""
        assert self.process is not None
        return await self.process.wait()

    def children(self) -> list[int]:
        """The ids of its child processes, in order; for a worker: its slots."""
        with suppress(OSError):
            return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]
        return []

    def figures(self) -> tuple[int, float]:
        """The number of open files, and the resident memory in MiB."""
        with suppress(OSError):
            files = len(os.listdir(f"/proc/{self.pid}/fd"))  # noqa: PTH208 - one call
            for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
                if line.startswith("VmRSS:"):
                    return files, int(line.split()[1]) / 1024
        return 0, 0.0

    def open_files(self) -> Counter[str]:
        """What its open files are: paths, and kinds of what has none."""
        found: Counter[str] = Counter()
        for entry in Path(f"/proc/{self.pid}/fd").iterdir():
            with suppress(OSError):
                found[re.sub(r"\[\d+\]$", "", str(entry.readlink()))] += 1
        return found


def as_json(line: str) -> dict[str, Any]:
    """Parse a line of a JSON log; empty if it is not JSON."""
    if line.startswith("{"):
        with suppress(ValueError):
            told: dict[str, Any] = json.loads(line)
            return told
    return {}


def clear(folder: Path) -> None:
    """Delete what a run left behind."""
    shutil.rmtree(folder, ignore_errors=True)
