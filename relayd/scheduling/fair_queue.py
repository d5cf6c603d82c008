"""The queue of one space: which request is next, and the position of each. Pure."""

from bisect import bisect_left, insort
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


@attrs.define(eq=False)
class _Lane(Generic[WaitingT]):
    """Requests by ticket. The sorted tickets tell how many stand before one without walking the lane."""

    _items: dict[str, WaitingT] = attrs.field(factory=dict)
    _tickets: list[int] = attrs.field(factory=list)

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[WaitingT]:
        return iter(self._items.values())

    def __contains__(self, item: WaitingT) -> bool:
        return item.request_id in self._items

    def add(self, item: WaitingT) -> None:
        """Insert `item` at its ticket's place."""
        overtaken = bool(self._tickets) and self._tickets[-1] > item.ticket
        insort(self._tickets, item.ticket)
        self._items[item.request_id] = item
        if overtaken:  # rare: an upload that took longer than a later one's, or a lost attempt
            self._items = dict(sorted(self._items.items(), key=lambda pair: pair[1].ticket))

    def remove(self, item: WaitingT) -> None:
        """Remove `item`."""
        del self._items[item.request_id]
        del self._tickets[bisect_left(self._tickets, item.ticket)]

    def index(self, item: WaitingT) -> int:
        """How many stand before `item`."""
        return bisect_left(self._tickets, item.ticket)


@attrs.define(eq=False)
class _Level(Generic[WaitingT]):
    """One priority.

    `requeued` is served before the lanes: requests whose attempt was lost, which keep their place. `lanes` holds one
    lane a principal, in order of turn.
    """

    requeued: _Lane[WaitingT] = attrs.field(factory=_Lane)
    lanes: dict[str, _Lane[WaitingT]] = attrs.field(factory=dict)

    def __len__(self) -> int:
        return len(self.requeued) + sum(map(len, self.lanes.values()))


@attrs.define(eq=False)
class FairQueue(Generic[WaitingT]):
    """A queue by priority; within a priority round-robin over principals, and FIFO within each (docs/design.md §7).

    With one principal and one priority it is plain FIFO.
    """

    _promoted: dict[str, WaitingT] = attrs.field(factory=dict)
    _levels: dict[int, _Level[WaitingT]] = attrs.field(factory=dict)
    _members: dict[str, WaitingT] = attrs.field(factory=dict)
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
            yield from level.requeued
            for lane in level.lanes.values():
                yield next(iter(lane))

    def push(self, item: WaitingT) -> None:
        """Queue `item` by its ticket, behind its principal's earlier requests."""
        self._count(item)
        self._level(item).lanes.setdefault(item.principal, _Lane()).add(item)

    def requeue(self, item: WaitingT) -> None:
        """Put `item` back where it was served from: before the lanes of its priority, by ticket."""
        self._count(item)
        self._level(item).requeued.add(item)

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
        if item in level.requeued:
            level.requeued.remove(item)
        else:
            lane = level.lanes[item.principal]
            lane.remove(item)
            if not lane:
                del level.lanes[item.principal]
        if not level:
            del self._levels[item.priority]

    def pop(self, may_run: Callable[[WaitingT], bool]) -> WaitingT | None:
        """Remove and return the next request for which `may_run` is true; the turn of its principal is then over.

        Only the head of each principal's lane is considered: what keeps it waiting also keeps those behind it.
        """
        for item in chain(self._promoted.values(), *(self._in_turn(level, 1) for level in self._by_priority())):
            if may_run(item):
                if item.request_id not in self._promoted:
                    level = self._levels[item.priority]
                    if item not in level.requeued:
                        level.lanes[item.principal] = level.lanes.pop(item.principal)  # it has its next turn last
                self.remove(item)
                return item
        return None

    def __iter__(self) -> Iterator[WaitingT]:
        """Iterate over all requests, in the order in which they would be served now."""
        return chain(self._promoted.values(), *(self._in_turn(level) for level in self._by_priority()))

    def position(self, item: WaitingT) -> int:
        """How many are served before `item` as things stand: its index in `iter(self)`.

        The cost grows with the number of principals and of promoted requests, not with the length of the queue.
        """
        if item.request_id in self._promoted:
            return list(self._promoted).index(item.request_id)
        higher = sum(len(level) for priority, level in self._levels.items() if priority > item.priority)
        level, before = self._levels[item.priority], len(self._promoted) + higher
        if item in level.requeued:
            return before + level.requeued.index(item)
        turn = level.lanes[item.principal].index(item)
        before += len(level.requeued) + turn
        rounds = turn + 1  # the lanes before its own have had their turn of this round, those behind it have not
        for principal, lane in level.lanes.items():
            if principal == item.principal:
                rounds = turn
            else:
                before += min(len(lane), rounds)
        return before

    def _by_priority(self) -> list[_Level[WaitingT]]:
        return [self._levels[priority] for priority in sorted(self._levels, reverse=True)]

    def _in_turn(self, level: _Level[WaitingT], rounds: int | None = None) -> Iterator[WaitingT]:
        yield from level.requeued
        for number, turn in enumerate(zip_longest(*level.lanes.values())):
            if number == rounds:
                return
            yield from (item for item in turn if item is not None)

    def _level(self, item: WaitingT) -> _Level[WaitingT]:
        return self._levels.setdefault(item.priority, _Level())

    def _count(self, item: WaitingT) -> None:
        self._members[item.request_id] = item
        self._per_principal[item.principal] = self._per_principal.get(item.principal, 0) + 1
