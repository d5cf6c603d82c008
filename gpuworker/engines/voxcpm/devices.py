"""Prepares the loading of a model: imports voxcpm, selects the device, and loads the denoiser."""

import contextlib
import functools
import importlib.util
import shutil
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from gpuworker.engines.base import EngineError
from gpuworker.engines.voxcpm.torchaudio_stand_in import TorchaudioInUse, ensure_torchaudio
from protocol.install_hint import install_command

#: Deprecations within voxcpm 2.0.3 on Python 3.11 and torch 2.13, which the owner of a GPU cannot fix.
_KNOWN_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    (r"`torch\.nn\.utils\.weight_norm` is deprecated", FutureWarning),
    (r"`torch\.jit\.script` is deprecated", DeprecationWarning),
    (r"'(aifc|audioop|sunau)' is deprecated", DeprecationWarning),
)


@contextlib.contextmanager
def known_warnings() -> Iterator[None]:
    """Suppress the deprecations known from importing and loading voxcpm, and no other warning."""
    with warnings.catch_warnings():
        for message, category in _KNOWN_WARNINGS:
            warnings.filterwarnings("ignore", message=message, category=category)
        yield


def import_voxcpm() -> tuple[TorchaudioInUse, Any]:
    """Import voxcpm; return the torchaudio that it uses, and the package, with its progress bars disabled.

    Raises:
        EngineError: voxcpm, or something that it needs, is not installed.
    """
    torchaudio = ensure_torchaudio()
    try:
        with known_warnings():
            import voxcpm
            from voxcpm.model import voxcpm as first
            from voxcpm.model import voxcpm2 as second
    except ImportError as fault:
        raise EngineError(
            f"voxcpm cannot be imported ({fault}); install what it needs with: {install_command('voxcpm')}; "
            "then voxcpm with: pip install --no-deps voxcpm==2.0.3"
        ) from fault
    for module in (first, second):
        # Otherwise voxcpm would draw a progress bar into the log at every step of every request.
        if not isinstance(module.tqdm, functools.partial):
            module.tqdm = functools.partial(module.tqdm, disable=True)
    return torchaudio, voxcpm


def choose_device(device: str) -> str:
    """Resolve `device` on this machine: "cuda" to "cuda:0", for example.

    Args:
        device: auto, cpu, mps, cuda or cuda:N.

    Raises:
        EngineError: this machine has no such device.
    """
    asked = device.strip().lower()
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if asked == "auto":
        asked = "cuda" if cuda else "mps" if mps else "cpu"
        if asked == "cpu" and shutil.which("nvidia-smi"):
            log(f"there is an NVIDIA driver, but torch {torch.__version__} finds no GPU: speech runs slowly on the CPU")
    if asked == "cpu" or (asked == "mps" and mps):
        return asked
    kind, _, number = asked.partition(":")
    if kind != "cuda" or not (number.isdecimal() or asked == "cuda"):
        raise EngineError(f"device {device!r} is not one of auto, cpu, cuda, cuda:N, or mps on a Mac that has it")
    if not cuda:
        built = f"torch {torch.__version__} is built without CUDA: install a build with CUDA"
        if torch.version.cuda:
            built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}: check nvidia-smi"
        raise EngineError(f"device {device}: torch finds no CUDA GPU here ({built}); or use -o device=auto")
    count = torch.cuda.device_count()
    if int(number or 0) >= count:
        raise EngineError(f"device {device}: this machine has {count} GPUs, numbered from cuda:0")
    return f"cuda:{int(number)}" if number else f"cuda:{torch.cuda.current_device()}"


def load_denoiser(torchaudio: TorchaudioInUse, *, offline: bool) -> Any:
    """Load voxcpm's denoiser for prompt audio, which is fetched from ModelScope.

    Raises:
        EngineError: packages are missing, or ModelScope does not provide it.
    """
    lacks = [] if importlib.util.find_spec("modelscope") else ["modelscope"]
    if torchaudio.kind == "stand-in":
        lacks.append("torchaudio")
    elif torchaudio.kind == "real, our load":
        # It also writes files with torchaudio, which requires torchcodec for that from 2.9 on.
        lacks.append("torchcodec")
    if lacks:
        raise EngineError(
            f"the denoiser needs {' and '.join(lacks)}: pip install {' '.join(lacks)}; or start without -o denoiser"
        )
    if offline:
        raise EngineError(
            "the denoiser is looked up at ModelScope at each start, which -o offline forbids; leave out one of them"
        )
    try:
        from voxcpm.zipenhancer import ZipEnhancer

        return ZipEnhancer()
    except Exception as fault:  # modelscope's exceptions have no common class
        raise EngineError(
            f"the denoiser cannot be loaded ({fault}); check that ModelScope can be reached, or start without it"
        ) from fault


def log(text: str) -> None:
    """Write a line to the worker's log."""
    print(f"voxcpm: {text}", file=sys.stderr, flush=True)
