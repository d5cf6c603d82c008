"""How much memory a model takes and how much there is, with an nvidia-smi and a /proc/meminfo of the test's own."""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpuworker.cli import main
from gpuworker.engines.base import Missing
from gpuworker.engines.voxcpm import memory
from gpuworker.engines.voxcpm.engine import VoxcpmEngine
from gpuworker.engines.voxcpm.memory import (
    CUDA_OVERHEAD_BYTES,
    GIB,
    RELEASED,
    Free,
    Need,
    free_memory,
    lacking_memory,
    memory_outlook,
    need_of,
)

Smi = Callable[..., None]
V2 = "openbmb/VoxCPM2"


@pytest.fixture(autouse=True)
def _nothing_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "CUDA_VISIBLE_DEVICES", "RELAY_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


@pytest.fixture
def smi(tmp_path: Path) -> Smi:
    """`smi(*lines, code=0)`: an nvidia-smi that prints these for GPUs."""

    def install(*lines: str, code: int = 0) -> None:
        path = tmp_path / "bin" / "nvidia-smi"
        said = "".join(f"echo '{line}'\n" for line in lines)
        path.write_text(f"#!/bin/sh\n{said}exit {code}\n")
        path.chmod(0o755)

    return install


@pytest.fixture
def main_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """`main_memory(gib)`: so much is free."""

    def install(gib: float) -> None:
        path = tmp_path / "meminfo"
        path.write_text(f"MemTotal: 999 kB\nMemFree: 1 kB\nMemAvailable:   {int(gib * 1024**2)} kB\n")
        monkeypatch.setattr(memory, "MEMINFO", path)

    install(512)
    return install


TWO = ("0, GPU-aaaa-1, 15564, NVIDIA L4", "1, GPU-bbbb-2, 81000, NVIDIA A100, 80GB")


# -- what is free ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [
        ("auto", None, Free(15564 * 1024**2, "NVIDIA L4", gpu=True)),
        ("cuda", None, Free(15564 * 1024**2, "NVIDIA L4", gpu=True)),
        ("cuda:1", None, Free(81000 * 1024**2, "NVIDIA A100, 80GB", gpu=True)),
        ("cuda", "1", Free(81000 * 1024**2, "NVIDIA A100, 80GB", gpu=True)),
        ("cuda:1", "1,0", Free(15564 * 1024**2, "NVIDIA L4", gpu=True)),
        ("cuda", "GPU-bbbb", Free(81000 * 1024**2, "NVIDIA A100, 80GB", gpu=True)),
        ("cuda", "1,7,0", Free(81000 * 1024**2, "NVIDIA A100, 80GB", gpu=True)),
        ("cuda:1", "1,7,0", None),  # CUDA stops at the 7
        ("cuda:2", None, None),
        ("auto", "", Free(512 * GIB, "this machine", gpu=False)),
        ("auto", "-1", Free(512 * GIB, "this machine", gpu=False)),
        ("cuda", "", None),
        ("auto", "MIG-1234", None),
        ("cpu", None, Free(512 * GIB, "this machine", gpu=False)),
        ("mps", None, None),
    ],
)
def test_what_is_free_is_told_of_the_gpu_that_cuda_would_take(
    device: str,
    visible: str | None,
    expected: Free | None,
    smi: Smi,
    main_memory: Callable[[float], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    smi(*TWO)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert free_memory(device) == expected


def test_what_cannot_be_told_is_not_guessed(smi: Smi, main_memory: Callable[[float], None], tmp_path: Path) -> None:
    assert free_memory("cuda") is None  # no nvidia-smi
    assert free_memory("auto") == Free(512 * GIB, "this machine", gpu=False)
    smi("0, GPU-a, [N/A], NVIDIA A100 in pieces")
    assert free_memory("auto") is None
    smi("Failed to initialize NVML", code=9)
    assert free_memory("cuda") is None
    memory.MEMINFO.unlink()
    assert free_memory("cpu") is None
    assert lacking_memory(V2, "cpu", 1_000) == []
    assert "is not known" in memory_outlook(V2, "cuda", 1)


# -- what is needed ----------------------------------------------------------------------------------------------


CONFIG: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_length": 100,
    "residual_lm_num_layers": 1,
    "lm_config": {"num_hidden_layers": 3, "num_key_value_heads": 2, "hidden_size": 64, "num_attention_heads": 4},
}


def write(folder: Path, config: Any = CONFIG, *, pickled: bool = False) -> Path:
    """A checkpoint with 600 numbers and 50 of the VAE, and nothing in its tensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if pickled:
        (folder / "pytorch_model.bin").write_bytes(bytes(1_200))
        (folder / "audiovae.pth").write_bytes(bytes(200))
        return folder
    for name, shape in (("model", [20, 30]), ("audiovae", [50])):
        tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
        header = json.dumps({"__metadata__": {"format": "pt"}, "w": tensor}).encode()
        (folder / f"{name}.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return folder


@pytest.mark.parametrize("pickled", [False, True])
def test_a_checkpoints_need_is_read_from_its_files(pickled: bool, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", pickled=pickled)
    # K and V, 4 layers, 2 heads of 16, 100 places, 2 bytes
    expected = Need(weights=1_200, vae=200, cache=2 * 4 * 2 * 16 * 100 * 2, places=100, building=2_600)
    assert need_of(str(folder)) == expected


def test_a_model_in_the_hugging_face_cache_is_read_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "hf" / "hub" / "models--openbmb--VoxCPM2"
    write(cache / "snapshots" / "abc")
    assert need_of(V2) == RELEASED["openbmb/voxcpm2"]  # no refs yet: half a download
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    read = need_of(V2)
    assert read is not None
    assert read.weights == 1_200
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert need_of(V2) == RELEASED["openbmb/voxcpm2"]


def test_a_smaller_context_needs_less_and_a_larger_one_than_the_model_has_is_told(
    smi: Smi, main_memory: Callable[[float], None], tmp_path: Path
) -> None:
    whole, half = need_of(V2), need_of(V2, 4_096)
    assert whole is not None
    assert half is not None
    # Of the largest released model, a position takes 36 KiB in both caches together.
    assert (whole.cache, half.cache) == (8_192 * 36_864, 4_096 * 36_864)
    assert whole.model - half.model == half.cache
    assert need_of(V2, 100_000) == whole
    smi("0, GPU-a, 15072, NVIDIA L4")  # two slots fit only with less context
    assert "use --slots 1" in lacking_memory(V2, "cuda", 2)[0].what
    assert lacking_memory(V2, "cuda", 2, context=2_048) == []
    assert "need about 14.4 GiB" in memory_outlook(V2, "cuda", 2, context=2_048)
    options = {name: option.default for name, option in VoxcpmEngine.OPTIONS.items()}
    assert VoxcpmEngine.check({**options, "context": 8_192}, 1) == []
    (lack,) = VoxcpmEngine.check({**options, "context": 8_193}, 1)
    assert "context=8192 or less, because openbmb/VoxCPM2 has no more positions" in lack.what


@pytest.mark.parametrize(
    "config", [{}, [], {**CONFIG, "dtype": "int3"}, {**CONFIG, "lm_config": None}, {**CONFIG, "max_length": "long"}]
)
def test_nothing_is_said_of_files_that_are_no_checkpoint(config: Any, tmp_path: Path) -> None:
    assert need_of(str(write(tmp_path / "model", config))) is None
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\xff" * 100)
    assert need_of(str(tmp_path / "model")) is None


@pytest.mark.parametrize("model", ["someone/fine-tuned", "/nonexistent", "../..", "", "a/b/c"])
def test_nothing_is_said_of_a_model_that_is_not_known(model: str, smi: Smi) -> None:
    assert need_of(model) is None or Path(model).is_dir()
    assert lacking_memory(model, "cuda", 100) == []
    assert "not known" in memory_outlook(model, "cuda", 1)


def test_the_table_holds_the_released_models_at_about_what_their_makers_say() -> None:
    said = {"openbmb/voxcpm2": 8e9, "openbmb/voxcpm1.5": 6e9, "openbmb/voxcpm-0.5b": 5e9}  # README, "VRAM"
    assert set(RELEASED) == set(said)
    for model, need in RELEASED.items():
        assert 0.75 * said[model] < need.model + CUDA_OVERHEAD_BYTES < 1.05 * said[model]


def test_a_tiny_real_checkpoint_is_read(checkpoint: Callable[..., Path], arch: str) -> None:
    folder = checkpoint(arch)
    need = need_of(str(folder))
    assert need is not None
    on_disk = sum(file.stat().st_size for file in folder.iterdir())
    assert 0.5 * on_disk < need.weights + need.vae < 1.1 * on_disk
    assert need.building >= need.weights


# -- both --------------------------------------------------------------------------------------------------------


def test_slots_that_do_not_fit_are_refused_with_how_many_do(smi: Smi, main_memory: Callable[[float], None]) -> None:
    smi("0, GPU-a, 15564, NVIDIA L4")
    assert lacking_memory(V2, "auto", 2) == []
    (lack,) = lacking_memory(V2, "auto", 4)
    assert lack == Missing(
        "about 29.6 GiB of GPU memory for 4 slots of openbmb/VoxCPM2, 15.2 GiB are free on NVIDIA L4; use --slots 2; "
        "-o check_memory=false starts them anyway"
    )
    smi("0, GPU-a, 4000, NVIDIA T4")
    (lack,) = lacking_memory(V2, "auto", 1)
    assert "not one fits" in lack.what
    assert memory_outlook(V2, "auto", 2) == (
        "2 slots of openbmb/VoxCPM2 need about 14.8 GiB of GPU memory, 3.9 GiB are free on NVIDIA T4"
    )


def test_rows_share_one_model_and_what_fits_is_told(smi: Smi, main_memory: Callable[[float], None]) -> None:
    smi("0, GPU-a, 15564, NVIDIA L4")
    assert memory_outlook(V2, "auto", 8, rows=8) == (
        "8 rows of one openbmb/VoxCPM2 need about 9.6 GiB of GPU memory, 15.2 GiB are free on NVIDIA L4, "
        "which has room for 25 rows"
    )
    assert "room for 79 rows" in memory_outlook(V2, "auto", 8, context=2_048, rows=8)
    assert lacking_memory(V2, "auto", 25, rows=25) == []
    (lack,) = lacking_memory(V2, "auto", 26, rows=26)
    assert "15.2 GiB of GPU memory for 26 rows of one openbmb/VoxCPM2" in lack.what
    assert "use -o batch=25, or a smaller -o context" in lack.what
    smi("0, GPU-a, 6000, NVIDIA T4")
    (lack,) = lacking_memory(V2, "auto", 8, rows=8)
    assert "not one fits" in lack.what


def test_a_machine_that_cannot_hold_a_model_while_it_loads_is_told(
    smi: Smi, main_memory: Callable[[float], None]
) -> None:
    smi("0, GPU-a, 80000, NVIDIA A100")
    main_memory(6)
    (lack,) = lacking_memory(V2, "cuda", 1)
    assert "8.9 GiB of main memory while openbmb/VoxCPM2 loads, 6.0 GiB are free on this machine" in lack.what


def test_on_a_cpu_main_memory_is_what_counts(main_memory: Callable[[float], None]) -> None:
    main_memory(16)
    assert lacking_memory(V2, "cpu", 1) == []
    (lack,) = lacking_memory(V2, "cpu", 4)
    assert "of memory for 4 slots" in lack.what
    assert "16.0 GiB are free on this machine; use --slots 1;" in lack.what
    told = re.search(r"room for (\d+) rows", memory_outlook(V2, "cpu", 8, rows=8))
    assert told is not None
    fit = int(told[1])
    assert lacking_memory(V2, "cpu", fit, rows=fit) == []
    assert lacking_memory(V2, "cpu", fit + 1, rows=fit + 1) != []


# -- gpuworker run and doctor ------------------------------------------------------------------------------------


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def test_run_refuses_slots_that_do_not_fit_before_it_starts_any(
    smi: Smi, main_memory: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    smi("0, GPU-a, 15564, NVIDIA L4")
    assert call("run", "--engine", "voxcpm", "--slots", "4", "--relay", "ws://127.0.0.1:1") == 2
    told = capsys.readouterr().err
    assert "gpuworker: engine 'voxcpm' needs about 29.6 GiB of GPU memory for 4 slots of openbmb/VoxCPM2" in told
    assert "use --slots 2" in told


def test_doctor_tells_what_the_slots_take(
    smi: Smi,
    main_memory: Callable[[float], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gpuworker.doctor.find_spec", lambda _name: None)  # torch in a process takes its time
    smi("0, GPU-a, 15564, NVIDIA L4")

    def told(*arguments: str) -> tuple[int, dict[str, str]]:
        code = call("doctor", "--json", "--engine", "voxcpm", *arguments)
        return code, next(f for f in json.loads(capsys.readouterr().out) if f["what"] == "engine voxcpm")

    code, found = told("--slots", "2")
    assert (code, found["outcome"]) == (0, "ok")
    assert (
        "2 slots of openbmb/VoxCPM2 need about 14.8 GiB of GPU memory, 15.2 GiB are free on NVIDIA L4" in found["words"]
    )
    code, found = told("--slots", "3")
    assert (code, found["outcome"]) == (1, "missing")
    assert "use --slots 2" in found["words"]
    code, found = told("--slots", "3", "-o", "check_memory=false")
    assert (code, found["outcome"]) == (0, "ok")
    code, found = told("-o", "batch=8")  # which has eight slots then
    assert (code, found["outcome"]) == (0, "ok")
    assert "8 rows of one openbmb/VoxCPM2 need about 9.6 GiB" in found["words"]
    assert "room for 25 rows" in found["words"]
    code, found = told("-o", "batch=8", "--slots", "9")
    assert (code, found["words"]) == (1, "needs -o batch=9 for --slots 9, or --slots 8")
    code, found = told("--slots", "3", "-o", "model=openbmb/VoxCPM-0.5B")
    assert (code, found["outcome"]) == (0, "ok")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--slots", "2"),
        ("-o", "model=x"),
        ("--engine", "nope"),
        ("--engine", "voxcpm", "-o", "nope=1"),
        ("--engine", "voxcpm", "--slots", "0"),
    ],
)
def test_doctor_takes_no_nonsense(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("doctor", *arguments) == 2
    assert capsys.readouterr().err.startswith("gpuworker: ")
