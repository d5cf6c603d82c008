"""`python -m bench.guard`: counts the relay's work per frame without a clock, and compares it with a budget.

Frames are pushed through the real daemon in lock-step: the next are sent when the last have arrived. The counts are
therefore nearly the same in every run, on every machine and under any load; a difference of a tenth is a change in
the code.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from mmap import mmap
from pathlib import Path
from typing import Any

import attrs

from bench.counted import BYTECODES, CALLS, CELLS, DONE, OFF, STEPS, WAITS, WANTED
from bench.relay.fleet import Load, Route
from bench.relay.frames import variants
from bench.relay.relayd_fleet import RelaydFleet
from bench.relay.servers import Checkout, Server, open_relayd, serving_command

BUDGETS = Path(__file__).with_name("budgets.toml")
PCM_BYTES = 1_024
#: Time without a change in the counts after which the relay is considered idle.
STILL_S = 0.03
WAIT_S = 60.0
#: Batches that are not counted; then batches per count, and number of counts. The lowest count is used, because timers
#: (deadlines, `delta`s, the store) add to the others.
WARM_UP, REPEAT, TIMES = 10, 30, 4
#: Fraction by which a count may exceed its budget; and the least absolute excess, for counts below one per frame.
TOLERANCE, LEAST = 0.05, 0.02
#: The same for instructions: they depend on where objects happen to lie in memory.
MACHINE_TOLERANCE = 0.2


@attrs.frozen
class Shape:
    """How frames arrive: `batch` in one write, spread over `streams`, each read by `listeners`."""

    streams: int
    batch: int
    listeners: int = 1


SHAPES = {
    "one at a time": Shape(1, 1),
    "32 at once, for 8 readers": Shape(8, 32),
    "one for 20 readers": Shape(1, 1, 20),
}

#: Counter -> what it counts.
DESCRIPTIONS = {
    "calls": "calls of functions, Python's and C's",
    "bytecodes": "bytecodes",
    "steps": "steps of tasks (a checkpoint each)",
    "waits": "waits for I/O",
    "syscalls": "system calls",
    "kilo_instructions": "1,000 instructions",
}


class Pusher:
    """One request for each stream of a shape; pushes their frames in lock-step."""

    def __init__(self, fleet: RelaydFleet, shape: Shape) -> None:
        self._fleet, self._shape = fleet, shape
        each = (TIMES * REPEAT + WARM_UP) * shape.batch // shape.streams
        self._load = Load(each=each, streams=shape.streams, listeners=shape.listeners, pcm_bytes=PCM_BYTES)
        self._routes = fleet.begin(self._load)
        frames = [self._frames(route) for route in self._routes]
        turns = shape.batch // shape.streams
        #: Batches in which consecutive frames belong to different streams.
        self._batches = [
            b"".join(mine[turn] for turn in range(begin, begin + turns) for mine in frames)
            for begin in range(0, each, turns)
        ]
        self._got = 0
        for route in self._routes:
            for reader in route.readers:
                reader.on_message = self._counting(reader.on_message)

    def _frames(self, route: Route) -> list[bytes]:
        """All frames of a stream, in order."""
        first = self._fleet.first_seq
        made = variants(route.name, PCM_BYTES, first, self._load.each, self._fleet.wrapping)
        frames = []
        for seq in range(first, first + self._load.each):
            variant = [each for each in made if each.first_seq <= seq][-1]
            wire, at = bytearray(variant.wire), variant.seq_at + variant.wrapped
            wire[at : at + variant.seq_bytes] = bytes(byte ^ variant.mask for byte in seq.to_bytes(variant.seq_bytes))
            frames.append(bytes(wire))
        return frames

    def _counting(self, hear: Callable[[bytes], None]) -> Callable[[bytes], None]:
        def count(data: bytes) -> None:
            if len(data) > PCM_BYTES:
                self._got += 1
            else:
                hear(data)

        return count

    def push(self, batches: int) -> None:
        """Send `batches` batches, each after the last has arrived."""
        for batch in self._batches[:batches]:
            due = self._got + self._shape.batch * self._shape.listeners
            self._routes[0].sender.send(batch)
            self._fleet.until(lambda due=due: self._got == due)  # type: ignore[misc]
        del self._batches[:batches]

    def end(self) -> None:
        """Complete the requests."""
        self._fleet.end(self._routes, self._load)


Counts = dict[str, float]
#: Calls its argument, and returns what the relay did meanwhile.
Count = Callable[[Callable[[], None]], Counts]


def _of_each_shape(server: Server, count: Count) -> dict[str, Counts]:
    """Count the cost of a frame of each shape."""
    counted = {}
    with closing(RelaydFleet(server, most_streams=20, workers=1)) as fleet:
        for name, shape in SHAPES.items():
            pusher = Pusher(fleet, shape)
            pusher.push(WARM_UP)
            counts = [count(partial(pusher.push, REPEAT)) for _ in range(TIMES)]
            counted[name] = {what: min(each[what] for each in counts) / (REPEAT * shape.batch) for what in counts[0]}
            pusher.end()
    return counted


# -- in Python ----------------------------------------------------------------------------------------------------


@attrs.frozen
class Cells:
    """The numbers that a relay under `bench.counted` increments."""

    pid: int
    numbers: memoryview

    def switch(self, wanted: int) -> None:
        """Switch to another counter, or to none."""
        done = self.numbers[DONE]
        self.numbers[WANTED] = wanted
        os.kill(self.pid, signal.SIGUSR1)
        _await(lambda: self.numbers[DONE] != done)

    def settle(self) -> list[int]:
        """Return the numbers once they no longer change."""
        still = None
        while still != (still := self.numbers.tolist()):
            time.sleep(STILL_S)
        return still

    def count(self, counter: int, work: Callable[[], None]) -> list[int]:
        """Return the increase of each number during `work`."""
        self.switch(counter + 1)
        before = self.settle()
        work()
        after = self.settle()
        self.switch(OFF)
        return [b - a for a, b in zip(before, after, strict=True)]


def count_in_python() -> dict[str, Counts]:
    """Count calls and bytecodes of the relay's main thread, and steps of its tasks."""
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(8 * CELLS)
        numbers = memoryview(mmap(file.fileno(), 8 * CELLS)).cast("Q")
        counted = str(Path(__file__).with_name("counted.py"))
        with _open_quiet([Checkout.wanted().python, counted, file.name]) as server:
            cells = Cells(server.pid, numbers)
            calls = _of_each_shape(server, lambda work: {"calls": cells.count(CALLS, work)[CALLS]})
            codes = _of_each_shape(server, lambda work: {"bytecodes": cells.count(BYTECODES, work)[BYTECODES]})

            def steps(work: Callable[[], None]) -> Counts:
                rose = cells.count(STEPS, work)
                return {"steps": rose[STEPS], "waits": rose[WAITS]}

            tasks = _of_each_shape(server, steps)
    return {name: {**calls[name], **codes[name], **tasks[name]} for name in SHAPES}


# -- from outside -------------------------------------------------------------------------------------------------


def count_system_calls() -> dict[str, Counts]:
    """Count system calls with strace, over all threads."""

    def count(server: Server, work: Callable[[], None]) -> Counts:
        with tempfile.NamedTemporaryFile("r") as summary:
            command = ["strace", "-f", "-c", "-o", summary.name, "-p", str(server.pid)]
            with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
                assert strace.stderr is not None
                line = strace.stderr.readline()
                if "attached" not in line:
                    raise RuntimeError(f"strace: {line}")
                work()
                time.sleep(STILL_S)
                strace.send_signal(signal.SIGINT)
                strace.communicate()
            table = Path(summary.name).read_text()
        rows = re.findall(r"^\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:\d+\s+)?(\w+)$", table, re.MULTILINE)
        return {"syscalls": sum(int(number) for number, name in rows if name != "total")}

    with _open_quiet(serving_command(Checkout.wanted())) as server:
        return _of_each_shape(server, lambda work: count(server, work))


def count_instructions() -> dict[str, Counts]:
    """Count thousands of instructions with callgrind, which includes what Python's counts miss (copies, masking)."""
    with tempfile.TemporaryDirectory(prefix="relayd-bench-") as folder:

        def control(server: Server, *what: str) -> None:
            command = ["callgrind_control", *what, str(server.pid)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
            if done.returncode:
                raise RuntimeError(f"callgrind_control: {done.stdout}{done.stderr}")

        def count(server: Server, work: Callable[[], None]) -> Counts:
            control(server, "--instr=on")
            control(server, "--zero")
            known = set(Path(folder).glob("out.*"))
            work()
            time.sleep(STILL_S)
            control(server, "--dump")
            control(server, "--instr=off")
            made = set(Path(folder).glob("out.*")) - known
            totals = re.findall(r"^totals: (\d+)", "".join(path.read_text() for path in made), re.MULTILINE)
            return {"kilo_instructions": sum(map(int, totals)) / 1000}

        valgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/out.%p"]
        with _open_quiet([*valgrind, *serving_command(Checkout.wanted())]) as server:
            return _of_each_shape(server, lambda work: count(server, work))


@contextmanager
def _open_quiet(command: list[str]) -> Iterator[Server]:
    """Start a relay without pings, in which nothing depends on chance."""
    with open_relayd(store="memory", ping_interval_s=3600, command=command, PYTHONHASHSEED="0") as server:
        yield server


def _await(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not done():
        if time.monotonic() > deadline:
            raise RuntimeError("the counted relay does not react to SIGUSR1")
        time.sleep(0.001)


# -- against the budget -------------------------------------------------------------------------------------------

_COUNTERS: Mapping[str, tuple[str, Callable[[], dict[str, Counts]]]] = {
    "in Python": ("", count_in_python),
    "system calls": ("strace", count_system_calls),
    "instructions": ("valgrind", count_instructions),
}


def measure() -> dict[str, Counts]:
    """Count everything that can be counted on this machine."""
    counted: dict[str, Counts] = {name: {} for name in SHAPES}
    for label, (program, count) in _COUNTERS.items():
        if program and shutil.which(program) is None:
            print(f"absent: {program} (apt-get install {program}); {label} are not counted", file=sys.stderr)
            continue
        print(f"counting {label}...", file=sys.stderr, flush=True)
        for name, counts in count().items():
            counted[name] |= counts
    return counted


def _write(counted: Mapping[str, Counts]) -> None:
    lines = [
        "# What a frame may cost the relay; `make bench-guard` fails if a count exceeds it by more than the tolerance.",
        "# Written by `python -m bench.guard --write`, in the commit that changes a cost and says why.",
        f"tolerance = {TOLERANCE}",
        f"machine_tolerance = {MACHINE_TOLERANCE}",
    ]
    for name, counts in counted.items():
        lines += ["", f'["{name}"]', *(f"{what} = {number:.4g}" for what, number in counts.items())]
    BUDGETS.write_text("\n".join([*lines, ""]))


def verdicts(counted: Mapping[str, Counts], budgets: Mapping[str, Any]) -> tuple[str, bool]:
    """Compare counts with `budgets`, the parsed file; return a table, and whether all are within budget."""
    lines, kept = ["| a frame, | counted | budget | |", "| --- | ---: | ---: | --- |"], True
    for name, counts in counted.items():
        for what, number in counts.items():
            budget = budgets.get(name, {}).get(what)
            if budget is None:
                lines.append(f"| {name}: {DESCRIPTIONS[what]} | {number:.2f} | | no budget |")
                continue
            tolerance = budgets["machine_tolerance" if what == "kilo_instructions" else "tolerance"]
            over = number > budget * (1 + tolerance) + LEAST
            kept = kept and not over
            verdict = f"**over** by {number / budget - 1:+.0%}" if over else f"{number / budget - 1:+.1%}"
            lines.append(f"| {name}: {DESCRIPTIONS[what]} | {number:.2f} | {budget:g} | {verdict} |")
    return "\n".join(lines), kept


def main() -> int:
    """Returns 1 if a count exceeds its budget."""
    parser = argparse.ArgumentParser(prog="python -m bench.guard", description="Count the relay's work per frame.")
    parser.add_argument("--write", action="store_true", help=f"make these counts the budget ({BUDGETS.name})")
    args = parser.parse_args()
    counted = measure()
    if args.write:
        _write(counted)
    text, kept = verdicts(counted, tomllib.loads(BUDGETS.read_text()))
    print(text)
    if not kept:
        print(
            f"\nA frame costs more than {BUDGETS.name} allows. If that is intended, set the new budget: --write",
            file=sys.stderr,
        )
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
