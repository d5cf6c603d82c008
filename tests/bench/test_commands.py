"""What each short command imports: no more than it needs, as whoever types it waits for that."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.commands import COMMANDS, environment, python_arguments

#: What a relay, a screen or an engine needs, and no short command does.
HEAVY = {
    *("starlette", "h11", "prometheus_client", "python_multipart", "structlog", "anyio", "argon2"),
    *("textual", "rich", "numpy", "torch", "av", "soxr", "espeakng_loader", "asyncio", "httpx2"),
}
#: What a command needs that talks to a relay or opens its store.
TALKING = {"trio", "websockets", "ssl", "msgpack", "sqlite3"}
#: What only the command itself needs, and none that shows its help.
WORKING = {"attr", "importlib.metadata"}

#: Command -> modules that it must not import.
WITHOUT = {
    "relay --help": HEAVY | TALKING | WORKING,
    "relay --version": HEAVY | TALKING | {"attr"},
    "relay say --help": HEAVY | TALKING,
    "relay spaces": HEAVY | {"websockets.client", "sqlite3"},
    "relayd --help": HEAVY | TALKING | WORKING,
    "relayd --version": HEAVY | TALKING | {"attr"},
    "relayd space create --help": HEAVY | TALKING,
    "relayd check-config": HEAVY | TALKING,
    "relayd space list": HEAVY | {"websockets.client"},
    "relayd token list": HEAVY | {"websockets.client"},
    "gpuworker --help": HEAVY | TALKING | WORKING,
    "gpuworker --version": HEAVY | TALKING | {"attr"},
    "gpuworker run --help": HEAVY | {"websockets.client", "sqlite3"},
    "gpuworker engines": HEAVY | TALKING,
    "relay-tui --help": HEAVY | TALKING | WORKING,
    "relay-tui --version": HEAVY | TALKING | {"attr"},
}


def test_every_command_that_is_measured_has_its_list() -> None:
    assert {" ".join(command) for command in COMMANDS} == set(WITHOUT)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_short_command_imports_nothing_that_it_does_not_need(command: tuple[str, ...], tmp_path: Path) -> None:
    line = [sys.executable, "-X", "importtime", *python_arguments(command)]
    done = subprocess.run(
        line, capture_output=True, text=True, check=False, env=environment(tmp_path), cwd=tmp_path, timeout=60
    )
    told = [each.rpartition("|")[2].strip() for each in done.stderr.splitlines() if each.startswith("import time:")]
    imported = {name for module in told for name in (module, module.partition(".")[0])}
    assert "argparse" in imported
    assert imported & WITHOUT[" ".join(command)] == set()
