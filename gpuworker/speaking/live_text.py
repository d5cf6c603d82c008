"""Cuts a text into pieces to be spoken while it is still being written.

The pieces are those of the whole text, however it comes: each decision is made once all that it looks at is there, and
looks at nothing more. An end counts when the next letter but one, or `LOOK_CHARS` characters, stand behind it; at the
end of a line, or before an empty line, it counts at once.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from typing import Any

import attrs

from gpuworker.speaking.text_split import (
    BREAKS,
    LOOK_CHARS,
    cut_within,
    is_line_end,
    is_sentence_end,
    is_settled_end,
    patterns,
)
from protocol.speakable import speakable

#: Shortest pieces, in Latin letters; a Chinese, Japanese or Korean character takes about as long to speak as 2.5 of
#: them. The first is short, so that it is heard soon; later ones are spoken while others are heard.
FIRST_LETTERS = 10.0
LATER_LETTERS = 20.0
WIDE_LETTERS = 2.5
#: Longest piece: a long sentence, some 20 s of speech. Text without ends is cut here at the latest.
MOST_CHARS = 300
#: A long text is looked at in parts of this size.
STEP_CHARS = 4_096

_IsEnd = Callable[[str, Any], bool]


@attrs.frozen
class Piece:
    """A piece to speak, and how many characters of the whole text end with it."""

    text: str
    text_end: int


def _is_clause_end(view: str, match: Any) -> bool:
    found = patterns().clause.match(view, match.start())
    return found is not None and bool(found.end() == match.end())


class LiveText:
    """A text that grows.

    Args:
        most_chars: the longest piece.
    """

    def __init__(self, most_chars: int = MOST_CHARS) -> None:
        self._most = most_chars
        #: What has not been cut off yet, and the number of characters before it.
        self._text = ""
        self._before = 0
        self._is_first = True

    def add(self, text: str) -> Iterator[Piece]:
        """Append to the text; yields the pieces that are complete now."""
        for start in range(0, len(text), STEP_CHARS):
            self._text += text[start : start + STEP_CHARS]
            yield from self._pieces(ended=False)

    def finish(self) -> Iterator[Piece]:
        """Yield the last pieces; the text has ended."""
        yield from self._pieces(ended=True)

    def _pieces(self, *, ended: bool) -> Iterator[Piece]:
        while cut := self._cut(ended):
            head, self._text = self._text[:cut], self._text[cut:]
            end = self._before + len(head.rstrip())
            self._before += cut
            is_all = ended and self._is_first and not self._text
            if speakable(head, symbols=False) or (is_all and speakable(head)):
                self._is_first = False
                yield Piece(head.strip(), end)

    def _cut(self, ended: bool) -> int:
        """Where the next piece ends; 0 if that is not known yet."""
        text = self._text
        for match, is_end in self._candidates():
            end: int = match.end()
            if end > self._most:
                break
            if is_end is is_settled_end:
                if speakable(text[:end], symbols=False) and is_end(text, match):
                    return end
                continue
            looked = self._looked(end)
            if looked > len(text) and not ended:
                return 0
            if self._is_long(text[:end]) and is_end(text[:looked], match):
                return end
        if len(text) >= self._most + LOOK_CHARS or (ended and len(text) > self._most):
            return cut_within(text[: self._most + LOOK_CHARS], self._most)
        return len(text) if ended else 0

    def _candidates(self) -> Iterable[tuple[Any, _IsEnd]]:
        """The places that may be ends, in order."""
        rules = patterns()
        kinds: list[tuple[Any, _IsEnd]] = [(rules.sentence, is_sentence_end), (rules.line, is_line_end)]
        if any(each in self._text for each in BREAKS):
            kinds.insert(0, (rules.settled, is_settled_end))  # of two that end at the same place it comes first
        if self._is_first:
            kinds.append((rules.clause, _is_clause_end))
        found = [zip(rule.finditer(self._text), repeat(is_end), strict=False) for rule, is_end in kinds]
        return heapq.merge(*found, key=lambda candidate: candidate[0].end())

    def _looked(self, end: int) -> int:
        """How far the decision about an end looks."""
        letter = patterns().letter.search(self._text, end, end + LOOK_CHARS)
        return end + LOOK_CHARS if letter is None else letter.end() + 1

    def _is_long(self, head: str) -> bool:
        wide = len(patterns().wide.findall(head))
        letters = len(head.strip()) + wide * (WIDE_LETTERS - 1)
        return letters >= (FIRST_LETTERS if self._is_first else LATER_LETTERS) and speakable(head, symbols=False)


def pieces_of(texts: Iterable[str], most_chars: int = MOST_CHARS) -> Iterator[Piece]:
    """The pieces of a text that comes in parts, each as soon as it is complete."""
    live = LiveText(most_chars)
    for text in texts:
        yield from live.add(text)
    yield from live.finish()
