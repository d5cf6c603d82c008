"""The columns of every screen: what they show, how they sort, and which are left out in a narrow terminal.

A new column is one line of `COLUMNS`; a new screen is one entry there, one in `EMPTY`, and a module in `tui.screens`.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import attrs

from tui.model import formatting, state_glyphs
from tui.model.cells import (
    DIM,
    NOTHING,
    Cell,
    audit_outcome,
    client_state,
    error_share,
    is_failing,
    last_seen,
    name_list,
    place,
    position,
    quantity,
    request_age,
    request_state,
    short,
    slots,
    space_state,
    starts,
    state,
    words,
    worker,
    worker_name,
)
from tui.model.formatting import Align
from tui.model.relay_model import RowView

#: Importance of a column that is shown in however narrow a terminal.
ALWAYS = 0
#: The first in a queue has waited long.
LONG_WAIT_S = 30
#: Blank cells between two columns.
GAP = 1


@attrs.frozen(kw_only=True)
class Column:
    """A column of a table.

    Attributes:
        key: its name in sorting and export.
        importance: 0 is always shown; otherwise the column with the highest number is left out first.
        min_width: the fewest cells in which it is useful.
        max_width: the most cells it can use; spare width is shared out up to this.
        cell: what it shows for a row at a time, in monotonic seconds, for ages that keep growing.
        sort: the sort key of a row, or None where it is unknown.
    """

    key: str
    title: str
    importance: int
    min_width: int
    max_width: int
    align: Align
    cell: Callable[[RowView, float], Cell]
    sort: Callable[[RowView], Any]


def _column(
    key: str,
    title: str,
    importance: int,
    width: int | tuple[int, int],
    cell: Callable[[RowView, float], Cell],
    sort: Callable[[RowView], Any] | None = None,
    align: Align = "left",
) -> Column:
    least, most = width if isinstance(width, tuple) else (width, width)
    return Column(
        key=key,
        title=title,
        importance=importance,
        min_width=least,
        max_width=most,
        align=align,
        cell=cell,
        sort=sort or (lambda view: view.text(key).casefold() or None),
    )


def _number(
    key: str,
    title: str,
    importance: int,
    width: int,
    form: Callable[[float], str] = formatting.count,
    *,
    warn: float | None = None,
    bad: float | None = None,
) -> Column:
    """A column for a number, right-aligned; coloured from `warn` and `bad` upwards, dim where it is zero."""
    cell = quantity(key, form, warn=warn, bad=bad)
    return _column(key, title, importance, width, cell, lambda view: view.number(key), "right")


def _ageing(key: str, title: str, importance: int, width: int, *, warn: float | None = None) -> Column:
    """A column for an age that keeps growing; it sorts by when the age began, which does not change."""
    cell = quantity(key, formatting.age, warn=warn, ages=True)
    return _column(key, title, importance, width, cell, lambda view: _negative(view.born(key)), "right")


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


def _state(kind: state_glyphs.Kind, width: int, importance: int = ALWAYS) -> Column:
    return _column(
        "state",
        "State",
        importance,
        width,
        state(kind),
        lambda view: -state_glyphs.look(kind, view.text("state")).urgency,
    )


def _place_order(view: RowView) -> Any:
    """Running before queued, most advanced first, then the queue from its head."""
    if view.text("state") == "queued":
        return (1, view.position or 0)
    return (0, -(view.number("fraction") or 0)) if view.text("state") == "running" else None


COLUMNS: dict[str, tuple[Column, ...]] = {
    "spaces": (
        _column("name", "Space", ALWAYS, (12, 40), words("name")),
        _column("state", "State", ALWAYS, 11, space_state, lambda view: _space_trouble(view)[0]),
        _number("workers", "Workers", 5, 7),
        _column("busy", "Slots", 1, 7, slots, lambda view: view.number("busy"), "right"),
        _number("queued", "Queued", ALWAYS, 6),
        _ageing("oldest_wait_s", "Oldest", 2, 6, warn=LONG_WAIT_S),
        _number("requests_min", "Req/min", 4, 7),
        _number("first_audio_p95_s", "1st p95", 3, 7, formatting.seconds, warn=2, bad=10),
        _number("rtf", "RTF", 7, 5, formatting.ratio, warn=0.9, bad=1),
        _column("error_percent", "Err", 3, 6, error_share, lambda view: view.number("error_percent"), "right"),
        _number("completed", "Done", 8, 8),
        _number("failed", "Failed", 8, 7, warn=1),
        _column("engine", "Engine", 9, (10, 18), words("engine", DIM)),
        _column("description", "Description", 10, (16, 80), words("description", DIM)),
    ),
    "workers": (
        _column("name", "Worker", ALWAYS, (13, 32), worker),
        _state("worker", 10),
        _column("busy", "Slots", ALWAYS, 6, slots, lambda view: view.number("busy"), "right"),
        _column("spaces", "Spaces", 2, (12, 40), name_list("spaces")),
        _number("rtt_ms", "Trip", 3, 6, lambda ms: formatting.seconds(ms / 1000), warn=250, bad=1000),
        _column(
            "last_seen_s", "Seen", 1, 6, last_seen, lambda view: _negative(view.born("last_seen_s")) or 0.0, "right"
        ),
        _number("rtf", "RTF", 5, 5, formatting.ratio, warn=0.9, bad=1),
        _number("bytes_s", "Out", 4, 9, formatting.rate),
        _column("engine", "Engine", 6, (9, 24), words("engine")),
        _column("version", "Version", 8, (8, 28), words("version", DIM, fallback="agent")),
        _column("peer", "From", 9, (21, 42), words("peer", DIM)),
        _column("worker_id", "Id", 10, (13, 32), words("worker_id", DIM)),
    ),
    "requests": (
        _column("request_id", "Id", ALWAYS, 8, short("request_id")),
        _column("principal", "Principal", 1, (9, 24), words("principal")),
        _column("space", "Space", 2, (9, 24), words("space")),
        _column(
            "state",
            "State",
            ALWAYS,
            11,
            request_state,
            lambda view: -state_glyphs.look("request", view.text("state")).urgency,
        ),
        _column("place", "Place", ALWAYS, (10, 13), place, _place_order),
        _column("age_s", "Age", ALWAYS, 6, request_age, lambda view: _negative(view.born("age_s")), "right"),
        _number("attempt", "Try", 5, 3, warn=2, bad=3),
        _number("first_frame_s", "First", 3, 6, formatting.seconds, warn=10, bad=30),
        _number("buffered_bytes", "Buffer", 6, 7, formatting.size, warn=1_000_000, bad=16_000_000),
        _number("audio_s", "Audio", 7, 6, formatting.seconds),
        _column("worker", "Worker", 4, (11, 24), worker_name),
        _column("message", "Why", 8, (16, 80), words("message", DIM, none="")),
    ),
    "wrong": (
        _number("count", "Count", ALWAYS, 6),
        _column("space", "Space", ALWAYS, (10, 24), words("space")),
        _column("code", "Error", ALWAYS, (14, 20), words("code", "bad")),
        _ageing("ended_s", "Last", ALWAYS, 6),
        _column("principal", "Of", 2, 24, words("principal")),
        _column("message", "Why", ALWAYS, (16, 200), words("message", DIM, none="")),
    ),
    "queue": (
        _column("position", "#", ALWAYS, 5, position, lambda view: view.position, "right"),
        _column("request_id", "Id", ALWAYS, 8, short("request_id")),
        _column("principal", "Principal", ALWAYS, (10, 32), words("principal")),
        _number("priority", "Prio", 2, 4),
        _ageing("queued_s", "Waits", ALWAYS, 7, warn=30),
        _column("starts", "Starts", 1, 7, starts, lambda view: view.position, "right"),
        _number("attempt", "Try", 4, 3, warn=1),
        _number("readers", "Readers", 5, 7),
    ),
    "talks": (
        _column("principal", "Principal", ALWAYS, (10, 24), words("principal")),
        _column("user", "User", 3, (8, 20), words("user")),
        _column("session", "Session", ALWAYS, (12, 32), words("session")),
        _state("talk", 10),
        _number("turns", "Turns", 4, 5),
        _number("waiting", "Waiting", 2, 7, warn=10),
        _ageing("reply_s", "Reply", ALWAYS, 6, warn=30),
        _ageing("said_s", "Said", 1, 6),
        _column("code", "Error", 2, (12, 20), words("code", "bad", none="")),
        _column("text_request", "Text", 5, 8, short("text_request", DIM)),
        _column("speech_request", "Speech", 5, 8, short("speech_request", DIM)),
        _column("talk_id", "Id", 6, 8, short("talk_id", DIM)),
        _column("message", "Why", 7, (16, 80), words("message", DIM, none="")),
    ),
    "clients": (
        _column("principal", "Principal", ALWAYS, (10, 28), words("principal")),
        _column("state", "State", ALWAYS, 6, client_state, lambda view: -int(bool(view.row.get("slow")))),
        _number("pending_bytes", "Pending", ALWAYS, 8, formatting.size, warn=64_000, bad=1_000_000),
        _number("bytes_s", "Out", 2, 9, formatting.rate),
        _number("requests", "Requests", 3, 8),
        _number("bytes_sent", "Sent", 4, 7, formatting.size),
        _column("role", "Role", 5, 8, words("role", DIM)),
        _column("connection_id", "Id", 1, 8, short("connection_id", DIM)),
        _column("peer", "From", 6, (18, 42), words("peer", DIM)),
        _column("agent", "Agent", 7, (12, 40), words("agent", DIM)),
    ),
    "log": (
        _column("time", "Time", ALWAYS, 8, lambda view, _now: _time(view), lambda view: view.number("time")),
        _column(
            "level",
            "Level",
            ALWAYS,
            10,
            state("level", "level"),
            lambda view: -state_glyphs.look("level", view.text("level")).urgency,
        ),
        _column("event", "Event", ALWAYS, (16, 20), words("event")),
        _column("request_id", "Request", 2, 8, short("request_id", none="")),
        _column("space", "Space", 3, (9, 12), words("space", none="")),
        _column("details", "Details", 1, (14, 200), words("details", DIM, none="")),
    ),
    "audit": (
        _column("time", "Time", ALWAYS, 8, lambda view, _now: _time(view), lambda view: view.number("time")),
        _column("principal", "Who", ALWAYS, (8, 24), words("principal")),
        _column("action", "Did", ALWAYS, (14, 20), words("action")),
        _column("target", "To", ALWAYS, (12, 40), words("target")),
        _column("outcome", "Outcome", ALWAYS, (10, 80), audit_outcome, lambda view: view.text("outcome")),
    ),
}

#: Shown in the middle of a screen that has no rows, with what to do about it.
EMPTY: dict[str, str] = {
    "spaces": "no worker has registered yet: run gpuworker run --space NAME --engine ENGINE",
    "workers": "no worker has registered yet: run gpuworker run --relay URL --space NAME --engine ENGINE",
    "requests": 'no request yet: try relay say "Hello." --space NAME',
    "wrong": "no request that the relay still knows has failed",
    "queue": "nothing waits in this space",
    "talks": "no conversation is in use; relayd.toml needs [talk]: see docs/talk.md",
    "clients": "no client is connected",
    "log": "nothing has happened yet",
    "audit": "nobody has steered anything yet",
}
#: Shown instead where the filter hides every row.
NO_MATCH = "nothing matches the filter; Esc takes it off"

_ENDED_LAST = {"running": 0, "queued": 1, "uploading": 2}


def natural(screen: str) -> Callable[[RowView], Any]:
    """The order of a screen's rows while no column is chosen: those that need attention first."""
    return _NATURAL[screen]


def _space_trouble(view: RowView) -> tuple[Any, ...]:
    """The more that is wrong with a space, the sooner it comes; in steps, so that rows seldom change places."""
    queued, failing = int(view.number("queued") or 0), view.number("error_percent") or 0
    no_worker, urgency = view.text("state") == "no worker", state_glyphs.look("space", view.text("state")).urgency
    waits_long = (view.number("oldest_wait_s") or 0) >= LONG_WAIT_S
    wrong = (no_worker and queued > 0, is_failing(view), no_worker, urgency > 1, waits_long, failing > 0)
    rank = next((rank for rank, one in enumerate(wrong) if one), len(wrong))
    return (rank, -queued.bit_length() if rank < len(wrong) else 0, view.text("name").casefold(), view.key)


def _trouble_first(kind: state_glyphs.Kind) -> Callable[[RowView], Any]:
    def order(view: RowView) -> Any:
        urgency = state_glyphs.look(kind, view.text("state")).urgency
        return (-max(0, urgency - 1), view.text("name").casefold(), view.key)

    return order


def _live_first(view: RowView) -> Any:
    """Running, queued in order, uploading, then the ended requests, latest first."""
    rank = _ENDED_LAST.get(view.text("state"), 3)
    if rank == 1:
        return (rank, view.text("space"), view.position or 0, view.key)
    since = view.born("ended_s") if rank == 3 else view.born("age_s")
    return (rank, "", -(since or 0.0) if rank == 3 else (since or 0.0), view.key)


def _answered_first(view: RowView) -> Any:
    """The conversations that wait longest for their reply, then those in which something was said last."""
    asked = view.born("reply_s")
    return (asked is None, asked if asked is not None else -(view.born("said_s") or 0.0), view.key)


_NATURAL: dict[str, Callable[[RowView], Any]] = {
    "spaces": _space_trouble,
    "workers": _trouble_first("worker"),
    "requests": _live_first,
    "wrong": lambda view: (-(view.number("count") or 0), view.key),
    "queue": lambda view: (view.position or 0, view.key),
    "talks": _answered_first,
    "clients": lambda view: (not view.row.get("slow"), view.text("principal").casefold(), view.key),
    "log": lambda view: view.number("id") or 0,
    "audit": lambda view: -(view.number("id") or 0),
}


def choose(columns: Sequence[Column], width: int) -> list[tuple[Column, int]]:
    """Choose the columns that fit into `width` cells, in order, with the cells that each gets.

    Columns that do not fit are left out by importance, the one further right first among equals. Spare cells are shared
    out evenly, up to each column's maximum. Widths depend on the terminal only, so nothing moves when rows change.
    """
    kept = list(columns)
    while len(kept) > 1 and sum(one.min_width + GAP for one in kept) - GAP > width:
        last = max(range(len(kept)), key=lambda at: (kept[at].importance, at))
        del kept[last]
    widths = [one.min_width for one in kept]
    spare = width - sum(widths) - GAP * (len(kept) - 1)
    while spare > 0 and (room := [at for at, one in enumerate(kept) if widths[at] < one.max_width]):
        for at in room[:spare]:
            widths[at] += 1
        spare -= min(spare, len(room))
    return list(zip(kept, widths, strict=True))


def _time(view: RowView) -> Cell:
    at = view.number("time")
    with suppress(OverflowError, OSError, ValueError):  # a time outside this machine's calendar
        return NOTHING if at is None else Cell(formatting.clock(at, formatting.utc_offset_s(at)), DIM)
    return NOTHING
