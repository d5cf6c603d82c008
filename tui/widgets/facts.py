"""A scrollable list of facts about one object."""

from collections.abc import Sequence
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.message import Message

from tui.widgets.cell_widget import CellWidget, Piece


class Facts(CellWidget, can_focus=True):
    """A scrollable widget of any number of lines."""

    DEFAULT_CSS = """
    Facts { height: 1fr; padding: 0 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "Up", show=False),
        Binding("down,j", "move(1)", "Down", show=False),
        Binding("pageup", "move(-10)", "Page up", show=False),
        Binding("pagedown", "move(10)", "Page down", show=False),
        Binding("home,g", "move(-100000)", "To the top", show=False),
    ]

    class Changed(Message):
        """The widget was scrolled."""

    def __init__(self) -> None:
        super().__init__(id="facts", classes="pane")
        self._facts: Sequence[Sequence[Piece]] = ()
        self._top = 0

    def show(self, facts: Sequence[Sequence[Piece]]) -> None:
        """Show these lines."""
        self._facts = facts
        if self.size.width:
            self._top = max(0, min(self._top, len(facts) - self.size.height))
            lines = [self.line_of(pieces) for pieces in facts[self._top : self._top + self.size.height]]
            self.draw(lines + [self.line_of([])] * (self.size.height - len(lines)))

    def action_move(self, lines: int) -> None:
        """Scroll by a number of lines."""
        self._top = max(0, self._top + lines)
        self.show(self._facts)
        self.post_message(self.Changed())
