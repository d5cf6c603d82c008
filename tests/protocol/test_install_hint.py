"""What people are told to run when an extra is missing."""

import re
import tomllib
from pathlib import Path

from protocol.install_hint import install_command

ROOT = Path(__file__).parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
PACKAGES = ("protocol", "relayd", "gpuworker", "tui")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def test_the_command_is_one_line_that_works_in_a_checkout_or_with_the_wheel_file() -> None:
    command = install_command("espeak")
    assert "pip install '.[espeak]' in a checkout" in command
    assert re.search(r"pip install '\./relayd-[0-9][0-9.]*-py3-none-any\.whl\[espeak\]'$", command)
    assert "\n" not in command


def test_no_message_names_the_package_as_if_an_index_had_it_nor_an_extra_that_is_none() -> None:
    for path in SOURCES:
        text = path.read_text()
        assert "relayd[" not in text, path
        assert set(re.findall(r"""install_command\(["'](\w+)["']\)""", text)) <= set(EXTRAS), path
