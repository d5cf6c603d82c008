"""With `--json`, what is wrong is told as JSON by every program."""

import json
from pathlib import Path
from typing import Any

import pytest

from protocol.cli import main
from relayd.cli import main as relayd
from tui.cli import main as relay_tui


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No relay, token or file of the machine that runs the tests."""
    monkeypatch.chdir(tmp_path)
    for name in ("RELAY_URL", "RELAY_TOKEN", "RELAY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)


def errors(text: str) -> list[dict[str, Any]]:
    """The errors among what was written to standard error."""
    return [json.loads(line)["error"] for line in text.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(
    ("program", "argv", "code", "word"),
    [
        (main, ["spaces", "--json", "--url", "unix:nobody.sock"], 3, "cannot_connect"),
        (main, ["spaces", "--json", "--url", "ftp://x"], 2, "usage"),
        (relayd, ["workers", "--json", "--state-dir", "nowhere"], 3, "cannot_connect"),
        (relayd, ["workers", "--json", "--config", "nowhere.toml"], 2, "usage"),
        (relay_tui, ["--json", "--url", "unix:nobody.sock"], 3, "cannot_connect"),
        (relay_tui, ["--json", "--url", "ftp://x"], 2, "usage"),
    ],
)
def test_with_json_every_program_says_what_is_wrong_as_json(
    program: Any, argv: list[str], code: int, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program(argv) == code
    (error,) = errors(capsys.readouterr().err)
    assert (error["code"], error["details"]) == (word, {})
    assert error["message"]


@pytest.mark.parametrize("program", [main, relayd, relay_tui])
def test_with_json_wrong_arguments_are_told_as_json(program: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        program(
            [*([] if program is relay_tui else ["workers" if program is relayd else "spaces"]), "--json", "--nonsense"]
        )
    (error,) = errors(capsys.readouterr().err)
    assert error == {"code": "usage", "message": "unrecognized arguments: --nonsense", "details": {}}
