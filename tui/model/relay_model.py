"""The relay as the screen knows it: the rows of each topic, their age, and the rates of the last minute. No I/O."""

import heapq
import math
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import median

import attrs

from protocol.client.queue_order import QueueOrder
from protocol.client.watch import ROW_KEYS, value_now
from protocol.wire.messages import Delta, Snapshot
from protocol.wire.validators import Value

#: Seconds shown by the sparklines.
HISTORY_S = 60
#: Lines kept of `log` and `audit`, which the relay never removes.
MAX_LINES = 5_000
#: The latest completed requests of a space that say how long one takes.
MAX_SAMPLES = 20
LINES = frozenset({"log", "audit"})


@attrs.frozen(eq=False)
class RowView:
    """One row as it was received, and when."""

    topic: str
    key: str
    row: dict[str, Value]
    #: When the row was received, in seconds of the model's clock.
    received: float
    model: "RelayModel" = attrs.field(repr=False)

    @property
    def position(self) -> int | None:
        """The exact place of a queued request, from 1."""
        return self.model.positions.get(self.key) if self.topic == "requests" else None

    def now(self, name: str, now: float) -> Value:
        """A field at the time `now`: ages have grown since the row was received."""
        return value_now(self.topic, self.row, name, self.age(now))

    def age(self, now: float) -> float:
        """Seconds since the row was received."""
        return max(0.0, now - self.received)

    def number(self, name: str) -> float | None:
        """A field if it is a number, else None. `position` is the current place, not the one received with the row."""
        if name == "position" and self.topic == "requests":
            return self.position
        return _figure(self.row.get(name))

    def text(self, name: str) -> str:
        """A field as text, empty where it is missing. `worker` of a request is the name of its worker."""
        if name == "worker" and self.topic == "requests":
            worker = self.model.get("workers", self.text("worker_id"))
            return worker.text("name") if worker is not None else ""
        value = self.row.get(name)
        return value if isinstance(value, str) else "" if value is None else str(value)

    def aged(self, name: str, now: float) -> float | None:
        """A numeric field at the time `now`."""
        return _figure(self.now(name, now))

    def born(self, name: str) -> float | None:
        """When an age began: a sort key that does not change with time."""
        value = self.number(name)
        return None if value is None else self.received - value


@attrs.define
class Link:
    """The state of the link to the relay."""

    up: bool = False
    #: When the link went up or down.
    since: float = 0.0
    #: Why it is down; empty until the first attempt has failed.
    why: str = ""
    #: When the next attempt begins.
    retry_at: float | None = None
    #: The relay's name for itself, and our principal.
    server: str = ""
    principal: str = ""


@attrs.define(eq=False)
class RelayModel:
    """The current rows of all topics."""

    topics: dict[str, dict[str, RowView]] = attrs.field(factory=dict)
    #: Topic -> a number that grows with each change of its rows.
    versions: dict[str, int] = attrs.field(factory=dict)
    link: Link = attrs.field(factory=Link)
    #: Whether a snapshot has been received.
    known: bool = False
    queues: QueueOrder = attrs.field(factory=QueueOrder)
    rates: "Rates" = attrs.field(factory=lambda: Rates())
    #: When the last change was applied.
    updated_at: float = 0.0
    _positions: dict[str, int] = attrs.field(factory=dict)
    _positions_of: int = -1
    _by_state: "dict[tuple[str, str], list[RowView]]" = attrs.field(factory=dict)
    _by_state_of: int = -1
    _usual: dict[str, float | None] = attrs.field(factory=dict)

    def apply(self, change: Snapshot | Delta, now: float) -> None:
        """Replace everything by a snapshot, or some rows by those of a delta."""
        self.updated_at = now
        self.queues.apply(change)
        if isinstance(change, Snapshot):
            for topic in self.topics:
                self._changed(topic)
            self.topics, self.known = {}, True
        for topic, rows in change.data.items():
            self._put(topic, rows if isinstance(rows, list) else [], now)
        if isinstance(change, Delta):
            for topic, keys in change.gone.items():
                known = self.topics.get(topic, {})
                for key in keys if isinstance(keys, list) else []:
                    known.pop(str(key), None)
                self._changed(topic)
        if isinstance(change, Snapshot):
            self.rates.begin(self.rows("history"), self.relay, now)
        elif "relay" in change.data:
            self.rates.go_on(self.relay, now)

    def _put(self, topic: str, rows: Iterable[Value], now: float) -> None:
        self._changed(topic)
        key_name = ROW_KEYS.get(topic, "id")
        known = self.topics.setdefault(topic, {})
        for row in rows:
            if isinstance(row, dict):
                key = str(row.get(key_name, ""))
                known[key] = RowView(topic, key, row, now, self)
        if topic in LINES and len(known) > MAX_LINES:
            for key in sorted(known, key=_line_number)[: len(known) - MAX_LINES]:
                del known[key]

    def _changed(self, topic: str) -> None:
        self.versions[topic] = self.versions.get(topic, 0) + 1

    def rows(self, topic: str) -> list[RowView]:
        """All rows of a topic, in no particular order."""
        return list(self.topics.get(topic, {}).values())

    def get(self, topic: str, key: str) -> RowView | None:
        """One row, or None where it does not exist."""
        return self.topics.get(topic, {}).get(key)

    @property
    def relay(self) -> RowView | None:
        """The row of the relay itself."""
        return self.get("relay", "relay")

    def queue(self, space: str) -> list[RowView]:
        """The queued requests of a space, in order."""
        views = [self.get("requests", request_id) for request_id in self.positions]
        return [view for view in views if view is not None and view.text("space") == space]

    def rows_in(self, state: str, space: str) -> list[RowView]:
        """The requests of a space in a state, in no particular order."""
        if self._by_state_of != self.versions.get("requests", 0):
            self._by_state_of, self._by_state, self._usual = self.versions.get("requests", 0), {}, {}
            for view in self.topics.get("requests", {}).values():
                self._by_state.setdefault((view.text("state"), view.text("space")), []).append(view)
        return self._by_state.get((state, space), [])

    def usual_run_s(self, space: str) -> float | None:
        """How long a request of a space runs: the median of the latest that completed."""
        completed = self.rows_in("completed", space)
        if space not in self._usual:
            latest = heapq.nlargest(MAX_SAMPLES, completed, key=lambda view: view.born("ended_s") or 0.0)
            times = [run_s for view in latest if (run_s := view.number("run_s")) is not None]
            self._usual[space] = median(times) if times else None
        return self._usual[space]

    @property
    def positions(self) -> Mapping[str, int]:
        """Request id -> place in its queue, from 1."""
        if self._positions_of != self.versions.get("requests", 0):
            self._positions_of = self.versions.get("requests", 0)
            self._positions = {
                request_id: place
                for space in self.topics.get("spaces", {})
                for place, request_id in enumerate(self.queues.order(space), 1)
            }
        return self._positions

    def on_disconnected(self, why: str, retry_s: float, now: float) -> None:
        """Note that the link was lost, or could not be made."""
        self.link.retry_at = now + retry_s
        self.link.why = why
        if self.link.up or not self.link.since:
            self.link.up, self.link.since = False, now

    def on_connected(self, server: str, principal: str, now: float) -> None:
        """Note that the link is up."""
        self.link = Link(True, now, server=server, principal=principal)

    def frozen(self) -> "RelayModel":
        """A copy that later changes do not affect."""
        copy = RelayModel(
            versions=dict(self.versions),
            link=attrs.evolve(self.link),
            known=self.known,
            rates=self.rates.copy(),
            updated_at=self.updated_at,
            positions=dict(self.positions),
            positions_of=self._positions_of,
        )
        for topic, rows in self.topics.items():
            copy.topics[topic] = {key: attrs.evolve(view, model=copy) for key, view in rows.items()}
        return copy


def _line_number(key: str) -> int:
    return int(key) if key.isdigit() else 0


@attrs.define(eq=False)
class Rates:
    """Requests and seconds of audio in each of the last `HISTORY_S` seconds."""

    #: (second, requests, seconds of audio), oldest first; seconds without any are left out.
    _seconds: "deque[tuple[int, float, float]]" = attrs.field(factory=lambda: deque(maxlen=HISTORY_S))
    _totals: tuple[float, float] | None = None

    def begin(self, history: list[RowView], relay: RowView | None, now: float) -> None:
        """Start from the history that the relay reports."""
        self._totals = _totals(relay)
        if not history:
            return
        requests, audio = history[0].row.get("requests"), history[0].row.get("audio_s")
        if isinstance(requests, list) and isinstance(audio, list):
            self._seconds.clear()
            pairs = list(zip(requests, audio, strict=False))[-HISTORY_S:]
            for back, (count, seconds) in zip(range(len(pairs) - 1, -1, -1), pairs, strict=True):
                self._add(int(now) - back, _number(count), _number(seconds))

    def go_on(self, relay: RowView | None, now: float) -> None:
        """Add what the relay's counters have gained since the last call."""
        before, self._totals = self._totals, _totals(relay)
        if before is not None and self._totals is not None:
            self._add(int(now), *(max(0.0, new - old) for new, old in zip(self._totals, before, strict=True)))

    def _add(self, second: int, requests: float, audio_s: float) -> None:
        if self._seconds and self._seconds[-1][0] == second:
            _, known, known_s = self._seconds.pop()
            requests, audio_s = requests + known, audio_s + known_s
        if requests or audio_s:
            self._seconds.append((second, requests, audio_s))

    def last_minute(self, now: float) -> tuple[list[float], list[float]]:
        """Requests, and seconds of audio, in each of the last `HISTORY_S` seconds, oldest first."""
        requests, audio = [0.0] * HISTORY_S, [0.0] * HISTORY_S
        for second, count, seconds in self._seconds:
            place = HISTORY_S - 1 - (int(now) - second)
            if 0 <= place < HISTORY_S:
                requests[place], audio[place] = count, seconds
        return requests, audio

    def copy(self) -> "Rates":
        """A copy for a frozen screen."""
        return Rates(deque(self._seconds, HISTORY_S), self._totals)


def _totals(relay: RowView | None) -> tuple[float, float] | None:
    if relay is None:
        return None
    requests, audio_s = relay.number("requests_total"), relay.number("audio_s_total")
    return None if requests is None or audio_s is None else (requests, audio_s)


def _figure(value: Value) -> float | None:
    """The value if it is a finite number, else None."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def _number(value: Value) -> float:
    return float(_figure(value) or 0.0)
