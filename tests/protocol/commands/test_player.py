"""`relay say --play`: what plays, and what happens when it cannot."""

import sys
import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from protocol.cli import main
from protocol.commands.player import FILE_PROGRAM, Player, PlayerFailed, find_player, has_sound
from protocol.commands.wav_writer import HEADER_BYTES
from protocol.wire.structs import AudioFormat
from tests.support.scripted_relay import Connection, RelayThread, frames, speak

MONO = AudioFormat(sample_rate=24_000)
PCM = b"\1\0" * 2400 + b"\2\0" * 2400 + b"\3\0" * 2400


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No relay, sound or player of the machine that runs the tests."""
    monkeypatch.chdir(tmp_path)
    for name in ("RELAY_URL", "RELAY_TOKEN", "RELAY_TOKEN_FILE", "RELAY_PLAYER", "PULSE_SERVER", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "sounddevice", None)


def a_program(path: Path, body: str) -> str:
    path.write_text(f"#!{sys.executable}\nimport sys, pathlib\n{body}\n")
    path.chmod(0o755)
    return str(path.absolute())


def run(*argv: str) -> int:
    with RelayThread(Path.cwd(), speak) as url:
        return main([*argv, "--url", url])


def heard(path: str = "heard.wav") -> bytes:
    """The samples that a player got, whose header cannot know their number."""
    data = Path(path).read_bytes()
    assert data[:4] == b"RIFF"
    assert int.from_bytes(data[24:28], "little") == 24_000
    return data[HEADER_BYTES:]


def test_the_speech_goes_to_the_player_and_to_no_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    player = a_program(Path("player"), "pathlib.Path(sys.argv[1]).write_bytes(sys.stdin.buffer.read())")
    monkeypatch.setenv("RELAY_PLAYER", f"{player} heard.wav")
    assert run("say", "hi", "--play") == 0
    assert heard() == PCM
    assert not list(Path().glob("tts-*.wav"))
    assert "0.3 s of audio in" in capsys.readouterr().err


def test_with_o_it_is_written_too(monkeypatch: pytest.MonkeyPatch) -> None:
    player = a_program(Path("player"), "pathlib.Path('heard.wav').write_bytes(sys.stdin.buffer.read())")
    monkeypatch.setenv("RELAY_PLAYER", player)
    assert run("say", "hi", "--play", "-o", "out.wav") == 0
    assert heard() == PCM
    with wave.open("out.wav") as wav:
        assert wav.readframes(wav.getnframes()) == PCM


def test_a_player_that_is_missing_is_told_and_the_speech_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RELAY_PLAYER", "./nobody")
    assert run("say", "hi", "--play") == 0
    assert "it is not played: ./nobody cannot be started: No such file or directory" in capsys.readouterr().err
    assert len(list(Path().glob("tts-*.wav"))) == 1


def test_where_nothing_plays_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(Path.cwd()))
    assert run("say", "hi", "--play", "-o", "out.wav") == 0
    err = capsys.readouterr().err
    assert "it is not played: nothing here plays audio: install one of aplay, ffplay" in err
    assert "pip install '.[play]'" in err
    assert Path("out.wav").exists()


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("print('no such device', file=sys.stderr); sys.exit(3)", "ended with exit code 3: no such device"),
        ("sys.stdin.buffer.read(10)", "ended before the audio did"),
    ],
)
def test_a_player_that_ends_is_told_once_and_the_request_goes_on(
    body: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loud = b"\1\0" * 50_000  # more than a pipe holds

    async def script(connection: Connection) -> None:
        submit = await connection.accept()
        connection.send(*frames(submit.request_id, *[loud] * 20))
        await connection.hold()

    monkeypatch.setenv("RELAY_PLAYER", a_program(Path("player"), body))
    with RelayThread(Path.cwd(), script) as url:
        assert main(["say", "hi", "--play", "--url", url]) == 0
    err = capsys.readouterr().err
    assert err.count("it is not played on") == 1
    assert told in err
    assert "fetch the speech with: relay attach " in err
    assert "41.7 s of audio in" in err


def test_it_begins_anew_with_a_new_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    body = "pathlib.Path(f'heard-{len(list(pathlib.Path().glob(\"heard-*\")))}').write_bytes(sys.stdin.buffer.read())"
    monkeypatch.setenv("RELAY_PLAYER", a_program(Path("player"), body))
    player = Player(find_player())
    for pcm in (b"\1\0" * 10, b"\2\0" * 10):
        player.begin(MONO)
        player.write(pcm)
    player.finish()
    player.stop()
    assert player.fault == ""
    assert heard(max(map(str, Path().glob("heard-*")))) == b"\2\0" * 10


def test_a_player_of_files_gets_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path.cwd()))
    a_program(Path(FILE_PROGRAM), "pathlib.Path('heard.wav').write_bytes(pathlib.Path(sys.argv[1]).read_bytes())")
    player = Player(find_player())
    player.begin(MONO)
    player.write(PCM)
    player.finish()
    player.stop()
    with wave.open("heard.wav") as wav:
        assert wav.readframes(wav.getnframes()) == PCM


def test_silence_comes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_PLAYER", a_program(Path("player"), "import time; time.sleep(300)"))
    player = Player(find_player())
    player.begin(MONO)
    player.write(b"\1\0" * 1_000_000)
    player.stop()
    assert player.fault == ""


class FakeDevice:
    """The package sounddevice, as far as it is used."""

    def __init__(self, fault: str = "") -> None:
        self.fault, self.played, self.ended = fault, b"", False

    def RawOutputStream(self, **options: Any) -> "FakeDevice":  # noqa: N802
        assert options == {"samplerate": 24_000, "channels": 1, "dtype": "int16"}
        return self

    def start(self) -> None:
        if self.fault == "start":
            raise RuntimeError("no device")

    def write(self, data: bytes) -> None:
        if self.fault == "write":
            raise RuntimeError("unplugged")
        self.played += data

    def stop(self) -> None:
        self.ended = True

    abort = close = stop


@pytest.mark.parametrize(("fault", "told"), [("", ""), ("start", "no device"), ("write", "unplugged")])
def test_the_sound_card_is_played_by_sounddevice(fault: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(fault)
    monkeypatch.setitem(sys.modules, "sounddevice", SimpleNamespace(RawOutputStream=device.RawOutputStream))
    player = Player(find_player({}))
    player.begin(MONO)
    player.write(PCM)
    player.finish()
    player.stop()
    assert told in player.fault
    assert bool(player.fault) is bool(fault)
    assert device.played == (b"" if fault else PCM)


def test_where_sound_can_be_heard(tmp_path: Path) -> None:
    assert has_sound({"RELAY_PLAYER": "x"})
    (tmp_path / "pipewire-0").touch()
    assert has_sound({"XDG_RUNTIME_DIR": str(tmp_path)})
    with pytest.raises(PlayerFailed, match="not a command line"):
        find_player({"RELAY_PLAYER": "'"})
