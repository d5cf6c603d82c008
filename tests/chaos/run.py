"""One run: starts processes, lines, clients and the storm of faults, and checks what is left at the end.

`python -m tests.chaos --seed 7 --minutes 25`, as `make chaos SEED=7 MINUTES=25` calls it.
"""

import signal
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import attrs
import trio

from protocol.client.client import open_relay
from protocol.wire.messages import Snapshot
from tests.chaos.clients import END_S, Client
from tests.chaos.faults import Storm
from tests.chaos.operator_view import OperatorView
from tests.chaos.report import Ledger
from tests.chaos.short_timeouts import shortened_timeouts
from tests.chaos.slow_disk import BLOCKS
from tests.chaos.stage import LEAVER, WINDOWS, Settings, Stage, open_stage
from tests.chaos.steering import Operator
from tests.chaos.talking import Talker
from tests.chaos.web import WebClient
from tests.chaos.workload import Plan

#: How long after the listeners the last request may end: a hostile worker may be silent in three attempts of one.
LAST_END_S = 150.0
#: How long the relay may take to count its blocks.
COUNT_S = 30.0
#: Growth that is allowed of the number of blocks that Python's objects occupy. Unlike the memory of the process, it
#: does not depend on which of them lie together.
BLOCKS_GROWTH = 1.1


@attrs.frozen
class Remains:
    """What the relay's process holds: open files, MiB of memory, and blocks of Python's allocator."""

    UNITS: ClassVar = ("open files", "MiB", "blocks")
    files: int
    rss_mib: float
    blocks: int

    def __str__(self) -> str:
        return f"{self.files} open files, {self.rss_mib:.1f} MiB and {self.blocks} blocks"


def undisturbed(who: str, space: str, kind: str = "plain") -> Plan:
    """A request of the warm-up; it shows that the expected samples are those of an undisturbed run."""
    return Plan(
        name=f"{who} warms up {space} {kind}",
        kind=kind,
        space=space,
        seed=7,
        duration_s=1.0,
        speed=1.0 if kind == "speech" else 4.0,
        retry="before_output",
        fail=None,
        progress=0,
        at_frame=0,
        later_s=0.0,
    )


async def warm_up(stage: Stage) -> Remains:
    """Run requests without faults; returns what the relay holds then, with all peers connected.

    Some come over HTTP: the relay imports what encodes audio when it is first asked for.
    """
    async with trio.open_nursery() as nursery:
        for number, client in enumerate(stage.clients):
            nursery.start_soon(client.follow, undisturbed(client.name, ("tts", "loose")[number % 2]))
        for web in stage.web:
            for kind in ("events", "audio", "speech"):
                nursery.start_soon(web.follow, undisturbed(web.name, "tts", kind))
        for talker in stage.talkers:
            nursery.start_soon(talker.converse, f"{talker.name} warms up")
    return await measure(stage)


async def measure(stage: Stage) -> Remains:
    """What the relay holds now."""
    counted = stage.folder / BLOCKS
    counted.unlink(missing_ok=True)
    stage.relay.signal(signal.SIGUSR2)
    with trio.fail_after(COUNT_S):
        while not counted.exists():  # noqa: ASYNC110  nothing else tells
            await trio.sleep(0.05)
    files, rss_mib = stage.relay.figures()
    return Remains(files, rss_mib, int(counted.read_text()))


async def all_rows(stage: Stage) -> dict[str, list[dict[str, object]]]:
    """Return the rows of all topics, as an operator sees them."""
    async with open_relay(stage.socket_url, token="", role="operator") as relay, relay.watch() as watch:
        async for change in watch:
            if isinstance(change, Snapshot):
                return {topic: list(rows.values()) for topic, rows in watch.state.items()}
    raise AssertionError("the relay ended the watch")


async def watch_memory(stage: Stage, before_mib: float, calm: trio.Event) -> None:
    """Check until `calm` is set that the relay does not hold all that it is sent."""
    counts = stage.ledger.counts
    while not calm.is_set():
        rss_mib = stage.relay.figures()[1]
        if rss_mib > before_mib + stage.settings.rss_peak_mib >= counts["relay MiB at most"]:
            stage.ledger.complain(f"the relay has {rss_mib:.1f} MiB, and had {before_mib:.1f} before")
        counts["relay MiB at most"] = max(counts["relay MiB at most"], round(rss_mib))
        await trio.sleep(0.2)


async def check_remains(stage: Stage, before: Remains) -> None:
    """Check that slots are free, no request is live, and the relay's files and memory are as before."""
    ledger, settings = stage.ledger, stage.settings
    faults, after = ["nothing was checked"], before
    with trio.move_on_after(settings.retain_s * settings.wait_retention + LAST_END_S):
        while faults:
            faults = _faults(stage, before, after := await measure(stage), await all_rows(stage))
            await trio.sleep(0.5)
    ledger.note("run", f"relay: {before} before, {after} after")
    for what, was, is_now in zip(Remains.UNITS, attrs.astuple(before), attrs.astuple(after), strict=True):
        ledger.counts[f"relay {what} before"], ledger.counts[f"relay {what} after"] = round(was), round(is_now)
    for fault in faults:
        ledger.complain(fault)


def _faults(stage: Stage, before: Remains, after: Remains, rows: dict[str, list[dict[str, object]]]) -> list[str]:
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
    if after.files > before.files:
        names = dict(stage.relay.open_files())
        faults.append(f"the relay has {after.files} open files, and had {before.files} before: {names}")
    if after.rss_mib > before.rss_mib + stage.settings.rss_allowance_mib:
        faults.append(f"the relay has {after.rss_mib:.1f} MiB, and had {before.rss_mib:.1f} before")
    if after.blocks > before.blocks * BLOCKS_GROWTH:
        faults.append(f"the relay's objects occupy {after.blocks} blocks, and {before.blocks} before")
    return faults


def leaves(fault: BaseException) -> Iterator[BaseException]:
    """The exceptions in a group of groups."""
    if isinstance(fault, BaseExceptionGroup):
        for inner in fault.exceptions:
            yield from leaves(inner)
    else:
        yield fault


async def run_chaos(folder: Path, settings: Settings) -> Ledger:
    """Do a whole run; returns its record, also of a run that falls over, with what went wrong in `complaints`."""
    ledger = Ledger(attrs.evolve(WINDOWS, retain_s=settings.retain_s), trio.current_time())
    try:
        with shortened_timeouts():
            async with trio.open_nursery() as nursery:
                async with open_stage(folder, settings, ledger, nursery) as stage:
                    await _run(stage, nursery)
                nursery.cancel_scope.cancel()
    except Exception as fault:  # noqa: BLE001 - for example a process that did not come up: told with its evidence
        for leaf in leaves(fault):
            ledger.complain("the run fell over:\n" + "".join(traceback.format_exception(leaf)))
    return ledger


async def _run(stage: Stage, nursery: trio.Nursery) -> None:
    settings, ledger = stage.settings, stage.ledger
    before = await warm_up(stage)
    storm = Storm(settings.seed, ledger, nursery)
    storm.relay_track(stage.relay, settings.relay_gap_s)
    for worker, line in zip(stage.workers, stage.worker_lines, strict=True):
        if worker.name == LEAVER:
            storm.client_track(line, settings.worker_gap_s)
        else:
            storm.worker_track(worker, line, settings.worker_gap_s)
    bursts = [stage.burst] if stage.burst else []
    clients: list[Client | WebClient | Talker] = [*stage.clients, *stage.web, *stage.talkers]
    for client in (*clients, *bursts):
        storm.client_track(client.line, settings.client_gap_s)
    leave = trio.Event()
    with trio.move_on_after(settings.storm_s + 2 * END_S):
        async with trio.open_nursery() as listening:
            for client in clients:
                listening.start_soon(client.serve, leave)
            for burst in bursts:
                listening.start_soon(burst.serve_bursts, leave, settings.burst)
            for hostile in stage.hostiles:
                listening.start_soon(hostile.serve, leave)
            listening.start_soon(watch_memory, stage, before.rss_mib, leave)
            if settings.steers:
                leaver = next(worker for worker in stage.workers if worker.name == LEAVER)
                view = OperatorView(stage.socket_url)
                listening.start_soon(Operator(view, ledger, settings.seed, leaver, nursery).serve, leave)
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
    ledger.counts["HTTP connections"] = sum(client.line.opened for client in (*stage.web, *stage.talkers))
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
                case.story or ledger.story(case),
            ]
        if not failed:
            parts += ["", "## End of the timeline", ledger.story(None)]
        (folder / "timeline.txt").write_text("\n".join(ledger._line(*each) for each in ledger.timeline))
        parts += ["", f"Whole timeline: {folder / 'timeline.txt'}"]
    return "\n".join(parts)
