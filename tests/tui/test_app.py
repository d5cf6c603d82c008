"""The rules of the screen: the cursor stays on its id, actions are bound to ids, a lost relay, freezing, filters."""

import pytest

from protocol.wire.messages import Done
from tests.tui.screen import (
    LOST,
    REFUSED,
    a_client,
    a_line,
    a_relay,
    a_request,
    a_space,
    a_stage,
    a_worker,
)
from tui.app import RelayTui
from tui.model.feed import Connected, Disconnected
from tui.screens.base import RelayScreen
from tui.screens.dialogs import ConfirmDialog
from tui.widgets.status_lines import Part, fitted


def ids(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{number:07x}".ljust(32, "0") for number in range(count)]


@pytest.mark.asyncio
async def test_the_cursor_stays_on_its_id_while_rows_move() -> None:
    a, b, c, d = ids("a", 4)
    async with a_stage(screen="4") as stage:
        await stage.snapshot(requests=[a_request(key, age_s=age) for key, age in ((a, 9.0), (b, 8.0), (c, 7.0))])
        await stage.press("down")
        assert stage.keys_shown == [a, b, c]
        assert stage.table.cursor == b
        await stage.delta(requests=[a_request(d, age_s=99.0), a_request(b, state="completed", ended_s=0.0)])
        assert stage.keys_shown == [d, a, c, b]
        assert stage.table.cursor == b
        assert stage.line_with(b[:8]).startswith("▌")
        assert not stage.line_with(a[:8]).startswith("▌")


@pytest.mark.asyncio
async def test_a_row_that_goes_stays_under_the_cursor_until_it_is_left() -> None:
    a, b, c = ids("a", 3)
    async with a_stage(screen="4") as stage:
        await stage.snapshot(requests=[a_request(key) for key in (a, b, c)])
        await stage.press("down")
        await stage.delta(gone={"requests": [b]})
        assert stage.table.cursor == b
        assert stage.line_with(b[:8]).startswith("▌✗")
        await stage.press("down")
        assert stage.table.cursor == c
        assert b[:8] not in stage.text


@pytest.mark.asyncio
async def test_what_is_confirmed_is_done_to_the_id_the_key_was_pressed_on_though_rows_have_moved() -> None:
    a, b, new = ids("a", 3)
    async with a_stage(screen="4") as stage:
        await stage.snapshot(requests=[a_request(a, age_s=9.0), a_request(b, age_s=8.0)])
        await stage.press("down", "x")
        await stage.delta(requests=[a_request(new, age_s=99.0), a_request(a, state="failed", ended_s=0.0)])
        await stage.press("y")
        await stage.until(lambda: bool(stage.source.asked))
        assert stage.source.asked == [("cancel", b)]


@pytest.mark.asyncio
async def test_an_unconfirmed_key_acts_on_the_id_under_the_cursor() -> None:
    a, b = ids("a", 2)
    async with a_stage(screen="5") as stage:
        queued = [a_request(key, state="queued", position=at) for at, key in enumerate((a, b), 1)]
        await stage.snapshot(spaces=[a_space("tts", queued=2)], requests=queued)
        assert stage.keys_shown == [a, b]
        await stage.press("down")
        await stage.delta(requests=[a_request(b, state="queued", position=1)])
        assert stage.keys_shown == [b, a]
        await stage.press("T")
        await stage.until(lambda: bool(stage.source.asked))
        assert stage.source.asked == [("promote", b)]


@pytest.mark.asyncio
@pytest.mark.parametrize("answer", ["enter", "escape", "n"])
async def test_a_question_is_answered_with_no_unless_yes_is_chosen(answer: str) -> None:
    async with a_stage(screen="4") as stage:
        await stage.snapshot(requests=[a_request(ids("a", 1)[0])])
        await stage.press("x")
        assert isinstance(stage.app.screen, ConfirmDialog)
        assert "> No <" in stage.text
        await stage.press(answer)
        await stage.draw()
        assert stage.source.asked == []
        assert "nothing was done" in stage.text


@pytest.mark.asyncio
@pytest.mark.parametrize("answer", [("y",), ("right", "enter"), ("tab", "enter")])
async def test_yes_is_chosen_by_its_letter_or_by_going_there(answer: tuple[str, ...]) -> None:
    async with a_stage(screen="4") as stage:
        await stage.snapshot(requests=[a_request("a" * 32)])
        await stage.press("x", *answer)
        await stage.until(lambda: bool(stage.source.asked))
        await stage.until(lambda: "cancelled request aaaaaaaa" in stage.text)


@pytest.mark.asyncio
async def test_a_question_names_the_objects_and_the_effect() -> None:
    a, b, c, d = ids("a", 4)
    async with a_stage(screen="4") as stage:
        await stage.snapshot(
            requests=[
                a_request(a, age_s=9.0, audio_s=2.0, first_frame_s=0.3),
                a_request(b, age_s=8.0),
                a_request(c, state="queued", position=1),
                a_request(d, state="completed", ended_s=1.0),
            ],
            workers=[a_worker("gpu", state="busy", busy=2)],
            clients=[a_client("abcdef123456", requests=2)],
        )
        await stage.press("x")
        assert f"Cancel request {a[:8]} of alice in tts, speaking now?" in stage.text
        await stage.press("escape", "space", "space", "space", "space", "x")
        assert "Cancel 3 requests of alice, 1 of them speaking?" in stage.text
        await stage.press("y")
        await stage.until(lambda: len(stage.source.asked) == 3)
        assert stage.source.asked == [("cancel", a), ("cancel", b), ("cancel", c)]
        await stage.until(lambda: "cancelled 3 requests" in stage.text)
        assert not stage.table.tagged
        stage.source.asked.clear()
        await stage.press("3", "d")
        assert "Drain worker gpu? It finishes 2 running requests" in stage.text
        await stage.press("escape", "6", "K")
        assert "Disconnect alice (abcdef12)? It has 2 requests" in stage.text
        await stage.press("escape")
        assert stage.source.asked == []


@pytest.mark.asyncio
async def test_a_refusal_is_told() -> None:
    a, b = ids("a", 2)
    async with a_stage(screen="4") as stage:
        stage.source.answers[a] = REFUSED
        await stage.snapshot(requests=[a_request(a, age_s=9.0), a_request(b)])
        await stage.press("x", "y")
        await stage.until(lambda: "not done: request_not_found: request is unknown" in stage.text)
        await stage.press("space", "space", "x", "y")
        await stage.until(lambda: "1 of 2 not done" in stage.text)


@pytest.mark.asyncio
async def test_when_the_relay_is_gone_the_rows_stay_with_their_age_and_nothing_is_steered() -> None:
    async with a_stage(screen="4") as stage:
        await stage.snapshot(requests=[a_request("a" * 32, age_s=5.0)])
        await stage.later(2)
        assert "7 s" in stage.line_with("aaaaaaaa")
        await stage.news(LOST)
        await stage.later(12)
        assert "relay gone for 12 s" in stage.lines[0]
        assert "connection refused" in stage.lines[0]
        assert "7 s" in stage.line_with("aaaaaaaa"), "ages stand still at what was known"
        assert all(segment.style and segment.style.dim for segment in stage.table.render_line(1))
        await stage.press("x", "y")
        await stage.until(lambda: "not reachable; nothing was done" in stage.text)
        assert stage.source.asked == []


@pytest.mark.asyncio
async def test_a_relay_that_comes_back_goes_on_by_itself_with_the_cursor_where_it_was() -> None:
    a, b = ids("a", 2)
    async with a_stage(screen="4") as stage:
        await stage.snapshot(requests=[a_request(a, age_s=9.0), a_request(b)])
        await stage.press("down")
        await stage.news(LOST)
        await stage.later(12)
        await stage.news(Connected("relayd/test", "op"))
        await stage.snapshot(requests=[a_request("c" * 32, age_s=99.0), a_request(a, age_s=9.0), a_request(b)])
        assert "gone" not in stage.lines[0]
        assert "serving" in stage.lines[0]
        assert len(stage.keys_shown) == 3
        assert stage.table.cursor == b


@pytest.mark.asyncio
async def test_before_the_first_answer_it_says_why_there_is_none() -> None:
    async with a_stage() as stage:
        await stage.news(LOST)
        await stage.later(2)
        assert "no relay for 2 s, next try in 1 s: connection refused" in stage.lines[0]
        assert "no worker" not in stage.text


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [(60, 20), (80, 24)])
async def test_why_there_is_no_relay_is_said_in_full_however_narrow_the_terminal_is(size: tuple[int, int]) -> None:
    why = "not a relay token: tokens start with rly_c_, rly_w_ or rly_o_"
    async with a_stage(size=size) as stage:
        for key in ("1", "4"):
            await stage.press(key)
            await stage.news(Disconnected(why, 3.0))
            words = " ".join(" ".join(stage.lines[2:]).split())
            assert words.count(why) == 1
        await stage.news(Connected("relayd/test", "op"))
        await stage.snapshot()
        assert "rly_o_" not in stage.text


@pytest.mark.asyncio
async def test_freeze_holds_the_picture_and_says_for_how_long() -> None:
    a, b = ids("a", 2)
    async with a_stage(screen="4") as stage:
        await stage.snapshot(requests=[a_request(a, age_s=5.0)])
        await stage.press("p")
        await stage.delta(requests=[a_request(b), a_request(a, state="failed", code="engine_failed")])
        await stage.later(12)
        assert "frozen 12 s" in stage.lines[1]
        assert stage.keys_shown == [a]
        assert "running" in stage.line_with(a[:8])
        assert "5 s" in stage.line_with(a[:8])
        await stage.press("p")
        assert "frozen" not in stage.lines[1]
        assert set(stage.keys_shown) == {a, b}
        assert "failed" in stage.line_with(a[:8])


@pytest.mark.asyncio
async def test_a_filter_is_a_regular_expression_and_stays_in_sight() -> None:
    a, b, c = ids("a", 3)
    async with a_stage(screen="4") as stage:
        rows = [a_request(a, principal="alice"), a_request(b, principal="Bob"), a_request(c, principal="carol")]
        await stage.snapshot(requests=rows)
        await stage.press("slash")
        await stage.type("bob|car")
        assert set(stage.keys_shown) == {b, c}
        await stage.press("enter")
        assert "filter /bob|car" in stage.lines[1]
        await stage.delta(requests=[a_request("d" * 32, principal="dora")])
        assert set(stage.keys_shown) == {b, c}
        await stage.press("escape")
        assert len(stage.keys_shown) == 4
        assert "filter" not in stage.lines[1]


@pytest.mark.asyncio
async def test_a_filter_is_inverted_by_an_exclamation_mark_and_a_fault_in_it_is_told() -> None:
    a, b = ids("a", 2)
    async with a_stage(screen="4") as stage:
        await stage.snapshot(requests=[a_request(a, principal="alice"), a_request(b, principal="bob")])
        await stage.press("slash")
        await stage.type("!bob")
        assert stage.keys_shown == [a]
        await stage.press("backspace", "backspace", "backspace", "backspace")
        await stage.type("[")
        assert "filter: unterminated character set" in stage.lines[1]
        assert len(stage.keys_shown) == 2


@pytest.mark.asyncio
async def test_a_filter_that_hides_the_row_under_the_cursor_moves_it_to_one_that_is_shown() -> None:
    a, b = ids("a", 2)
    async with a_stage(screen="4") as stage:
        await stage.snapshot(requests=[a_request(a, principal="alice", age_s=9.0), a_request(b, principal="bob")])
        await stage.press("slash")
        await stage.type("bob")
        assert stage.table.cursor == b


@pytest.mark.asyncio
async def test_readonly_steers_nothing_and_offers_nothing() -> None:
    async with a_stage(screen="4", readonly=True) as stage:
        await stage.snapshot(requests=[a_request("a" * 32)])
        assert "read-only" in stage.lines[1]
        assert "Cancel" not in stage.lines[-1]
        await stage.press("x")
        await stage.draw()
        assert not isinstance(stage.app.screen, ConfirmDialog)
        assert "this is read-only" in stage.text
        assert stage.source.asked == []


@pytest.mark.asyncio
async def test_an_empty_relay_says_what_to_do() -> None:
    async with a_stage(screen="3", size=(60, 20)) as stage:
        await stage.snapshot()
        assert "no worker has registered yet: run gpuworker" in stage.text


@pytest.mark.asyncio
async def test_what_follows_from_one_and_the_same_picture_is_drawn_only_once() -> None:
    """Nothing is sent while nothing changes."""
    async with a_stage(screen="3") as stage:
        await stage.snapshot(workers=[a_worker("gpu")], spaces=[a_space("tts")])
        await stage.later(0)
        drawn: list[object] = []
        stage.app._display = lambda _screen, update: drawn.append(update)  # type: ignore[method-assign,assignment]
        for _ in range(5):
            await stage.later(1)
        assert not [update for update in drawn if update is not None]


@pytest.mark.asyncio
async def test_ten_thousand_requests_are_scrolled_through() -> None:
    keys = [f"{number:032x}" for number in range(10_000)]
    async with a_stage(screen="4") as stage:
        await stage.snapshot(
            requests=[a_request(key, state="completed", ended_s=float(at)) for at, key in enumerate(keys)]
        )
        assert "1-26 of 10000" in stage.lines[1]
        await stage.press("end")
        assert stage.table.cursor == keys[-1]
        await stage.press("pageup", "up")
        assert stage.table.cursor == keys[-1 - 25 - 1]
        assert "of 10000" in stage.lines[1]


@pytest.mark.asyncio
async def test_the_log_follows_its_newest_line_until_the_cursor_goes_up() -> None:
    async with a_stage(screen="7", size=(80, 12)) as stage:
        await stage.snapshot(log=[a_line(number) for number in range(50)])
        assert stage.table.cursor == "49"
        await stage.delta(log=[a_line(50)])
        assert stage.table.cursor == "50"
        assert "event 50" in stage.text
        await stage.press("up")
        await stage.delta(log=[a_line(51)])
        assert stage.table.cursor == "49"
        await stage.press("f")
        assert stage.table.cursor == "51"


@pytest.mark.asyncio
async def test_a_screen_is_usable_at_sixty_by_twenty() -> None:
    async with a_stage(size=(60, 20)) as stage:
        await stage.snapshot(
            relay=[a_relay(queued=3, errors_min=2)], spaces=[a_space("tts")], requests=[a_request("a" * 32)]
        )
        assert "tts" in stage.text
        assert "aaaaaaaa" in stage.text
        assert "queued 3" in stage.lines[0]
        assert all(len(line) <= 60 for line in stage.lines)


@pytest.mark.asyncio
async def test_names_cannot_steer_the_terminal() -> None:
    async with a_stage(screen="3") as stage:
        await stage.snapshot(workers=[a_worker("w", name="gpu\x1b[2J", state="idle\x07")])
        assert "\x1b" not in stage.text
        assert "\x07" not in stage.text


@pytest.mark.asyncio
async def test_a_tick_of_the_clock_while_the_screen_closes_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks: list[bool] = []

    def tick(screen: RelayScreen) -> None:
        app = screen.app
        assert isinstance(app, RelayTui)
        app.draw()
        ticks.append(True)

    monkeypatch.setattr(RelayScreen, "on_unmount", tick, raising=False)
    async with a_stage() as stage:
        await stage.snapshot(spaces=[a_space("tts")])
    assert ticks


@pytest.mark.asyncio
async def test_the_detail_of_a_request_shows_what_its_failed_attempts_printed() -> None:
    async with a_stage(screen="4") as stage:
        report = "attempt 1 on box-1:\nTraceback (most recent call last):\nKeyError: 'weights'"
        stage.source.answers["describe"] = Done(action="describe", target="r1", data={"report": report})
        await stage.snapshot(requests=[a_request("r1", state="failed", code="engine_failed", message="it broke")])
        await stage.press("enter")
        await stage.draw()
        await stage.until(lambda: "KeyError: 'weights'" in stage.text)
        assert "attempt 1 on box-1:" in stage.text


def test_a_smaller_part_takes_the_room_that_a_larger_one_could_not_use() -> None:
    parts: list[Part] = [(0, [("serving", "")]), (2, [("1st audio 260 ms", "")]), (3, [("errors 3", "")])]
    assert fitted(parts, 20) == [("serving", ""), ("  ", ""), ("errors 3", "")]
    assert fitted(parts, 5) == [("serving", "")]
    assert len(fitted(parts, 60)) == 5
