"""`python -m bench.commands`: measures the CPU time of each short command, relative to an empty Python process."""

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROUNDS = 7
MODULES = {"relay": "protocol.cli", "relayd": "relayd.cli", "gpuworker": "gpuworker.cli", "relay-tui": "tui.cli"}
EMPTY = ("-c", "pass")
#: Commands that people type, or that scripts call in a loop.
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("relay", "--help"),
    ("relay", "--version"),
    ("relay", "say", "--help"),
    ("relay", "spaces"),
    ("relayd", "--help"),
    ("relayd", "--version"),
    ("relayd", "space", "create", "--help"),
    ("relayd", "check-config"),
    ("relayd", "space", "list"),
    ("relayd", "token", "list"),
    ("gpuworker", "--help"),
    ("gpuworker", "--version"),
    ("gpuworker", "run", "--help"),
    ("gpuworker", "engines"),
    ("relay-tui", "--help"),
    ("relay-tui", "--version"),
)


def python_arguments(command: tuple[str, ...]) -> tuple[str, ...]:
    """The arguments with which Python runs `command`."""
    return ("-m", MODULES[command[0]], *command[1:])


def environment(folder: Path) -> dict[str, str]:
    """An environment in which no command finds a relay, a token or a file of this machine's owner."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("RELAY_", "RELAYD_"))}
    return inherited | {"RELAYD_STATE_DIR": str(folder), "PYTHONPATH": str(Path(__file__).parents[1])}


def main() -> None:
    """Measure all commands in turns, and print a table."""
    runs = {EMPTY: EMPTY} | {command: python_arguments(command) for command in COMMANDS}
    spent: dict[tuple[str, ...], list[float]] = {name: [] for name in runs}
    with tempfile.TemporaryDirectory(prefix="relayd-bench-") as folder:
        environ = environment(Path(folder))
        for number in range(ROUNDS + 1):
            for name, arguments in runs.items():
                cpu_s = _cpu_s(arguments, environ, folder)
                if number:  # the first round also writes bytecode files
                    spent[name].append(cpu_s)
    empty_s = median(spent[EMPTY])
    print(f"python -c pass: {empty_s * 1000:.0f} ms of CPU")
    for command in COMMANDS:
        ratios = sorted(each / empty for each, empty in zip(spent[command], spent[EMPTY], strict=True))
        print(f"{' '.join(command):<28} {median(ratios):5.1f} times that ({ratios[0]:.1f} to {ratios[-1]:.1f})")


def _cpu_s(arguments: tuple[str, ...], environ: dict[str, str], folder: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], env=environ, cwd=folder, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


if __name__ == "__main__":
    main()
