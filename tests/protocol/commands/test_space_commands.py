"""`relay show`, `voices`, `spaces`, what a listing shows, and errors as JSON."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from protocol.arguments import fault_line
from protocol.cli import main
from protocol.commands.listing import chosen
from protocol.commands.space_detail import describe, find_voices
from protocol.wire.codec import decode
from protocol.wire.messages import (
    FROM_OPERATOR,
    Find,
    Found,
    Rejected,
    Spaces,
    SpacesReply,
    Status,
    StatusReply,
    Submit,
)
from tests.support.scripted_relay import Connection, RelayThread, Script, frames

PARAMS: dict[str, Any] = {
    "type": "object",
    "required": ["text"],
    "properties": {
        "text": {"type": "string", "minLength": 1, "maxLength": 500, "description": "what is spoken"},
        "rate": {"type": "integer", "minimum": 80, "maximum": 450, "default": 175},
        "voice": {"enum": [f"voice-{number}" for number in range(10)]},
        "seed": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}]},
        "mood": {"type": "array", "minItems": 3, "items": {"type": "number", "minimum": 0, "maximum": 1}},
        "off": {"const": None},
    },
}
TTS: dict[str, Any] = {
    "name": "tts",
    "state": "ready",
    "workers": 1,
    "busy": 1,
    "slots": 2,
    "queued": 3,
    "engine": "espeak",
    "format": {"sample_rate": 22_050, "channels": 1},
    "params": PARAMS,
    "inputs": {"me": {"media_types": ["audio/*"], "max_bytes": 2 * 2**20, "required": True, "live": True}},
    "description": "speaks \x1b[2J",
}
ROWS = [TTS, {"name": "tts-2", "state": "paused"}, {"name": "stt", "state": "ready"}]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No relay, token or file of the machine that runs the tests."""
    monkeypatch.chdir(tmp_path)
    for name in ("RELAY_URL", "RELAY_TOKEN", "RELAY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RELAYD_STATE_DIR", str(tmp_path / "nowhere"))


def run(script: Script, *argv: str) -> int:
    with RelayThread(Path.cwd(), script) as url:
        return main([*argv, "--url", url])


async def tell_spaces(connection: Connection) -> None:
    await connection.expect(Spaces)
    connection.send(SpacesReply(spaces=ROWS))
    await connection.hold()


def test_show_lists_the_params_with_their_ranges_and_the_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tell_spaces, "show", "tts") == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "space tts speaks \\x1b[2J",
        "state ready: 1 worker, 1 of 2 slots busy, 3 queued",
        "engine espeak",
        "makes audio, 22050 Hz, 1 channel",
        "",
        "PARAM TYPE VALUES DEFAULT MEANING",
        "text string 1..500 characters - what is spoken required",
        "rate integer 80..450 175",
        f"voice string {', '.join(f'voice-{number}' for number in range(8))} and 2 more -",
        "seed integer or null 0.. -",
        "mood array 3.. items, each 0..1 -",
        "off any only None -",
        "",
        "INPUT TYPES AT MOST",
        "me audio/* 2 MiB required live",
    ]
    assert run(tell_spaces, "show", "tts", "--json") == 0
    assert json.loads(capsys.readouterr().out) == TTS


@pytest.mark.parametrize("rule", [True, {"type": ["string", "null"]}, {"enum": [1, "a"]}, {"anyOf": [True]}])
def test_a_space_with_any_schema_can_be_shown(rule: object) -> None:
    assert "odd" in describe({"name": "tts", "params": {"properties": {"odd": rule}}})


def test_a_space_whose_schema_is_too_large_to_be_listed_says_so() -> None:
    assert "too large to be listed" in describe({"name": "a", "params": {"description": "too large to be listed"}})


def test_voices_are_listed_one_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tell_spaces, "voices", "tts") == 0
    assert capsys.readouterr().out.splitlines() == PARAMS["properties"]["voice"]["enum"]
    assert run(tell_spaces, "voices", "stt") == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "one voice only" in err


def test_a_space_that_takes_any_voice_lists_none() -> None:
    assert find_voices({"params": {"properties": {"speaker": {"type": "string"}}}}) is None
    assert find_voices({"params": {"properties": {"voice": {"const": "anna"}}}}) == ["anna"]


@pytest.mark.parametrize("command", ["show", "voices"])
def test_a_space_that_is_not_there_is_refused_with_those_that_are(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tell_spaces, command, "nope") == 1
    assert "there is no space 'nope' that you may use; there are: tts, tts-2, stt" in capsys.readouterr().err


def test_a_listing_shows_what_its_options_ask_for(capsys: pytest.CaptureFixture[str]) -> None:
    def names(*argv: str) -> list[str]:
        assert run(tell_spaces, "spaces", "--json", *argv) == 0
        return [row["name"] for row in json.loads(capsys.readouterr().out)]

    assert names("--space", "tts") == ["tts"]
    assert names("--space", "tts*", "--state", "paused") == ["tts-2"]
    assert names("--space", "stt", "--space", "tts") == ["tts", "stt"]
    assert run(tell_spaces, "spaces", "--limit", "1") == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert "2 more are left out by --limit" in err
    with pytest.raises(SystemExit, match="2"):
        main(["spaces", "--limit", "0"])
    assert "'0' is not a number from 1 on" in capsys.readouterr().err


def test_rows_of_several_spaces_are_chosen_by_any_of_them() -> None:
    rows: list[dict[str, Any]] = [{"spaces": ["a", "b"], "principal": "ann"}, {"spaces": ["c"], "principal": "bob"}]
    assert chosen(rows, argparse.Namespace(space=["b"], limit=None)) == rows[:1]
    assert chosen(rows, argparse.Namespace(space=None, principal=["bob", "cyd"])) == rows[1:]


def test_a_text_of_several_words_needs_no_quotes() -> None:
    heard: list[Submit] = []

    async def script(connection: Connection) -> None:
        heard.append(await connection.accept())
        connection.send(*frames(heard[-1].request_id, b"\1\0"))
        await connection.hold()

    assert run(script, "say", "--space", "tts", "Hello", "world,", "it's me", "-o", "out.wav", "-q") == 0
    assert heard[0].params == {"text": "Hello world, it's me"}
    assert main(["say", " ", "", "--url", "unix:nobody.sock"]) == 2


def errors(text: str) -> list[dict[str, Any]]:
    """The errors among what was written to standard error."""
    return [json.loads(line)["error"] for line in text.splitlines() if line.startswith("{")]


def test_with_json_a_refusal_is_json_with_its_details(capsys: pytest.CaptureFixture[str]) -> None:
    async def script(connection: Connection) -> None:
        submit = await connection.expect(Submit)
        details = {"rate": "must be at least 80"}
        connection.send(
            Rejected(request_id=submit.request_id, code="invalid_params", message="not these", details=details)
        )
        await connection.hold()

    assert run(script, "say", "hi", "-o", "out.wav", "--json", "-q") == 1
    error = {"code": "invalid_params", "message": "not these", "details": {"rate": "must be at least 80"}}
    assert errors(capsys.readouterr().err) == [error]


def test_an_error_line_takes_details_of_any_kind() -> None:
    line = fault_line("relay", "no", "failed", {"a": b"\x00"}, as_json=True)
    assert json.loads(line)["error"]["details"] == {"a": "b'\\x00'"}
    assert fault_line("relay", "no", "failed", as_json=False) == "relay: no"


# -- ids -----------------------------------------------------------------------------------------------------------

IDS = ["ab" + "0" * 30, "ac" + "0" * 30]


def a_row(request_id: str) -> dict[str, Any]:
    return {"request_id": request_id, "state": "queued", "space": "tts", "principal": "ann", "age_s": 1.5}


def answer_finds(*ids: str) -> Script:
    """A relay that knows these requests, and answers `find` and `status`."""

    async def script(connection: Connection) -> None:
        async for data in connection.link:
            message = decode(data, FROM_OPERATOR)
            connection.heard.append(message)
            if isinstance(message, Find):
                rows = [a_row(each) for each in ids if each.startswith(message.prefix)]
                connection.send(Found(requests=rows[: message.limit], total=len(rows)))
            elif isinstance(message, Status) and message.request_id in ids:
                connection.send(StatusReply(request_id=message.request_id, space="tts", state="queued"))
            elif isinstance(message, Status):
                connection.send(
                    Rejected(request_id=message.request_id, code="request_not_found", message="it is unknown")
                )

    return script


def test_the_beginning_of_an_id_is_enough_and_several_can_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(answer_finds(*IDS), "status", "ab", "ac0", "--json") == 0
    assert [json.loads(line)["request_id"] for line in capsys.readouterr().out.splitlines()] == IDS


def test_the_beginning_of_several_ids_does_nothing_and_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(answer_finds(*IDS), "cancel", "ab", "a") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "relay: 'a' is the beginning of 2 request ids; give more of one of them",
        *(f"relay:   {each}: queued, space tts, of ann, 1.5 s old" for each in IDS),
    ]
    assert run(answer_finds(*IDS), "status", "a", "--json") == 2
    assert list(errors(capsys.readouterr().err)[0]["details"]) == IDS


def test_an_id_that_nothing_begins_with_is_not_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(answer_finds(*IDS), "attach", "ff") == 1
    assert "no request that you may see begins with ff" in capsys.readouterr().err


def test_one_of_several_that_is_refused_does_not_stop_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(answer_finds(*IDS), "status", "f" * 32, "ab") == 1
    out, err = capsys.readouterr()
    assert f"request_id: {IDS[0]}" in out
    assert f"relay: {'f' * 32}: it is unknown" in err


def test_requests_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(answer_finds(*IDS), "requests", "--limit", "1") == 0
    out, err = capsys.readouterr()
    assert [line.split()[:4] for line in out.splitlines()] == [
        ["REQUEST_ID", "STATE", "SPACE", "PRINCIPAL"],
        [IDS[0], "queued", "tts", "ann"],
    ]
    assert "1 more are left out" in err
    assert run(answer_finds(*IDS), "requests", "--json") == 0
    assert json.loads(capsys.readouterr().out) == [a_row(each) for each in IDS]
    assert run(answer_finds(), "requests", "--state", "odd") == 2
