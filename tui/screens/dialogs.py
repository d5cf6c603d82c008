"""The dialogs: confirmation, jump, export and help."""

from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Input, Label, OptionList, Static
from textual.widgets.option_list import Option

from tui.model.export import suggested_name, write_rows
from tui.model.relay_model import RowView

#: Names listed in a question; further names are only counted.
MAX_NAMES = 6

_DIALOG_CSS = """
    align: center middle;
    .dialog { width: 90%; max-width: 76; height: auto; max-height: 90%; padding: 1 2; border: round $primary; }
"""


class ConfirmDialog(ModalScreen[bool]):
    """Asks before something is destroyed; Enter, Esc and closing it all mean no.

    Args:
        question: says what will happen to what.
        names: of the objects, listed where there are several.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "Yes"),
        Binding("n,escape", "answer(False)", "No"),
        Binding("left,right,tab,shift+tab,h,l", "other", "The other answer", show=False),
        Binding("enter", "take", "Take the marked answer", show=False),
    ]
    DEFAULT_CSS = f"""
    ConfirmDialog {{ {_DIALOG_CSS}
        #answers {{ margin: 1 0; }}
    }}
    """

    def __init__(self, question: str, names: Sequence[str] = ()) -> None:
        super().__init__()
        self.yes = False
        self.question = question
        self._names = names

    def compose(self) -> ComposeResult:
        """Show the question, the names and the two answers."""
        with Vertical(classes="dialog"):
            yield Static(self.question, markup=False, id="question")
            if len(self._names) > 1:
                left_out = len(self._names) - MAX_NAMES
                lines = [*self._names[:MAX_NAMES], *([f"and {left_out} more"] if left_out > 0 else [])]
                yield Static("\n".join(f"  {line}" for line in lines), markup=False)
            yield Static(self._answers(), markup=False, id="answers")
            yield Static("y yes  n no  ←→ choose  enter take", markup=False, classes="hint")

    def _answers(self) -> str:
        """The two answers; a mark shows which one Enter takes, so it can be seen without colour."""
        return "  No    > Yes <" if self.yes else "> No <    Yes  "

    def action_take(self) -> None:
        """Give the marked answer."""
        self.dismiss(self.yes)

    def action_answer(self, yes: bool) -> None:
        """Give an answer by its letter."""
        self.dismiss(yes)

    def action_other(self) -> None:
        """Mark the other answer."""
        self.yes = not self.yes
        self.query_one("#answers", Static).update(self._answers())


class ExportDialog(ModalScreen["tuple[str, str] | None"]):
    """Asks for a file name and writes the rows to it; returns the notice to show and its colour."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Close")]
    DEFAULT_CSS = f"""
    ExportDialog {{ {_DIALOG_CSS} }}
    """

    def __init__(self, kind: str, views: Sequence[RowView]) -> None:
        super().__init__()
        self._kind = kind
        self._views = views

    def compose(self) -> ComposeResult:
        """Show the question and an input for the file name."""
        with Vertical(classes="dialog"):
            yield Label(f"Export {len(self._views)} rows of {self._kind} to (.csv or .json):", markup=False)
            name = Input(suggested_name(self._kind), compact=True, id="path")
            name.cursor_blink = False
            yield name

    def on_mount(self) -> None:
        """Put the cursor in the suggested name."""
        self.query_one(Input).focus()

    @on(Input.Submitted)
    def _submitted(self, event: Input.Submitted) -> None:
        path = Path(event.value).expanduser()
        try:
            write_rows(path, self._views)
        except (OSError, ValueError) as fault:
            why = fault.strerror if isinstance(fault, OSError) and fault.strerror else str(fault)
            self.dismiss((f"not written: {path}: {why}", "bad"))
        else:
            self.dismiss((f"{len(self._views)} rows written to {path}", "good"))


class JumpDialog(ModalScreen["str | None"]):
    """Finds a screen, space, worker, request or client by its name; returns its id.

    Args:
        find: text -> (id, what is shown), best match first.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Close"),
        Binding("up", "move(-1)", "Up", show=False, priority=True),
        Binding("down", "move(1)", "Down", show=False, priority=True),
    ]
    DEFAULT_CSS = f"""
    JumpDialog {{ {_DIALOG_CSS}
        OptionList {{ height: auto; max-height: 12; border: none; }}
    }}
    """

    def __init__(self, find: Callable[[str], list[tuple[str, str]]]) -> None:
        super().__init__()
        self._find = find

    def compose(self) -> ComposeResult:
        """Show the input and the list of matches."""
        with Vertical(classes="dialog"):
            yield Label("Screen, space, worker, request or client:", markup=False)
            name = Input(compact=True, id="name")
            name.cursor_blink = False
            yield name
            yield OptionList(id="found", markup=False, compact=True)

    def on_mount(self) -> None:
        """List everything before anything is typed."""
        self.query_one(Input).focus()
        self._show("")

    def _show(self, text: str) -> None:
        found = self.query_one(OptionList)
        found.clear_options()
        found.add_options(Option(shown, id=place) for place, shown in self._find(text))
        found.highlighted = 0 if found.option_count else None

    @on(Input.Changed)
    def _typed(self, event: Input.Changed) -> None:
        self._show(event.value)

    @on(Input.Submitted)
    def _submitted(self) -> None:
        found = self.query_one(OptionList)
        if found.highlighted is not None:
            self.dismiss(found.get_option_at_index(found.highlighted).id)

    @on(OptionList.OptionSelected)
    def _selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(event.option.id)

    def action_move(self, lines: int) -> None:
        """Mark another match."""
        found = self.query_one(OptionList)
        if lines < 0:
            found.action_cursor_up()
        else:
            found.action_cursor_down()


class HelpDialog(ModalScreen[None]):
    """Shows the keys of a screen, taken from its bindings.

    Args:
        name: the name of the screen.
        keys: (key, what it does).
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,question_mark,q", "dismiss(None)", "Close")]
    DEFAULT_CSS = f"""
    HelpDialog {{ {_DIALOG_CSS} }}
    """
    #: From this terminal width on, the keys are shown in two columns.
    WIDE = 72

    def __init__(self, name: str, keys: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self._name = name
        self._keys = keys

    def compose(self) -> ComposeResult:
        """Show the keys."""
        with VerticalScroll(classes="dialog"):
            yield Static(self._text(), markup=False, id="keys-list")

    def _text(self) -> str:
        widest = max((len(key) for key, _ in self._keys), default=0)
        lines = [f"{key:>{widest}}  {what}" for key, what in self._keys]
        if self.app.size.width >= self.WIDE:
            half = (len(lines) + 1) // 2
            wide = max(map(len, lines), default=0) + 4
            pairs = zip_longest(lines[:half], lines[half:], fillvalue="")
            lines = [f"{left:<{wide}}{right}".rstrip() for left, right in pairs]
        return "\n".join([f"Keys of {self._name}", "", *lines])
