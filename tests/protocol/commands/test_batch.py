"""`relay say --lines`: what is spoken into which file, what fails, and going on after an interruption."""

import json
import re
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from protocol.cli import main
from protocol.commands.batch import LOG_NAME, read_lines
from protocol.wire.codec import decode
from protocol.wire.frames import Cancelled
from protocol.wire.messages import FROM_OPERATOR, Accepted, Rejected, Submit
from tests.support.scripted_relay import Connection, RelayThread, Script, failed, frames

PCM = b"\1\0" * 2400
Answer = Callable[[Connection, Submit], None]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No relay, token or file of the machine that runs the tests."""
    monkeypatch.chdir(tmp_path)
    for name in ("RELAY_URL", "RELAY_TOKEN", "RELAY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("protocol.commands.batch.WAIT_S", 0.01)


def speak_it(connection: Connection, submit: Submit) -> None:
    connection.send(Accepted(request_id=submit.request_id), *frames(submit.request_id, PCM))


def answering(answer: Answer, heard: list[Submit]) -> Script:
    async def script(connection: Connection) -> None:
        async for data in connection.link:
            message = decode(data, FROM_OPERATOR)
            if isinstance(message, Submit):
                heard.append(message)
                answer(connection, message)

    return script


def run(answer: Answer, *argv: str, code: int = 0) -> list[Submit]:
    """Run a batch against a relay that answers so; returns what it was asked for."""
    heard: list[Submit] = []
    with RelayThread(Path.cwd(), answering(answer, heard)) as url:
        assert main(["say", "--out-dir", "out", *argv, "--url", url]) == code
    return heard


def made() -> list[str]:
    return sorted(path.name for path in Path("out").iterdir() if path.name != LOG_NAME)


def test_each_line_becomes_a_file_and_a_second_run_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    Path("lines.txt").write_text("one\n\n  two \nthree\n")
    heard = run(speak_it, "--lines", "lines.txt", "-p", "rate=90", "--jobs", "2")
    assert sorted(submit.params["text"] for submit in heard) == ["one", "three", "two"]
    assert {submit.params["rate"] for submit in heard} == {90}
    assert made() == ["00001.wav", "00003.wav", "00004.wav"]
    with wave.open("out/00003.wav") as wav:
        assert wav.readframes(wav.getnframes()) == PCM
    assert "3 lines spoken, 0 failed -> out" in capsys.readouterr().err
    assert run(speak_it, "--lines", "lines.txt", "-p", "rate=90") == []
    assert "3 of 3 lines are there from an earlier run" in capsys.readouterr().err
    Path("out/00003.wav").unlink()
    Path("lines.txt").write_text("one\n\n  two \nother\n")
    again = run(speak_it, "--lines", "lines.txt", "-p", "rate=90")
    assert sorted(submit.params["text"] for submit in again) == ["other", "two"]


def test_a_line_of_json_has_params_and_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    Path("lines.jsonl").write_text('{"text": "hi", "voice": "anna", "file": "hello.pcm"}\nplain\n')
    heard = run(speak_it, "--lines", "lines.jsonl", "-p", "voice=bob", "--json", "--jobs", "1")
    assert [submit.params for submit in heard] == [{"text": "hi", "voice": "anna"}, {"text": "plain", "voice": "bob"}]
    assert made() == ["00002.wav", "hello.pcm"]
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["line"], row["file"], row["state"]) for row in rows] == [
        (1, "hello.pcm", "completed"),
        (2, "00002.wav", "completed"),
    ]


def test_lines_that_fail_are_listed_and_tried_again_under_new_ids(capsys: pytest.CaptureFixture[str]) -> None:
    def answer(connection: Connection, submit: Submit) -> None:
        if submit.params["text"] == "bad":
            connection.send(Accepted(request_id=submit.request_id), failed(submit.request_id, seq=0))
        else:
            speak_it(connection, submit)

    Path("lines.txt").write_text("good\nbad\n")
    first = run(answer, "--lines", "lines.txt", code=1)
    assert "relay: line 2: it broke (engine_failed)" in capsys.readouterr().err
    assert made() == ["00001.wav"]
    (again,) = run(speak_it, "--lines", "lines.txt")
    assert again.params["text"] == "bad"
    assert again.request_id not in {submit.request_id for submit in first}
    assert made() == ["00001.wav", "00002.wav"]


def test_a_run_that_was_killed_is_taken_up_under_the_same_ids() -> None:
    Path("lines.txt").write_text("one\ntwo\n")
    first = run(speak_it, "--lines", "lines.txt")
    log = Path("out", LOG_NAME).read_text().splitlines()
    Path("out", LOG_NAME).write_text(f"{log[0]}\n" + log[1][:20])  # the batch was noted, and no end of a line
    again = run(speak_it, "--lines", "lines.txt")
    assert {submit.request_id for submit in again} == {submit.request_id for submit in first}


def test_what_an_interrupted_run_has_cancelled_is_asked_for_anew() -> None:
    def answer(connection: Connection, submit: Submit) -> None:
        if not asked:
            connection.send(Accepted(request_id=submit.request_id))
            connection.send(Cancelled(request_id=submit.request_id, attempt=0, seq=0))
        else:
            speak_it(connection, submit)
        asked.append(submit)

    asked: list[Submit] = []
    Path("lines.txt").write_text("one\n")
    first, second = run(answer, "--lines", "lines.txt")
    assert first.request_id != second.request_id
    assert made() == ["00001.wav"]


def test_a_full_queue_is_waited_for() -> None:
    def answer(connection: Connection, submit: Submit) -> None:
        asked.append(submit.request_id)
        if len(asked) < 3:
            connection.send(Rejected(request_id=submit.request_id, code="queue_full", message="full", retryable=True))
        else:
            speak_it(connection, submit)

    asked: list[str] = []
    Path("lines.txt").write_text("one\n")
    run(answer, "--lines", "lines.txt")
    assert len(set(asked)) == 1
    assert made() == ["00001.wav"]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--lines", "lines.txt"], "needs a folder"),
        (["--lines", "lines.txt", "--out-dir", "out", "-o", "x.wav"], "--lines and -o do not go together"),
        (["--lines", "lines.txt", "--out-dir", "out", "--detach"], "--lines and --detach do not go together"),
        (["--lines", "lines.txt", "--out-dir", "out", "-i", "me=-"], "input me must be a file"),
        (["--lines", "lines.txt", "--out-dir", "out", "--suffix", ".m4a"], "audio is written as"),
        (["--lines", "empty.txt", "--out-dir", "out"], "no line to speak"),
        (["--lines", "latin.txt", "--out-dir", "out"], "not UTF-8 at byte 4"),
        (["--lines", "none.txt", "--out-dir", "out"], "none.txt: No such file"),
        (["--lines", "lines.txt", "--out-dir", "other"], "is not of relay say --lines"),
    ],
)
def test_wrong_use_says_what_to_do(argv: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("lines.txt").write_text("one\n")
    Path("empty.txt").write_text("\n")
    Path("latin.txt").write_bytes("café\n".encode("latin-1"))
    Path("other").mkdir()
    Path("other", LOG_NAME).write_text("notes of mine\n")
    assert main(["say", *argv, "--url", "unix:nobody.sock"]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["{no"], "line 1 begins with { and is not JSON"),
        (["a", '{"text": "x", "file": "../x.wav"}'], "line 2: file '../x.wav' must be a name"),
        (['{"file": 5}'], "must be a name"),
        (['{"file": "a.wav"}', '{"file": "a.wav"}'], "is the output of an earlier line"),
        (['{"file": "a.m4a"}'], "line 1: a.m4a: audio is written as"),
    ],
)
def test_a_line_that_cannot_be_spoken_is_refused_before_anything_is(lines: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        list(read_lines(lines, {}, ".wav"))


def test_text_and_lines_do_not_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["say"], ["say", "hi", "--lines", "lines.txt"]):
        with pytest.raises(SystemExit, match="2"):
            main(argv)
        assert "TEXT or --lines FILE is required" in capsys.readouterr().err


def test_the_rows_of_a_batch_are_typed() -> None:
    lines: list[Any] = list(read_lines(["a", "", "b"], {"n": 1}, ".wav"))
    assert [(line.number, line.file, line.params) for line in lines] == [
        (1, "00001.wav", {"n": 1, "text": "a"}),
        (3, "00003.wav", {"n": 1, "text": "b"}),
    ]
