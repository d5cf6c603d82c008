"""`relay-tui --once`: one picture of a real relay, or of the demo, as text or as JSON."""

import json
import os
import sys
from pathlib import Path

import pytest
import trio
from rich.cells import cell_len

from protocol.client.contexts import Login
from protocol.wire.messages import Accepted, Registered, Submit
from tests.support.fake_worker import fake_worker
from tests.support.relay import a_config, an_id, peer, running
from tui.cli import main
from tui.demo.scenes import SCENES
from tui.print_once import TOPICS, demo_model, describe, fetch_model


@pytest.mark.trio
async def test_a_picture_has_the_relay_its_spaces_workers_and_requests(tmp_path: Path) -> None:
    async with running(a_config(tmp_path / "state")) as started, fake_worker(started.urls[0]) as worker:
        await worker.peer.next(Registered)
        async with peer(started.urls[0], "client") as client:
            request_id = an_id()
            client.send(Submit(request_id=request_id, space="tts", params={"text": "hello"}))
            await client.next(Accepted)
            await worker.assigned()
            model = await fetch_model(Login(started.urls[0], ""), readonly=True)
    assert model["spaces"][0]["name"] == "tts"
    assert model["workers"][0]["state"] == "busy"
    assert model["requests"][0]["state"] == "running"
    lines = [line.split() for line in describe(model, 120).splitlines()]
    assert ["relay", "●", "serving,"] in [words[:3] for words in lines]
    assert ["tts", "●", "ready", "1", "1/1", "0"] in [words[:6] for words in lines]
    assert [request_id[:8], "▸", "running"] in [[words[0], *words[3:5]] for words in lines if len(words) > 5]


@pytest.mark.trio
async def test_without_a_worker_the_picture_says_what_to_run(tmp_path: Path) -> None:
    async with running(a_config(tmp_path / "state")) as started:
        assert "no worker has registered yet: run gpuworker run" in describe(
            await fetch_model(Login(started.urls[0], ""), False), 120
        )


def test_without_a_relay_it_ends_with_3_and_names_the_socket(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--once", "--url", f"unix:{tmp_path}/nothing.sock"]) == 3
    assert "nothing.sock" in capsys.readouterr().err


def test_a_wrong_url_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--once", "--url", "ftp://localhost"]) == 2
    assert "ws://" in capsys.readouterr().err


@pytest.mark.trio
async def test_json_is_one_object_on_stdout(tmp_path: Path) -> None:
    async with running(a_config(tmp_path / "state")) as started:
        done = await trio.run_process(
            [sys.executable, "-m", "tui.cli", "--once", "--json", "--url", started.urls[0]],
            capture_stdout=True,
            env=dict(os.environ),
        )
    assert {"relay", "spaces", "workers", "requests", "talks", "clients"} == json.loads(done.stdout).keys()


def test_a_worker_cannot_steer_the_terminal_by_what_it_calls_itself() -> None:
    row = {"worker_id": "1", "name": "w\x1b[2J\nrelay stopped", "state": "idle", "engine": "mock", "spaces": ["tts"]}
    text = describe({"workers": [row]}, 200)
    assert "\x1b" not in text
    assert "w\\x1b[2J relay stopped" in text


@pytest.mark.parametrize("scene", list(SCENES))
@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_no_line_is_wider_than_it_was_asked_to_be(scene: str, width: int) -> None:
    assert max(map(cell_len, describe(demo_model(scene), width).splitlines())) <= width


def test_what_is_wrong_stands_in_the_first_lines() -> None:
    text = describe(demo_model("broken"), 120).splitlines()
    assert text[3].startswith("voices")
    assert "✗ no worker" in text[3]


def test_in_ascii_nothing_but_names_is_not_ascii() -> None:
    text = describe(demo_model("broken"), 80, ascii_only=True)
    assert {char for char in text if not char.isascii() and not char.isalnum()} <= set("🚀🎧")


def test_many_requests_are_counted_and_not_all_listed() -> None:
    assert "\nand " in describe(demo_model("broken"), 120)


def test_the_demo_needs_no_relay(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--once", "--demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == set(TOPICS)
