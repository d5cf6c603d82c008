"""Contexts: named relays in a file of their owner's, and which relay and token a program uses."""

import json
import stat
from pathlib import Path

import pytest

from protocol.cli import main
from protocol.client.contexts import Contexts, Login, choose_login, contexts_path, load_contexts

HOME, WORK = "wss://home.example", "wss://work.example"


@pytest.fixture(autouse=True)
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """No relay, token or context of the machine that runs the tests."""
    for name in ("RELAY_URL", "RELAY_TOKEN", "RELAY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("RELAYD_STATE_DIR", str(tmp_path / "nowhere"))
    return {"XDG_CONFIG_HOME": str(tmp_path / "config")}


@pytest.fixture
def two(environ: dict[str, str]) -> Contexts:
    """The contexts home, which is in use, and work."""
    contexts = load_contexts(environ)
    contexts.add("home", HOME, "home-token")
    contexts.add("work", WORK, None)
    contexts.save()
    return contexts


def token_file(folder: Path, token: str) -> str:
    path = folder / f"{token}.txt"
    path.write_text(f"{token}\n")
    return str(path)


def test_the_file_is_its_owners_alone_and_one_that_others_can_read_is_refused(
    environ: dict[str, str], two: Contexts
) -> None:
    path = contexts_path(environ)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [each.name for each in path.parent.iterdir()] == ["contexts.json"]
    assert load_contexts(environ) == two
    assert "home-token" not in repr(two)
    path.chmod(0o640)
    with pytest.raises(ValueError, match="chmod 600"):
        load_contexts(environ)


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("{", "is not JSON"),
        ("[]", "does not hold contexts"),
        ('{"contexts": {"a": {"url": 5}}}', "does not hold contexts"),
        ('{"contexts": {}, "current": "gone"}', "no context 'gone'"),
        ('{"contexts": {}, "current": []}', "does not hold contexts"),
        (b"\xff", "is not text"),
    ],
)
def test_a_damaged_file_is_told_with_what_to_do(environ: dict[str, str], written: str | bytes, told: str) -> None:
    path = contexts_path(environ)
    path.parent.mkdir(parents=True)
    path.write_bytes(written if isinstance(written, bytes) else written.encode())
    path.chmod(0o600)
    with pytest.raises(ValueError, match=told):
        load_contexts(environ)


@pytest.mark.usefixtures("two")
def test_options_come_before_the_environment_and_that_before_the_context_in_use(
    environ: dict[str, str], tmp_path: Path
) -> None:
    variables = environ | {"RELAY_URL": "ws://env.example", "RELAY_TOKEN": "env-token"}
    only_token = environ | {"RELAY_TOKEN": "env-token"}
    file = token_file(tmp_path, "file-token")
    assert choose_login(environ=environ) == Login(HOME, "home-token")
    assert choose_login(environ=variables) == Login("ws://env.example", "env-token")
    assert choose_login(environ=only_token) == Login(HOME, "env-token")
    assert choose_login("ws://opt.example", file, environ=variables) == Login("ws://opt.example", "file-token")
    assert choose_login(context="home", environ=variables) == Login(HOME, "home-token")
    assert choose_login(context="work", environ=variables) == Login(WORK, "env-token")
    assert choose_login(context="home", token_file=file, environ=variables) == Login(HOME, "file-token")
    with pytest.raises(ValueError, match="no context 'nope'; there are: home, work"):
        choose_login(context="nope", environ=environ)


@pytest.mark.usefixtures("two")
def test_a_contexts_token_goes_to_no_other_relay(environ: dict[str, str]) -> None:
    assert choose_login("ws://opt.example", environ=environ) == Login("ws://opt.example", "")
    assert choose_login(environ=environ | {"RELAY_URL": "ws://env.example"}) == Login("ws://env.example", "")
    assert choose_login("ws://opt.example", context="home", environ=environ) == Login("ws://opt.example", "")


def test_without_contexts_it_is_the_local_relay(environ: dict[str, str], tmp_path: Path) -> None:
    assert choose_login(environ=environ) == Login(None, "")
    assert choose_login(environ={"XDG_CONFIG_HOME": str(tmp_path / "a" / "b")}) == Login(None, "")
    (tmp_path / "file").touch()
    assert choose_login(environ={"XDG_CONFIG_HOME": str(tmp_path / "file")}) == Login(None, "")


def test_the_command_adds_uses_lists_and_removes(
    environ: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = token_file(tmp_path, "home-token")
    assert main(["context", "add", "home", "--url", HOME, "--token-file", file]) == 0
    assert "home added, and in use" in capsys.readouterr().err
    assert main(["context", "add", "work", "--url", WORK]) == 0
    assert main(["context", "use", "work"]) == 0
    assert choose_login(environ=environ) == Login(WORK, "")
    assert main(["context", "list"]) == 0
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines()] == [
        ["NAME", "URL", "TOKEN"],
        ["home", HOME, "yes"],
        ["*", "work", WORK, "no"],
    ]
    assert main(["context", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0] == {"name": "home", "current": False, "url": HOME, "token": True}
    assert main(["context", "remove", "work"]) == 0
    assert "none is in use now" in capsys.readouterr().err
    assert choose_login(environ=environ) == Login(None, "")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["context", "add"], "name the context: relay context add NAME"),
        (["context", "add", "x"], "--url URL"),
        (["context", "add", "a b", "--url", HOME], "is not a name of a context"),
        (["context", "add", "x", "--url", "ftp://x"], "must begin with"),
        (["context", "use", "x"], "there is no context 'x'; there are: none"),
        (["context", "list", "x"], "list takes no name"),
        (["spaces", "--context", "x"], "there is no context 'x'"),
    ],
)
def test_wrong_use_says_what_to_do(argv: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert told in capsys.readouterr().err


def test_a_command_connects_to_the_context_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["context", "add", "here", "--url", f"unix:{tmp_path / 'nobody.sock'}"]) == 0
    assert main(["spaces"]) == 3
    assert "nobody.sock" in capsys.readouterr().err
