"""Completion for shells and man pages, made of the parsers of all four programs."""

import re
import shutil
import subprocess
import sys
from typing import Any

import pytest

from gpuworker.cli import main as gpuworker
from protocol.cli import main as relay
from relayd.cli import main as relayd
from tui.cli import main as relay_tui

PROGRAMS: dict[str, Any] = {"relay": relay, "relayd": relayd, "gpuworker": gpuworker, "relay-tui": relay_tui}
#: Program -> words that its manual and its completion must have.
WORDS = {
    "relay": ["voices", "--lines", "--param", "--limit"],
    "relayd": ["cordon", "--max-workers", "--expires", "check-config"],
    "gpuworker": ["doctor", "--engine", "--cancel-grace"],
    "relay-tui": ["--thrifty", "--context"],
}
MACROS = {"TH", "SH", "SS", "TP", "B", "nf", "fi"}


def printed(program: str, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What a program prints before it exits with 0."""
    with pytest.raises(SystemExit) as ended:
        PROGRAMS[program](list(argv))
    assert ended.value.code in (0, None)
    return capsys.readouterr().out


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_man_page_has_every_command_and_option(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = printed(program, capsys, "--man")
    assert page.startswith(f".TH {program.upper()} 1 ")
    for word in WORDS[program]:
        assert word.replace("-", "\\-") in page
    macros = {line[1:].split()[0] for line in page.splitlines() if line.startswith(".")}
    assert macros <= MACROS
    assert not re.search(r"%\(|==SUPPRESS==", page)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_has_every_command_and_option(
    program: str, shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script = printed(program, capsys, "--completion", shell)
    for word in WORDS[program]:
        assert word.removeprefix("--") in script
    if shell == "bash" and (bash := shutil.which("bash")):
        subprocess.run([bash, "-n"], input=script, text=True, check=True)


def test_relay_completion_is_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed("relay", capsys, "completion", "fish") == printed("relay", capsys, "--completion", "fish")


def test_without_shtab_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit, match="2"):
        relayd(["--completion", "bash"])
    assert "the extra [completion]" in capsys.readouterr().err
