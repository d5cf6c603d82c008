"""The queue of one space: which request is next, and the position of each. Pure."""

from collections.abc import Callable, Iterator
from itertools import chain, zip_longest
from typing import Generic, Protocol, TypeVar

import attrs


class Waiting(Protocol):
    """The attributes of a request that the queue uses."""

    request_id: str
    principal: str
    #: 0..9; a higher one is served first.
    priority: int
    #: Number in the order of arrival.
    ticket: int


WaitingT = TypeVar("WaitingT", bound=Waiting)
Lane = dict[str, WaitingT]


@attrs.define(eq=False)
class _Level(Generic[WaitingT]):
    """The requests of one priority.

    `requeued` is served before the lanes: requests whose attempt was lost, which keep their place. `lanes` holds one
    lane per principal, the one whose turn is next first; a lane is request id -> request, by ticket.
    """

    requeued: Lane[WaitingT] = attrs.field(factory=dict)
    lanes: dict[str, Lane[WaitingT]] = attrs.field(factory=dict)


@attrs.define(eq=False)
class FairQueue(Generic[WaitingT]):
    """A queue by priority; within a priority round-robin over principals, and FIFO within each (docs/design.md §7).

    With one principal and one priority it is plain FIFO.
    """

    _promoted: Lane[WaitingT] = attrs.field(factory=dict)
    _levels: dict[int, _Level[WaitingT]] = attrs.field(factory=dict)
    _members: Lane[WaitingT] = attrs.field(factory=dict)
    _per_principal: dict[str, int] = attrs.field(factory=dict)

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, item: WaitingT) -> bool:
        return item.request_id in self._members

    def count_for(self, principal: str) -> int:
        """Return the number of queued requests of `principal`."""
        return self._per_principal.get(principal, 0)

    def oldest_candidates(self) -> Iterator[WaitingT]:
        """Yield some requests, the oldest among them: their number grows with principals and priorities only."""
        yield from self._promoted.values()
        for level in self._levels.values():
            yield from level.requeued.values()
            for lane in level.lanes.values():
                yield next(iter(lane.values()))

    def push(self, item: WaitingT) -> None:
        """Queue `item` by its ticket, behind its principal's earlier requests."""
        self._count(item)
        lane = self._level(item).lanes.setdefault(item.principal, {})
        overtaken = bool(lane) and next(reversed(lane.values())).ticket > item.ticket
        lane[item.request_id] = item
        if overtaken:  # rare: its upload took longer than that of a later request
            level = self._level(item)
            level.lanes[item.principal] = dict(sorted(lane.items(), key=lambda pair: pair[1].ticket))

    def requeue(self, item: WaitingT) -> None:
        """Put `item` back where it was served from: before the lanes of its priority, by ticket."""
        self._count(item)
        level = self._level(item)
        level.requeued[item.request_id] = item
        level.requeued = dict(sorted(level.requeued.items(), key=lambda pair: pair[1].ticket))

    def promote(self, item: WaitingT) -> None:
        """Move `item` to the very front, before every priority; the request promoted last is first."""
        self.remove(item)
        self._count(item)
        self._promoted = {item.request_id: item, **self._promoted}

    def remove(self, item: WaitingT) -> None:
        """Remove `item`, wherever it is in the queue."""
        del self._members[item.request_id]
        left = self._per_principal[item.principal] - 1
        if left:
            self._per_principal[item.principal] = left
        else:
            del self._per_principal[item.principal]
        if self._promoted.pop(item.request_id, None) is not None:
            return
        level = self._levels[item.priority]
        if level.requeued.pop(item.request_id, None) is None:
            lane = level.lanes[item.principal]
            del lane[item.request_id]
            if not lane:
                del level.lanes[item.principal]
        if not level.requeued and not level.lanes:
            del self._levels[item.priority]

    def pop(self, may_run: Callable[[WaitingT], bool]) -> WaitingT | None:
        """Remove and return the next request for which `may_run` is true; the turn of its principal is then over.

        Only the head of each principal's lane is considered: what keeps it waiting also keeps those behind it.
        """
        for item in chain(self._promoted.values(), *(self._in_turn(level, 1) for level in self._by_priority())):
            if may_run(item):
                level = self._levels.get(item.priority)
                from_lane = level is not None and item.request_id in level.lanes.get(item.principal, ())
                self.remove(item)
                if from_lane and level is not None and item.principal in level.lanes:
                    level.lanes[item.principal] = level.lanes.pop(item.principal)  # it has its next turn last
                return item
        return None

    def __iter__(self) -> Iterator[WaitingT]:
        """Iterate over all requests, in the order in which they would be served now."""
        return chain(self._promoted.values(), *(self._in_turn(level) for level in self._by_priority()))

    def _by_priority(self) -> list[_Level[WaitingT]]:
        return [self._levels[priority] for priority in sorted(self._levels, reverse=True)]

    def _in_turn(self, level: _Level[WaitingT], rounds: int | None = None) -> Iterator[WaitingT]:
        yield from level.requeued.values()
        lanes = [lane.values() for lane in level.lanes.values()]
        for number, turn in enumerate(zip_longest(*lanes)):
            if number == rounds:
                return
            yield from (item for item in turn if item is not None)

    def _level(self, item: WaitingT) -> _Level[WaitingT]:
        return self._levels.setdefault(item.priority, _Level())

    def _count(self, item: WaitingT) -> None:
        self._members[item.request_id] = item
        self._per_principal[item.principal] = self._per_principal.get(item.principal, 0) + 1
