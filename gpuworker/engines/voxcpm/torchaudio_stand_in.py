"""Provides what voxcpm needs of torchaudio, if the real one is missing or does not load.

voxcpm 2.0.3 imports torchaudio at the top of `model/voxcpm.py` and calls two of its functions, both for the prompt
audio of VoxCPM 1.x only. `import torchaudio` fails where torch is the CPU build and torchaudio is not, and from 2.9 on
`torchaudio.load` needs torchcodec and FFmpeg besides. Prompts reach the model as WAV at the model's own rate, so
the stand-in gives the very samples that the real one gives (16 and 32 bit WAV, as `torchaudio.load` reads them).
"""

import importlib
import importlib.machinery
import sys
import types
from typing import Any, Literal

import attrs

#: How `import torchaudio` fails: it is not installed, or its libraries need a CUDA that is not there.
_NOT_LOADABLE = (ImportError, OSError, RuntimeError, AttributeError)


@attrs.frozen
class TorchaudioInUse:
    """Which torchaudio `import voxcpm` gets.

    Args:
        kind: "real", "real, our load" (it is there but cannot read files), or "stand-in".
        why: what the real one said, empty for "real".
    """

    kind: Literal["real", "real, our load", "stand-in"]
    why: str = ""


def load(path: str, *_args: object, **_kwargs: object) -> tuple[Any, int]:
    """As `torchaudio.load`.

    Args:
        path: a file that soundfile reads.

    Returns:
        float32 tensor of shape (channels, samples) in -1..1, and its rate in Hz.
    """
    import soundfile
    import torch

    samples, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
    return torch.from_numpy(samples.T.copy()), rate_hz


def resample(waveform: Any, orig_freq: int, new_freq: int, *_args: object, **_kwargs: object) -> Any:
    """As `torchaudio.functional.resample`, by soxr.

    Close to it but not bit for bit, so the adapter never has it called with two rates that differ.

    Args:
        waveform: tensor of shape (channels, samples).
        orig_freq: Hz.
        new_freq: Hz.

    Returns:
        tensor of shape (channels, about samples * new_freq / orig_freq), same dtype and device.
    """
    if orig_freq == new_freq:
        return waveform
    import soxr
    import torch

    moved = soxr.resample(waveform.detach().cpu().numpy().T, orig_freq, new_freq)
    return torch.from_numpy(moved.T.copy()).to(dtype=waveform.dtype, device=waveform.device)


def ensure_torchaudio() -> TorchaudioInUse:
    """Make `import torchaudio` work for voxcpm; call it before voxcpm is imported. It may be called twice."""
    try:
        torchaudio: Any = importlib.import_module("torchaudio")
    except _NOT_LOADABLE as fault:
        # The next import would find a half-imported package, and take it for a whole one.
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
            del sys.modules[name]
        _install()
        return TorchaudioInUse("stand-in", f"{type(fault).__name__}: {fault}")
    if getattr(torchaudio, "is_stand_in", False):
        return TorchaudioInUse("stand-in", "installed before")
    if torchaudio.load is load:
        return TorchaudioInUse("real, our load", "replaced before")
    if why := _load_fault(torchaudio):
        torchaudio.load = load
        return TorchaudioInUse("real, our load", why)
    return TorchaudioInUse("real")


def _install() -> None:
    package, functional = types.ModuleType("torchaudio"), types.ModuleType("torchaudio.functional")
    # Library code asks `importlib.util.find_spec("torchaudio")`, which raises for a module without a spec.
    package.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None, is_package=True)
    functional.__spec__ = importlib.machinery.ModuleSpec("torchaudio.functional", None)
    names: dict[str, object] = {"__path__": [], "__version__": "0+stand.in", "is_stand_in": True, "load": load}
    for name, value in names.items():
        setattr(package, name, value)
    functional.__dict__["resample"] = resample
    package.__dict__["functional"] = functional
    sys.modules["torchaudio"], sys.modules["torchaudio.functional"] = package, functional


def _load_fault(torchaudio: Any) -> str:
    """Why this torchaudio cannot read a WAV file; empty if it can."""
    import tempfile
    from pathlib import Path

    import numpy as np
    import soundfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.wav"
        soundfile.write(path, np.zeros(160, np.float32), 16_000, subtype="FLOAT")
        try:
            torchaudio.load(str(path))
        except Exception as fault:  # noqa: BLE001 - whatever a backend raises, ours replaces it
            return f"{type(fault).__name__}: {fault}"
    return ""
