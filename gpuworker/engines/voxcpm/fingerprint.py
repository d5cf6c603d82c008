"""Computes a short digest of what a model's samples depend on besides the request and its seed."""

import hashlib
import platform
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

#: Large weights files are distinguished by their size and samples of this many bytes: the start (names and offsets of
#: all tensors), the end, and blocks spread evenly between, because a fine-tuned model differs only in values.
_EDGE_BYTES = 1024 * 1024
_BLOCKS, _BLOCK_BYTES = 64, 16 * 1024
#: What speaks, what reads recordings, and what writes numbers out as words; some of these may not be installed.
_PACKAGES = ("voxcpm", "transformers", "librosa", "soundfile", "soxr", "av", "wetext", "inflect")


def model_fingerprint(
    folder: Path, *, device: str, dtype: str, compiled: bool, context: int, more: Iterable[Path] = ()
) -> str:
    """A digest of 16 hex digits: two processes with equal digests make equal samples for equal request and seed.

    It covers the model's files, the versions of torch (with CUDA and cuDNN), of voxcpm, and of the packages that read
    recordings and write numbers out as words, the dtype, whether the model is compiled, the size of its context (a long
    text is split where it ends), and the kind of device: the GPU's name, or the CPU's model, instruction set and number
    of threads, on which the rounding of sums depends. It does not cover kernels chosen by timing them (as torch.compile
    may); the engine's self-check covers those.

    Args:
        folder: the folder of the model's files.
        device: "cpu", "mps", "cuda" or "cuda:1".
        dtype: the dtype that the model computes with.
        compiled: whether it is compiled.
        context: positions in its KV caches.
        more: further files, such as an adapter's.
    """
    digest = hashlib.sha256()
    for name in _PACKAGES:
        digest.update(f"{name} {_version(name)}\n".encode())
    digest.update(f"{torch.__version__} {dtype} {'compiled' if compiled else 'eager'} {context}\n".encode())
    digest.update("\n".join(_device_words(device)).encode())
    suffixes = (".json", ".safetensors", ".pth", ".bin", ".model")
    for file in (*(each for each in sorted(folder.iterdir()) if each.suffix in suffixes), *more):
        digest.update(f"\n{file.name} {file.stat().st_size}\n".encode())
        for block in _sampled(file):
            digest.update(block)
    return digest.hexdigest()[:16]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _device_words(device: str) -> Iterator[str]:
    if device.startswith("cuda"):
        yield torch.cuda.get_device_name(device)
        cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]  # untyped in torch
        yield f"cuda {torch.version.cuda} cudnn {cudnn}"
        return
    yield device
    yield _cpu_name()
    yield f"{torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} threads"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return f"{platform.machine()} {platform.processor()}"


def _sampled(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= 2 * _EDGE_BYTES + _BLOCKS * _BLOCK_BYTES:
            yield stream.read()
            return
        yield stream.read(_EDGE_BYTES)
        for i in range(_BLOCKS):
            stream.seek(_EDGE_BYTES + (size - 2 * _EDGE_BYTES) * i // _BLOCKS)
            yield stream.read(_BLOCK_BYTES)
        stream.seek(size - _EDGE_BYTES)
        yield stream.read()
