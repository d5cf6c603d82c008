"""Measures what calls cost the worker that holds them: CPU for one that sees the idle loop, and for one spoken to."""

import asyncio
import multiprocessing
import os
import resource
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import trio

from bench.figures import Row
from bench.stage import Stage, open_stage
from protocol import Live, RelayClient, open_relay
from protocol.client.stream import Stream
from protocol.wire.frames import Output

IDLE, TALKING = 20, 5
MEASURED_S = 8.0
SETTLE_S = 3.0
READY_S = 60.0
_SETTINGS = "[spaces.calls]\nrun_timeout_s = 600\n"
_ENGINE = ("--engine", "webrtc", "--space", "calls", "-o", "host=127.0.0.1", "-o", "ports=20800-20899", "--slots", "60")
_L16 = "audio/L16;rate=24000;channels=1"
_TICKS_S = os.sysconf("SC_CLK_TCK")


def measure() -> list[Row]:
    """Measure 20 peers that are idle, and 5 more that are spoken to; half a minute."""
    with open_stage(_SETTINGS) as stage:
        command = [stage.checkout.python, "-m", "gpuworker.cli", "run", "--relay", stage.url, *_ENGINE]
        environ = os.environ | {"RELAY_TOKEN": stage.token("worker", "calls")}
        receivers, theirs = multiprocessing.get_context("spawn").Pipe()
        process = multiprocessing.get_context("spawn").Process(target=_receive, args=(theirs,), daemon=True)
        process.start()
        with subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL) as worker:
            try:
                return trio.run(_measure, stage, worker.pid, receivers)
            finally:
                worker.kill()
                process.kill()


async def _measure(stage: Stage, worker: int, receivers: Connection) -> list[Row]:
    from tests.support.caller import an_ivf  # aiortc and numpy

    idle, talk = an_ivf((0, 0, 255), 75, size=360), an_ivf((255, 0, 0), 25 * 15, size=360)
    sound = bytes(2 * 24_000 * 15)
    async with open_relay(stage.url, token=stage.token("client", "caller")) as client, AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(_call(client, receivers, idle)) for _ in range(IDLE)]
        engine = _engine_of(worker)
        idle_share = await _share(engine)
        peers += [await stack.enter_async_context(_call(client, receivers, idle)) for _ in range(TALKING)]
        plays = [
            {"audio": (sound, _L16), "video": (talk, "video/x-ivf")},
            {"audio": (sound, _L16)},
        ]
        shares = []
        for inputs in plays:
            async with AsyncExitStack() as speaking:
                for peer in peers[-TALKING:]:
                    play = client.submit("calls", {"peer": peer.request_id}, inputs=inputs)
                    await speaking.enter_async_context(play)
                shares.append(await _share(engine))
        memory_mib = _resident_mib(engine)
    each = idle_share / IDLE
    both, sound_only = ((share - idle_share) / TALKING for share in shares)
    unit = "% of a core"
    return [
        Row(figure="webrtc", name="a peer that sees the idle loop (360², 25 fps)", unit=unit, value=each),
        Row(figure="webrtc", name="a peer that hears and sees a play", unit=unit, value=both),
        Row(figure="webrtc", name="a peer that hears a play, and sees the idle loop", unit=unit, value=sound_only),
        Row(figure="webrtc", name=f"{IDLE} idle peers and {TALKING} talking", unit=unit, value=shares[0], limit=100.0),
        Row(figure="webrtc", name=f"memory of the process, {IDLE + TALKING} peers", unit="MiB", value=memory_mib),
    ]


@asynccontextmanager
async def _call(client: RelayClient, receivers: Connection, idle: bytes) -> AsyncIterator[Stream]:
    """A call that stands."""
    offer = await trio.to_thread.run_sync(_ask, receivers, None)
    inputs: dict[str, Any] = {"commands": Live(), "idle": (idle, "video/x-ivf")}
    async with client.submit("calls", {"offer": offer}, inputs=inputs) as call:
        with trio.fail_after(READY_S):
            async for frame in call:
                data = frame.data if isinstance(frame, Output) else {}
                if "answer" in data:
                    await trio.to_thread.run_sync(_ask, receivers, data["answer"])
                if data.get("state") == "connected":
                    break
        yield call


def _ask(receivers: Connection, answer: str | None) -> Any:
    receivers.send(answer)
    return receivers.recv()


def _receive(main: Connection) -> None:
    """Answer None with the offer of a new peer, and an answer by taking it; nothing is decoded."""
    asyncio.run(_serve(main))


async def _serve(main: Connection) -> None:
    import aioice.ice
    from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription

    aioice.ice.get_host_addresses = lambda use_ipv4, use_ipv6: ["127.0.0.1"]
    peers: list[RTCPeerConnection] = []
    while True:
        answer = await asyncio.to_thread(main.recv)
        if answer is None:
            peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
            peers.append(peer)
            for kind in ("audio", "video"):
                # aiortc has no public way to receive without decoding, which costs more than all that is measured.
                peer.addTransceiver(kind, direction="recvonly").receiver._enabled = False
            await peer.setLocalDescription(await peer.createOffer())
            main.send(peer.localDescription.sdp)
        else:
            await peers[-1].setRemoteDescription(RTCSessionDescription(answer, "answer"))
            main.send(None)


async def _share(pid: int) -> float:
    """How much of a core a process uses, in percent."""
    await trio.sleep(SETTLE_S)
    began, cpu_s = time.monotonic(), _cpu_s(pid)
    await trio.sleep(MEASURED_S)
    return 100 * (_cpu_s(pid) - cpu_s) / (time.monotonic() - began)


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_S


def _resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def _engine_of(worker: int) -> int:
    children = Path(f"/proc/{worker}/task/{worker}/children").read_text().split()
    (engine,) = [int(pid) for pid in children if b"engine_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return engine
