"""Engine `voxcpm` through the real package, on tiny checkpoints of all three architectures."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from numpy.typing import NDArray

from gpuworker.engines.base import AudioChunk, Chunk, EngineInput, FormatChunk, OptionError, ProgressChunk
from gpuworker.engines.catalog import engine_names, find_engine, parse_options
from gpuworker.engines.voxcpm.crossfade import pcm16
from gpuworker.engines.voxcpm.engine import VoxcpmEngine
from gpuworker.slots.run_engine import RunResult, run_engine
from protocol.wire.params_schema import check_params, check_schema
from protocol.wire.validators import Value
from tests.gpuworker.engines.voxcpm.conftest import ARCHES, encoded, voiced
from tests.support.voxcpm_checkpoint.checkpoint import quiet_voxcpm

RATES_HZ = {"voxcpm2": 48_000, "voxcpm1.5": 44_100, "voxcpm": 16_000}
STEP_SAMPLES = {"voxcpm2": 7_680, "voxcpm1.5": 7_056, "voxcpm": 1_280}
#: What a prompt is decoded to, Hz: then a WAV file of this rate goes into the package as it is.
PROMPT_RATES_HZ = {"voxcpm2": 16_000, "voxcpm1.5": 44_100, "voxcpm": 16_000}
#: As few steps as there can be, and coarse ones: a tiny model needs 20 ms for one. With 1 timestep its diffusion would
#: give its noise back, whatever it was asked for.
QUICK: dict[str, Value] = {"inference_timesteps": 2, "retry_badcase_ratio_threshold": 1, "retry_badcase": False}
CHINESE = "你好，世界。今天天气很好。"

Samples = NDArray[np.float32]


def never() -> bool:
    return False


def run(
    engine: VoxcpmEngine, text: str, cancelled: Callable[[], bool] = never, inputs: Any = None, **params: Value
) -> tuple[RunResult, list[Chunk]]:
    """What the engine makes of params that its own schema lets through, by the loop that every slot uses."""
    params = {"text": text, **QUICK, **params}
    assert check_params(engine.capabilities.params, params) == {}
    chunks: list[Chunk] = []
    given = {name: EngineInput(data) for name, data in (inputs or {}).items()}
    return run_engine(engine, params, given, cancelled, chunks.append), chunks


def pcm(chunks: list[Chunk]) -> bytes:
    return b"".join(chunk.pcm for chunk in chunks if isinstance(chunk, AudioChunk))


def speech_of(engine: VoxcpmEngine, text: str, inputs: Any = None, **params: Value) -> bytes:
    end, chunks = run(engine, text, inputs=inputs, **params)
    assert end.outcome == "completed", end
    return pcm(chunks)


def faults_of(engine: VoxcpmEngine, text: str, inputs: Any = None, **params: Value) -> dict[str, Value]:
    end, chunks = run(engine, text, inputs=inputs, **params)
    assert (end.outcome, end.code, end.retryable) == ("failed", "invalid_params", False), end
    assert len(chunks) == 1  # nothing but the format
    return end.details


@pytest.fixture(scope="module")
def folders(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each architecture, and `voices`: `amy` with a transcript, `bob` without."""
    voices = tmp_path_factory.mktemp("voices")
    (voices / "amy.wav").write_bytes(encoded(voiced(1.2, 16_000, 200.0)))
    (voices / "amy.txt").write_text("Ah ah ah.")
    (voices / "bob.wav").write_bytes(encoded(voiced(1.0, 22_050, 100.0), 22_050))
    return {name: checkpoint(name) for name in ARCHES} | {"voices": voices}


@pytest.fixture(scope="module")
def engine_of(folders: dict[str, Path], checkpoint: Callable[..., Path]) -> Callable[..., VoxcpmEngine]:
    """`engine_of(arch, stop="never", context=1024)`, loaded once."""
    loaded: dict[Any, VoxcpmEngine] = {}

    def load(arch: str, **more: Any) -> VoxcpmEngine:
        key = (arch, *more.items())
        if key not in loaded:
            loaded[key] = a_loaded(checkpoint(arch, **more), f"voices={folders['voices']}")
        return loaded[key]

    return load


def a_loaded(folder: Path, *options: str) -> VoxcpmEngine:
    given = [f"model={folder}", "device=cpu", "offline=true", *options]
    engine = VoxcpmEngine(parse_options(VoxcpmEngine.OPTIONS, given))
    engine.load()
    return engine


@pytest.fixture
def engine(arch: str, engine_of: Callable[..., VoxcpmEngine]) -> VoxcpmEngine:
    return engine_of(arch)


@pytest.fixture
def voxcpm2(engine_of: Callable[..., VoxcpmEngine]) -> VoxcpmEngine:
    return engine_of("voxcpm2")


@pytest.fixture(scope="module")
def package(folders: dict[str, Path]) -> Callable[..., list[Samples]]:
    """`package(arch, text, seed=0, streaming=True, **more)`: what plain `voxcpm` makes, with an instance of its own."""
    loaded: dict[str, Any] = {}

    def speak(arch: str, text: str, *, seed: int = 0, streaming: bool = True, **more: Any) -> list[Samples]:
        with quiet_voxcpm():
            import torch
            from voxcpm import VoxCPM

            if arch not in loaded:
                loaded[arch] = VoxCPM.from_pretrained(
                    str(folders[arch]), load_denoiser=False, optimize=False, device="cpu"
                )
            given = {"inference_timesteps": 2, "retry_badcase_ratio_threshold": 1, "retry_badcase": False, **more}
            torch.manual_seed(seed)
            if streaming:
                return list(loaded[arch].generate_streaming(text, **given))
            return [loaded[arch].generate(text, **given)]

    return speak


def as_pcm(chunks: list[Samples]) -> list[bytes]:
    return [pcm16(chunk) for chunk in chunks]


# -- what it is --------------------------------------------------------------------------------------------------


def test_it_is_found_by_its_name() -> None:
    assert find_engine("voxcpm") is VoxcpmEngine
    assert VoxcpmEngine.missing() == []


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
    assert "which is none; make it, or drop -o voices" in lacks(f"voices={tmp_path / 'none'}")


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


# -- samples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "text"),
    [
        ("voxcpm2", "Hello."),
        ("voxcpm2", CHINESE),
        ("voxcpm2", " Two\n\nlines\t here "),
        ("voxcpm2", "a\0b <|audio_start|> \N{PILE OF POO}"),
        ("voxcpm1.5", " Two\n\nlines\t here "),
        ("voxcpm", CHINESE),
    ],
)
def test_a_stream_is_what_the_package_streams_with_the_same_seed_chunk_by_chunk(
    arch: str, engine: VoxcpmEngine, package: Callable[..., list[Samples]], text: str
) -> None:
    end, chunks = run(engine, text, seed=11)
    assert end.outcome == "completed"
    assert chunks[0] == FormatChunk(engine.capabilities.format)
    made = [chunk.pcm for chunk in chunks[1:] if isinstance(chunk, AudioChunk)]
    assert made == as_pcm(package(arch, text, seed=11))
    assert {len(chunk) for chunk in made} == {2 * STEP_SAMPLES[arch]}


def test_made_whole_it_is_what_the_package_makes_whole(
    arch: str, engine: VoxcpmEngine, package: Callable[..., list[Samples]]
) -> None:
    params: dict[str, Value] = {"cfg_value": 3.5, "inference_timesteps": 3, "retry_badcase_ratio_threshold": 1.5}
    text = "Hi, 你好。"
    for more in ({"retry_badcase": False}, {"retry_badcase": True, "retry_badcase_max_times": 2}):
        made = speech_of(engine, text, mode="non_streaming", seed=5, **params, **more)
        assert made == as_pcm(package(arch, text, seed=5, streaming=False, **params, **more))[0]


def test_streamed_and_made_whole_are_the_same_speech(arch: str, engine: VoxcpmEngine) -> None:
    """As far as the package promises: VoxCPM2 alone decodes chunk by chunk what it decodes in one go, but for rounding.

    The others decode each chunk from the last three steps alone.
    """
    streamed = np.frombuffer(speech_of(engine, "Same.", seed=2), "<i2").astype(int)
    whole = np.frombuffer(speech_of(engine, "Same.", seed=2, mode="non_streaming"), "<i2").astype(int)
    assert len(streamed) == len(whole)
    assert np.abs(streamed).max() > 1_000
    if arch == "voxcpm2":
        assert np.abs(streamed - whole).max() <= 1


def test_the_seed_picks_the_take_and_is_0_where_it_is_not_given(voxcpm2: VoxcpmEngine) -> None:
    takes = [speech_of(voxcpm2, "Take.", **seed) for seed in ({}, {"seed": 0}, {"seed": 1}, {"seed": 2**32 - 1})]
    assert takes[0] == takes[1]
    assert len(set(takes)) == 3


def test_guidance_and_steps_reach_the_model(voxcpm2: VoxcpmEngine) -> None:
    takes = [speech_of(voxcpm2, "Take.", **more) for more in ({}, {"cfg_value": 0.1}, {"inference_timesteps": 3})]
    assert len(set(takes)) == 3
    longer = speech_of(voxcpm2, "Take.", retry_badcase_ratio_threshold=2)
    assert len(longer) > len(takes[0])


def test_bad_cases_are_made_again_as_often_as_asked(voxcpm2: VoxcpmEngine) -> None:
    """The checkpoint never stops by itself, so with retry every take is a bad case."""

    def steps(**more: Value) -> int:
        end, chunks = run(voxcpm2, "Steps.", mode="non_streaming", **more)
        assert end.outcome == "completed"
        return sum(isinstance(chunk, ProgressChunk) for chunk in chunks)

    once = steps(retry_badcase=False)
    assert once > 1
    assert steps(retry_badcase=True, retry_badcase_max_times=0) == once
    assert steps(retry_badcase=True, retry_badcase_max_times=1) == once
    assert steps(retry_badcase=True, retry_badcase_max_times=4) >= 4 * once


def test_progress_is_told_by_steps_so_that_a_repeated_run_has_the_same_frames(voxcpm2: VoxcpmEngine) -> None:
    _, chunks = run(voxcpm2, "How?", mode="non_streaming")
    _, again = run(voxcpm2, "How?", mode="non_streaming")
    assert chunks == again
    fractions = [chunk.fraction for chunk in chunks if isinstance(chunk, ProgressChunk)]
    assert len(fractions) == len(pcm(chunks)) // 2 // STEP_SAMPLES["voxcpm2"] // 5
    assert fractions == sorted(set(fractions))
    assert all(len(chunk.pcm) <= 65_536 for chunk in chunks if isinstance(chunk, AudioChunk))


def test_normalized_text_is_spoken_as_the_package_normalizes_it(
    voxcpm2: VoxcpmEngine, package: Callable[..., list[Samples]]
) -> None:
    text = "It costs $5,\nor 3 pounds."
    made = speech_of(voxcpm2, text, normalize=True)
    assert made == b"".join(as_pcm(package("voxcpm2", text, normalize=True)))
    assert made != speech_of(voxcpm2, text)


# -- voices ------------------------------------------------------------------------------------------------------


def test_a_prompt_is_gone_on_from_as_the_package_does(
    arch: str, engine: VoxcpmEngine, package: Callable[..., list[Samples]], tmp_path: Path
) -> None:
    rate = PROMPT_RATES_HZ[arch]
    data = encoded(voiced(1.1, rate), rate)
    (tmp_path / "prompt.wav").write_bytes(data)
    made = speech_of(engine, "Goes on.", {"prompt_wav": data}, prompt_text="Ah ah. ", seed=4)
    direct = package(arch, "Goes on.", seed=4, prompt_wav_path=str(tmp_path / "prompt.wav"), prompt_text="Ah ah. ")
    assert made == b"".join(as_pcm(direct))
    assert made != speech_of(engine, "Goes on.", seed=4)
    whole = speech_of(engine, "Goes on.", {"prompt_wav": data}, prompt_text="Ah ah. ", seed=4, mode="non_streaming")
    assert len(whole) == len(made)


def test_a_reference_is_cloned_as_the_package_does(
    voxcpm2: VoxcpmEngine, package: Callable[..., list[Samples]], tmp_path: Path
) -> None:
    data = encoded(voiced(1.1), 16_000)
    (tmp_path / "voice.wav").write_bytes(data)
    path = str(tmp_path / "voice.wav")
    cloned = speech_of(voxcpm2, "Cloned.", {"reference_wav": data}, seed=4)
    assert cloned == b"".join(as_pcm(package("voxcpm2", "Cloned.", seed=4, reference_wav_path=path)))
    both = {"reference_wav": data, "prompt_wav": data}
    more = package("voxcpm2", "Cloned.", seed=4, reference_wav_path=path, prompt_wav_path=path, prompt_text="Ah ah.")
    assert speech_of(voxcpm2, "Cloned.", both, prompt_text="Ah ah.", seed=4) == b"".join(as_pcm(more))


@pytest.mark.parametrize(("container", "subtype"), [("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")])
def test_prompts_of_every_format_rate_and_number_of_channels_are_taken(
    voxcpm2: VoxcpmEngine, container: str, subtype: str
) -> None:
    stereo = np.stack([voiced(1.0, 44_100), voiced(1.0, 44_100, 90.0)], axis=1)
    data = encoded(stereo, 44_100, subtype, container)
    assert speech_of(voxcpm2, "Cloned.", {"reference_wav": data}) != speech_of(voxcpm2, "Cloned.")


def test_a_named_voice_is_its_audio_and_its_transcript(
    arch: str, engine: VoxcpmEngine, folders: dict[str, Path]
) -> None:
    data = (folders["voices"] / "amy.wav").read_bytes()
    inputs = {"prompt_wav": data} | ({"reference_wav": data} if arch == "voxcpm2" else {})
    made = speech_of(engine, "By name.", voice="amy")
    assert made == speech_of(engine, "By name.", inputs, prompt_text="Ah ah ah.")
    assert made == speech_of(engine, "By name.", voice="amy")  # out of the cache


def test_a_voice_without_transcript_or_with_a_description_is_cloned_by_reference(
    voxcpm2: VoxcpmEngine, folders: dict[str, Path]
) -> None:
    bob = {"reference_wav": (folders["voices"] / "bob.wav").read_bytes()}
    assert speech_of(voxcpm2, "By name.", voice="bob") == speech_of(voxcpm2, "By name.", bob)
    amy = {"reference_wav": (folders["voices"] / "amy.wav").read_bytes()}
    described = speech_of(voxcpm2, "Told.", voice="amy", voice_description="calm (and\n old)")
    assert described == speech_of(voxcpm2, "(calm and old)Told.", amy)
    assert described == speech_of(voxcpm2, "(calm and old)Told.", voice="amy")
    assert described != speech_of(voxcpm2, "Told.", amy)


def test_a_description_is_spoken_with_as_the_package_does(
    voxcpm2: VoxcpmEngine, package: Callable[..., list[Samples]]
) -> None:
    made = speech_of(voxcpm2, "Told.", voice_description="an old man")
    assert made == b"".join(as_pcm(package("voxcpm2", "(an old man)Told.")))


def test_a_prompt_is_encoded_once_and_the_cache_forgets_the_oldest(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = a_loaded(folders["voxcpm2"], f"voices={folders['voices']}", "voice_cache=2")
    assert engine._speaker is not None
    model = engine._speaker.model
    encodings: list[Any] = []
    encode = model.encode

    def counted(_model: Any, **given: Any) -> Any:
        encodings.append(given)
        return encode(**given)

    monkeypatch.setattr(type(model), "encode", counted)
    data = encoded(voiced(0.7))
    for _ in range(3):
        speech_of(engine, "x", voice="bob")
        speech_of(engine, "x", {"reference_wav": data})
    assert len(encodings) == 2
    speech_of(engine, "x", voice="amy")
    speech_of(engine, "x", voice="bob")  # was the one not asked for the longest
    assert len(encodings) == 4


# -- cancel ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "chunks_heard"), [("voxcpm2", 0), ("voxcpm2", 1), ("voxcpm2", 3), ("voxcpm1.5", 2), ("voxcpm", 2)]
)
def test_a_stream_that_is_cancelled_leaves_the_next_one_right(engine: VoxcpmEngine, chunks_heard: int) -> None:
    whole = speech_of(engine, "Next.", seed=3)
    chunks = engine.generate({"text": "Cancelled in mid-stream.", **QUICK}, {})
    for _ in range(chunks_heard):
        next(chunks)
    chunks.close()  # type: ignore[attr-defined]  # a generator
    assert speech_of(engine, "Next.", seed=3) == whole


def test_what_is_made_whole_stops_within_a_step_of_the_cancel_and_leaves_the_next_one_right(
    engine: VoxcpmEngine,
) -> None:
    whole = speech_of(engine, "Next.", seed=3)
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > 8

    end, chunks = run(engine, "Cancelled while it is made. " * 3, cancelled, mode="non_streaming")
    assert end.outcome == "cancelled"
    assert pcm(chunks) == b""
    assert asked < 16  # a few on its way out; the whole would have asked a hundred times
    assert speech_of(engine, "Next.", seed=3) == whole


def test_a_cancel_while_a_prompt_is_encoded_makes_nothing(voxcpm2: VoxcpmEngine) -> None:
    answers = iter([False, True])
    data = {"reference_wav": encoded(voiced(0.9, pitch=77.0))}
    end, chunks = run(voxcpm2, "x", lambda: next(answers, True), data)
    assert (end.outcome, len(chunks)) == ("cancelled", 1)


# -- long texts --------------------------------------------------------------------------------------------------

#: 1,500 tokens of the tiny tokenizer, which has few Chinese characters.
LONG = "The quick brown fox jumps over the lazy dog, again and again. " * 10 + "今天天气很好，我们去公园散步吧。" * 20
#: 220 of them.
MIXED = "The quick brown fox jumps over the lazy dog. So it does. " * 2 + "今天天气很好。我们去公园散步吧。"


def test_a_long_text_is_one_stream_in_pieces_without_clicks(engine_of: Callable[..., VoxcpmEngine]) -> None:
    engine = engine_of("voxcpm2", context=128)
    samples = np.frombuffer(speech_of(engine, MIXED[:100]), "<i2").astype(int)
    pause = round(0.15 * 48_000)
    # Where silence begins, and where it ends.
    edges = np.flatnonzero(np.diff((samples == 0).astype(int), prepend=0, append=0)).reshape(-1, 2)
    pauses = [(start, stop) for start, stop in edges if stop - start >= pause]
    assert len(pauses) >= 3  # so there are pieces
    millisecond = 48
    for start, stop in pauses:
        around = samples[start - millisecond : start + 1], samples[stop - 1 : stop + millisecond]
        assert max(np.abs(np.diff(side)).max() for side in around) < 400
    # What the model says is noise: there samples lie further from one another.
    assert np.abs(np.diff(samples)).max() > 4_000


def test_a_long_text_is_the_same_again_and_as_long_when_made_whole(engine_of: Callable[..., VoxcpmEngine]) -> None:
    engine = engine_of("voxcpm2", context=128)
    text = MIXED[:60]
    streamed = [speech_of(engine, text, seed=6) for _ in range(2)]
    assert streamed[0] == streamed[1]
    end, chunks = run(engine, text, seed=6, mode="non_streaming")
    assert end.outcome == "completed"
    assert len(pcm(chunks)) == len(streamed[0])
    fractions = [chunk.fraction for chunk in chunks if isinstance(chunk, ProgressChunk)]
    assert fractions == sorted(fractions)
    assert fractions[-1] > 0.9


@attrs.frozen
class Given:
    """What a model was asked to speak: `prompt` is the room that its prompt takes."""

    text: str
    prompt: int
    room: int


def asked_of(engine: VoxcpmEngine, monkeypatch: pytest.MonkeyPatch) -> list[Given]:
    """Fills with each piece that the model is given, for the time of the test."""
    assert engine._speaker is not None
    model = engine._speaker.model
    stream = type(model).stream
    given: list[Given] = []

    def noted(self: Any, text: str, cache: Any, settings: Any) -> Any:
        tokens = self.tokens(text)
        prompt = cache.patches if cache else 0
        most = min(int(tokens * settings.ratio_threshold + 10), settings.max_len)
        given.append(Given(text, prompt, self.context - prompt - tokens - 1 - most))
        return stream(self, text, cache, settings)

    monkeypatch.setattr(type(model), "stream", noted)
    return given


@pytest.mark.parametrize(
    ("arch", "ratio", "chars"),
    [("voxcpm2", 1, 5_000), ("voxcpm2", 6, 500), ("voxcpm1.5", 6, 500), ("voxcpm", 6, 500), ("voxcpm2", 20, 200)],
)
def test_pieces_fit_the_model_and_go_on_from_the_first(
    engine_of: Callable[..., VoxcpmEngine], monkeypatch: pytest.MonkeyPatch, arch: str, ratio: int, chars: int
) -> None:
    engine = engine_of(arch, stop="always")  # a few steps a piece: the longest text is spoken in no time
    given = asked_of(engine, monkeypatch)
    text = (LONG * 6)[:chars]
    speech_of(engine, text, retry_badcase_ratio_threshold=ratio)
    assert "".join(piece.text for piece in given).replace(" ", "") == text.replace(" ", "")
    assert given[0].prompt == 0
    assert {piece.prompt for piece in given[1:]} == {given[1].prompt}
    assert given[1].prompt > 0
    assert all(piece.room >= 0 for piece in given)
    # Each ends with its sentence, as all of these are short enough.
    assert all(piece.text.endswith((".", "。")) for piece in given[:-1]) or ratio == 20


def test_pieces_that_speak_to_the_end_of_their_steps_do_not_overflow_the_model(
    engine_of: Callable[..., VoxcpmEngine],
) -> None:
    engine = engine_of("voxcpm", context=256)
    speech = speech_of(engine, MIXED[:60], retry_badcase_ratio_threshold=4)
    assert len(speech) // 2 // STEP_SAMPLES["voxcpm"] > 4 * 60


def test_pieces_of_a_cloned_voice_each_have_its_reference_and_description(
    engine_of: Callable[..., VoxcpmEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of("voxcpm2", stop="always")
    given = asked_of(engine, monkeypatch)
    data = {"reference_wav": encoded(voiced(0.8))}
    speech_of(engine, LONG, data, voice_description="calm")
    assert len(given) > 2
    assert all(piece.text.startswith("(calm)") for piece in given)
    assert len({piece.prompt for piece in given}) == 1
    given.clear()
    speech_of(engine, "(calm) " + LONG)
    assert [piece.text.startswith("(calm)") for piece in given] == [True] + [False] * (len(given) - 1)
    given.clear()
    speech_of(engine, "One line\nand another " + LONG[:200])
    assert [piece.text for piece in given] == ["One line and another " + LONG[:200]]


def test_a_long_text_that_is_cancelled_in_its_second_piece_leaves_the_next_one_right(
    engine_of: Callable[..., VoxcpmEngine],
) -> None:
    engine = engine_of("voxcpm2", context=128)
    whole = speech_of(engine, "Next.", seed=3)
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > 2 * 50  # the loop asks twice a chunk

    end, chunks = run(engine, MIXED, cancelled)
    assert end.outcome == "cancelled"
    assert len(chunks) > 40
    assert speech_of(engine, "Next.", seed=3) == whole


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
    assert "too little of the model's 128 steps" in faults["reference_wav"]


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
    assert "no voice 'carl' any more" in end.message
