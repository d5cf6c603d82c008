"""What an operator sees: one snapshot of everything, then what changes, put together."""

from collections import deque
from collections.abc import Callable
from typing import Self

import trio

from protocol.fields import Value
from protocol.messages import Delta, Snapshot

Row = dict[str, Value]

#: Which field of a topic's rows tells them apart; `id` in topics not listed.
ROW_KEYS = {
    "relay": "name",
    "spaces": "name",
    "workers": "worker_id",
    "requests": "request_id",
    "clients": "connection_id",
}
#: Deltas not taken yet; with more, one snapshot of the state takes their place. 15 s at the relay's 4 a second.
MAX_UNREAD = 60


class Watch:
    """Snapshots and deltas; made by `Relay.watch`.

    `async for change in watch` gives a whole `Snapshot` first, and another after each reconnect, each joined from its
    pages; `Delta`s between them. A reader that falls behind gets a fresh snapshot in place of the deltas it missed.

    Attributes:
        state: topic -> row key -> row, as of the last change taken.
    """

    def __init__(self) -> None:
        self.state: dict[str, dict[str, Row]] = {}
        self._latest: dict[str, dict[str, Row]] = {}
        self._pages: dict[str, list[Row]] = {}
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
        return change

    # -- for the relay's reader ------------------------------------------------------------------------------

    def begin(self) -> None:
        """A new link: pages of the old one that miss their rest are void."""
        self._pages = {}

    def take(self, message: Snapshot | Delta) -> None:
        """Take a page of a snapshot, or a delta."""
        if isinstance(message, Snapshot):
            for topic, rows in message.data.items():
                self._pages.setdefault(topic, []).extend(rows if isinstance(rows, list) else [rows])
            if message.more:
                return
            message, self._pages = Snapshot(data=dict(self._pages)), {}
            self._unread.clear()  # it tells all that they told
        self._latest = _put(message, self._latest)
        self._unread.append(message)
        if len(self._unread) > MAX_UNREAD:
            self._unread.clear()
            self._unread.append(Snapshot(data={topic: list(rows.values()) for topic, rows in self._latest.items()}))
        self._changed.set()

    def fail(self, fault: Callable[[], Exception]) -> None:
        """Nothing more will come."""
        self._fault = self._fault or fault
        self._changed.set()


def _put(change: Snapshot | Delta, state: dict[str, dict[str, Row]]) -> dict[str, dict[str, Row]]:
    """The state after `change`. Rows are replaced whole."""
    if isinstance(change, Snapshot):
        state = {}
    for topic, rows in change.data.items():
        key = ROW_KEYS.get(topic, "id")
        known = state.setdefault(topic, {})
        for row in rows if isinstance(rows, list) else [rows]:
            known[str(row.get(key, ""))] = row
    if isinstance(change, Delta):
        for topic, gone in change.gone.items():
            for name in gone:
                state.get(topic, {}).pop(str(name), None)
    return state
