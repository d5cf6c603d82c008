"""`gpuworker run | engines | doctor`: what they print and how they exit."""

import datetime
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from gpuworker.cli import main
from gpuworker.config import ConfigError, WorkerConfig, add_run_options, read_config
from gpuworker.engines.base import Missing
from gpuworker.engines.catalog import find_engine
from gpuworker.engines.espeak.engine import EspeakEngine
from gpuworker.speaking.speaking import with_live_text
from protocol.log_lines import JsonFormatter, LineFormatter
from protocol.wire.errors import ErrorCode
from protocol.wire.frames import Completed
from protocol.wire.messages import Cancel, Drain, Draining, Register, Rejected
from tests.support.scripted_relay import Desk, RelayThread, assign, refuse, script

PATIENCE_S = 20


@pytest.fixture(autouse=True)
def _no_relay_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RELAY_URL", "RELAY_TOKEN", "RELAY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def config(*arguments: str, **environ: str) -> WorkerConfig:
    parser = ArgumentParser()
    add_run_options(parser)
    return read_config(parser.parse_args(arguments), environ)


def test_run_has_defaults_for_everything_and_takes_relay_and_token_from_the_environment(tmp_path: Path) -> None:
    plain = config(HOME=str(tmp_path))
    assert (plain.spaces, plain.engine, plain.slots, plain.token) == (("tts",), "espeak", 1, None)
    assert plain.address.kind == "unix"
    told = config("--space", "a", "--space", "b", RELAY_URL="ws://relay.test:9", RELAY_TOKEN="rly_w_1")
    assert (str(told.address), told.token, told.spaces) == ("ws://relay.test:9", "rly_w_1", ("a", "b"))
    (tmp_path / "token").write_text("rly_w_2\n")
    told = config("--relay", "wss://other.test", "--token-file", str(tmp_path / "token"), RELAY_TOKEN="rly_w_1")
    assert (str(told.address), told.token) == ("wss://other.test:443", "rly_w_2")
    mock = config("--engine", "mock", "-o", "sample_rate=48000", "-o", "speed=2", "--slots", "3", "--name", "my box")
    assert (mock.options["sample_rate"], mock.options["speed"], mock.slots, mock.name) == (48_000, 2.0, 3, "my-box")


def test_run_tells_every_fault_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        config("--relay", "ftp://x", "--space", "a/b", "--slots", "0", "--engine", "nope", "--cancel-grace", "-1")
    words = str(caught.value)
    for part in ("ws://", "a/b", "--slots 0", "nope", "--cancel-grace"):
        assert part in words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engine", "mock", "-o", "sample_rate=1"], "sample_rate"),
        (["--engine", "mock", "-o", "nothing=1"], "no such option"),
        (["--engine", "function"], "call"),
        (["--engine", "mock", "-o", "shared=true", "--in-threads"], "--in-threads: engine 'mock'"),
        (["--engine", "mock", "--stall-timeout", "-1"], "--stall-timeout -1.0"),
        (["--engine", "mock", "--stall-timeout", "0"], "--stall-timeout 0.0: must be a number of seconds, above 0"),
        (["--engine", "mock", "--load-timeout", "0"], "--load-timeout 0.0: must be a number of seconds, above 0"),
        (["--token-file", "/nonexistent/token"], "cannot be read"),
    ],
)
def test_wrong_use_exits_2_with_words(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", *arguments) == 2
    assert words in capsys.readouterr().err


def test_an_engine_whose_needs_are_missing_is_refused_with_the_command_that_installs_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(EspeakEngine, "missing", classmethod(lambda _cls: [Missing("a wheel", "pip install a-wheel")]))
    assert call("run", "--engine", "espeak") == 2
    assert "pip install a-wheel" in capsys.readouterr().err
    assert call("engines", "--json") == 0
    listed = {engine["name"]: engine for engine in json.loads(capsys.readouterr().out)}
    assert not listed["espeak"]["runs_here"]
    assert listed["espeak"]["missing"] == [{"what": "a wheel", "install": "pip install a-wheel"}]
    assert listed["mock"]["runs_here"]
    assert call("doctor") == 0  # others run
    assert "install it with: pip install a-wheel" in capsys.readouterr().out


def test_engines_lists_options_for_people_and_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("engines") == 0
    text = capsys.readouterr().out
    assert "espeak" in text
    assert "-o call=STR" in text
    assert call("engines", "--json") == 0
    listed = {engine["name"]: engine for engine in json.loads(capsys.readouterr().out)}
    assert listed["mock"]["options"]["sample_rate"] == {
        "kind": "int",
        "default": 24_000,
        "required": False,
        "help": "Hz",
    }


@pytest.mark.parametrize("name", ["espeak", "mock", "eliza"])
def test_doctor_tells_the_live_inputs_that_a_space_of_the_engine_will_take(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = find_engine(name)
    engine = kind({option: kind.OPTIONS[option].default for option in kind.OPTIONS})
    engine.load()
    inputs = with_live_text(engine.capabilities).inputs
    engine.close()
    live = ", ".join(sorted(each for each, rule in inputs.items() if rule.live))
    assert call("doctor", "--json", "--engine", name) == 0
    found = next(found for found in json.loads(capsys.readouterr().out) if found["what"] == f"engine {name}")
    assert (f"; live inputs: {live}" in found["words"]) if live else ("live inputs" not in found["words"])


def test_doctor_tries_the_relay_and_the_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def relay(desk: Desk) -> None:
        async for _ in desk.connection.link:
            pass

    def relay_findings() -> list[dict[str, str]]:
        return [found for found in json.loads(capsys.readouterr().out) if found["what"] == "relay"]

    nobody = f"unix:{tmp_path}/nobody.sock"
    with RelayThread(tmp_path, script(relay)) as url:
        assert call("doctor", "--json", "--relay", f"{nobody},{url}") == 0, "the standby of a list need not listen"
        assert [found["outcome"] for found in relay_findings()] == ["unreachable", "ok"]
    assert call("doctor", "--json", "--relay", nobody) == 3
    assert [found["outcome"] for found in relay_findings()] == ["unreachable"]
    (tmp_path / "relay.sock").unlink()
    with RelayThread(tmp_path, refuse) as url:
        assert call("doctor", "--json", "--relay", url) == 1
        (found,) = relay_findings()
        assert (found["outcome"], "unauthenticated" in found["words"]) == ("failed", True)
    assert call("doctor", "--relay", "ftp://x") == 2


@pytest.mark.parametrize(
    ("body", "outcome", "words"),
    [
        ("echo 'NVIDIA H200, 143771 MiB, 570.00'", "ok", "NVIDIA H200, 143771 MiB"),
        ("exit 9", "failed", "does not answer"),
    ],
)
def test_doctor_names_the_gpu_that_nvidia_smi_sees(
    body: str,
    outcome: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\n{body}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert call("doctor", "--json") == (0 if outcome == "ok" else 1)
    gpu = next(found for found in json.loads(capsys.readouterr().out) if found["what"] == "gpu")
    assert gpu["outcome"] == outcome
    assert words in gpu["words"]


# -- settings and logs from the environment


def test_every_option_can_be_set_in_the_environment_and_the_command_line_comes_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (
        *(("SPACE", "a,b"), ("ENGINE", "mock"), ("OPTIONS", "speed=2 chunk_ms=50"), ("SLOTS", "3"), ("NAME", "box")),
        *(("LOG_LEVEL", "debug"), ("DRAIN_TIMEOUT", "7"), ("ARGS", "--engine voxcpm"), ("PORT_80_TCP", "tcp://x")),
    ):
        monkeypatch.setenv(f"GPUWORKER_{name}", value)
    told = config()
    assert (told.spaces, told.engine, told.slots, told.name) == (("a", "b"), "mock", 3, "box")
    assert (told.options["speed"], told.options["chunk_ms"]) == (2.0, 50)
    assert (told.log_level, told.log_format, told.drain_timeout_s) == ("debug", "text", 7.0)
    told = config("--space", "c", "-o", "speed=4", "--slots", "1", "--log-level", "error")
    assert (told.spaces, told.options["speed"], told.slots, told.log_level) == (("c",), 4.0, 1, "error")
    for variable, value, fault in (
        ("GPUWORKER_SLOT", "2", "did you mean GPUWORKER_SLOTS?"),
        ("GPUWORKER_LOG_LEVEL", "loud", "must be one of debug, info, warning, error"),
        ("GPUWORKER_SLOTS", "many", "invalid int value: 'many'"),
    ):
        with monkeypatch.context() as wrong:
            wrong.setenv(variable, value)
            with pytest.raises(SystemExit) as ended:
                config()
        assert ended.value.code == 2
        assert fault in capsys.readouterr().err


def test_a_json_line_has_level_time_and_place_and_stays_one_line() -> None:
    try:
        raise RuntimeError("no\nway")
    except RuntimeError as fault:
        raised = (RuntimeError, fault, fault.__traceback__)
    record = logging.LogRecord("gpuworker.x", logging.WARNING, "/a/place.py", 7, "said %s", ("a\nb",), raised, "do")
    line = JsonFormatter().format(record)
    told = json.loads(line)
    assert "\n" not in line
    assert (told["level"], told["event"], told["logger"]) == ("warning", "said a\nb", "gpuworker.x")
    assert (told["module"], told["func_name"], told["lineno"]) == ("place", "do", 7)
    assert datetime.datetime.fromisoformat(told["timestamp"]).timestamp() == pytest.approx(record.created, abs=1e-3)
    assert "RuntimeError" in told["exception"]


# -- `gpuworker run` as a process --------------------------------------------------------------------------------


@contextmanager
def worker(url: str, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "gpuworker.cli", "run", "--relay", url, *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        with process:
            yield process
    finally:
        process.kill()


def until_said(process: "subprocess.Popen[str]", words: str) -> None:
    """Read its stderr up to a line with `words`; a process that never says them is killed."""
    assert process.stderr is not None
    watchdog = threading.Timer(PATIENCE_S, process.kill)
    watchdog.start()
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if words in line:
                return
    finally:
        watchdog.cancel()
    raise AssertionError(f"it never said {words!r}; it said:\n{''.join(said)}")


MOCK = ("--engine", "mock", "-o", "speed=4")


def test_sigterm_finishes_what_runs_and_exits_0(tmp_path: Path) -> None:
    started = threading.Event()
    last: list[Any] = []

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign(params={"text": "x", "duration_s": 2}))
        await desk.hear()
        started.set()
        while not isinstance(await desk.hear(), Draining):
            pass
        last.extend(await desk.frames())
        async for _ in desk.connection.link:
            pass

    with RelayThread(tmp_path, script(relay)) as url, worker(url, *MOCK) as process:
        assert started.wait(PATIENCE_S)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert isinstance(last[-1], Completed)
    for words in ("registered space 'tts' with 1 slot", "of ann: attempt 1", "done in", "draining (SIGTERM"):
        assert words in told


def test_a_second_interrupt_stops_at_once_and_no_process_is_left(tmp_path: Path) -> None:
    started = threading.Event()

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign(params={"text": "x", "duration_s": 3_000}))
        await desk.hear()
        started.set()
        async for _ in desk.connection.link:
            pass

    with RelayThread(tmp_path, script(relay)) as url, worker(url, *MOCK) as process:
        assert started.wait(PATIENCE_S)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 1
        process.send_signal(signal.SIGINT)
        until_said(process, "draining (SIGINT")
        assert process.poll() is None
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 130
        assert time.monotonic() - began < 5
        assert not Path(f"/proc/{children[0]}").exists()


def test_nothing_that_a_client_chose_reaches_the_terminal_raw(tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\n12:00:00 I fake"

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign(params={"text": "x", "duration_s": 3_000}))
        await desk.hear()
        desk.send(Cancel(request_id=assign().request_id, reason=evil))
        await desk.frames()
        desk.send(assign(attempt=2, params={"text": 1, evil: 1}))
        await desk.frames()
        desk.send(Rejected.because(ErrorCode.SPACE_FULL, evil))
        desk.send(Drain())
        async for _ in desk.connection.link:
            pass

    with RelayThread(tmp_path, script(relay)) as url, worker(url, *MOCK) as process:
        _, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert all(line.isprintable() for line in told.split("\n"))
    assert not [line for line in told.split("\n") if line.startswith("12:00:00 I fake")]
    assert told.count(r"\x1b]0;owned\x07\n12:00:00 I fake") >= 3


def test_a_refusal_exits_1_with_the_relays_words(tmp_path: Path) -> None:
    async def relay(desk: Desk) -> None:
        await desk.expect(Register)
        desk.send(Rejected.because(ErrorCode.SPACE_NOT_FOUND, "there is no space 'tts'; make it\x1b[2J"))
        await trio.sleep_forever()

    with RelayThread(tmp_path, script(relay)) as url, worker(url, *MOCK) as process:
        _, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert r"gpuworker: space_not_found: there is no space 'tts'; make it\x1b[2J" in told


def test_an_engine_that_cannot_be_loaded_exits_1_with_its_words(tmp_path: Path) -> None:
    async def relay(desk: Desk) -> None:
        async for _ in desk.connection.link:
            pass

    with (
        RelayThread(tmp_path, script(relay)) as url,
        worker(url, "--engine", "mock", "-o", "load_fails=true") as process,
    ):
        _, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "model_not_loaded: engine 'mock' cannot be loaded: loading fails" in told


def test_slots_in_threads_need_no_processes(tmp_path: Path) -> None:
    done = threading.Event()

    async def relay(desk: Desk) -> None:
        while (await desk.expect(Register)).slots < 20:
            pass
        done.set()
        async for _ in desk.connection.link:
            pass

    async def agree(desk: Desk) -> None:
        register = await desk.register()
        if register.slots < 20:
            await relay(desk)
        done.set()
        async for _ in desk.connection.link:
            pass

    with (
        RelayThread(tmp_path, script(agree)) as url,
        worker(url, *MOCK, "--slots", "20", "--in-threads") as process,
    ):
        assert done.wait(PATIENCE_S)
        assert Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split() == []
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0


SETTINGS = """
relay = "ws://relay.test:9"
space = ["a", "b"]
engine = "mock"
slots = 3
token_file = "token"
drain_timeout = 7
in-threads = true
log_level = "debug"

[options]
speed = 2
chunk_ms = 50
"""


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    (tmp_path / "token").write_text("rly_w_2\n")
    path = tmp_path / "gpuworker.toml"
    path.write_text(SETTINGS)
    return path


def test_a_settings_file_gives_what_neither_the_command_line_nor_the_environment_says(
    settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = config("--config", str(settings))
    assert (str(told.address), told.token, told.spaces) == ("ws://relay.test:9", "rly_w_2", ("a", "b"))
    assert (told.engine, told.slots, told.in_threads, told.log_level) == ("mock", 3, True, "debug")
    assert (told.drain_timeout_s, told.options["speed"], told.options["chunk_ms"]) == (7.0, 2.0, 50)
    assert told.cancel_grace_s == config("--engine", "mock").cancel_grace_s
    monkeypatch.setenv("GPUWORKER_CONFIG", str(settings))
    monkeypatch.setenv("GPUWORKER_SLOTS", "2")
    monkeypatch.setenv("GPUWORKER_LOG_LEVEL", "error")
    told = config("--slots", "1", "--space", "c", "-o", "speed=4", RELAY_URL="ws://other.test:9", RELAY_TOKEN="rly_w_3")
    assert (told.slots, told.log_level, told.spaces, told.in_threads) == (1, "error", ("c",), True)
    assert (str(told.address), told.token) == ("ws://other.test:9", "rly_w_3")
    assert (told.options["speed"], told.options["chunk_ms"]) == (4.0, 50)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("slot = 2", "slot: is not a setting; did you mean slots?"),
        ('slots = "2"', "slots: must be a whole number, not '2'"),
        ("slots = true", "slots: must be a whole number, not True"),
        ("in_threads = 1", "in_threads: must be true or false, not 1"),
        ("space = [1]", "space: must be a string or a list of strings"),
        ("options = 'speed=2'", "options: must be a table of the engine's options"),
        ('log_level = "loud"', "log_level: must be one of debug, info, warning, error, not 'loud'"),
        ('config = "x"', "config: is not a setting"),
        ("slots =", "is not TOML"),
    ],
)
def test_a_fault_of_the_settings_file_is_told_with_its_place(tmp_path: Path, line: str, fault: str) -> None:
    path = tmp_path / "gpuworker.toml"
    path.write_text(f'engine = "mock"\n{line}\n')
    with pytest.raises(ConfigError) as caught:
        config("--config", str(path))
    assert f"{path}: {fault}" in str(caught.value)


def test_a_missing_settings_file_is_told() -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        config("--engine", "mock", "--config", "/no/such/file.toml")


def test_no_token_gets_into_a_workers_log() -> None:
    secret = "rly_w_" + "a" * 32
    record = logging.LogRecord("gpuworker", logging.INFO, "/a/place.py", 7, "it said %s", (secret,), None)
    assert JsonFormatter().format(record).count("rly_w_[secret]") == 1
    assert LineFormatter("%(message)s").format(record) == "it said rly_w_[secret]"
