"""Low-rank adapters (LoRA) of a VoxCPM model: where their files are, and that all of their weights fit the model."""

import json
from pathlib import Path
from typing import Any

from gpuworker.engines.base import EngineError

#: What voxcpm looks for in a folder, the first that exists; a file is taken by its suffix.
_WEIGHTS = ("lora_weights.safetensors", "lora_weights.ckpt")
_SUFFIXES = (".safetensors", ".ckpt", ".pth")
#: Written by voxcpm's training beside the weights: rank, alpha and the layers. Without it, voxcpm's defaults hold.
_CONFIG = "lora_config.json"


def lora_files(lora: str) -> list[Path]:
    """The files of an adapter, its weights first.

    Raises:
        EngineError: there are no weights.
    """
    path = Path(lora).expanduser()
    weights = next((path / name for name in _WEIGHTS if (path / name).is_file()), None) if path.is_dir() else path
    if weights is None or not weights.is_file() or weights.suffix not in _SUFFIXES:
        raise EngineError(
            f"-o lora={lora}: has no weights of an adapter; give a folder with {' or '.join(_WEIGHTS)}, or such a file"
        )
    config = weights.with_name(_CONFIG)
    return [weights, config] if config.is_file() else [weights]


def lora_config(files: list[Path], make: Any) -> Any:
    """What voxcpm needs to know of an adapter before it loads the model.

    Args:
        files: as `lora_files` returns them.
        make: voxcpm's class of such a config.

    Raises:
        EngineError: its config cannot be used.
    """
    fields: dict[str, Any] = {"enable_lm": True, "enable_dit": True, "enable_proj": False}  # voxcpm's own default
    for file in files[1:]:
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
            fields = dict(raw.get("lora_config", raw))
            return make(**fields)
        except (ValueError, TypeError, AttributeError) as fault:  # pydantic's errors are ValueErrors
            raise EngineError(f"{file} is not the config of an adapter: {fault}") from fault
    return make(**fields)


def load_lora(voxcpm: Any, files: list[Path]) -> None:
    """Load the weights into a model that was made with their config.

    Raises:
        EngineError: they are of another model, rank or set of layers.
    """
    try:
        loaded, skipped = voxcpm.load_lora(str(files[0]))
    except Exception as fault:  # safetensors, pickle and torch each raise classes of their own
        raise EngineError(f"the adapter {files[0]} does not fit the model: {fault}") from fault
    expected = len(voxcpm.get_lora_state_dict())
    if skipped or len(loaded) != expected:
        raise EngineError(
            f"the adapter {files[0]} does not fit the model: {len(loaded)} of the {expected} weights that it must have "
            f"were found, and {len(skipped)} others; its {_CONFIG} must lie beside it"
        )
