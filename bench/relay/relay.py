"""Measures the cost of a frame in the relay, compared with other relays under the same load at the same time."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from functools import partial
from statistics import median

import attrs

from bench.figures import Row, in_turns, paired
from bench.relay.faults import prove
from bench.relay.fleet import Fleet, Load, NatsFleet, SocketIoFleet, TcpFleet, WebSocketFleet
from bench.relay.frames import SPEECH_BYTES
from bench.relay.generator import Round, Stuck
from bench.relay.relayd_fleet import RelaydFleet
from bench.relay.servers import Absent, Server, open_haproxy, open_nats, open_python_peer, open_relayd

MIB = 1024**2
#: 12 frames of 80 ms a second: speech at the speed at which it is spoken.
SPEECH_INTERVAL_S = 1 / 12
#: CPU time that a saturated round should take in a relay.
ROUND_CPU_S = 0.4
LEAST_EACH, MOST_EACH = 20, 400
#: Most memory of a relay that the frames of a saturated round may use: half of what relayd is configured for.
MOST_BYTES = 128 * MIB
#: Listeners of the single stream of a fan-out, and its frames per second if paced.
LISTENERS, FAN_RATE = 50, 60
#: In a round with a stalled reader: its stream's frames per frame of the others. More than the kernel holds in 2 s.
FLOOD = 40
#: In the round that shows where they wait: the same, its duration, the memory limit, and the relay's largest growth.
DELUGE, DELUGE_S, SMALL_MEMORY_BYTES, MOST_GROWTH_BYTES = 300, 3.0, 4 * MIB, 24 * MIB

#: Rounds for figures without a limit.
GROWTH_ROUNDS = 3

RELAYD, SQLITE, STALL, SMALL = "relayd", "relayd, sqlite", "relayd, stalls", "relayd, small memory"
NATS, HAPROXY, TRIO, WEBSOCKETS = "nats-server", "haproxy", "plain trio-websocket", "websockets + uvloop"
AIOHTTP, PICOWS, SOCKETIO = "aiohttp + uvloop", "picows + uvloop", "python-socketio + uvicorn"

_OPENERS: dict[str, Callable[[], AbstractContextManager[Server]]] = {
    RELAYD: lambda: open_relayd(store="memory", ping_interval_s=30),
    SQLITE: lambda: open_relayd(store="sqlite", ping_interval_s=30),
    STALL: lambda: open_relayd(store="sqlite", ping_interval_s=30),
    SMALL: lambda: open_relayd(store="sqlite", ping_interval_s=30, memory_bytes=SMALL_MEMORY_BYTES),
    NATS: open_nats,
    HAPROXY: open_haproxy,
    TRIO: lambda: open_python_peer("plain_trio"),
    WEBSOCKETS: lambda: open_python_peer("on_websockets"),
    AIOHTTP: lambda: open_python_peer("on_aiohttp"),
    PICOWS: lambda: open_python_peer("on_picows"),
    SOCKETIO: lambda: open_python_peer("on_socketio"),
}
_FLEETS: dict[str, Callable[[Server, int], Fleet]] = {
    RELAYD: RelaydFleet,
    SQLITE: RelaydFleet,
    STALL: lambda server, most: RelaydFleet(server, most, stalls=True),
    SMALL: lambda server, most: RelaydFleet(server, most, stalls=True),
    NATS: NatsFleet,
    HAPROXY: TcpFleet,
    SOCKETIO: SocketIoFleet,
}


class Field:
    """The relays of this run: each is started when it is first needed, and kept. Only one has work at a time."""

    def __init__(self, most_streams: int) -> None:
        self._most_streams = most_streams
        self._open = ExitStack()
        self._fleets: dict[str, Fleet] = {}
        self._absent: set[str] = set()

    def close(self) -> None:
        """Stop all relays."""
        self._open.close()

    def fleets(self, names: Sequence[str]) -> dict[str, Fleet]:
        """The available relays of `names`, warmed up."""
        for name in names:
            if name in self._fleets or name in self._absent:
                continue
            try:
                server = self._open.enter_context(_OPENERS[name]())
            except Absent as missing:
                self._absent.add(name)
                print(f"no {missing}", file=sys.stderr, flush=True)
                continue
            fleet = _FLEETS.get(name, WebSocketFleet)(server, self._most_streams)
            self._fleets[name] = self._open.enter_context(closing(fleet))
            if name == RELAYD:  # like one that has run for a while: memory full of results, the oldest being dropped
                for _ in range(3):
                    fleet.round(Load(each=MOST_BYTES // (50 * SPEECH_BYTES)))
        return {name: self._fleets[name] for name in names if name in self._fleets}

    def round(self, name: str, load: Load) -> Round:
        """Run one round on one relay while the others are idle."""
        for fleet in self._fleets.values():
            fleet.look_after()
        return self._fleets[name].round(load)

    def rounds(self, count: int, load: Load, names: Sequence[str]) -> dict[str, list[Round]]:
        """Run `count` rounds on each, in turns."""
        return in_turns(count, {name: partial(self.round, name, load) for name in self.fleets(names)})

    def saturated(self, count: int, load: Load, names: Sequence[str]) -> dict[str, list[Round]]:
        """Like `rounds`, long enough for each relay's figure to settle; a short trial round determines the length."""
        calls = {}
        most_each = max(LEAST_EACH, min(MOST_EACH * 50 // load.streams, MOST_BYTES // (load.streams * load.pcm_bytes)))
        for name, fleet in self.fleets(names).items():
            trial = attrs.evolve(load, each=LEAST_EACH)
            fleet.round(trial)  # imports, caches and buffers reach their final size
            took = fleet.round(trial)
            fair = ROUND_CPU_S / (sum(took.cpu_s) / LEAST_EACH)
            mine = attrs.evolve(load, each=max(LEAST_EACH, min(most_each, round(fair))))
            calls[name] = partial(self.round, name, mine)
        return in_turns(count, calls)


@attrs.frozen(kw_only=True)
class Scale:
    """How much to measure."""

    saturated: int
    paced: int
    paced_s: float
    fan_out: int
    fan_out_paced: int
    stalled: int
    stalled_s: float


QUICK = Scale(saturated=12, paced=11, paced_s=1.0, fan_out=3, fan_out_paced=3, stalled=11, stalled_s=1.5)
FULL = Scale(saturated=13, paced=11, paced_s=1.0, fan_out=5, fan_out_paced=4, stalled=11, stalled_s=2.5)


def _cpu(name: str, rounds: dict[str, list[Round]], limits: dict[str, float]) -> list[Row]:
    """Make a row for each peer."""
    ours = [each.cpu_us_a_frame for each in rounds[RELAYD]]
    return [
        paired(
            "relay",
            f"{name}: CPU of the relay",
            "µs/frame",
            ours,
            [each.cpu_us_a_frame for each in theirs],
            peer,
            limit_ratio=limits.get(peer),
        )
        for peer, theirs in rounds.items()
        if peer != RELAYD
    ]


def _latency(name: str, rounds: dict[str, list[Round]], limits: dict[str, float]) -> list[Row]:
    rows = []
    quantiles: dict[str, Callable[[Round], float]] = {
        "p50": lambda r: r.p50_us,
        "p99": lambda r: r.p99_us,
        "p50 of the first frame of each stream": lambda r: r.first_p50_us,
    }
    for label, of in quantiles.items():
        ours = [of(each) for each in rounds[RELAYD]]
        for peer, theirs in rounds.items():
            if peer != RELAYD:
                what = f"{name}: worker to client, {label}"
                limit = limits.get(peer) if label == "p99" else None
                rows.append(paired("relay", what, "µs", ours, [of(r) for r in theirs], peer, limit_ratio=limit))
    quietest = min(each.p99_us for each in rounds[RELAYD])
    for peer, theirs in rounds.items():
        if peer != RELAYD:  # other load on the machine can only add to it
            what = f"{name}: worker to client, p99 of the quietest round"
            rows.append(paired("relay", what, "µs", [quietest], [min(each.p99_us for each in theirs)], peer))
    return rows


def saturated(field: Field, scale: Scale, peers: Sequence[str]) -> list[Row]:
    """Measure 50 streams of 4 workers, as fast as the relay accepts them."""
    name = "saturated, 50 streams, 8 KiB"
    rounds = field.saturated(scale.saturated, Load(each=0), [RELAYD, *peers])
    rows = _cpu(name, rounds, {NATS: 1.15, HAPROXY: 1.5, TRIO: 0.1})
    ours = [each.frames_a_second for each in rounds[RELAYD]]
    for peer, theirs in rounds.items():
        if peer in (NATS, TRIO):
            rows.append(
                paired("relay", f"{name}: throughput", "frames/s", ours, [r.frames_a_second for r in theirs], peer)
            )
    whole = [1e6 * each.whole_cpu_s / each.frames for each in rounds[RELAYD]]
    rows.append(
        paired(
            "relay",
            f"{name}: CPU with the requests' set-up and tear-down",
            "µs/frame",
            whole,
            [each.cpu_us_a_frame for each in rounds[RELAYD]],
            "the frames alone",
        )
    )
    share = 100 * median(each.load_share for each in rounds[RELAYD])
    rows.append(
        Row(
            figure="relay",
            name=f"{name}: the load generator's share of a core (near 100: the bottleneck)",
            unit="%",
            value=share,
        )
    )
    return rows


def paced(field: Field, scale: Scale, peers: Sequence[str], streams: int = 50) -> list[Row]:
    """Measure speech at the speed of speaking: every frame wakes the relay separately, so it costs more."""
    load = Load(each=1 + round(scale.paced_s / SPEECH_INTERVAL_S), streams=streams, interval_s=SPEECH_INTERVAL_S)
    rounds = field.rounds(scale.paced, load, [RELAYD, *peers])
    name = f"paced, {streams} streams of 12 frames/s, 8 KiB"
    aims = streams == 50
    return [
        *_cpu(name, rounds, {NATS: 1.0, WEBSOCKETS: 1.0} if aims else {}),
        *_latency(name, rounds, {NATS: 1.2} if aims else {}),
    ]


def fan_out(field: Field, scale: Scale, peers: Sequence[str]) -> list[Row]:
    """Measure one stream to 50 listeners; a frame counts for each of them."""
    load = Load(each=0, streams=1, listeners=LISTENERS)
    full = field.saturated(scale.fan_out, load, [RELAYD, *peers])
    spoken = attrs.evolve(load, each=1 + round(scale.paced_s * FAN_RATE), interval_s=1 / FAN_RATE)
    slow = field.rounds(scale.fan_out_paced, spoken, [RELAYD, *peers])
    name = f"fan-out, 1 stream to {LISTENERS} listeners, 8 KiB"
    return [
        *_cpu(f"{name}, saturated", full, {NATS: 1.1}),
        *_cpu(f"{name}, {FAN_RATE} frames/s", slow, {NATS: 1.1}),
    ]


def stalled(field: Field, scale: Scale) -> list[Row]:
    """Measure the effect on others of a reader among 50 that does not read, with a stream 40 times as fast."""
    each = round(scale.stalled_s / SPEECH_INTERVAL_S)
    flowing = Load(each=each, interval_s=SPEECH_INTERVAL_S, flood=FLOOD)
    field.fleets([STALL])
    field.round(STALL, attrs.evolve(flowing, each=3))
    rounds = in_turns(
        scale.stalled,
        {
            "stalled": lambda: field.round(STALL, attrs.evolve(flowing, stalled=True)),
            "flowing": lambda: field.round(STALL, flowing),
        },
    )
    stuck, fine = rounds["stalled"], rounds["flowing"]
    waiting = median(each.stalled_frames for each in stuck) * flowing.pcm_bytes / MIB
    row = paired(
        "relay",
        f"one stalled reader among 50, {waiting:.1f} MiB wait for it: p99 of the others",
        "µs",
        [each.p99_us for each in stuck],
        [each.p99_us for each in fine],
        "no reader stalled",
        limit_ratio=1.1,
    )
    return [row, *_bounded(field)]


def _bounded(field: Field) -> list[Row]:
    """Check that a stalled reader's frames do not wait in memory."""
    load = Load(
        each=round(DELUGE_S / SPEECH_INTERVAL_S),
        streams=4,
        interval_s=SPEECH_INTERVAL_S,
        flood=DELUGE,
        stalled=True,
    )
    server = field.fleets([SMALL])[SMALL].server
    field.round(SMALL, attrs.evolve(load, each=3))
    rest_kib = server.rss_kib()
    done = field.round(SMALL, load)
    waiting = done.stalled_frames * load.pcm_bytes / MIB
    label = f"{waiting:.0f} MiB wait for a stalled reader, {SMALL_MEMORY_BYTES // MIB} MiB of them allowed in memory"
    grown = (done.rss_kib[0] - rest_kib) / 1024
    return [
        Row(figure="relay", name=f"{label}: the relay grew by", unit="MiB", value=grown, limit=MOST_GROWTH_BYTES / MIB)
    ]


def growth(field: Field) -> list[Row]:
    """Measure how the cost of a frame grows with its size, with streams, and with listeners."""
    rows = []
    loads = {
        **{f"saturated, 50 streams, frames of {kib} KiB": Load(each=0, pcm_bytes=kib * 1024) for kib in (1, 4, 64)},
        **{f"saturated, {n} stream{'s' * (n > 1)}, 8 KiB": Load(each=0, streams=n) for n in (1, 10, 200)},
        **{
            f"fan-out, 1 stream to {n} listeners, 8 KiB, saturated": Load(each=0, streams=1, listeners=n)
            for n in (5, 200)
        },
    }
    for name, load in loads.items():
        peers = [NATS, PICOWS] if load.streams > 1 else [NATS]
        rows += _cpu(name, field.saturated(GROWTH_ROUNDS, load, [RELAYD, *peers]), {})
    return rows


def with_disk(field: Field, scale: Scale) -> list[Row]:
    """Measure what the SQLite store adds at the speed of speech: it is used only at the begin and end of requests."""
    load = Load(each=1 + round(scale.paced_s / SPEECH_INTERVAL_S), interval_s=SPEECH_INTERVAL_S)
    rounds = field.rounds(GROWTH_ROUNDS, load, [SQLITE, RELAYD])
    disk, memory = ([each.cpu_us_a_frame for each in rounds[name]] for name in (SQLITE, RELAYD))
    name = "paced, 50 streams of 12 frames/s, 8 KiB, SQLite store: CPU of the relay"
    return [paired("relay", name, "µs/frame", disk, memory, "memory store")]


PARTS = ("saturated", "paced", "fan-out", "stalled")


def measure_quick(parts: Sequence[str] = PARTS) -> list[Row]:
    """Measure only the figures with a promised limit: about a minute."""
    with closing(Field(50)) as field:
        work = {
            "saturated": lambda: saturated(field, QUICK, [NATS, HAPROXY, TRIO, WEBSOCKETS]),
            "paced": lambda: paced(field, QUICK, [NATS, WEBSOCKETS]),
            "fan-out": lambda: fan_out(field, QUICK, [NATS]),
            "stalled": lambda: stalled(field, QUICK),
        }
        return _all_of({part: work[part] for part in parts})


def measure() -> list[Row]:
    """Measure everything: about five minutes."""
    pythons = [TRIO, WEBSOCKETS, AIOHTTP, PICOWS, SOCKETIO]
    with closing(Field(200)) as field:
        return _all_of(
            {
                "saturated": lambda: saturated(field, FULL, [NATS, HAPROXY, *pythons]),
                "paced": lambda: paced(field, FULL, [NATS, HAPROXY, *pythons]),
                "paced, 200": lambda: paced(field, FULL, [NATS, HAPROXY, WEBSOCKETS, PICOWS], streams=200),
                "fan-out": lambda: fan_out(field, FULL, [NATS, WEBSOCKETS, PICOWS]),
                "stalled": lambda: stalled(field, FULL),
                "with disk": lambda: with_disk(field, FULL),
                "growth": lambda: growth(field),
            }
        )


def _all_of(parts: Mapping[str, Callable[[], list[Row]]]) -> list[Row]:
    """The rows of all parts; a part that fails becomes a broken row, and does not affect the others."""
    prove()
    rows: list[Row] = []
    for name, part in parts.items():
        try:
            rows += part()
        except Stuck as fault:
            label = f"{name}: FAILED: {fault}"
            rows.append(Row(figure="relay", name=label, unit="", value=float("inf"), limit=0))
    return rows
