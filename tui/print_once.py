"""`relay-tui --once`: prints the overview as lines of text or as JSON, for pipes and logs."""

import shutil
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import trio

from protocol.client.client import open_relay
from protocol.client.contexts import Login
from protocol.wire.errors import LinkError
from protocol.wire.messages import Snapshot
from protocol.wire.validators import Value
from tui.demo.source import Demo
from tui.model import formatting, state_glyphs
from tui.model.columns import COLUMNS, EMPTY, choose, natural
from tui.model.relay_model import RelayModel, RowView

#: How long to wait for the relay's first snapshot.
ANSWER_S = 10.0
#: The topics asked for; `history`, `log` and `audit` are only for the live screen.
TOPICS = ("relay", "spaces", "workers", "requests", "talks", "clients")
#: The width where no terminal reports one.
WIDTH = 120
#: Requests, and conversations, listed; the rest are only counted.
MAX_LISTED = 20

Rows = dict[str, list[dict[str, Value]]]


async def fetch_model(login: Login, readonly: bool) -> Rows:
    """Fetch the rows that the relay shows to an operator, by topic.

    Raises:
        LinkError: the relay cannot be reached, or the link was lost.
        trio.TooSlowError: the relay did not answer within `ANSWER_S`.
    """
    with trio.fail_after(ANSWER_S):
        async with (
            open_relay(login.url, token=login.token, role="operator", agent="relay-tui", readonly=readonly) as relay,
            relay.watch(TOPICS) as watch,
        ):
            async for change in watch:
                if isinstance(change, Snapshot):
                    return {topic: change.data.get(topic, []) for topic in TOPICS}
    raise LinkError("the relay ended the watch")


def demo_model(scene: str) -> Rows:
    """The rows of a simulated relay."""
    data = Demo(scene).snapshot().data
    return {topic: data[topic] for topic in TOPICS}


def describe(rows: Rows, width: int | None = None, *, ascii_only: bool = False) -> str:
    """The overview as lines of at most `width` cells (default: the terminal's), control characters escaped."""
    width = width or shutil.get_terminal_size((WIDTH, 0)).columns
    model = RelayModel()
    model.apply(Snapshot(data=dict(rows)), 0.0)
    live = [view for view in model.rows("requests") if view.text("state") in ("uploading", "queued", "running")]
    ended = len(model.rows("requests")) - len(live)
    lines = [line for view in model.rows("relay") for line in textwrap.wrap(_relay(view), width)]
    if spaces := model.rows("spaces"):
        lines += ["", *_table("spaces", spaces, width)]
    lines += ["", *_table("workers", model.rows("workers"), width)]
    if live:
        lines += ["", *_table("requests", live, width, MAX_LISTED)]
    if talks := model.rows("talks"):
        lines += ["", *_table("talks", talks, width, MAX_LISTED)]
    if ended:
        lines += ["", f"{ended} ended lately"]
    text = "\n".join(lines)
    return state_glyphs.to_ascii(text) if ascii_only else text


def _relay(view: RowView) -> str:
    parts = [
        f"relay {state_glyphs.mark('relay', formatting.plain(view.text('state')))}",
        f"up {formatting.age(view.number('uptime_s') or 0)}",
        f"{view.text('workers')} workers, {view.text('queued')} queued, {view.text('running')} running",
    ]
    half, most = view.number("first_audio_p50_s"), view.number("first_audio_p95_s")
    if half is not None and most is not None:
        parts.append(f"first audio {formatting.seconds(half)} (p95 {formatting.seconds(most)})")
    known: Sequence[tuple[str, Callable[[float], str]]] = (
        ("out_bytes_s", lambda value: f"{formatting.rate(value)} out"),
        ("errors_min", lambda value: f"{formatting.count(value)} errors/min"),
    )
    parts += [form(value) for key, form in known if (value := view.number(key)) is not None]
    return ", ".join(parts)


def _table(kind: str, views: list[RowView], width: int, most: int | None = None) -> list[str]:
    if not views:
        return textwrap.wrap(EMPTY[kind], width)
    order: Callable[[RowView], Any] = natural(kind)
    chosen = choose(COLUMNS[kind], width)
    lines = [" ".join(formatting.fit(column.title.upper(), cells, column.align) for column, cells in chosen)]
    lines += [
        " ".join(formatting.fit(column.cell(view, 0.0).text, cells, column.align) for column, cells in chosen)
        for view in sorted(views, key=order)[:most]
    ]
    if most is not None and len(views) > most:
        lines.append(f"and {len(views) - most} more")
    return [line.rstrip() for line in lines]
