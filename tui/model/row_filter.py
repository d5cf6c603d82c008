"""The filter line: a regular expression matched against a row; with `!` in front it hides the rows that match."""

import re
import warnings
from collections.abc import Callable

import attrs

from tui.model.relay_model import RowView


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
