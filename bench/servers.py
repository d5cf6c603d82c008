"""Relays as processes of their own: started, watched from outside, stopped."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import attrs

from relayd.auth import Tokens
from relayd.store.base import PutToken
from relayd.store.opening import open_offline

SPACE = "bench"
READY_S = 30.0
STOP_S = 10.0
LOOK_AGAIN_S = 0.02

#: Results are let go of soon, so that one round's frames do not fill the memory in which the next is measured.
_CONFIG = f"""
listen = "127.0.0.1:0"
state_dir = "state"
[log]
format = "json"
[results]
retain_s = 0
[spaces.{SPACE}]
max_workers = 16
"""


@attrs.frozen
class Server:
    """A relay that listens on loopback. Its process is looked at, never asked."""

    name: str
    pid: int
    port: int
    #: Role -> token; empty where none is needed.
    tokens: dict[str, str] = attrs.field(factory=dict)

    def cpu_s(self) -> float:
        """CPU seconds of the process so far, all threads, user and system.

        The clock of another process (clock_getcpuclockid(3)) counts nanoseconds; /proc/PID/stat counts 10 ms ticks.
        """
        return time.clock_gettime((~self.pid << 3) | 2)

    def rss_kib(self) -> int:
        """Resident memory."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
        raise RuntimeError(f"{self.name} has no VmRSS: it is gone")


@contextmanager
def open_relayd() -> Iterator[Server]:
    """The real daemon, on a free port, with a throw-away state folder; it logs to a file, as under systemd."""
    with tempfile.TemporaryDirectory(prefix="relayd-bench-") as name:
        folder = Path(name)
        (folder / "relayd.toml").write_text(_CONFIG)
        issued = {}
        with open_offline(folder / "state") as store:
            tokens = Tokens()
            for role in ("worker", "client"):
                token = tokens.create(role=role, name=f"bench-{role}", now=time.time(), spaces=[SPACE])
                store.commit(PutToken(token.record))
                issued[role] = token.text
        command = [*relayd_command(), "serve", "--config", str(folder / "relayd.toml")]
        with open_process(command, folder / "log") as process:
            port = _port_in_log(process, folder / "log")
            yield Server("relayd", process.pid, port, issued)


def relayd_command() -> list[str]:
    """The command to measure; RELAYD_BENCH_COMMAND puts another (a profiler's) in its place."""
    return os.environ.get("RELAYD_BENCH_COMMAND", "").split() or [sys.executable, "-m", "relayd.cli"]


@contextmanager
def open_plain() -> Iterator[Server]:
    """The relay of a few lines, `bench.plain_relay`."""
    with tempfile.TemporaryDirectory(prefix="relayd-bench-") as name:
        log = Path(name, "log")
        with open_process([sys.executable, "-m", "bench.plain_relay"], log) as process:
            yield Server("plain trio-websocket", process.pid, _port_in_log(process, log))


@contextmanager
def open_process(command: list[str], log: Path, **environ: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that writes to `log` and sees no relay of the environment but in `environ`; ended with the block."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("RELAY_", "RELAYD_"))}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=inherited | environ)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _port_in_log(process: "subprocess.Popen[bytes]", log: Path) -> int:
    """The port of the line that says `listening`."""
    deadline = time.monotonic() + READY_S
    while process.poll() is None and time.monotonic() < deadline:
        for line in log.read_text().splitlines():
            try:
                told = json.loads(line)
            except ValueError:
                continue
            if told.get("event") == "listening":
                return int(urlsplit(told["urls"][0]).port or 0)
        time.sleep(LOOK_AGAIN_S)
    raise RuntimeError(f"{' '.join(process.args)} did not start:\n{log.read_text()[-2000:]}")  # type: ignore[arg-type]
