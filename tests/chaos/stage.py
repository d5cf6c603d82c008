"""The stage of a run: its settings, and the relay, workers, clients and lines between them, without faults."""

import random
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import attrs
import trio

from tests.chaos import engine
from tests.chaos.clients import Client, open_client
from tests.chaos.hostile import Hostile
from tests.chaos.processes import Actor
from tests.chaos.proxy import Line, Target, open_line
from tests.chaos.report import Ledger, Windows
from tests.chaos.talk_plans import LLM, SPEECH
from tests.chaos.talking import Talker
from tests.chaos.web import WebClient
from tests.chaos.workload import CHUNK_MS, FRAIL_ATTEMPTS, FRAIL_IDLE_S, KINDS, LAIR, PATIENT_ATTEMPTS, SAMPLE_RATE_HZ
from tests.deploy.proxies import Certificate, make_certificate

Gap = tuple[float, float]

_CONFIG = """\
listen = "127.0.0.1:{port}"
state_dir = "{folder}/state"
drain_timeout_s = 4.0
{tls}
[http]
keep_alive_s = 3.0

[log]
format = "json"

[limits]
ping_interval_s = 0.5
dead_after_s = 3.0
resume_window_s = {resume_window_s}
worker_grace_s = {worker_grace_s}
stall_timeout_s = 10.0
cancel_grace_s = 2.0

[results]
retain_s = {retain_s}
# A few streams fill it, so most frames are written to files during the storm, and read back from there.
memory_bytes = 20_000

[talk]
reply = "{llm}"
speech = "{speech}"

[spaces.{llm}]
max_workers = 8
max_attempts = {patient}
queue_timeout_s = {queue_timeout_s}
idle_timeout_s = 20.0

[spaces.tts]
max_workers = 8
max_attempts = {patient}
queue_timeout_s = {queue_timeout_s}
idle_timeout_s = 20.0

[spaces.loose]
max_workers = 8
max_attempts = {patient}
queue_timeout_s = {queue_timeout_s}
idle_timeout_s = 20.0

[spaces.deep]
max_workers = 8
max_attempts = {patient}
max_queued_per_principal = 1000
queue_timeout_s = {queue_timeout_s}
idle_timeout_s = 20.0

[spaces.tell]
max_workers = 8
max_attempts = {patient}
queue_timeout_s = {queue_timeout_s}
idle_timeout_s = 20.0

[spaces.muse]
max_workers = 8
max_attempts = {patient}
queue_timeout_s = {queue_timeout_s}
idle_timeout_s = 20.0

[spaces.held]

[spaces.lair]
max_workers = 3
queue_timeout_s = 10.0

[spaces.frail]
max_workers = 8
max_attempts = {frail}
queue_timeout_s = {queue_timeout_s}
idle_timeout_s = {frail_idle_s}
"""


@attrs.frozen(kw_only=True)
class Settings:
    """The settings of one run.

    Args:
        seed: determines all random choices.
        storm_s: how long there are faults.
        spare_relay_s: the last part of `storm_s`, in which the relay's process is left alone, to see what it keeps.
        tls: whether the relay's port speaks TLS; then the other half of the peers comes over its unix socket.
        clients: the number of clients.
        kinds: what they do, with its relative frequency.
        web: the number of clients that use HTTP.
        talkers: the number of clients that talk.
        burst: how many short requests another client submits at once; 0 for no bursts.
        steers: whether an operator steers.
        hostile: whether there are a hostile tenant and a hostile worker.
        slots: the slots of each worker.
        relay_gap_s: the range of the time from the end of one fault of the relay to the next.
        worker_gap_s: the same for each worker.
        client_gap_s: the same for each client.
        retain_s: how long results are kept; then the relay must be as small as at the start.
        wait_retention: whether to wait for that.
        rss_allowance_mib: growth of the relay's memory that is allowed. Python returns memory in arenas of 1 MiB, and a
            few objects that live on keep one; what is in use is judged more closely (`run.BLOCKS_GROWTH`).
        rss_peak_mib: growth that is allowed for a moment, with many cut messages in it.
    """

    seed: int
    storm_s: float
    spare_relay_s: float
    tls: bool = True
    clients: int = 6
    kinds: Mapping[str, int] = attrs.field(factory=lambda: KINDS)
    web: int = 3
    talkers: int = 2
    burst: int = 200
    steers: bool = True
    hostile: bool = True
    slots: int = 3
    relay_gap_s: Gap = (1.0, 3.6)
    worker_gap_s: Gap = (1.0, 5.0)
    client_gap_s: Gap = (1.0, 6.0)
    retain_s: float = 120.0
    wait_retention: bool = True
    rss_allowance_mib: float = 40.0
    rss_peak_mib: float = 128.0


#: Of the clients, in turn.
PRINCIPALS = ("alice", "bob")
#: The principal whose client submits many requests at once, and the two that are hostile.
BURSTER, TENANT, INTRUDER = "carol", "mallory", "intruder"
#: The worker that operators drain; it is spared other faults of its process.
LEAVER = "d"
#: Shorter than most times between two kills of the relay, because each kill restarts a client's resume window.
WINDOWS = Windows(worker_grace_s=2.5, unheard_grace_s=1.5, resume_window_s=10.0, promised_s=30.0)


@attrs.define(eq=False)
class Stage:
    """The processes, lines and clients of a run."""

    folder: Path
    settings: Settings
    ledger: Ledger
    relay: Actor
    tokens: dict[str, str]
    workers: list[Actor] = attrs.field(factory=list)
    worker_lines: list[Line] = attrs.field(factory=list)
    clients: list[Client] = attrs.field(factory=list)
    web: list[WebClient] = attrs.field(factory=list)
    talkers: list[Talker] = attrs.field(factory=list)
    burst: Client | None = None
    hostiles: list[Hostile] = attrs.field(factory=list)

    @property
    def socket_url(self) -> str:
        """The address of the operator's socket."""
        return f"unix:{self.folder}/state/relayd.sock"


def free_port() -> int:
    """A free port on loopback; the relay uses it again after every restart, so no other connection may come from it."""
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    others = [port for port in range(10_000, 65_536) if not first <= port <= last]
    while True:
        port = random.choice(others)
        with socket.socket() as taken, suppress(OSError):
            taken.bind(("127.0.0.1", port))
            return port


def make_token(folder: Path, name: str, *options: str) -> str:
    """Create a token before the relay runs."""
    command = [sys.executable, "-m", "relayd.cli", "token", "create", "--name", name, *options]
    command += ["--config", str(folder / "relayd.toml")]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder).stdout.strip()


@attrs.frozen
class Door:
    """A way into the relay; `certificate` if it speaks TLS."""

    target: Target
    certificate: Certificate | None = None

    @property
    def tls(self) -> ssl.SSLContext | None:
        """What a client needs."""
        return self.certificate.trusting() if self.certificate else None


def make_doors(folder: Path, settings: Settings, port: int) -> tuple[Door, Door]:
    """The doors that peers use in turn."""
    if not settings.tls:
        return Door(("127.0.0.1", port)), Door(("127.0.0.1", port))
    return Door(str(folder / "state" / "relayd.sock")), Door(("127.0.0.1", port), make_certificate(folder))


def write_config(folder: Path, settings: Settings, port: int, certificate: Certificate | None) -> None:
    """Write the relay's settings."""
    values = attrs.asdict(WINDOWS) | {"port": port, "folder": folder, "retain_s": settings.retain_s, "tls": ""}
    values |= {"patient": PATIENT_ATTEMPTS, "frail": FRAIL_ATTEMPTS, "frail_idle_s": FRAIL_IDLE_S}
    values |= {"llm": LLM, "speech": SPEECH}
    if certificate is not None:
        values["tls"] = f'\n[tls]\ncert = "{certificate.cert}"\nkey = "{certificate.key}"\n'
    (folder / "relayd.toml").write_text(_CONFIG.format(**values))


def make_worker(name: str, spaces: str, reproducible: bool, line: Line, door: Door, stage: "Stage") -> Actor:
    """A worker that dials `line`."""
    runs, options = engine.MODEL, []
    if spaces != LLM:
        runs = engine.NAME
        options = [f"reproducible={reproducible}".lower(), f"sample_rate={SAMPLE_RATE_HZ}", f"chunk_ms={CHUNK_MS}"]
    url = f"{'wss' if door.certificate else 'ws'}://127.0.0.1:{line.port}"
    command = ["tests.chaos.short_timeouts", "run", "--name", name, "--relay", url, "--engine", runs]
    command += ["--slots", str(stage.settings.slots), "--cancel-grace", "1"]
    command += [f"--space={space}" for space in spaces.split()]
    for option in options:
        command += ["-o", option]
    environ = {"RELAY_TOKEN": stage.tokens["worker"]}
    if door.certificate:
        environ["SSL_CERT_FILE"] = str(door.certificate.cert)
    return Actor(name, command, environ, stage.folder, stage.ledger.record_line, "registered space")


@asynccontextmanager
async def open_stage(folder: Path, settings: Settings, ledger: Ledger, nursery: trio.Nursery) -> AsyncIterator[Stage]:
    """Start everything, without faults; all processes are killed at the end of the block."""
    engine.install(folder)
    port = free_port()
    doors = make_doors(folder, settings, port)
    write_config(folder, settings, port, doors[1].certificate)
    roles = {"worker": ("--role", "worker"), INTRUDER: ("--role", "worker", "--space", LAIR)}
    roles |= dict.fromkeys((*PRINCIPALS, BURSTER, TENANT), ("--role", "client"))
    tokens = {
        name: await trio.to_thread.run_sync(make_token, folder, name, *options) for name, options in roles.items()
    }
    serve = ("tests.chaos.slow_disk", "serve", "--config", str(folder / "relayd.toml"))
    relay = Actor("relay", serve, {}, folder, ledger.record_line, '"event": "listening"')
    stage = Stage(folder, settings, ledger, relay, tokens)
    async with AsyncExitStack() as stack:

        async def line_of(name: str, door: Door) -> Line:
            draws = random.Random(f"{settings.seed} line of {name}")
            return await stack.enter_async_context(open_line(name, door.target, draws))

        stack.push_async_callback(relay.kill)
        await relay.start(nursery)
        await relay.wait_ready()
        for name, spaces, reproducible, door in (
            ("a", "tts frail deep tell", True, doors[0]),
            ("b", "tts tell", True, doors[1]),
            ("c", "loose muse", False, doors[0]),
            (LEAVER, "tts deep", True, doors[1]),
            *([("e", LLM, True, doors[0])] * bool(settings.talkers)),
        ):
            line = await line_of(f"worker {name}", door)
            worker = make_worker(name, spaces, reproducible, line, door, stage)
            worker.may_leave = name == LEAVER
            stack.push_async_callback(worker.kill)
            await worker.start(nursery)
            stage.workers.append(worker)
            stage.worker_lines.append(line)
        for worker in stage.workers:
            await worker.wait_ready()
        for number in range(1, settings.clients + 1):  # both principals come through both doors
            name, token, door = f"client {number}", tokens[PRINCIPALS[number % 2]], doors[number // 2 % 2]
            line = await line_of(name, door)
            link = await stack.enter_async_context(open_client(line, token, ledger, door.tls))
            client = Client(name, link, line, ledger, token, settings.seed, door.target, door.tls)
            client.kinds = settings.kinds
            stage.clients.append(client)
        if settings.burst:
            door = doors[1]
            line = await line_of("burst", door)
            link = await stack.enter_async_context(open_client(line, tokens[BURSTER], ledger, door.tls))
            stage.burst = Client("burst", link, line, ledger, tokens[BURSTER], settings.seed, door.target, door.tls)
        for client in stage.clients:
            client.others = stage.clients
        for number in range(1, settings.web + 1):
            name, token, door = f"web {number}", tokens[PRINCIPALS[number % 2]], doors[number % 2]
            stage.web.append(WebClient(name, await line_of(name, door), ledger, token, settings.seed, door.tls))
        for number in range(1, settings.talkers + 1):  # two of each user, of different principals
            name, token, door = f"talker {number}", tokens[PRINCIPALS[number % 2]], doors[number // 2 % 2]
            talker = Talker(name, await line_of(name, door), ledger, token, settings.seed, door.tls)
            talker.user, talker.others = f"user_{(number + 1) // 2}", stage.talkers
            stage.talkers.append(talker)
        if settings.hostile:
            for name, role in ((TENANT, "client"), (INTRUDER, "worker")):
                url, target, token = stage.socket_url, doors[0].target, tokens[name]
                stage.hostiles.append(Hostile(name, role, token, url, target, ledger, settings.seed))
        yield stage
