"""`python -m tests.mutants`: puts one small fault after another into the modules that decide, and runs their tests.

A fault that no test notices is a survivor. Those that cannot matter stand in `survivors.txt` with the reason: they are
tried too, and not counted. The files stay as they are.
"""

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.mutants.mutations import Mutant, mutants_of
from tests.mutants.session import OPTIONS, MutantSession, Verdict, repeat_examples

_CORE = ("tests/relayd/core", "tests/relayd/connections/test_connections.py", "tests/relayd/views")
_FED = tuple(f"tests/relayd/connections/test_{name}.py" for name in ("live_inputs", "pipes", "fed_by_the_client"))
_LOST = tuple(f"tests/relayd/connections/test_{name}.py" for name in ("workers", "lost_workers", "restarts"))
#: Module or folder -> the tests that must notice a fault in it. Of these, each mutant runs those that reach it.
TESTS: dict[str, tuple[str, ...]] = {
    "relayd/scheduling": ("tests/relayd/scheduling", "tests/relayd/core"),
    "relayd/requests": ("tests/relayd/requests", *_CORE, *_FED),
    "relayd/core": (*_CORE, *_FED, *_LOST),
    "relayd/frames": ("tests/relayd/frames", "tests/relayd/requests", "tests/relayd/core/test_retention.py"),
    "relayd/auth": (
        "tests/relayd/auth",
        "tests/relayd/connections/test_client_limits.py",
        "tests/relayd/http/test_http_access.py",
    ),
    "relayd/http/openai": ("tests/relayd/http/openai",),
    "protocol/wire/codec.py": ("tests/protocol/wire",),
    "gpuworker/attempt.py": (
        "tests/gpuworker/test_attempt.py",
        "tests/gpuworker/test_worker.py",
        "tests/gpuworker/test_worker_link.py",
    ),
}
SURVIVORS = Path(__file__).with_name("survivors.txt")
#: More than this part alive is a failure.
MOST_ALIVE = 0.05


def known_survivors() -> dict[str, str]:
    """`Mutant.change` -> why it cannot matter."""
    lines = [line for line in SURVIVORS.read_text().splitlines() if line and not line.startswith("#")]
    return {change.strip(): reason.strip() for change, _, reason in (line.partition("  --  ") for line in lines)}


def all_mutants(modules: str = "") -> dict[tuple[str, ...], list[Mutant]]:
    """The mutants of the modules whose path:line: contains one of these words, by the tests that must notice them."""
    words = modules.split() or [""]
    found: dict[tuple[str, ...], list[Mutant]] = {}
    for place, tests in TESTS.items():
        for path in sorted(Path(place).glob("*.py")) or [Path(place)]:
            for mutant in mutants_of(path):
                if any(word in f"{path}:{mutant.line}:" for word in words):
                    found.setdefault(tests, []).append(mutant)
    return found


def drawn(groups: dict[tuple[str, ...], list[Mutant]], known: Iterable[str], sample: int, seed: int) -> set[Mutant]:
    """As many as `sample` (0: all) of those that are not known to survive, and all that are."""
    everyone = [mutant for mutants in groups.values() for mutant in mutants]
    unknown = [mutant for mutant in everyone if mutant.change not in set(known)]
    chosen = random.Random(seed).sample(unknown, min(sample or len(unknown), len(unknown)))
    return {mutant for mutant in everyone if mutant.change in set(known)} | set(chosen)


def report(verdicts: list[Verdict], known: Iterable[str], gone: Iterable[str]) -> bool:
    """Print it; whether few enough are alive, and the list of survivors is right."""
    alive = {verdict.mutant.change for verdict in verdicts if verdict.alive}
    killed = {verdict.mutant.change for verdict in verdicts} - alive
    counted = [verdict for verdict in verdicts if verdict.mutant.change not in set(known)]
    tried, lived = Counter[Path](), Counter[Path]()
    for verdict in counted:
        tried[verdict.mutant.path] += 1
        lived[verdict.mutant.path] += verdict.alive
    print()
    for path, count in sorted(tried.items()):
        print(f"{path!s:40} {count:4} tried, {lived[path]:3} alive ({100 * lived[path] / count:.1f} %)")
    percentage = 100 * lived.total() / (len(counted) or 1)
    print(f"{'in all':40} {len(counted):4} tried, {lived.total():3} alive ({percentage:.1f} %)")
    for verdict in sorted(counted, key=lambda verdict: (verdict.mutant.path, verdict.mutant.line)):
        if verdict.alive:
            print(f"  {verdict.mutant.name}{'' if verdict.tests else '  (no test reaches it)'}")
    outdated = [*(f"killed: {change}" for change in known if change in killed), *(f"gone: {change}" for change in gone)]
    for line in outdated:
        print(f"  {SURVIVORS.name} names a mutant that is {line}")
    return not outdated and lived.total() <= MOST_ALIVE * len(counted)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--sample", type=int, default=0, help="so many mutants, drawn by the seed (default: all)")
    parser.add_argument("--seed", type=int, default=1, help="of the sample (default: 1)")
    parser.add_argument("--modules", default="", help="words: mutants whose path:line: contains one of them")
    parser.add_argument("--tests", default="", help="these tests alone, instead of all that belong to the modules")
    parser.add_argument("--jobs", type=int, default=2, help="processes that test (default: 2)")
    parser.add_argument("--minutes", type=float, default=0, help="begin no mutant after that (default: no limit)")
    given = parser.parse_args()
    until = time.monotonic() + given.minutes * 60 if given.minutes else float("inf")
    groups, known = all_mutants(given.modules), known_survivors()
    gone = known.keys() - {mutant.change for mutants in all_mutants().values() for mutant in mutants}
    chosen = drawn(groups, known, given.sample, given.seed)
    print(f"{sum(map(len, groups.values()))} mutants, {len(chosen)} of them to try; seed {given.seed}", flush=True)
    repeat_examples()
    verdicts: list[Verdict] = []
    for tests, mutants in groups.items():
        if trying := [mutant for mutant in mutants if mutant in chosen]:
            doubted = {mutant for mutant in trying if mutant.change in known}
            session, own = MutantSession(trying, given.jobs, until, doubted), given.tests.split() or tests
            if pytest.main([*OPTIONS, *own], plugins=[session]) not in (0, 5):
                parser.error(f"they must pass first, in the repository's root: {' '.join(own)}")
            verdicts += session.verdicts
    return int(not report(verdicts, known, gone))


if __name__ == "__main__":
    sys.exit(main())
