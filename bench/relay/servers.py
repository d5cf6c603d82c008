"""Relays as separate processes: started, observed from outside, stopped. A peer that is not installed is `Absent`."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from urllib.parse import urlsplit

import attrs

SPACE = "bench"
READY_S = 90.0
STOP_S = 10.0
LOOK_AGAIN_S = 0.02
#: The folder in which the peers are started.
ROOT = Path(__file__).resolve().parents[2]

#: Results are dropped soon, so that one round's frames do not fill the memory in which the next is measured. Pings are
#: rare, because the other peers send none. Idle connections are measured separately.
_CONFIG = f"""
listen = "127.0.0.1:0"
state_dir = "state"
store = "%s"
[log]
format = "json"
[limits]
max_connections = 10_000
max_result_bytes = 1_073_741_824
ping_interval_s = %g
dead_after_s = %g
[results]
memory_bytes = %d
[spaces.{SPACE}]
max_workers = 16
max_queued_per_principal = 1_000
run_timeout_s = 3_600
idle_timeout_s = 3_600
"""


class Absent(Exception):
    """A peer is not installed; the message says how to install it."""


@attrs.frozen
class Server:
    """A relay that listens on loopback. Its process is only observed from outside."""

    name: str
    pid: int
    port: int
    #: Role -> token; empty if none is needed.
    tokens: dict[str, str] = attrs.field(factory=dict)
    #: The socket to which a proxy forwards.
    behind: socket.socket | None = None

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


# -- relayd -------------------------------------------------------------------------------------------------------


@attrs.frozen
class Checkout:
    """The relayd that is measured: this one, or the one at RELAYD_BENCH_CHECKOUT (with a .venv of its own)."""

    folder: Path
    python: str

    @classmethod
    def wanted(cls) -> "Checkout":
        """The checkout chosen by the environment."""
        if not (checkout := os.environ.get("RELAYD_BENCH_CHECKOUT")):
            return cls(ROOT, sys.executable)
        folder = Path(checkout).resolve()
        own = folder / ".venv/bin/python"
        return cls(folder, str(own) if own.exists() else sys.executable)

    @property
    def command(self) -> list[str]:
        """The command line that runs it."""
        return [self.python, "-m", "relayd.cli"]

    @property
    def commit(self) -> str:
        """The short commit id, with a `+` if files have changed since; empty without git."""
        git = ["git", "-C", str(self.folder)]
        output = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
        return output.stdout.strip() + ("+" if changed.stdout.strip() else "")


def serving_command(checkout: Checkout) -> list[str]:
    """The command that serves; RELAYD_BENCH_COMMAND replaces it (for a profiler)."""
    return shlex.split(os.environ.get("RELAYD_BENCH_COMMAND", "")) or checkout.command


@contextmanager
def open_relayd(
    *,
    store: str = "sqlite",
    ping_interval_s: float = 5.0,
    memory_bytes: int = 256 * 1024 * 1024,
    command: list[str] | None = None,
    **environ: str,
) -> Iterator[Server]:
    """Start the real daemon on a free port, with a temporary state folder; it logs to a file, as under systemd.

    Args:
        store: `memory` does not use the disk.
        ping_interval_s: for idle connections; they are dead after three intervals.
        memory_bytes: for all frames; beyond it, they go to files, or the oldest results are dropped if `store` is
            `memory`.
        command: used instead of `serving_command`.
        environ: environment variables of its process.
    """
    checkout = Checkout.wanted()
    with tempfile.TemporaryDirectory(prefix="relayd-bench-") as name:
        folder = Path(name)
        config = folder / "relayd.toml"
        config.write_text(_CONFIG % (store, ping_interval_s, 3 * ping_interval_s, memory_bytes))
        serve = [*(command or serving_command(checkout)), "serve", "--config", str(config)]
        with open_process_in(checkout.folder, serve, folder / "log", environ) as process:
            port = port_in_log(process, folder / "log")
            issued = _issue_tokens(checkout, config)
            yield Server("relayd", process.pid, port, issued)


def _issue_tokens(checkout: Checkout, config: Path) -> dict[str, str]:
    """Create tokens with the commands that a person would use, on the running daemon, so that any version works."""
    create = [*checkout.command, "token", "create", "--space", SPACE, "--config", str(config)]
    most = ("--max-connections", "100000")  # beyond what one principal may have
    asked = {
        role: subprocess.Popen(
            [*create, "--role", role, "--name", f"bench-{role}", *most],
            cwd=checkout.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=_environment(),
        )
        for role in ("worker", "client")
    }
    issued = {}
    for role, process in asked.items():
        token, errors = process.communicate()
        if not token:
            raise RuntimeError(f"relayd gave no token: {errors}")
        issued[role] = token.strip()
    return issued


# -- peers --------------------------------------------------------------------------------------------------------

#: Minimal relay -> the packages that it uses, the first of which gives its name.
_PYTHON_PEERS = {
    "plain_trio": ("trio-websocket", "trio"),
    "on_websockets": ("websockets", "uvloop"),
    "on_aiohttp": ("aiohttp", "uvloop"),
    "on_picows": ("picows", "uvloop"),
    "on_socketio": ("python-socketio", "uvicorn", "uvloop"),
}
_MODULES = {"python-socketio": "socketio", "trio-websocket": "trio_websocket"}
_NATS, _HAPROXY = "nats-server", "haproxy"
#: One thread: otherwise the lower bound for one thread of relayd would include handing work between two threads.
_HAPROXY_CONFIG = """
global
  nbthread 1
  maxconn 9000
defaults
  mode tcp
  timeout connect 10s
  timeout client 1h
  timeout server 1h
listen bench
  bind 127.0.0.1:%d
  server bench 127.0.0.1:%d
"""


@contextmanager
def open_python_peer(module: str, ping_interval_s: float | None = None) -> Iterator[Server]:
    """Start a minimal relay of `bench.relay.peers`.

    Raises:
        Absent: a package that it uses is not installed.
    """
    _packages(module)
    command = [sys.executable, "-m", f"bench.relay.peers.{module}"]
    if ping_interval_s is not None:
        command += ["--ping", f"{ping_interval_s:g}"]
    with tempfile.TemporaryDirectory(prefix="relayd-bench-") as folder:
        log = Path(folder, "log")
        with open_process_in(ROOT, command, log) as process:
            yield Server(_PYTHON_PEERS[module][0], process.pid, port_in_log(process, log))


@contextmanager
def open_nats(ping_interval_s: float | None = None) -> Iterator[Server]:
    """Start nats-server with its defaults.

    Raises:
        Absent: it is not installed.
    """
    program = _program(_NATS)
    port = _free_port()
    with tempfile.TemporaryDirectory(prefix="relayd-bench-") as folder:
        config = Path(folder, "nats.conf")
        config.write_text("" if ping_interval_s is None else f'ping_interval: "{ping_interval_s:g}s"\n')
        command = [program, "-a", "127.0.0.1", "-p", str(port), "-c", str(config)]
        with open_process_in(ROOT, command, Path(folder, "log")) as process:
            _await_port(process, port)
            yield Server(_NATS, process.pid, port)


@contextmanager
def open_haproxy() -> Iterator[Server]:
    """Start HAProxy, forwarding TCP connections to a socket of ours: it knows no frames, so it is the lower bound.

    Raises:
        Absent: it is not installed.
    """
    program = _program(_HAPROXY)
    port = _free_port()
    with (
        tempfile.TemporaryDirectory(prefix="relayd-bench-") as folder,
        socket.create_server(("127.0.0.1", 0)) as behind,
    ):
        config = Path(folder, "haproxy.cfg")
        config.write_text(_HAPROXY_CONFIG % (port, behind.getsockname()[1]))
        with open_process_in(ROOT, [program, "-db", "-f", str(config)], Path(folder, "log")) as process:
            _await_port(process, port)
            behind.accept()[0].close()  # from the check of the port
            yield Server(_HAPROXY, process.pid, port, behind=behind)


def peers_line() -> str:
    """List the available peers with their versions, and those that are missing."""
    parts = [f"relayd {Checkout.wanted().commit}".strip()]
    for module in _PYTHON_PEERS:
        try:
            parts.append(_packages(module))
        except Absent as missing:
            parts.append(f"no {missing}")
    for name, flag in ((_NATS, "--version"), (_HAPROXY, "-v")):
        try:
            output = subprocess.run([_program(name), flag], capture_output=True, text=True, check=False).stdout
            parts.append(f"{name} {(re.findall(r'[0-9]+(?:[.][0-9]+)+', output) or [''])[0]}")
        except Absent as missing:
            parts.append(f"no {missing}")
    return ", ".join(parts)


def _packages(module: str) -> str:
    """Describe the packages of a minimal relay."""
    packages = _PYTHON_PEERS[module]
    for package in packages:
        if importlib.util.find_spec(_MODULES.get(package, package)) is None:
            raise Absent(f"{package} (pip install -c constraints.txt -e '.[bench]')")
    return " on ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)


def _program(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise Absent(f"{name} (apt-get install {name})")
    return found


# -- processes ----------------------------------------------------------------------------------------------------


@contextmanager
def open_process(command: list[str], log: Path, **environ: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a process that writes to `log` and knows no relay except through `environ`; ended with the block."""
    with open_process_in(None, command, log, environ) as process:
        yield process


@contextmanager
def open_process_in(
    folder: Path | None, command: list[str], log: Path, environ: Mapping[str, str] = MappingProxyType({})
) -> Iterator["subprocess.Popen[bytes]"]:
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=_environment() | dict(environ), cwd=folder
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(("RELAY_", "RELAYD_"))}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as trial:
        return int(trial.getsockname()[1])


def _await_port(process: "subprocess.Popen[bytes]", port: int) -> None:
    """Wait until the port accepts connections."""
    deadline = time.monotonic() + READY_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(LOOK_AGAIN_S)
        else:
            return
    raise RuntimeError(f"{process.args!r} did not start")


def port_in_log(process: "subprocess.Popen[bytes]", log: Path) -> int:
    """The port in the log line `listening`."""
    deadline = time.monotonic() + READY_S
    while process.poll() is None and time.monotonic() < deadline:
        for line in log.read_text().splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if event.get("event") == "listening":
                return int(urlsplit(event["urls"][0]).port or 0)
        time.sleep(LOOK_AGAIN_S)
    raise RuntimeError(f"{process.args!r} did not start:\n{log.read_text()[-2000:]}")
