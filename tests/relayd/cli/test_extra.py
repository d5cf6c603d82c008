"""The extra `relay`: what is said where it is not installed, and the oldest packages of both installs."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from protocol.commands.exit_codes import USAGE
from relayd.commands import EXTRA

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WITHOUT = f"""
import sys
sys.modules.update(dict.fromkeys({EXTRA!r}))
from relayd.cli import main
sys.exit(main(sys.argv[1:]))
"""


def bounds(requirements: list[str]) -> dict[str, str]:
    return dict(requirement.split(">=") for requirement in requirements)


def run(*args: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", WITHOUT, *args]
    environ = {"HOME": str(folder), "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environ, timeout=60)


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_without_its_packages_a_command_says_in_one_line_what_to_install(command: str, tmp_path: Path) -> None:
    done = run(command, folder=tmp_path)
    (line,) = done.stderr.splitlines()
    assert "pip install '.[relay]'" in line
    assert (done.returncode, done.stdout) == (USAGE, "")


@pytest.mark.parametrize("command", [("token", "list"), ("space", "list"), ("check-config",)])
def test_the_other_commands_do_without(command: tuple[str, ...], tmp_path: Path) -> None:
    done = run(*command, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_packages_looked_for_are_those_of_the_extra() -> None:
    named = bounds(PROJECT["optional-dependencies"]["relay"])
    assert sorted(EXTRA) == sorted(name.replace("-", "_").removesuffix("_cffi") for name in named)


def test_the_oldest_packages_that_are_tested_are_the_lower_bounds() -> None:
    pinned = re.findall(r"^([a-z0-9-]+)==(\S+)$", (ROOT / "constraints-min.txt").read_text(), re.MULTILINE)
    assert dict(pinned) == bounds(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["relay"])
