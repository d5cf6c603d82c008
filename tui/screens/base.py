"""The base of every screen: status line, breadcrumb, panes, filter line, key line, and the keys that act on rows."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import ClassVar, cast

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widget import Widget
from textual.widgets import Input

from tui.model import formatting, state_glyphs
from tui.model.actions import ACTIONS, TOPIC_OF, Plan
from tui.model.relay_model import RelayModel, RowView
from tui.model.row_filter import Filter
from tui.screens.dialogs import ConfirmDialog, ExportDialog
from tui.screens.host import ScreenHost
from tui.widgets.cell_widget import Piece
from tui.widgets.row_table import RowTable
from tui.widgets.status_lines import CrumbLine, KeyLine, Part, StatusLine, status


class RelayScreen(Screen[None]):
    """A screen with a status line, a breadcrumb and keys; subclasses add the panes."""

    BINDINGS: ClassVar[list[BindingType]] = [
        *(Binding(action.key, f"act('{action.name}')", action.title, id=action.name) for action in ACTIONS.values()),
        Binding("slash", "filter", "Filter", key_display="/"),
        Binding("y", "copy", "Copy id"),
        Binding("E", "export", "Export"),
        Binding("z", "zoom", "Zoom"),
        Binding("L", "log", "Its log", show=False),
        Binding("escape", "back", "Back", show=False),
    ]
    DEFAULT_CSS = """
    RelayScreen { layout: vertical; }
    RelayScreen #filter { height: 1; border: none; padding: 0 1; display: none; }
    RelayScreen #filter.on { display: block; }
    RelayScreen.zoomed .pane, RelayScreen.zoomed #status { display: none; }
    RelayScreen.zoomed .pane.zoomed { display: block; height: 1fr; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._table: RowTable | None = None

    @property
    def host(self) -> ScreenHost:
        """The app, as screens see it."""
        return cast(ScreenHost, self.app)

    # -- for subclasses ----------------------------------------------------------------------------------------

    @property
    def title_text(self) -> str:
        """The name of the screen in the breadcrumb."""
        return type(self).__name__

    def panes(self) -> ComposeResult:
        """The widgets between breadcrumb and filter line; subclasses add them."""
        return ()

    def rows_of(self, kind: str, model: RelayModel) -> Iterable[RowView]:
        """The rows for one of the screen's tables."""
        return model.rows(TOPIC_OF.get(kind, kind))

    def redraw_panes(self, model: RelayModel, now: float) -> None:
        """Redraw the panes that are not tables."""

    def entered(self, view: RowView) -> None:
        """React to Enter on a row."""

    # -- drawing -----------------------------------------------------------------------------------------------

    def compose(self) -> ComposeResult:
        """Lay out the lines and panes from top to bottom."""
        yield StatusLine(id="status")
        yield CrumbLine(id="crumbs")
        yield from self.panes()
        filter_line = Input(id="filter", placeholder="regular expression; ! in front inverts", compact=True)
        filter_line.cursor_blink = False  # a blinking cursor would send bytes twice a second
        yield filter_line
        yield KeyLine(id="keys")

    def on_mount(self) -> None:
        """Focus the first table."""
        for table in self.query(RowTable):
            table.focus()
            break

    def on_screen_resume(self) -> None:
        """Redraw, because the screen may be out of date when it is shown again."""
        self.call_after_refresh(self.redraw)

    def on_resize(self) -> None:
        """Redraw once the widgets know their new sizes."""
        self.call_after_refresh(self.redraw)

    @property
    def table(self) -> RowTable | None:
        """The focused table, else the one focused last, else the first."""
        if isinstance(self.focused, RowTable):
            self._table = self.focused
        tables = list(self.query(RowTable))
        return self._table if self._table in tables else tables[0] if tables else None

    def redraw(self) -> None:
        """Draw the current model."""
        if not self.is_mounted or not self.is_attached:
            return
        app = self.host
        model, now = app.shown, app.now_shown
        why = formatting.plain(app.model.link.why)
        for table in self.query(RowTable):
            table.why, why = why, ""  # only the first table shows it; the status line may have no room
            if table.size.width:
                stale, known = model.known and not app.model.link.up, model.known
                version = (
                    model,
                    model.versions.get(TOPIC_OF.get(table.kind, table.kind)),
                    table.size,
                    self.title_text,
                )
                if version == table.seen:
                    table.look_again(now, stale=stale, known=known)
                else:
                    table.seen = version
                    views = self.rows_of(table.kind, model)
                    moving = model.positions if TOPIC_OF.get(table.kind, table.kind) == "requests" else ()
                    table.update(views, now, stale=stale, known=known, moving=moving)
        self.redraw_panes(model, now)
        self.redraw_lines()

    def redraw_lines(self) -> None:
        """Redraw the lines around the panes."""
        if not self.is_mounted:
            return
        app = self.host
        link = app.model if not app.model.link.up else app.shown
        self.query_one(StatusLine).set_parts(status(link, app.clock()))
        self.query_one(CrumbLine).set_parts(self._crumbs())
        self.query_one(KeyLine).set_parts([(0, [app.notice])] if app.notice[0] else self._keys())

    def _crumbs(self) -> list[Part]:
        app = self.host
        trail = [screen.title_text for screen in self.app.screen_stack if isinstance(screen, RelayScreen)]
        parts: list[Part] = [(0, [(f" {state_glyphs.CRUMB} ".join(["relay", *trail]), "title")])]
        if app.readonly:
            parts.append((3, [("read-only", "warn")]))
        if app.frozen_at is not None:
            parts.append((1, [(f"frozen {formatting.age(app.clock() - app.frozen_at)}", "warn")]))
        if app.rate != 1:
            parts.append((6, [(f"{app.rate:g} Hz", "dim")]))
        if (table := self.table) is not None:
            parts.append((4, [(table.place, "dim")]))
            if table.sorted_by is not None or table.order.reverse:
                name = table.sorted_by.title if table.sorted_by is not None else "order"
                parts.append((6, [(f"by {name}{', reversed' if table.order.reverse else ''}", "dim")]))
            if table.following and table.view is not None:
                followed = "" if table.tail else f" {formatting.short_id(formatting.plain(table.view.key))}"
                parts.append((3, [(f"following{followed}", "accent")]))
            if table.tagged:
                parts.append((2, [(f"{len(table.tagged)} tagged", "accent")]))
            wanted = table.order.filter
            if wanted.fault:
                parts.append((1, [(f"filter: {wanted.fault}", "bad")]))
            elif wanted.text:
                parts.append((1, [(f"filter /{wanted.text}", "warn")]))
        return parts

    def _keys(self) -> list[Part]:
        if self.query_one("#filter", Input).has_focus:
            return [
                (0, [("enter", "accent"), (" keep  ", "dim"), ("esc", "accent"), (" off  ! in front inverts", "dim")])
            ]
        shown = [(binding, key) for binding, key in self.offered() if binding.show]
        shown.sort(key=lambda one: _rank(one[0]))
        parts: list[Part] = []
        for at, (binding, key) in enumerate(shown):
            pieces: list[Piece] = [(key, "accent"), (f" {binding.description}", "dim")]
            parts.append((0 if binding.action in ("help", "quit") else at + 1, pieces))
        return parts

    def offered(self) -> list[tuple[Binding, str]]:
        """The keys that do something on this screen, with their displayed names."""
        return [
            (binding, self.app.get_key_display(binding))
            for _, binding, enabled, _ in self.active_bindings.values()
            if enabled and binding.description and _is_ours(binding, self.host.readonly) and not self._refuses(binding)
        ]

    def _refuses(self, binding: Binding) -> bool:
        """Whether a key would only say why it does nothing, as an action on what has ended."""
        views = self._acted_on(binding.id) if binding.id in ACTIONS else None
        return bool(views) and isinstance(ACTIONS[str(binding.id)].plan(views or ()), str)

    # -- keys --------------------------------------------------------------------------------------------------

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Hide keys that do nothing on this screen."""
        if action == "act":
            return self._acted_on(str(parameters[0])) is not None
        if action in ("filter", "copy", "export"):
            return self.table is not None
        return True

    def _acted_on(self, name: str) -> list[RowView] | None:
        """The rows that an action would apply to now; None if it does not apply to this screen."""
        table = self.table
        if table is not None and TOPIC_OF.get(table.kind, table.kind) in ACTIONS[name].topics:
            return table.chosen
        return None

    def action_act(self, name: str) -> None:
        """Plan an action for the ids under the cursor at the key press, ask if it is destructive, and carry it out."""
        app = self.host
        if app.readonly:
            app.show_notice("this is read-only; start relay-tui without --readonly to steer", "warn")
            return
        views = self._acted_on(name)
        if not views:
            app.show_notice("there is nothing under the cursor", "warn")
            return
        plan = ACTIONS[name].plan(views)
        if isinstance(plan, str):
            app.show_notice(plan, "warn")
        elif plan.question:
            self.app.push_screen(ConfirmDialog(plan.question, plan.names), partial(self._confirmed, plan))
        else:
            self._do(plan)

    def _confirmed(self, plan: Plan, yes: bool | None) -> None:
        if yes:
            self._do(plan)
        else:
            self.host.show_notice("nothing was done", "dim")

    def _do(self, plan: Plan) -> None:
        self.host.carry_out(plan)
        if (table := self.table) is not None and table.tagged:
            table.untag()

    def action_filter(self) -> None:
        """Open the filter line."""
        line = self.query_one("#filter", Input)
        if (table := self.table) is not None:
            with line.prevent(Input.Changed):
                line.value = table.order.filter.text
        line.add_class("on")
        line.focus()
        self.call_after_refresh(self.redraw_lines)

    @on(Input.Changed, "#filter")
    def _filter_typed(self, event: Input.Changed) -> None:
        if (table := self.table) is not None:
            wanted = Filter.of(event.value)
            table.filter_by(wanted if not wanted.fault else Filter(event.value, wanted.fault))
            self.redraw()

    @on(Input.Submitted, "#filter")
    def _filter_done(self) -> None:
        self._leave_filter()

    def filter_by(self, text: str) -> None:
        """Apply a filter, as if it had been typed."""
        line = self.query_one("#filter", Input)
        with line.prevent(Input.Changed):
            line.value = text
        if (table := self.table) is not None:
            table.filter_by(Filter.of(text))
        self._leave_filter()

    def _leave_filter(self) -> None:
        line = self.query_one("#filter", Input)
        line.set_class(bool(line.value), "on")
        if (table := self.table) is not None:
            table.focus()
        self.redraw()

    def action_copy(self) -> None:
        """Copy the ids to the clipboard of the operator's own machine (OSC 52)."""
        table = self.table
        if table is not None and table.chosen:
            ids = [view.key for view in table.chosen]
            self.app.copy_to_clipboard("\n".join(ids))
            self.host.show_notice(f"copied {formatting.plain(ids[0]) if len(ids) == 1 else f'{len(ids)} ids'}", "good")

    def action_export(self) -> None:
        """Write the visible rows to a file."""
        table = self.table
        if table is not None:
            views: Sequence[RowView] = tuple(table.views)
            self.app.push_screen(ExportDialog(table.kind, views), self._exported)

    def _exported(self, notice: tuple[str, str] | None) -> None:
        if notice is not None:
            self.host.show_notice(*notice)

    def action_log(self) -> None:
        """Show the log lines that mention the row under the cursor."""
        view = self.table.view if self.table is not None else None
        if view is not None and view.topic not in ("log", "audit"):
            self.host.show_log(view.text("name") if view.topic == "workers" else view.key)

    def action_zoom(self) -> None:
        """Give one pane the whole screen, or restore the layout."""
        pane: Widget | None = self.focused if self.focused and self.focused.has_class("pane") else self.table
        zoomed = not self.has_class("zoomed")
        self.set_class(zoomed, "zoomed")
        for one in self.query(".pane"):
            one.set_class(zoomed and one is pane, "zoomed")
        self.call_after_refresh(self.redraw)

    def action_back(self) -> None:
        """Leave the filter, the zoom or the tags, in this order; otherwise go back one screen."""
        line, table = self.query_one("#filter", Input), self.table
        if line.value or line.has_focus:
            line.value = ""
            self._leave_filter()
        elif self.has_class("zoomed"):
            self.action_zoom()
        elif table is not None and table.tagged:
            table.untag()
        elif len([one for one in self.app.screen_stack if isinstance(one, RelayScreen)]) > 1:
            self.app.pop_screen()

    @on(RowTable.Changed)
    def _table_changed(self) -> None:
        self.redraw_lines()

    @on(RowTable.Entered)
    def _entered(self, event: RowTable.Entered) -> None:
        self.entered(event.view)


#: The most important keys come first in the key line and are dropped last.
_FIRST = ("enter", "act", "filter", "jump", "sort", "help", "quit")


def _rank(binding: Binding) -> int:
    action = binding.action.partition("(")[0]
    return _FIRST.index(action) if action in _FIRST else len(_FIRST)


def _is_ours(binding: Binding, readonly: bool) -> bool:
    """Whether a key is worth showing: not one of Textual's own, and not an action while read-only."""
    if binding.action.startswith(("app.", "screen.", "command_palette")) or binding.key in ("ctrl+q", "super+c"):
        return False
    return not (readonly and binding.action.startswith("act("))
