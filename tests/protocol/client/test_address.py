"""Addresses and tokens, from URLs, the environment and files."""

from pathlib import Path

import pytest

from protocol.client.address import (
    Address,
    default_socket,
    from_environment,
    parse_address,
    read_token,
    token_from_environment,
)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("ws://127.0.0.1:8765", Address(kind="tcp", host="127.0.0.1", port=8765)),
        ("ws://relay.example.org", Address(kind="tcp", host="relay.example.org", port=80)),
        ("wss://relay.example.org", Address(kind="tls", host="relay.example.org", port=443)),
        ("wss://relay.example.org/", Address(kind="tls", host="relay.example.org", port=443)),
        ("wss://relay.example.org/v1/relay", Address(kind="tls", host="relay.example.org", port=443)),
        ("ws://h:1/gpu", Address(kind="tcp", host="h", port=1, resource="/gpu/v1/relay")),
        ("ws://h:1/gpu/v1/relay/", Address(kind="tcp", host="h", port=1, resource="/gpu/v1/relay")),
        ("ws://[::1]:8765", Address(kind="tcp", host="::1", port=8765)),
        ("http://h:1/", Address(kind="tcp", host="h", port=1)),
        ("HTTP://h:1/v1", Address(kind="tcp", host="h", port=1)),
        ("https://h/gpu/v1/", Address(kind="tls", host="h", port=443, resource="/gpu/v1/relay")),
        ("unix:/run/relayd/relayd.sock", Address(kind="unix", path="/run/relayd/relayd.sock")),
        ("unix:///run/relayd.sock", Address(kind="unix", path="/run/relayd.sock")),
        ("unix:here.sock", Address(kind="unix", path="here.sock")),
    ],
)
def test_urls_are_understood(url: str, address: Address) -> None:
    assert parse_address(url) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://relay:8765", "must begin with ws://"),
        ("relay:8765", "must begin with ws://"),
        ("127.0.0.1:8765", "must begin with ws://"),
        ("", "must begin with ws://"),
        ("unix:", "lacks the path"),
        ("ws://", "lacks a host"),
        ("ws://:80", "lacks a host"),
        ("ws://h:99999", "(?i)port"),
        ("ws://h:0", "port 0"),
        ("ws://h:abc", "(?i)port"),
        ("ws://token@h:1", "RELAY_TOKEN"),
        ("ws://h:1?token=x", r"no '\?'"),
        ("ws://[::1:80", "ws://"),
    ],
)
def test_urls_that_are_none_say_how_one_looks(url: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_address(url)


def test_the_url_given_comes_before_the_environment_and_that_before_the_socket(tmp_path: Path) -> None:
    environ = {"RELAY_URL": "ws://of.the.environment:1", "RELAYD_STATE_DIR": str(tmp_path)}
    assert from_environment("ws://given:1", environ).host == "given"
    assert from_environment(None, environ).host == "of.the.environment"
    del environ["RELAY_URL"]
    assert from_environment(None, environ) == Address(kind="unix", path=str(tmp_path / "relayd.sock"))


def test_the_socket_is_the_first_that_exists(tmp_path: Path) -> None:
    state_home = tmp_path / "state"
    (state_home / "relayd").mkdir(parents=True)
    environ = {"RELAYD_STATE_DIR": str(tmp_path), "XDG_STATE_HOME": str(state_home)}
    assert default_socket(environ) == tmp_path / "relayd.sock"
    (state_home / "relayd" / "relayd.sock").touch()
    assert default_socket(environ) == state_home / "relayd" / "relayd.sock"
    (tmp_path / "relayd.sock").touch()
    assert default_socket(environ) == tmp_path / "relayd.sock"
    assert default_socket({"HOME": str(tmp_path)}).name == "relayd.sock"


def test_the_token_comes_from_the_variable_or_the_file_it_names(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("rly_c_abc\n")
    assert token_from_environment({}) is None
    assert token_from_environment({"RELAY_TOKEN": " rly_c_xyz "}) == "rly_c_xyz"
    assert token_from_environment({"RELAY_TOKEN_FILE": str(path)}) == "rly_c_abc"
    assert token_from_environment({"RELAY_TOKEN": "first", "RELAY_TOKEN_FILE": "/none"}) == "first"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"two tokens", "one token"),
        (b"x" * 257, "one token"),
        (b"\xff", "text"),
    ],
)
def test_a_token_file_that_holds_none_says_so(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_token(path)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_token(tmp_path / "none")


def test_a_list_names_relays_that_stand_in_for_each_other() -> None:
    a, b = Address(kind="tls", host="a", port=443), Address(kind="tcp", host="b", port=8765)
    several = parse_address(" wss://a, http://b:8765/ ,wss://a,unix:/x")
    assert several == Address(kind="tls", host="a", port=443, others=(b, Address(kind="unix", path="/x")))
    assert str(several) == "wss://a:443,ws://b:8765,unix:/x"
    assert parse_address(str(several)) == several
    assert parse_address("wss://a") == a, "one is no list"
    for url in ("ws://a:1,b:1", "ws://a:1,,ws://b:1", "ws://a:1,ws://b:1,"):
        with pytest.raises(ValueError, match=r"write each relay of a list in full, as in ws://a:8765,ws://b:8765"):
            parse_address(url)
