"""`relay say -` and `relay submit --input NAME=-`: fed while another program writes, where the space takes that."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.cli import main
from protocol.commands.standard_input import MAX_BLANKS, TextDecoder
from protocol.wire.messages import Cancel, Input, Spaces, SpacesReply, Submit
from protocol.wire.structs import InputInfo, InputRule
from protocol.wire.validators import Value
from tests.protocol.client.live_relay import LiveRelay
from tests.protocol.commands.conftest import WrittenInput
from tests.support.scripted_relay import ID, OTHER, Connection, RelayThread, frames, speak

REPO = Path(__file__).parents[3]
TEXT: dict[str, Value] = {
    "name": "tts",
    "params": {"properties": {"text": {"type": "string"}, "voice": {"type": "string"}, "rate": {"type": "integer"}}},
    "inputs": {"text": InputRule(live=True).to_map()},
}
AUDIO: dict[str, Value] = {
    "name": "stt",
    "inputs": {"audio": InputRule(media_types=["audio/*", "audio/pcm", "audio/wav"], live=True).to_map()},
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(peer: LiveRelay, *argv: str) -> int:
    with RelayThread(Path.cwd(), peer.script()) as url:
        return main([*argv, "--url", url, "-o", "out.wav"])


def test_say_speaks_while_the_program_writes(stdin: WrittenInput) -> None:
    written = [b"lo, ", "你".encode()[:2], "你".encode()[2:], b"\r", b"\nBye.\n"]

    def write_next() -> None:
        sizes.append(len(peer.stored["text"]))
        while written:
            stdin.write(piece := written.pop(0), last=not written)
            if piece not in (b"\r", "你".encode()[:2]):  # of which nothing can be sent yet
                break

    sizes: list[int] = []
    peer = LiveRelay(spaces=[TEXT], on_message=write_next)
    stdin.write(b"\xef\xbb\xbfHel")
    assert run(peer, "say", "-", "-p", "voice=7", "-p", "rate=7", "--group", "turn") == 0
    assert sizes[:4] == [3, 7, 10, 16]
    assert peer.stored == {"text": "Hello, 你\nBye.\n".encode()}
    assert peer.infos == {"text": InputInfo(media_type="text/plain", live=True)}
    assert peer.submit is not None
    assert peer.submit.params == {"voice": "7", "rate": 7}  # what the space takes as text, and what it does not
    assert peer.submit.group == "turn"
    assert Path("out.wav").stat().st_size == 44 + 4_800


def test_blanks_that_may_never_end_are_sent_as_they_come(stdin: WrittenInput) -> None:
    sent: list[int] = []

    def write_last() -> None:
        sent.append(len(peer.stored["text"]))
        if not stdin.closed:
            stdin.write(b"Hello.", last=True)

    peer = LiveRelay(spaces=[TEXT], on_message=write_last)
    for _ in range(2):
        threading.Thread(target=stdin.write, args=(b"\n" * 40_000,)).start()
    assert run(peer, "say", "-") == 0
    assert sent[0] >= MAX_BLANKS, "nothing but blanks was there so far"
    assert peer.stored["text"].strip() == b"Hello."


def test_a_text_that_nobody_stays_to_feed_is_sent_whole(stdin: WrittenInput) -> None:
    heard: list[Submit] = []

    async def script(connection: Connection) -> None:
        await connection.expect(Spaces)
        connection.send(SpacesReply(spaces=[TEXT]))
        heard.append(await connection.accept())
        await connection.hold()

    stdin.write(b"\xef\xbb\xbfHello.\r\nBye.\n\n", last=True)
    with RelayThread(Path.cwd(), script) as url:
        assert main(["say", "-", "--url", url, "--detach"]) == 0
    assert heard[0].params == {"text": "Hello.\nBye."}
    assert heard[0].inputs == {}


@pytest.mark.parametrize("argv", [["say", "-"], ["submit", "--space", "tts", "-i", "text=-"]])
def test_a_space_that_takes_no_live_text_gets_it_whole(argv: list[str], stdin: WrittenInput) -> None:
    heard: list[Submit] = []

    async def script(connection: Connection) -> None:
        await connection.expect(Spaces)
        connection.send(SpacesReply(spaces=[TEXT | {"inputs": {}}]))
        stdin.write(b"lo.\n", last=True)
        heard.append(await connection.accept())
        connection.send(*frames(heard[0].request_id, b"\1\0"))
        await connection.hold()

    stdin.write(b"Hel")
    with RelayThread(Path.cwd(), script) as url:
        assert main([*argv, "--url", url]) == 0
    assert heard[0].params == {"text": "Hello."}


def test_submit_streams_what_is_no_text_as_it_is(stdin: WrittenInput) -> None:
    written = [b"\r\n\xff", b"more"]
    peer = LiveRelay(spaces=[AUDIO])
    peer.on_message = lambda: stdin.write(written.pop(0), last=not written) if written else None
    stdin.write(b"\x00\x01")
    assert run(peer, "submit", "--space", "stt", "--input", "audio=-") == 0
    assert peer.stored == {"audio": b"\x00\x01\r\n\xffmore"}
    assert peer.infos["audio"] == InputInfo(media_type="audio/pcm", live=True)  # the first that the space names


def test_the_first_bytes_say_what_it_is(stdin: WrittenInput) -> None:
    wav = b"RIFF\x24\0\0\0WAVEfmt "
    peer = LiveRelay(spaces=[AUDIO])
    stdin.write(wav, last=True)
    assert run(peer, "submit", "--space", "stt", "-i", "audio=-") == 0
    assert peer.infos["audio"] == InputInfo(media_type="audio/wav", live=True)
    assert peer.stored == {"audio": wav}


def test_a_space_that_takes_no_live_input_gets_it_whole(stdin: WrittenInput) -> None:
    wav = b"RIFF\x24\0\0\0WAVEfmt "
    heard: list[Submit] = []

    async def script(connection: Connection) -> None:
        await connection.expect(Spaces)
        connection.send(SpacesReply(spaces=[{"name": "stt", "inputs": {"audio": {"media_types": ["audio/*"]}}}]))
        stdin.write(wav[4:], last=True)
        heard.append(await connection.expect(Submit))
        assert (await connection.expect(Input)).data == wav
        connection.send(*frames(heard[0].request_id, b"\1\0"))
        await connection.hold()

    stdin.write(wav[:4])
    with RelayThread(Path.cwd(), script) as url:
        assert main(["submit", "--space", "stt", "-i", "audio=-", "--url", url]) == 0
    info = heard[0].inputs["audio"]
    assert (info.size, info.live) == (len(wav), False)


@pytest.mark.parametrize("text", [b"", b" \n"])
def test_nothing_to_speak_is_told(text: bytes, stdin: WrittenInput, capsys: pytest.CaptureFixture[str]) -> None:
    stdin.write(text, last=True)
    with RelayThread(Path.cwd(), speak) as url:
        assert main(["say", "-", "--url", url]) == 2
    assert "there is nothing to read on standard input" in capsys.readouterr().err


def test_text_that_is_no_utf_8_cancels_the_request(stdin: WrittenInput, capsys: pytest.CaptureFixture[str]) -> None:
    peer = LiveRelay(spaces=[TEXT])
    peer.on_message = lambda: None if stdin.closed else stdin.write(b"a\xe9b", last=True)
    stdin.write("你好".encode())
    assert run(peer, "say", "-") == 2
    assert capsys.readouterr().err == "relay: text: not UTF-8 at byte 8; save the file as UTF-8\n"
    assert len(peer.cancels) == 1


def test_ctrl_c_cancels_what_is_fed_and_what_is_not_written_yet(tmp_path: Path) -> None:
    submitted = threading.Event()
    cancels: list[Cancel] = []

    async def script(connection: Connection) -> None:
        await connection.expect(Spaces)
        connection.send(SpacesReply(spaces=[TEXT]))
        await connection.accept()
        await connection.expect(Input)
        submitted.set()
        cancels.append(await connection.expect(Cancel))
        await connection.hold()

    with RelayThread(tmp_path, script) as url:
        command = [sys.executable, "-m", "protocol.cli", "say", "-", "-q", "--url", url]
        with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, cwd=REPO) as say:
            assert say.stdin is not None
            assert say.stderr is not None
            say.stdin.write(b"Hello")
            say.stdin.flush()
            submitted.wait()
            say.send_signal(signal.SIGINT)
            assert say.stderr.read() == b""
        assert say.returncode == 130
    assert len(cancels) == 1


def test_pipes_are_announced_and_wrong_ones_told(stdin: WrittenInput, capsys: pytest.CaptureFixture[str]) -> None:
    peer = LiveRelay()
    pipe = ["submit", "--space", "tts", "--pipe"]
    assert run(peer, *pipe, f"text={OTHER}") == 0
    assert peer.infos == {"text": InputInfo(from_=OTHER)}
    capsys.readouterr()
    for argv, told in (
        ([*pipe, "text=no-id"], "input 'text': 'no-id' is not a request id"),
        ([*pipe, f"text={ID}", "-i", "text=-"], "text has two sources; name one"),
        (["say", "-", "-i", "audio=-"], "standard input cannot be text and audio"),
    ):
        with RelayThread(Path.cwd(), speak) as url:
            assert main([*argv, "--url", url]) == 2
        assert told in capsys.readouterr().err


@given(st.text(alphabet=st.sampled_from("a\r\n你\ufeff😀")), st.lists(st.integers(1, 5)))
def test_however_the_bytes_come_the_text_is_the_same(text: str, sizes: list[int]) -> None:
    data, decoder, pieces = text.encode(), TextDecoder(), []
    for size in sizes:
        pieces.append(decoder.decode(data[:size]))
        data = data[size:]
    pieces.append(decoder.decode(data, final=True))
    assert "".join(pieces) == TextDecoder().decode(text.encode(), final=True)
