"""What the tests of voxcpm share: tiny checkpoints for the real package, and sound to clone from. No network."""

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gpuworker.engines.voxcpm.engine import VoxcpmEngine
from tests.gpuworker.engines.voxcpm.engine_runs import Samples, a_loaded
from tests.gpuworker.engines.voxcpm.fetch_server import no_fetch_goes_on

# Set before torch or huggingface_hub is imported, and inherited by slot processes: a test that reaches for the network
# fails at once, and the helpers' two cores are not fought over. Sums depend on the number of threads.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

#: All that the voxcpm package reads: VoxCPM2 (48 kHz), VoxCPM 1.5 (44.1 kHz), VoxCPM 0.5B (16 kHz).
ARCHES = ("voxcpm2", "voxcpm1.5", "voxcpm")


@pytest.fixture(params=ARCHES)
def arch(request: pytest.FixtureRequest) -> str:
    """Each architecture in turn."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint(arch="voxcpm2", stop="never", context=1024)`: a folder, built once a session (1 s; no edits!).

    A number for `stop` ends sentences after about so many steps, and takes some seconds more; see
    `tests.support.voxcpm_checkpoint.checkpoint.Stop`.
    """
    import torch

    from tests.support.voxcpm_checkpoint.checkpoint import write_checkpoint

    torch.set_num_threads(1)
    built: dict[tuple[str, object, int], Path] = {}

    def build(arch: str = "voxcpm2", stop: object = "never", context: int = 1_024) -> Path:
        key = (arch, stop, context)
        if key not in built:
            folder = tmp_path_factory.mktemp(f"{arch}-{stop}-{context}")
            write_checkpoint(folder, arch, stop=stop, context=context)  # type: ignore[arg-type] # parametrised by name
            built[key] = folder
        return built[key]

    return build


@pytest.fixture(scope="session")
def speech() -> Callable[..., NDArray[np.float32]]:
    """`speech(seconds=1.0, rate=16_000, pitch=140.0)`: voiced syllables, float32 mono in -1..1; no noise, no RNG."""
    return voiced


@pytest.fixture(scope="session")
def wav() -> Callable[..., bytes]:
    """`wav(samples, rate=16_000, subtype="PCM_16", container="WAV")`: a file's bytes; samples (n,) or (n, channels)."""
    return encoded


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


@pytest.fixture
def engine(arch: str, engine_of: Callable[..., VoxcpmEngine]) -> VoxcpmEngine:
    return engine_of(arch)


@pytest.fixture
def voxcpm2(engine_of: Callable[..., VoxcpmEngine]) -> VoxcpmEngine:
    return engine_of("voxcpm2")


@pytest.fixture(scope="module")
def package(folders: dict[str, Path]) -> Callable[..., list[Samples]]:
    """`package(arch, text, seed=0, streaming=True, **more)`: what plain `voxcpm` makes, with an instance of its own."""
    from tests.support.voxcpm_checkpoint.checkpoint import quiet_voxcpm

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


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    """Fails a test that leaves a fetch running."""
    yield
    no_fetch_goes_on()


def voiced(seconds: float = 1.0, rate: int = 16_000, pitch: float = 140.0) -> NDArray[np.float32]:
    """Harmonics of a gliding pitch, shaped by two formants and four syllables a second."""
    t = np.arange(round(seconds * rate)) / rate
    phase = 2 * np.pi * np.cumsum(pitch * (1 + 0.05 * np.sin(2 * np.pi * 3 * t))) / rate
    sound = np.zeros_like(t)
    for k in range(1, 1 + int(min(3_500, rate / 2 - pitch) // (1.05 * pitch))):
        weight = sum(np.exp(-(((k * pitch - formant) / 250) ** 2)) for formant in (600, 1_700))
        sound += (weight + 0.05) * np.sin(k * phase)
    sound *= np.sin(np.pi * 4 * t) ** 2
    loud: NDArray[np.float32] = (0.4 * sound / np.abs(sound).max()).astype(np.float32)
    return loud


def encoded(
    samples: NDArray[np.float32], rate: int = 16_000, subtype: str | None = "PCM_16", container: str = "WAV"
) -> bytes:
    """`samples` as an audio file."""
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, samples, rate, subtype=subtype, format=container)
    return file.getvalue()
