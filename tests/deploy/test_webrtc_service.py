"""deploy/gpuworker-webrtc.service, its settings, and docs/webrtc.md: they agree, and the commands take them."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from gpuworker.cli import _parser as gpuworker_parser
from gpuworker.config import read_config
from gpuworker.engines.webrtc.engine import WebRtcEngine
from protocol.cli import _parser as relay_parser
from relayd.cli import _parser as relayd_parser
from relayd.config.loader import load_config
from tests.deploy.test_units import settings

ROOT = Path(__file__).parents[2]
SETTINGS = ROOT / "deploy" / "gpuworker-webrtc.toml"
DOCUMENT = (ROOT / "docs" / "webrtc.md").read_text()
UNIT = "gpuworker-webrtc.service"


def test_the_units_command_line_and_settings_are_ones_that_are_taken(tmp_path: Path) -> None:
    (line,) = settings(UNIT)["ExecStart"]
    program, *words = line.split()
    assert program == "/opt/gpuworker/bin/gpuworker"
    token = tmp_path / "token"
    token.write_text("rly_w_x")
    swap = {"/etc/gpuworker/webrtc.toml": str(SETTINGS), "${CREDENTIALS_DIRECTORY}/token": str(token)}
    config = read_config(gpuworker_parser().parse_args([swap.get(word, word) for word in words]), {})
    assert config.engine == "webrtc"


def test_the_unit_may_bind_the_ports_of_its_settings_and_no_others() -> None:
    options = tomllib.loads(SETTINGS.read_text())["options"]
    assert options["ports"] == WebRtcEngine.OPTIONS["ports"].default
    assert settings(UNIT)["SocketBindAllow"] == [f"udp:{options['ports']}"]
    assert settings(UNIT)["SocketBindDeny"] == ["any"]


def test_the_unit_keeps_nothing() -> None:
    unit = settings(UNIT)
    assert not [name for name in unit if name.endswith("Directory")]
    assert unit["DynamicUser"] == ["yes"]
    assert unit["ProtectSystem"] == ["strict"]


def test_the_unit_lets_callbacks_be_made_without_which_no_call_connects() -> None:
    assert "MemoryDenyWriteExecute" not in settings(UNIT)


def test_the_documents_space_is_one_that_a_relay_takes(tmp_path: Path) -> None:
    (text,) = re.findall(r"```toml\n(\[spaces.calls\].*?)```", DOCUMENT, re.DOTALL)
    path = tmp_path / "relayd.toml"
    path.write_text(text)
    assert load_config(path, environ={}).spaces["calls"].run_timeout_s >= 3_600


@pytest.mark.parametrize("option", WebRtcEngine.OPTIONS)
def test_the_document_has_every_option_with_its_default(option: str) -> None:
    (row,) = re.findall(rf"^\| `{option}` \| ([^|]*) \|", DOCUMENT, re.MULTILINE)
    default = WebRtcEngine.OPTIONS[option].default
    assert str(default or "") in row.replace("`", "")


def test_the_commands_of_the_document_are_ones_that_are_taken() -> None:
    blocks = re.findall(r"```console\n(.*?)```", DOCUMENT, re.DOTALL)
    lines = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    found = [shlex.split(line.partition(" | ")[0]) for line in lines]
    parsers = {"gpuworker": gpuworker_parser(), "relay": relay_parser(), "relayd": relayd_parser()}
    taken = 0
    for words in found:
        words = words[1:] if words[0] == "sudo" else words
        if (parser := parsers.get(Path(words[0]).name)) is not None:
            parser.parse_args(words[1:])
            taken += 1
    assert taken >= 5
