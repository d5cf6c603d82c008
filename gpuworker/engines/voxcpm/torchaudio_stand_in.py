"""Provides what voxcpm uses of torchaudio, if the real package is missing or cannot be imported.

voxcpm 2.0.3 imports torchaudio at the top of `model/voxcpm.py` and calls two of its functions, both only for the prompt
audio of VoxCPM 1.x. `import torchaudio` fails if torch is the CPU build and torchaudio is not; from 2.9 on,
`torchaudio.load` also requires torchcodec and FFmpeg. Prompts reach the model as WAV at the model's own rate, so the
stand-in returns exactly the samples that the real one returns (16- and 32-bit WAV, as read by `torchaudio.load`).
"""

import importlib
import importlib.machinery
import sys
import types
from typing import Any, Literal

import attrs

#: Errors of `import torchaudio`: it is not installed, or its libraries require a CUDA version that is missing.
_NOT_LOADABLE = (ImportError, OSError, RuntimeError, AttributeError)


@attrs.frozen
class TorchaudioInUse:
    """The torchaudio that `import voxcpm` uses.

    Args:
        kind: "real", "real, our load" (the real one, which cannot read files), or "stand-in".
        why: the error of the real one, empty for "real".
    """

    kind: Literal["real", "real, our load", "stand-in"]
    why: str = ""


def load(path: str, *_args: object, **_kwargs: object) -> tuple[Any, int]:
    """Replacement for `torchaudio.load`.

    Args:
        path: a file that soundfile can read.

    Returns:
        float32 tensor of shape (channels, samples) in -1..1, and its rate in Hz.
    """
    import soundfile
    import torch

    samples, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
    return torch.from_numpy(samples.T.copy()), rate_hz


def resample(waveform: Any, orig_freq: int, new_freq: int, *_args: object, **_kwargs: object) -> Any:
    """Replacement for `torchaudio.functional.resample` with soxr.

    Its result is close but not equal to the original's; the engine never calls it with two different rates.

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
    """Make `import torchaudio` work for voxcpm; call it before voxcpm is imported. It may be called repeatedly."""
    try:
        torchaudio: Any = importlib.import_module("torchaudio")
    except _NOT_LOADABLE as fault:
        # Otherwise the next import would find the half-imported package and take it for a complete one.
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
    # Libraries call `importlib.util.find_spec("torchaudio")`, which raises for a module without a spec.
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
        except Exception as fault:  # noqa: BLE001 - a backend may raise anything, and is then replaced
            return f"{type(fault).__name__}: {fault}"
    return ""
