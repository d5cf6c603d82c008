"""The table: one line for each row, a cursor that stays with a row's id; only visible rows are drawn."""

from collections.abc import Container, Iterable, Sequence
from typing import Any, ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message

from tui.model import state_glyphs
from tui.model.columns import COLUMNS, EMPTY, NO_MATCH, Column, choose, natural
from tui.model.formatting import fit
from tui.model.relay_model import RowView
from tui.model.row_filter import Filter
from tui.model.row_order import Order
from tui.widgets.cell_widget import CellWidget, Line

#: Width of the cursor and the tag in front of the cells.
GUTTER = 2


class RowTable(CellWidget, can_focus=True):
    """A table of one screen's rows.

    Args:
        kind: a key of `COLUMNS`.

    Attributes:
        cursor: the id of the row under the cursor; the cursor follows its row.
        tagged: ids in the order in which they were tagged.
        seen: the version of the model that the rows were taken from; None asks the owner for them again.
        why: shown in place of rows while there is no model yet.
        following: the view follows the cursor's row; with `tail`, the cursor follows the last row.
    """

    DEFAULT_CSS = """
    RowTable { height: 1fr; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "Up", show=False),
        Binding("down,j", "move(1)", "Down", show=False),
        Binding("pageup,ctrl+b", "page(-1)", "Page up", show=False),
        Binding("pagedown,ctrl+f", "page(1)", "Page down", show=False),
        Binding("home,g", "edge(-1)", "First row", show=False),
        Binding("end,G", "edge(1)", "Last row", show=False),
        Binding("enter", "enter", "Open", key_display="enter"),
        Binding("space", "tag", "Tag"),
        Binding("asterisk", "tag_all", "Tag all", show=False, key_display="*"),
        Binding("V", "tag_range", "Tag from the last tag to here", show=False),
        Binding("s", "sort", "Sort"),
        Binding("r", "reverse", "Reverse"),
        Binding("f", "follow", "Follow"),
    ]

    class Entered(Message):
        """Enter was pressed on a row."""

        def __init__(self, view: RowView) -> None:
            super().__init__()
            self.view = view

    class Changed(Message):
        """The operator changed how the table looks; the owner should redraw."""

    def __init__(self, kind: str, *, id: str | None = None, tail: bool = False) -> None:  # noqa: A002  Textual's name
        super().__init__(id=id, classes="pane")
        self.kind = kind
        self.columns: Sequence[Column] = COLUMNS[kind]
        self.order = Order(natural(kind))
        self.sorted_by: Column | None = None
        self.cursor: str | None = None
        self.tagged: dict[str, RowView] = {}
        self.seen: object = None
        self.following = tail
        self.tail = tail
        self.why = ""
        self._views: list[RowView] = []
        self._index: dict[str, int] = {}
        self._gone: str | None = None
        self._top = 0
        self._known = True
        self._now = 0.0
        self._stale = False

    # -- what is shown -----------------------------------------------------------------------------------------

    def update(
        self, views: Iterable[RowView], now: float, *, stale: bool, known: bool, moving: Container[str] = ()
    ) -> None:
        """Show these rows as of `now`.

        Args:
            views: all rows, in any order.
            now: the time that ages are shown for, by the model's clock.
            stale: the link is down, so the rows are dimmed.
            known: a snapshot has been received.
            moving: as for `Order.update`.
        """
        self._put(self.order.update(views, moving))
        for key in [key for key in self.tagged if key not in self._index or key == self._gone]:
            del self.tagged[key]
        self.look_again(now, stale=stale, known=known)

    def look_again(self, now: float, *, stale: bool, known: bool) -> None:
        """Draw the same rows at a later time."""
        self._now, self._stale, self._known = now, stale, known
        self._draw()

    def _put(self, shown: list[RowView]) -> None:
        """Take new rows and keep the cursor on its id, even if its row has left."""
        held, at, line = self.view, self._at(), self._line_of_cursor()
        self._gone = None
        self._index = {view.key: at for at, view in enumerate(shown)}
        if held is not None and held.key not in self._index and not (self.tail and self.following):
            shown.insert(min(at, len(shown)), held)
            self._index = {view.key: at for at, view in enumerate(shown)}
            self._gone = held.key
        self._views = shown
        if not shown:
            self.cursor = None
        elif self.tail and self.following:
            self.cursor = shown[-1].key
        elif self.cursor is None:
            self.cursor = shown[0].key
        self._scroll(line)

    def _scroll(self, line: int | None) -> None:
        """Scroll with a row that is followed, or that was scrolled to and is visible; otherwise stay."""
        height = self.height_of_rows
        if self.following:
            self._show_cursor()
        elif self._top and line is not None:
            self._top = self._at() - line
        self._top = max(0, min(self._top, len(self._views) - height))

    def _show_cursor(self) -> None:
        height, at = self.height_of_rows, self._at()
        self._top = max(min(self._top, at), at - height + 1, 0)

    @property
    def height_of_rows(self) -> int:
        """How many rows fit."""
        return max(1, self.size.height - 1)

    def _at(self) -> int:
        return self._index.get(self.cursor or "", 0)

    def _line_of_cursor(self) -> int | None:
        """The line of the cursor if it is visible, from 0."""
        line = self._at() - self._top
        return line if self.cursor in self._index and 0 <= line < self.height_of_rows else None

    @property
    def view(self) -> RowView | None:
        """The row under the cursor."""
        at = self._index.get(self.cursor or "")
        return self._views[at] if at is not None else None

    @property
    def views(self) -> list[RowView]:
        """The rows shown, in order, without a row that has left and is only kept for the cursor."""
        return [view for view in self._views if view.key != self._gone]

    @property
    def chosen(self) -> list[RowView]:
        """The rows that an action applies to: the tagged ones, else the one under the cursor."""
        if self.tagged:
            return [self._views[at] for key in self.tagged if (at := self._index.get(key)) is not None]
        return [self.view] if self.view is not None else []

    @property
    def place(self) -> str:
        """Which rows are visible, and how many there are."""
        total = len(self.views)
        if not total:
            return "none"
        last = min(total, self._top + self.height_of_rows)
        out_of_sight = "" if self._line_of_cursor() is not None else ", cursor out of sight"
        return f"{min(self._top + 1, last)}-{last} of {total}{out_of_sight}"

    # -- drawing -----------------------------------------------------------------------------------------------

    def _draw(self) -> None:
        width = self.size.width
        if width <= GUTTER:
            return
        chosen = choose(self.columns, width - GUTTER)
        in_sight = self._views[self._top : self._top + self.height_of_rows]
        lines = [self._heading(chosen), *(self._row(view, chosen) for view in in_sight)]
        if not self._views:
            text = self.why if not self._known else NO_MATCH if self.order.filter.text else EMPTY[self.kind]
            lines += [self.line_of([]), *(self.line_of([("  ", ""), (part, "dim")]) for part in _wrap(text, width - 4))]
        lines += [self.line_of([])] * (self.size.height - len(lines))
        self.draw(lines[: self.size.height])

    def _heading(self, chosen: Sequence[tuple[Column, int]]) -> Line:
        style = self.cell_style("header")
        line = [(" " * GUTTER, style)]
        for column, width in chosen:
            title = column.title
            if column is self.sorted_by:
                arrow = state_glyphs.SORT_DOWN if self.order.reverse else state_glyphs.SORT_UP
                title = f"{title[: width - 1]}{arrow}"
            line.append((fit(title, width, column.align) + " ", style))
        return self._filled(line, "header")

    def _row(self, view: RowView, chosen: Sequence[tuple[Column, int]]) -> Line:
        here, gone = view.key == self.cursor, view.key == self._gone
        over = [*(["cursor"] if here and self.has_focus else []), *(["gone"] if gone or self._stale else [])]
        mark = (state_glyphs.FOLLOWED if self.following else state_glyphs.CURSOR) if here else " "
        tag = "✗" if gone else state_glyphs.TAGGED if view.key in self.tagged else " "
        line = [(mark + tag, self.cell_style("accent" if self.has_focus else "dim", *over))]
        for column, width in chosen:
            cell = column.cell(view, self._now)
            line.append((fit(cell.text, width, column.align) + " ", self.cell_style(cell.token, *over)))
        return self._filled(line, *over)

    def _filled(self, line: list[Any], *tokens: str) -> Line:
        """Drop the blank after the last cell where it does not fit, and fill the rest of the line."""
        full = self.line_of([(text, "") for text, _ in line])
        styled = [(text, style) for (text, _), (_, style) in zip(full, line, strict=False)]
        styled += [(text, self.cell_style(*tokens)) for text, _ in full[len(line) :]]
        return tuple(styled)

    # -- keys --------------------------------------------------------------------------------------------------

    def _go(self, at: int) -> None:
        if not self._views:
            return
        at = max(0, min(at, len(self._views) - 1))
        self.cursor = self._views[at].key
        if self._gone is not None and self.cursor != self._gone:
            self._drop_gone()
        if self.tail:
            self.following = self.cursor == self._views[-1].key
        self._show_cursor()
        self._changed()

    def _drop_gone(self) -> None:
        self._views = [view for view in self._views if view.key != self._gone]
        self._index = {view.key: at for at, view in enumerate(self._views)}
        self._gone = None

    def _changed(self) -> None:
        self._draw()
        self.post_message(self.Changed())

    def show(self, key: str) -> bool:
        """Put the cursor on a row; False if it is not shown."""
        if key not in self._index:
            return False
        self._go(self._index[key])
        return True

    def filter_by(self, wanted: Filter) -> None:
        """Show only rows that pass the filter; the cursor stays if its row does."""
        self.order.filter = wanted
        self.order.begin_anew()
        self.seen = None
        if (view := self.view) is not None and not self.order.shows(view):
            self._views, self._index, self.cursor, self._top = [], {}, None, 0

    def action_move(self, lines: int) -> None:
        """Move the cursor."""
        self._go(self._at() + lines)

    def action_page(self, pages: int) -> None:
        """Move the cursor by a screenful."""
        self._go(self._at() + pages * max(1, self.height_of_rows - 1))

    def action_edge(self, end: int) -> None:
        """Move the cursor to the first or the last row."""
        self._go(0 if end < 0 else len(self._views) - 1)

    def action_enter(self) -> None:
        """Open the row under the cursor."""
        if self.view is not None:
            self.post_message(self.Entered(self.view))

    def action_tag(self) -> None:
        """Tag or untag the row under the cursor, and move to the next."""
        view = self.view
        if view is None:
            return
        if view.key in self.tagged:
            del self.tagged[view.key]
        else:
            self.tagged[view.key] = view
        self._go(self._at() + 1)

    def action_tag_all(self) -> None:
        """Tag all rows that are shown, or untag them if all are tagged."""
        shown = {view.key: view for view in self.views}
        self.tagged = {} if shown.keys() <= self.tagged.keys() else shown
        self._changed()

    def action_tag_range(self) -> None:
        """Tag the rows from the one tagged last to the cursor."""
        begin = self._index.get(next(reversed(self.tagged), ""), self._at())
        first, last = sorted((begin, self._at()))
        self.tagged |= {view.key: view for view in self._views[first : last + 1] if view.key != self._gone}
        self._changed()

    def untag(self) -> None:
        """Remove all tags."""
        self.tagged.clear()
        self._changed()

    def action_sort(self) -> None:
        """Sort by the next visible column; after the last, return to the natural order."""
        shown = [column for column, _ in choose(self.columns, self.size.width - GUTTER)]
        after = shown.index(self.sorted_by) + 1 if self.sorted_by in shown else 0
        self.sorted_by = shown[after] if after < len(shown) else None
        self.order.chosen = self.sorted_by.sort if self.sorted_by is not None else None
        self._reorder()

    def action_reverse(self) -> None:
        """Reverse the order."""
        self.order.reverse = not self.order.reverse
        self._reorder()

    def _reorder(self) -> None:
        self.order.begin_anew()
        self._put(self.order.update(self.views))
        self._show_cursor()
        self._changed()

    def action_follow(self) -> None:
        """Start or stop following the row, or in a log the newest line."""
        self.following = not self.following
        if self.tail and self.following:
            self._go(len(self._views) - 1)
        self._show_cursor()
        self._changed()

    def on_focus(self, _event: events.Focus) -> None:
        """Redraw, because the key line depends on the focus."""
        self._changed()

    def on_blur(self, _event: events.Blur) -> None:
        """Redraw without the highlighted cursor."""
        self._draw()


def _wrap(text: str, width: int) -> list[str]:
    """Break text into lines of at most `width` cells."""
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return lines
