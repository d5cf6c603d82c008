"""Engine `voxcpm` with prompts, references, named voices and descriptions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpuworker.engines.base import InvalidParams, ProgressChunk
from gpuworker.engines.voxcpm import prompts
from gpuworker.engines.voxcpm.engine import VoxcpmEngine
from gpuworker.engines.voxcpm.url_policy import FetchRefused
from tests.gpuworker.engines.voxcpm.conftest import encoded, voiced
from tests.gpuworker.engines.voxcpm.engine_runs import Samples, a_loaded, as_pcm, speech_of

#: What a prompt is decoded to, Hz: then a WAV file of this rate goes into the package as it is.
PROMPT_RATES_HZ = {"voxcpm2": 16_000, "voxcpm1.5": 44_100, "voxcpm": 16_000}


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


@pytest.mark.parametrize(
    "said", ["(an old man)Two of 3.", "（an old  man） \n Two of 3.", " ( an old man )  Two of 3."]
)
@pytest.mark.parametrize("normalize", [False, True])
def test_a_description_makes_the_same_speech_as_a_param_and_before_the_text(
    voxcpm2: VoxcpmEngine, said: str, normalize: bool
) -> None:
    made = speech_of(voxcpm2, said, normalize=normalize)
    assert made == speech_of(voxcpm2, "Two of 3.", voice_description="an old man", normalize=normalize)


def test_a_description_is_spoken_with_as_the_package_does(
    voxcpm2: VoxcpmEngine, package: Callable[..., list[Samples]]
) -> None:
    made = speech_of(voxcpm2, "Told.", voice_description="an old man")
    assert made == b"".join(as_pcm(package("voxcpm2", "(an old man)Told.")))


def test_a_prompt_is_encoded_once_and_the_cache_forgets_the_oldest(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = a_loaded(folders["voxcpm2"], f"voices={folders['voices']}", "voice_cache=2")
    model = engine.speakers[0].model
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


def test_a_fetch_that_takes_long_gives_signs_of_life(voxcpm2: VoxcpmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(url: str, _hosts: object, *, cancelled: Callable[[], bool], **_more: object) -> bytes:
        assert not cancelled()
        raise FetchRefused(f"{url} does not answer")

    monkeypatch.setattr(prompts, "fetch", fetch)
    monkeypatch.setattr(prompts, "SIGN_OF_LIFE_S", -1.0)
    signs: list[ProgressChunk] = []
    with pytest.raises(InvalidParams, match="does not answer"):
        voxcpm2.speakers[0].prompts.find(
            {"prompt_wav_url": "https://a.example/a.wav", "prompt_text": "Ah.", "denoise": False},
            {},
            described=False,
            cancelled=lambda: False,
            report=signs.append,
        )
    assert signs == [ProgressChunk("loading")]
