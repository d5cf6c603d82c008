"""The Textual app: it owns the relay model and the feed, handles the global keys and decides when to redraw."""

import asyncio
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar

from rich.color import ColorSystem
from textual._compositor import CompositorUpdate
from textual.app import App, ScreenStackError
from textual.binding import Binding, BindingType
from textual.driver import Driver
from textual.filter import LineFilter
from textual.message import Message
from textual.screen import Screen
from textual.timer import Timer
from textual.widgets import Input

from protocol.wire.messages import Done, Rejected
from tui.model.actions import Plan
from tui.model.failures import Failures
from tui.model.feed import Ask, Feed, Listen, Source
from tui.model.formatting import plain, short_id
from tui.model.relay_model import RelayModel, RowView
from tui.model.row_filter import searchable_text
from tui.screens import tables
from tui.screens.base import RelayScreen
from tui.screens.dialogs import HelpDialog, JumpDialog
from tui.terminal.cell_buffer import CellBuffer
from tui.terminal.exit_guard import EXIT_OF, ExitGuard
from tui.terminal.trio_bridge import Bridge
from tui.themes import themes
from tui.widgets.cell_widget import Piece

#: Redraw rates that the operator can choose from, in draws a second.
RATES = (0.2, 0.5, 1.0, 2.0, 4.0)
#: How long a notice stays in the last line.
NOTICE_S = 8.0
#: Textual repaints two or three times for one key; what comes within this time is sent together.
TOGETHER_S = 0.03
#: How long to wait before looking again whether the terminal keeps up.
BEHIND_S = 0.05
#: Short enough to feel immediate, long enough to combine changes that arrive together into one draw.
SOON_S = 0.05
#: Steps of an action that wait for their answers at a time; more would fill the queue to the relay.
MAX_TOGETHER = 50
MAX_FOUND = 50
SCREENS_BY_NAME: dict[str, type[tables.TableScreen]] = {
    "overview": tables.Overview,
    "spaces": tables.Spaces,
    "workers": tables.Workers,
    "requests": tables.Requests,
    "queue": tables.Queue,
    "clients": tables.Clients,
    "log": tables.Log,
    "audit": tables.Audit,
    "talks": tables.Talks,
}


class RelayTui(App[int]):
    """The operator's screen.

    Args:
        source: a relay, or a simulation of one.
        readonly: show that steering is not offered; the relay itself enforces it.
        theme: a name that `choose_theme` accepts.
        ascii_only: draw with ASCII characters only.
        rate: draws a second, one of `RATES`.
        clock: monotonic seconds.

    Attributes:
        model: the current state of the relay.
        frozen_at: when the operator froze the screen, or None.
        rate: draws a second.
        notice: text shown in the last line instead of the keys.
        space: the space whose queue was shown last.
        failures: what fails, in groups.
    """

    CSS_PATH = "themes/theme.tcss"
    ENABLE_COMMAND_PALETTE = False
    MODES: ClassVar[dict[str, str | Callable[[], Screen[Any]]]] = {**SCREENS_BY_NAME}
    DEFAULT_MODE = "overview"
    BINDINGS: ClassVar[list[BindingType]] = [
        *(
            Binding(str(number), f"go('{name}')", name.capitalize(), show=False)
            for number, name in enumerate(SCREENS_BY_NAME, 1)
        ),
        Binding("question_mark", "help", "Help", key_display="?"),
        Binding("f1", "help", "Help", show=False, key_display="F1"),
        Binding("q", "quit", "Quit"),
        Binding("colon", "jump", "Jump", key_display=":"),
        Binding("e", "wrong", "What is wrong", show=False),
        Binding("p", "freeze", "Freeze"),
        Binding("plus,equals_sign", "rate(1)", "Draw more often", show=False, key_display="+"),
        Binding("minus", "rate(-1)", "Draw less often", show=False, key_display="-"),
        Binding("ctrl+l", "repaint", "Draw everything again", show=False),
        Binding("ctrl+z", "suspend_process", "To the shell; fg returns", show=False),
        Binding("ctrl+c", "interrupt", "Quit", show=False, priority=True),
    ]

    class Moved(Message):
        """The model has changed; Textual combines several of these messages into one."""

        def can_replace(self, message: Message) -> bool:
            """Let a newer `Moved` replace one that is still waiting."""
            return isinstance(message, RelayTui.Moved)

    def __init__(
        self,
        source: Source,
        *,
        readonly: bool = False,
        theme: str = "auto",
        ascii_only: bool = False,
        rate: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        driver_class: type[Driver] | None = None,
    ) -> None:
        # Choose first: Textual removes NO_COLOR from the environment.
        self._look = themes.choose_theme(os.environ, theme)
        self._ascii_only = ascii_only
        super().__init__(driver_class=driver_class)
        themes.install(self, self._look)
        self.clock = clock
        self.readonly = readonly
        self.model = RelayModel()
        self.frozen_at: float | None = None
        self.rate = rate
        self.notice: Piece = ("", "")
        self.space: str | None = None
        self.failures = Failures()
        self.ending = ExitGuard()
        self._frozen: RelayModel | None = None
        self._feed = Feed(source, self.model, self._moved, clock=lambda: self.clock())
        self._bridge = Bridge()
        self._ticker: Timer | None = None
        self._soon: Timer | None = None
        self._notice_timer: Timer | None = None
        self._drawn_known = (False, False)
        self._sending: asyncio.TimerHandle | None = None

    # -- beginning and end -------------------------------------------------------------------------------------

    def get_line_filters(self) -> Sequence[LineFilter]:
        """Remove colours, and replace glyphs by ASCII, where the operator asked for it."""
        return themes.filters(super().get_line_filters(), self._look, ascii_only=self._ascii_only)

    def on_mount(self) -> None:
        """Start to follow the relay."""
        self.ending.watch(asyncio.get_running_loop(), self._end)
        self._ticker = self.set_interval(1 / self.rate, self.draw)
        self._bridge.start(self._feed.run, self._on_feed_error)

    def _on_feed_error(self, fault: BaseException) -> None:
        if isinstance(fault, Exception):
            self._handle_exception(fault)
        else:
            self._end(1)

    def _end(self, code: int) -> None:
        self.ending.begin(code)
        self.exit(code)

    async def close(self) -> None:
        """Disconnect from the relay, after Textual has ended and restored the terminal."""
        await self._bridge.stop()

    def action_interrupt(self) -> None:
        """Exit at Ctrl+C, which arrives as a key in raw mode."""
        self._end(EXIT_OF["SIGINT"])

    async def action_quit(self) -> None:
        """Exit."""
        self._end(0)

    # -- drawing -----------------------------------------------------------------------------------------------

    @property
    def shown(self) -> RelayModel:
        """The model on the screen: the current one, or the copy taken when the screen was frozen."""
        return self._frozen or self.model

    @property
    def now_shown(self) -> float:
        """The time that ages are shown for; it stops when the screen is frozen or the link is lost."""
        link = self.model.link
        now = self.clock() if link.up or not self.model.known else link.since
        return now if self.frozen_at is None else min(now, self.frozen_at)

    def _moved(self) -> None:
        """Note a change reported by the feed; the next tick draws it, a change of the link is drawn at once."""
        known = (self.model.known, self.model.link.up)
        if known != self._drawn_known:
            self._drawn_known = known
            self.draw_soon()

    def draw_soon(self) -> None:
        """Draw without waiting for the next tick; Trio calls this too, so it only posts a message."""
        if self.is_running:
            self.post_message(self.Moved())

    def on_relay_tui_moved(self) -> None:
        """Draw once for all changes that arrive together."""
        if self._soon is None:
            self._soon = self.set_timer(SOON_S, self._draw_now)

    def _draw_now(self) -> None:
        self._soon = None
        self.draw()

    def draw(self) -> None:
        """Bring the screen up to date."""
        if not self.is_running:
            return  # it is shutting down: a tick of the clock may find a screen without its widgets
        if isinstance(screen := self._on_top, RelayScreen):
            screen.redraw()

    @property
    def _on_top(self) -> Screen[Any] | None:
        """The screen on top of the stack; None while the app is shutting down."""
        with suppress(ScreenStackError):
            return self.screen
        return None

    def _display(self, screen: Screen[object], renderable: object) -> None:
        """Paint an update into the cells of the terminal; Textual passes every update through here."""
        cells = self._cells
        if cells is None or not isinstance(renderable, CompositorUpdate) or self._batch_count or self._closed:
            super()._display(screen, renderable)  # type: ignore[arg-type]
            return
        cells.resize(*self.size)
        cells.paint(renderable, self.console._color_system or ColorSystem.TRUECOLOR)
        self._send_soon(TOGETHER_S)

    @property
    def _cells(self) -> CellBuffer | None:
        """What the terminal shows and is to show; None in a test without a terminal."""
        return getattr(self._driver, "cells", None)

    @property
    def sending(self) -> bool:
        """Whether something is to be sent to the terminal in a moment."""
        return self._sending is not None

    def _send_soon(self, seconds: float) -> None:
        if self._sending is None:
            self._sending = asyncio.get_running_loop().call_later(seconds, self._send)

    def _send(self) -> None:
        """Send the difference; while the terminal does not keep up, wait, and send fewer and larger ones."""
        self._sending = None
        driver, cells = self._driver, self._cells
        if driver is None or cells is None or not self._running or self._closed:
            return
        if getattr(driver, "behind", False):
            self._send_soon(BEHIND_S)
            return
        cursor = self.cursor_position if isinstance(self.focused, Input) else None
        if text := cells.difference(cursor):
            self._begin_update()
            driver.write(text)
            self._end_update()
            driver.flush()

    def action_repaint(self) -> None:
        """Draw everything again, over whatever another program has written into the picture."""
        if (cells := self._cells) is not None:
            cells.forget()
            self._send_soon(0)

    def show_notice(self, text: str, token: str = "") -> None:
        """Show a notice in the last line for a while."""
        self.notice = (text, token)
        if self._notice_timer is not None:
            self._notice_timer.stop()
        self._notice_timer = self.set_timer(NOTICE_S, self._clear_notice)
        self._lines()

    def _clear_notice(self) -> None:
        self.notice = ("", "")
        self._lines()

    def _lines(self) -> None:
        screen = self._on_top
        if isinstance(screen, RelayScreen):
            screen.redraw_lines()

    # -- steering ----------------------------------------------------------------------------------------------

    def ask(self, ask: Ask | Listen) -> None:
        """Queue a command for the feed."""
        if not self._feed.ask(ask):
            self.show_notice("too many actions are waiting already; try again in a moment", "bad")

    def carry_out(self, plan: Plan) -> None:
        """Send every step of a plan to the relay, and show the outcome."""
        answers: list[tuple[str, Done | Rejected]] = []

        def answered(target: str, answer: Done | Rejected) -> None:
            answers.append((target, answer))
            ask_next()
            if len(answers) == len(plan.steps):
                # Called from Trio code: pass the result to the screen as a message.
                self.call_later(self.show_notice, *_outcome(plan, answers))

        left = iter(plan.steps)

        def ask_next() -> None:
            if (step := next(left, None)) is not None:
                self.ask(Ask(*step, partial(answered, step[1])))

        self.show_notice("...", "dim")
        for _ in range(MAX_TOGETHER):
            ask_next()

    # -- keys --------------------------------------------------------------------------------------------------

    def action_go(self, name: str) -> None:
        """Switch to a screen; if it is current already, go back to its first level."""
        stack = [screen for screen in self.screen_stack if isinstance(screen, RelayScreen)]
        if name == self.current_mode:
            for _ in stack[1:]:
                self.pop_screen()
        else:
            self.switch_mode(name)

    def action_wrong(self) -> None:
        """Show what fails."""
        if isinstance(self._on_top, RelayScreen) and not isinstance(self._on_top, tables.Wrong):
            self.push_screen(tables.Wrong())

    def show_log(self, name: str) -> None:
        """Switch to the log, filtered by a name."""
        self.action_go("log")
        self.call_after_refresh(self._filter_log, name)

    def _filter_log(self, name: str) -> None:
        if isinstance(screen := self._on_top, RelayScreen):
            screen.filter_by(re.escape(name))

    def action_freeze(self) -> None:
        """Freeze the screen, or let it continue."""
        if self.frozen_at is None:
            self._frozen, self.frozen_at = self.model.frozen(), self.clock()
        else:
            self._frozen = self.frozen_at = None
        self.draw()

    def action_rate(self, step: int) -> None:
        """Draw more or less often."""
        at = max(0, min(len(RATES) - 1, RATES.index(self.rate) + step))
        self.rate = RATES[at]
        if self._ticker is not None:
            self._ticker.stop()
        self._ticker = self.set_interval(1 / self.rate, self.draw)
        self.show_notice(f"drawn {self.rate:g} times a second", "dim")

    def action_help(self) -> None:
        """Show the keys of the current screen."""
        screen, keys = self._on_top, dict[str, list[str]]()
        if isinstance(screen, RelayScreen):
            for binding, key in screen.offered():
                keys.setdefault(binding.description, []).append(key)
            lines = [(" ".join(dict.fromkeys(shown)), what) for what, shown in keys.items()]
            self.push_screen(HelpDialog(screen.title_text, lines))

    def action_jump(self) -> None:
        """Ask for a name and jump to what bears it."""
        self.push_screen(JumpDialog(self._find), self._jump)

    def _find(self, text: str) -> list[tuple[str, str]]:
        wanted = text.lower().strip()
        found = [(f"screen/{name}", name) for name in SCREENS_BY_NAME if wanted in name]
        for topic in ("spaces", "workers", "requests", "talks", "clients"):
            word = topic[:-1]
            for view in self.model.rows(topic):
                if wanted and wanted not in searchable_text(view).lower():
                    continue
                found.append((f"{topic}/{view.key}", f"{word} {_described(view)}"))
                if len(found) > MAX_FOUND:
                    break
        # Names that begin with the text come before names that only contain it.
        found.sort(key=lambda one: not one[0].partition("/")[2].lower().startswith(wanted))
        return found[:MAX_FOUND]

    def _jump(self, place: str | None) -> None:
        topic, _, key = (place or "").partition("/")
        if topic == "screen":
            self.action_go(key)
        elif topic:
            self.action_go(topic)
            self.call_after_refresh(self._show, topic, key)

    def _show(self, topic: str, key: str) -> None:
        screen = self.screen
        if isinstance(screen, RelayScreen) and (table := screen.table) is not None:
            screen.redraw()
            if not table.show(key) and table.order.filter.text:
                screen.filter_by("")  # what is jumped to is wanted more than the filter that hides it
            if not table.show(key):
                self.show_notice(f"{short_id(plain(key))} is not there any more", "warn")


def _described(view: RowView) -> str:
    parts = [view.text("name") or view.key, view.text("principal"), view.text("state")]
    return plain("  ".join(word for word in parts if word))


def _outcome(plan: Plan, answers: Sequence[tuple[str, Done | Rejected]]) -> Piece:
    refused = [(target, answer) for target, answer in answers if isinstance(answer, Rejected)]
    if not refused:
        return (plan.done, "good")
    target, refusal = refused[0]
    why = f"{refusal.code}: {refusal.message}"
    if len(answers) == 1:
        return (f"not done: {plain(why)}", "bad")
    return (f"{len(refused)} of {len(answers)} not done; {plain(short_id(target))}: {plain(why)}", "bad")
