"""The filter line: a regular expression over what a row says; `!` in front shows the rows it does not match."""

import re
import warnings
from collections.abc import Callable

import attrs

from tui.model.relay_model import RowView


@attrs.frozen
class Filter:
    """What the operator typed.

    Attributes:
        text: as typed; empty lets every row through.
        fault: why it is no regular expression, or empty.
    """

    text: str = ""
    fault: str = ""
    inverted: bool = False
    _search: Callable[[str], object] | None = None

    @classmethod
    def of(cls, text: str) -> "Filter":
        """Read it. Capital letters in it must match as capitals; without any, case does not matter."""
        inverted = text.startswith("!")
        wanted = text.removeprefix("!")
        if not wanted:
            return cls(text)
        try:
            with warnings.catch_warnings():  # `[[` may mean something else some day
                warnings.simplefilter("ignore")
                letters = re.sub(r"\\.", "", wanted)  # `\S` is no capital that is looked for
                pattern = re.compile(wanted, 0 if letters != letters.lower() else re.IGNORECASE)
        except (re.error, OverflowError, RecursionError) as fault:
            return cls(text, fault=str(fault))
        return cls(text, "", inverted, pattern.search)

    def lets_through(self, view: RowView) -> bool:
        """Whether the row is shown."""
        return self._search is None or (self._search(said(view)) is None) is self.inverted


def said(view: RowView) -> str:
    """The words of a row, that a filter and a jump look at."""
    words = [view.key]
    for value in view.row.values():
        if isinstance(value, str):
            words.append(value)
        elif isinstance(value, list):
            words.extend(one for one in value if isinstance(one, str))
    if view.topic == "requests" and (worker := view.text("worker")):
        words.append(worker)
    return " ".join(words)
