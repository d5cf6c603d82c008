"""The units: what systemd says of them, and that the programs take the command lines in them."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import relayd.cli
from gpuworker.slots.process_slot import LOAD_TIMEOUT_S
from protocol.cli import _parser as relay_parser
from protocol.commands.exit_codes import INTERRUPTED, USAGE
from relayd.config_reload import NEEDS_RESTART

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
OPERATIONS = ROOT / "docs" / "operations.md"
#: Documents whose examples have commands of ours.
DOCUMENTS = (OPERATIONS, ROOT / "docs" / "metrics.md", ROOT / "docs" / "proxies.md")
UNITS = ("relayd.service", "gpuworker.service", "gpuworker-webrtc.service")
#: systemd's own figure, from 0 (nothing is exposed) to 10. A worker must reach its GPU, and torch writes code.
MOST_EXPOSED = {"relayd.service": 1.5, "gpuworker.service": 2.0, "gpuworker-webrtc.service": 1.5}
#: What a machine has is tested with; where there is no systemd, its own judgement is not to be had.
ANALYZE = shutil.which("systemd-analyze")
_UNITS_S = {"min": 60.0, "s": 1.0, "": 1.0}


def settings(name: str) -> dict[str, list[str]]:
    """A unit's lines, by key, in order; continued ones joined, comments dropped."""
    text = re.sub(r"\\\n", " ", (DEPLOY / name).read_text())
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if "=" in line and not line.startswith(("#", ";")):
            key, _, value = line.partition("=")
            found.setdefault(key.strip(), []).append(value.strip())
    return found


def seconds(text: str) -> float:
    """A time of systemd's, as far as our units use them."""
    parsed = re.fullmatch(r"(\d+)(min|s|)", text)
    assert parsed, text
    return int(parsed[1]) * _UNITS_S[parsed[2]]


def test_relayd_takes_the_command_line_of_its_unit() -> None:
    (line,) = settings("relayd.service")["ExecStart"]
    program, *args = shlex.split(line)
    assert Path(program).name == "relayd"
    given = relayd.cli._parser().parse_args(args)
    assert given.command == "serve"
    assert given.config == Path("/etc/relayd/relayd.toml")


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_waits_for_ready_and_is_watched(name: str) -> None:
    unit = settings(name)
    assert unit["Type"] == ["notify"]
    assert unit["NotifyAccess"] == ["main"]
    assert seconds(unit["WatchdogSec"][0]) >= 30
    assert unit["StartLimitIntervalSec"] == ["0"]  # never given up


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_bounds_memory_and_tasks(name: str) -> None:
    unit = settings(name)
    assert unit["MemoryMax"]
    assert unit["TasksMax"]


def test_the_workers_unit_gives_it_time_to_load() -> None:
    assert seconds(settings("gpuworker.service")["TimeoutStartSec"][0]) > LOAD_TIMEOUT_S


def test_a_relay_that_was_drained_or_has_a_faulty_configuration_is_not_started_again() -> None:
    unit = settings("relayd.service")
    assert unit["Restart"] == ["on-failure"]
    assert unit["RestartPreventExitStatus"] == [str(USAGE)]


@pytest.mark.parametrize("name", ["gpuworker.service", "gpuworker-webrtc.service"])
def test_a_worker_that_was_drained_or_interrupted_is_not_started_again_and_one_that_failed_is(name: str) -> None:
    unit = settings(name)
    assert unit["Restart"] == ["on-failure"]
    assert unit["SuccessExitStatus"] == [str(INTERRUPTED)]
    assert "RestartPreventExitStatus" not in unit


def test_a_reload_is_the_signal_that_the_daemon_reads_its_settings_at() -> None:
    assert settings("relayd.service")["ExecReload"] == ["/bin/kill -HUP $MAINPID"]


def commands() -> list[list[str]]:
    """The commands of ours in the examples of the documents."""
    text = "".join(path.read_text() for path in DOCUMENTS)
    lines = [line for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    found = []
    for line in lines:
        line = line.partition(" | ")[0]
        words = [word for word in shlex.split(line.removeprefix("$ "), comments=True) if word != "sudo"]
        if line.startswith("$ ") and words and Path(words[0]).name in ("relayd", "relay"):
            found.append(words)
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_the_commands_of_the_document_are_ones_that_are_taken(words: list[str]) -> None:
    parser = {"relayd": relayd.cli._parser, "relay": relay_parser}[Path(words[0]).name]()
    parser.parse_args(words[1:])


def test_the_document_tells_every_setting_that_needs_a_restart() -> None:
    text = OPERATIONS.read_text()
    assert [name for name in (*NEEDS_RESTART, "log.format") if f"`{name}`" not in text] == []


if ANALYZE:

    @pytest.mark.parametrize("name", UNITS)
    def test_systemd_finds_no_fault_in_a_unit(name: str, tmp_path: Path) -> None:
        """Any word on stderr is a fault. The programs lie elsewhere here, so another stands in for them."""
        copy = tmp_path / name
        copy.write_text(re.sub(r"/opt/\S+/bin/\S+", "/bin/true", (DEPLOY / name).read_text()))
        done = subprocess.run([str(ANALYZE), "verify", "--man=no", str(copy)], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    @pytest.mark.parametrize("name", UNITS)
    def test_a_unit_exposes_no_more_than_it_must(name: str) -> None:
        security = [str(ANALYZE), "security", "--offline=true", "--no-pager", str(DEPLOY / name)]
        done = subprocess.run(security, capture_output=True, text=True, check=True)
        overall = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
        assert overall, done.stdout
        assert float(overall[1]) <= MOST_EXPOSED[name]
        assert done.stderr == ""
