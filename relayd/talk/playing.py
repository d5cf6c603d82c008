"""What was heard of a spoken text: from samples that were played to characters. Pure."""

from bisect import bisect_right
from collections.abc import Sequence

import attrs

#: From here on come the scripts that are written without spaces between words.
_FIRST_IDEOGRAPH = "\u2e80"


@attrs.frozen
class Mark:
    """The speech up to the sample `sample` has spoken the text up to the character `text_end`."""

    text_end: int
    sample: int


def played_chars(content: str, marks: Sequence[Mark], samples: int) -> int:
    """Return how many characters of `content` were heard when `samples` of its speech were played.

    Within a piece between two marks, characters take equally long. A word that was not heard to its end was not heard.
    """
    at = bisect_right(marks, samples, key=lambda mark: mark.sample)
    before = marks[at - 1] if at else Mark(0, 0)
    if at == len(marks):
        end = before.text_end
    else:
        after = marks[at]
        played = (samples - before.sample) / (after.sample - before.sample)
        end = before.text_end + int((after.text_end - before.text_end) * played)
    return max(min(before.text_end, len(content)), last_boundary(content, min(end, len(content))))


def last_boundary(content: str, end: int) -> int:
    """Return the last place up to `end` where a word of `content` ends, or may be cut."""
    if end >= len(content):
        return len(content)
    while end > 0 and not _may_cut(content[end - 1], content[end]):
        end -= 1
    return end


def _may_cut(before: str, after: str) -> bool:
    return before.isspace() or after.isspace() or max(before, after) >= _FIRST_IDEOGRAPH
