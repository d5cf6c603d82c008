"""Where callers reach the worker: options that are wrong are refused in words, and `doctor` tells what callers get."""

import re
import socket
from pathlib import Path
from typing import Any

import pytest

from gpuworker.cli import _parser
from gpuworker.doctor import run_doctor
from gpuworker.engines.base import EngineError, OptionError
from gpuworker.engines.webrtc.engine import WebRtcEngine
from gpuworker.engines.webrtc.reach import read_reach

DEFAULTS = {name: option.default for name, option in WebRtcEngine.OPTIONS.items()}


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("ports", "50000", "write a range of UDP ports"),
        ("ports", "50010-50000", "write a range of UDP ports"),
        ("ports", "80-90", "write a range of UDP ports"),
        ("ports", "50000-70000", "write a range of UDP ports"),
        ("public_ip", "relay.example.org", "write an IP address"),
        ("host", "localhost", "write an IP address"),
        ("max_kbit_s", 0, "must be 1 or more"),
    ],
)
def test_a_wrong_option_is_refused_in_words(option: str, value: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        WebRtcEngine({**DEFAULTS, option: value})


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"username": "x"}]', '[{"urls": 5}]', "nonsense"])
def test_a_file_that_holds_no_servers_is_refused_in_words(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ice.json"
    path.write_text(text)
    reach = read_reach({**DEFAULTS, "ice_servers_file": str(path)})
    if text == "{}":
        assert reach.ice_servers() == []
        return
    with pytest.raises(EngineError, match="write a JSON list"):
        reach.ice_servers()


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot be read"):
        read_reach({**DEFAULTS, "ice_servers_file": str(tmp_path / "none")}).ice_servers()


def doctor(*options: str) -> int:
    return run_doctor(_parser().parse_args(["doctor", "--engine", "webrtc", *options]), {})


def test_doctor_tells_what_callers_are_offered(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("--slots", "8", "-o", "host=127.0.0.1", "-o", "ports=20700-20709") == 0
    words = r"up to 4 calls; offers 127.0.0.1; \d+ of the UDP ports 20700-20709 are free"
    said = capsys.readouterr().out
    assert re.search(words, said)
    assert "; live inputs: audio, commands, idle, video" in said


def test_doctor_tells_that_no_port_is_free(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        assert doctor("-o", "host=127.0.0.1", "-o", f"ports={port}-{port}") == 1
    assert f"needs a free UDP port on 127.0.0.1: {port}-{port} are all taken" in capsys.readouterr().out


def test_doctor_tells_that_an_address_is_not_this_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("-o", "host=192.0.2.250") == 1
    assert "needs an address of this machine in -o host: 192.0.2.250" in capsys.readouterr().out
