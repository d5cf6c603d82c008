"""Which rows a table shows and in what order; work is kept between updates so that 10,000 rows stay cheap. No I/O."""

from collections.abc import Callable, Container, Iterable
from operator import attrgetter
from typing import Any

import attrs

from tui.model.relay_model import RowView
from tui.model.row_filter import Filter, SearchTooLong, limited_search

SortKey = Callable[[RowView], Any]


@attrs.frozen(eq=False)
class _Placed:
    view: RowView
    shown: bool
    key: Any


@attrs.define(eq=False)
class Order:
    """Filters and sorts the rows of a table; changed attributes take effect at the next `update`.

    Attributes:
        natural: the order while no column is chosen.
        chosen: the order by the chosen column, or None.
    """

    natural: SortKey
    chosen: SortKey | None = None
    reverse: bool = False
    filter: Filter = attrs.field(factory=Filter)
    _known: dict[str, _Placed] = attrs.field(factory=dict)
    _last: list[str] = attrs.field(factory=list)

    def begin_anew(self) -> None:
        """Forget the previous result, because the order or the filter has changed."""
        self._known.clear()

    def update(self, views: Iterable[RowView], moving: Container[str] = ()) -> list[RowView]:
        """The rows to show, in order. Only rows that changed are evaluated again.

        Args:
            views: all rows.
            moving: keys of rows whose place may change although the row itself has not, such as queued requests.
        """
        every = list(views)
        try:
            with limited_search():
                return self._update(every, moving)
        except SearchTooLong:
            self._give_up()
        return self._update(every, moving)

    def shows(self, view: RowView) -> bool:
        """Whether the filter lets a row through."""
        try:
            with limited_search():
                return self.filter.lets_through(view)
        except SearchTooLong:
            self._give_up()
        return True

    def _give_up(self) -> None:
        self.filter = self.filter.given_up()
        self.begin_anew()

    def _update(self, views: Iterable[RowView], moving: Container[str]) -> list[RowView]:
        before, now = self._known, dict[str, _Placed]()
        sort, lets_through = self.chosen or self.natural, self.filter.lets_through
        for view in views:
            key = view.key
            placed = before.get(key)
            if placed is None or placed.view is not view or key in moving:
                placed = _Placed(view, lets_through(view), _none_last(sort(view), self.reverse))
            now[key] = placed
        self._known = now
        # Sorting from the last order is quick, because it is nearly right, and keeps ties where they were.
        known = set(self._last)
        last = [placed for key in self._last if (placed := now.get(key)) is not None and placed.shown]
        last += [placed for key, placed in now.items() if placed.shown and key not in known]
        try:
            last.sort(key=_sort_key, reverse=self.reverse)
        except TypeError:  # a newer relay may send text where this one sends numbers
            last.sort(key=lambda placed: (placed.key[0], str(placed.key[1])), reverse=self.reverse)
        self._last = [placed.view.key for placed in last]
        return [placed.view for placed in last]


_sort_key = attrgetter("key")


def _none_last(key: Any, reverse: bool) -> tuple[bool, Any]:
    return ((key is None) is not reverse, key if key is not None else 0)
