"""`Model` through the real voxcpm package, on tiny checkpoints of all three architectures."""

import hashlib
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import soundfile
import torch

from gpuworker.engines.base import EngineError, InvalidParams
from gpuworker.engines.voxcpm.model import Model, PromptCache, Settings
from gpuworker.engines.voxcpm.model_output import Samples
from tests.gpuworker.engines.voxcpm.conftest import voiced
from tests.support.voxcpm_checkpoint.checkpoint import quiet_voxcpm

TEXT = "Hello there, my friend."
#: As few steps as show what is to be shown: a tiny model takes 10 ms for one.
STEPS = 4
QUICK = Settings(inference_timesteps=2, max_len=STEPS)
CONTEXT = 96
RATES_HZ = {"voxcpm2": 48_000, "voxcpm1.5": 44_100, "voxcpm": 16_000}
PROMPT_RATES_HZ = {"voxcpm2": 16_000, "voxcpm1.5": 44_100, "voxcpm": 16_000}
CHUNK_SAMPLES = {"voxcpm2": 7_680, "voxcpm1.5": 7_056, "voxcpm": 1_280}

Load = Callable[[str], Model]


@pytest.fixture(scope="module")
def load(checkpoint: Callable[..., Path]) -> Load:
    """`load(arch)`: loaded once for this module. A test that breaks a model fails the later ones, which is a find."""
    models: dict[str, Model] = {}

    def get(arch: str) -> Model:
        if arch not in models:
            models[arch] = Model.load(str(checkpoint(arch, context=CONTEXT)), device="cpu")
        return models[arch]

    return get


@pytest.fixture
def model(arch: str, load: Load) -> Model:
    """Each architecture in turn."""
    return load(arch)


@pytest.fixture
def v2(load: Load) -> Model:
    return load("voxcpm2")


@pytest.fixture(scope="module")
def package(checkpoint: Callable[..., Path]) -> Callable[[str], Any]:
    """`package(arch)`: the same checkpoint in voxcpm's own class, with nothing of ours round it."""
    models: dict[str, Any] = {}

    def get(arch: str) -> Any:
        if arch not in models:
            with quiet_voxcpm():
                from voxcpm import VoxCPM

                folder = str(checkpoint(arch, context=CONTEXT))
                models[arch] = VoxCPM.from_pretrained(folder, load_denoiser=False, optimize=False, device="cpu")
        return models[arch]

    return get


def prompted(model: Model, *, reference: bool = False) -> PromptCache:
    sound = voiced(1.0, model.prompt_rate)
    if reference:
        return model.encode(prompt=None, prompt_text=None, reference=sound)
    return model.encode(prompt=sound, prompt_text="Ah, well.", reference=None)


def streamed(model: Model, cache: PromptCache | None = None, text: str = TEXT, settings: Settings = QUICK) -> Samples:
    model.seed(7)
    return np.concatenate(list(model.stream(text, cache, settings)))


def whole(model: Model, cache: PromptCache | None = None, text: str = TEXT, settings: Settings = QUICK) -> Samples:
    model.seed(7)
    return model.whole(text, cache, settings, lambda _step: None).samples


def ways(model: Model, tmp_path: Path) -> Iterator[tuple[dict[str, Any], PromptCache | None]]:
    """Each way to speak: the arguments of voxcpm's own `generate`, and the same as a cache of ours."""
    sound = voiced(1.0, model.prompt_rate)
    path = tmp_path / "sound.wav"
    soundfile.write(path, sound, model.prompt_rate, subtype="PCM_16")
    heard: Samples = np.asarray(soundfile.read(path, dtype="float32")[0], np.float32)
    prompt = {"prompt_wav_path": str(path), "prompt_text": "Ah, well."}
    reference = {"reference_wav_path": str(path)}
    yield {}, None
    yield prompt, model.encode(prompt=heard, prompt_text="Ah, well.", reference=None)
    if model.clones:
        yield reference, model.encode(prompt=None, prompt_text=None, reference=heard)
        yield prompt | reference, model.encode(prompt=heard, prompt_text="Ah, well.", reference=heard)


# -- the package's own samples -----------------------------------------------------------------------------------


def test_tells_the_rates_and_sizes_of_the_architecture(model: Model, arch: str) -> None:
    assert model.sample_rate == RATES_HZ[arch]
    assert model.prompt_rate == PROMPT_RATES_HZ[arch]
    assert model.chunk_samples == CHUNK_SAMPLES[arch]
    assert model.context == CONTEXT
    assert model.clones == (arch == "voxcpm2")
    assert (model.device, model.compiled, model.can_denoise) == ("cpu", False, False)


def test_a_stream_has_the_samples_of_the_package_bit_for_bit(
    model: Model, arch: str, package: Callable[[str], Any], tmp_path: Path
) -> None:
    plain = package(arch)
    for arguments, cache in ways(model, tmp_path):
        torch.manual_seed(7)
        theirs = list(
            plain.generate_streaming(TEXT, inference_timesteps=2, max_len=STEPS, retry_badcase=False, **arguments)
        )
        model.seed(7)
        ours = list(model.stream(TEXT, cache, QUICK))
        assert [len(chunk) for chunk in ours] == [model.chunk_samples] * STEPS
        assert all(chunk.dtype == np.float32 and chunk.ndim == 1 for chunk in ours)
        assert np.array_equal(np.concatenate(ours), np.concatenate(theirs)), arguments


def test_a_whole_has_the_samples_of_the_package_bit_for_bit(
    model: Model, arch: str, package: Callable[[str], Any], tmp_path: Path
) -> None:
    plain = package(arch)
    for arguments, cache in ways(model, tmp_path):
        torch.manual_seed(7)
        theirs = plain.generate(TEXT, inference_timesteps=2, max_len=STEPS, retry_badcase=False, **arguments)
        assert np.array_equal(whole(model, cache), theirs), arguments
        assert len(theirs) == STEPS * model.chunk_samples


def test_streamed_is_whole_where_the_package_promises_it(model: Model, tmp_path: Path) -> None:
    settings = attrs.evolve(QUICK, max_len=8)
    for arguments, cache in ways(model, tmp_path):
        gap = (
            np.abs(streamed(model, cache, settings=settings) - whole(model, cache, settings=settings))
            .reshape(-1, model.chunk_samples)
            .max(axis=1)
        )
        if not model.clones:
            alike = [0] if arguments else [0, 1, 2]
            assert gap[alike].max() < 1e-6, arguments
            assert 1e-6 < gap.max() < 0.2, arguments
        elif "prompt_text" in arguments:
            assert gap[0] > 1e-6, arguments
            assert gap[6:].max() < 1e-6, arguments
        else:
            assert gap.max() < 1e-6, arguments


def test_speech_is_neither_silent_nor_clipped(model: Model) -> None:
    chunks = streamed(model).reshape(-1, model.chunk_samples)
    assert (chunks.std(axis=1) > 0.03).all()
    assert np.abs(chunks).max() < 0.95


def test_a_smaller_context_changes_no_sample_and_ends_where_it_says(
    arch: str, checkpoint: Callable[..., Path], load: Load
) -> None:
    smaller = Model.load(str(checkpoint(arch, context=CONTEXT)), device="cpu", context=CONTEXT - 20)
    assert smaller.context == CONTEXT - 20
    for cache in (None, prompted(load(arch))):
        assert np.array_equal(streamed(smaller, cache), streamed(load(arch), cache))
        assert np.array_equal(whole(smaller, cache), whole(load(arch), cache))
    long = Settings(inference_timesteps=1, max_len=4_096, ratio_threshold=20.0)
    with pytest.raises(EngineError, match=f"filled the model's context of {CONTEXT - 20} positions"):
        streamed(smaller, settings=long)


def test_more_context_than_the_model_has_is_refused(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(EngineError, match=f"has {CONTEXT} positions; use -o context={CONTEXT} or less"):
        Model.load(str(checkpoint("voxcpm", context=CONTEXT)), device="cpu", context=CONTEXT + 1)


_CHILD = """
import hashlib, sys
from gpuworker.engines.voxcpm.model import Model, Settings
model = Model.load(sys.argv[1], device="cpu")
model.seed(7)
digest = hashlib.sha256()
for chunk in model.stream(sys.argv[2], None, Settings(inference_timesteps=2, max_len=4)):
    digest.update(chunk.tobytes())
print(model.fingerprint, digest.hexdigest())
"""


def test_another_process_makes_the_same_samples_and_has_the_same_fingerprint(
    v2: Model, checkpoint: Callable[..., Path]
) -> None:
    folder = str(checkpoint("voxcpm2", context=CONTEXT))
    command = [sys.executable, "-c", _CHILD, folder, TEXT]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.split()
    assert told == [v2.fingerprint, hashlib.sha256(streamed(v2).tobytes()).hexdigest()]


def test_another_seed_is_another_take(model: Model) -> None:
    first = streamed(model)
    model.seed(8)
    assert not np.array_equal(first, np.concatenate(list(model.stream(TEXT, None, QUICK))))


# -- one at a time, and cancelled at any time --------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_a_closed_stream_leaves_the_model_right(model: Model, chunks: int) -> None:
    expected, expected_whole = streamed(model), whole(model)
    cache = prompted(model)
    speech = model.stream("Something else altogether.", cache, QUICK)
    for _ in range(chunks):
        next(speech)
    speech.close()
    assert list(speech) == []
    speech.close()
    assert np.array_equal(streamed(model), expected)
    # Whole speech goes through the very decoder that VoxCPM2's streams put a state into.
    assert np.array_equal(whole(model), expected_whole)


def test_a_second_speech_beside_one_that_is_open_is_refused(model: Model) -> None:
    speech = model.stream(TEXT, None, QUICK)
    first = next(speech)
    with pytest.raises(RuntimeError, match="still speaking"):
        model.stream(TEXT, None, QUICK)
    with pytest.raises(RuntimeError, match="still speaking"):
        whole(model)
    with pytest.raises(RuntimeError, match="still speaking"):
        prompted(model)
    speech.close()
    assert len(first) == model.chunk_samples
    assert len(whole(model)) == STEPS * model.chunk_samples


def test_a_stream_that_ended_or_was_dropped_is_not_in_the_way(model: Model) -> None:
    speech = model.stream(TEXT, None, QUICK)
    assert len(list(speech)) == STEPS
    model.stream(TEXT, None, QUICK)
    assert len(streamed(model)) == STEPS * model.chunk_samples


class _Stop(Exception):
    pass


def test_a_whole_stopped_at_a_step_leaves_the_model_right(model: Model) -> None:
    expected = whole(model)
    steps = []

    def on_step(step: int) -> None:
        steps.append(step)
        if step == 3:
            raise _Stop

    with pytest.raises(_Stop):
        model.whole("Something else.", None, QUICK, on_step)
    assert steps == [1, 2, 3]
    assert np.array_equal(whole(model), expected)
    assert np.array_equal(streamed(model), streamed(model))
    assert steps == [1, 2, 3]


# -- retries -----------------------------------------------------------------------------------------------------


def test_a_bad_case_is_tried_as_often_as_asked(model: Model) -> None:
    text = "Hi."
    tokens = model.tokens(text)
    settings = Settings(
        inference_timesteps=2, retry_badcase=True, retry_badcase_max_times=3, ratio_threshold=1.0, max_len=4_096
    )
    steps: list[int] = []
    samples = model.whole(text, None, settings, steps.append).samples
    cap = tokens + 10
    assert steps == list(range(1, 3 * cap + 1))
    assert len(samples) == cap * model.chunk_samples


def test_no_tries_are_one(model: Model) -> None:
    settings = attrs.evolve(QUICK, retry_badcase=True, retry_badcase_max_times=0)
    assert np.array_equal(whole(model, settings=settings), whole(model))
    assert np.array_equal(streamed(model, settings=settings), streamed(model))


def test_good_speech_is_not_tried_again(checkpoint: Callable[..., Path]) -> None:
    model = Model.load(str(checkpoint("voxcpm", "always")), device="cpu")
    steps: list[int] = []
    settings = Settings(inference_timesteps=2, retry_badcase=True)
    samples = model.whole(TEXT, None, settings, steps.append).samples
    assert len(steps) == settings.min_len + 2
    assert len(samples) == len(steps) * model.chunk_samples


# -- prompts -----------------------------------------------------------------------------------------------------


def test_encoding_draws_nothing_from_the_random_generator(model: Model) -> None:
    before = torch.random.get_rng_state()
    prompted(model)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_prompt_tells_what_it_costs(model: Model) -> None:
    cache = prompted(model)
    steps = -(-model.prompt_rate // (model.chunk_samples * model.prompt_rate // model.sample_rate))
    assert cache.patches == steps + model.tokens("Ah, well.")
    assert cache.nbytes == steps * 64 * 4 * (2 if model.prompt_rate == model.sample_rate == 16_000 else 4)
    if model.clones:
        assert prompted(model, reference=True).patches == steps + 2


def test_what_is_reckoned_to_fit_does_and_nearly_nothing_more(model: Model) -> None:
    cache = prompted(model)
    # Put together, the two texts have the space in front once, not twice: one place is left over.
    room = CONTEXT - cache.patches - model.tokens(TEXT) - 1
    settings = Settings(inference_timesteps=1, max_len=room, ratio_threshold=99.0)
    assert len(streamed(model, cache, settings=settings)) == room * model.chunk_samples
    with pytest.raises(EngineError, match=f"filled the model's context of {CONTEXT} positions"):
        streamed(model, cache, settings=attrs.evolve(settings, max_len=room + 2))


def test_a_very_short_prompt_costs_no_speech(model: Model) -> None:
    cache = model.encode(prompt=voiced(0.05, model.prompt_rate), prompt_text="A", reference=None)
    assert len(whole(model, cache)) == STEPS * model.chunk_samples
    assert len(streamed(model, cache)) == STEPS * model.chunk_samples


def test_speech_goes_on_from_speech(model: Model) -> None:
    for cache in (None, prompted(model)):
        model.seed(7)
        speech = model.stream(TEXT, cache, QUICK)
        first = np.concatenate(list(speech))
        merged = speech.as_prompt(TEXT, cache)
        model.seed(7)
        made = model.whole(TEXT, cache, QUICK, lambda _step: None)
        # The same latents, whichever way they were spoken.
        again = made.as_prompt(TEXT, cache)
        assert torch.equal(merged.value["audio_feat"], again.value["audio_feat"])
        text = ("Ah, well." if cache else "") + TEXT
        assert merged.value["prompt_text"] == text
        assert merged.patches == (cache.patches - model.tokens("Ah, well.") if cache else 0) + STEPS + model.tokens(
            text
        )
        following = streamed(model, merged, text=" And more.")
        assert len(following) == len(first)
        assert not np.array_equal(following, streamed(model, cache, text=" And more."))


def test_speech_with_a_reference_goes_on_with_it(v2: Model) -> None:
    cache = prompted(v2, reference=True)
    speech = v2.stream(TEXT, cache, QUICK)
    next(speech)
    with pytest.raises(ValueError, match="that has ended and made audio"):
        speech.as_prompt(TEXT, cache)
    speech.close()
    merged = speech.as_prompt(TEXT, cache)
    assert merged.value["mode"] == "ref_continuation"
    assert merged.patches == cache.patches + 1 + v2.tokens(TEXT)
    assert len(streamed(v2, merged)) == STEPS * v2.chunk_samples


def test_a_faulty_prompt_is_refused_by_name(model: Model) -> None:
    sound = voiced(0.5, model.prompt_rate)
    for given in ({"prompt": sound, "prompt_text": None}, {"prompt": None, "prompt_text": "Ah"}):
        with pytest.raises(InvalidParams, match="prompt_text"):
            model.encode(**given, reference=None)
    with pytest.raises(InvalidParams, match="prompt_wav"):
        model.encode(prompt=None, prompt_text=None, reference=None)
    if not model.clones:
        with pytest.raises(InvalidParams, match="VoxCPM2 only"):
            model.encode(prompt=None, prompt_text=None, reference=sound)
    with pytest.raises(EngineError, match="denoiser=true"):
        model.encode(prompt=sound, prompt_text="Ah", reference=None, denoise=True)


class _Denoiser:
    """In place of ZipEnhancer, which needs ModelScope: the same call, and what it does can be heard."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def enhance(self, input_path: str, output_path: str | None = None) -> str:
        if self.fault:
            raise RuntimeError(self.fault)
        samples, rate = soundfile.read(input_path, dtype="float32")
        assert output_path is not None
        soundfile.write(output_path, samples / 2, rate, subtype="FLOAT")
        return output_path


def test_a_prompt_is_denoised_when_asked(v2: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = voiced(0.5, v2.prompt_rate)
    monkeypatch.setattr(v2, "_denoiser", _Denoiser())
    clean = v2.encode(prompt=sound, prompt_text="Ah", reference=sound, denoise=True)
    soft = np.float32(0.5) * sound
    half = v2.encode(prompt=soft, prompt_text="Ah", reference=soft)
    assert torch.equal(clean.value["audio_feat"], half.value["audio_feat"])
    assert torch.equal(clean.value["ref_audio_feat"], half.value["ref_audio_feat"])
    monkeypatch.setattr(v2, "_denoiser", _Denoiser("no"))
    with pytest.raises(EngineError, match="the denoiser failed"):
        v2.encode(prompt=sound, prompt_text="Ah", reference=None, denoise=True)


# -- the context, and what fails -----------------------------------------------------------------------------


def test_a_text_too_long_for_the_model_is_named_before_it_speaks(model: Model) -> None:
    expected = streamed(model)
    fits = "x" * (CONTEXT - 2 - (model.tokens("x") - 1))
    assert model.tokens(fits) == CONTEXT - 2
    assert len(streamed(model, text=fits, settings=attrs.evolve(QUICK, max_len=1))) == model.chunk_samples
    for speak in (streamed, whole):
        with pytest.raises(
            EngineError, match=f"need {CONTEXT + 1} of the {CONTEXT} positions in the model's context; shorten"
        ) as caught:
            speak(model, text=fits + "xx")
        assert not caught.value.retryable
    assert np.array_equal(streamed(model), expected)


def test_a_full_context_says_what_to_do_and_the_model_goes_on(model: Model) -> None:
    expected = streamed(model)
    endless = Settings(inference_timesteps=1, ratio_threshold=99.0)
    for speak in (streamed, whole):
        with pytest.raises(EngineError, match="shorten the text or the prompt audio") as caught:
            speak(model, settings=endless)
        assert (caught.value.retryable, caught.value.restart) == (False, False)
    assert np.array_equal(streamed(model), expected)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB."), "--slots"),
        (RuntimeError("CUDA error: an illegal memory access was encountered\nmore"), "the GPU failed"),
    ],
)
def test_a_gpu_that_fails_restarts_the_slot_and_may_be_tried_again(
    model: Model, fault: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = streamed(model)
    prompt = voiced(0.5, model.prompt_rate)

    def fail(*_args: object, **_kwargs: object) -> object:
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(model.tts.feat_decoder, "forward", fail)
        patch.setattr(model.tts, "build_prompt_cache", fail)
        for call in (
            lambda: streamed(model),
            lambda: whole(model),
            lambda: model.encode(prompt=prompt, prompt_text="Ah", reference=None),
        ):
            with pytest.raises(EngineError, match=words) as caught:
                call()
            assert (caught.value.retryable, caught.value.restart) == (True, True)
            assert "\n" not in caught.value.message
    assert np.array_equal(streamed(model), expected)


def test_other_errors_fly(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_kwargs: object) -> object:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(model.tts.feat_decoder, "forward", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        streamed(model)


# -- text, and the log -------------------------------------------------------------------------------------------


def test_text_is_counted_as_the_package_counts_it(v2: Model) -> None:
    assert v2.tokens("abc") == 4  # one for the space it puts in front
    assert v2.tokens("你好") == 3  # a word of two characters is taken apart
    assert v2.tokens("é") == 3  # unknown: its bytes


def test_numbers_are_normalized(v2: Model) -> None:
    assert v2.can_normalize
    assert v2.normalize("I have 2 cats.") == "I have two cats."
    assert v2.normalize("我有2只猫。") == "我有两只猫。"


def test_what_normalization_needs_is_named(v2: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(v2, "can_normalize", False)
    with pytest.raises(EngineError, match="pip install wetext"):
        v2.normalize("2")


def test_nothing_is_printed_at_each_step(model: Model, capfd: pytest.CaptureFixture[str]) -> None:
    streamed(model)
    whole(model)
    assert capfd.readouterr() == ("", "")


def test_no_temporary_file_is_left(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    prompted(model)
    assert list(tmp_path.iterdir()) == []


def test_the_wav_fixture_is_audio(wav: Callable[..., bytes], speech: Callable[..., Samples]) -> None:
    sound = speech(0.5, 22_050)
    samples, rate = soundfile.read(io.BytesIO(wav(sound, 22_050)), dtype="float32")
    assert rate == 22_050
    assert np.abs(samples - sound).max() < 1e-4
