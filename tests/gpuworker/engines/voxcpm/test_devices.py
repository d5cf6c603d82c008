"""Loading a model that cannot be loaded says why and what to do, soon, and without the network."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from gpuworker.engines.base import EngineError
from gpuworker.engines.voxcpm import devices, fingerprint
from gpuworker.engines.voxcpm.devices import choose_device, load_denoiser
from gpuworker.engines.voxcpm.fingerprint import model_fingerprint
from gpuworker.engines.voxcpm.model import Model, Settings
from gpuworker.engines.voxcpm.model_files import find_folder
from gpuworker.engines.voxcpm.torchaudio_stand_in import TorchaudioInUse


@pytest.fixture
def folder(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint that may be spoilt."""
    return Path(shutil.copytree(checkpoint("voxcpm", context=64), tmp_path / "model"))


# -- the folder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["/no/such/folder", "./voxcpm", "VoxCPM2", "a/b/c", "", "~no-such-user/x"])
def test_what_is_neither_folder_nor_id_is_told_so(model: str) -> None:
    with pytest.raises(EngineError, match="neither a folder nor a hub id"):
        Model.load(model)


def test_offline_a_model_that_was_never_fetched_is_named() -> None:
    with pytest.raises(EngineError, match=r"downloads are disabled \(offline\); .* `hf download openbmb/NoSuch`"):
        Model.load("openbmb/NoSuch", offline=True)


#: All that the hub's errors read of a response, whichever HTTP client this version has.
_RESPONSE: Any = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (errors.LocalEntryNotFoundError("no route"), "cannot be reached"),
        (errors.RepositoryNotFoundError("404", response=_RESPONSE), "check the spelling"),
        (errors.RevisionNotFoundError("404", response=_RESPONSE), "no revision 'v9'"),
        (errors.GatedRepoError("403", response=_RESPONSE), "hf auth login"),
        (errors.HfHubHTTPError("502 Bad Gateway", response=_RESPONSE), "502 Bad Gateway"),
        (OSError("No space left on device"), "No space left on device"),
    ],
)
def test_what_the_hub_says_is_put_in_words(fault: Exception, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def snapshot_download(*args: object, **kwargs: object) -> str:
        asked.extend([args, kwargs])
        raise fault

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(EngineError, match=words) as caught:
        Model.load("openbmb/VoxCPM2", revision="v9")
    assert "openbmb/VoxCPM2" in caught.value.message
    assert asked[0] == ("openbmb/VoxCPM2",)
    assert isinstance(asked[1], dict)
    assert {"revision": "v9", "local_files_only": False}.items() <= asked[1].items()


def test_what_the_hub_gives_is_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_args, **_kwargs: str(folder))
    assert find_folder("openbmb/VoxCPM2") == folder


def test_a_download_is_told_while_more_of_it_comes_and_no_longer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Bars as `snapshot_download` of huggingface_hub 2.4 makes and fills them."""

    def snapshot_download(_model: str, *, tqdm_class: Any, **_kwargs: object) -> str:
        bar = tqdm_class(desc="Downloading bytes", total=0, initial=0, unit="B", unit_scale=True, mininterval=0)
        with tqdm_class(desc="Fetching 2 files", total=2) as files:
            bar.total += 4_000
            bar.refresh()  # nothing has come
            bar.update(1_000)
            for _ in range(3):
                bar.refresh()  # as tqdm's monitor does where nothing comes
            bar.set_description("still at it")
            bar.set_postfix_str("1 kB/s")
            bar.update(3_000)
            files.update(2)
        bar.close()
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr("gpuworker.engines.voxcpm.model_files.REPORT_S", 0.0)
    told: list[tuple[int, int]] = []
    assert find_folder("openbmb/VoxCPM2", fetched=lambda had, total: told.append((had, total))) == folder
    assert told == [(1_000, 4_000), (4_000, 4_000)]
    monkeypatch.setattr("gpuworker.engines.voxcpm.model_files.REPORT_S", 60.0)
    find_folder("openbmb/VoxCPM2", fetched=lambda had, total: told.append((had, total)))
    assert told[2:] == [(1_000, 4_000)]
    assert capfd.readouterr() == ("", "")


def test_a_device_that_is_not_here_is_told_before_anything_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_args, **_kwargs: pytest.fail("fetched"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match="torch finds no CUDA GPU here"):
        Model.load("openbmb/VoxCPM2", device="cuda")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "audiovae.pth", "tokenizer.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(EngineError, match=f"{name}.* missing; download it again"):
        Model.load(str(folder))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "architecture 'none'"),
        ('{"architecture": "VoxCPM3"}', "architecture 'voxcpm3'; voxcpm supports voxcpm2 and voxcpm"),
        ('{"architecture": "voxcpm"}', "cannot be read"),
    ],
)
def test_a_config_that_is_none_of_voxcpms_is_told_so(folder: Path, text: str, words: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(EngineError, match=words):
        Model.load(str(folder))


@pytest.mark.parametrize("name", ["model.safetensors", "audiovae.pth", "tokenizer.json"])
def test_a_file_that_is_cut_off_is_told_so(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(EngineError, match=r"cannot be read: .*; fetch it again"):
        Model.load(str(folder))


def test_weights_of_another_shape_are_told_so(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["scalar_quantization_latent_dim"] = 16
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineError, match="size mismatch"):
        Model.load(str(folder))


def test_voxcpm_that_is_not_installed_is_told_with_both_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "voxcpm", None)
    with pytest.raises(EngineError, match=r"\[voxcpm\]'.*--no-deps voxcpm=="):
        Model.load("openbmb/VoxCPM2")


# -- the device --------------------------------------------------------------------------------------------------


def test_a_device_that_is_not_here_is_told_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match=r"device cuda: torch finds no CUDA GPU here .*device=auto"):
        Model.load(str(folder), device="cuda")
    for name in ("gpu", "cuda:", "cuda:x", "cuda:-1", "tpu:0"):
        with pytest.raises(EngineError, match="not one of auto, cpu, cuda"):
            Model.load(str(folder), device=name)


def test_a_gpu_that_torch_does_not_see_is_told(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for found, words in ((None, ""), ("/usr/bin/nvidia-smi", "speech runs slowly on the CPU")):
        monkeypatch.setattr("shutil.which", lambda _name, found=found: found)
        assert choose_device("auto") == "cpu"
        assert words in capfd.readouterr().err


def test_a_device_is_chosen_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU in these tests: torch is made to say that there are two."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device(" CPU ") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert choose_device("auto") == "cuda:0"
    assert choose_device("cuda") == "cuda:0"
    assert choose_device("cuda:1") == "cuda:1"
    with pytest.raises(EngineError, match="this machine has 2 GPUs, numbered from cuda:0"):
        choose_device("cuda:2")


def test_on_a_cpu_nothing_is_compiled_whatever_is_asked(folder: Path) -> None:
    model = Model.load(str(folder), device="cpu", optimize=True)
    assert not model.compiled
    assert len(list(model.stream("Hi", None, Settings(inference_timesteps=1, max_len=2)))) == 2


def test_a_gpu_with_no_room_for_the_model_is_told_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _torchaudio, voxcpm = devices.import_voxcpm()

    def full(*_args: object, **_kwargs: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")

    monkeypatch.setattr(voxcpm, "VoxCPM", full)
    with pytest.raises(EngineError, match=r"out of memory .* fewer slots") as caught:
        Model.load(str(folder))
    assert (caught.value.retryable, caught.value.restart) == (True, True)


# -- the denoiser ------------------------------------------------------------------------------------------------


def test_the_denoiser_is_loaded_only_when_asked_and_says_at_once_what_it_needs(folder: Path) -> None:
    assert not Model.load(str(folder)).can_denoise
    assert "voxcpm.zipenhancer" not in sys.modules
    with pytest.raises(EngineError, match="pip install modelscope torchaudio; or start without -o denoiser"):
        Model.load(str(folder), denoiser=True)


def test_the_denoiser_needs_a_torchaudio_that_writes_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "modelscope" else None)
    with pytest.raises(EngineError, match="needs torchcodec"):
        load_denoiser(TorchaudioInUse("real, our load", "no codec"), offline=False)
    with pytest.raises(EngineError, match="offline forbids"):
        load_denoiser(TorchaudioInUse("real"), offline=True)
    with pytest.raises(EngineError, match="cannot be loaded"):
        load_denoiser(TorchaudioInUse("real"), offline=False)


# -- the fingerprint ---------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_all_that_samples_depend_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = Model.load(str(folder), device="cpu").context

    def mark(dtype: str = "float32", *, compiled: bool = False, context: int = context) -> str:
        return model_fingerprint(folder, device="cpu", dtype=dtype, compiled=compiled, context=context)

    first = mark()
    assert len(first) == 16
    assert mark() == first
    assert Model.load(str(folder), device="cpu").fingerprint == first
    others = {mark("bfloat16"), mark(compiled=True), mark(context=512)}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    others.add(mark())
    for newer in ("", "voxcpm", "soxr", "wetext"):  # the last two read recordings, and numbers
        monkeypatch.undo()
        monkeypatch.setattr(fingerprint, "version", lambda name, newer=newer: "2" if name == newer else "1")
        others.add(mark())
    monkeypatch.undo()
    path = folder / "model.safetensors"
    weights = bytearray(path.read_bytes())
    weights[len(weights) // 2] ^= 1
    path.write_bytes(weights)
    others.add(mark())
    assert first not in others
    assert len(others) == 9


def test_the_fingerprint_of_large_weights_is_of_their_start_end_and_samples(folder: Path) -> None:
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(64 * 1024 * 1024)
    marks = set()
    for at in (None, 0, 64 * 1024 * 1024 - 1, 1024 * 1024, 32 * 1024 * 1024):
        with path.open("r+b") as file:
            if at is not None:
                file.seek(at)
                file.write(b"\xff")
        marks.add(model_fingerprint(folder, device="cpu", dtype="float32", compiled=False, context=1_024))
    assert len(marks) == 5
