"""Reconstructs the order of every space's queue from the changes that a `watch` receives. Pure.

The relay does not send a request's row again just because requests ahead of it have left: with 10,000 in a queue, each
start would change every row. It sends rows that entered, left or changed places among each other; the rest follows.
"""

from bisect import bisect_right
from collections.abc import Iterable
from typing import Any

from protocol.wire.messages import Delta, Snapshot

Row = dict[str, Any]


class QueueOrder:
    """The order of every queue. Apply every change of one watch, in order, and its positions are exact."""

    def __init__(self) -> None:
        self._orders: dict[str, list[str]] = {}
        self._space_of: dict[str, str] = {}
        #: Space -> request id -> position; computed when needed.
        self._positions: dict[str, dict[str, int]] = {}

    def apply(self, change: Snapshot | Delta) -> None:
        """Apply a whole snapshot, or a whole round of changes (with its pages joined)."""
        if isinstance(change, Snapshot):
            self._orders, self._space_of, self._positions = {}, {}, {}
        sent: list[Row] = change.data.get("requests", [])
        rows = [row for row in sent if isinstance(row.get("request_id"), str) and isinstance(row.get("space", ""), str)]
        gone = change.gone.get("requests", []) if isinstance(change, Delta) else ()
        self._remove([*(row.get("request_id", "") for row in rows), *gone])
        placed = [row for row in rows if isinstance(row.get("position"), int)]
        for row in sorted(placed, key=lambda row: int(row["position"])):
            space, request_id = row.get("space", ""), row.get("request_id", "")
            self._orders.setdefault(space, []).insert(row["position"] - 1, request_id)
            self._space_of[request_id] = space
            self._positions.pop(space, None)
        # It was sent with a place that it has lost since; the places of the requests behind it were counted with it.
        self._remove(row.get("request_id", "") for row in placed if row.get("state") != "queued")

    def _remove(self, request_ids: Iterable[str]) -> None:
        leaving: dict[str, set[str]] = {}
        for request_id in request_ids:
            space = self._space_of.pop(request_id, None)
            if space is not None:
                leaving.setdefault(space, set()).add(request_id)
        for space, ids in leaving.items():
            self._positions.pop(space, None)
            left = [request_id for request_id in self._orders[space] if request_id not in ids]
            if left:
                self._orders[space] = left
            else:
                del self._orders[space]

    def order(self, space: str) -> list[str]:
        """Request ids in the order in which the space will serve them, as of now."""
        return list(self._orders.get(space, ()))

    def position(self, request_id: str) -> int | None:
        """The place of a request in its space, from 1; None if it is not queued."""
        space = self._space_of.get(request_id)
        if space is None:
            return None
        if space not in self._positions:
            self._positions[space] = {each: number for number, each in enumerate(self._orders[space], 1)}
        return self._positions[space][request_id]


def rows_to_send(known: Iterable[str], order: list[str], again: set[str]) -> set[str]:
    """The rows to send to bring a reader from an old order to the current one. The relay's counterpart of `QueueOrder`.

    Args:
        known: the order that the reader has.
        order: the current order.
        again: ids that are sent in any case; a reader takes them out and inserts them at their positions.

    Returns:
        other ids of `order` that must be sent: those new in it, and those that have overtaken others. Ids only in
        `known` must be reported (as gone) in the same round.
    """
    now = set(order) - again
    kept = [each for each in known if each in now]
    fresh = now.difference(kept)
    rest = [each for each in order if each in now and each not in fresh] if fresh or again else order
    if rest == kept:
        return fresh
    # The longest run of the old order that is still in order stays; the others have moved.
    place = {each: number for number, each in enumerate(kept)}
    return fresh | set(rest) - _longest_rising(rest, place)


def _longest_rising(rest: list[str], place: dict[str, int]) -> set[str]:
    """The largest set of ids in `rest` whose places increase (patience sorting)."""
    tops: list[int] = []  # the lowest place that a run of each length can end with
    ends: list[int] = []  # the index in rest of that end
    before: list[int] = []  # index in rest -> index of its predecessor in its run
    for index, each in enumerate(rest):
        at = bisect_right(tops, place[each])
        before.append(ends[at - 1] if at else -1)
        if at == len(tops):
            tops.append(place[each])
            ends.append(index)
        else:
            tops[at], ends[at] = place[each], index
    run: set[str] = set()
    index = ends[-1] if ends else -1
    while index >= 0:
        run.add(rest[index])
        index = before[index]
    return run
