"""`python -m tests.fuzz`: runs each target for minutes, and prints how many executions it had and what was found.

atheris (libFuzzer) guides the mutations by coverage where it is installed and the target is in this process; otherwise
they are drawn from the seed. An input that broke a promise is kept in a file, and is run again with `--replay`.
"""

import argparse
import random
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

from tests.fuzz.mutate import mutations

NAMES = ("codec", "frames", "http", "audio", "semantics", "sdp")
#: Targets whose code is Python, and in this process.
GUIDED = ("codec", "frames")
#: Findings of one target after which it ends: one fault mostly has many inputs.
MAX_FINDINGS = 10
#: Longest input: of a frame that is larger than a small one.
MAX_BYTES = 100_000


def fuzz_guided(name: str, folder: Path, seed: int, seconds: int) -> None:
    """Fuzz with atheris, which ends the process; libFuzzer prints the executions, and stops at a finding."""
    import atheris

    with atheris.instrument_imports(include=["protocol"]):
        from tests.fuzz.targets import TARGETS
    with TARGETS[name]() as target:
        corpus = folder / f"{name}-corpus"
        corpus.mkdir()
        for data in target.seeds:
            (corpus / sha256(data).hexdigest()).write_bytes(data)
        options = [f"-max_total_time={seconds}", f"-seed={seed}", "-print_final_stats=1", f"-max_len={MAX_BYTES}"]
        atheris.Setup([name, str(corpus), f"-artifact_prefix={folder}/{name}-", *options], target.run)
        atheris.Fuzz()


def fuzz_unguided(name: str, folder: Path, seed: int, seconds: float) -> None:
    """Fuzz with mutations that nothing guides; prints what libFuzzer would."""
    from tests.fuzz.targets import TARGETS

    until = time.monotonic() + seconds
    executions = findings = 0
    inputs: Iterator[bytes] | None = None
    while time.monotonic() < until and findings < MAX_FINDINGS:
        with TARGETS[name]() as target:  # a relay that was found to have a fault is started anew
            inputs = inputs or mutations(random.Random(f"{name} {seed}"), target.seeds)
            for data in inputs:
                if time.monotonic() > until:
                    break
                executions += 1
                try:
                    target.run(data)
                except Exception:  # noqa: BLE001 - whatever it is, it is a finding
                    traceback.print_exc()
                    findings += 1
                    path = folder / f"{name}-crash-{sha256(data).hexdigest()[:16]}"
                    path.write_bytes(data)
                    print(f"Test unit written to {path}", file=sys.stderr)
                    break
    print(f"stat::number_of_executed_units: {executions}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="of each target (default: 1)")
    parser.add_argument("--target", choices=NAMES, action="append", help="only this (may be repeated)")
    parser.add_argument("--seed", type=int, default=1, help="of the mutations (default: 1)")
    parser.add_argument("--replay", type=Path, help="run one target with this file alone, and print its traceback")
    parser.add_argument("--in", dest="inside", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    names = given.target or NAMES
    if given.replay:
        from tests.fuzz.targets import TARGETS

        with TARGETS[names[0]]() as target:
            target.run(given.replay.read_bytes())
        return 0
    if given.inside:
        guided = names[0] in GUIDED and find_spec("atheris") is not None
        (fuzz_guided if guided else fuzz_unguided)(names[0], given.inside, given.seed, int(given.minutes * 60))
        return 0
    folder = Path(tempfile.mkdtemp(prefix="relayd-fuzz-"))
    print("| target | executions | findings |\n| --- | ---: | ---: |", flush=True)
    found = 0
    for name in names:
        command = [sys.executable, "-m", "tests.fuzz", "--target", name, "--in", str(folder)]
        command += ["--minutes", str(given.minutes), "--seed", str(given.seed)]
        done = subprocess.run(command, capture_output=True)
        told = (done.stdout + done.stderr).decode("utf-8", "replace")
        (folder / f"{name}.log").write_text(told)
        units = re.findall(r"number_of_executed_units: (\d+)", told)
        written = re.findall(r"Test unit written to (\S+)", told)
        lost = not units and not written
        found += len(written) + lost
        executions = f"{int(units[-1]):,}" if units else "?"
        print(f"| {name} | {executions} | {'it fell over' if lost else len(written)} |", flush=True)
    print(f"\nlogs, and the inputs of findings: {folder}")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
