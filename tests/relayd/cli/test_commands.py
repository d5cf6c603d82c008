"""The `relayd` commands and what they do to a daemon, or to the store of one that does not run."""

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from protocol.commands.exit_codes import silence_stdout
from protocol.commands.wav_writer import AudioWriter
from protocol.wire.errors import ConnectError
from protocol.wire.frames import Completed, Frame, Started
from protocol.wire.structs import AudioFormat
from relayd import demo
from relayd.admin import AdminError, open_admin
from relayd.admin_commands import _print_rows
from relayd.auth.tokens import TokenRegistry
from relayd.cli import main
from relayd.store.factory import open_offline
from relayd.store.records import PutToken
from tests.support.relay import a_config, running

ID = "1" * 32
LIMITS = {"max_queued": 3, "max_running": 2, "max_connections": 1}


@pytest.mark.parametrize("runs", [True, False])
@pytest.mark.trio
async def test_the_limits_of_a_token_can_be_set_and_are_listed(tmp_path: Path, runs: bool) -> None:
    config = a_config(tmp_path / "state")

    async def check() -> None:
        async with open_admin(config) as admin:
            await admin.create_token("ann", "client", ["tts"], None, LIMITS)
            await admin.create_token("bob", "client", [], "30d", {"max_running": 1})
            await admin.create_token("cyd", "client", [], None, {})
            assert [row["limits"] for row in await admin.tokens()] == [LIMITS, {"max_running": 1}, {}]
        with pytest.raises(AdminError, match="max_queued must be a positive integer"):
            async with open_admin(config) as admin:
                await admin.create_token("dan", "client", [], None, {"max_queued": 0})

    if runs:
        async with running(config):
            await check()
    else:
        await check()


def test_token_create_takes_limits_and_token_list_shows_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = ("--state-dir", str(tmp_path))
    limits = ("--max-queued", "3", "--max-running", "2", "--max-connections", "1")
    assert main(["token", "create", "--role", "client", "--name", "ann", *limits, *state]) == 0
    assert capsys.readouterr().out.startswith("rly_c_")
    assert main(["token", "list", *state]) == 0
    assert "max_queued=3,max_running=2,max_connections=1" in capsys.readouterr().out
    assert main(["token", "create", "--role", "client", "--name", "ann", "--max-queued", "0", *state]) == 1
    assert "limits.max_queued" in capsys.readouterr().err
    assert main(["token", "create", "--role", "operator", "--name", "eye", "--read-only", *state]) == 0
    assert main(["token", "list", "--principal", "eye", "--json", *state]) == 0
    assert [row["readonly"] for row in json.loads(capsys.readouterr().out.splitlines()[-1])] == [True]


def test_a_token_without_an_end_that_can_be_told_is_refused_and_the_list_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = ("--state-dir", str(tmp_path))
    expires = ("--expires", "9999-12-31T23:59:59-05:00")
    assert main(["token", "create", "--role", "client", "--name", "ann", *expires, *state]) == 1
    assert "beyond the year 9999" in capsys.readouterr().err
    with open_offline(tmp_path) as store:  # made by an earlier version
        token = TokenRegistry().create(role="client", name="old", now=0.0, expires_at=253_402_318_799.0)
        store.commit(PutToken(token.record))
    assert main(["token", "list", "--json", *state]) == 0
    assert [row["expires"] for row in json.loads(capsys.readouterr().out)] == ["9999-12-31T23:59:59Z"]


@pytest.mark.trio
async def test_a_connection_lost_within_a_command_is_told_as_that(tmp_path: Path) -> None:
    config = a_config(tmp_path / "state")
    async with running(config):
        with pytest.raises(AdminError, match="lost the connection to the relay: gone"):
            async with open_admin(config):
                raise ConnectError("gone")


@pytest.mark.trio
async def test_a_socket_that_a_killed_daemon_left_leads_to_the_store(tmp_path: Path) -> None:
    config = a_config(tmp_path / "state")
    assert config.socket_path is not None
    with trio.socket.socket(trio.socket.AF_UNIX) as dead:
        await dead.bind(str(config.socket_path))
    async with open_admin(config) as admin:
        assert [row["name"] for row in await admin.spaces()] == ["tts"]


@pytest.mark.trio
async def test_without_a_unix_socket_a_running_daemon_is_called_what_it_is(tmp_path: Path) -> None:
    config = a_config(tmp_path / "state", unix_socket=False, listen="127.0.0.1:0")
    async with open_admin(config) as admin:
        assert await admin.tokens() == []
    async with running(config):
        with pytest.raises(
            AdminError, match="a relay is running, and with unix_socket = false commands cannot reach it"
        ):
            async with open_admin(config):
                pass


@pytest.mark.trio
async def test_without_a_unix_socket_and_a_store_no_command_pretends_that_no_relay_runs(tmp_path: Path) -> None:
    config = a_config(tmp_path / "state", unix_socket=False, listen="127.0.0.1:0", store="memory")
    with pytest.raises(AdminError, match="commands cannot reach the relay"):
        async with open_admin(config):
            pass


def test_what_a_worker_calls_itself_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"worker_id": "w\x1b[2J\nrelayd: done", "spaces": ["a", "b"], "rtt_ms": None}
    _print_rows([row], tuple(row), False)
    assert capsys.readouterr().out.splitlines()[1] == "w\\x1b[2J\\nrelayd: done  a,b     -"


def test_a_demo_that_cannot_write_its_file_says_so_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.mkdtemp", None)
    assert main(["demo", "Hello.", "-o", str(tmp_path / "nowhere" / "x.wav")]) == 1
    assert "relayd: cannot write" in capsys.readouterr().err


class Silent:
    """A relay, and its one request, which ends well and brings no audio."""

    async def events(self) -> AsyncIterator[Frame]:
        yield Started(request_id=ID, attempt=1, seq=0, format=AudioFormat(sample_rate=22_050))
        yield Completed(request_id=ID, attempt=1, seq=1, result={})

    async def result(self) -> dict[str, Any]:
        return {}

    @asynccontextmanager
    async def submit(self, _space: str, _params: dict[str, Any]) -> AsyncIterator["Silent"]:
        yield self


@asynccontextmanager
async def open_silent(*_args: Any, **_options: Any) -> AsyncIterator[Silent]:
    yield Silent()


@pytest.mark.trio
async def test_a_demo_without_audio_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "open_relay", open_silent)
    output = tmp_path / "x.wav"
    writer = AudioWriter(output)
    try:
        with pytest.raises(demo.DemoFailed, match="without any audio"):
            await demo._speak(demo.Demo(tmp_path), "...", output, writer)
    finally:
        writer.close()


def test_stdout_can_be_quieted_twice_and_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as pipe, os.fdopen(writing, "w") as out:
        monkeypatch.setattr("sys.stdout", out)
        before = len(list(Path("/proc/self/fd").iterdir()))
        silence_stdout()
        silence_stdout()
        assert len(list(Path("/proc/self/fd").iterdir())) == before
        print("to nobody", flush=True)
        assert pipe.read() == b""
