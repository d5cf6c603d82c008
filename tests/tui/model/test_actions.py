"""The keys that act on rows, and what is known of one row."""

import math
from array import array

import pytest
import trio

from protocol.wire.messages import Done
from protocol.wire.validators import Value
from tests.tui.screen import LOST, a_client, a_request, a_space, a_stage, a_talk, a_worker
from tui.screens.detail import LABEL

A, B, C = ("a" * 32, "b" * 32, "c" * 32)


@pytest.mark.asyncio
async def test_d_drains_and_undrains_the_worker_under_the_cursor() -> None:
    async with a_stage(screen="3") as stage:
        await stage.snapshot(workers=[a_worker("w1"), a_worker("w2", draining=True, state="draining")])
        assert stage.table.show("w1")
        await stage.press("d", "y")
        await stage.until(lambda: len(stage.source.asked) == 1)
        assert stage.table.show("w2")
        await stage.press("d")
        await stage.until(lambda: len(stage.source.asked) == 2)
        assert stage.source.asked == [("drain_worker", "w1"), ("undrain_worker", "w2")]


@pytest.mark.asyncio
async def test_capital_p_pauses_and_resumes_a_space() -> None:
    async with a_stage(screen="2") as stage:
        await stage.snapshot(spaces=[a_space("tts")])
        await stage.press("P")
        await stage.until(lambda: len(stage.source.asked) == 1)
        await stage.until(lambda: "space tts paused" in stage.text)
        await stage.delta(spaces=[a_space("tts", paused=True, state="paused")])
        await stage.press("P")
        await stage.until(lambda: len(stage.source.asked) == 2)
        assert stage.source.asked == [("pause_space", "tts"), ("resume_space", "tts")]


@pytest.mark.asyncio
async def test_capital_t_puts_tagged_requests_to_the_front_in_their_order() -> None:
    async with a_stage(screen="5") as stage:
        queued = [a_request(key, state="queued", position=at) for at, key in enumerate((A, B, C), 1)]
        await stage.snapshot(spaces=[a_space("tts", queued=3)], requests=queued)
        await stage.press("down", "space", "space", "T")
        await stage.until(lambda: len(stage.source.asked) == 2)
        assert stage.source.asked == [("promote", C), ("promote", B)]


@pytest.mark.asyncio
async def test_capital_k_disconnects_clients_and_workers() -> None:
    async with a_stage(screen="6") as stage:
        await stage.snapshot(workers=[a_worker("w1")], clients=[a_client("conn1")])
        await stage.press("K", "y")
        await stage.until(lambda: len(stage.source.asked) == 1)
        await stage.press("3", "K", "y")
        await stage.until(lambda: len(stage.source.asked) == 2)
        assert stage.source.asked == [("disconnect", "conn1"), ("disconnect", "c-w1")]


@pytest.mark.asyncio
async def test_x_ends_the_replies_of_conversations_after_it_has_asked() -> None:
    async with a_stage(screen="9") as stage:
        speaking = a_talk("t1", session="anna-1", state="speaking", reply_s=2.0, waiting=2)
        waiting = a_talk("t2", session="bert-1", state="waiting", reply_s=1.0, waiting=1)
        await stage.snapshot(talks=[speaking, waiting, a_talk("t3", said_s=9.0), a_talk("t4", said_s=1.0)])
        assert stage.keys_shown == ["t1", "t2", "t4", "t3"]
        await stage.press("x")
        asked = " ".join(stage.text.replace("│", " ").split())
        assert "End the replies in conversation anna-1 of alice, speaking now?" in asked
        assert "2 waiting texts will have no reply" in asked
        await stage.press("enter")
        assert stage.source.asked == []
        await stage.press("x", "y")
        await stage.until(lambda: "ended the replies in conversation anna-1" in stage.text)
        assert stage.table.show("t3")
        await stage.press("x")
        assert "no reply is being made in it" in stage.text
        await stage.press("home", "space", "space", "x", "y")
        await stage.until(lambda: len(stage.source.asked) == 3)
        assert stage.source.asked == [("end_talk", "t1"), ("end_talk", "t1"), ("end_talk", "t2")]


@pytest.mark.asyncio
@pytest.mark.parametrize(("screen", "key"), [("6", "x"), ("4", "d"), ("3", "T"), ("4", "P"), ("2", "K"), ("9", "K")])
async def test_a_key_that_is_not_for_these_rows_does_nothing(screen: str, key: str) -> None:
    async with a_stage(screen=screen) as stage:
        await stage.snapshot(
            spaces=[a_space("tts")],
            workers=[a_worker("w1")],
            requests=[a_request(A)],
            talks=[a_talk("t")],
            clients=[a_client("conn1")],
        )
        before = stage.app.screen
        await stage.press(key)
        await stage.draw()
        assert stage.app.screen is before
        assert stage.source.asked == []


@pytest.mark.asyncio
async def test_a_request_in_detail_has_its_timeline_params_and_error() -> None:
    async with a_stage(screen="4") as stage:
        stage.source.answers["describe"] = Done(
            action="describe",
            target=A,
            data={
                "timeline": [{"at_s": 0.0, "event": "created"}, {"at_s": 1.5, "event": "started", "worker_id": "w1"}],
                "params": {"text": "Grüße\x1b[2J"},
                "inputs": [{"name": "prompt", "media_type": "audio/wav", "size": 12_000}],
                "details": {"missing": "text"},
            },
        )
        failed = a_request(A, state="failed", code="engine_failed", message="out of memory", worker_id="w1")
        await stage.snapshot(requests=[failed], workers=[a_worker("w1", name="gpu-1")])
        await stage.press("enter")
        await stage.until(lambda: "timeline" in stage.text)
        for words in (
            "engine_failed: out of memory",
            "+1.50 s  started worker=gpu-1",
            "Grüße",
            "prompt audio/wav 12 kB",
        ):
            assert words in stage.text
        assert "missing" in stage.text
        assert "\x1b" not in stage.text


@pytest.mark.asyncio
async def test_a_live_input_in_detail_shows_what_came_and_how_fast() -> None:
    async with a_stage(screen="4") as stage:
        names = ("text", "audio", "odd", "voice")
        inputs: list[Value] = [{"name": name, "media_type": "a/b", "size": 12_000} for name in names]
        stage.source.answers["describe"] = Done(action="describe", target=A, data={"inputs": inputs, "group": "turn 7"})
        fed = {
            "text": {"bytes": 1_500, "bytes_s": 250, "age_s": 3.2, "ended": False},
            "audio": {"bytes": 34_000, "bytes_s": 0, "age_s": 60.0, "ended": True},
            "odd": {"bytes": "many", "bytes_s": None, "from": "f" * 32},
        }
        await stage.snapshot(requests=[a_request(A, inputs=fed)])
        await stage.press("enter")
        await stage.until(lambda: "voice" in stage.text)
        for words in (
            "text a/b 1.5 kB, 250 B/s, the latest 3 s ago",
            "audio a/b 34 kB, ended",
            "voice a/b 12 kB",
            "odd a/b from ffff",
        ):
            assert words in stage.text
        assert "turn 7" in stage.text
        fed["text"] = {"bytes": 2_500, "bytes_s": 0, "age_s": 0.1, "ended": True}
        await stage.snapshot(requests=[a_request(A, inputs=fed)])
        await stage.until(lambda: "text a/b 2.5 kB, ended" in stage.text)


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [(60, 20), (80, 24)])
async def test_nothing_of_a_long_error_or_of_wide_characters_is_cut_off(size: tuple[int, int]) -> None:
    async with a_stage(screen="4", size=size) as stage:
        spoken = "".join(chr(0x4E00 + at) for at in range(150))
        data: dict[str, Value] = {"params": {"text": spoken}}
        stage.source.answers["describe"] = Done(action="describe", target=A, data=data)
        why = "the prompt is " + "very " * 30 + "long"
        await stage.snapshot(requests=[a_request(A, state="failed", code="invalid_params", message=why)])
        await stage.press("enter")
        await stage.until(lambda: "params" in stage.text)
        shown = "".join(line[LABEL + 1 :] for line in stage.lines)
        assert why.replace(" ", "") in shown.replace(" ", "")
        await stage.press("pagedown")
        assert not set(spoken) - {char for line in stage.lines for char in line}


@pytest.mark.asyncio
@pytest.mark.parametrize("number", ["3", "6"])
async def test_an_id_that_is_copied_cannot_steer_the_terminal(number: str) -> None:
    async with a_stage(screen=number) as stage:
        await stage.snapshot(workers=[a_worker("w\x1b[2J")], clients=[a_client("c\x1b[2J")])
        for keys in (["y"], ["enter", "y"], ["escape", "f"]):
            await stage.press(*keys)
            await stage.draw()
            assert "\x1b" not in stage.text
            assert "copied" in stage.text


@pytest.mark.asyncio
async def test_what_came_of_an_action_is_told_for_a_while_however_late_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tui.app.NOTICE_S", 0.2)
    async with a_stage(screen="2") as stage:
        await stage.snapshot(spaces=[a_space("tts")])
        stage.source.hold = trio.Event()
        await stage.press("P")
        await stage.until(lambda: stage.app.notice[0] == "")  # of what waits, no more is said
        stage.source.hold.set()
        await stage.until(lambda: "space tts paused" in stage.text)
        await stage.until(lambda: "space tts paused" not in stage.text)


@pytest.mark.asyncio
async def test_l_listens_in_to_a_running_request_and_shows_how_loud_it_is() -> None:
    async with a_stage(screen="4") as stage:
        await stage.snapshot(requests=[a_request(A, first_frame_s=0.5)])
        await stage.press("enter", "l")
        await stage.until(lambda: stage.source.heard is not None)
        assert stage.source.heard is not None
        stage.source.heard(array("h", (int(9_000 * math.sin(at / 9)) for at in range(24_000))).tobytes())
        await stage.until(lambda: "━" in stage.line_with("listen-in"))
        await stage.press("escape")
        await stage.until(lambda: stage.source.heard is None)


@pytest.mark.asyncio
async def test_listening_ends_with_the_link_and_shows_no_level_that_is_none() -> None:
    async with a_stage(screen="4") as stage:
        await stage.snapshot(requests=[a_request(A, first_frame_s=0.5)])
        await stage.press("enter", "l")
        await stage.until(lambda: stage.source.heard is not None)
        assert "listen-in" in stage.text
        await stage.news(LOST)
        await stage.until(lambda: stage.source.heard is None)
        await stage.draw()
        assert "listen-in" not in stage.text


@pytest.mark.asyncio
async def test_a_request_that_is_shown_and_forgotten_stays_with_a_word() -> None:
    async with a_stage(screen="4") as stage:
        await stage.snapshot(requests=[a_request(A, first_frame_s=0.5)])
        await stage.press("enter")
        await stage.delta(gone={"requests": [A]})
        await stage.draw()
        assert "gone: the relay no longer knows it" in stage.text
        assert A in stage.text


@pytest.mark.asyncio
async def test_a_row_in_detail_tells_every_field_and_takes_actions() -> None:
    async with a_stage(screen="3") as stage:
        await stage.snapshot(workers=[a_worker("w1", agent="gpuworker/0.1", peer="10.0.0.7")])
        await stage.press("enter")
        await stage.draw()
        assert "gpuworker/0.1" in stage.text
        assert "10.0.0.7" in stage.text
        await stage.press("d", "y")
        await stage.until(lambda: stage.source.asked == [("drain_worker", "w1")])
