"""What an operator's `watch` is told: one snapshot, then what changed, coalesced, at the speed of its terminal."""

from collections.abc import Callable

import attrs
import trio

from protocol.errors import LinkError
from protocol.messages import Delta, Snapshot
from relayd.client_link import ClientLink
from relayd.relay import Relay
from relayd.rows import TOPICS, Row, client_row, pages, relay_row, request_row, space_row, worker_row

#: DESIGN §5: deltas at most 4 times a second.
DELTA_INTERVAL_S = 0.25
#: With more than this waiting for a slow terminal, pages and deltas are put off; they only grow older, not more.
MAX_PENDING_BYTES = 64 * 1024
#: Ids in one `gone` of a delta: an array of the wire holds 1,024.
MAX_GONE = 1_000

_ROWS: dict[str, Callable[[Relay, str], Row | None]] = {
    "relay": lambda relay, _key: relay_row(relay),
    "spaces": space_row,
    "workers": worker_row,
    "requests": request_row,
    "clients": client_row,
}
Touched = set[tuple[str, str]]


@attrs.define(eq=False)
class Watching:
    """One operator's watch; `serve` is its task, and `begin` starts it over with other topics."""

    client: ClientLink
    relay: Relay
    _topics: frozenset[str] = frozenset()
    #: Rows to be told anew: (topic, key).
    _touched: Touched = attrs.field(factory=set)
    _begun: trio.Event = attrs.field(factory=trio.Event)
    _round: int = 0

    def touch(self, topic: str, key: str) -> None:
        """A row may look otherwise now."""
        if topic in self._topics:
            self._touched.add((topic, key))

    def begin(self, topics: list[str]) -> None:
        """Tell everything of these topics (none: of all), then what changes."""
        self._topics = frozenset(topics or TOPICS) & frozenset(TOPICS)
        self._round += 1
        self._begun.set()

    async def serve(self) -> None:
        """Send the snapshot asked for last, then deltas, until cancelled or the link is gone."""
        told = 0
        try:
            while True:
                await self._begun.wait()
                if told != self._round:
                    told = self._round
                    self._touched.clear()
                    await self._send_snapshot()
                await trio.sleep(DELTA_INTERVAL_S)
                if self._touched and told == self._round:
                    touched, self._touched = self._touched, set()
                    await self._send_delta(touched)
        except LinkError:
            return

    async def _send_snapshot(self) -> None:
        """All rows, in pages; what changes meanwhile is touched, and told by the next delta."""
        keys = [(topic, key) for topic in TOPICS if topic in self._topics for key in self._keys(topic)]
        rows = [{"": topic, **row} for topic, key in keys if (row := _ROWS[topic](self.relay, key)) is not None]
        # One page carries rows of several topics; each goes back to its own.
        for page, more in pages(rows):
            data: dict[str, list[Row]] = {topic: [] for topic in sorted(self._topics)}
            for row in page:
                data[row.pop("")].append(row)
            self.client.send(Snapshot(data=data, more=more))
            await self.client.link.drained(MAX_PENDING_BYTES)

    def _keys(self, topic: str) -> list[str]:
        relay = self.relay
        return {
            "relay": ["relay"],
            "spaces": sorted(relay.spaces),
            "workers": sorted(relay.scheduler.workers),
            "requests": list(relay.requests),
            "clients": list(relay.clients),
        }[topic]

    async def _send_delta(self, touched: Touched) -> None:
        if "relay" in self._topics:
            touched.add(("relay", "relay"))
        rows: list[Row] = []
        gone: dict[str, list[str]] = {}
        for topic, key in sorted(touched):
            row = _ROWS[topic](self.relay, key)
            if row is None:
                gone.setdefault(topic, []).append(key)
            else:
                rows.append({"": topic, **row})
        for page, _more in pages(rows):
            data: dict[str, list[Row]] = {}
            for row in page:
                data.setdefault(row.pop(""), []).append(row)
            if data:
                self.client.send(Delta(data=data))
                await self.client.link.drained(MAX_PENDING_BYTES)
        for topic, keys in gone.items():
            for first in range(0, len(keys), MAX_GONE):
                self.client.send(Delta(gone={topic: keys[first : first + MAX_GONE]}))
                await self.client.link.drained(MAX_PENDING_BYTES)
