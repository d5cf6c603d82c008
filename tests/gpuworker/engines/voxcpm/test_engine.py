"""Engine `voxcpm` through the real package: what it announces, its options, and its refusals and failures."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpuworker.engines.base import OptionError, ProgressChunk
from gpuworker.engines.catalog import engine_names, find_engine, parse_options
from gpuworker.engines.voxcpm.engine import VoxcpmEngine
from gpuworker.engines.voxcpm.model import _normalizer
from gpuworker.slots.run_engine import run_engine
from protocol.wire.params_schema import check_schema
from protocol.wire.validators import Value
from tests.gpuworker.engines.voxcpm.conftest import encoded, voiced
from tests.gpuworker.engines.voxcpm.engine_runs import QUICK, a_loaded, never, run, speech_of

RATES_HZ = {"voxcpm2": 48_000, "voxcpm1.5": 44_100, "voxcpm": 16_000}


def faults_of(engine: VoxcpmEngine, text: str, inputs: Any = None, **params: Value) -> dict[str, Value]:
    end, chunks = run(engine, text, inputs=inputs, **params)
    assert (end.outcome, end.code, end.retryable) == ("failed", "invalid_params", False), end
    assert len(chunks) == 1  # nothing but the format
    return end.details


# -- what it is --------------------------------------------------------------------------------------------------


def test_it_is_found_by_its_name() -> None:
    assert find_engine("voxcpm") is VoxcpmEngine
    assert VoxcpmEngine.missing() == []


def test_another_version_of_the_package_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _name: "2.1.0")
    (lack,) = VoxcpmEngine.missing()
    assert lack.what == "voxcpm==2.0.3; version 2.1.0 is installed"


@pytest.mark.parametrize("model", ["/no/such/folder", "./nothing", "", "EMPTY"])
def test_a_model_that_is_not_there_is_missing_before_it_is_loaded(model: str, tmp_path: Path) -> None:
    options = {name: option.default for name, option in VoxcpmEngine.OPTIONS.items()}
    options |= {"model": str(tmp_path) if model == "EMPTY" else model, "check_memory": False}
    (lack,) = VoxcpmEngine.check(options, 1)
    assert ("is not a complete VoxCPM model" if model == "EMPTY" else "neither a folder nor a hub id") in lack.what


def test_the_normalizer_is_built_when_the_engine_loads(engine: VoxcpmEngine) -> None:
    assert _normalizer.cache_info().currsize == 1


def test_it_announces_rate_voices_params_and_that_it_is_reproducible(
    arch: str, engine: VoxcpmEngine, folders: dict[str, Path]
) -> None:
    told = engine.capabilities
    assert told.format is not None
    assert (told.format.sample_rate, told.format.channels) == (RATES_HZ[arch], 1)
    assert told.reproducible
    check_schema(told.params)
    properties = told.params["properties"]
    # VoxCPM 1.x goes on from a prompt, and needs to know what is said in it.
    assert properties["voice"]["enum"] == (["amy", "bob"] if arch == "voxcpm2" else ["amy"])
    assert set(told.inputs) == ({"prompt_wav", "reference_wav"} if arch == "voxcpm2" else {"prompt_wav"})
    assert properties["normalize"]["type"] == "boolean"
    assert properties["denoise"] == {"const": False, **properties["denoise"]}
    again = a_loaded(folders[arch], f"voices={folders['voices']}")
    assert 0 < len(told.fingerprint) <= 200
    assert again.capabilities == told


def test_a_voice_whose_audio_cannot_be_used_is_not_announced_and_the_log_says_why(
    folders: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "amy.wav").write_bytes(encoded(voiced(1.0)))
    (tmp_path / "junk.wav").write_bytes(b"RIFF\0\0\0\0WAVEfmt ")
    (tmp_path / "long.wav").write_bytes(encoded(voiced(2.5)))
    engine = a_loaded(folders["voxcpm2"], f"voices={tmp_path}", "max_prompt_s=2")
    assert engine.capabilities.params["properties"]["voice"]["enum"] == ["amy"]
    told = capfd.readouterr().err
    assert "left out: voice 'junk': its audio is not audio that can be read" in told
    assert "left out: voice 'long': its audio is 2.5 s long; give at most 2 s" in told


def test_the_fingerprint_tells_what_makes_other_samples(folders: dict[str, Path], tmp_path: Path) -> None:
    plain = a_loaded(folders["voxcpm"]).capabilities
    other_model = a_loaded(folders["voxcpm1.5"]).capabilities
    (tmp_path / "amy.wav").write_bytes(encoded(voiced(1.0)))
    (tmp_path / "amy.txt").write_text("Ah.")
    other_voices = a_loaded(folders["voxcpm"], f"voices={tmp_path}").capabilities
    fetches = a_loaded(folders["voxcpm"], "url_hosts=a.example").capabilities
    assert len({plain.fingerprint, other_model.fingerprint, other_voices.fingerprint}) == 3
    assert (plain.reproducible, fetches.reproducible) == (True, False)  # a URL may have other content the next time
    assert plain.params["properties"]["prompt_wav_url"]["const"] is None
    assert fetches.params["properties"]["prompt_wav_url"]["type"] == "string"


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("max_prompt_s=0", "must be 1 to 300"),
        ("voice_cache=-1", "must be 0 to 10000"),
        ("context=511", "must be 512 or more, or 0"),
        ("context=-1", "must be 512 or more, or 0"),
        ("url_hosts=http://a.example/x", "url_hosts"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_loaded(option: str, words: str) -> None:
    options = parse_options(VoxcpmEngine.OPTIONS, [option])
    with pytest.raises(OptionError, match=words):
        VoxcpmEngine(options)
    assert any(words in lack.what for lack in VoxcpmEngine.check(options, 1))


def test_a_folder_of_voices_that_is_none_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    def lacks(*given: str) -> str:
        options = parse_options(VoxcpmEngine.OPTIONS, ["check_memory=false", *given])
        return "; ".join(lack.what for lack in VoxcpmEngine.check(options, 1))

    assert lacks(f"voices={tmp_path}") == ""
    assert "which does not exist; create it, or drop -o voices" in lacks(f"voices={tmp_path / 'none'}")


def test_a_download_is_told_in_the_log_and_as_a_sign_of_life(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fetch(_model: str, *, fetched: Callable[[int, int], None], **_more: object) -> Path:
        fetched(1_500_000_000, 6_000_000_000)
        return folders["voxcpm"]

    monkeypatch.setattr("gpuworker.engines.voxcpm.model.find_folder", fetch)
    engine = VoxcpmEngine(parse_options(VoxcpmEngine.OPTIONS, ["model=openbmb/tiny", "device=cpu"]))
    reported: list[ProgressChunk] = []
    engine.report = reported.append
    engine.load()
    words = "fetching openbmb/tiny: 1.50 of 6.00 GB"
    assert reported == [ProgressChunk("loading", 0.25, words)]
    assert words in capfd.readouterr().err


def test_without_its_packages_it_is_listed_with_the_two_commands_that_install_them() -> None:
    script = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in ("torch", "voxcpm", "numpy", "soundfile", "soxr", "librosa", "regex"):
            return super().find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
from gpuworker.cli import main
main(["engines"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    listed = done.stdout.partition("voxcpm ")[2].partition("\n")[2]
    assert done.stdout.count("cannot run here") >= 1
    assert "pip install '.[voxcpm]'" in listed
    assert "pip install --no-deps voxcpm==2.0.3" in listed
    assert "-o model=STR" in listed
    assert set(engine_names()) <= set(done.stdout.split())


# -- faults ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [" \n ", "。", "…!?", "🙂"])
def test_a_text_with_nothing_to_speak_is_refused(engine: VoxcpmEngine, text: str) -> None:
    assert faults_of(engine, text) == {"text": "contains nothing to speak"}


def test_params_that_do_not_go_together_are_refused_by_field(engine: VoxcpmEngine) -> None:
    data = {"prompt_wav": encoded(voiced(0.7))}
    assert set(faults_of(engine, "x", prompt_text="Ah.")) == {"prompt_wav"}
    assert set(faults_of(engine, "x", data)) == {"prompt_text"}
    assert set(faults_of(engine, " ", data, voice="amy", prompt_text="!")) == {"text", "voice", "prompt_text"}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is not audio that can be read"),
        (b"not audio at all" * 100, "is not audio that can be read"),
        (b"RIFF\x00\x00\x00\x00WAVEfmt ", "is not audio that can be read"),
        (encoded(voiced(0.05)), "at least 0.2 s"),
        (encoded(np.zeros(16_000, np.float32)), "silent"),
        (encoded(np.zeros(51 * 16_000, np.float32)), "at most 50 s"),
    ],
    ids=["empty", "text", "a head alone", "short", "silent", "long"],
)
def test_bad_audio_is_refused_by_the_name_of_its_input(voxcpm2: VoxcpmEngine, data: bytes, words: str) -> None:
    faults = faults_of(voxcpm2, "x", {"prompt_wav": data, "reference_wav": encoded(voiced(0.7))}, prompt_text="Ah.")
    assert set(faults) == {"prompt_wav"}
    assert words in faults["prompt_wav"]
    assert set(faults_of(voxcpm2, "x", {"reference_wav": data})) == {"reference_wav"}


def test_a_url_of_no_listed_host_is_refused_by_its_field(folders: dict[str, Path]) -> None:
    engine = a_loaded(folders["voxcpm"], "url_hosts=voices.example")
    faults = faults_of(engine, "x", prompt_wav_url="https://other.example/a.wav", prompt_text="Ah.")
    assert set(faults) == {"prompt_wav_url"}


def test_a_prompt_that_leaves_no_room_for_the_text_is_refused(engine_of: Callable[..., VoxcpmEngine]) -> None:
    engine = engine_of("voxcpm2", context=128)
    data = {"reference_wav": encoded(voiced(16.0))}
    faults = faults_of(engine, "x" * 100, data, retry_badcase_ratio_threshold=6)
    assert set(faults) == {"reference_wav"}
    assert "too little of the 128 positions" in faults["reference_wav"]


def test_a_voice_whose_file_is_gone_fails_the_request_and_not_the_engine(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "amy.wav").write_bytes(encoded(voiced(1.0)))
    engine = a_loaded(folders["voxcpm2"], f"voices={tmp_path}")
    (tmp_path / "amy.wav").unlink()
    end, _ = run(engine, "x", voice="amy")
    assert (end.outcome, end.code) == ("failed", "engine_failed")
    assert "amy" in end.message
    assert len(speech_of(engine, "x")) > 0


def test_a_voice_that_another_slot_announced_fails_the_request_and_not_the_engine(
    engine_of: Callable[..., VoxcpmEngine],
) -> None:
    """A slot that was started again has found another folder of voices than the one whose params are registered."""
    engine = engine_of("voxcpm2")
    end = run_engine(engine, {"text": "x", **QUICK, "voice": "carl"}, {}, never, lambda _chunk: None)
    assert (end.outcome, end.code) == ("failed", "engine_failed")
    assert "no longer has the voice 'carl'" in end.message
