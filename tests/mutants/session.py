"""Runs mutants inside a session of pytest that has collected their tests: each in a fork, with the tests that reach it.

In the fork the mutant's function gets the code of the mutant. For what runs only while a module is imported, such as
defaults, constants and the functions that make them, all of ours is imported again in the fork.
"""

import contextlib
import gc
import hashlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import attrs
import coverage
import hypothesis
import pytest

from tests.mutants.mutations import Mutant, mutated

#: A test that takes longer than this many times its usual time hangs, and has noticed the mutant.
PATIENCE, PATIENCE_S = 4.0, 10.0
#: Of a mutant that eats memory.
MAX_BYTES = 6 << 30
#: What each test reaches, as long as neither it nor the code has changed.
REACHED = Path(".mutants.json")
OPTIONS = ("-q", "--no-header", "--assert=plain", "-p", "no:cacheprovider")


@attrs.frozen
class Reach:
    """A test: how long it takes, and the lines of the modules that it runs."""

    seconds: float
    lines: dict[str, set[int]]


@attrs.define
class Verdict:
    """What became of a mutant."""

    mutant: Mutant
    alive: bool
    seconds: float
    tests: int


def repeat_examples() -> None:
    """The same examples in each run, and no search for the simplest one that fails."""
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    every = list(hypothesis.HealthCheck)  # while lines are counted, all is slow
    hypothesis.settings.register_profile(
        "mutants", derandomize=True, database=None, deadline=None, phases=phases, suppress_health_check=every
    )
    hypothesis.settings.load_profile("mutants")


@attrs.define(eq=False)
class MutantSession:
    """A plugin: in the place of the tests, it runs `mutants`."""

    mutants: Sequence[Mutant]
    jobs: int
    until: float
    #: Those that are known to survive: tried again before they count as killed, as a busy machine fails tests, too.
    known: set[Mutant]
    verdicts: list[Verdict] = attrs.field(factory=list)
    _reach: dict[str, Reach] = attrs.field(factory=dict)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """Run the mutants, unless the tests could not be collected."""
        if session.testsfailed:
            return None
        session.config.pluginmanager.unregister(name="terminalreporter")
        self._measure(session)
        items = {item.nodeid: item for item in session.items}
        functions = _functions({str(mutant.path.resolve()) for mutant in self.mutants})
        running: dict[int, tuple[Mutant, float, int]] = {}
        waiting = sorted(self.mutants, key=lambda mutant: bool(mutant.owner))  # taken from the end: imports come last
        while waiting or running:
            while waiting and len(running) < self.jobs and time.monotonic() < self.until:
                mutant = waiting.pop()
                tried = mutant
                if not (tests := self._tests_for(mutant)):  # perhaps only an import runs it
                    tried = attrs.evolve(mutant, owner="")
                    tests = self._tests_for(tried)
                if tests:
                    pid = os.fork() or _in_fork(tried, [(items[test], limit) for test, limit in tests], functions)
                    running[pid] = mutant, time.monotonic(), len(tests)
                else:
                    self._judge(mutant, True, time.monotonic(), 0)
            if not running:
                break
            pid, status = os.wait()
            mutant, began, count = running.pop(pid)
            _end_group(pid)
            if status and mutant in self.known:
                self.known.remove(mutant)
                waiting.append(mutant)
                continue
            self._judge(mutant, status == 0, began, count)
        return True

    def _judge(self, mutant: Mutant, alive: bool, began: float, tests: int) -> None:
        verdict = Verdict(mutant, alive, time.monotonic() - began, tests)
        self.verdicts.append(verdict)
        told = "ALIVE " if alive else "killed"
        print(f"{told} {verdict.seconds:5.1f} s, {tests:3} tests  {mutant.name}", flush=True)

    def _tests_for(self, mutant: Mutant) -> list[tuple[str, float]]:
        """The tests that can notice it, and how long each may take: its module's own first, then by time."""
        path, stem = str(mutant.path), mutant.path.stem
        lines = set(mutant.lines) if mutant.owner else set(range(1 << 16))
        able = [(test, reach) for test, reach in self._reach.items() if not lines.isdisjoint(reach.lines.get(path, ()))]
        able.sort(key=lambda pair: (stem not in pair[0].partition("::")[0], pair[1].seconds))
        return [(test, PATIENCE_S + PATIENCE * reach.seconds) for test, reach in able]

    def _measure(self, session: pytest.Session) -> None:
        """Find out what each test reaches."""
        known = json.loads(REACHED.read_text()) if REACHED.exists() else {}
        files: dict[Path, list[pytest.Item]] = {}
        for item in session.items:
            files.setdefault(item.path, []).append(item)
        code = _digest(path for top in ("protocol", "relayd", "gpuworker", "tests/support") for path in _modules(top))
        keys = {path: _digest([path], code) for path in files}
        new = [path for path in files if known.get(str(path), [""])[0] != keys[path]]
        shares = [new[at :: self.jobs] for at in range(self.jobs)]
        pipes = [_forked_measure([item for path in share for item in files[path]]) for share in shares if share]
        found: dict[str, tuple[float, dict[str, list[int]]]] = {}
        for pid, pipe in pipes:
            with os.fdopen(pipe) as told:
                answer = json.loads(told.read() or "null")
            os.waitpid(pid, 0)
            if not isinstance(answer, dict):
                raise pytest.UsageError(f"without a mutant, these tests fail: {answer}")
            found.update(answer)
        for path in new:
            known[str(path)] = keys[path], {item.nodeid: found[item.nodeid] for item in files[path]}
        REACHED.write_text(json.dumps(known))
        for path in files:
            for test, (seconds, lines) in known[str(path)][1].items():
                self._reach[test] = Reach(seconds, {file: set(numbers) for file, numbers in lines.items()})


def _modules(top: str) -> Iterator[Path]:
    return iter(sorted(Path(top).rglob("*.py")))


def _digest(paths: Iterable[Path], before: str = "") -> str:
    return hashlib.sha256(before.encode() + b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def _end_group(group: int) -> None:
    """End what a test has started and not ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _forked_measure(items: list[pytest.Item]) -> tuple[int, int]:
    """A process that runs `items` and writes what each reaches: its id, and the pipe."""
    out, into = os.pipe()
    if pid := os.fork():
        os.close(into)
        return pid, out
    answer: object = "?"
    try:
        _silence()
        answer = _reached(items)
    finally:
        with os.fdopen(into, "w") as told:
            told.write(json.dumps(answer))
        os._exit(0)


def _reached(items: list[pytest.Item]) -> object:
    root = Path.cwd()
    tracer = coverage.Coverage(
        data_file=None, config_file=False, messages=False, include=[f"{root}/{top}/*" for top in _MEASURED]
    )
    seconds = {}
    tracer.start()
    for item, following in zip(items, [*items[1:], None], strict=True):
        tracer.switch_context(item.nodeid)
        began = time.monotonic()
        item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
        seconds[item.nodeid] = time.monotonic() - began
        if item.session.testsfailed:
            return item.nodeid
    tracer.stop()
    lines: dict[str, dict[str, list[int]]] = {item.nodeid: {} for item in items}
    data = tracer.get_data()
    for file in data.measured_files():
        name = str(Path(file).relative_to(root))
        for line, contexts in data.contexts_by_lineno(file).items():
            for context in contexts:
                if context:
                    lines[context].setdefault(name, []).append(line)
    return {test: (seconds[test], reached) for test, reached in lines.items()}


_MEASURED = ("protocol", "relayd", "gpuworker")


def _silence() -> None:
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(silence, stream)


def _in_fork(
    mutant: Mutant, tests: list[tuple[pytest.Item, float]], functions: dict[tuple[str, str, int], list[FunctionType]]
) -> int:
    """In the forked process: run the tests with the mutant. Does not return."""
    code = 70
    try:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
        _silence()
        if mutant.owner and _replace(mutant, functions):
            code = _run_tests(tests)
        else:
            code = _run_anew(mutant, {item.nodeid: limit for item, limit in tests})
    finally:
        os._exit(code & 0xFF)


def _run_tests(tests: list[tuple[pytest.Item, float]]) -> int:
    """Run them until one fails: 0 if none does."""
    following = [item for item, _limit in tests[1:]]
    for (item, limit), after in zip(tests, [*following, None], strict=True):
        signal.setitimer(signal.ITIMER_REAL, limit)  # ends the process
        item.ihook.pytest_runtest_protocol(item=item, nextitem=after)
        if item.session.testsfailed:
            return 1
    return 0


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The functions of a module, and the methods of its classes."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            if inner.co_flags & 1:  # CO_OPTIMIZED: a function; a class's body is not
                yield inner
            else:
                yield from _codes(inner)


def _functions(paths: set[str]) -> dict[tuple[str, str, int], list[FunctionType]]:
    found: dict[tuple[str, str, int], list[FunctionType]] = {}
    for function in gc.get_objects():
        if isinstance(function, FunctionType) and function.__code__.co_filename in paths:
            code = function.__code__
            found.setdefault((code.co_filename, code.co_qualname, code.co_firstlineno), []).append(function)
    return found


def _replace(mutant: Mutant, functions: dict[tuple[str, str, int], list[FunctionType]]) -> bool:
    """Give the mutant's function the mutant's code; False where that is not possible."""
    path = str(mutant.path.resolve())
    for code in _codes(compile(mutated(mutant.path, mutant.number), path, "exec")):
        if code.co_qualname == mutant.owner and mutant.line in range(code.co_firstlineno, _last_line(code) + 1):
            live = functions.get((path, code.co_qualname, code.co_firstlineno), [])
            for function in live:
                if function.__code__.co_freevars != code.co_freevars:
                    return False
                function.__code__ = code
            return bool(live)
    return False


def _last_line(code: CodeType) -> int:
    lines = [end for _start, end, *_columns in code.co_positions() if end is not None]
    return max([code.co_firstlineno, *lines, *(_last_line(c) for c in code.co_consts if isinstance(c, CodeType))])


@attrs.define(eq=False)
class _Finder(MetaPathFinder, Loader):
    """Imports the mutant where its module is asked for, and runs its tests."""

    mutant: Mutant
    limits: dict[str, float]
    died: bool = True

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        if fullname != ".".join(self.mutant.path.with_suffix("").parts):
            return None
        return spec_from_file_location(fullname, self.mutant.path, loader=self)

    def exec_module(self, module: ModuleType) -> None:
        """See `importlib.abc.Loader`."""
        exec(compile(mutated(self.mutant.path, self.mutant.number), str(self.mutant.path), "exec"), vars(module))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run them in the order given."""
        items = {item.nodeid: item for item in session.items}
        missing = self.limits.keys() - items.keys()
        tests = [(items[test], limit) for test, limit in self.limits.items() if test in items]
        self.died = bool(session.testsfailed or missing or _run_tests(tests))
        return True


def _run_anew(mutant: Mutant, limits: dict[str, float]) -> int:
    """Import all of ours again, with a mutant that only an import runs, and run its tests."""
    for name in list(sys.modules):
        if name.partition(".")[0] in (*_MEASURED, "tests"):
            del sys.modules[name]
    finder = _Finder(mutant, limits)
    sys.meta_path.insert(0, finder)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE_S + sum(limits.values()))
    pytest.main([*OPTIONS, *{test.partition("::")[0]: None for test in limits}], plugins=[finder])
    return int(finder.died)
