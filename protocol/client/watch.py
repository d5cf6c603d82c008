"""What an operator watches: one snapshot of everything, then the changes, applied to a state."""

from collections import deque
from collections.abc import Callable
from typing import Self

import trio

from protocol.client.queue_order import QueueOrder
from protocol.wire.messages import Delta, Snapshot
from protocol.wire.validators import Value

Row = dict[str, Value]

#: The key field of a topic's rows; `id` for topics not listed.
ROW_KEYS = {
    "relay": "name",
    "spaces": "name",
    "workers": "worker_id",
    "requests": "request_id",
    "talks": "talk_id",
    "clients": "connection_id",
    "history": "name",
    "log": "id",
    "audit": "id",
}
#: Values that are ages when they are sent, and keep growing without being sent again: topic -> key -> the
#: states in which they do; None: always. A nil value does not grow.
COUNTS_ON: dict[str, dict[str, frozenset[str] | None]] = {
    "relay": {"uptime_s": None},
    "spaces": {"oldest_wait_s": None},
    "workers": {"last_seen_s": None},
    "requests": {
        "age_s": frozenset({"uploading", "queued", "running"}),
        "queued_s": frozenset({"queued"}),
        "run_s": frozenset({"running"}),
        "ended_s": None,
    },
    "talks": {"reply_s": None, "said_s": None},
    "clients": {"connected_s": None},
}
#: Deltas not read yet; beyond this, one snapshot of the state replaces them. 15 s at the relay's 4 a second.
MAX_UNREAD = 60
#: Rows of `log` and of `audit` that are kept; the relay never reports them as `gone`.
MAX_KEPT = 5_000
#: This many more are allowed before the oldest are dropped, so that not every new line has to sort them.
SLACK = 500


def value_now(topic: str, row: Row, key: str, elapsed_s: float) -> Value:
    """A value of a row `elapsed_s` after the row was received: ages have grown, other values are unchanged."""
    value = row.get(key)
    states = COUNTS_ON.get(topic, {}).get(key, frozenset())
    if not isinstance(value, int | float) or (states is not None and str(row.get("state")) not in states):
        return value
    return value + elapsed_s


class Watch:
    """Snapshots and deltas; made by `RelayClient.watch`.

    `async for change in watch` yields a whole `Snapshot` first, and another after each reconnect; then one `Delta` for
    each round of changes. The pages of both are joined. A reader that falls behind gets a new snapshot instead of the
    deltas that it missed.

    Attributes:
        state: topic -> row key -> row, as of the last change read. The `position` in a row dates from when it was sent.
        queues: the order of every queue, as of the last change read.
    """

    def __init__(self) -> None:
        self.state: dict[str, dict[str, Row]] = {}
        self.queues = QueueOrder()
        self._latest: dict[str, dict[str, Row]] = {}
        self._latest_queues = QueueOrder()
        self._pages: dict[str, list[Row]] = {}
        self._gone: dict[str, list[str]] = {}
        self._unread: deque[Snapshot | Delta] = deque()
        self._changed = trio.Event()
        self._fault: Callable[[], Exception] | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Snapshot | Delta:
        await trio.lowlevel.checkpoint()
        while not self._unread:
            if self._fault is not None:
                raise self._fault()
            self._changed = trio.Event()
            await self._changed.wait()
        change = self._unread.popleft()
        self.state = _put(change, self.state)
        self.queues.apply(change)
        return change

    # -- for the relay's reader ------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start on a new link: incomplete pages of the old one are void."""
        self._pages, self._gone = {}, {}

    def on_page(self, message: Snapshot | Delta) -> None:
        """Add a page of a snapshot or a delta."""
        for topic, rows in message.data.items():
            self._pages.setdefault(topic, []).extend(rows if isinstance(rows, list) else [rows])
        if isinstance(message, Delta):
            for topic, keys in message.gone.items():
                self._gone.setdefault(topic, []).extend(keys if isinstance(keys, list) else [keys])
        if message.more:
            return
        pages, gone = self._pages, self._gone
        self._pages, self._gone = {}, {}
        change: Snapshot | Delta
        if isinstance(message, Snapshot):
            change = Snapshot(data=dict(pages))
            self._unread.clear()  # the snapshot contains all of it
        else:
            change = Delta(data=dict(pages), gone=dict(gone))
        self._latest = _put(change, self._latest)
        self._latest_queues.apply(change)
        self._unread.append(change)
        if len(self._unread) > MAX_UNREAD:
            self._unread.clear()
            self._unread.append(Snapshot(data={topic: self._rows(topic) for topic in self._latest}))
        self._changed.set()

    def _rows(self, topic: str) -> list[Row]:
        rows = list(self._latest[topic].values())
        if topic != "requests":
            return rows
        return [row | {"position": self._latest_queues.position(row["request_id"])} for row in rows]

    def fail(self, fault: Callable[[], Exception]) -> None:
        """End the watch."""
        self._fault = self._fault or fault
        self._changed.set()


def _put(change: Snapshot | Delta, state: dict[str, dict[str, Row]]) -> dict[str, dict[str, Row]]:
    """Apply `change`; rows are replaced as a whole."""
    if isinstance(change, Snapshot):
        state = {}
    for topic, rows in change.data.items():
        key = ROW_KEYS.get(topic, "id")
        known = state.setdefault(topic, {})
        for row in rows if isinstance(rows, list) else [rows]:
            known[str(row.get(key, ""))] = row
        if topic in ("log", "audit") and len(known) > MAX_KEPT + SLACK:
            for oldest in sorted(known, key=int)[:-MAX_KEPT]:
                del known[oldest]
    if isinstance(change, Delta):
        for topic, gone in change.gone.items():
            for name in gone:
                state.get(topic, {}).pop(str(name), None)
    return state
