"""The base of widgets drawn in cells: it remembers what it drew, and redraws only the cells that changed."""

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import ClassVar

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

#: Text and its style, side by side; the text determines the width.
Line = tuple[tuple[str, Style], ...]
#: Text and the token for its style.
Piece = tuple[str, str]


class CellWidget(Widget):
    """A widget whose lines are set by `draw`."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "cell--good",
        "cell--busy",
        "cell--warn",
        "cell--bad",
        "cell--idle",
        "cell--dim",
        "cell--accent",
        "cell--title",
        "cell--cursor",
        "cell--header",
        "cell--gone",
    }
    DEFAULT_CSS = """
    CellWidget > .cell--good { color: $text-success; }
    CellWidget > .cell--busy { color: $text-accent; }
    CellWidget > .cell--warn { color: $text-warning; text-style: bold; }
    CellWidget > .cell--bad { color: $text-error; text-style: bold; }
    CellWidget > .cell--dim { color: $text-muted; }
    CellWidget > .cell--idle { color: $text-muted; }
    CellWidget > .cell--accent { color: $text-primary; }
    CellWidget > .cell--title { text-style: bold; }
    CellWidget > .cell--cursor { background: $primary-muted; text-style: bold; }
    CellWidget > .cell--header { color: $text-muted; text-style: bold; }
    CellWidget > .cell--gone { text-style: dim; }
    """

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:  # noqa: A002  Textual's name
        super().__init__(id=id, classes=classes)
        self._lines: list[Line] = []
        self._cell_styles: dict[tuple[str, ...], Style] = {}

    def cell_style(self, *tokens: str) -> Style:
        """The combined style of these tokens; later ones override earlier ones."""
        style = self._cell_styles.get(tokens)
        if style is None:
            style = self.rich_style
            for token in filter(None, tokens):
                style += self.get_component_rich_style(f"cell--{token}", partial=True)
            self._cell_styles[tokens] = style
        return style

    def line_of(self, pieces: Iterable[Piece]) -> Line:
        """Cut or pad pieces to a line of the widget's width."""
        left = self.size.width
        line: list[tuple[str, Style]] = []
        for text, token in pieces:
            if (width := cell_len(text)) > left:
                text = Strip([Segment(text)]).crop(0, left).text
                width = cell_len(text)
            line.append((text, self.cell_style(token)))
            left -= width
        if left:
            line.append((" " * left, self.cell_style("")))
        return tuple(line)

    def draw(self, lines: Sequence[Line]) -> None:
        """Show these lines; only cells that changed are sent to the terminal."""
        shown, self._lines = self._lines, list(lines)
        regions: list[Region] = []
        for y, (old, new) in enumerate(zip_longest(shown, self._lines)):
            if old == new:
                continue
            if old is None or new is None or len(old) != len(new):
                regions.append(Region(0, y, self.size.width, 1))
            else:
                regions += _differences(y, old, new)
        if regions:
            self.refresh(*regions)

    def render_line(self, y: int) -> Strip:
        """Give Textual the line to draw."""
        if y < len(self._lines):
            return Strip([Segment(text, style) for text, style in self._lines[y]])
        return Strip.blank(self.size.width, self.rich_style)

    def notify_style_update(self) -> None:
        """Forget the styles; Textual calls this when colours may have changed."""
        super().notify_style_update()
        self._cell_styles.clear()

    def on_resize(self) -> None:
        """Forget the lines; the owner draws them again."""
        self._lines = []


def _differences(y: int, old: Line, new: Line) -> list[Region]:
    """The cells in which two lines with equally many pieces differ; neighbours form one region."""
    regions: list[Region] = []
    x = old_x = 0
    for (old_text, old_style), (text, style) in zip(old, new, strict=True):
        width = cell_len(text)
        old_width = cell_len(old_text)
        if x != old_x or width != old_width:  # everything has moved from here on
            rest = sum(cell_len(one) for one, _ in new)
            return [*regions, Region(x, y, max(1, rest - x), 1)]
        if (text, style) != (old_text, old_style) and width:
            if regions and regions[-1].right == x:
                regions[-1] = Region(regions[-1].x, y, regions[-1].width + width, 1)
            else:
                regions.append(Region(x, y, width, 1))
        x, old_x = x + width, old_x + old_width
    return regions
