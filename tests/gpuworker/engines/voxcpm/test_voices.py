"""Named voices: what of a folder is one, what is said of the rest; the cache of prompts."""

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from gpuworker.engines.base import EngineError
from gpuworker.engines.voxcpm import voices as module
from gpuworker.engines.voxcpm.voices import MAX_VOICES, PromptCaches, find_voices
from protocol.wire.codec import encode
from protocol.wire.messages import Register
from protocol.wire.params_schema import check_params, check_schema


def put(folder: Path, **files: bytes | str) -> None:
    """anna_wav=… is anna.wav."""
    for name, data in files.items():
        path = folder / name.replace("_", ".")
        path.write_bytes(data.encode() if isinstance(data, str) else data)


def test_a_voice_is_audio_with_a_transcript_beside_it_or_without(tmp_path: Path) -> None:
    put(tmp_path, ben_flac=b"ben", anna_wav=b"anna", anna_txt="  你好，世界。\n\n", cleo_MP3=b"cleo", dora_ogg=b"dora")
    voices, words = find_voices(tmp_path)
    assert list(voices) == ["anna", "ben", "cleo", "dora"]
    assert words == []
    anna = voices["anna"]
    assert (anna.name, anna.audio, anna.text) == ("anna", tmp_path.resolve() / "anna.wav", "你好，世界。")
    assert voices["ben"].text is None
    assert anna.read() == b"anna"


def test_the_digest_changes_with_the_audio_and_with_the_transcript(tmp_path: Path) -> None:
    put(tmp_path, anna_wav=b"anna", anna_txt="one", ben_wav=b"anna", ben_txt=" one ", cleo_wav=b"anna", dora_wav=b"x")
    voices, _ = find_voices(tmp_path)
    assert voices["anna"].digest == voices["ben"].digest
    assert len({voices[name].digest for name in ("anna", "cleo", "dora")}) == 3
    assert len(voices["anna"].digest) == hashlib.sha256().digest_size * 2


def test_a_voice_that_changed_since_is_not_read_as_the_one_announced(tmp_path: Path) -> None:
    put(tmp_path, anna_wav=b"anna", anna_txt="one")
    voices, _ = find_voices(tmp_path)
    put(tmp_path, anna_wav=b"other")
    with pytest.raises(EngineError, match=r"^voice 'anna' has changed since the worker started; restart the worker"):
        voices["anna"].read()
    (tmp_path / "anna.wav").unlink()
    with pytest.raises(
        EngineError, match=r"^voice 'anna' cannot be read: No such file or directory; restart the worker"
    ):
        voices["anna"].read()


def test_a_model_that_needs_transcripts_leaves_out_voices_that_have_none(tmp_path: Path) -> None:
    put(tmp_path, anna_wav=b"anna", anna_txt="one", ben_wav=b"ben", cleo_wav=b"cleo", cleo_txt=" \n")
    voices, words = find_voices(tmp_path, need_text=True)
    assert list(voices) == ["anna"]
    assert words == [
        f"left out: voice '{name}': this model needs its transcript in {name}.txt" for name in ("ben", "cleo")
    ]
    assert list(find_voices(tmp_path)[0]) == ["anna", "ben", "cleo"]


@pytest.mark.parametrize(
    "file",
    ["my voice.wav", "-x.wav", "_x.wav", "ö.wav", "x" * 65 + ".wav", "a\nb.wav", "$(id).wav", "a'b.txt", "~.ogg"],
)
def test_a_name_that_no_space_could_have_is_left_out(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_bytes(b"x")
    voices, words = find_voices(tmp_path)
    assert voices == {}
    assert words == [
        f"left out: {file!r}: a voice's name has 1 to 64 of A-Z a-z 0-9 . _ - and begins with a letter or digit"
    ]


def test_a_name_that_is_not_unicode_is_left_out_in_words_the_wire_takes(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.wav")).write_bytes(b"x")
    voices, words = find_voices(tmp_path)
    assert voices == {}
    assert len(words) == 1
    words[0].encode()


def test_names_may_have_dots_and_differ_in_case(tmp_path: Path) -> None:
    for file in ("de.anna-2.wav", "de.anna-2.txt", "Anna.wav", "anna.wav"):
        (tmp_path / file).write_bytes(b"x")
    voices, words = find_voices(tmp_path)
    assert list(voices) == ["Anna", "anna", "de.anna-2"]
    assert voices["de.anna-2"].text == "x"
    assert words == []


def test_of_two_files_for_one_name_the_first_kind_is_used(tmp_path: Path) -> None:
    put(tmp_path, anna_mp3=b"mp3", anna_wav=b"wav", anna_flac=b"flac")
    voices, words = find_voices(tmp_path)
    assert voices["anna"].read() == b"wav"
    assert words == [
        "left out: 'anna.mp3': 'anna.flac' has the same name and is used instead",
        "left out: 'anna.flac': 'anna.wav' has the same name and is used instead",
    ]


def test_a_transcript_without_audio_and_other_files_are_told_and_hidden_ones_are_not(tmp_path: Path) -> None:
    put(tmp_path, anna_txt="x", README_md="x", ben_m4a="x")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    (tmp_path / "._anna.wav").write_bytes(b"x")
    voices, words = find_voices(tmp_path)
    assert voices == {}
    assert sorted(words) == [
        "left out: 'README.md': a voice is NAME.wav or NAME.flac or NAME.mp3 or NAME.ogg, and NAME.txt",
        "left out: 'anna.txt': there is no anna.wav (or .flac .mp3 .ogg) beside it",
        "left out: 'ben.m4a': a voice is NAME.wav or NAME.flac or NAME.mp3 or NAME.ogg, and NAME.txt",
    ]


# -- links and files that are none --------------------------------------------------------------------------------


def test_a_link_inside_the_folder_is_followed_and_one_out_of_it_is_not(tmp_path: Path) -> None:
    folder, outside = tmp_path / "voices", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    put(folder, anna_wav=b"anna", ben_wav=b"ben")
    put(outside, secret_wav=b"secret", secret_txt="secret")
    (folder / "default.wav").symlink_to("anna.wav")
    (folder / "leak.wav").symlink_to(outside / "secret.wav")
    (folder / "up.wav").symlink_to("../outside/secret.wav")
    (folder / "ben.txt").symlink_to(outside / "secret.txt")
    (folder / "hop.wav").symlink_to("leak.wav")
    (folder / "gone.wav").symlink_to("nothing.wav")
    (folder / "round.wav").symlink_to("round.wav")
    voices, words = find_voices(folder)
    assert list(voices) == ["anna", "default"]
    assert voices["default"].read() == b"anna"
    assert "left out: voice 'leak': 'leak.wav' is a link out of the folder; copy the file into it" in words
    assert "left out: voice 'ben': 'ben.txt' is a link out of the folder; copy the file into it" in words
    assert [line.split("'")[1] for line in words] == ["ben", "gone", "hop", "leak", "round", "up"]


def test_a_file_changed_to_a_link_later_is_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "voices"
    folder.mkdir()
    put(folder, anna_wav=b"same")
    put(tmp_path, other_wav=b"same")
    voices, _ = find_voices(folder)
    (folder / "anna.wav").unlink()
    (folder / "anna.wav").symlink_to(tmp_path / "other.wav")
    with pytest.raises(EngineError, match=r"^voice .anna. cannot be read"):
        voices["anna"].read()


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    put(tmp_path / "real", anna_wav=b"anna")
    (tmp_path / "voices").symlink_to("real")
    assert list(find_voices(tmp_path / "voices")[0]) == ["anna"]


def test_folders_pipes_and_devices_are_left_out_at_once(tmp_path: Path) -> None:
    (tmp_path / "folder.wav").mkdir()
    os.mkfifo(tmp_path / "pipe.wav")
    put(tmp_path, anna_wav=b"anna", empty_wav=b"")
    os.mkfifo(tmp_path / "anna.txt")
    (tmp_path / "zero.wav").symlink_to("/dev/zero")
    voices, words = find_voices(tmp_path)
    assert voices == {}
    assert "left out: voice 'pipe': 'pipe.wav' is not a regular file" in words
    assert "left out: voice 'anna': 'anna.txt' is not a regular file" in words
    assert "left out: voice 'empty': 'empty.wav' is empty" in words
    assert [line.split("'")[1] for line in words] == ["anna", "empty", "folder", "pipe", "zero"]


def test_a_transcript_that_is_no_utf8_or_too_long_leaves_its_voice_out(tmp_path: Path) -> None:
    put(
        tmp_path,
        anna_wav=b"x",
        anna_txt=b"caf\xe9",
        ben_wav=b"x",
        ben_txt="b" * 2_001,
        bom_wav=b"x",
        bom_txt=b"\xef\xbb\xbfhi",
    )
    put(tmp_path, cleo_wav=b"x", cleo_txt=b"c" * 2**20, dora_wav=b"x", dora_txt="好" * 2_000)
    voices, words = find_voices(tmp_path)
    assert list(voices) == ["bom", "dora"]
    assert voices["bom"].text == "hi"
    assert words == [
        "left out: voice 'anna': 'anna.txt' is not UTF-8; save it as UTF-8",
        "left out: voice 'ben': 'ben.txt' has 2001 characters; the limit is 2000",
        "left out: voice 'cleo': 'cleo.txt' has more than 9,024 bytes; shorten it",
    ]


def test_a_voice_larger_than_any_prompt_is_left_out(tmp_path: Path) -> None:
    with (tmp_path / "huge.wav").open("wb") as file:
        file.truncate(2**40)
    voices, words = find_voices(tmp_path)
    assert voices == {}
    assert words == ["left out: voice 'huge': 'huge.wav' has more than 33,554,432 bytes; shorten it"]


@pytest.mark.parametrize("kind", ["missing", "file", "round"])
def test_a_folder_that_cannot_be_read_says_what_to_do(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "voices"
    if kind == "file":
        folder.write_bytes(b"")
    elif kind == "round":
        folder.symlink_to(folder)
    with pytest.raises(EngineError, match=r"cannot be read: .+; create it, or give another one with -o voices=FOLDER$"):
        find_voices(folder)


# -- bounds ------------------------------------------------------------------------------------------------------


def test_as_many_voices_as_are_taken_fit_a_schema_and_a_register_message(tmp_path: Path) -> None:
    for number in range(MAX_VOICES + 3):
        (tmp_path / f"{number:03}{'x' * 61}.wav").write_bytes(b"x")
    voices, words = find_voices(tmp_path)
    assert len(voices) == MAX_VOICES
    assert words == [
        f"left out: voice '{MAX_VOICES}{'x' * 61}' and those after it: a worker has at most {MAX_VOICES} voices",
    ]
    schema = {"type": "object", "properties": {"voice": {"enum": list(voices)}}}
    check_schema(schema)
    assert check_params(schema, {"voice": next(reversed(voices))}) == {}
    assert (
        len(encode(Register(worker="gpu", instance="0" * 32, spaces=["tts"], slots=1, engine="voxcpm", params=schema)))
        < 40 * 2**10
    )


def test_a_folder_full_of_other_files_is_told_in_few_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(70):
        (tmp_path / f"{number}.pdf").write_bytes(b"x")
    _, words = find_voices(tmp_path)
    assert len(words) == 51
    assert words[-1] == "left out: 20 more"
    monkeypatch.setattr(module, "MAX_ENTRIES", 10)
    _, words = find_voices(tmp_path)
    assert words[0] == f"left out: {str(tmp_path)!r} has more than 10 files; the rest was not read"
    assert len(words) == 11


def test_finding_voices_imports_nothing_heavy() -> None:
    code = (
        "import sys, gpuworker.engines.voxcpm.voices\n"
        "print(*{'numpy', 'torch', 'soundfile', 'soxr', 'voxcpm'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# -- the cache ---------------------------------------------------------------------------------------------------


def test_the_cache_lets_go_of_what_was_not_asked_for_longest() -> None:
    caches: PromptCaches[str] = PromptCaches(at_most=2, max_bytes=100)
    caches.put("a", "A", 10)
    caches.put("b", "B", 10)
    assert caches.get("a") == "A"
    caches.put("c", "C", 10)
    assert (caches.get("a"), caches.get("b"), caches.get("c")) == ("A", None, "C")
    assert (len(caches), caches.nbytes) == (2, 20)


def test_the_cache_is_bounded_by_bytes() -> None:
    caches: PromptCaches[str] = PromptCaches(at_most=10, max_bytes=100)
    caches.put("a", "A", 60)
    caches.put("b", "B", 40)
    caches.put("c", "C", 50)
    assert "a" not in caches
    assert caches.nbytes == 90
    caches.put("huge", "H", 101)
    assert "huge" not in caches
    assert caches.nbytes == 90
    caches.put("b", "B2", 101)
    assert "b" not in caches
    assert caches.nbytes == 50
    caches.put("c", "C2", 100)
    assert caches.get("c") == "C2"
    assert caches.nbytes == 100


def test_no_cache_is_a_cache_of_none() -> None:
    caches: PromptCaches[str] = PromptCaches(at_most=0, max_bytes=100)
    caches.put("a", "A", 1)
    assert caches.get("a") is None
    assert (len(caches), caches.nbytes) == (0, 0)


def test_the_cache_keeps_its_bounds_whatever_is_done() -> None:
    chance = random.Random(7)
    caches: PromptCaches[int] = PromptCaches(at_most=5, max_bytes=50)
    sizes: dict[int, int] = {}
    for _ in range(3_000):
        key = chance.randrange(12)
        if chance.random() < 0.5:
            sizes[key] = chance.randrange(60)
            caches.put(key, sizes[key], sizes[key])
        elif (value := caches.get(key)) is not None:
            assert value == sizes[key]
        assert len(caches) <= 5
        assert caches.nbytes == sum(sizes[key] for key in range(12) if key in caches) <= 50
