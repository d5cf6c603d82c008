"""Faults in the one engine process that serves all slots of a worker, while listeners listen.

`python -m tests.support.seat_storm --faults 1000 --seed 7` prints what became of them, and exits 1 if an innocent
request failed or heard other samples. The relay, the worker and the clients run in this process; the engine does not.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import attrs
import trio

from gpuworker.engines.catalog import find_engine, parse_options
from gpuworker.engines.mock import Tune, tune_key
from gpuworker.identity import Identity
from gpuworker.slots.process_slot import EngineHost, ProcessSlot
from gpuworker.worker import Worker
from protocol.client.address import parse_address
from protocol.client.client import RelayClient, open_relay
from protocol.client.stream import Stream
from protocol.wire.errors import RequestCancelled, RequestError, RequestFailed
from protocol.wire.frames import Started
from tests.support.relay import Daemon, daemon, until

SLOTS = 8
LISTENERS = 12
RATE = 24_000
#: How often each fault is drawn. What ends a process is drawn less often than each listener is heard out, so that
#: chance alone does not take three attempts of one request.
WEIGHTS = {"kill": 40, "hang": 30, "crash": 8, "late crash": 4, "restart": 4, "raise": 10, "freeze": 2, "silence": 1}


@attrs.define(eq=False)
class Storm:
    """The faults, the listeners and what they saw."""

    relay: Daemon
    client: RelayClient
    host: EngineHost
    rng: random.Random
    tune: Tune = attrs.field(factory=lambda: Tune(RATE))
    #: By kind, and by what was seen.
    faults: Counter[str] = attrs.field(factory=Counter)
    seen: Counter[str] = attrs.field(factory=Counter)
    complaints: list[str] = attrs.field(factory=list)
    pids: set[int] = attrs.field(factory=set)
    _over: bool = False
    _heard_one: trio.Event = attrs.field(factory=trio.Event)

    async def run(self, faults: int) -> None:
        """Cause so many faults one after another, each kind at least once, and hear every listener out."""
        async with trio.open_nursery() as nursery:
            for number in range(LISTENERS):
                nursery.start_soon(self._listen, number)
            more = self.rng.choices(list(WEIGHTS), list(WEIGHTS.values()), k=max(0, faults - len(WEIGHTS)))
            kinds = [*WEIGHTS, *more]
            self.rng.shuffle(kinds)
            for kind in kinds:
                await self._completed(self.rng.randrange(8, 32))
                self.faults[kind] += 1
                await self._cause(kind)
            await self._completed(2 * LISTENERS)
            self._over = True
        await until(lambda: all(slot.free for slot in self.host.slots))
        await self.relay.at_rest()

    async def _completed(self, more: int) -> None:
        """Wait until so many listeners more have been heard out."""
        wanted = self.seen["completed"] + more
        while self.seen["completed"] < wanted:
            await self._heard_one.wait()

    # -- listeners

    async def _listen(self, number: int) -> None:
        rng = random.Random(self.rng.random())
        turn = 0
        while not self._over:
            turn += 1
            text = f"listener {number}, turn {turn}"
            samples = rng.randrange(RATE // 4, RATE)
            params: dict[str, Any] = {
                "text": text,
                "duration_s": samples / RATE,
                "chunk_ms": rng.choice((30, 50, 100)),
                "speed": rng.choice((4, 8, 16)),
            }
            try:
                async with self.client.submit("tts", params) as stream:
                    pcm = b"".join([piece async for piece in stream.audio()])
                    self._note(stream)
            except RequestError as fault:
                self.complaints.append(f"{text}: {fault} {fault.details}")
                continue
            if pcm != self.tune.pcm(tune_key(text, 0), 0, samples):
                self.complaints.append(f"{text}: other samples")
            self.seen["completed"] += 1
            self._heard_one.set()
            self._heard_one = trio.Event()

    def _note(self, stream: Stream) -> None:
        if (child := self.host.child) is not None:
            self.pids.add(child.pid)
        entry = self.relay.relay.requests[stream.request_id].entry
        self.seen["innocent losses of listeners"] += entry.innocent_losses
        self.seen["losses of listeners"] += entry.losses
        for name, count in (("most losses of one", entry.losses), ("most innocent of one", entry.innocent_losses)):
            self.seen[name] = max(self.seen[name], count)

    # -- faults

    async def _cause(self, kind: str) -> None:
        at = self.rng.randrange(2, 12)
        match kind:
            case "kill":
                await trio.sleep(self.rng.random() * 0.1)
                self._signal(signal.SIGKILL)
            case "freeze":
                self._signal(signal.SIGSTOP)
            case "hang":
                await self._hang(self.rng.randrange(4))
            case "silence":  # nobody cancels it: the relay finds that it is silent, three times
                await self._fails({"how": "hang", "at": at}, "idle_timeout")
            case "crash":
                await self._fails({"how": "exit", "at": 0}, "engine_failed")
            case "late crash":
                await self._fails({"how": "exit", "at": at}, "engine_failed")
            case "restart":
                await self._fails(
                    {"how": "raise", "at": self.rng.randrange(3), "restart": True, "retryable": True}, "engine_failed"
                )
            case _:
                await self._fails({"how": "raise", "at": at, "retryable": True}, "engine_failed")

    def _signal(self, number: signal.Signals) -> None:
        if (child := self.host.child) is not None:
            os.kill(child.pid, number)

    async def _fails(self, fail: dict[str, Any], code: str) -> None:
        """A request that does this is given up after its third loss."""
        try:
            async with self.client.submit("tts", {"text": "bad", "speed": 8, "fail": fail}) as stream:
                await stream.result()
            self.complaints.append(f"a request with {fail} completed")
        except RequestFailed as fault:
            if fault.code != code or "3 attempts have been lost" not in fault.message:
                self.complaints.append(f"a request with {fail}: {fault}")

    async def _hang(self, at: int) -> None:
        """One that hangs stops none of the others, and its client can cancel it."""
        params = {"text": "hangs", "speed": 8, "fail": {"how": "hang", "at": at}}
        try:
            async with self.client.submit("tts", params, priority=9) as stream:
                async for frame in stream:
                    if isinstance(frame, Started):
                        await self._completed(SLOTS)
                        await self.client.cancel(stream.request_id)
        except RequestCancelled:
            return
        self.complaints.append("a request that hangs ended by itself")


async def storm(folder: Path, faults: int, seed: int) -> Storm:
    """Run a relay and a worker with a shared engine through so many faults."""
    limits = {"cancel_grace_s": 30.0}  # longer than the worker's: its answer counts
    space = {"idle_timeout_s": 3.0, "queue_timeout_s": 300.0}
    results = {"retain_s": 5.0}
    async with (
        daemon(folder, spaces={"tts": space}, limits=limits, results=results) as relay,
        open_relay(relay.url) as client,
        trio.open_nursery() as nursery,
    ):
        options = parse_options(find_engine("mock").OPTIONS, ("shared=true",))
        host = EngineHost("mock", options, shared=True, cancel_grace_s=0.3, stall_timeout_s=1.5)
        slots = [ProcessSlot(index, host) for index in range(SLOTS)]
        worker = Worker(Identity(name="box", spaces=("tts",), engine="mock"), parse_address(relay.url), slots)
        nursery.start_soon(worker.run)
        found = Storm(relay, client, host, random.Random(seed))
        await found.run(faults)
        nursery.cancel_scope.cancel()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.seat_storm", description=__doc__)
    parser.add_argument("--faults", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="relayd-seats-") as folder:
        found = trio.run(storm, Path(folder), given.faults, given.seed)
    print(f"{given.faults} faults, seed {given.seed}, in {time.monotonic() - began:.0f} s: {dict(found.faults)}")
    print(f"{'processes':<32} {len(found.pids)}")
    for name, count in sorted(found.seen.items()):
        print(f"{name:<32} {count}")
    for complaint in found.complaints:
        print(f"BROKEN: {complaint}")
    return 1 if found.complaints else 0


if __name__ == "__main__":
    sys.exit(main())
