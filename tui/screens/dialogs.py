"""What is asked: yes or no, where to, a file's name; and what the keys are."""

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

#: Names listed in a question; the rest is counted.
MAX_NAMES = 6

_DIALOG_CSS = """
    align: center middle;
    .dialog { width: 90%; max-width: 76; height: auto; max-height: 90%; padding: 1 2; border: round $primary; }
"""


class ConfirmDialog(ModalScreen[bool]):
    """Asks before something is destroyed. No is what Enter gives, and Esc, and closing it.

    Args:
        question: names object and effect.
        names: of the things, told one by one where there are several.
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
        """See Textual."""
        with Vertical(classes="dialog"):
            yield Static(self.question, markup=False, id="question")
            if len(self._names) > 1:
                left_out = len(self._names) - MAX_NAMES
                lines = [*self._names[:MAX_NAMES], *([f"and {left_out} more"] if left_out > 0 else [])]
                yield Static("\n".join(f"  {line}" for line in lines), markup=False)
            yield Static(self._answers(), markup=False, id="answers")
            yield Static("y yes  n no  ←→ choose  enter take", markup=False, classes="hint")

    def _answers(self) -> str:
        """No is the default; which one Enter takes is told by a mark, not by a colour."""
        return "  No    > Yes <" if self.yes else "> No <    Yes  "

    def action_take(self) -> None:
        """Enter."""
        self.dismiss(self.yes)

    def action_answer(self, yes: bool) -> None:
        """Answer by a letter."""
        self.dismiss(yes)

    def action_other(self) -> None:
        """To the other answer."""
        self.yes = not self.yes
        self.query_one("#answers", Static).update(self._answers())


class ExportDialog(ModalScreen["tuple[str, str] | None"]):
    """Asks for a file's name, and writes the rows to it; gives what to say of that, and in which colour."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Close")]
    DEFAULT_CSS = f"""
    ExportDialog {{ {_DIALOG_CSS} }}
    """

    def __init__(self, kind: str, views: Sequence[RowView]) -> None:
        super().__init__()
        self._kind = kind
        self._views = views

    def compose(self) -> ComposeResult:
        """See Textual."""
        with Vertical(classes="dialog"):
            yield Label(f"Export {len(self._views)} rows of {self._kind} to (.csv or .json):", markup=False)
            name = Input(suggested_name(self._kind), compact=True, id="path")
            name.cursor_blink = False
            yield name

    def on_mount(self) -> None:
        """The name is there to be changed."""
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
    """Finds anything by its name; gives the id of the place.

    Args:
        find: text -> (id, what is shown), the best first.
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
        """See Textual."""
        with Vertical(classes="dialog"):
            yield Label("Screen, space, worker, request or client:", markup=False)
            name = Input(compact=True, id="name")
            name.cursor_blink = False
            yield name
            yield OptionList(id="found", markup=False, compact=True)

    def on_mount(self) -> None:
        """Everything there is, before anything is typed."""
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
        """To another of what was found."""
        found = self.query_one(OptionList)
        if lines < 0:
            found.action_cursor_up()
        else:
            found.action_cursor_down()


class HelpDialog(ModalScreen[None]):
    """The keys of a screen, made from its bindings.

    Args:
        name: of the screen.
        keys: (key, what it does).
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,question_mark,q", "dismiss(None)", "Close")]
    DEFAULT_CSS = f"""
    HelpDialog {{ {_DIALOG_CSS} }}
    """
    #: Two columns from this width of the terminal on.
    WIDE = 72

    def __init__(self, name: str, keys: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self._name = name
        self._keys = keys

    def compose(self) -> ComposeResult:
        """See Textual."""
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
