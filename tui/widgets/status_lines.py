"""The lines around a table: relay status, breadcrumb, keys, and the rates of the last minute."""

from collections.abc import Sequence

from rich.cells import cell_len

from tui.model import formatting, state_glyphs
from tui.model.failures import summary
from tui.model.relay_model import HISTORY_S, RelayModel, RowView
from tui.widgets.cell_widget import CellWidget, Piece

#: A piece of a line with its importance; parts with 0 are dropped last.
Part = tuple[int, list[Piece]]
GAP = "  "


def fitted(parts: Sequence[Part], width: int) -> list[Piece]:
    """Join the parts with gaps, leaving out the least important ones until they fit."""
    there = [part for part in parts if part[1]]
    left, kept = width + len(GAP), set[int]()
    # The most important first; a smaller one takes the room that a larger one could not use.
    for at in sorted(range(len(there)), key=lambda at: (there[at][0], at)):
        cells = _width(there[at]) + len(GAP)
        if cells <= left or not kept:
            kept.add(at)
            left -= cells
    pieces: list[Piece] = []
    for _, part in (there[at] for at in sorted(kept)):
        pieces += [(GAP, "")] if pieces else []
        pieces += part
    return pieces


def _width(part: Part) -> int:
    return sum(cell_len(text) for text, _ in part[1])


class OneLine(CellWidget):
    """One line of pieces."""

    DEFAULT_CSS = """
    OneLine { height: 1; }
    """

    def set_parts(self, parts: Sequence[Part]) -> None:
        """Show as many of the parts as fit."""
        if self.size.width:
            self.draw([self.line_of(fitted(parts, self.size.width))])


class StatusLine(OneLine):
    """The state of the relay in one line."""


class CrumbLine(OneLine):
    """Which screen this is, and which rows are visible."""


class KeyLine(OneLine):
    """The keys that can be used, or the notice of the last action."""


def status(model: RelayModel, now: float) -> list[Part]:
    """The parts of the status line: state, load, speed, errors and problems."""
    relay = model.relay
    if relay is None:
        return [_link(model, now) or (0, [("connecting", "dim")])]
    row, parts = relay, []
    state = state_glyphs.look("relay", relay.text("state"))
    lost = _link(model, now)
    parts.append(lost or (0, [(state_glyphs.mark("relay", relay.text("state")), state.token)]))
    up_s = relay.aged("uptime_s", now) or 0.0
    # In whole minutes: seconds would send bytes every second for nothing.
    up = "<1m" if up_s < 60 else f"{up_s // 60:.0f}m" if up_s < formatting.HOUR_S else formatting.age(up_s)
    parts.append((6, [("up ", "dim"), (up, "")]))
    trouble = sum(worker.text("state") in ("stale", "away") for worker in model.rows("workers"))
    workers: list[Piece] = [("workers ", "dim"), (f"{row.number('workers') or 0:.0f}", "")]
    parts.append((2, [*workers, (f" ({trouble} stale or away)", "bad")] if trouble else workers))
    queued, running = row.number("queued") or 0, row.number("running") or 0
    parts.append((1, [("queued ", "dim"), (f"{queued:.0f}", "warn" if queued else "")]))
    parts.append((1, [("running ", "dim"), (f"{running:.0f}", "busy" if running else "")]))
    half, most = row.number("first_audio_p50_s"), row.number("first_audio_p95_s")
    if half is not None and most is not None:
        parts.append((4, [("1st audio ", "dim"), (f"{formatting.seconds(half)}/{formatting.seconds(most)}", "")]))
    if (out := row.number("out_bytes_s")) is not None:
        parts.append((5, [("out ", "dim"), (formatting.rate(out), "")]))
    if (errors := row.number("errors_min")) is not None:
        parts.append((3, [("errors/min ", "dim"), (f"{errors:.0f}", "bad" if errors else "")]))
    return parts


def _link(model: RelayModel, now: float) -> Part | None:
    link = model.link
    if link.up:
        return None
    if not link.why:
        return (0, [("connecting", "dim")])
    gone = formatting.age(now - link.since)
    retry = f", next try in {formatting.age(max(0.0, link.retry_at - now) + 0.99)}" if link.retry_at is not None else ""
    what = f"relay gone for {gone}{retry}" if model.known else f"no relay for {gone}{retry}"
    return (
        0,
        [(f"{state_glyphs.look('relay', 'lost').glyph} {what}", "bad"), (f": {formatting.plain(link.why)}", "dim")],
    )


class WrongLine(OneLine):
    """What fails, in one line; not there while nothing does."""

    DEFAULT_CSS = """
    WrongLine { display: none; }
    WrongLine.some { display: block; }
    """

    def show(self, groups: Sequence[RowView]) -> None:
        """Draw the groups of failed requests."""
        if self.size.width and groups:
            look = state_glyphs.look("request", "failed")
            head: list[Piece] = [(f"{look.glyph} wrong ", look.token), ("e", "accent"), (" opens  ", "dim")]
            self.draw([self.line_of([*head, *summary(groups)])])


class Spark(CellWidget):
    """Sparklines of requests and seconds of audio, one value a second."""

    DEFAULT_CSS = """
    Spark { height: 2; }
    """
    LABEL = 12

    def show(self, model: RelayModel, now: float) -> None:
        """Draw the last minute."""
        if not self.size.width:
            return
        width = max(1, min(HISTORY_S, self.size.width - self.LABEL - 12))
        lines = []
        for title, values, unit in zip(
            ("requests", "audio s"), model.rates.last_minute(now), ("/min", " s/min"), strict=True
        ):
            graph = formatting.spark(values[-width:], width)
            pieces = [(f" {title:<{self.LABEL - 2}} ", "dim"), *((char, "busy") for char in graph)]
            lines.append(self.line_of([*pieces, (f" {sum(values):.0f}{unit}", "")]))
        self.draw(lines)
