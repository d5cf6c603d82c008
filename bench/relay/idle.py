"""Measures the memory of a relay at rest, and the cost of connections that only answer its pings."""

import resource
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from statistics import median

import attrs

from bench.figures import Row, paired
from bench.relay.fleet import open_socketio
from bench.relay.generator import Hold, Stuck, hold
from bench.relay.relayd_fleet import log_in
from bench.relay.servers import Absent, Server, open_nats, open_python_peer, open_relayd
from bench.relay.sockets import Connection, NatsLine, WebSocket

#: The first connections also pay for one-time allocations; the slope after them is the cost of a connection.
WARM_UP, CONNECTIONS = 500, 5_000
#: For peers that are measured only for their slope.
FEWER = 1_500
#: Connections handed over together: few enough that none misses a ping.
BATCH = 500
PING_S = 5.0
#: Time for three pings each; and before that, time for the work that connecting leaves behind.
WATCH_S, SETTLE_S = 15.0, 3.0
#: Descriptors reserved for everything else.
SPARE_FILES = 300
RELAYD = "relayd"


@attrs.frozen
class Kind:
    """A relay, and how to connect to it."""

    open: Callable[[], AbstractContextManager[Server]]
    connect: Callable[[Server, int], Connection]
    most: int = FEWER


def _out(server: Server, number: int) -> Connection:
    return WebSocket(server.port, f"/out/{number:032x}")


_KINDS = {
    RELAYD: Kind(
        lambda: open_relayd(ping_interval_s=PING_S), lambda server, _number: log_in(server, "client"), CONNECTIONS
    ),
    "nats-server": Kind(lambda: open_nats(PING_S), lambda server, _number: NatsLine(server.port), CONNECTIONS),
    "picows + uvloop": Kind(lambda: open_python_peer("on_picows", PING_S), _out),
    "websockets + uvloop": Kind(lambda: open_python_peer("on_websockets", PING_S), _out),
    "aiohttp + uvloop": Kind(lambda: open_python_peer("on_aiohttp", PING_S), _out),
    "plain trio-websocket": Kind(lambda: open_python_peer("plain_trio", PING_S), _out),
    "python-socketio + uvicorn": Kind(
        lambda: open_python_peer("on_socketio", PING_S), lambda server, _number: open_socketio(server)
    ),
}


@attrs.define
class Guests:
    """One relay with all its connections."""

    server: Server
    holds: list[Hold]
    rest_kib: int
    warm_kib: int
    accept_s: float
    count: int
    watched_s: float = 0.0
    cpu_s: float = 0.0
    kib: int = 0

    def watch(self) -> None:
        """Record the counters; call it twice, and the figures describe the time between."""
        self.cpu_s = self.server.cpu_s() - self.cpu_s
        self.watched_s = time.monotonic() - self.watched_s
        self.kib = self.server.rss_kib()

    @property
    def kib_each(self) -> float:
        """Resident memory per connection that has been pinged."""
        return (self.kib - self.warm_kib) / (self.count - WARM_UP)

    @property
    def us_a_ping(self) -> float:
        """CPU of one ping and its pong."""
        return 1e6 * self.cpu_s / (self.count * self.watched_s / PING_S)


def measure() -> list[Row]:
    """Watch all relays at the same time, so that the machine's variations affect all alike."""
    most = _most_connections()
    with ExitStack() as stack:
        guests: dict[str, Guests] = {}
        for name, kind in _KINDS.items():
            try:
                server = stack.enter_context(kind.open())
            except Absent:
                continue  # measured by the figure `relay`
            guests[name] = _fill(server, kind, min(most, kind.most))
            for held in guests[name].holds:
                stack.callback(held.process.kill)
        time.sleep(SETTLE_S)
        for each in guests.values():
            each.watch()
        time.sleep(WATCH_S)
        for each in guests.values():
            each.watch()
        for name, each in list(guests.items()):
            try:
                pongs = sum(batch.end() for batch in each.holds)
            except Stuck as fault:
                if name == RELAYD:
                    raise
                print(f"{name} is left out: {fault}", file=sys.stderr, flush=True)
                del guests[name]
            else:
                if pongs < 2 * each.count:
                    raise RuntimeError(f"{name} sent {pongs} pings to {each.count} connections")
    return _rows(guests)


def _most_connections() -> int:
    """As many as the limit of open files allows: to a relay, and at its other end."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return min(CONNECTIONS, most - SPARE_FILES)


def _fill(server: Server, kind: Kind, count: int) -> Guests:
    rest_kib = server.rss_kib()
    holds, warm_kib, before_s, costs_s = [], 0, 0.0, []
    for begin in range(0, count, BATCH):
        if begin == WARM_UP:
            warm_kib = server.rss_kib()
        before_s = server.cpu_s()
        connections = [kind.connect(server, number) for number in range(begin, min(begin + BATCH, count))]
        costs_s.append((server.cpu_s() - before_s) / len(connections))
        holds.append(hold(connections))
    return Guests(server, holds, rest_kib, warm_kib, median(costs_s[1:]), count)


def _rows(guests: dict[str, Guests]) -> list[Row]:
    ours = guests.pop(RELAYD)
    count = f"{ours.count:,} idle connections"
    share = 100 * ours.cpu_s / ours.watched_s
    pings = f"{count}, pings every {PING_S:g} s: CPU"
    rows = [Row(figure="idle", name=pings, unit="% of a core", value=share, limit=3.0)]
    figures: list[tuple[str, str, Callable[[Guests], float], float | None]] = [
        ("RSS at rest, no connection", "MiB", lambda each: each.rest_kib / 1024, None),
        (f"RSS of each of {count}", "KiB", lambda each: each.kib_each, 6.0),
        ("CPU of a ping and its pong", "µs", lambda each: each.us_a_ping, None),
        ("CPU to accept a connection", "µs", lambda each: 1e6 * each.accept_s, 400.0),
    ]
    for name, unit, of, limit in figures:
        for peer, theirs in guests.items():
            values = [of(ours)], [of(theirs)]
            rows.append(attrs.evolve(paired("idle", name, unit, *values, peer), limit=limit))
            limit = None  # reported once
    return rows
