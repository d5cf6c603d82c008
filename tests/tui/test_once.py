"""`relay-tui --once`: one picture of a real relay."""

import json
import os
import sys
from pathlib import Path

import pytest
import trio

from protocol.messages import Accepted, Registered, Submit
from tests.relayd.harness import a_config, an_id, fake_worker, peer, running
from tui.cli import describe, main, take_picture


@pytest.mark.trio
async def test_a_picture_has_the_relay_its_spaces_workers_and_requests(tmp_path: Path) -> None:
    async with running(a_config(tmp_path / "state")) as urls, fake_worker(urls[0]) as worker:
        await worker.peer.next(Registered)
        async with peer(urls[0], "client") as client:
            request_id = an_id()
            client.send(Submit(request_id=request_id, space="tts", params={"text": "hello"}))
            await client.next(Accepted)
            await worker.assigned()
            picture = await take_picture(urls[0], readonly=True)
    assert picture["spaces"][0]["name"] == "tts"
    assert picture["workers"][0]["state"] == "busy"
    assert picture["requests"][0]["state"] == "running"
    text = describe(picture)
    assert "space tts: ready, 1/1 slots busy, 0 queued" in text
    assert f"request {request_id}: running in tts" in text


@pytest.mark.trio
async def test_without_a_worker_the_picture_says_what_to_run(tmp_path: Path) -> None:
    async with running(a_config(tmp_path / "state")) as urls:
        assert "no worker has registered yet: run gpuworker run" in describe(await take_picture(urls[0], False))


def test_without_a_relay_it_ends_with_3_and_names_the_socket(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--once", "--url", f"unix:{tmp_path}/nothing.sock"]) == 3
    assert "nothing.sock" in capsys.readouterr().err


def test_a_wrong_url_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--once", "--url", "http://localhost"]) == 2
    assert "ws://" in capsys.readouterr().err


@pytest.mark.trio
async def test_json_is_one_object_on_stdout(tmp_path: Path) -> None:
    async with running(a_config(tmp_path / "state")) as urls:
        done = await trio.run_process(
            [sys.executable, "-m", "tui.cli", "--once", "--json", "--url", urls[0]],
            capture_stdout=True,
            env=dict(os.environ),
        )
    assert {"relay", "spaces", "workers", "requests", "clients"} == json.loads(done.stdout).keys()


def test_a_worker_cannot_steer_the_terminal_by_what_it_calls_itself() -> None:
    row = {"worker_id": "w\x1b[2J", "state": "idle", "engine": "mock\nrelay stopped", "spaces": ["tts"]}
    assert describe({"workers": [row]}) == "worker w\\x1b[2J: idle, mock\\nrelay stopped, tts"
