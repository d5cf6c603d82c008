"""Cuts a long text into pieces that a speech model accepts, where a speaker would pause.

Boundaries are those of Unicode (UAX 29: sentences, words, grapheme clusters; UAX 14: where no Japanese line starts),
derived from the properties that the `regex` package knows, with stricter rules for abbreviations, initials, ordinals,
quoted speech and wrapped lines. The rules prefer too few sentence ends: a missed one only makes a piece longer, while a
wrong one puts a pause after "Dr.". `pysbd` and `uniseg` were considered: the first knows a fixed list of languages and
rewrites text, the second does not know abbreviations either.
"""

import functools
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import attrs

# Followed by a name or a number, rarely by the next sentence.
ABBREVIATIONS = (
    "Mr|Mrs|Ms|Mx|Dr|Drs|Dra|Prof|St|Ste|Mt|Ft|Gen|Col|Maj|Capt|Cmdr|Lt|Sgt|Rev|Hon|Gov|Sen|Rep|Pres|Sr|Sra|Srta|"
    "Mme|Mlle|Hr|Nr|bzw|ca|cf|vs|viz|approx|dept|est|fig|figs|vol|ed|eds|г|ул|пл|пр|пер|наб|кв|им|рис"
)
# Words in their own right, but abbreviations before a number: "No. 5", "Jan. 3", "pp. 4-7".
BEFORE_NUMBERS = "no|nos|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sep|Sept|Oct|Nov|Dec|pp|Art|Sec|Ch|chap|Ex|стр"
# May end a sentence, but before a lower-case letter they do not: at the end of a line nobody knows yet what follows.
BEFORE_MORE = "etc|al|approx|Inc|Ltd|Co|Corp|usw|usf|др"
#: Thai and Lao vowels that are written before the consonant they are spoken after.
LEADING_VOWELS = frozenset("เแโใไເແໂໃໄ")
#: How far a rule looks back or ahead, in characters; keeps the total time linear.
LOOK_CHARS = 40

#: The characters that end a line.
BREAKS = "\n\r\v\f\x85\u2028\u2029"
_MARK = r"[\p{SB=STerm}\p{SB=ATerm}…‥⋯]"
# Marks that close a quotation or bracket. „…“ and »…« close with a mark that opens elsewhere: then no letter follows.
_CLOSING = r"""(?:[\p{Pe}\p{Pf}"'*_]|\p{Pi}(?![\p{L}\p{N}])|[\u00a0\u202f\ ][»›](?![\p{L}\p{N}]))*+"""
_CASELESS = r"""[\p{Ps}\p{Pi}"']*\p{SB=OLetter}"""


@attrs.frozen
class _Patterns:
    """The compiled rules."""

    cluster: Any
    sentence: Any
    line: Any
    settled: Any
    clause: Any
    space: Any
    word: Any
    spoken: Any
    letter: Any
    wide: Any
    opening: Any
    no_break_before: Any
    continuation: Any
    caseless: Any
    lower: Any
    wrapped: Any
    abbreviation: Any
    before_number: Any
    before_more: Any
    number: Any
    description: Any


def _capitalised_too(words: str) -> str:
    """The alternatives, and those in lower case with a capital: "ул. Ленина", and at the beginning "Ул. Ленина"."""
    return "|".join(f"[{word[0]}{word[0].upper()}]{word[1:]}" for word in words.split("|"))


@functools.cache
def patterns() -> _Patterns:
    """The rules, compiled once they are needed: not everything that imports this cuts a text."""
    import regex

    def rule(pattern: str) -> Any:
        return regex.compile(pattern, regex.VERSION1)

    return _Patterns(
        cluster=rule(r"\X"),
        sentence=rule(rf"(?P<marks>(?:{_MARK}\p{{M}}*+)++)(?P<closing>{_CLOSING})(?P<gap>\s*+)"),
        line=rule(r"(?P<breaks>(?:\R[^\S\v\f\r\n\x85\u2028\u2029]*+)++)"),
        # Up to the character that settles it: a sentence and its line end, or an empty line does.
        settled=rule(rf"(?:(?P<marks>(?:{_MARK}\p{{M}}*+)++)|(?>\r\n|[{BREAKS}]))[^\S{BREAKS}]*+[{BREAKS}]"),
        clause=rule(
            rf"(?:[,;:](?={_CLOSING}(?:\s|{_CASELESS}))"
            r"|[\p{Terminal_Punctuation}--\p{Sentence_Terminal}--[,;:]](?!(?<=\p{N}.)\p{N})"
            r"|[—―⸺]++|(?<=\S\ )[-–]++(?=\s)"
            rf"|(?:[!?…‥⋯]++|\.{{2,}}+)(?={_CLOSING}\s)"
            rf"){_CLOSING}\s*+"
        ),
        space=rule(r"[\s\u200b]++"),
        word=rule(r"(?w)\b"),
        spoken=rule(r"[\p{L}\p{N}]"),
        letter=rule(r"\p{L}"),
        wide=rule(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}]"),
        opening=rule(r"[\p{Ps}\p{Pi}¿¡]\s*$"),
        no_break_before=rule(r"[\p{LB=CJ}\p{LB=NS}]"),
        continuation=rule(rf"[,;:，；：、､،؛]|{_MARK}"),
        caseless=rule(_CASELESS),
        lower=rule(rf"[^\p{{L}}]{{0,{LOOK_CHARS}}}\p{{Lower}}"),
        wrapped=rule(r"""[\p{Ps}\p{Pi}"']*+\p{Lower}"""),
        # A single letter is an initial or the end of "e.g."; one or two digits are an ordinal or a list's number.
        abbreviation=rule(
            rf"(?<![\p{{L}}\p{{M}}\p{{N}}])(?:(?!I$)\p{{L}}\p{{M}}*+|{_capitalised_too(ABBREVIATIONS)})$"
            r"|(?<![\p{L}\p{N}.,:/-])\p{Nd}{1,2}$"
        ),
        before_number=rule(rf"(?<![\p{{L}}\p{{M}}\p{{N}}])(?:{_capitalised_too(BEFORE_NUMBERS)})$"),
        before_more=rule(rf"(?<![\p{{L}}\p{{M}}\p{{N}}])(?:{_capitalised_too(BEFORE_MORE)})$"),
        number=rule(r"\p{N}"),
        description=rule(r"\s*+[(（][^)）]*+[)）]"),
    )


def is_sentence_end(text: str, match: Any) -> bool:
    """Whether these marks end a sentence, and are not within a number, a name, an abbreviation or quoted speech."""
    rules = patterns()
    marks, closing, gap, after = match["marks"], match["closing"], match["gap"], match.end()
    if rules.continuation.match(text, after):
        return False
    may_be_inside = all(mark in ".․﹒．…‥⋯" for mark in marks)
    if not gap:
        if may_be_inside or marks.isascii():  # 3.14, example.com, ?q=1; but ASCII marks in Chinese text end sentences
            if not rules.caseless.match(text, after):
                return False
        elif closing and text.startswith(("と", "って"), after):  # 「…。」と言った
            return False
    elif (may_be_inside or closing) and rules.lower.match(text, after):  # "Well... yes", "Really?" he asked
        return False
    if marks == "." and not closing:
        before = text[max(0, match.start() - LOOK_CHARS) : match.start()]
        if rules.abbreviation.search(before):
            return False
        if rules.before_number.search(before) and rules.number.match(text, after):
            return False
    return True


def is_line_end(text: str, match: Any) -> bool:
    """Whether a line ends here: one that continues in lower case was wrapped, unless an empty line precedes it."""
    return len(match["breaks"].splitlines()) > 1 or not patterns().wrapped.match(text, match.end())


def is_settled_end(text: str, match: Any) -> bool:
    """Whether a sentence and its line end here, or an empty line does, whatever follows."""
    if match["marks"] != ".":
        return True
    rules, before = patterns(), text[max(0, match.start() - LOOK_CHARS) : match.start()]
    numbered = rules.before_number.search(before)
    may_go_on = rules.abbreviation.search(before) or rules.before_more.search(before)
    return not may_go_on and (numbered is None or numbered[0].lower() == "no")


def _sentence_ends(text: str) -> Iterator[int]:
    rules = patterns()
    for match in rules.sentence.finditer(text):
        if is_sentence_end(text, match):
            yield match.end()
    for match in rules.line.finditer(text):
        if is_line_end(text, match):
            yield match.end()


@attrs.frozen
class _Text:
    """A text with the places where it may be cut. A place is a number of grapheme clusters, from 0 to `size`.

    Attributes:
        offsets: offset of each place in the text, in characters (`size` + 1 of them).
        content: for each place, the first cluster at or after it that is not white space.
        filled: for each place, the end of the last cluster before it that is not white space.
        spoken: for each place, the first cluster at or after it with a letter or digit; `size` if none follows.
        levels: lists of cuts in ascending order, each ending with `size`; from the best level to the worst.
    """

    text: str
    size: int
    offsets: Sequence[int]
    content: Sequence[int]
    filled: Sequence[int]
    spoken: Sequence[int]
    levels: Sequence[Sequence[int]]

    def piece(self, start: int, stop: int) -> str:
        """The text between two places, without surrounding white space."""
        return self.text[self.offsets[self.content[start]] : self.offsets[self.filled[stop]]]


def _next_where(hits: Sequence[bool]) -> list[int]:
    """For each place, the first hit at or after it, or the number of hits if none follows."""
    found = [len(hits)] * (len(hits) + 1)
    for place in range(len(hits) - 1, -1, -1):
        found[place] = place if hits[place] else found[place + 1]
    return found


def _read(text: str) -> _Text:
    rules = patterns()
    clusters: list[str] = rules.cluster.findall(text)
    size = len(clusters)
    offsets = list(accumulate(map(len, clusters), initial=0))
    places = {offset: place for place, offset in enumerate(offsets)}
    spoken = _next_where([bool(rules.spoken.search(cluster)) for cluster in clusters])

    def at_places(ends: Iterable[int]) -> set[int]:
        """Convert offsets to cuts; offsets within a grapheme cluster are left out."""
        return {places[end] for end in ends if end in places}

    def keep_words_whole(cuts: Collection[int]) -> list[int]:
        """Drop cuts that would separate marks from the words they belong to."""
        kept: list[int] = []
        start = 0
        for cut in sorted({*cuts, size} - {0}):
            if spoken[start] < cut:
                kept.append(cut)
            elif kept and (cut == size or not rules.opening.search(text, offsets[start], offsets[cut])):
                kept[-1] = cut
            start = cut
        return kept or [size]

    def may_cut(place: int) -> bool:
        return not (clusters[place - 1][0] in LEADING_VOWELS or rules.no_break_before.match(clusters[place]))

    inner = {place for place in range(1, size) if may_cut(place)}
    return _Text(
        text=text,
        size=size,
        offsets=offsets,
        content=_next_where([not cluster.isspace() for cluster in clusters]),
        filled=list(
            accumulate(range(size), lambda end, place: end if clusters[place].isspace() else place + 1, initial=0)
        ),
        spoken=spoken,
        levels=[
            keep_words_whole(at_places(_sentence_ends(text))),
            keep_words_whole(at_places(match.end() for match in rules.clause.finditer(text))),
            keep_words_whole(at_places(match.end() for match in rules.space.finditer(text))),
            keep_words_whole(at_places(match.start() for match in rules.word.finditer(text)) & inner),
            keep_words_whole(inner),
        ],
    )


def _reach(start: int, size: int, guess: int, fits: Callable[[int], bool]) -> int:
    """The farthest place up to which everything fits, at least one cluster; doubles, then halves, a guess."""
    good, bad = start + 1, size + 1
    probe = min(max(good, start + guess), size)
    while good + 1 < bad:
        if fits(probe):
            good = probe
        else:
            bad = max(probe, good)
        probe = min(size, 2 * good - start) if bad > size else (good + bad) // 2
    return good


def _best_cut(levels: Iterable[Sequence[int]], after: int, reach: int, fits: Callable[[int], bool]) -> int | None:
    """The last cut of the best level that has one after `after` and up to `reach`; None if no level has one."""
    for cuts in levels:
        first, at, step = bisect_right(cuts, after), bisect_right(cuts, reach) - 1, 1
        while at >= first:
            # Check again, because a tokenizer may need more tokens for less text.
            if cuts[at] == reach or fits(cuts[at]):
                return cuts[at]
            at -= step
            step *= 2
    return None


def cut_within(text: str, most_chars: int) -> int:
    """The best place to cut a text that is longer, and has no end of a sentence so early: after 1 to `most_chars`."""
    parts = _read(text)
    reach = max(1, bisect_right(parts.offsets, most_chars) - 1)
    if parts.spoken[max(0, reach - LOOK_CHARS)] >= reach:  # in a long run of blanks or marks, which belong together
        return parts.offsets[reach]
    cut = _best_cut(parts.levels[1:], parts.spoken[0], reach, lambda _stop: True) or reach
    return parts.offsets[cut]


def split(text: str, limit: int, measure: Callable[[str], int]) -> list[str]:
    """Split a text into pieces that fit, each as long as a good cut allows.

    The text is cut at ends of sentences and lines if one is within reach, else at clause marks, else at white space,
    else between words, else between grapheme clusters, which are never cut. Only white space at the cuts is lost.
    A "(description)" at the beginning stays whole, together with the text that follows it, if that fits.

    Args:
        text: any text; line breaks may be of any kind.
        limit: the largest size of a piece, in the unit of `measure`.
        measure: returns the size of a text, such as its number of tokens; should not decrease for longer texts. Called
            O(log n) times per piece, with texts at most about twice as long as the piece, and once with the whole text.

    Returns:
        the text itself if it fits; nothing if it is only white space; else pieces without surrounding white space. All
        fit, except a single grapheme cluster larger than the limit, which the caller must check for. A piece without
        a letter or digit occurs only if the text has none, or contains a run of marks larger than the limit.
    """
    if not text or text.isspace():
        return []
    whole = measure(text)
    if whole <= limit:
        return [text]
    parts = _read(text)
    description = patterns().description.match(text)
    after = bisect_right(parts.offsets, description.end() - 1) if description else 0
    pieces: list[str] = []
    start, guess = parts.content[0], parts.size * max(limit, 1) // max(whole, 1)
    while start < parts.size:

        def fits(stop: int, start: int = start) -> bool:
            return measure(parts.piece(start, stop)) <= limit

        reach = _reach(start, parts.size, guess, fits)
        stop = None
        if after > start:
            # Keep at least a word after the description; if that does not fit, cut it like any other text.
            stop = _best_cut(parts.levels[:-1], parts.spoken[after], reach, fits)
        stop = stop or _best_cut(parts.levels, parts.spoken[start], reach, fits) or reach
        pieces.append(parts.piece(start, stop))
        guess = reach - start
        start = parts.content[stop]
    return pieces
