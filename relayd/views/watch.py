"""The feed of an operator's `watch`: one snapshot, then deltas, combined to match the speed of the terminal.

Code that changes a row calls `mark_changed` (sent within 0.25 s) or, for rows that change with every frame, `mark_busy`
(sent once a second). The rows of topics with few rows are compared once a second with those last sent, and sent if they
differ; a row is not sent because time has passed. The cost of a watch for the relay is limited: see `MAX_SHARE`.
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
    talk_row,
    watched_space_row,
    worker_row,
)
from relayd.views.token_rows import Row

#: Interval between deltas; docs/design.md §5 allows at most 4 a second.
DELTA_INTERVAL_S = 0.25
#: Interval at which busy rows are sent, and rows that were not marked are compared.
COMPARE_INTERVAL_S = 1.0
#: Share of the relay's time that one watch may use: a delta that took long is followed by a longer pause.
MAX_SHARE = 0.01
#: The longest such pause.
MAX_PAUSE_S = 2.0
#: While a slow terminal has a backlog of more than this, pages and deltas are delayed; they do not accumulate.
MAX_PENDING_BYTES = 64 * 1024
#: Ids in one `gone` of a delta; the wire allows 1,024 in an array.
MAX_GONE = 1_000
#: Lines of a log in a snapshot; each delta after it adds as many older lines until all are sent.
LINES = 200
#: A round-trip time always varies: it is sent again only when it has changed by both this factor and this difference.
RTT_FACTOR, RTT_MS = 1.5, 2.0
#: Tolerance for an age that has only grown with time; both values were rounded.
AGE_S = 0.5

_COMPARED_ROWS: dict[str, Callable[[Relay, str], Row | None]] = {
    "relay": lambda relay, _key: relay_row(relay),
    "spaces": watched_space_row,
    "workers": worker_row,
    "talks": talk_row,
    "clients": client_row,
}
Gone = dict[str, list[str]]


@attrs.define(eq=False)
class WatchFeed:
    """One operator's watch; `serve` is its task, and `begin` starts it again with other topics."""

    client: ClientPort
    relay: Relay
    _topics: frozenset[str] = frozenset()
    #: (topic, key) of rows to send in the next delta.
    _changed: set[tuple[str, str]] = attrs.field(factory=set)
    #: (topic, key) of rows to send at the next comparison.
    _busy: set[tuple[str, str]] = attrs.field(factory=set)
    #: Spaces whose queues have moved.
    _moved: set[str] = attrs.field(factory=set)
    #: Topic -> key -> its row as last sent; each age is replaced by the time at which it began.
    _last_sent: dict[str, dict[str, Row]] = attrs.field(factory=dict)
    #: Client -> the values on which its row depends, as of the last comparison.
    _client_values: dict[str, tuple[Value, ...]] = attrs.field(factory=dict)
    #: Space -> the order of its queue, as sent so far or in the current delta.
    _orders: dict[str, list[str]] = attrs.field(factory=dict)
    #: Request id -> the `buffered_bytes` last sent, if not 0.
    _behind: dict[str, int] = attrs.field(factory=dict)
    #: `log`, `audit` -> ids of the first and the last line that were sent.
    _lines: dict[str, tuple[int, int]] = attrs.field(factory=dict)
    #: Trio time of the next comparison.
    _compare_at: float = 0.0
    _begun: trio.Event = attrs.field(factory=trio.Event)
    #: Number of calls of `begin`.
    _begin_count: int = 0
    #: Time spent on the current delta, in seconds.
    _cpu_s: float = 0.0

    def mark_changed(self, topic: str, key: str) -> None:
        """Note that a row may have changed; topic `queue`: that the queue of space `key` has moved."""
        if topic in self._topics:
            self._changed.add((topic, key))
        elif topic == "queue":
            self._moved.add(key)

    def mark_busy(self, topic: str, key: str) -> None:
        """Note that a row has changed, and changes all the time."""
        if topic in self._topics:
            self._busy.add((topic, key))

    def begin(self, topics: list[str]) -> None:
        """Send a snapshot of these topics (of all topics if there are none), then deltas."""
        self._topics = frozenset(topics or TOPICS) & frozenset(TOPICS)
        self._begin_count += 1
        self._begun.set()

    async def serve(self) -> None:
        """Send the snapshot requested last, then deltas, until cancelled or the link has ended."""
        served = 0
        pause_s = DELTA_INTERVAL_S
        try:
            await self._begun.wait()
            while True:
                if served != self._begin_count:
                    served, pause_s = self._begin_count, DELTA_INTERVAL_S
                    await self._send_snapshot()
                await trio.sleep(pause_s)
                if served == self._begin_count:
                    self._cpu_s = 0.0
                    await self._send_delta()
                    pause_s = min(max(DELTA_INTERVAL_S, self._cpu_s / MAX_SHARE), MAX_PAUSE_S)
        except LinkError:
            return

    # -- snapshots and deltas

    async def _send_snapshot(self) -> None:
        """Send all rows, in pages; rows that change meanwhile are sent by the next delta."""
        relay, topics = self.relay, self._topics
        for marked in (self._changed, self._busy, self._moved, self._last_sent):
            marked.clear()
        for sent in (self._client_values, self._orders, self._behind, self._lines):
            sent.clear()
        self._compare_at = trio.current_time() + COMPARE_INTERVAL_S
        rows = [row for topic in _COMPARED_ROWS for row in self._changed_rows(topic, self._keys(topic), {})]
        if "history" in topics:
            rows.append({"": "history", **history_row(relay)})
        rows += self._new_lines()
        positions: dict[str, int] = {}
        requests: list[str] = []
        if "requests" in topics:
            requests = list(relay.requests)
            for name, space in relay.scheduler.state.spaces.items():
                self._orders[name] = [entry.request_id for entry in space.queue]
                positions |= {request_id: number for number, request_id in enumerate(self._orders[name], 1)}
        for page, more in pages(self._with_requests(rows, requests, positions)):
            self.client.send(Snapshot(data={topic: [] for topic in sorted(topics)} | _by_topic(page), more=more))
            await self.client.link.drained(MAX_PENDING_BYTES)

    async def _send_delta(self) -> None:
        began = time.perf_counter()
        compares = trio.current_time() >= self._compare_at
        changed, self._changed = self._changed, set()
        if compares:
            self._compare_at = trio.current_time() + COMPARE_INTERVAL_S
            changed |= self._busy
            self._busy = set()
            changed.update(("requests", request_id) for request_id in self._readers_moved())
        gone: Gone = {}
        rows: list[Row] = []
        for topic in _COMPARED_ROWS:
            keys: Iterable[str] = self._keys(topic) if compares else {key for name, key in changed if name == topic}
            if topic == "relay" and changed and topic in self._topics:
                keys = ["relay"]
            rows += self._changed_rows(topic, keys, gone)
        rows += self._new_lines()
        requests = {key for topic, key in changed if topic == "requests"}
        if vanished := [request_id for request_id in requests if request_id not in self.relay.requests]:
            gone["requests"] = vanished
            requests.difference_update(vanished)
        positions = self._new_positions(requests)
        requests.update(positions)
        self._cpu_s += time.perf_counter() - began
        await self._send_pages(self._with_requests(rows, requests, positions), gone)

    async def _send_pages(self, rows: Iterator[Row], gone: Gone) -> None:
        """Send one delta in as many messages as it needs; the state is consistent only after the last of them."""
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

    # -- rows that are compared

    def _keys(self, topic: str) -> list[str]:
        """Keys of rows that may have changed or disappeared."""
        if topic not in self._topics:
            return []
        relay = self.relay
        if topic == "relay":
            return ["relay"]
        sent = self._last_sent.get(topic, {})
        if topic == "spaces":
            return sorted({*relay.spaces, *sent})
        if topic == "workers":
            return sorted({*relay.scheduler.state.workers, *sent})
        if topic == "talks":
            return list({*(relay.talks.in_use() if relay.talks is not None else ()), *sent})
        self._client_values = {key: values for key, values in self._client_values.items() if key in relay.clients}
        return [*self._active_clients(), *(key for key in sent if key not in relay.clients)]

    def _active_clients(self) -> Iterator[str]:
        """Yield the clients whose rows may have changed since the last comparison; of a thousand, most are idle."""
        stats = self.relay.stats
        for connection_id, client in self.relay.clients.items():
            rate = stats.clients.get(connection_id)
            values = (
                client.bytes_sent,
                client.backlog_bytes,
                len(client.held_requests),
                len(client.readers),
                rate.per_s if rate else 0,
                client.link.rtt_s is None,
            )
            if self._client_values.get(connection_id) != values:
                self._client_values[connection_id] = values
                yield connection_id

    def _changed_rows(self, topic: str, keys: Iterable[str], gone: Gone) -> Iterator[Row]:
        """Yield the rows of `keys` that differ from those last sent; keys without a row are added to `gone`."""
        sent = self._last_sent.setdefault(topic, {})
        for key in keys:
            row = _COMPARED_ROWS[topic](self.relay, key)
            if row is None:
                sent.pop(key, None)
                gone.setdefault(topic, []).append(key)
                continue
            comparable = _comparable(topic, row, sent.get(key, {}))
            if sent.get(key) != comparable:
                sent[key] = comparable
                yield {"": topic, **row}

    # -- rows of requests

    def _with_requests(self, rows: list[Row], requests: Iterable[str], positions: dict[str, int]) -> Iterator[Row]:
        """Yield `rows`, then the rows of `requests`, each of which is made only when it is needed."""
        yield from rows
        for request_id in requests:
            row = request_row(self.relay, request_id, positions.get(request_id))
            if row is None:
                continue  # it was removed meanwhile, which the next delta reports
            if row["buffered_bytes"]:
                self._behind[request_id] = row["buffered_bytes"]
            else:
                self._behind.pop(request_id, None)
            yield {"": "requests", **row}

    def _readers_moved(self) -> list[str]:
        """Return the requests whose readers were behind and whose `buffered_bytes` have changed."""
        moved = []
        for request_id, before in list(self._behind.items()):
            request = self.relay.requests.get(request_id)
            if request is None:
                del self._behind[request_id]
            elif buffered_bytes(request) != before:
                moved.append(request_id)
        return moved

    def _new_positions(self, changed: set[str]) -> dict[str, int]:
        """Return the positions, by request id, of the requests whose rows the operator needs to know the queues.

        A request that has left a queue was marked as changed then, so its row is in this delta or in an earlier one.
        """
        relay = self.relay
        moved, self._moved = self._moved, set()
        waiting = {key for key in changed if relay.requests[key].entry.state is State.QUEUED}
        moved |= {relay.requests[key].submit.space for key in waiting}
        positions: dict[str, int] = {}
        for name in moved & relay.scheduler.state.spaces.keys() if "requests" in self._topics else ():
            order = [entry.request_id for entry in relay.scheduler.state.spaces[name].queue]
            again = waiting.intersection(order)
            to_send = rows_to_send(self._orders.get(name, ()), order, again) | again
            if to_send:
                numbered = enumerate(order, 1)
                positions |= {request_id: number for number, request_id in numbered if request_id in to_send}
            self._orders[name] = order
        return positions

    # -- logs

    def _new_lines(self) -> Iterator[Row]:
        """Yield the new lines of `log` and `audit`, and some older ones as long as there are unsent ones."""
        for topic, ring in (("log", self.relay.events), ("audit", self.relay.audit)):
            if topic not in self._topics or not ring.last:
                continue
            if topic in self._lines:
                first, last = self._lines[topic]
                lines = ring.between(last, ring.last, ring.most) if ring.last > last else []
                if first > ring.first:
                    lines = [*ring.between(0, first - 1, LINES), *lines]
            else:
                first, last = ring.last + 1, 0
                lines = ring.between(0, ring.last, LINES)
            if lines:
                self._lines[topic] = min(first, int(lines[0]["id"])), max(last, int(lines[-1]["id"]))
            yield from ({"": topic, **line} for line in lines)


def _by_topic(page: list[Row]) -> dict[str, list[Row]]:
    """Group the rows of a page by topic."""
    data: dict[str, list[Row]] = {}
    for row in page:
        data.setdefault(row.pop(""), []).append(row)
    return data


def _comparable(topic: str, row: Row, sent: Row) -> Row:
    """Return the fields compared to decide whether a row has changed; `sent` are those of the row last sent."""
    now = trio.current_time()
    fields = dict(row)
    for key in COUNTS_ON.get(topic, ()):
        if row[key] is not None:
            fields[key] = now - row[key]
            if sent.get(key) is not None and abs(fields[key] - sent[key]) < AGE_S:
                fields[key] = sent[key]
    rtt_ms, before = row.get("rtt_ms"), sent.get("rtt_ms")
    if rtt_ms is not None and before is not None:
        differs = abs(rtt_ms - before) > RTT_MS
        if not differs or max(rtt_ms, before) < RTT_FACTOR * min(rtt_ms, before):
            fields["rtt_ms"] = before
    return fields
