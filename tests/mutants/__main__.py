"""`python -m tests.mutants`: puts one small fault after another into the modules that decide, and runs their tests.

A fault that no test notices is a survivor; those that cannot matter stand in `survivors.txt` with the reason. The files
stay as they are: a forked process imports the mutant instead of the module, and runs the tests in itself.
"""

import argparse
import importlib.abc
import importlib.util
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from tests.mutants.mutations import Mutant, mutants_of, mutated

#: Module or folder -> the tests that must notice a fault in it, those that notice most first.
TESTS: dict[str, tuple[str, ...]] = {
    "relayd/scheduling": ("tests/relayd/scheduling", "tests/relayd/core"),
    "relayd/requests": ("tests/relayd/requests", "tests/relayd/core", "tests/relayd/connections/test_connections.py"),
    "relayd/core": ("tests/relayd/core", "tests/relayd/connections/test_connections.py", "tests/relayd/views"),
    "relayd/frames": ("tests/relayd/frames", "tests/relayd/requests", "tests/relayd/core/test_retention.py"),
    "relayd/auth": (
        "tests/relayd/auth",
        "tests/relayd/connections/test_client_limits.py",
        "tests/relayd/http/test_http_access.py",
    ),
    "protocol/wire/codec.py": ("tests/protocol/wire",),
    "gpuworker/attempt.py": ("tests/gpuworker/test_worker.py", "tests/gpuworker/test_worker_link.py"),
}
SURVIVORS = Path(__file__).with_name("survivors.txt")
#: A mutant that makes its tests hang is noticed, too.
PATIENCE_S = 240.0
#: Imported once, before the forks.
_HEAVY = ("pytest", "pytest_trio", "hypothesis", "trio", "attrs", "msgpack", "structlog", "starlette", "h11", "sqlite3")


def known_survivors() -> dict[str, str]:
    """Change -> why it cannot matter."""
    lines = [line for line in SURVIVORS.read_text().splitlines() if line and not line.startswith("#")]
    return {change.strip(): reason.strip() for change, _, reason in (line.partition("  --  ") for line in lines)}


def change_of(mutant: Mutant) -> str:
    """A mutant's name that outlives changes of other lines."""
    return f"{mutant.path}: {mutant.before}  ->  {mutant.after}"


def _tests_for(path: Path, places: Sequence[str]) -> tuple[str, ...]:
    """The files of tests, those that are named after the module first."""
    files = [file for place in map(Path, places) for file in (sorted(place.rglob("test_*.py")) or [place])]
    return tuple(str(file) for file in sorted(files, key=lambda file: path.stem not in file.stem))


def all_mutants(only: str) -> list[tuple[Mutant, tuple[str, ...]]]:
    """Every mutant of the modules that decide, and the tests of its module."""
    found = []
    for place, tests in TESTS.items():
        for path in sorted(Path(place).glob("*.py")) or [Path(place)]:
            own = _tests_for(path, tests)
            found += [(mutant, own) for mutant in mutants_of(path) if only in f"{path}:{mutant.line}:"]
    return found


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the mutant where its module is asked for."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant
        self.name = ".".join(mutant.path.with_suffix("").parts)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.mutant.path, loader=self)

    def exec_module(self, module: ModuleType) -> None:
        """See `importlib.abc.Loader`."""
        code = compile(mutated(self.mutant.path, self.mutant.number), str(self.mutant.path), "exec")
        exec(code, vars(module))


def _run_tests(mutant: Mutant | None, tests: tuple[str, ...]) -> int:
    """In the forked process: pytest's exit code."""
    import pytest

    os.setpgid(0, 0)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    if mutant is not None:
        sys.meta_path.insert(0, _Finder(mutant))
    return int(pytest.main(["-x", "-q", "--no-header", "--assert=plain", "-p", "no:cacheprovider", *tests]))


def lives(mutant: Mutant | None, tests: tuple[str, ...]) -> bool:
    """Whether all of `tests` pass with the mutant."""
    pid = os.fork()
    if not pid:
        code = 70
        try:
            code = _run_tests(mutant, tests)
        finally:
            os._exit(code)
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--sample", type=int, default=0, help="so many mutants, drawn by the seed (default: all)")
    parser.add_argument("--seed", type=int, default=1, help="of the sample (default: 1)")
    parser.add_argument("--only", default="", help="mutants whose path:line: contains this")
    parser.add_argument("--jobs", type=int, default=2, help="processes that test (default: 2)")
    parser.add_argument("--minutes", type=float, default=0, help="begin no mutant after that (default: no limit)")
    given = parser.parse_args()
    for name in _HEAVY:
        importlib.import_module(name)
    everyone = all_mutants(given.only)
    known = known_survivors()
    drawn = [pair for pair in everyone if change_of(pair[0]) not in known]
    if given.sample:
        drawn = random.Random(given.seed).sample(drawn, min(given.sample, len(drawn)))
    until = time.monotonic() + given.minutes * 60 if given.minutes else float("inf")
    told = f"{len(everyone)} mutants, {len(everyone) - len(drawn)} of them not tried"
    print(f"{told}; seed {given.seed}", flush=True)
    for tests in {drawn_tests for _mutant, drawn_tests in drawn}:
        if any(not Path(test).exists() for test in tests):  # which would kill every mutant
            parser.error(f"run it in the repository's root; not all there: {' '.join(tests)}")
    alive: list[Mutant] = []
    tried = 0

    def one(pair: tuple[Mutant, tuple[str, ...]]) -> None:
        nonlocal tried
        mutant, tests = pair
        if time.monotonic() > until:
            return
        began = time.monotonic()
        survives = lives(mutant, tests)
        tried += 1
        if survives:
            alive.append(mutant)
        print(
            f"{tried:4} {'ALIVE ' if survives else 'killed'} {time.monotonic() - began:5.1f} s  {mutant.name}",
            flush=True,
        )

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(one, drawn))
    print(f"\n{tried} tried, {len(alive)} alive ({100 * len(alive) / max(1, tried):.1f} %)")
    for mutant in sorted(alive, key=lambda mutant: (mutant.path, mutant.line)):
        print(f"  {mutant.name}")
    return int(len(alive) > 0.05 * tried)


if __name__ == "__main__":
    sys.exit(main())
