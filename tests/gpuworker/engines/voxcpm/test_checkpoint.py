"""The checkpoints that tests and bench are made on: of the size they say, the same each time, ending when they say."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gpuworker.engines.voxcpm.model import Model, Settings
from tests.support.voxcpm_checkpoint.checkpoint import main, parameter_count, write_checkpoint


def test_full_ones_have_the_size_of_the_released_models() -> None:
    model, vae = parameter_count("voxcpm2")
    assert 2.0e9 < model < 2.5e9
    assert 0.5e8 < vae < 1.5e8
    model, vae = parameter_count("voxcpm")
    assert 0.5e9 < model < 0.7e9
    assert 0.5e8 < vae < 1.5e8
    assert sum(parameter_count("voxcpm2", "tiny")) < 1e6
    assert 70e6 < sum(parameter_count("voxcpm2", "mid")) < 90e6


def test_the_same_arguments_write_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_checkpoint(tmp_path / name, "voxcpm", seed=3)
    write_checkpoint(tmp_path / "c", "voxcpm", seed=4)
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == ["audiovae.pth", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    weights = "model.safetensors"
    assert (tmp_path / "a" / weights).read_bytes() != (tmp_path / "c" / weights).read_bytes()


def steps(model: Model, text: str, seed: int, settings: Settings) -> int:
    model.seed(seed)
    return sum(1 for _chunk in model.stream(text, None, settings))


def test_speech_ends_exactly_when_it_should(checkpoint: Callable[..., Path], arch: str) -> None:
    always, never = (Model.load(str(checkpoint(arch, stop))) for stop in ("always", "never"))
    for min_len in (2, 5):
        assert steps(always, "Hello.", 0, Settings(inference_timesteps=1, min_len=min_len)) == min_len + 2
    settings = Settings(inference_timesteps=1, ratio_threshold=1.5)
    assert steps(never, "Hello.", 0, settings) == int(1.5 * never.tokens("Hello.")) + 10


def test_natural_ends_differ_by_text_and_seed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "voxcpm", stop=10)
    model = Model.load(str(tmp_path))
    settings = Settings(inference_timesteps=4, max_len=40)
    ends = [steps(model, text, seed, settings) for text in ("Good morning to you.", "What is it?") for seed in range(4)]
    assert len(set(ends)) > 2
    assert 4 <= np.median(ends) < 30


def test_bfloat16_ones_speak_too(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "voxcpm", dtype="bfloat16", context=128)
    model = Model.load(str(tmp_path))
    model.seed(0)
    sound = np.concatenate(list(model.stream("Hello.", None, Settings(inference_timesteps=2, max_len=4))))
    assert sound.dtype == np.float32
    assert 0.03 < sound.std() < 0.3
    assert model.context == 128


def test_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"voxcpm1\.5 are unknown"):
        write_checkpoint(tmp_path, "voxcpm1.5", size="full")
    with pytest.raises(ValueError, match="trial runs"):
        write_checkpoint(tmp_path, "voxcpm2", size="full", stop=12)
    assert list(tmp_path.iterdir()) == []


def test_it_runs_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "out"), "--arch", "voxcpm1.5", "--stop", "always", "--context", "64"]) == 0
    assert capsys.readouterr().out.startswith("voxcpm1.5 tiny: 0.3 M parameters")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_length"] == 64
