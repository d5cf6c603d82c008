"""Audio files: valid WAV at every moment, raw where the output cannot seek."""

import io
import os
import signal
import subprocess
import sys
import wave
from pathlib import Path

import pytest

from protocol.commands import wav_writer
from protocol.commands.wav_writer import AudioWriter, check_audio_name, wav_header
from protocol.wire.structs import AudioFormat

MONO = AudioFormat(sample_rate=24_000)
STEREO = AudioFormat(sample_rate=48_000, channels=2)


def read(path: Path) -> tuple[tuple[int, int, int], bytes]:
    """(rate, channels, bytes a sample) and the samples, by the standard library's own reader."""
    with wave.open(str(path)) as wav:
        return (wav.getframerate(), wav.getnchannels(), wav.getsampwidth()), wav.readframes(wav.getnframes())


def test_the_header_is_the_one_the_standard_library_writes() -> None:
    for audio_format in (MONO, STEREO):
        theirs = io.BytesIO()
        with wave.open(theirs, "wb") as wav:
            wav.setnchannels(audio_format.channels)
            wav.setsampwidth(2)
            wav.setframerate(audio_format.sample_rate)
            wav.writeframes(bytes(400))
        assert wav_header(audio_format, 400) == theirs.getvalue()[:44]


def test_the_file_is_valid_after_every_write(tmp_path: Path) -> None:
    path, written = tmp_path / "out.wav", b""
    writer = AudioWriter(path)
    writer.begin(STEREO)
    assert read(path) == ((48_000, 2, 2), b"")
    for number in range(20):
        pcm = bytes([number]) * (4 * number)
        writer.write(pcm)
        written += pcm
        assert read(path) == ((48_000, 2, 2), written)
    assert writer.seconds == pytest.approx(len(written) / 4 / 48_000)
    writer.close()
    writer.close()
    assert read(path)[1] == written


def test_killed_between_samples_and_header_it_is_shorter_and_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.wav"
    writer = AudioWriter(path)
    writer.begin(MONO)
    writer.write(b"\1\0" * 100)

    def killed(*_args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "pwrite", killed)
    with pytest.raises(KeyboardInterrupt):
        writer.write(b"\2\0" * 100)
    assert read(path) == ((24_000, 1, 2), b"\1\0" * 100)


def test_killed_with_sigkill_at_any_moment_it_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "out.wav"
    code = (
        "import sys; from protocol.commands.wav_writer import AudioWriter\n"
        "from protocol.wire.messages import AudioFormat\n"
        "writer = AudioWriter(sys.argv[1]); writer.begin(AudioFormat(sample_rate=24000)); print('go', flush=True)\n"
        "while writer.data_bytes < 5e8: writer.write(bytes(range(250)) * 4)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        while path.stat().st_size < 200_000:
            pass
        writer.send_signal(signal.SIGKILL)
    form, samples = read(path)
    assert form == (24_000, 1, 2)
    assert len(samples) >= 190_000
    assert samples == (bytes(range(250)) * 4) * (len(samples) // 1000)


def test_a_full_disk_leaves_a_valid_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.wav"
    writer = AudioWriter(path)
    writer.begin(MONO)
    writer.write(b"\1\0" * 100)
    real = os.write
    room = 50

    def nearly_full(fd: int, data: memoryview) -> int:
        nonlocal room
        if not room:
            raise OSError(28, "No space left on device")
        taken = real(fd, data[:room])
        room -= taken
        return taken

    monkeypatch.setattr(os, "write", nearly_full)
    with pytest.raises(OSError, match="No space"):
        writer.write(b"\2\0" * 100)
    writer.close()
    assert read(path) == ((24_000, 1, 2), b"\1\0" * 100)
    assert path.stat().st_size == 44 + 200


def test_beginning_again_drops_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "out.wav"
    writer = AudioWriter(path)
    writer.begin(MONO)
    writer.write(b"\1\0" * 1000)
    writer.begin(STEREO)
    writer.write(b"\2\0" * 10)
    writer.close()
    assert read(path) == ((48_000, 2, 2), b"\2\0" * 10)


def test_a_file_that_was_there_is_kept_until_the_audio_begins(tmp_path: Path) -> None:
    path = tmp_path / "out.wav"
    path.write_bytes(b"an older one" * 100)
    writer = AudioWriter(path)
    writer.close()
    assert path.read_bytes() == b"an older one" * 100
    writer = AudioWriter(path)
    writer.begin(MONO)
    writer.write(b"\1\0")
    writer.close()
    assert read(path)[1] == b"\1\0"


def test_a_file_of_ours_without_audio_is_removed(tmp_path: Path) -> None:
    writer = AudioWriter(tmp_path / "out.wav")
    assert (tmp_path / "out.wav").exists()
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written_is_refused_before_any_audio(tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "out.wav", tmp_path):
        with pytest.raises(OSError, match=r"No such file|Is a directory"):
            AudioWriter(path)


def test_more_than_a_wav_can_hold_is_refused_and_the_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wav_writer.MAX_DATA_BYTES + 36 < 2**32
    monkeypatch.setattr(wav_writer, "MAX_DATA_BYTES", 100)
    writer = AudioWriter(tmp_path / "out.wav")
    writer.begin(MONO)
    writer.write(bytes(100))
    with pytest.raises(ValueError, match="4 GiB"):
        writer.write(bytes(2))
    writer.close()
    assert read(tmp_path / "out.wav")[1] == bytes(100)


def test_a_pipe_gets_raw_pcm(tmp_path: Path) -> None:
    reader, writer_fd = os.pipe()
    with os.fdopen(reader, "rb") as source:
        with os.fdopen(writer_fd, "wb") as pipe:
            writer = AudioWriter(pipe)
            assert not writer.is_wav
            writer.begin(MONO)
            writer.write(b"\1\0\2\0")
            writer.close()
        assert source.read() == b"\1\0\2\0"


def test_an_open_file_gets_raw_pcm_after_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "raw"
    with path.open("wb") as target:
        target.write(b"before")
        writer = AudioWriter(target)
        writer.begin(MONO)
        writer.write(b"\1\0")
    assert path.read_bytes() == b"before\1\0"


def test_binary_that_is_no_audio_goes_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    path.write_bytes(b"an older one" * 100)
    writer = AudioWriter(path)
    writer.write_binary(b"\x89PNG")
    writer.write_binary(b"\r\n")
    writer.close()
    assert path.read_bytes() == b"\x89PNG\r\n"


def test_writing_before_the_format_is_known_is_a_bug(tmp_path: Path) -> None:
    writer = AudioWriter(tmp_path / "out.wav")
    with pytest.raises(RuntimeError):
        writer.write(b"\1\0")
    writer.begin(MONO)
    with pytest.raises(RuntimeError):
        writer.write_binary(b"x")
    writer.close()


@pytest.mark.parametrize("name", ["out.pcm", "out.RAW", "out.s16le"])
def test_a_name_of_raw_samples_gets_the_samples_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"what was there")
    writer = AudioWriter(tmp_path / name)
    for _ in range(2):  # as when the request starts again
        writer.begin(MONO)
        writer.write(b"\1\0" * 100)
    writer.close()
    assert (tmp_path / name).read_bytes() == b"\1\0" * 100


@pytest.mark.parametrize("suffix", [".m4a", ".MKV", ".webm"])
def test_a_name_of_another_kind_of_audio_is_refused_and_the_file_kept(tmp_path: Path, suffix: str) -> None:
    old, new = tmp_path / f"old{suffix}", tmp_path / f"new{suffix}"
    old.write_bytes(b"what was there")
    for path in (old, new):
        writer = AudioWriter(path)
        with pytest.raises(ValueError, match=r"audio is written as \.wav, \.mp3, \.opus, \.flac, \.aac or \.pcm"):
            writer.begin(MONO)
        writer.close()
    assert old.read_bytes() == b"what was there"
    assert not new.exists()


def test_without_lameenc_mp3_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lameenc", None)
    with pytest.raises(ValueError, match="pip install lameenc"):
        check_audio_name("out.mp3")
    check_audio_name("out.wav")


@pytest.mark.parametrize("name", ["out.mp3", "out.flac", "out.pcm", "out.png"])
def test_binary_output_is_written_as_it_is_under_every_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"what was there before, and is longer")
    writer = AudioWriter(tmp_path / name)
    writer.write_binary(b"one ")
    writer.write_binary(b"two")
    writer.close()
    assert (tmp_path / name).read_bytes() == b"one two"
