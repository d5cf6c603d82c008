"""What is written to the terminal shows what Textual meant, and little is written."""

from collections.abc import Callable
from typing import Any

import pyte
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.color import ColorSystem
from rich.console import Console
from rich.segment import Segment
from rich.style import Style
from textual._compositor import ChopsUpdate, CompositorUpdate, LayoutUpdate
from textual.geometry import Region
from textual.strip import Strip

from tui.terminal.cell_buffer import CLEAR, CellBuffer

WIDTH, HEIGHT = 24, 6
CONSOLE = Console(force_terminal=True, color_system="truecolor")
#: As the driver sets it.
NO_WRAP = "\x1b[?7l"
STYLES = [
    Style(),
    Style.parse("#98a6b5 on #0f1419"),
    Style.parse("bold #ff8a65 on #0f1419"),
    Style.parse("#ff8a65 on #0f1419"),
    Style.parse("italic underline on #1d3a57"),
    Style.parse("reverse green"),
    Style.parse("strike blink red on default"),
]
#: Each is two cells: then nothing is ever cut in half, which every terminal does in its own way.
PAIRS = ["  ", "  ", "ab", "x ", " 7", "实", "日", "🚀", "é–", "e\u0301o", "▌─"]

pairs = st.lists(st.tuples(st.sampled_from(PAIRS), st.sampled_from(STYLES)), min_size=WIDTH // 2, max_size=WIDTH // 2)
pictures = st.lists(pairs, min_size=HEIGHT, max_size=HEIGHT)
spans = st.lists(
    st.tuples(st.integers(0, HEIGHT - 1), st.integers(0, WIDTH // 2 - 1), st.integers(1, WIDTH // 2)),
    min_size=1,
    max_size=4,
    unique_by=lambda span: span[0],
)


def strip_of(cells: list[tuple[str, Style]]) -> Strip:
    return Strip([Segment(text, style) for text, style in cells])


def whole(picture: list[list[tuple[str, Style]]]) -> CompositorUpdate:
    return LayoutUpdate([[strip_of(line)] for line in picture], Region(0, 0, WIDTH, HEIGHT))


def part(picture: list[list[tuple[str, Style]]], where: list[tuple[int, int, int]]) -> CompositorUpdate:
    """The cells of a picture that Textual repaints in these places."""
    chosen = sorted((y, 2 * x, min(WIDTH, 2 * (x + width))) for y, x, width in where)
    return ChopsUpdate([{0: strip_of(line)} for line in picture], chosen, [[WIDTH]] * HEIGHT)


class Emulator:
    """A terminal."""

    def __init__(self, width: int = WIDTH, height: int = HEIGHT) -> None:
        self.screen = pyte.Screen(width, height)
        self._stream = pyte.Stream(self.screen)
        self.feed(NO_WRAP)

    def feed(self, text: str) -> None:
        self._stream.feed(text)

    def cells(self) -> list[list[Any]]:
        """What is seen: a blank has no colour of its own."""
        return [[_seen(self.screen.buffer[y][x]) for x in range(self.screen.columns)] for y in range(self.screen.lines)]


def _seen(char: Any) -> Any:
    if char.data != " " or char.reverse or char.underscore or char.strikethrough:
        return char
    return char._replace(fg="default", bold=False, italics=False, blink=False)


class Meant(Emulator):
    """A terminal that is sent what Textual would send."""

    def take(self, update: CompositorUpdate) -> None:
        if isinstance(update, ChopsUpdate):  # as Textual writes it, but cut on both sides
            for y, x1, x2 in update.spans:
                (piece,) = update.chops[y].values()
                assert piece is not None
                self.feed(f"\x1b[{y + 1};{x1 + 1}H{piece.crop(x1, x2).render(CONSOLE)}")
        else:
            self.feed(update.render_segments(CONSOLE).replace("\n", ""))


@given(first=pictures, then=st.lists(st.tuples(pictures, st.none() | spans), max_size=4), fills=st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_terminal_shows_what_textual_meant(first: Any, then: Any, fills: bool) -> None:
    meant, shown, cells = Meant(), Emulator(), CellBuffer(fills=fills)
    shown.feed("what another program has left\r\n")
    cells.resize(WIDTH, HEIGHT)
    for picture, where in [(first, None), *then]:
        update = whole(picture) if where is None else part(picture, where)
        meant.take(update)
        cells.paint(update, ColorSystem.TRUECOLOR)
        shown.feed(cells.difference())
        assert shown.cells() == meant.cells()


@given(pictures=st.lists(pictures, min_size=2, max_size=3))
@settings(max_examples=20, deadline=None)
def test_pictures_that_were_never_sent_cost_nothing(pictures: Any) -> None:
    cells, once = CellBuffer(), CellBuffer()
    for buffer in (cells, once):
        buffer.resize(WIDTH, HEIGHT)
        buffer.paint(whole(pictures[0]), ColorSystem.TRUECOLOR)
        buffer.difference()
    for picture in pictures:
        cells.paint(whole(picture), ColorSystem.TRUECOLOR)
    once.paint(whole(pictures[-1]), ColorSystem.TRUECOLOR)
    assert cells.difference() == once.difference()
    assert cells.difference() == ""


def drawn(*lines: str, style: str = "", width: int = WIDTH, **options: Any) -> tuple[CellBuffer, Callable[..., str]]:
    """A buffer that shows these lines, and what is written for others."""
    cells = CellBuffer(**options)
    cells.resize(width, len(lines))

    def write(*texts: str, style: str = style, x: int = 0) -> str:
        for y, text in enumerate(texts):
            cells.write(x, y, [Segment(text, Style.parse(style))], ColorSystem.TRUECOLOR)
        return cells.difference()

    write(*lines)
    return cells, write


def test_only_what_differs_is_written() -> None:
    _, write = drawn("queued 12, running 3", "the second line")
    assert write("queued 13, running 4") == "\x1b[1;9H3\x1b[10C4"
    assert write("queued 13, running 4") == ""


def test_a_short_gap_is_written_and_a_long_one_jumped_over() -> None:
    _, write = drawn("a.b.c.....d")
    assert write("A.B.C.....D") == "\x1b[1HA.B.C\x1b[5CD"


def test_a_blank_needs_no_colour_of_its_own() -> None:
    _, write = drawn("one two", style="red")
    assert write("ONE TWO", style="red") == "\x1b[1HONE TWO"
    assert write("ONE    ", style="red") == "\x1b[1;5H   "


@pytest.mark.parametrize("fills", [False, True])
def test_the_rest_of_a_line_is_erased_where_that_fills_it(fills: bool) -> None:
    _, write = drawn("a long line of text...", style="on #0f1419", fills=fills)
    line = write(f"a{' ' * (WIDTH - 1)}", style="on #0f1419")
    assert ("\x1b[K" in line) is fills


def test_bold_and_dim_end_with_one_code_and_the_other_goes_on() -> None:
    _, write = drawn("ab", style="bold dim")
    assert write("AB", style="bold") == "\x1b[1H\x1b[;1mAB"
    assert write("ab", style="dim") == "\x1b[1H\x1b[;2mab"


def test_half_of_a_wide_character_is_not_left() -> None:
    cells, _ = drawn("实验室", width=6)
    shown = Emulator(6, 1)
    cells.forget()
    shown.feed(cells.difference())
    cells.write(1, 0, [Segment("xy")], ColorSystem.TRUECOLOR)
    shown.feed(cells.difference())
    assert shown.screen.display[0].rstrip() == " xy 室"


def test_after_an_emoji_the_place_is_said_as_terminals_disagree_on_its_width() -> None:
    cells, _ = drawn("")
    cells.write(0, 0, [Segment("🚀ab 实x")], ColorSystem.TRUECOLOR)
    assert cells.difference() == "\x1b[1H🚀\x1b[1;3Hab 实x"


def test_what_would_be_obeyed_is_not_written() -> None:
    cells, _ = drawn("")
    cells.write(0, 0, [Segment("a\x1b[2Jb\x9bc\n")], ColorSystem.TRUECOLOR)
    assert cells.difference() == "\x1b[1Ha[2Jbc"


def test_what_does_not_fit_is_dropped() -> None:
    cells, _ = drawn("", width=4)
    for x, y, text in [(0, 0, "ab 实验"), (5, 0, "x"), (0, 7, "y")]:
        cells.write(x, y, [Segment(text)], ColorSystem.TRUECOLOR)
    assert cells.difference() == "\x1b[1Hab"


def test_everything_is_drawn_again_over_what_another_program_has_written() -> None:
    cells, write = drawn("one", "two", width=3)
    cells.forget()
    assert write("one", "two") == f"{CLEAR}\x1b[1Hone\r\ntwo"


def test_everything_is_drawn_again_in_another_size() -> None:
    cells, write = drawn("one", "two", width=3)
    cells.resize(3, 2)
    assert write("one", "two") == ""
    cells.resize(4, 2)
    assert write("one", "two") == f"{CLEAR}\x1b[1Hone\r\ntwo"


def test_the_cursor_is_left_where_an_input_method_opens() -> None:
    cells, _ = drawn("one", "two")
    cells.write(0, 0, [Segment("ONE")], ColorSystem.TRUECOLOR)
    assert cells.difference((5, 1)) == "\x1b[1HONE\x1b[2;6H"
    assert cells.difference((5, 1)) == ""
