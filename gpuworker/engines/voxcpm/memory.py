"""Estimates how much memory a VoxCPM model needs in its slots or rows, and how much is free, before it is loaded.

The estimates come from the checkpoint's files if they are on this machine, else from a table of the released models.
They exist to refuse a start that cannot succeed; `-o check_memory=false` overrides them.
"""

import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from gpuworker.engines.base import Missing

GIB = 1024**3
#: What a slot needs on a GPU in addition to its model: the CUDA context, kernels and their workspace, activations, and
#: the graphs of torch.compile. With it, VoxCPM2 needs the "~8 GB" stated in the VoxCPM project's README; the "~6 GB"
#: and "~5 GB" stated for the smaller models exceed the size of their files by more.
CUDA_OVERHEAD_BYTES = 5 * GIB // 2
#: The same on a CPU: the interpreter, torch and librosa need 0.6 GiB before anything is computed.
CPU_OVERHEAD_BYTES = GIB
#: What a step of a batch computes for one row: mostly the widest layers of the VAE, some MiB each with VoxCPM2.
ROW_BYTES = 32 * 1024**2
NVIDIA_SMI_S = 10.0
#: Longest header of a safetensors file; those of the released models have 100 KB.
MAX_HEADER_BYTES = 64 * 1024 * 1024
#: Names used by `get_dtype` of voxcpm 2.0.3. The VAE is always float32 (`from_local`).
_ELEMENT_BYTES = {"bfloat16": 2, "bf16": 2, "float16": 2, "fp16": 2, "float32": 4, "fp32": 4}
_FLOAT32_BYTES = 4
MEMINFO = Path("/proc/meminfo")


@attrs.frozen(kw_only=True)
class Need:
    """The memory that a model needs, in bytes.

    Args:
        weights: language models and everything around them, in the dtype used for computing.
        vae: the audio VAE, in float32.
        cache: the KV caches of both language models, which are allocated in full at load.
        places: positions in those caches, which is the size of the model's context.
        building: main memory needed while it loads: voxcpm first builds the model there in float32, on any device.
    """

    weights: int
    vae: int
    cache: int
    places: int
    building: int

    def with_context(self, places: int) -> "Need":
        """The need with caches of this many positions; 0, or more than the model has, leaves them as they are."""
        if not 0 < places < self.places:
            return self
        return attrs.evolve(self, cache=self.cache // self.places * places, places=places)

    @property
    def model(self) -> int:
        """The bytes of a loaded model."""
        return self.weights + self.vae + self.cache


def _released(parameters: int, vae_parameters: int, layers: int, head: int, context: int) -> Need:
    kv_heads = 2
    return Need(
        weights=2 * parameters,
        vae=_FLOAT32_BYTES * vae_parameters,
        cache=2 * 2 * layers * kv_heads * head * context,
        places=context,
        building=_FLOAT32_BYTES * (parameters + vae_parameters),
    )


#: The released models, all bfloat16. Parameters were counted by `parameter_count` of the tests' checkpoints, except for
#: 1.5: the 0.8B of the VoxCPM README. Layers are those of both language models; for the sources see that module.
RELEASED: Mapping[str, Need] = {
    "openbmb/voxcpm2": _released(2_290_004_544, 94_213_957, 28 + 8, 128, 8_192),
    "openbmb/voxcpm1.5": _released(800_000_000, 95_000_000, 24 + 8, 64, 8_192),
    "openbmb/voxcpm-0.5b": _released(652_287_296, 75_355_202, 24 + 6, 64, 4_096),
}


# -- what a model needs ------------------------------------------------------------------------------------------


def need_of(model: str, context: int = 0) -> Need | None:
    """The memory that a model needs; None if unknown, for example for a fine-tuned model that is not downloaded yet.

    Args:
        model: the value of option `model`: a folder, or a Hugging Face id.
        context: the value of option `context`: positions in the KV caches; 0 for as many as the model has.
    """
    folder = _folder(model)
    need = _need_of_files(folder) if folder is not None else None
    need = need or RELEASED.get(model.lower())
    return need and need.with_context(context)


def _folder(model: str) -> Path | None:
    """The folder of a model's files: the given one, or its snapshot in the Hugging Face cache."""
    if Path(model).is_dir():
        return Path(model)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        return None
    cache = _cache() / f"models--{model.replace('/', '--')}"
    try:
        revision = (cache / "refs" / "main").read_text().strip()
    except OSError:
        return None
    snapshot = cache / "snapshots" / revision
    return snapshot if revision and snapshot.is_dir() else None


def _cache() -> Path:
    if cache := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(cache).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{caches}/huggingface").expanduser() / "hub"


def _need_of_files(folder: Path) -> Need | None:
    """Compute the need from the files of a checkpoint; None if they are incomplete or not as expected."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        width = _ELEMENT_BYTES[str(config.get("dtype", "bfloat16"))]
        elements = _elements(folder / "model.safetensors", folder / "pytorch_model.bin", width)
        vae_elements = _elements(folder / "audiovae.safetensors", folder / "audiovae.pth", _FLOAT32_BYTES)
        places = int(config.get("max_length", 8_192))
        return Need(
            weights=width * elements,
            vae=_FLOAT32_BYTES * vae_elements,
            cache=_place_elements(config) * width * places,
            places=places,
            building=_FLOAT32_BYTES * (elements + vae_elements),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        return None


def _elements(tensors: Path, pickled: Path, width: int) -> int:
    """The number of values in a weights file, from the safetensors header, or a pickle's size at `width` bytes each."""
    if not tensors.is_file():
        return pickled.stat().st_size // width
    with tensors.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"{tensors}: not a safetensors file")
        header: dict[str, Any] = json.loads(file.read(size))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def _place_elements(config: dict[str, Any]) -> int:
    """The number of values for one position in both KV caches, as allocated by `setup_cache` of voxcpm 2.0.3."""
    lm = config["lm_config"]
    head = lm.get("kv_channels") or lm["hidden_size"] // lm["num_attention_heads"]
    layers = lm["num_hidden_layers"] + config.get("residual_lm_num_layers", 8)
    return int(2 * layers * lm["num_key_value_heads"] * head)


# -- what is free ------------------------------------------------------------------------------------------------


@attrs.frozen
class Free:
    """Free memory: its size in bytes, its name, and whether it is a GPU's or main memory."""

    size: int
    where: str
    gpu: bool


def free_memory(device: str) -> Free | None:
    """The free memory where option `device` would place a model; None if unknown.

    It is read with nvidia-smi, which needs no Python package. nvidia-smi numbers GPUs by PCI bus, but CUDA by speed
    unless CUDA_DEVICE_ORDER is PCI_BUS_ID: set that if the GPUs differ, or the figures may be those of another GPU.
    """
    device = device.strip().lower()
    if device == "cpu":
        return free_main_memory()
    if device != "auto" and not re.fullmatch(r"cuda(:\d+)?", device):
        return None
    if shutil.which("nvidia-smi") is None:
        return free_main_memory() if device == "auto" else None
    gpus = _visible(_gpus())
    if gpus is None:
        return None
    if not gpus:
        return free_main_memory() if device == "auto" else None
    number = int(device.partition(":")[2] or 0)
    return gpus[number] if number < len(gpus) else None


def free_main_memory() -> Free | None:
    """The memory that programs can still use without swapping."""
    try:
        meminfo = MEMINFO.read_text()
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo, re.MULTILINE)
    return Free(int(found[1]) * 1024, "this machine", gpu=False) if found else None


def _gpus() -> dict[str, Free] | None:
    """The free memory by index and UUID of each GPU; None if nvidia-smi does not report it."""
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.free,name", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    gpus = {}
    for line in output.splitlines():
        fields = [field.strip() for field in line.split(",", 3)]
        if len(fields) != 4 or not fields[2].isdigit():  # "[N/A]" for a GPU split into MIG instances
            return None
        gpus[f"{fields[0]} {fields[1]}"] = Free(int(fields[2]) * 1024**2, fields[3], gpu=True)
    return gpus


def _visible(gpus: dict[str, Free] | None) -> list[Free] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES allows, in its order; None if they cannot be determined."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpus is None or chosen is None:
        return None if gpus is None else list(gpus.values())
    if chosen.strip().startswith("MIG-"):
        return None
    visible = []
    for name in filter(None, map(str.strip, chosen.split(","))):
        # An index, or the beginning of a UUID; CUDA stops at the first one that it does not know.
        matches = [gpu for key, gpu in gpus.items() if key.split()[0] == name or key.split()[1].startswith(name)]
        if len(matches) != 1:
            break
        visible += matches
    return visible


# -- the comparison ----------------------------------------------------------------------------------------------


@attrs.frozen
class _Demand:
    """What a worker asks for: models side by side, or rows of one model.

    Args:
        fixed: bytes needed however many there are.
        each: bytes of one slot or row.
        count: how many slots or rows.
        words: the same in words.
    """

    fixed: int
    each: int
    count: int
    words: str

    @classmethod
    def of(cls, need: Need, model: str, slots: int, rows: int, *, gpu: bool) -> "_Demand":
        if rows == 1:
            return cls(0, slot_bytes(need, gpu=gpu), slots, f"{slots} slot{'' if slots == 1 else 's'} of {model}")
        return cls(slot_bytes(need, gpu=gpu) - need.cache, row_bytes(need), rows, f"{rows} rows of one {model}")

    @property
    def size(self) -> int:
        return self.fixed + self.each * self.count

    def fit(self, room: int) -> int:
        """How many slots or rows fit."""
        return max(0, (room - self.fixed) // self.each)


def lacking_memory(model: str, device: str, slots: int, context: int = 0, rows: int = 1) -> list[Missing]:
    """The memory that `slots` of a model, or so many `rows` of one, lack; empty if they fit, or if it is not known."""
    need, free = need_of(model, context), free_memory(device)
    if need is None or free is None:
        return []
    demand = _Demand.of(need, model, slots, rows, gpu=free.gpu)
    room = _room(need, free)
    lacks = []
    if demand.size > room:
        fit = demand.fit(room)
        advice = f"use --slots {fit}" if rows == 1 else f"use -o batch={fit}, or a smaller -o context"
        if not fit:
            advice = "not one fits; free some, or use a smaller model (openbmb/VoxCPM-0.5B)"
        what = (
            f"about {_gib(free.size - room + demand.size)} of {_kind(free)} for {demand.words}, "
            f"{_gib(free.size)} are free on {free.where}; {advice}; -o check_memory=false starts them anyway"
        )
        lacks.append(Missing(what))
    if free.gpu and (main := free_main_memory()) is not None and main.size < need.building:
        what = (
            f"about {_gib(need.building)} of main memory while {model} loads, {_gib(main.size)} are free on "
            "this machine; free some, or add swap; -o check_memory=false tries anyway"
        )
        lacks.append(Missing(what))
    return lacks


def memory_outlook(model: str, device: str, slots: int, context: int = 0, rows: int = 1) -> str:
    """Describe in a sentence how much of the free memory `slots` of a model, or so many `rows` of one, need."""
    need, free = need_of(model, context), free_memory(device)
    if need is None:
        return f"how much memory {model} needs is not known until it is downloaded"
    demand = _Demand.of(need, model, slots, rows, gpu=free is None or free.gpu)
    text = f"{demand.words} {'needs' if demand.count == 1 else 'need'} about {_gib(demand.size)}"
    if free is None:
        return f"{text}; how much is free is not known"
    room = f", which has room for {demand.fit(_room(need, free))} rows" if rows > 1 else ""
    return f"{text} of {_kind(free)}, {_gib(free.size)} are free on {free.where}{room}"


def _room(need: Need, free: Free) -> int:
    """What models may take of the free memory: in main memory, the last of them is built too."""
    return free.size if free.gpu else free.size - (need.building - need.weights)


def slot_bytes(need: Need, *, gpu: bool) -> int:
    """The memory that one slot needs, for the model and the overhead."""
    return need.model + (CUDA_OVERHEAD_BYTES if gpu else CPU_OVERHEAD_BYTES)


def row_bytes(need: Need) -> int:
    """The memory that one row of a batch needs, beside the model: its KV caches, and what a step computes for it."""
    return need.cache + ROW_BYTES


def _kind(free: Free) -> str:
    return "GPU memory" if free.gpu else "memory"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
