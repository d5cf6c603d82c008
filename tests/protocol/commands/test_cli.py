"""The `relay` command against a scripted relay: what it prints, writes and returns."""

import importlib.util
import io
import json
import signal
import subprocess
import sys
import time
import wave
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from protocol.cli import main
from protocol.commands.progress import Progress, table
from protocol.printable import printable, printable_json, printable_lines
from protocol.wire.frames import (
    Audio,
    Completed,
    Frame,
    Output,
    Started,
    Video,
)
from protocol.wire.frames import Progress as ProgressFrame
from protocol.wire.messages import (
    Attach,
    Cancel,
    Delta,
    Error,
    Input,
    Leave,
    Queued,
    Rejected,
    Snapshot,
    Spaces,
    SpacesReply,
    Status,
    StatusReply,
    Submit,
    Watch,
)
from protocol.wire.structs import AudioFormat
from protocol.wire.validators import Value
from tests.protocol.commands.conftest import WrittenInput
from tests.support.pictures import PICTURES, VIDEO, ivf
from tests.support.scripted_relay import FORMAT, ID, Connection, RelayThread, Script, failed, frames, speak

PCM = b"\1\0" * 2400 + b"\2\0" * 2400 + b"\3\0" * 2400


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No relay, token or file of the machine that runs the tests."""
    monkeypatch.chdir(tmp_path)
    for name in ("RELAY_URL", "RELAY_TOKEN", "RELAY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RELAYD_STATE_DIR", str(tmp_path / "nowhere"))


def wait_for_size(path: Path, size: int) -> None:
    """Until another process has written so much."""
    deadline = time.monotonic() + 30
    while not path.exists() or path.stat().st_size < size:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def run(script: Script, *argv: str) -> int:
    """Run the command against a relay that follows the script."""
    with RelayThread(Path.cwd(), script) as url:
        return main([*argv, "--url", url])


def samples(path: str) -> bytes:
    with wave.open(path) as wav:
        assert wav.getframerate() == 24_000
        return bytes(wav.readframes(wav.getnframes()))


def test_say_writes_the_speech_and_tells_how_it_went(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(speak, "say", "你好, world", "--space", "tts", "-o", "out.wav") == 0
    assert samples("out.wav") == PCM
    out, err = capsys.readouterr()
    assert out == ""
    assert "queued: position 1 of 1, starts in about 2 s" in err
    assert "0.3 s of audio in" in err
    assert err.rstrip().endswith("-> out.wav")


def test_say_without_o_names_the_file_after_space_and_id(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(speak, "say", "hi", "--quiet") == 0
    (path,) = Path.cwd().glob("*.wav")
    assert path.name.startswith("tts-")
    assert len(path.stem) == len("tts-") + 8
    assert samples(str(path)) == PCM
    assert capsys.readouterr() == ("", "")


def test_say_sends_the_text_and_the_options(stdin: WrittenInput) -> None:
    submits: list[Submit] = []

    async def script(connection: Connection) -> None:
        await connection.expect(Spaces)
        connection.send(SpacesReply(spaces=[]))
        submits.append(await connection.accept())
        connection.send(*frames(submits[0].request_id, b"\1\0"))
        await connection.hold()

    stdin.write(b"from a pipe\n", last=True)
    code = run(
        script,
        *["say", "-", "--param", "rate=180", "-p", "voice=en", "-p", 'more={"a": [1, null]}', "-p", "nan=NaN"],
        *["--priority", "9", "--queue-timeout", "7", "--run-timeout", "8", "--retry", "never", "--no-cache"],
        *["-o", "x.wav", "-q"],
    )
    assert code == 0
    submit = submits[0]
    assert submit.params == {
        "text": "from a pipe",
        "rate": 180,
        "voice": "en",
        "more": {"a": [1, None]},
        "nan": "NaN",
    }
    assert (submit.priority, submit.queue_timeout_s, submit.run_timeout_s, submit.retry) == (9, 7, 8, "never")
    assert submit.cache is False


def test_raw_pcm_goes_to_a_pipe(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert run(speak, "say", "hi", "-o", "-", "-q") == 0
    assert capfdbinary.readouterr() == (PCM, b"")


def test_a_pipe_closed_early_cancels_and_ends_quietly() -> None:
    cancels: list[Cancel] = []

    async def script(connection: Connection) -> None:
        submit = await connection.accept()
        connection.send(*frames(submit.request_id, *[b"\1\0" * 50_000] * 20, ends=False))
        cancels.append(await connection.expect(Cancel))
        await connection.hold()

    with RelayThread(Path.cwd(), script) as url:
        command = [sys.executable, "-m", "protocol.cli", "say", "hi", "-o", "-", "-q", "--url", url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPO) as relay:
            assert relay.stdout is not None
            assert relay.stderr is not None
            assert relay.stdout.read(1000) == b"\1\0" * 500
            relay.stdout.close()
            assert relay.stderr.read() == b""
        assert relay.returncode == 128 + signal.SIGPIPE
    assert len(cancels) == 1


def test_ctrl_c_cancels_the_request_and_leaves_a_valid_wav() -> None:
    cancels: list[Cancel] = []

    async def script(connection: Connection) -> None:
        submit = await connection.accept()
        connection.send(*frames(submit.request_id, PCM, ends=False))
        cancels.append(await connection.expect(Cancel))
        await connection.hold()

    with RelayThread(Path.cwd(), script) as url:
        out = Path.cwd() / "out.wav"
        command = [sys.executable, "-m", "protocol.cli", "say", "hi", "-o", str(out), "--url", url]
        with subprocess.Popen(command, stderr=subprocess.PIPE, cwd=REPO, text=True) as relay:
            assert relay.stderr is not None
            wait_for_size(out, 44 + len(PCM))
            relay.send_signal(signal.SIGINT)
            err = relay.stderr.read()
        assert relay.returncode == 130
    assert len(cancels) == 1
    assert samples(str(out)) == PCM
    assert "Traceback" not in err
    assert "interrupted" in err


REPO = Path(__file__).parents[3]


def test_a_rejected_request_is_one_sentence_and_a_line_for_each_field(capsys: pytest.CaptureFixture[str]) -> None:
    async def script(connection: Connection) -> None:
        submit = await connection.expect(Submit)
        details = {"rate": "must be at least 80", "spede": "is unknown; accepted: rate, text"}
        connection.send(
            Rejected(request_id=submit.request_id, code="invalid_params", message="not these params", details=details)
        )
        await connection.hold()

    assert run(script, "say", "hi", "-o", "out.wav") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "relay: not these params (invalid_params)",
        "relay:   rate: must be at least 80",
        "relay:   spede: is unknown; accepted: rate, text",
    ]
    assert not Path("out.wav").exists()


def test_what_looks_like_json_is_sent_as_text_where_the_space_takes_text(capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[dict[str, Value]] = []
    params = {
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "size": {"enum": ["1", "2"]},
            "mood": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "n": {"type": "integer"},
        },
    }

    async def script(connection: Connection) -> None:
        submit = await connection.expect(Submit)
        heard.append(submit.params)
        details = {"text": "must be a string, not int", "size": "must be one of 1, 2", "mood": "must be a string"}
        connection.send(Rejected(request_id=submit.request_id, code="invalid_params", message="no", details=details))
        await connection.expect(Spaces)
        connection.send(SpacesReply(spaces=[{"name": "other"}, {"name": "fn", "params": params}]))
        submit = await connection.accept()
        heard.append(submit.params)
        connection.send(*frames(submit.request_id, b"\1\0"))
        await connection.hold()

    assert (
        run(script, "submit", "--space", "fn", *["-p", "text=123", "-p", "size=1", "-p", "mood=true", "-p", "n=2"]) == 0
    )
    assert heard[0] == {"text": 123, "size": 1, "mood": True, "n": 2}
    assert heard[1] == {"text": "123", "size": "1", "mood": "true", "n": 2}


def test_a_failure_after_some_audio_keeps_what_came_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    async def script(connection: Connection) -> None:
        submit = await connection.accept()
        connection.send(*frames(submit.request_id, PCM, ends=False), failed(submit.request_id, seq=2))
        await connection.hold()

    assert run(script, "say", "hi", "-o", "out.wav") == 1
    assert samples("out.wav") == PCM
    assert "relay: it broke (engine_failed)" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [("say", "..."), ("submit", "--space", "tts"), ("attach", "a" * 32)])
def test_speech_without_a_sample_is_a_failure_and_leaves_no_file(
    argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    async def script(connection: Connection) -> None:
        if argv[0] == "attach":
            rid = (await connection.expect(Attach)).request_id
        else:
            rid = (await connection.accept()).request_id
        connection.send(*frames(rid))
        await connection.hold()

    Path("old.wav").write_bytes(b"what was there")
    assert run(script, *argv, "-o", "old.wav") == 1
    assert "made no audio" in capsys.readouterr().err
    assert Path("old.wav").read_bytes() == b"what was there"
    assert run(script, *argv) == 1
    assert {path.name for path in Path().iterdir()} <= {"old.wav", "relay.sock"}


def test_say_writes_what_the_name_of_the_file_says(capsys: pytest.CaptureFixture[str]) -> None:
    encodes = importlib.util.find_spec("lameenc") is not None  # the client's own install has no encoder
    assert run(speak, "say", "hi", "-o", "out.mp3", "-q") == (0 if encodes else 2)
    if encodes:
        assert Path("out.mp3").read_bytes()[:2] == b"\xff\xf3"  # an mp3 frame at 24 kHz
    else:
        assert "pip install lameenc" in capsys.readouterr().err
        assert not Path("out.mp3").exists()
    assert run(speak, "say", "hi", "-o", "out.pcm", "-q") == 0
    assert Path("out.pcm").read_bytes() == PCM


def test_say_refuses_a_name_that_it_cannot_keep_before_anything_is_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["say", "hi", "-o", "out.m4a", "--url", "unix:nobody.sock"]) == 2
    assert "out.m4a: audio is written as .wav, .mp3, .opus, .flac, .aac or .pcm" in capsys.readouterr().err
    assert not Path("out.m4a").exists()
    assert run(speak, "submit", "--space", "tts", "-o", "out.m4a") == 2
    assert not Path("out.m4a").exists()


@pytest.mark.parametrize("name", ["out.opus", "out.flac"])
def test_say_names_the_extra_that_a_coding_takes_before_anything_is_asked_for(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    for module in ("codecs", "samples"):
        monkeypatch.delitem(sys.modules, f"protocol.audio.{module}", raising=False)
    assert main(["say", "hi", "-o", name, "--url", "unix:nobody.sock"]) == 2
    assert "the extra [audio] (pip install '.[audio]'" in capsys.readouterr().err
    assert not Path(name).exists()


def test_submit_prints_values_as_json_lines_and_writes_binary(capsys: pytest.CaptureFixture[str]) -> None:
    async def script(connection: Connection) -> None:
        submit = await connection.accept()
        rid, values = submit.request_id, ["plain text", {"größe": [1, 2]}, b"\x89PNG", b"\r\n", 7]
        connection.send(Started(request_id=rid, attempt=1, seq=0))
        connection.send(ProgressFrame(request_id=rid, attempt=1, seq=1, state="loading", fraction=0.5, message="model"))
        connection.send(*[Output(request_id=rid, attempt=1, seq=seq, data=data) for seq, data in enumerate(values, 2)])
        connection.send(failed(rid, seq=7) if submit.params else frames(rid, *[b""] * 6, seq=7)[0])
        await connection.hold()

    assert run(script, "submit", "--space", "fn", "-o", "out.png") == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ["plain text", '{"größe": [1, 2]}', "7"]
    assert Path("out.png").read_bytes() == b"\x89PNG\r\n"
    assert err.rstrip().endswith("-> out.png")
    assert run(script, "submit", "--space", "fn", "-p", "fail=1", "--json", "-q") == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["type"] for line in lines] == ["accepted", "started", "progress", *["output"] * 5, "failed"]
    assert lines[5]["data"] == {"base64": "iVBORw=="}
    assert lines[-1]["code"] == "engine_failed"


def shown(request_id: str, *, format_: AudioFormat | None = None, attempt: int = 1, ends: bool = True) -> list[Frame]:
    """The frames of a request that makes video, and perhaps audio beside it."""
    of: dict[str, Any] = {"request_id": request_id, "attempt": attempt}
    made: list[Frame] = [Started(**of, seq=0, format=format_, video=VIDEO)]
    for data, pts in PICTURES:
        made.append(Video(**of, seq=len(made), data=data, pts=pts, key=not pts))
        if format_ is not None:
            made.append(Audio(**of, seq=len(made), pcm=PCM[:200]))
    return [*made, *([Completed(**of, seq=len(made))] if ends else [])]


@pytest.mark.parametrize(
    ("argv", "makes_audio", "file"),
    [
        (["-o", "out.ivf"], False, "out.ivf"),
        (["-o", "out.ivf"], True, "out.ivf"),
        ([], False, "fn-*.ivf"),
    ],
)
def test_video_is_written_as_ivf(
    argv: list[str], makes_audio: bool, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def script(connection: Connection) -> None:
        submit = await connection.accept()
        connection.send(*shown(submit.request_id, format_=FORMAT if makes_audio else None))
        await connection.hold()

    assert run(script, "submit", "--space", "fn", *argv) == 0
    (path,) = Path.cwd().glob("*.ivf")
    assert path.match(file)
    assert path.read_bytes() == ivf(PICTURES)
    assert "5 pictures in" in capsys.readouterr().err


def test_of_audio_and_video_a_file_of_another_name_gets_the_audio(capsys: pytest.CaptureFixture[str]) -> None:
    async def script(connection: Connection) -> None:
        submit = await connection.accept()
        connection.send(*shown(submit.request_id, format_=FORMAT))
        await connection.hold()

    assert run(script, "submit", "--space", "fn", "-o", "out.wav", "--json") == 0
    assert samples("out.wav") == PCM[:200] * 5
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["bytes"], row["pts"]) for row in rows if row["type"] == "video"] == [
        (len(data), pts) for data, pts in PICTURES
    ]


def test_video_goes_to_a_pipe(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    async def script(connection: Connection) -> None:
        connection.send(*shown((await connection.accept()).request_id))
        await connection.hold()

    assert run(script, "submit", "--space", "fn", "-o", "-", "-q") == 0
    assert capfdbinary.readouterr() == (ivf(PICTURES), b"")


def test_a_restarted_video_begins_the_file_anew() -> None:
    async def script(connection: Connection) -> None:
        request_id = (await connection.accept()).request_id
        connection.send(*shown(request_id, ends=False))
        await trio.to_thread.run_sync(wait_for_size, Path("out.ivf"), len(ivf(PICTURES)))
        connection.send(*shown(request_id, attempt=2))
        await connection.hold()

    assert run(script, "submit", "--space", "fn", "-o", "out.ivf", "--retry", "always") == 0
    assert Path("out.ivf").read_bytes() == ivf(PICTURES)


@pytest.mark.parametrize("fault", ["name", "empty"])
def test_a_video_that_is_not_written_is_told_and_leaves_no_file(fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    async def script(connection: Connection) -> None:
        started, *pictures, last = shown((await connection.accept()).request_id)
        frames_ = [started, *pictures, last] if fault == "name" else [started, attrs.evolve(last, seq=1)]
        connection.send(*frames_)
        await connection.hold()

    name = "out.mp4" if fault == "name" else "out.ivf"
    assert run(script, "submit", "--space", "fn", "-o", name) == (2 if fault == "name" else 1)
    assert not Path(name).exists()
    words = "video is written as .ivf" if fault == "name" else "made no video of this, so nothing was written"
    assert words in capsys.readouterr().err


def test_submit_sends_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    pieces: list[Input] = []

    async def script(connection: Connection) -> None:
        submit = await connection.expect(Submit)
        assert submit.inputs["voice"].media_type == "audio/x-wav"
        pieces.append(await connection.expect(Input))
        connection.send(*frames(submit.request_id, b"\1\0"))
        await connection.hold()

    Path("voice.wav").write_bytes(b"RIFF")
    assert run(script, "submit", "--space", "tts", "--input", "voice=voice.wav", "-o", "out.wav", "-q") == 0
    assert pieces[0].data == b"RIFF"


def test_detach_prints_the_id_alone_and_does_not_wait(capsys: pytest.CaptureFixture[str]) -> None:
    submits: list[Submit] = []

    async def script(connection: Connection) -> None:
        submits.append(await connection.accept())
        await connection.hold()
        assert [type(message) for message in connection.heard] == [Submit, Leave]

    assert run(script, "say", "hi", "--detach") == 0
    assert submits[0].detach
    assert capsys.readouterr() == (f"{submits[0].request_id}\n", "")
    assert run(script, "say", "hi", "--detach", "-o", "out.wav") == 2
    assert "relay attach ID -o FILE" in capsys.readouterr().err


def test_json_of_a_request_is_one_line_for_each_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(speak, "say", "hi", "-o", "out.wav", "--json", "-q") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kinds = [line["type"] for line in lines if line["type"] != "queued"]
    assert kinds == ["accepted", "started", "audio", "audio", "audio", "completed"]
    assert [line["bytes"] for line in lines if line["type"] == "audio"] == [4800] * 3
    assert lines[-1]["result"] == {"samples": 7200}


def test_attach_follows_an_older_request(capsys: pytest.CaptureFixture[str]) -> None:
    async def script(connection: Connection) -> None:
        assert (await connection.expect(Attach)).after_seq == -1
        connection.send(*frames(ID, PCM))
        await connection.hold()
        assert len(connection.heard) == 1

    assert run(script, "attach", ID, "-o", "out.wav", "-q") == 0
    assert samples("out.wav") == PCM


def test_a_restarted_request_begins_the_file_anew(capsys: pytest.CaptureFixture[str]) -> None:
    async def script(connection: Connection) -> None:
        request_id = (await connection.accept()).request_id
        connection.send(*frames(request_id, b"\7\0" * 5000, ends=False))
        await trio.to_thread.run_sync(wait_for_size, Path("out.wav"), 10_000)
        connection.send(*frames(request_id, PCM, attempt=2))
        await connection.hold()

    assert run(script, "say", "hi", "-o", "out.wav", "--retry", "always") == 0
    assert samples("out.wav") == PCM
    assert "the request starts over; the file starts again" in capsys.readouterr().err


def test_status_and_cancel_show_how_the_request_stands(capsys: pytest.CaptureFixture[str]) -> None:
    async def script(connection: Connection) -> None:
        await connection.expect(Status)
        connection.send(StatusReply(request_id=ID, space="tts", state="queued", position=2, of=3, eta_s=4.5))
        await connection.hold()

    assert run(script, "status", ID) == 0
    assert "state: queued\n" in capsys.readouterr().out
    assert run(script, "status", ID, "--json") == 0
    assert json.loads(capsys.readouterr().out)["position"] == 2

    async def late(connection: Connection) -> None:
        assert (await connection.expect(Cancel)).reason == "too long"
        await connection.expect(Status)
        connection.send(StatusReply(request_id=ID, space="tts", state="completed"))
        await connection.hold()

    assert run(late, "cancel", ID, "--reason", "too long") == 0
    assert "too late: the request is already completed" in capsys.readouterr().err


def test_spaces_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    async def script(connection: Connection) -> None:
        await connection.expect(Spaces)
        inputs = {"text": {"live": True}, "voice": {"live": False}, "audio": {"live": True}}
        space = {"name": "tts", "state": "ready", "engine": "espeak", "slots": 2, "inputs": inputs}
        connection.send(SpacesReply(spaces=[space]))
        await connection.hold()

    assert run(script, "spaces") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-2:] == ["LIVE", "DESCRIPTION"]
    assert lines[1].split()[-1] == "text,audio"
    assert lines[0].split()[:3] == ["NAME", "STATE", "ENGINE"]
    assert lines[1].split()[:3] == ["tts", "ready", "espeak"]
    assert run(script, "spaces", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "tts"


def test_watch_prints_what_changes_until_it_is_interrupted() -> None:
    async def script(connection: Connection) -> None:
        assert connection.hello.role == "operator"
        assert (await connection.expect(Watch)).topics == ["workers"]
        connection.send(Snapshot(data={"workers": [{"worker_id": "w1", "state": "idle"}]}))
        connection.send(Delta(data={"workers": [{"worker_id": "w2", "state": "busy"}]}, gone={"workers": ["w1"]}))
        await connection.hold()

    with RelayThread(Path.cwd(), script) as url:
        command = [sys.executable, "-m", "protocol.cli", "watch", "workers", "-q", "--url", url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPO, text=True) as watch:
            assert watch.stdout is not None
            assert watch.stderr is not None
            lines = [watch.stdout.readline().rstrip() for _ in range(3)]
            watch.send_signal(signal.SIGINT)
            assert watch.stderr.read() == ""
        assert watch.returncode == 130
    assert lines == ["workers is worker_id=w1 state=idle", "workers now worker_id=w2 state=busy", "workers gone w1"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["say", ""], "the text is empty"),
        (["say", " \n"], "the text is empty"),
        (["say", "a", "-p", "text=b"], "are the same param"),
        (["say", "a", "--space", "no spaces"], "space: 'no spaces' is not a space name"),
        (["say", "x" * 70_000], "the request cannot be sent: text has 70000 bytes"),
        (["say", "a", "-o", "none/out.wav"], "none/out.wav: No such file"),
        (["say", "a", "-o", "-", "--json"], "both write to standard output"),
        (["submit", "--space", "x", "--input", "voice=none.wav"], "none.wav: No such file"),
        (["status", "12x4"], "'12x4' is not a request id"),
        (["status", ID, "--token-file", "none"], "token file none cannot be read"),
    ],
)
def test_wrong_use_is_one_clear_line_and_exit_2(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(speak, *argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert len(err.splitlines()) == 1
    assert err.startswith("relay: " if "--json" not in argv else "{")


@pytest.mark.parametrize(
    "argv", [[], ["dance"], ["say"], ["say", "a", "-p", "novalue"], ["submit"], ["say", "a", "--priority", "x"]]
)
def test_wrong_arguments_exit_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert "usage: relay" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "written", "told"),
    [
        (["say", "caf\udce9"], b"", "text is not UTF-8 at character 4"),
        (["say", "-"], "café".encode("latin-1"), "not UTF-8 at byte 4; save the file as UTF-8"),
        (["say", "-"], "\ufeffHi".encode("utf-16"), "not UTF-8 at byte 1; save the file as UTF-8"),
        (["submit", "--space", "tts", "-p", "n=" + "1" * 30], b"", "n is a whole number of more than 64 bits"),
        (["say", "x" * 70_000], b"", "text has 70000 bytes"),
    ],
)
def test_what_cannot_be_sent_is_told_with_what_is_wrong_with_it(
    argv: list[str], written: bytes, told: str, capsys: pytest.CaptureFixture[str], stdin: WrittenInput
) -> None:
    stdin.write(written, last=True)
    assert run(speak, *argv) == 2
    said = capsys.readouterr().err
    assert told in said
    assert "Traceback" not in said


def test_no_relay_is_exit_3_and_names_where_it_looked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spaces"]) == 3
    assert "no relay listens at unix:" in capsys.readouterr().err
    assert main(["spaces", "--url", "h:1"]) == 2
    assert "must begin with ws://" in capsys.readouterr().err


def test_a_refused_login_says_why(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_TOKEN", "wrong")
    assert run(speak, "spaces") == 3
    assert capsys.readouterr().err == "relay: the relay refused the login: this token is not known (unauthenticated)\n"


def test_a_lost_connection_is_told_and_made_again(capsys: pytest.CaptureFixture[str]) -> None:
    async def cut(connection: Connection) -> None:
        await connection.expect(Submit)
        await connection.stream.aclose()

    with RelayThread(Path.cwd(), cut, speak) as url:
        assert main(["say", "hi", "-o", "out.wav", "--url", url]) == 0
    err = capsys.readouterr().err
    assert "connection lost (" in err
    assert "trying again in 0." in err
    assert "connected again" in err
    assert samples("out.wav") == PCM


# -- the progress line -------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_the_line_is_rewritten_and_taken_away() -> None:
    out, now = Terminal(), 0.0
    progress = Progress(out, clock=lambda: now)
    progress.queued(Queued(request_id=ID, position=2, of=3))
    now = 1.0
    progress.started()
    now = 2.0
    progress.audio(3.0)
    now = 2.01
    progress.audio(3.1)  # too soon to be drawn
    now = 3.0
    progress.completed(6.0, "out.wav")
    progress.close()
    assert out.getvalue() == (
        "\rqueued: position 2 of 3\x1b[K"
        "\rrunning\x1b[K"
        "\r3.0 s of audio, 3.0x real time\x1b[K"
        "\r\x1b[K6.0 s of audio in 3.0 s, 3.0x real time, first audio after 2.00 s -> out.wav\n"
    )


def test_a_terminal_that_is_gone_stops_nothing() -> None:
    out = Terminal()
    progress = Progress(out)
    out.close()
    progress.note("said to nobody")
    progress.audio(1.0)
    progress.error("neither")


def test_a_table_has_its_columns_in_line() -> None:
    assert table([["A", "LONG"], ["wide", "b"]]) == "A     LONG\nwide  b"
    assert FORMAT.sample_bytes == 2


# -- text of others --------------------------------------------------------------------------------------------------

#: Clears the screen, fakes a line, changes the colour by an 8-bit CSI, and turns the direction of writing.
EVIL = "\x1b[2J\nrelay: done\x9b31m\u202e"
HARMLESS = "\\x1b[2J\\nrelay: done\\x9b31m\\u202e"


def test_printable_escapes_what_steers_a_terminal_and_nothing_else() -> None:
    assert printable(EVIL) == HARMLESS
    assert printable("\r\t\x00\x7f\ud800") == "\\r\\t\\x00\\x7f\\ud800"
    assert printable("你好\u3000Grüße, 'quoted' \\n") == "你好\u3000Grüße, 'quoted' \\n"
    assert printable_lines("one\x1b\ntwo") == "one\\x1b\ntwo"


def test_printable_json_is_the_same_json() -> None:
    value = {"message": EVIL, "plain": "你好"}
    line = printable_json(value)
    assert json.loads(line) == value
    assert printable(line) == line
    assert "你好" in line


def test_nothing_a_peer_says_steers_the_terminal_from_progress_or_tables() -> None:
    out = Terminal()
    progress = Progress(out)
    progress.progress("generating", 0.5, EVIL)
    progress.note(EVIL)
    progress.error(EVIL)
    assert out.getvalue().replace("\r", "").replace("\x1b[K", "") == (
        f"generating 50%: {HARMLESS}{HARMLESS}\nrelay: {HARMLESS}\n"
    )
    assert table([["NAME"], [EVIL]]) == f"NAME\n{HARMLESS}"


@pytest.mark.parametrize("command", ["status", "spaces", "watch", "say"])
def test_nothing_a_peer_says_steers_the_terminal_from_a_command(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def script(connection: Connection) -> None:
        if command == "status":
            await connection.expect(Status)
            connection.send(StatusReply(request_id=ID, space="tts", state="failed", message=EVIL))
        elif command == "spaces":
            await connection.expect(Spaces)
            connection.send(SpacesReply(spaces=[{"name": "tts", "description": EVIL}]))
        elif command == "watch":
            await connection.expect(Watch)
            connection.send(Snapshot(data={"workers": [{"worker_id": EVIL}]}), Delta(gone={"workers": [EVIL]}))
            connection.send(Error(code="unknown_type", message=EVIL))  # which ends it
        else:
            request_id = (await connection.accept()).request_id
            connection.send(failed(request_id, message=EVIL, details={EVIL: EVIL}))
        await connection.hold()

    argv = {"status": ["status", ID], "spaces": ["spaces"], "watch": ["watch"], "say": ["say", "hi"]}[command]
    run(script, *argv)
    out, err = capsys.readouterr()
    said = (out + err).rstrip("\n").split("\n")
    assert any(HARMLESS in line for line in said)
    assert all(printable(line) == line and not line.startswith("relay: done") for line in said)
