"""The filter line: a regular expression matched against a row; with `!` in front it hides the rows that match."""

import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import attrs

from tui.model.relay_model import RowView

#: CPU time for one search of all rows. 10,000 rows take a tenth of it; an expression that backtracks takes for ever.
MAX_SEARCH_S = 1.0


class SearchTooLong(Exception):
    """A search was given up."""


@contextmanager
def limited_search() -> Iterator[None]:
    """Give up a search that takes too long, which nothing else can: `re` holds the GIL, but heeds signals.

    Raises:
        SearchTooLong: after `MAX_SEARCH_S` of CPU time.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread hears signals
        return

    def too_long(_number: int, _frame: object) -> None:
        raise SearchTooLong

    before = signal.signal(signal.SIGVTALRM, too_long)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SEARCH_S)
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@attrs.frozen
class Filter:
    """What the operator typed.

    Attributes:
        text: as typed; an empty filter matches every row.
        fault: why it is not a valid regular expression, or empty.
    """

    text: str = ""
    fault: str = ""
    inverted: bool = False
    _search: Callable[[str], object] | None = None

    @classmethod
    def of(cls, text: str) -> "Filter":
        """Parse a filter. It ignores case unless it contains a capital letter."""
        inverted = text.startswith("!")
        wanted = text.removeprefix("!")
        if not wanted:
            return cls(text)
        try:
            with warnings.catch_warnings():  # `[[` may get another meaning in a later Python
                warnings.simplefilter("ignore")
                letters = re.sub(r"\\.", "", wanted)  # the capital in `\S` does not count
                pattern = re.compile(wanted, 0 if letters != letters.lower() else re.IGNORECASE)
        except (re.error, OverflowError, RecursionError) as fault:
            return cls(text, fault=str(fault))
        return cls(text, "", inverted, pattern.search)

    def given_up(self) -> "Filter":
        """This filter, after a search that took too long: it hides nothing."""
        return Filter(self.text, "takes too long on these rows; use a simpler expression")

    def lets_through(self, view: RowView) -> bool:
        """Whether the row passes the filter."""
        return self._search is None or (self._search(searchable_text(view)) is None) is self.inverted


def searchable_text(view: RowView) -> str:
    """The text of a row that filters and jumps search."""
    parts = [view.key]
    for value in view.row.values():
        if isinstance(value, str):
            parts.append(value)
        elif isinstance(value, list):
            parts.extend(one for one in value if isinstance(one, str))
    if view.topic == "requests" and (worker := view.text("worker")):
        parts.append(worker)
    return " ".join(parts)
