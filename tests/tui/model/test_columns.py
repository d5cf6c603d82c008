"""Columns: which stay, how wide they are, what they say, and how they sort."""

import pytest
from rich.cells import cell_len

from protocol.wire.messages import Delta, Snapshot
from protocol.wire.validators import Value
from tui.demo.scenes import SCENES
from tui.demo.source import Demo
from tui.model import state_glyphs
from tui.model.columns import ALWAYS, COLUMNS, EMPTY, GAP, choose, natural
from tui.model.formatting import fit
from tui.model.relay_model import RelayModel, RowView

#: The cells of a table at 60, 80, 120 and 200 columns, less the gutter.
WIDTHS = [58, 78, 118, 198]


def a_picture(**topics: list[dict[str, Value]]) -> RelayModel:
    model = RelayModel()
    model.apply(Snapshot(data=dict(topics)), 100.0)
    return model


def a_view(topic: str, **row: Value) -> RowView:
    key = {"spaces": "name", "workers": "worker_id", "requests": "request_id", "clients": "connection_id"}.get(
        topic, "id"
    )
    return a_picture(**{topic: [{key: "one", **row}]}).rows(topic)[0]


def said(kind: str, column: str, view: RowView, now: float = 100.0) -> tuple[str, str]:
    cell = next(one for one in COLUMNS[kind] if one.key == column).cell(view, now)
    return cell.text, cell.token


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", list(COLUMNS))
def test_the_columns_fit_and_those_that_matter_are_there(kind: str, width: int) -> None:
    chosen = choose(COLUMNS[kind], width)
    assert sum(cells for _, cells in chosen) + GAP * (len(chosen) - 1) <= width
    assert {one.key for one in COLUMNS[kind] if one.importance == ALWAYS} <= {one.key for one, _ in chosen}
    assert all(one.min_width <= cells <= one.max_width for one, cells in chosen)


@pytest.mark.parametrize("kind", list(COLUMNS))
def test_more_room_never_takes_a_column_away(kind: str) -> None:
    before: set[str] = set()
    for width in range(40, 220):
        now = {one.key for one, _ in choose(COLUMNS[kind], width)}
        assert before <= now
        before = now


def test_where_nothing_fits_the_most_important_column_stays() -> None:
    assert [one.key for one, _ in choose(COLUMNS["spaces"], 5)] == ["name"]


@pytest.mark.parametrize("kind", list(COLUMNS))
def test_titles_fit_their_columns(kind: str) -> None:
    assert all(len(one.title) <= one.min_width for one in COLUMNS[kind])


@pytest.mark.parametrize("scene", list(SCENES))
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", list(COLUMNS))
def test_every_row_is_as_wide_as_every_other(kind: str, width: int, scene: str) -> None:
    model = RelayModel()
    model.apply(Demo(scene).snapshot(), 100.0)
    chosen = choose(COLUMNS[kind], width)
    for view in model.rows("requests" if kind == "queue" else kind):
        line = " ".join(fit(one.cell(view, 160.0).text, cells, one.align) for one, cells in chosen)
        assert cell_len(line) == sum(cells for _, cells in chosen) + len(chosen) - 1


@pytest.mark.parametrize("kind", list(COLUMNS))
def test_a_row_of_an_older_relay_that_says_nothing_is_shown_all_the_same(kind: str) -> None:
    view = a_view("requests" if kind == "queue" else kind)
    for column in COLUMNS[kind]:
        column.cell(view, 100.0)
        column.sort(view)
    natural(kind)(view)


def test_a_column_that_knows_nothing_says_so() -> None:
    assert said("spaces", "first_audio_p95_s", a_view("spaces", first_audio_p95_s=None)) == (
        state_glyphs.NOTHING,
        "dim",
    )


@pytest.mark.parametrize(
    ("row", "text", "token"),
    [
        ({"state": "running", "fraction": 0.5}, "━━╸── 50%", "busy"),
        ({"state": "running", "fraction": 1.0}, "━━━━━100%", "busy"),
        ({"state": "running"}, "starting", "busy"),
        ({"state": "running", "audio_s": 2.0}, "2.0 s out", "busy"),
        ({"state": "failed", "code": "worker_lost"}, "worker_lost", "bad"),
        ({"state": "completed", "audio_s": 8.4}, "8.4 s out", "dim"),
        ({"state": "cancelled"}, "–", "dim"),
    ],
)
def test_the_place_of_a_request_says_how_far_it_is(row: dict[str, Value], text: str, token: str) -> None:
    assert said("requests", "place", a_view("requests", **row)) == (text, token)


def test_places_in_the_queue_are_exact_after_one_ahead_has_left() -> None:
    rows: list[dict[str, Value]] = [
        {"request_id": name, "state": "queued", "space": "tts", "position": at, "age_s": 1.0}
        for at, name in enumerate(["a", "b", "c"], 1)
    ]
    model = a_picture(spaces=[{"name": "tts"}], requests=rows)
    third = model.rows("requests")[2]
    assert said("requests", "place", third) == ("#3", "")
    model.apply(Delta(data={"requests": [{**rows[0], "state": "running", "position": None}]}), 101.0)
    assert said("requests", "place", third) == ("#2", "")
    assert said("queue", "position", third) == ("2", "")


def test_a_request_that_was_cancelled_is_stopping_until_its_worker_says_so() -> None:
    assert said("requests", "state", a_view("requests", state="running", stopping=True)) == ("▽ stopping", "warn")
    assert said("requests", "state", a_view("requests", state="cancelled", stopping=True)) == ("⊘ cancelled", "dim")


def test_the_age_of_a_live_request_counts_on_and_that_of_an_ended_one_stays() -> None:
    assert said("requests", "age_s", a_view("requests", state="running", age_s=5.0), now=110.0) == ("15 s", "")
    assert said("requests", "age_s", a_view("requests", state="completed", age_s=5.0), now=110.0) == ("5 s", "dim")


def test_a_worker_that_answers_is_seen_now_and_a_silent_one_since_when() -> None:
    assert said("workers", "last_seen_s", a_view("workers", state="idle", last_seen_s=None)) == ("now", "dim")
    assert said("workers", "last_seen_s", a_view("workers", state="stale", last_seen_s=12.0), now=103.0) == (
        "15 s",
        "bad",
    )


def test_a_request_names_its_worker_and_falls_back_to_its_id() -> None:
    model = a_picture(
        workers=[{"worker_id": "w" * 32, "name": "gpu-box"}],
        requests=[
            {"request_id": "a", "worker_id": "w" * 32, "state": "running"},
            {"request_id": "b", "worker_id": "x" * 32, "state": "running"},
        ],
    )
    texts = {view.key: said("requests", "worker", view)[0] for view in model.rows("requests")}
    assert texts == {"a": "gpu-box", "b": "x" * 32}


def test_workers_of_one_name_are_told_apart_by_their_ids() -> None:
    names = {"vm-1": "vm", "vm-2": "vm", "box-3": "box"}
    workers: list[dict[str, Value]] = [{"worker_id": key, "name": name} for key, name in names.items()]
    model = a_picture(workers=workers, requests=[{"request_id": "a", "worker_id": "vm-2", "state": "running"}])
    assert [said("workers", "name", view)[0] for view in model.rows("workers")] == ["vm-1", "vm-2", "box"]
    assert said("requests", "worker", model.rows("requests")[0])[0] == "vm-2"


def test_numbers_that_are_bad_are_marked_so() -> None:
    assert said("spaces", "first_audio_p95_s", a_view("spaces", first_audio_p95_s=0.3))[1] == ""
    assert said("spaces", "first_audio_p95_s", a_view("spaces", first_audio_p95_s=2.0))[1] == "warn"
    assert said("spaces", "first_audio_p95_s", a_view("spaces", first_audio_p95_s=10.0))[1] == "bad"
    assert said("spaces", "error_percent", a_view("spaces", error_percent=25)) == ("25 %", "bad")
    assert said("spaces", "queued", a_view("spaces", queued=0)) == ("0", "dim")


def ordered(kind: str, topic: str, model: RelayModel) -> list[str]:
    return [view.key for view in sorted(model.rows(topic), key=natural(kind))]


def test_what_is_wrong_comes_first_among_spaces_and_workers() -> None:
    spaces: list[dict[str, Value]] = [
        {"name": "a", "state": "ready"},
        {"name": "b", "state": "paused"},
        {"name": "c", "state": "no worker"},
    ]
    assert ordered("spaces", "spaces", a_picture(spaces=spaces)) == ["c", "b", "a"]
    workers: list[dict[str, Value]] = [
        {"worker_id": "1", "name": "z", "state": "idle"},
        {"worker_id": "2", "name": "y", "state": "busy"},
        {"worker_id": "3", "name": "x", "state": "stale"},
        {"worker_id": "4", "name": "w", "state": "draining"},
    ]
    assert ordered("workers", "workers", a_picture(workers=workers)) == ["3", "4", "2", "1"]


def test_the_more_is_wrong_with_a_space_the_sooner_it_comes() -> None:
    spaces: list[dict[str, Value]] = [
        {"name": "calm", "state": "ready"},
        {"name": "busy", "state": "ready", "queued": 40, "oldest_wait_s": 5.0},
        {"name": "some-errors", "state": "ready", "error_percent": 2.0},
        {"name": "slow", "state": "ready", "queued": 3, "oldest_wait_s": 31.0},
        {"name": "paused", "state": "paused", "queued": 9},
        {"name": "unused", "state": "no worker", "queued": 0},
        {"name": "failing", "state": "ready", "error_percent": 75.0},
        {"name": "few", "state": "no worker", "queued": 30},
        {"name": "many", "state": "no worker", "queued": 3_334},
    ]
    assert ordered("spaces", "spaces", a_picture(spaces=spaces)) == [
        "many", "few", "failing", "unused", "paused", "slow", "some-errors", "busy", "calm",
    ]  # fmt: skip


def test_a_space_in_which_a_fifth_fails_is_failing() -> None:
    assert said("spaces", "state", a_view("spaces", state="ready", error_percent=20.0)) == ("▲ failing", "bad")
    assert said("spaces", "state", a_view("spaces", state="ready", error_percent=19.9)) == ("● ready", "good")
    assert said("spaces", "state", a_view("spaces", state="paused", error_percent=75.0)) == ("‖ paused", "warn")


def test_requests_are_running_then_queued_in_order_then_the_latest_that_ended() -> None:
    rows: list[dict[str, Value]] = [
        {"request_id": "old", "state": "failed", "ended_s": 60.0, "age_s": 70.0},
        {"request_id": "new", "state": "completed", "ended_s": 2.0, "age_s": 3.0},
        {"request_id": "second", "state": "queued", "space": "tts", "position": 2, "age_s": 1.0},
        {"request_id": "first", "state": "queued", "space": "tts", "position": 1, "age_s": 9.0},
        {"request_id": "late", "state": "running", "age_s": 3.0},
        {"request_id": "early", "state": "running", "age_s": 30.0},
    ]
    assert ordered("requests", "requests", a_picture(requests=rows)) == [
        "early", "late", "first", "second", "new", "old",
    ]  # fmt: skip


def test_every_screen_says_what_to_do_when_it_is_empty() -> None:
    assert EMPTY.keys() == COLUMNS.keys()
    assert EMPTY["workers"].startswith("no worker has registered yet: run gpuworker run")
