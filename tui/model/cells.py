"""What each cell of a table shows for a row: its text and a token for its colour. Used by `tui.model.columns`."""

from collections.abc import Callable

import attrs

from tui.model import formatting, state_glyphs
from tui.model.relay_model import RelayModel, RowView
from tui.model.state_glyphs import Token
from tui.model.waiting import starts_s

DIM: Token = "dim"
#: Width of a progress bar beside its percentage.
BAR_CELLS = 5
#: A space in which so many of those that ended lately have failed is shown as failing.
FAILING_PERCENT = 20
LIVE = ("uploading", "queued", "running")


@attrs.frozen
class Cell:
    """The text of a cell, without control characters and of any width, and the token of its colour."""

    text: str
    token: Token = ""


CellOf = Callable[[RowView, float], Cell]
NOTHING = Cell(state_glyphs.NOTHING, DIM)


def words(key: str, token: Token = "", *, fallback: str = "", none: str = state_glyphs.NOTHING) -> CellOf:
    """The text under a key, or under `fallback` where that is empty; `none` where both are."""

    def cell(view: RowView, _now: float) -> Cell:
        text = view.text(key) or (view.text(fallback) if fallback else "")
        return Cell(formatting.plain(text), token) if text else Cell(none, DIM)

    return cell


def short(key: str, token: Token = "", *, none: str = state_glyphs.NOTHING) -> CellOf:
    """A shortened id; `none` where there is none."""

    def cell(view: RowView, _now: float) -> Cell:
        text = view.text(key)
        return Cell(formatting.plain(formatting.short_id(text)), token) if text else Cell(none, DIM)

    return cell


def name_list(key: str) -> CellOf:
    """A list of names, separated by commas."""

    def cell(view: RowView, _now: float) -> Cell:
        names = view.row.get(key)
        joined = ", ".join(map(str, names)) if isinstance(names, list) else ""
        return Cell(formatting.plain(joined)) if joined else NOTHING

    return cell


def state(kind: state_glyphs.Kind, key: str = "state") -> CellOf:
    """The glyph and the word of a state."""

    def cell(view: RowView, _now: float) -> Cell:
        word = formatting.plain(view.text(key))
        return Cell(state_glyphs.mark(kind, word), state_glyphs.look(kind, word).token)

    return cell


def quantity(
    key: str,
    form: Callable[[float], str],
    *,
    warn: float | None = None,
    bad: float | None = None,
    ages: bool = False,
) -> CellOf:
    """A formatted number; coloured from `warn` and `bad` upwards, dim where it is zero or unknown."""

    def cell(view: RowView, now: float) -> Cell:
        value = view.aged(key, now) if ages else view.number(key)
        if value is None:
            return NOTHING
        token: Token = "" if value else DIM
        if bad is not None and value >= bad:
            token = "bad"
        elif warn is not None and value >= warn:
            token = "warn"
        return Cell(form(value), token)

    return cell


def space_state(view: RowView, now: float) -> Cell:
    """The state of a space; `failing` where most of what ended lately has failed."""
    if is_failing(view) and view.text("state") == "ready":
        return Cell(state_glyphs.mark("space", "failing"), state_glyphs.look("space", "failing").token)
    return state("space")(view, now)


def is_failing(view: RowView) -> bool:
    """Whether so many requests of a space fail that something is wrong with it."""
    return (view.number("error_percent") or 0) >= FAILING_PERCENT


def slots(view: RowView, _now: float) -> Cell:
    """Busy slots out of all slots."""
    busy, every = view.number("busy"), view.number("slots")
    if busy is None or every is None:
        return NOTHING
    return Cell(f"{busy:.0f}/{every:.0f}", DIM if not every else "busy" if busy else "")


def error_share(view: RowView, _now: float) -> Cell:
    """The share of errors among the requests that ended recently."""
    share = view.number("error_percent")
    if share is None:
        return NOTHING
    return Cell(formatting.percent(share), "bad" if share >= 5 else "warn" if share > 0 else DIM)


def place(view: RowView, _now: float) -> Cell:
    """How far a request has come: its place in the queue, its progress, or how it ended."""
    match view.text("state"):
        case "queued":
            return NOTHING if view.position is None else Cell(f"#{view.position}")
        case "running":
            fraction = view.number("fraction")
            if fraction is None:
                audio = view.number("audio_s")
                return Cell("starting" if not audio else f"{audio:.1f} s out", "busy")
            return Cell(f"{formatting.bar(fraction, BAR_CELLS)}{min(fraction, 1):4.0%}", "busy")
        case "failed":
            return Cell(formatting.plain(view.text("code") or "failed"), "bad")
        case "completed":
            audio = view.number("audio_s")
            return Cell("done" if not audio else f"{audio:.1f} s out", DIM)
        case _:
            return NOTHING


def starts(view: RowView, now: float) -> Cell:
    """When a queued request is likely to start; it counts down."""
    value = starts_s(view, now)
    return NOTHING if value is None else Cell(formatting.age(value), DIM)


def position(view: RowView, _now: float) -> Cell:
    """The exact place in the queue."""
    return NOTHING if view.position is None else Cell(str(view.position))


def worker(view: RowView, _now: float) -> Cell:
    """The name of a worker, or its id where another worker has the same name."""
    return Cell(_called(view.model, view.key))


def worker_name(view: RowView, _now: float) -> Cell:
    """The worker that runs a request; its id where the worker is no longer known."""
    worker_id = view.text("worker_id")
    return Cell(_called(view.model, worker_id)) if worker_id else NOTHING


def _called(model: RelayModel, worker_id: str) -> str:
    view = model.get("workers", worker_id)
    name = view.text("name") if view else ""
    # An id begins with the name. There are few workers, and only visible rows are drawn.
    shared = any(one.text("name") == name and one.key != worker_id for one in model.rows("workers"))
    return formatting.plain(worker_id if shared or not name else name)


def request_age(view: RowView, now: float) -> Cell:
    """The time since a live request arrived, or how long an ended one took."""
    value = view.aged("age_s", now)
    return NOTHING if value is None else Cell(formatting.age(value), "" if view.text("state") in LIVE else DIM)


def request_state(view: RowView, now: float) -> Cell:
    """The state of a request; `stopping` from its cancellation until the worker confirms it."""
    if view.row.get("stopping") and view.text("state") in LIVE:
        return Cell(state_glyphs.mark("request", "stopping"), state_glyphs.look("request", "stopping").token)
    return state("request")(view, now)


def last_seen(view: RowView, now: float) -> Cell:
    """The time since the last message of a worker; `now` while it answers its pings."""
    value = view.aged("last_seen_s", now)
    return Cell("now", DIM) if value is None else Cell(formatting.age(value), "bad")


def client_state(view: RowView, _now: float) -> Cell:
    """Whether the client reads what it is sent."""
    word = "slow" if view.row.get("slow") else "ok"
    return Cell(state_glyphs.mark("client", word), state_glyphs.look("client", word).token)


def audit_outcome(view: RowView, _now: float) -> Cell:
    """`done`, or why the relay refused."""
    outcome = view.text("outcome")
    if outcome == "done":
        return Cell(state_glyphs.mark("outcome", "done"), "good")
    why = f": {message}" if (message := view.text("message")) else ""
    return Cell(f"{state_glyphs.look('outcome', 'refused').glyph} {formatting.plain(outcome + why)}", "bad")
