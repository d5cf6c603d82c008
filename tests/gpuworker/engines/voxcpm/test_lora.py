"""Adapters (LoRA) through the real package: they change the speech, and belong to the fingerprint."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpuworker.engines.base import EngineError
from gpuworker.engines.voxcpm.batch.shared_model import SharedModel
from gpuworker.engines.voxcpm.devices import import_voxcpm, known_warnings
from gpuworker.engines.voxcpm.engine import VoxcpmEngine
from gpuworker.engines.voxcpm.model import Model, Settings
from tests.gpuworker.engines.voxcpm.engine_runs import a_loaded, speech_of

RANK = 4


def an_adapter(model: Path, folder: Path, arch: str, seed: int = 1) -> Path:
    """A random one, as voxcpm's training leaves it in a folder."""
    import torch
    from safetensors.torch import save_file

    _torchaudio, voxcpm = import_voxcpm()

    module = importlib.import_module(f"voxcpm.model.{arch}")
    config = {"enable_lm": True, "enable_dit": True, "enable_proj": arch == "voxcpm2", "r": RANK, "alpha": 8}
    with known_warnings():
        made = voxcpm.VoxCPM(
            str(model),
            zipenhancer_model_path=None,
            enable_denoiser=False,
            optimize=False,
            device="cpu",
            lora_config=module.LoRAConfig(**config),
        )
    chance = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(each.shape, generator=chance).to(each.dtype)
        for name, each in made.get_lora_state_dict().items()
    }
    folder.mkdir()
    save_file(weights, folder / "lora_weights.safetensors")
    (folder / "lora_config.json").write_text(json.dumps({"base_model": str(model), "lora_config": config}))
    return folder


@pytest.mark.parametrize("arch", ["voxcpm2", "voxcpm"])
def test_an_adapter_changes_the_speech_and_the_fingerprint(
    arch: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = checkpoint(arch)
    one, other = (an_adapter(model, tmp_path / f"{seed}", arch, seed) for seed in (1, 2))
    plain = a_loaded(model)
    engines = [a_loaded(model, f"lora={one}"), a_loaded(model, f"lora={one / 'lora_weights.safetensors'}")]
    engines.append(a_loaded(model, f"lora={other}"))
    made = [speech_of(engine, "One.") for engine in (plain, *engines)]
    assert made[1] == made[2]
    assert len(set(made)) == 3
    marks = [engine.capabilities.fingerprint for engine in (plain, *engines)]
    assert marks[1] == marks[2]
    assert len(set(marks)) == 3


def test_an_adapter_speaks_in_a_row_of_a_batch_as_it_does_alone(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = checkpoint("voxcpm2")
    adapter = str(an_adapter(model, tmp_path / "adapter", "voxcpm2"))
    plain, adapted = (Model.load(str(model), device="cpu", lora=adapter) for _ in range(2))
    shared = SharedModel.of(adapted, 1, record=False)
    made = []
    for speaking in (plain, shared.seats[0]):
        speaking.seed(1)
        made.append(np.concatenate(list(speaking.stream("One.", None, Settings(inference_timesteps=2, max_len=4)))))
    assert np.array_equal(made[0], made[1])
    shared.steps.close()


def test_an_adapter_that_does_not_fit_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model = checkpoint("voxcpm2")
    adapter = an_adapter(model, tmp_path / "adapter", "voxcpm2")
    (adapter / "lora_config.json").unlink()  # then voxcpm expects rank 8
    with pytest.raises(EngineError, match="does not fit the model"):
        a_loaded(model, f"lora={adapter}")
    (adapter / "lora_config.json").write_text("[]")
    with pytest.raises(EngineError, match="is not the config of an adapter"):
        a_loaded(model, f"lora={adapter}")


@pytest.mark.parametrize("lora", ["/no/such/folder", "EMPTY", "/etc/hostname"])
def test_an_adapter_that_is_not_there_is_missing_before_the_model_is_loaded(lora: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {name: option.default for name, option in VoxcpmEngine.OPTIONS.items()}
    options |= {"lora": str(tmp_path) if lora == "EMPTY" else lora, "check_memory": False}
    (lack,) = VoxcpmEngine.check(options, 1)
    assert "has no weights of an adapter" in lack.what
