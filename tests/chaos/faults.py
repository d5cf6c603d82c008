"""The faults: for each process and each line a track of faults, drawn from the seed, and the code that causes them."""

import os
import random
import signal
from collections.abc import Callable, Iterator, Mapping

import attrs
import trio

from tests.chaos.processes import Actor
from tests.chaos.proxy import Line
from tests.chaos.report import Ledger

#: Fault of the relay -> relative frequency.
RELAY_FAULTS = {"kill -9": 8, "kill -9 behind an answer": 8, "SIGTERM": 2, "SIGSTOP": 2}
_LINE_FAULTS = {
    "cut RST": 6,
    "cut FIN": 4,
    "half-open": 3,
    "held": 3,
    "stop in frame": 3,
    "delay": 2,
    "throttle": 2,
    "trickle": 2,
}
WORKER_FAULTS = _LINE_FAULTS | {"kill -9": 6, "slot kill -9": 4, "SIGSTOP": 3}
#: A killed client is a kind of plan instead, because its successor must be known.
CLIENT_FAULTS = _LINE_FAULTS | {"slow reader": 4}
#: Time for a relay to drain: its own limit, and what it does afterwards, on a busy machine.
DRAIN_S = 90.0
#: How long a kill waits for the answer behind which it is to come.
AIM_S = 5.0
#: Speed of a slow reader's line, bytes per second: less than its stream needs, but more than nothing.
SLOW_BYTES_PER_S = (2_000.0, 8_000.0)


@attrs.frozen
class Planned:
    """A future fault: after `gap_s`, for `for_s`. `dice`, 0..1, decides its other choices."""

    gap_s: float
    kind: str
    for_s: float
    dice: float


def draw_faults(random: random.Random, kinds: Mapping[str, int], gap_s: tuple[float, float]) -> Iterator[Planned]:
    """The endless track of one process or line; a pure function of the state of `random`."""
    while True:
        yield Planned(
            gap_s=random.uniform(*gap_s),
            kind=random.choices(list(kinds), list(kinds.values()))[0],
            for_s=random.uniform(0.1, 3.0),
            dice=random.random(),
        )


async def storm_line(line: Line, planned: Planned, ledger: Ledger) -> None:
    """Cause a fault of a line, and end it. Faults of processes are skipped."""
    kind = planned.kind
    cuts = kind.startswith("cut")
    fault = ledger.begin_fault(kind, line.name, cuts=cuts)
    match kind:
        case "cut RST":
            line.cut("rst")
        case "cut FIN":
            line.cut("fin")
        case "half-open":
            line.lose()
        case "held":
            line.hold(*(("up", "down") if planned.dice < 0.5 else ("up",) if planned.dice < 0.75 else ("down",)))
        case "stop in frame":
            line.stop_in_frame()
        case "delay":
            line.delay_s = 0.02 + 0.3 * planned.dice
        case "throttle":
            line.bytes_per_s = 4_000 + 16_000 * planned.dice
        case "trickle":
            line.trickling = True
        case "slow reader":
            line.bytes_per_s = SLOW_BYTES_PER_S[0] + (SLOW_BYTES_PER_S[1] - SLOW_BYTES_PER_S[0]) * planned.dice
    if not cuts:
        await trio.sleep(planned.for_s)
        line.heal()
    ledger.heal_fault(fault)


async def storm_worker(worker: Actor, planned: Planned, ledger: Ledger, nursery: trio.Nursery) -> None:
    """Cause a fault of a worker's process."""
    if planned.kind == "SIGSTOP":
        await _stop_and_go(worker, planned, ledger)
        return
    if planned.kind == "slot kill -9":
        if slots := worker.children():
            fault = ledger.begin_fault(planned.kind, f"worker {worker.name}", cuts=True)
            os.kill(slots[int(planned.dice * len(slots))], signal.SIGKILL)
            ledger.heal_fault(fault)
        return
    fault = ledger.begin_fault(planned.kind, f"worker {worker.name}")
    await worker.kill()
    await trio.sleep(planned.dice)
    await worker.start(nursery)
    await worker.wait_ready()
    ledger.heal_fault(fault)


async def storm_relay(relay: Actor, planned: Planned, ledger: Ledger, nursery: trio.Nursery) -> None:
    """Cause a fault of the relay."""
    if planned.kind == "SIGSTOP":
        await _stop_and_go(relay, planned, ledger)
        return
    if planned.kind == "kill -9 behind an answer":
        with trio.move_on_after(AIM_S):
            await ledger.next_answer.wait()
        relay.signal(signal.SIGKILL)
    fault = ledger.begin_fault(planned.kind, "relay")
    if planned.kind == "SIGTERM":
        relay.signal(signal.SIGTERM)
        code = None
        with trio.move_on_after(DRAIN_S):
            code = await relay.ended()
        if code != 0:
            ledger.complain(f"the relay was told to leave, and ended with {code}")
    await relay.kill()
    ledger.relay_gone()
    await trio.sleep(planned.dice * 0.6)
    await relay.start(nursery)
    await relay.wait_ready()
    ledger.heal_fault(fault)


async def _stop_and_go(actor: Actor, planned: Planned, ledger: Ledger) -> None:
    fault = ledger.begin_fault("SIGSTOP", actor.name if actor.name == "relay" else f"worker {actor.name}")
    actor.signal(signal.SIGSTOP)
    await trio.sleep(planned.for_s)
    actor.signal(signal.SIGCONT)
    ledger.heal_fault(fault)


@attrs.define(eq=False)
class Storm:
    """All tracks. `calm` ends them, `spare_relay` ends those of the relay; a current fault is completed."""

    seed: int
    ledger: Ledger
    nursery: trio.Nursery
    calm: trio.Event = attrs.field(factory=trio.Event)
    spare_relay: trio.Event = attrs.field(factory=trio.Event)
    running: int = 0
    _idle: trio.Event = attrs.field(factory=trio.Event)

    def relay_track(self, relay: Actor, gap_s: tuple[float, float]) -> None:
        """Start the relay's track."""

        async def do(planned: Planned) -> None:
            await storm_relay(relay, planned, self.ledger, self.nursery)

        self._begin("relay", RELAY_FAULTS, gap_s, do, self.spare_relay)

    def worker_track(self, worker: Actor, line: Line, gap_s: tuple[float, float]) -> None:
        """Start the tracks of a worker and its line."""

        async def do(planned: Planned) -> None:
            if planned.kind in _LINE_FAULTS:
                await storm_line(line, planned, self.ledger)
            else:
                await storm_worker(worker, planned, self.ledger, self.nursery)

        self._begin(f"worker {worker.name}", WORKER_FAULTS, gap_s, do, self.calm)

    def client_track(self, line: Line, gap_s: tuple[float, float]) -> None:
        """Start a client's track."""

        async def do(planned: Planned) -> None:
            await storm_line(line, planned, self.ledger)

        self._begin(line.name, CLIENT_FAULTS, gap_s, do, self.calm)

    def _begin(
        self,
        name: str,
        kinds: Mapping[str, int],
        gap_s: tuple[float, float],
        do: Callable[[Planned], object],
        until: trio.Event,
    ) -> None:
        self.running += 1
        track = draw_faults(random.Random(f"{self.seed} {name}"), kinds, gap_s)
        self.nursery.start_soon(self._follow, track, do, until)

    async def _follow(self, track: Iterator[Planned], do: Callable[[Planned], object], until: trio.Event) -> None:
        for planned in track:
            with trio.move_on_after(planned.gap_s):
                await until.wait()
            if until.is_set() or self.calm.is_set():
                break
            await do(planned)  # type: ignore[misc]
        self.running -= 1
        if not self.running:
            self._idle.set()

    async def end(self) -> None:
        """End the storm: start no new faults, and complete the current ones."""
        self.calm.set()
        self.spare_relay.set()
        await self._idle.wait()
