"""A relay that says what nobody expected: rows, and what an operator types, bring no screen down."""

import signal
import threading
from typing import Any

import pytest

from protocol.wire.messages import Snapshot
from protocol.wire.validators import Value
from tests.tui.screen import a_client, a_line, a_relay, a_request, a_space, a_stage, a_talk, a_worker
from tui.model import row_filter
from tui.model.actions import TOPIC_OF
from tui.model.columns import COLUMNS, natural
from tui.model.relay_model import RelayModel
from tui.model.row_filter import Filter, searchable_text
from tui.model.row_order import Order
from tui.widgets.status_lines import status

ODD: tuple[Any, ...] = (
    None,
    "odd",
    True,
    1.5,
    -1,
    2**63,
    1e300,
    float("nan"),
    float("inf"),
    [1, None, "x"],
    {"a": 1},
    b"\xff",
    "\x1b[2J\n\u9577" * 500,
)
ROWS: dict[str, dict[str, Any]] = {
    "spaces": a_space("tts"),
    "workers": a_worker("w"),
    "requests": a_request("r", worker_id="w", fraction=0.5, ended_s=1.0),
    "wrong": a_request("r", state="failed", count=2, code="engine_failed", ended_s=1.0, message="it broke"),
    "queue": a_request("r", state="queued", position=1, queued_s=1.0),
    "talks": a_talk("t", reply_s=1.0, said_s=2.0, code="no_worker"),
    "clients": a_client("c"),
    "log": a_line(1),
    "audit": a_line(1, principal="op", action="cancel", target="r", outcome="done", message=""),
}
STATES = ("uploading", "queued", "running", "completed", "failed", "unheard of")


def a_picture(topic: str, row: dict[str, Value]) -> RelayModel:
    model = RelayModel()
    model.apply(Snapshot(data={"relay": [a_relay()], topic: [row]}), 100.0)
    model.link.up = True
    return model


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("odd", ODD, ids=lambda odd: repr(odd)[:12])
def test_whatever_stands_in_a_row_it_is_shown_sorted_and_searched(kind: str, odd: Any) -> None:
    topic = TOPIC_OF.get(kind, kind)
    known = dict.fromkeys([*ROWS[kind], *(column.key for column in COLUMNS[kind])])
    for name in known:
        for state in STATES if topic == "requests" and name != "state" else (ROWS[kind].get("state"),):
            row = {**ROWS[kind], "state": state, name: odd}
            model = a_picture(topic, row)
            views = model.rows(topic)
            for column in COLUMNS[kind]:
                assert all("\x1b" not in column.cell(view, 102.0).text for view in views)
                order = Order(natural(kind), column.sort, filter=Filter.of("."))
                assert order.update(views) == [view for view in views if searchable_text(view)]


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: repr(odd)[:12])
def test_whatever_the_relay_says_of_itself_there_is_a_status_line(odd: Any) -> None:
    figures = ("workers", "queued", "running", "first_audio_p50_s", "first_audio_p95_s", "out_bytes_s", "errors_min")
    row = {**a_relay(), **dict.fromkeys(figures, 1.0)}
    for name in [*row, "requests_total", "audio_s_total"]:
        if name != "name":
            model = a_picture("relay", {**row, name: odd})
            assert status(model, 103.0)[0][1]
            model.rates.last_minute(103.0)


@pytest.mark.parametrize("typed", ["a{99999999999999999999}", "(" * 3_000 + ")" * 3_000, "[", "*", "(?P<"])
def test_what_is_no_expression_is_told_and_hides_nothing(typed: str) -> None:
    wanted = Filter.of(typed)
    assert wanted.fault
    assert wanted.lets_through(a_picture("requests", ROWS["requests"]).rows("requests")[0])


def test_a_class_of_characters_is_no_capital_that_must_match() -> None:
    view = a_picture("requests", a_request("r", principal="Bob Bee")).rows("requests")[0]
    assert Filter.of(r"bob\Sb|bob\Wb").lets_through(view)
    assert not Filter.of("bOb").lets_through(view)


def test_a_search_that_takes_too_long_is_given_up_and_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_filter, "MAX_SEARCH_S", 0.05)
    views = a_picture("requests", a_request("r", principal="many words " * 20)).rows("requests")
    order = Order(natural("requests"), filter=Filter.of(r"(\w+\s*)+$!"))
    assert order.update(views) == views
    assert order.filter.fault == "takes too long on these rows; use a simpler expression"
    order.filter = Filter.of(r"(\w+\s*)+$!")
    assert order.shows(views[0])
    assert order.filter.fault
    assert signal.getsignal(signal.SIGVTALRM) is signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_outside_the_main_thread_a_search_is_not_limited() -> None:
    views = a_picture("requests", a_request("r")).rows("requests")
    order, shown = Order(natural("requests"), filter=Filter.of("r")), []
    thread = threading.Thread(target=lambda: shown.extend(order.update(views)))
    thread.start()
    thread.join()
    assert shown == views


@pytest.mark.asyncio
async def test_an_expression_that_python_gives_up_on_ends_no_screen() -> None:
    async with a_stage(screen="4") as stage:
        await stage.snapshot(requests=[a_request("a" * 32)])
        stage.screen.filter_by("a{99999999999999999999}")
        await stage.draw()
        assert "filter: the repetition number is too large" in stage.lines[1]
        stage.screen.filter_by("[[a]")
        await stage.draw()
        assert len(stage.keys_shown) == 1
