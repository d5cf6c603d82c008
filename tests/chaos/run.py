"""One run: starts processes, lines, clients and the storm of faults, and checks what is left at the end.

`python -m tests.chaos --seed 7 --minutes 25`, as `make chaos SEED=7 MINUTES=25` calls it.
"""

import random
import shutil
import socket
import subprocess
import sys
import traceback
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import attrs
import trio

from protocol.client.client import open_relay
from protocol.wire.messages import Snapshot
from tests.chaos import engine
from tests.chaos.clients import END_S, Client, open_client
from tests.chaos.faults import Storm
from tests.chaos.processes import Actor
from tests.chaos.proxy import Line, open_line
from tests.chaos.report import Ledger, Windows
from tests.chaos.short_timeouts import shortened_timeouts
from tests.chaos.workload import CHUNK_MS, FRAIL_ATTEMPTS, FRAIL_IDLE_S, PATIENT_ATTEMPTS, SAMPLE_RATE_HZ, Plan

Gap = tuple[float, float]

_CONFIG = """\
listen = "127.0.0.1:{port}"
state_dir = "{folder}/state"
drain_timeout_s = 4.0

[log]
format = "json"

[limits]
ping_interval_s = 0.5
dead_after_s = 2.0
resume_window_s = {resume_window_s}
worker_grace_s = {worker_grace_s}
stall_timeout_s = 10.0
cancel_grace_s = 2.0

[results]
retain_s = {retain_s}
# A few streams fill it, so most frames are written to files during the storm, and read back from there.
memory_bytes = 20_000

[spaces.tts]
max_workers = 8
max_attempts = {patient}
queue_timeout_s = 60.0
idle_timeout_s = 20.0

[spaces.loose]
max_workers = 8
max_attempts = {patient}
queue_timeout_s = 60.0
idle_timeout_s = 20.0

[spaces.frail]
max_workers = 8
max_attempts = {frail}
queue_timeout_s = 60.0
idle_timeout_s = {frail_idle_s}
"""


@attrs.frozen(kw_only=True)
class Settings:
    """The settings of one run.

    Args:
        seed: determines all random choices.
        storm_s: how long there are faults.
        spare_relay_s: the last part of `storm_s`, in which the relay's process is left alone, to see what it keeps.
        clients: the number of clients.
        slots: the slots of each worker.
        relay_gap_s: the range of the time from the end of one fault of the relay to the next.
        worker_gap_s: the same for each worker.
        client_gap_s: the same for each client.
        retain_s: how long results are kept; then the relay must be as small as at the start.
        wait_retention: whether to wait for that.
        rss_allowance_mib: growth of the relay's memory that is allowed.
    """

    seed: int
    storm_s: float
    spare_relay_s: float
    clients: int = 6
    slots: int = 3
    relay_gap_s: Gap = (1.0, 3.6)
    worker_gap_s: Gap = (1.0, 5.0)
    client_gap_s: Gap = (1.0, 6.0)
    retain_s: float = 40.0
    wait_retention: bool = True
    rss_allowance_mib: float = 24.0


#: Of the clients, in turn.
PRINCIPALS = ("alice", "bob")
#: Shorter than most times between two kills of the relay, because each kill restarts a client's resume window.
WINDOWS = Windows(worker_grace_s=2.5, unheard_grace_s=1.5, resume_window_s=8.0, promised_s=15.0)


@attrs.define(eq=False)
class Stage:
    """The processes, lines and clients of a run."""

    folder: Path
    settings: Settings
    ledger: Ledger
    relay: Actor
    workers: list[Actor]
    worker_lines: list[Line]
    clients: list[Client]

    @property
    def socket_url(self) -> str:
        """The address of the operator's socket."""
        return f"unix:{self.folder}/state/relayd.sock"


def free_port() -> int:
    """A free port on loopback; the relay uses it again after every restart."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def make_token(folder: Path, role: str, name: str) -> str:
    """Create a token before the relay runs."""
    command = [sys.executable, "-m", "relayd.cli", "token", "create", "--role", role, "--name", name]
    command += ["--config", str(folder / "relayd.toml")]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder).stdout.strip()


@asynccontextmanager
async def open_stage(folder: Path, settings: Settings, ledger: Ledger, nursery: trio.Nursery) -> AsyncIterator[Stage]:
    """Start everything, without faults; all processes are killed at the end of the block."""
    engine.install(folder)
    port = free_port()
    target = ("127.0.0.1", port)
    values = attrs.asdict(WINDOWS) | {"port": port, "folder": folder, "retain_s": settings.retain_s}
    values |= {"patient": PATIENT_ATTEMPTS, "frail": FRAIL_ATTEMPTS, "frail_idle_s": FRAIL_IDLE_S}
    (folder / "relayd.toml").write_text(_CONFIG.format(**values))
    worker_token = await trio.to_thread.run_sync(make_token, folder, "worker", "chaos-worker")
    tokens = [await trio.to_thread.run_sync(make_token, folder, "client", name) for name in PRINCIPALS]
    serve = ("tests.chaos.slow_disk", "serve", "--config", str(folder / "relayd.toml"))
    relay = Actor("relay", serve, {}, folder, ledger.record_line, '"event": "listening"')
    async with AsyncExitStack() as stack:

        async def line_of(name: str) -> Line:
            draws = random.Random(f"{settings.seed} line of {name}")
            return await stack.enter_async_context(open_line(name, target, draws))

        stack.push_async_callback(relay.kill)
        await relay.start(nursery)
        await relay.wait_ready()
        workers, lines = [], []
        for name, spaces, reproducible in (
            ("a", ("tts", "frail"), "true"),
            ("b", ("tts",), "true"),
            ("c", ("loose",), "false"),
        ):
            line = await line_of(f"worker {name}")
            command = ["tests.chaos.short_timeouts", "run", "--name", name, "--relay", f"ws://127.0.0.1:{line.port}"]
            command += ["--engine", engine.NAME, "--slots", str(settings.slots), "--cancel-grace", "1"]
            command += [f"--space={space}" for space in spaces]
            for option in (f"reproducible={reproducible}", f"sample_rate={SAMPLE_RATE_HZ}", f"chunk_ms={CHUNK_MS}"):
                command += ["-o", option]
            environ = {"RELAY_TOKEN": worker_token}
            worker = Actor(name, command, environ, folder, ledger.record_line, "registered space")
            stack.push_async_callback(worker.kill)
            await worker.start(nursery)
            workers.append(worker)
            lines.append(line)
        for worker in workers:
            await worker.wait_ready()
        clients: list[Client] = []
        for number in range(1, settings.clients + 1):
            name = f"client {number}"
            line = await line_of(name)
            token = tokens[number % len(tokens)]
            link = await stack.enter_async_context(open_client(line, token, ledger))
            clients.append(Client(name, link, line, ledger, token, settings.seed, target))
        for client in clients:
            client.others = clients
        yield Stage(folder, settings, ledger, relay, workers, lines, clients)


def undisturbed(client: Client, space: str) -> Plan:
    """A request of the warm-up; it shows that the expected samples are those of an undisturbed run."""
    return Plan(
        name=f"{client.name} warms up {space}",
        kind="plain",
        space=space,
        seed=7,
        duration_s=1.0,
        speed=4.0,
        retry="never",
        fail=None,
        progress=0,
        at_frame=0,
        later_s=0.0,
    )


async def warm_up(stage: Stage) -> tuple[int, float]:
    """Run requests without faults; returns the relay's open files and MiB of memory, with all peers connected."""
    async with trio.open_nursery() as nursery:
        for number, client in enumerate(stage.clients):
            nursery.start_soon(client.follow, undisturbed(client, ("tts", "loose")[number % 2]))
    return stage.relay.figures()


async def all_rows(stage: Stage) -> dict[str, list[dict[str, object]]]:
    """Return the rows of all topics, as an operator sees them."""
    async with open_relay(stage.socket_url, token="", role="operator") as relay, relay.watch() as watch:
        async for change in watch:
            if isinstance(change, Snapshot):
                return {topic: list(rows.values()) for topic, rows in watch.state.items()}
    raise AssertionError("the relay ended the watch")


async def check_remains(stage: Stage, before: tuple[int, float]) -> None:
    """Check that slots are free, no request is live, and the relay's files and memory are as before."""
    ledger, settings = stage.ledger, stage.settings
    faults = ["nothing was checked"]
    with trio.move_on_after(settings.retain_s * settings.wait_retention + 20.0):
        while faults:
            faults = _remains(stage, before, await all_rows(stage))
            await trio.sleep(0.5)
    files, rss_mib = stage.relay.figures()
    ledger.note("run", f"relay: {before[0]} open files and {before[1]:.1f} MiB before, {files} and {rss_mib:.1f} after")
    ledger.counts["relay open files before"], ledger.counts["relay open files after"] = before[0], files
    ledger.counts["relay MiB before"], ledger.counts["relay MiB after"] = round(before[1]), round(rss_mib)
    for fault in faults:
        ledger.complain(fault)


def _remains(stage: Stage, before: tuple[int, float], rows: dict[str, list[dict[str, object]]]) -> list[str]:
    faults = []
    live = [row["request_id"] for row in rows.get("requests", ()) if row["state"] in ("uploading", "queued", "running")]
    if live:
        faults.append(f"{len(live)} requests are still live: {live[:5]}")
    kept = rows.get("requests", ())
    if stage.settings.wait_retention and kept:
        faults.append(f"{len(kept)} ended requests are kept longer than retain_s")
    workers = {str(row["worker_id"]).rpartition("-")[0]: row for row in rows.get("workers", ())}
    for worker in stage.workers:
        row = workers.get(worker.name)
        if row is None or row["slots"] != stage.settings.slots:
            faults.append(f"worker {worker.name} is not connected again with all of its slots: {row}")
        elif row["busy"]:
            faults.append(f"slots of worker {worker.name} are still busy: {row}")
    if len(workers) > len(stage.workers) or len(rows.get("workers", ())) > len(stage.workers):
        faults.append(f"former workers are still remembered: {sorted(workers)}")
    files, rss_mib = stage.relay.figures()
    if files > before[0]:
        faults.append(f"the relay has {files} open files, and had {before[0]} before")
    if rss_mib > before[1] + stage.settings.rss_allowance_mib:
        faults.append(f"the relay has {rss_mib:.1f} MiB, and had {before[1]:.1f} before")
    return faults


async def run_chaos(folder: Path, settings: Settings) -> Ledger:
    """Do a whole run; returns its record, also of a run that falls over, with what went wrong in `complaints`."""
    ledger = Ledger(WINDOWS, trio.current_time())
    try:
        with shortened_timeouts():
            async with trio.open_nursery() as nursery:
                async with open_stage(folder, settings, ledger, nursery) as stage:
                    await _run(stage, nursery)
                nursery.cancel_scope.cancel()
    except Exception as fault:  # noqa: BLE001 - for example a process that did not come up: told with its evidence
        ledger.complain("the run fell over:\n" + "".join(traceback.format_exception(fault)))
    return ledger


async def _run(stage: Stage, nursery: trio.Nursery) -> None:
    settings, ledger = stage.settings, stage.ledger
    before = await warm_up(stage)
    storm = Storm(settings.seed, ledger, nursery)
    storm.relay_track(stage.relay, settings.relay_gap_s)
    for worker, line in zip(stage.workers, stage.worker_lines, strict=True):
        storm.worker_track(worker, line, settings.worker_gap_s)
    for client in stage.clients:
        storm.client_track(client.line, settings.client_gap_s)
    leave = trio.Event()
    with trio.move_on_after(settings.storm_s + 2 * END_S):
        async with trio.open_nursery() as listening:
            for client in stage.clients:
                listening.start_soon(client.serve, leave)
            await trio.sleep(settings.storm_s - settings.spare_relay_s)
            storm.spare_relay.set()
            await trio.sleep(settings.spare_relay_s)
            leave.set()
            await storm.end()
    for actor in (stage.relay, *stage.workers):
        for surprise in actor.surprises:
            ledger.complain(surprise)
    await check_remains(stage, before)
    ledger.counts["relay starts"] = stage.relay.starts
    ledger.counts["client connections"] = sum(client.line.opened for client in stage.clients)
    ledger.counts["worker connections"] = sum(line.opened for line in stage.worker_lines)


def report(ledger: Ledger, settings: Settings, folder: Path) -> str:
    """The table, and the timelines of the first requests with complaints."""
    took_s = ledger.timeline[-1][0] - ledger.began_at if ledger.timeline else 0.0
    parts = [
        f"seed {settings.seed}, {took_s / 60:.1f} minutes, {len(ledger.complaints)} complaints",
        "",
        ledger.table(),
    ]
    if ledger.complaints:
        parts += ["", "## Complaints", *ledger.complaints[:100]]
        failed = [case for case in ledger.cases.values() if case.complaints]
        for case in failed[:3]:
            parts += [
                "",
                f"## Timeline of {case.plan.name} ({case.request_id}), seed {settings.seed}",
                ledger.story(case),
            ]
        if not failed:
            parts += ["", "## End of the timeline", ledger.story(None)]
        (folder / "timeline.txt").write_text("\n".join(ledger._line(*each) for each in ledger.timeline))
        parts += ["", f"Whole timeline: {folder / 'timeline.txt'}"]
    return "\n".join(parts)


def clear(folder: Path) -> None:
    """Delete what a run left behind."""
    shutil.rmtree(folder, ignore_errors=True)
