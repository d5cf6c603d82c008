"""The feed of an operator's `watch`: one snapshot, then changes, coalesced to the speed of its terminal.

Whoever changes something calls `touch` (told within 0.25 s) or, for what changes with every frame, `stir` (once a
second). Rows of which there are few are looked at once a second, and told where they are not as they were last told;
nothing is told because time goes by. What a watch costs the relay is bounded: see `MAX_SHARE`.
"""

import time
from collections.abc import Callable, Iterable, Iterator

import attrs
import trio

from protocol.client.queue_order import rows_to_send
from protocol.client.watch import COUNTS_ON
from protocol.wire.errors import LinkError
from protocol.wire.messages import Delta, Snapshot
from protocol.wire.validators import Value
from relayd.core.interfaces import ClientPort
from relayd.core.relay import Relay
from relayd.scheduling.model import State
from relayd.views.rows import (
    TOPICS,
    buffered_bytes,
    client_row,
    history_row,
    pages,
    relay_row,
    request_row,
    watched_space_row,
    worker_row,
)
from relayd.views.token_rows import Row

#: docs/design.md §5: deltas at most 4 times a second.
DELTA_INTERVAL_S = 0.25
#: How often what changes all the time is told, and what is not touched is looked at.
LOOK_INTERVAL_S = 1.0
#: One watch may take this part of the relay's time: a round that took long is followed by a longer pause, ...
MAX_SHARE = 0.01
#: ... up to this one.
MAX_PAUSE_S = 2.0
#: With more than this waiting for a slow terminal, pages and deltas are put off; they only grow older, not more.
MAX_PENDING_BYTES = 64 * 1024
#: Ids in one `gone` of a delta: an array of the wire holds 1,024.
MAX_GONE = 1_000
#: Lines of a log in a snapshot; as many of the older ones come with each round behind it.
LINES = 200
#: A round trip is never twice the same: it is told anew when it has become so much longer or shorter.
RTT_FACTOR, RTT_MS = 1.5, 2.0
#: An age is told anew when it is not the old one grown older; both were rounded.
AGE_S = 0.5

_LOOKED_AT: dict[str, Callable[[Relay, str], Row | None]] = {
    "relay": lambda relay, _key: relay_row(relay),
    "spaces": watched_space_row,
    "workers": worker_row,
    "clients": client_row,
}
Gone = dict[str, list[str]]


@attrs.define(eq=False)
class WatchFeed:
    """One operator's watch; `serve` is its task, and `begin` starts it over with other topics."""

    client: ClientPort
    relay: Relay
    _topics: frozenset[str] = frozenset()
    #: Rows to be told anew, (topic, key): in the next round, and with the next look.
    _touched: set[tuple[str, str]] = attrs.field(factory=set)
    _busy: set[tuple[str, str]] = attrs.field(factory=set)
    #: Spaces whose queues have moved.
    _moved: set[str] = attrs.field(factory=set)
    #: Topic -> key -> its row as last told; in place of each age, when that began.
    _last_sent: dict[str, dict[str, Row]] = attrs.field(factory=dict)
    #: What a client's row changes with, as it was at the last look.
    _pulses: dict[str, tuple[Value, ...]] = attrs.field(factory=dict)
    #: Space -> its queue, as the other end has it or is told in this round.
    _orders: dict[str, list[str]] = attrs.field(factory=dict)
    #: Requests that were told to have a reader that is behind, and by how many bytes.
    _behind: dict[str, int] = attrs.field(factory=dict)
    #: `log`, `audit` -> ids of the first and the last line that was told.
    _lines: dict[str, tuple[int, int]] = attrs.field(factory=dict)
    _look_at: float = 0.0
    _begun: trio.Event = attrs.field(factory=trio.Event)
    _round: int = 0
    #: Of the relay's time, in the round at hand.
    _cpu_s: float = 0.0

    def mark_changed(self, topic: str, key: str) -> None:
        """A row may look otherwise now."""
        if topic in self._topics:
            self._touched.add((topic, key))
        elif topic == "queue":
            self._moved.add(key)

    def mark_busy(self, topic: str, key: str) -> None:
        """A row looks otherwise now, and will again in a moment."""
        if topic in self._topics:
            self._busy.add((topic, key))

    def begin(self, topics: list[str]) -> None:
        """Tell everything of these topics (none: of all), then what changes."""
        self._topics = frozenset(topics or TOPICS) & frozenset(TOPICS)
        self._round += 1
        self._begun.set()

    async def serve(self) -> None:
        """Send the snapshot asked for last, then deltas, until cancelled or the link is gone."""
        told = 0
        pause_s = DELTA_INTERVAL_S
        try:
            await self._begun.wait()
            while True:
                if told != self._round:
                    told, pause_s = self._round, DELTA_INTERVAL_S
                    await self._send_snapshot()
                await trio.sleep(pause_s)
                if told == self._round:
                    self._cpu_s = 0.0
                    await self._send_delta()
                    pause_s = min(max(DELTA_INTERVAL_S, self._cpu_s / MAX_SHARE), MAX_PAUSE_S)
        except LinkError:
            return

    # -- rounds

    async def _send_snapshot(self) -> None:
        """All rows, in pages; what changes meanwhile is touched, and told by the next delta."""
        relay, topics = self.relay, self._topics
        for memory in (self._touched, self._busy, self._moved, self._last_sent):
            memory.clear()
        for per_key in (self._pulses, self._orders, self._behind, self._lines):
            per_key.clear()
        self._look_at = trio.current_time() + LOOK_INTERVAL_S
        rows = [row for topic in _LOOKED_AT for row in self._changed_rows(topic, self._keys(topic), {})]
        if "history" in topics:
            rows.append({"": "history", **history_row(relay)})
        rows += self._new_lines()
        places: dict[str, int] = {}
        requests: list[str] = []
        if "requests" in topics:
            requests = list(relay.requests)
            for name, space in relay.scheduler.state.spaces.items():
                self._orders[name] = [entry.request_id for entry in space.queue]
                places |= {request_id: number for number, request_id in enumerate(self._orders[name], 1)}
        for page, more in pages(self._with_requests(rows, requests, places)):
            self.client.send(Snapshot(data={topic: [] for topic in sorted(topics)} | _by_topic(page), more=more))
            await self.client.link.drained(MAX_PENDING_BYTES)

    async def _send_delta(self) -> None:
        began = time.perf_counter()
        looks = trio.current_time() >= self._look_at
        touched, self._touched = self._touched, set()
        if looks:
            self._look_at = trio.current_time() + LOOK_INTERVAL_S
            touched |= self._busy
            self._busy = set()
            touched.update(("requests", request_id) for request_id in self._readers_moved())
        gone: Gone = {}
        rows: list[Row] = []
        for topic in _LOOKED_AT:
            keys: Iterable[str] = self._keys(topic) if looks else {key for name, key in touched if name == topic}
            if topic == "relay" and touched and topic in self._topics:
                keys = ["relay"]
            rows += self._changed_rows(topic, keys, gone)
        rows += self._new_lines()
        requests = {key for topic, key in touched if topic == "requests"}
        if vanished := [request_id for request_id in requests if request_id not in self.relay.requests]:
            gone["requests"] = vanished
            requests.difference_update(vanished)
        places = self._new_places(requests)
        requests.update(places)
        self._cpu_s += time.perf_counter() - began
        await self._send_pages(self._with_requests(rows, requests, places), gone)

    async def _send_pages(self, rows: Iterator[Row], gone: Gone) -> None:
        """One round, in as many messages as it takes: only together do they tell how things stand."""
        began = time.perf_counter()
        for page, more in pages(rows):
            if page:
                self.client.send(Delta(data=_by_topic(page), more=more or bool(gone)))
                self._cpu_s += time.perf_counter() - began
                await self.client.link.drained(MAX_PENDING_BYTES)
                began = time.perf_counter()
        chunks = [
            {topic: keys[first : first + MAX_GONE]}
            for topic, keys in gone.items()
            for first in range(0, len(keys), MAX_GONE)
        ]
        for number, chunk in enumerate(chunks, 1):
            self.client.send(Delta(gone=chunk, more=number < len(chunks)))
            await self.client.link.drained(MAX_PENDING_BYTES)

    # -- rows that are looked at

    def _keys(self, topic: str) -> list[str]:
        """Keys of rows that may have changed or disappeared."""
        if topic not in self._topics:
            return []
        relay = self.relay
        if topic == "relay":
            return ["relay"]
        told = self._last_sent.get(topic, {})
        if topic == "spaces":
            return sorted({*relay.spaces, *told})
        if topic == "workers":
            return sorted({*relay.scheduler.state.workers, *told})
        self._pulses = {key: pulse for key, pulse in self._pulses.items() if key in relay.clients}
        return [*self._active_clients(), *(key for key in told if key not in relay.clients)]

    def _active_clients(self) -> Iterator[str]:
        """Clients whose rows may have changed since the last look; of a thousand, most are quiet."""
        stats = self.relay.stats
        for connection_id, client in self.relay.clients.items():
            rate = stats.clients.get(connection_id)
            pulse = (
                client.bytes_sent,
                client.backlog_bytes,
                len(client.held_requests),
                len(client.readers),
                rate.per_s if rate else 0,
                client.link.rtt_s is None,
            )
            if self._pulses.get(connection_id) != pulse:
                self._pulses[connection_id] = pulse
                yield connection_id

    def _changed_rows(self, topic: str, keys: Iterable[str], gone: Gone) -> Iterator[Row]:
        """The rows of `keys` that are not as they were last told; those that are no more go into `gone`."""
        told = self._last_sent.setdefault(topic, {})
        for key in keys:
            row = _LOOKED_AT[topic](self.relay, key)
            if row is None:
                told.pop(key, None)
                gone.setdefault(topic, []).append(key)
                continue
            fresh = _comparable(topic, row, told.get(key, {}))
            if told.get(key) != fresh:
                told[key] = fresh
                yield {"": topic, **row}

    # -- rows of requests

    def _with_requests(self, rows: list[Row], requests: Iterable[str], places: dict[str, int]) -> Iterator[Row]:
        """`rows`, then those of `requests`, each made when it is its turn."""
        yield from rows
        for request_id in requests:
            row = request_row(self.relay, request_id, places.get(request_id))
            if row is None:
                continue  # forgotten meanwhile, which the next round tells
            if row["buffered_bytes"]:
                self._behind[request_id] = row["buffered_bytes"]
            else:
                self._behind.pop(request_id, None)
            yield {"": "requests", **row}

    def _readers_moved(self) -> list[str]:
        """Requests whose readers were behind, and are so by more or less now."""
        moved = []
        for request_id, before in list(self._behind.items()):
            request = self.relay.requests.get(request_id)
            if request is None:
                del self._behind[request_id]
            elif buffered_bytes(request) != before:
                moved.append(request_id)
        return moved

    def _new_places(self, touched: set[str]) -> dict[str, int]:
        """Request id -> position, of all whose rows the other end needs to have the queues as they are.

        Whoever left a queue was touched at that moment, so it is told in this round, or was in one before.
        """
        relay = self.relay
        moved, self._moved = self._moved, set()
        waiting = {key for key in touched if relay.requests[key].entry.state is State.QUEUED}
        moved |= {relay.requests[key].submit.space for key in waiting}
        places: dict[str, int] = {}
        for name in moved & relay.scheduler.state.spaces.keys() if "requests" in self._topics else ():
            order = [entry.request_id for entry in relay.scheduler.state.spaces[name].queue]
            again = waiting.intersection(order)
            told = rows_to_send(self._orders.get(name, ()), order, again) | again
            if told:
                places |= {request_id: number for number, request_id in enumerate(order, 1) if request_id in told}
            self._orders[name] = order
        return places

    # -- logs

    def _new_lines(self) -> Iterator[Row]:
        """Lines of `log` and `audit` that have come, and older ones while there are any that were not told."""
        for topic, ring in (("log", self.relay.events), ("audit", self.relay.audit)):
            if topic not in self._topics or not ring.rows:
                continue
            if topic in self._lines:
                first, last = self._lines[topic]
                lines = ring.between(last, ring.last, ring.most) if ring.last > last else []
                if first > int(ring.rows[0]["id"]):
                    lines = [*ring.between(0, first - 1, LINES), *lines]
            else:
                first, last = ring.last + 1, 0
                lines = ring.between(0, ring.last, LINES)
            if lines:
                self._lines[topic] = min(first, int(lines[0]["id"])), max(last, int(lines[-1]["id"]))
            yield from ({"": topic, **line} for line in lines)


def _by_topic(page: list[Row]) -> dict[str, list[Row]]:
    """One page carries rows of several topics; each goes back to its own."""
    data: dict[str, list[Row]] = {}
    for row in page:
        data.setdefault(row.pop(""), []).append(row)
    return data


def _comparable(topic: str, row: Row, told: Row) -> Row:
    """The fields compared to decide whether a row has changed."""
    now = trio.current_time()
    fresh = dict(row)
    for key in COUNTS_ON.get(topic, ()):
        if row[key] is not None:
            fresh[key] = now - row[key]
            if told.get(key) is not None and abs(fresh[key] - told[key]) < AGE_S:
                fresh[key] = told[key]
    rtt_ms, before = row.get("rtt_ms"), told.get("rtt_ms")
    if rtt_ms is not None and before is not None:
        apart = abs(rtt_ms - before) > RTT_MS
        if not apart or max(rtt_ms, before) < RTT_FACTOR * min(rtt_ms, before):
            fresh["rtt_ms"] = before
    return fresh
