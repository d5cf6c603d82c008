"""Keeps what the terminal shows and what it is to show, and writes the difference between the two.

Textual 8.2 repaints whole widgets, a screen switch or a dialog repaints everything two or three times, and each piece
of text gets a colour and a reset of its own: 12 to 125 KB for one key, which takes 18 s on a line of 4 KB/s. Here
updates are painted into cells. As in ncurses, only cells that differ are written, with the shortest way to get there:
about a tenth of the bytes.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

from rich.cells import cell_len
from rich.color import Color, ColorSystem
from rich.segment import Segment
from rich.style import Style
from textual._compositor import ChopsUpdate, CompositorUpdate, LayoutUpdate

#: Where the terminal may show anything: no colours, all cells blank.
CLEAR = "\x1b[0m\x1b[H\x1b[2J"
RESET = "\x1b[0m"
ERASE_REST = "\x1b[K"
#: Cells that have not changed are written rather than jumped over while that is no longer than the jump.
MAX_GAP = 3
#: Styles whose codes are kept. A screen has a few dozen.
MAX_PENS = 2_000
#: Attributes of a style, with the codes that turn them on and off.
_ATTRIBUTES = {
    "bold": ("1", "22"),
    "dim": ("2", "22"),
    "italic": ("3", "23"),
    "underline": ("4", "24"),
    "blink": ("5", "25"),
    "reverse": ("7", "27"),
    "strike": ("9", "29"),
    "overline": ("53", "55"),
}
#: These do not show on a blank.
_ON_LETTERS_ALONE = frozenset(("bold", "dim", "italic", "blink"))
#: In this block, terminals of every age agree that a wide character has two cells; on emoji they do not.
_FIRST_SURE, _LAST_SURE = "\u2e80", "\uffdc"

Attributes = frozenset[str]


class Pen(NamedTuple):
    """How a cell is drawn; None where it makes no difference, as the colour of a blank."""

    foreground: str | None = "39"
    background: str = "49"
    attributes: Attributes | None = frozenset()

    def after(self, before: "Pen") -> "Pen":
        """This pen, with whatever makes no difference left as it was before."""
        if self.attributes is None:
            kept = (before.attributes or frozenset()) & _ON_LETTERS_ALONE
            return Pen(before.foreground, self.background, kept)
        return self


_PLAIN = Pen()
_PLAIN_BLANK = Pen(None, "49", None)


class Row(NamedTuple):
    """The cells of a line. The cells after the first of a wide character are empty."""

    texts: list[str]
    pens: list[Pen]

    @classmethod
    def blank(cls, width: int) -> "Row":
        """A line of blanks."""
        return cls([" "] * width, [_PLAIN_BLANK] * width)


class CellBuffer:
    """The cells of the terminal as they are to be, and as they are.

    Args:
        fills: erasing the rest of a line fills it with the background (terminfo's `bce`).
    """

    def __init__(self, *, fills: bool = False) -> None:
        self._fills = fills
        self._width = 0
        self._wanted: list[Row] = []
        self._shown: list[Row] | None = None
        self._touched: set[int] = set()
        self._pen = _PLAIN
        self._pens: dict[tuple[Style, ColorSystem], tuple[Pen, Pen]] = {}

    def forget(self) -> None:
        """Assume nothing about what the terminal shows: the next difference draws everything."""
        self._shown = None

    def resize(self, width: int, height: int) -> None:
        """Take the size of the terminal; after a change, everything is drawn again."""
        if (width, height) != (self._width, len(self._wanted)):
            self._width = width
            self._wanted = [Row.blank(width) for _ in range(height)]
            self.forget()

    # -- what is to be shown -----------------------------------------------------------------------------------

    def paint(self, update: CompositorUpdate, system: ColorSystem) -> None:
        """Take over what an update of Textual would write."""
        if isinstance(update, LayoutUpdate):
            for y, strips in enumerate(update.strips, update.region.y):
                x = update.region.x
                for strip in strips:
                    self.write(x, y, strip, system)
                    x += strip.cell_length
        elif isinstance(update, ChopsUpdate):
            for y, x1, x2 in update.spans:
                for end, (x, piece) in zip(update.chop_ends[y], update.chops[y].items(), strict=False):
                    if piece is not None and x < x2 and end > x1:
                        left, right = max(x, x1), min(end, x2)
                        self.write(left, y, piece.crop(left - x, right - x), system)

    def write(self, x: int, y: int, segments: Iterable[Segment], system: ColorSystem) -> None:
        """Put text into the cells of one line; what does not fit is dropped."""
        if not 0 <= y < len(self._wanted) or x >= self._width:
            return
        self._touched.add(y)
        texts, pens = self._wanted[y]
        first = x
        while first and texts[first] == "":  # only half of a wide character remains: a terminal would blank it
            first -= 1
        texts[first:x] = " " * (x - first)
        for text, style, control in segments:
            if control:
                continue
            pen, blank = self._pens_of(style, system)
            if text.isascii() and text.isprintable():
                part = text[: self._width - x]
                end = x + len(part)
                texts[x:end] = part
                pens[x:end] = [blank if char == " " else pen for char in part]
                x = end
                continue
            for cluster in _clusters(text):
                cells = cell_len(cluster)
                if x + cells > self._width:
                    cluster, cells = " " * (self._width - x), self._width - x
                    texts[x : x + cells] = cluster
                else:
                    texts[x : x + cells] = [cluster, *[""] * (cells - 1)]
                pens[x : x + cells] = [blank if cluster.isspace() else pen] * cells
                x += cells
        end = x
        while end < self._width and texts[end] == "":
            end += 1
        texts[x:end] = " " * (end - x)

    def _pens_of(self, style: Style | None, system: ColorSystem) -> tuple[Pen, Pen]:
        """How letters and blanks of this style are drawn."""
        if style is None:
            return _PLAIN, _PLAIN_BLANK
        pens = self._pens.get((style, system))
        if pens is None:
            if len(self._pens) >= MAX_PENS:
                self._pens.clear()
            attributes = frozenset(name for name in _ATTRIBUTES if getattr(style, name))
            foreground = _codes(style.color, system, foreground=True)
            pen = Pen(foreground, _codes(style.bgcolor, system, foreground=False), attributes)
            blank = Pen(None, pen.background, None) if attributes <= _ON_LETTERS_ALONE else pen
            pens = self._pens[style, system] = (pen, blank)
        return pens

    # -- what is written ---------------------------------------------------------------------------------------

    def difference(self, cursor: tuple[int, int] | None = None) -> str:
        """What to write so that the terminal shows what it is to show; empty if it does already.

        Args:
            cursor: where to leave the cursor (column, line); it is hidden, but input methods open there.
        """
        out: list[str] = []
        if self._shown is None:
            self._shown = [Row.blank(self._width) for _ in self._wanted]
            self._touched = set(range(len(self._wanted)))
            self._pen = _PLAIN
            out.append(CLEAR)
        at: tuple[int, int] | None = None
        for y in sorted(self._touched):
            wanted, shown = self._wanted[y], self._shown[y]
            if wanted == shown:
                continue
            changed = [
                x
                for x, (old, new, before, pen) in enumerate(
                    zip(shown.texts, wanted.texts, shown.pens, wanted.pens, strict=True)
                )
                if new and (old != new or before != pen)
            ]
            erased = self._erasable_from(wanted)
            for x in changed:
                pen = wanted.pens[x]
                if at != (x, y):
                    out.append(self._move(at, x, y))
                    at = (x, y)
                if x >= erased and changed[-1] - x >= len(ERASE_REST):
                    out += (self._change(pen), ERASE_REST)
                    break
                out += (self._change(pen), wanted.texts[x])
                at = _after(x, y, wanted.texts[x])
            self._shown[y] = Row(wanted.texts.copy(), wanted.pens.copy())
        self._touched.clear()
        if out and cursor is not None:
            out.append(self._move(at, *cursor))
        return "".join(out)

    def _erasable_from(self, row: Row) -> int:
        """From where on the line is blank to its end, and can be erased rather than written."""
        first, last = self._width, row.pens[-1]
        if last.attributes is None and (self._fills or last.background == _PLAIN.background):
            while first and row.texts[first - 1] == " " and row.pens[first - 1] == last:
                first -= 1
        return first

    def _move(self, at: tuple[int, int] | None, x: int, y: int) -> str:
        if at is not None and at[1] == y and x > at[0]:
            gap, row = x - at[0], self._wanted[y]
            if gap <= MAX_GAP and all(
                text.isascii() and text and pen.after(self._pen) == self._pen
                for text, pen in zip(row.texts[at[0] : x], row.pens[at[0] : x], strict=True)
            ):
                return "".join(row.texts[at[0] : x])
            return f"\x1b[{gap}C" if gap > 1 else "\x1b[C"
        if x == 0:
            return "\r\n" if at is not None and at[1] == y - 1 else f"\x1b[{y + 1}H"
        return f"\x1b[{y + 1};{x + 1}H"

    def _change(self, pen: Pen) -> str:
        before, self._pen = self._pen, pen.after(self._pen)
        return "" if self._pen == before else _transition(before, self._pen)


def _clusters(text: str) -> Iterator[str]:
    """The characters that share a cell, or two: a letter with its marks, or an emoji of several parts."""
    cluster = ""
    for char in text:
        if ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0:
            continue  # it would be obeyed
        if cluster and (not cell_len(char) or cluster.endswith("\u200d")):
            cluster += char
        else:
            if cluster and cell_len(cluster):
                yield cluster
            cluster = char
    if cluster and cell_len(cluster):
        yield cluster


def _after(x: int, y: int, text: str) -> tuple[int, int] | None:
    """Where the cursor is after this text; None where terminals disagree."""
    if text.isascii():
        return (x + 1, y)
    cells = cell_len(text)
    sure = len(text) == 1 and (cells == 1 or _FIRST_SURE <= text <= _LAST_SURE)
    return (x + cells, y) if sure else None


def _codes(color: Color | None, system: ColorSystem, *, foreground: bool) -> str:
    if color is None or color.is_default:
        return "39" if foreground else "49"
    return ";".join(color.downgrade(system).get_ansi_codes(foreground))


@lru_cache(4096)
def _transition(before: Pen, after: Pen) -> str:
    """The shortest sequence that changes one pen to another."""
    had, wants = before.attributes or frozenset(), after.attributes or frozenset()
    off = {_ATTRIBUTES[name][1] for name in had - wants}
    # What turns one off may turn another off with it: bold and dim share a code.
    kept = {name for name in had & wants if _ATTRIBUTES[name][1] not in off}
    codes = sorted(off) + [_ATTRIBUTES[name][0] for name in _ATTRIBUTES if name in wants - kept]
    codes += [new for old, new in zip(before[:2], after[:2], strict=True) if old != new and new is not None]
    anew = [_ATTRIBUTES[name][0] for name in _ATTRIBUTES if name in wants]
    anew += [new for old, new in zip(_PLAIN[:2], after[:2], strict=True) if old != new and new is not None]
    change, all_anew = ";".join(codes), ";".join(["", *anew]) if anew else ""
    return f"\x1b[{min(change, all_anew, key=len) if codes else ''}m" if codes else ""
