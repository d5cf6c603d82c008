"""The stand-in gives what torchaudio would, and only takes its place where it must."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from gpuworker.engines.voxcpm import torchaudio_stand_in
from gpuworker.engines.voxcpm.torchaudio_stand_in import TorchaudioInUse, ensure_torchaudio
from tests.gpuworker.engines.voxcpm.conftest import voiced


@pytest.fixture
def no_torchaudio(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a fresh process; what the others of this one have imported is put back."""
    kept = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "torchaudio"}
    for name in kept:
        del sys.modules[name]
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
        del sys.modules[name]
    sys.modules.update(kept)


def package(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a torchaudio of this code first on the path."""
    (folder / "torchaudio").mkdir()
    (folder / "torchaudio" / "__init__.py").write_text(code)
    (folder / "torchaudio" / "inner.py").write_text("")
    monkeypatch.syspath_prepend(str(folder))


@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
@pytest.mark.parametrize("channels", [1, 2])
def test_load_gives_channels_first_and_the_rate(tmp_path: Path, subtype: str, channels: int) -> None:
    sound = np.stack([voiced(0.2, 22_050, 100.0 * (i + 1)) for i in range(channels)], axis=1)
    soundfile.write(tmp_path / "a.wav", sound, 22_050, subtype=subtype)
    waveform, rate = torchaudio_stand_in.load(str(tmp_path / "a.wav"))
    assert rate == 22_050
    assert waveform.dtype == torch.float32
    assert tuple(waveform.shape) == (channels, 4_410)
    # torchaudio.load divides 16 bit samples by 32768, as libsndfile does; floats are as they are in the file.
    expected = np.round(sound * 32_767) / 32_768 if subtype == "PCM_16" else sound
    assert np.abs(waveform.numpy().T - expected).max() <= (1 / 32_768 if subtype == "PCM_16" else 0.0)


@pytest.mark.parametrize(("rate", "wanted"), [(44_100, 16_000), (16_000, 44_100), (48_000, 16_000)])
def test_resample_keeps_the_sound_and_the_length(rate: int, wanted: int) -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32)
    moved = torchaudio_stand_in.resample(torch.from_numpy(tone).unsqueeze(0), rate, wanted)
    assert moved.dtype == torch.float32
    assert moved.shape == (1, wanted)
    expected = np.sin(2 * np.pi * 440 * np.arange(wanted) / wanted)
    assert np.abs(moved[0].numpy() - expected)[200:-200].max() < 1e-3
    same = torch.from_numpy(tone).unsqueeze(0)
    assert torch.equal(torchaudio_stand_in.resample(same, rate, rate), same)


@pytest.mark.usefixtures("no_torchaudio")
@pytest.mark.parametrize(
    "fault", ["OSError('libc10_cuda.so: cannot open')", "ImportError('no')", "RuntimeError('abi')"]
)
def test_one_that_does_not_load_is_replaced(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, f"import torchaudio.inner\nraise {fault}\n", monkeypatch)
    used = ensure_torchaudio()
    assert used.kind == "stand-in"
    assert fault.partition("(")[0] in used.why
    assert "torchaudio.inner" not in sys.modules
    torchaudio: Any = importlib.import_module("torchaudio")
    assert torchaudio.load is torchaudio_stand_in.load
    assert torchaudio.functional.resample is torchaudio_stand_in.resample
    assert importlib.util.find_spec("torchaudio") is not None
    assert ensure_torchaudio() == TorchaudioInUse("stand-in", "installed before")


_REAL = """
import soundfile, torch
def load(path):
    {body}
"""


@pytest.mark.usefixtures("no_torchaudio")
def test_one_that_works_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, _REAL.format(body="return torch.from_numpy(soundfile.read(path)[0]), 16_000"), monkeypatch)
    assert ensure_torchaudio() == TorchaudioInUse("real")
    torchaudio: Any = importlib.import_module("torchaudio")
    assert torchaudio.load is not torchaudio_stand_in.load


@pytest.mark.usefixtures("no_torchaudio")
def test_one_that_cannot_read_files_keeps_all_but_its_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, _REAL.format(body="raise ImportError('TorchCodec is required')"), monkeypatch)
    used = ensure_torchaudio()
    assert used.kind == "real, our load"
    assert "TorchCodec is required" in used.why
    torchaudio: Any = importlib.import_module("torchaudio")
    assert torchaudio.load is torchaudio_stand_in.load
    assert ensure_torchaudio().kind == "real, our load"
