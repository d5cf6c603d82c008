"""Every key that the operator has."""

import csv
import json
import re
from pathlib import Path

import pytest

from tests.tui.screen import Stage, a_client, a_line, a_request, a_space, a_stage, a_talk, a_worker
from tui.model.columns import COLUMNS, choose
from tui.screens.base import RelayScreen
from tui.screens.dialogs import ExportDialog, HelpDialog, JumpDialog

A, B, C = ("a" * 32, "b" * 32, "c" * 32)


async def three_requests(stage: Stage) -> None:
    await stage.snapshot(
        requests=[
            a_request(A, principal="anna", age_s=9.0, first_frame_s=0.5),
            a_request(B, principal="carl", age_s=8.0, first_frame_s=0.9),
            a_request(C, principal="bert", age_s=7.0, first_frame_s=0.1),
        ]
    )


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("key", "crumb"),
    [
        ("1", "overview"),
        ("2", "spaces"),
        ("3", "workers"),
        ("4", "requests"),
        ("5", "queue of tts"),
        ("6", "clients"),
        ("7", "log"),
        ("8", "audit"),
        ("9", "talks"),
    ],
)
async def test_a_number_shows_its_screen(key: str, crumb: str) -> None:
    async with a_stage() as stage:
        await stage.snapshot(
            spaces=[a_space("tts", queued=1)],
            workers=[a_worker("gpu")],
            requests=[a_request(A, state="queued", position=1)],
            talks=[a_talk("t1")],
            clients=[a_client("client1")],
            log=[a_line(1)],
            audit=[{"id": "1", "time": 1e9, "principal": "op", "action": "cancel", "target": A, "outcome": "done"}],
        )
        await stage.press(key)
        await stage.draw()
        assert stage.lines[1].startswith(f"relay › {crumb}")
        assert "1-1 of 1" in stage.lines[1]


@pytest.mark.asyncio
async def test_enter_drills_in_and_escape_goes_back_with_a_breadcrumb() -> None:
    async with a_stage(screen="2") as stage:
        await stage.snapshot(
            spaces=[a_space("tts", queued=1)], requests=[a_request(A, state="queued", position=1), a_request(B)]
        )
        await stage.press("enter")
        await stage.draw()
        assert stage.lines[1].startswith("relay › spaces › queue of tts")
        assert stage.keys_shown == [A]
        await stage.press("enter")
        await stage.draw()
        assert stage.lines[1].startswith("relay › spaces › queue of tts › request aaaaaaaa")
        await stage.press("escape", "escape")
        await stage.draw()
        assert stage.lines[1].startswith("relay › spaces  ")
        await stage.press("escape")
        assert stage.lines[1].startswith("relay › spaces  ")


@pytest.mark.asyncio
async def test_e_leads_from_what_is_wrong_to_the_requests_and_to_one_of_them() -> None:
    async with a_stage() as stage:
        await stage.snapshot(requests=[a_request(A)])
        assert "wrong" not in stage.text
        why = {"code": "engine_failed", "message": "out of memory", "ended_s": 1.0}
        await stage.delta(requests=[a_request(key, state="failed", **why) for key in (A, B)])
        await stage.draw()
        assert "✗ wrong e opens  2x tts engine_failed out of memory" in stage.text
        await stage.press("e")
        await stage.draw()
        assert stage.lines[1].startswith("relay › overview › wrong  1-1 of 1")
        assert "x Cancel" not in stage.lines[-1]
        await stage.press("enter")
        await stage.draw()
        assert stage.lines[1].startswith("relay › overview › wrong › tts engine_failed")
        assert sorted(stage.keys_shown) == [A, B]
        await stage.press("enter")
        await stage.draw()
        assert "engine_failed: out of memory" in stage.text
        await stage.press("escape", "escape")
        await stage.delta(requests=[], gone={"requests": [A]})
        await stage.press("enter")
        await stage.draw()
        assert stage.lines[1].startswith("relay › overview › wrong › request bbbbbbbb"), "the only one is opened itself"


@pytest.mark.asyncio
async def test_keys_that_would_do_nothing_are_not_offered() -> None:
    async with a_stage(screen="4") as stage:
        await stage.snapshot(requests=[a_request(A, state="completed", ended_s=1.0), a_request(B)])
        await stage.press("end")
        assert "x Cancel" not in stage.lines[-1]
        await stage.press("home")
        assert "x Cancel" in stage.lines[-1]
        assert "T To the front" not in stage.lines[-1]


@pytest.mark.asyncio
async def test_the_number_of_the_screen_one_is_in_goes_to_its_beginning() -> None:
    async with a_stage(screen="4") as stage:
        await three_requests(stage)
        await stage.press("enter")
        await stage.draw()
        assert "request aaaaaaaa" in stage.lines[1]
        await stage.press("4")
        await stage.draw()
        assert stage.keys_shown == [A, B, C]


@pytest.mark.asyncio
async def test_s_sorts_by_the_next_column_and_r_reverses() -> None:
    async with a_stage(screen="4") as stage:
        await three_requests(stage)
        await stage.press("s", "s")
        assert stage.table.sorted_by is not None
        assert stage.table.sorted_by.key == "principal"
        assert stage.keys_shown == [A, C, B]
        assert re.search("Principa?l?↑", stage.lines[2])
        await stage.press("r")
        assert stage.keys_shown == [B, C, A]
        assert "by Principal, reversed" in stage.lines[1]
        await stage.press("r")
        await stage.press(*["s"] * (len(choose(COLUMNS["requests"], 98)) - 1))
        assert "by " not in stage.lines[1]
        assert stage.keys_shown == [A, B, C]


@pytest.mark.asyncio
async def test_the_cursor_stays_on_its_id_when_the_order_changes() -> None:
    async with a_stage(screen="4") as stage:
        await three_requests(stage)
        await stage.press("down", "r")
        assert stage.table.cursor == B


@pytest.mark.asyncio
async def test_f_follows_a_row_to_where_it_goes() -> None:
    keys = [f"{number:08x}".ljust(32, "0") for number in range(100)]
    async with a_stage(screen="4", size=(100, 12)) as stage:
        rows = [a_request(key, age_s=1000.0 - at) for at, key in enumerate(keys)]
        await stage.snapshot(requests=rows)
        await stage.press("f")
        assert f"following {keys[0][:8]}" in stage.lines[1]
        await stage.delta(requests=[a_request(keys[0], state="completed", ended_s=0.0)])
        assert stage.table.cursor == keys[0]
        assert stage.line_with(keys[0][:8] + " ").startswith("»")
        await stage.press("f")
        assert "following" not in stage.lines[1]


@pytest.mark.asyncio
async def test_without_following_the_view_stays_and_tells_that_the_cursor_is_out_of_sight() -> None:
    keys = [f"{number:08x}".ljust(32, "0") for number in range(100)]
    async with a_stage(screen="4", size=(100, 12)) as stage:
        await stage.snapshot(requests=[a_request(key, age_s=1000.0 - at) for at, key in enumerate(keys)])
        await stage.delta(requests=[a_request(keys[0], state="completed", ended_s=0.0)])
        assert stage.table.cursor == keys[0]
        assert "cursor out of sight" in stage.lines[1]
        assert keys[1][:8] in stage.lines[3]


@pytest.mark.asyncio
async def test_space_tags_and_takes_the_tag_off_and_escape_takes_off_all() -> None:
    async with a_stage(screen="4") as stage:
        await three_requests(stage)
        await stage.press("space", "space")
        assert list(stage.table.tagged) == [A, B]
        assert "2 tagged" in stage.lines[1]
        assert "◆" in stage.line_with("aaaaaaaa")
        await stage.press("home", "space")
        assert list(stage.table.tagged) == [B]
        await stage.press("escape")
        assert not stage.table.tagged


@pytest.mark.asyncio
async def test_a_tagged_row_that_goes_is_tagged_no_more() -> None:
    async with a_stage(screen="4") as stage:
        await three_requests(stage)
        await stage.press("space", "space")
        await stage.delta(gone={"requests": [A]})
        assert list(stage.table.tagged) == [B]


@pytest.mark.asyncio
async def test_plus_and_minus_change_how_often_it_is_drawn() -> None:
    async with a_stage(screen="4") as stage:
        await three_requests(stage)
        await stage.press("plus")
        assert stage.app.rate == 2
        assert "drawn 2 times a second" in stage.text
        assert "2 Hz" in stage.lines[1]
        await stage.press("minus", "minus", "minus", "minus", "minus")
        assert stage.app.rate == 0.2


@pytest.mark.asyncio
async def test_y_copies_the_whole_id() -> None:
    async with a_stage(screen="4") as stage:
        await three_requests(stage)
        await stage.press("down", "y")
        assert stage.app.clipboard == B
        await stage.press("space", "space", "y")
        assert stage.app.clipboard == f"{B}\n{C}"


@pytest.mark.asyncio
@pytest.mark.parametrize("suffix", ["csv", "json"])
async def test_capital_e_writes_what_is_shown_to_a_new_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    async with a_stage(screen="4") as stage:
        await three_requests(stage)
        await stage.delta(requests=[a_request("d" * 32, principal="=dora()", age_s=1.0)])
        await stage.press("slash")
        await stage.type("anna|dora")
        await stage.press("enter", "E")
        assert isinstance(stage.app.screen, ExportDialog)
        stage.app.screen.query_one("Input").value = str(path)  # type: ignore[attr-defined]
        await stage.press("enter")
        await stage.draw()
        assert "2 rows written to" in stage.text
        text = path.read_text(encoding="utf-8")
        rows = list(csv.DictReader(text.splitlines())) if suffix == "csv" else json.loads(text)
        assert [row["request_id"] for row in rows] == [A, "d" * 32]
        assert rows[1]["principal"] == ("'=dora()" if suffix == "csv" else "=dora()")
        assert path.stat().st_mode & 0o777 == 0o600
        await stage.press("E")
        stage.app.screen.query_one("Input").value = str(path)  # type: ignore[attr-defined]
        await stage.press("enter")
        await stage.draw()
        assert "not written" in stage.text
        assert path.read_text(encoding="utf-8") == text


@pytest.mark.asyncio
async def test_z_gives_a_pane_all_the_room_and_takes_it_back() -> None:
    async with a_stage() as stage:
        await stage.snapshot(spaces=[a_space("tts")], requests=[a_request(A)])
        assert "audio s" in stage.text
        await stage.press("z")
        await stage.draw()
        assert "aaaaaaaa" not in stage.text
        assert stage.screen.query_one("#spaces").size.height == 28
        await stage.press("z", "tab", "z")
        await stage.draw()
        assert "aaaaaaaa" in stage.text
        assert "audio s" not in stage.text
        assert not stage.screen.query_one("#spaces").display
        await stage.press("escape")
        await stage.draw()
        assert "audio s" in stage.text


@pytest.mark.asyncio
async def test_question_mark_lists_the_keys_of_this_screen() -> None:
    async with a_stage(screen="3", size=(100, 50)) as stage:
        await stage.snapshot(workers=[a_worker("gpu")])
        await stage.press("question_mark")
        assert isinstance(stage.app.screen, HelpDialog)
        for what in ("Drain/undrain", "Disconnect", "Filter", "Jump", "Freeze", "Overview", "Quit", "Sort"):
            assert what in stage.text
        assert "Pause/resume" not in stage.text
        await stage.press("escape")
        assert not isinstance(stage.app.screen, HelpDialog)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("typed", "crumb", "cursor"),
    [
        ("aud", "audit", None),
        ("gpu-2", "workers", "w2"),
        ("voi", "spaces", "voices"),
        ("bbbb", "requests", B),
        ("zoe", "clients", "conn7"),
        ("anna-2", "talks", "t2"),
    ],
)
async def test_colon_jumps_to_anything_by_its_name(typed: str, crumb: str, cursor: str | None) -> None:
    async with a_stage() as stage:
        await stage.snapshot(
            spaces=[a_space("tts"), a_space("voices")],
            workers=[a_worker("w1", name="gpu-1"), a_worker("w2", name="gpu-2")],
            requests=[a_request(A), a_request(B)],
            talks=[a_talk("t1"), a_talk("t2", session="anna-2")],
            clients=[a_client("conn6"), a_client("conn7", principal="Zoe")],
        )
        await stage.press("colon")
        assert isinstance(stage.app.screen, JumpDialog)
        await stage.type(typed)
        await stage.press("enter")
        await stage.draw()
        assert stage.lines[1].startswith(f"relay › {crumb}")
        if cursor is not None:
            assert stage.table.cursor == cursor


@pytest.mark.asyncio
@pytest.mark.parametrize(("key", "code"), [("q", 0), ("ctrl+c", 130)])
async def test_q_and_ctrl_c_end_it(key: str, code: int) -> None:
    async with a_stage() as stage:
        await stage.press(key)
        assert stage.app.return_value == code


@pytest.mark.asyncio
async def test_q_typed_into_the_filter_is_a_letter() -> None:
    async with a_stage(screen="4") as stage:
        await three_requests(stage)
        await stage.press("slash")
        await stage.type("qx4")
        assert stage.table.order.filter.text == "qx4"
        assert stage.app.return_value is None


@pytest.mark.asyncio
async def test_capital_l_shows_the_log_of_what_is_under_the_cursor() -> None:
    async with a_stage(screen="4") as stage:
        await three_requests(stage)
        await stage.delta(log=[a_line(1, request_id=A), a_line(2, request_id=B), a_line(3)])
        await stage.press("down", "L")
        await stage.draw()
        assert stage.lines[1].startswith("relay › log")
        assert stage.keys_shown == ["2"]


@pytest.mark.asyncio
async def test_an_asterisk_tags_all_rows_shown_and_none_the_second_time() -> None:
    async with a_stage(screen="4") as stage:
        await three_requests(stage)
        await stage.press("asterisk")
        assert set(stage.table.tagged) == {A, B, C}
        await stage.press("asterisk")
        assert not stage.table.tagged
        await stage.press("slash", *"anna", "enter", "asterisk")
        assert set(stage.table.tagged) == {A}


@pytest.mark.asyncio
async def test_v_tags_from_the_row_tagged_last_to_the_cursor() -> None:
    async with a_stage(screen="4") as stage:
        await three_requests(stage)
        await stage.press("V")
        assert list(stage.table.tagged) == [A]
        await stage.press("end", "V")
        assert list(stage.table.tagged) == [A, B, C]


@pytest.mark.asyncio
async def test_hundreds_of_requests_are_cancelled_at_once_and_the_question_says_whose() -> None:
    async with a_stage(screen="4") as stage:
        keys = [f"{number:032x}" for number in range(600)]
        await stage.snapshot(
            requests=[a_request(key, principal="alice" if number % 3 else "bob") for number, key in enumerate(keys)]
        )
        await stage.press("asterisk", "x")
        await stage.until(lambda: "y yes" in stage.text)
        assert "Cancel 600 requests of alice (400), bob (200), none of them" in stage.text
        await stage.press("y")
        await stage.until(lambda: len(stage.source.asked) == 600)
        await stage.until(lambda: "cancelled 600 requests" in stage.text)


@pytest.mark.asyncio
async def test_a_jump_takes_off_the_filter_that_hides_its_row() -> None:
    async with a_stage(screen="4") as stage:
        await three_requests(stage)
        await stage.press("slash", *"anna", "enter")
        assert stage.keys_shown == [A]
        await stage.press("colon")
        await stage.until(lambda: "Screen, space" in stage.text)
        await stage.press(*"bbbb", "enter")
        await stage.until(lambda: "filter" not in stage.lines[1])
        await stage.until(lambda: isinstance(stage.app.screen, RelayScreen) and stage.table.cursor == B)
        assert stage.keys_shown == [A, B, C]
