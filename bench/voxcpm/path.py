"""Measures the whole path over loopback: relayd, `gpuworker run --engine voxcpm`, and one client per slot."""

import hashlib
import re
import subprocess
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

import trio

from bench.relay.servers import SPACE, Server, open_process
from bench.voxcpm.plain import end_of_log
from bench.voxcpm.round import Deadline, Failed, Gauge, Job, OutOfTime, Side, Spoken
from protocol.client.client import RelayClient, open_relay
from protocol.wire.errors import LinkError, RequestCancelled, RequestFailed, RequestRejected

_LOOK_AGAIN_S = 0.1
_SAMPLE_BYTES = 2


def measure_path(
    server: Server,
    model: Path,
    device: str,
    slots: int,
    job: Job,
    rounds: int,
    deadline: Deadline,
    *,
    optimize: bool,
    gauge: Gauge,
    environ: dict[str, str],
) -> Side:
    """Run a new worker with `slots` slots and as many concurrent clients, for one round more than is counted.

    Raises:
        Failed, OutOfTime: the worker does not start, or a request fails.
    """
    command = [
        *(sys.executable, "-m", "gpuworker.cli", "run", "--relay", f"ws://127.0.0.1:{server.port}"),
        *("--space", SPACE, "--engine", "voxcpm", "--slots", str(slots), "-o", f"model={model}"),
        *("-o", f"device={device}", "-o", "offline=true", "-o", f"optimize={str(optimize).lower()}"),
    ]
    with tempfile.TemporaryDirectory(prefix="relayd-bench-") as folder:
        log = Path(folder, "log")
        with open_process(command, log, RELAY_TOKEN=server.tokens["worker"], **environ) as worker:
            measured, memory = trio.run(_measure, server, worker, log, slots, job, rounds, deadline, gauge)
        loads = re.findall(r"voxcpm loaded in ([\d.]+) s", log.read_text(errors="replace"))
        load_s = [float(seconds) for seconds in loads]
    return Side(measured, frozenset(), load_s, memory)


async def _measure(
    server: Server,
    worker: "subprocess.Popen[bytes]",
    log: Path,
    slots: int,
    job: Job,
    rounds: int,
    deadline: Deadline,
    gauge: Gauge,
) -> tuple[list[list[Spoken]], int | None]:
    with trio.move_on_after(deadline.left_s()):
        async with AsyncExitStack() as connections:
            url, token = f"ws://127.0.0.1:{server.port}", server.tokens["client"]
            clients = [
                await connections.enter_async_context(open_relay(url, token=token, reconnect=False))
                for _ in range(slots)
            ]
            await _wait_ready(clients[0], worker, log, slots)
            measured = [await _round(clients, job, deadline) for _ in range(1 + rounds)]
            return measured[1:], gauge.used([worker.pid])
    raise OutOfTime


async def _wait_ready(client: RelayClient, worker: "subprocess.Popen[bytes]", log: Path, slots: int) -> None:
    """Wait until the relay knows all slots, and no longer knows a worker of an earlier round."""
    while True:
        space = next(space for space in await client.spaces() if space["name"] == SPACE)
        if (space["workers"], space["slots"]) == (1, slots):
            return
        _check(worker, log)
        await trio.sleep(_LOOK_AGAIN_S)


def _check(worker: "subprocess.Popen[bytes]", log: Path) -> None:
    """Raise the error that keeps a worker from becoming ready."""
    ended = worker.poll() is not None
    if fault := re.search(r"cannot be loaded: (.*)", log.read_text(errors="replace")):
        raise Failed(fault[1][-600:])
    if ended:
        raise Failed(end_of_log(log))


async def _round(clients: list[RelayClient], job: Job, deadline: Deadline) -> list[Spoken]:
    outcomes: list[Spoken | Failed] = []
    left_s = deadline.left_s()

    async def one(client: RelayClient) -> None:
        try:
            outcomes.append(await _speak(client, job, left_s))
        except (LinkError, RequestRejected, RequestFailed, RequestCancelled) as fault:
            outcomes.append(Failed(str(fault)))

    async with trio.open_nursery() as nursery:
        for client in clients:
            nursery.start_soon(one, client)
    spoken = []
    for outcome in outcomes:
        if isinstance(outcome, Failed):
            raise outcome
        spoken.append(outcome)
    return spoken


async def _speak(client: RelayClient, job: Job, at_most_s: float) -> Spoken:
    params = {
        "text": job.text,
        "seed": job.seed,
        "inference_timesteps": job.timesteps,
        "retry_badcase_ratio_threshold": job.ratio,
    }
    began, first_s, chunks = time.perf_counter(), 0.0, []
    async with client.submit(SPACE, params, queue_timeout_s=at_most_s, run_timeout_s=at_most_s) as stream:
        async for pcm in stream.audio():
            first_s = first_s or time.perf_counter() - began
            chunks.append(pcm)
        wall_s = time.perf_counter() - began
        assert stream.format is not None
        pcm = b"".join(chunks)
        audio_s = len(pcm) / _SAMPLE_BYTES / stream.format.sample_rate
        return Spoken(first_s, wall_s, audio_s, hashlib.sha256(pcm).hexdigest())
