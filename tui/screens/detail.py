"""The detail screens: every field of a row, and for a request its timeline and audio level."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from rich.cells import chop_cells
from textual.app import ComposeResult
from textual.binding import Binding, BindingType

from protocol.wire.messages import Done, Rejected
from protocol.wire.validators import Value
from tui.model import formatting, state_glyphs
from tui.model.actions import ACTIONS, name_of
from tui.model.cells import LIVE
from tui.model.feed import Ask, Listen
from tui.model.formatting import fit, plain
from tui.model.relay_model import RelayModel, RowView
from tui.model.state_glyphs import Kind
from tui.model.waiting import why
from tui.screens.base import RelayScreen
from tui.widgets.cell_widget import Piece
from tui.widgets.facts import Facts

LABEL = 14
LEVEL_CELLS = 24
#: Speech is never louder than this on average.
FULL_LEVEL = 0.35
_KINDS: dict[str, Kind] = {"requests": "request", "workers": "worker", "spaces": "space", "relay": "relay"}
Lines = list[list[Piece]]


class RowDetail(RelayScreen):
    """Shows every field of a row.

    Args:
        topic: the topic of the row.
        key: its id.
    """

    def __init__(self, topic: str, key: str) -> None:
        super().__init__()
        self.topic = topic
        self.key = key
        self._last: RowView | None = None

    @property
    def title_text(self) -> str:
        """The name of the row as people know it; its id until the row has been received."""
        return name_of(self._last) if self._last is not None else formatting.short_id(plain(self.key))

    def panes(self) -> ComposeResult:
        """One scrollable pane with the facts."""
        yield Facts()

    def on_mount(self) -> None:
        """Focus the facts, so that they can be scrolled."""
        self.query_one(Facts).focus()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer only actions that apply to the row itself."""
        return True if action == "copy" else super().check_action(action, parameters)

    def _acted_on(self, name: str) -> list[RowView] | None:
        if self._last is None or self.topic not in ACTIONS[name].topics:
            return None
        return [self._last]

    def action_copy(self) -> None:
        """Copy the id of the row."""
        self.app.copy_to_clipboard(self.key)
        self.host.show_notice(f"copied {plain(self.key)}", "good")

    def redraw_panes(self, model: RelayModel, now: float) -> None:
        """Draw the facts again."""
        view = model.get(self.topic, self.key)
        lines: Lines = []
        if view is None and model.known:
            lines = [[("gone: the relay no longer knows it; this is its last known state", "warn")], []]
        self._last = view or self._last
        if self._last is not None:
            lines += self.facts(self._last, now)
        self.query_one(Facts).show(lines)

    def facts(self, view: RowView, now: float) -> Lines:
        """The lines to show for the row."""
        return [_fact(name, view.now(name, now)) for name in view.row]


class RequestDetail(RowDetail):
    """Shows a request: its state, timeline, params, inputs and error, and its audio level while listening in."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("l", "listen", "Listen in")]

    def __init__(self, request_id: str) -> None:
        super().__init__("requests", request_id)
        self._asked_of: RowView | None = None
        self._told: Mapping[str, Value] = {}
        self._refused = ""
        self._listening = False
        self._level: float | None = None

    def on_unmount(self) -> None:
        """Stop measuring the audio."""
        if self._listening:
            self.host.ask(Listen(None))

    def redraw_panes(self, model: RelayModel, now: float) -> None:
        """Draw the facts again; ask for the description again if the row has changed, at most once a draw."""
        view = model.get(self.topic, self.key)
        if view is not None and view is not self._asked_of and self.host.model.link.up:
            before, self._asked_of = self._asked_of, view
            if before is None or _marks(before) != _marks(view):
                self.host.ask(Ask("describe", self.key, self._described))
        # A level that is no longer updated would be misleading.
        over = view is not None and view.text("state") not in LIVE
        if self._listening and (over or not self.host.model.link.up):
            self.action_listen()
        super().redraw_panes(model, now)

    def _described(self, answer: Done | Rejected) -> None:
        if isinstance(answer, Done):
            self._told, self._refused = answer.data, ""
        else:
            self._refused = answer.message
        self.host.draw_soon()

    def action_listen(self) -> None:
        """Start or stop listening in; the audio is measured once a second but not played."""
        view = self._last
        if not self._listening and (view is None or view.text("state") != "running"):
            self.host.show_notice("only a running request can be listened to", "warn")
            return
        self._listening = not self._listening
        self._level = None
        if self._listening and view is not None:
            self.host.ask(Listen(self.key, int(view.number("frames") or 0) - 1, self._on_level))
        else:
            self.host.ask(Listen(None))
        self.redraw()

    def _on_level(self, level: float) -> None:
        if self._listening:
            self._level = level
            self.host.draw_soon()

    def facts(self, view: RowView, now: float) -> Lines:
        """The lines for state, timing, params, inputs, error and timeline."""
        lines: Lines = [self._headline(view, now)]
        if self._listening:
            level = "listening" if self._level is None else formatting.bar(self._level / FULL_LEVEL, LEVEL_CELLS)
            lines.append([_label("listen-in"), (level, "accent")])
        if view.text("code"):
            lines += _texts("error", f"{view.text('code')}: {view.text('message')}", "bad", self.size.width)
            lines += self._maps("details", self._told.get("details"))
        lines += [
            _fact(title, view.now(name, now))
            for title, name in (
                ("id", "request_id"),
                ("principal", "principal"),
                ("space", "space"),
                ("attempt", "attempt"),
                ("priority", "priority"),
                ("readers", "readers"),
            )
            if view.row.get(name) is not None
        ]
        if worker_id := view.text("worker_id"):
            name = view.text("worker")
            id_text = f"  {plain(worker_id)}" if name else plain(worker_id)
            lines.append([_label("worker"), (plain(name), ""), (id_text, "dim")])
        if view.position is not None:
            lines += _texts("waits", why(view, now), "", self.size.width)
        if isinstance(group := self._told.get("group"), str) and group:
            lines.append([_label("group"), (plain(group), "")])
        lines.append([_label("output"), (self._output(view), "")])
        lines += self._timeline(view.model)
        if isinstance(report := self._told.get("report"), str) and report:
            lines += _texts("output", report, "dim", self.size.width)
        lines += self._maps("params", self._told.get("params"))
        inputs, fed = self._told.get("inputs"), view.row.get("inputs")
        for one in inputs if isinstance(inputs, list) else []:
            if isinstance(one, dict):
                how = fed.get(one.get("name")) if isinstance(fed, dict) else None
                text = _fed(how) if isinstance(how, dict) else _size(one.get("size"))
                lines.append([_label("input"), (plain(f"{one.get('name')} {one.get('media_type')} {text}"), "")])
        if self._refused:
            lines.append([(f"no details available: {plain(self._refused)}", "dim")])
        return lines

    def _headline(self, view: RowView, now: float) -> list[Piece]:
        state = view.text("state")
        age = view.aged("age_s", now)
        token = state_glyphs.look("request", state).token
        line: list[Piece] = [_label("state"), (state_glyphs.mark("request", state), token)]
        if age is not None:
            line.append((f"  {'for' if state in LIVE else 'took'} {formatting.age(age)}", ""))
        fraction = view.number("fraction")
        if state == "running" and fraction is not None:
            line.append((f"  {formatting.bar(fraction, 12)} {fraction:.0%}", "busy"))
        return line

    def _output(self, view: RowView) -> str:
        audio, size, frames = view.number("audio_s"), view.number("bytes") or 0, view.number("frames") or 0
        audio_text = f"{audio:.1f} s of audio, " if audio is not None else ""
        first = view.number("first_frame_s")
        after = f", the first after {formatting.seconds(first)}" if first is not None else ""
        return f"{audio_text}{frames:.0f} frames, {formatting.size(size)}{after}"

    def _timeline(self, model: RelayModel) -> Lines:
        timeline = self._told.get("timeline")
        lines: Lines = []
        for event in timeline if isinstance(timeline, list) else []:
            if isinstance(event, dict):
                at = event.get("at_s")
                when = f"+{at:.2f} s" if isinstance(at, int | float) else ""
                rest = " ".join(
                    _said(model, key, value) for key, value in event.items() if key not in ("at_s", "event")
                )
                lines.append(
                    [
                        _label("" if lines else "timeline"),
                        (f"{when:>11}  ", "dim"),
                        (plain(f"{event.get('event', '')} "), ""),
                        (plain(rest), "dim"),
                    ]
                )
        return lines

    def _maps(self, title: str, value: Any) -> Lines:
        if not isinstance(value, dict) or not value:
            return []
        text = json.dumps(value, ensure_ascii=False, indent=1, default=str)
        return _texts(title, text, "", self.size.width)


def _marks(view: RowView) -> tuple[object, ...]:
    """The fields on which the timeline depends."""
    names = ("state", "attempt", "worker_id", "stopping", "code")
    return (*(view.row.get(name) for name in names), view.row.get("first_frame_s") is None)


def _said(model: RelayModel, key: str, value: Any) -> str:
    if key == "worker_id":
        worker = model.get("workers", str(value))
        return f"worker={(worker.text('name') if worker is not None else '') or value}"
    return f"{key}={value}"


def _fed(how: Mapping[str, Value]) -> str:
    """How much there is of an input that is fed, and how it comes: `12 kB, 1.2 kB/s, the latest 3 s ago`."""
    parts = [_size(how.get("bytes"))]
    if isinstance(source := how.get("from"), str):
        parts.insert(0, f"from {source}")
    if how.get("ended"):
        parts.append("ended")
    else:
        rate, age_s = how.get("bytes_s"), how.get("age_s")
        parts.append(formatting.rate(rate) if isinstance(rate, int | float) else "")
        parts.append(f"the latest {formatting.age(age_s)} ago" if isinstance(age_s, int | float) else "")
    return ", ".join(part for part in parts if part)


def _size(value: Value) -> str:
    return formatting.size(value) if isinstance(value, int | float) else ""


def _label(title: str) -> Piece:
    return (fit(title, LABEL), "dim")


def _fact(name: str, value: Value) -> list[Piece]:
    if isinstance(value, float):
        text = f"{value:.1f}"
    elif isinstance(value, str):
        text = value
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        text = ", ".join(map(str, value))
    else:
        text = state_glyphs.NOTHING if value is None else str(value)
    return [(fit(plain(name), max(LABEL, len(name) + 1)), "dim"), (plain(text), "")]


def _texts(title: str, text: str, token: str, width: int) -> Lines:
    lines: Lines = []
    room = max(20, width - LABEL - 2)
    for paragraph in text.splitlines():
        for line in textwrap.wrap(plain(paragraph), room, drop_whitespace=False) or [""]:
            for part in chop_cells(line, room) or [""]:  # a character may be two cells wide
                lines.append([_label("" if lines else title), (part, token)])
    return lines
