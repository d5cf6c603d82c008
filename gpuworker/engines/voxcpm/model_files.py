"""Finds a model's files, in a given folder or a snapshot from the Hugging Face hub, and checks that all are present."""

import io
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpuworker.engines.base import EngineError

ARCHITECTURES = ("voxcpm2", "voxcpm")
#: "owner/name": a name on the hub; read as a path, it could only be a relative one with two parts.
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
#: The files that voxcpm reads; each entry lists alternatives.
_FILES = (
    ("config.json",),
    ("model.safetensors", "pytorch_model.bin"),
    ("audiovae.safetensors", "audiovae.pth"),
    ("tokenizer.json", "tokenizer.model"),
)
#: Shortest time between two progress reports of a download.
REPORT_S = 10.0

#: Called with the bytes of a download that have arrived, and the total (of the files begun; 0 if unknown).
Fetched = Callable[[int, int], None]


def ignore_progress(_had: int, _total: int) -> None:
    """Ignore the progress."""


def find_folder(
    model: str, *, offline: bool = False, revision: str | None = None, fetched: Fetched = ignore_progress
) -> Path:
    """The folder of `model`; fetched from the hub if necessary and allowed.

    Args:
        model: a folder, or a hub id such as `openbmb/VoxCPM2`.
        offline: use only what is on disk.
        revision: commit or tag in the hub's repository; None uses the newest.
        fetched: called during a download, at most every `REPORT_S` and only if more has arrived, from one thread at a
            time.

    Raises:
        EngineError: `model` is neither a folder nor a hub id, or the hub does not provide it.
    """
    if model and (folder := _expanded(model)).is_dir():
        return folder
    if not _REPOSITORY.fullmatch(model):
        raise EngineError(_neither(model))
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(
            snapshot_download(model, revision=revision, local_files_only=offline, tqdm_class=_bar_class(fetched))
        )
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as fault:
        off = offline or isinstance(fault.__cause__ or fault, errors.OfflineModeIsEnabled)
        raise EngineError(_not_here(model, off)) from fault
    except errors.GatedRepoError as fault:
        raise EngineError(f"model {model} requires an account with access to it: run `hf auth login` first") from fault
    except errors.RevisionNotFoundError as fault:
        raise EngineError(f"model {model} has no revision {revision!r} on the Hugging Face hub") from fault
    except errors.RepositoryNotFoundError as fault:
        raise EngineError(f"the Hugging Face hub has no model {model}; check the spelling, or give a folder") from fault
    except (errors.HfHubHTTPError, OSError) as fault:
        raise EngineError(f"model {model} could not be fetched ({fault}); try again, or give a folder") from fault


def fault_of(model: str) -> str | None:
    """Say what is wrong with `model` without fetching anything; None if it can be tried."""
    if model and (folder := _expanded(model)).is_dir():
        try:
            read_config(folder)
        except EngineError as fault:
            return str(fault)
        return None
    return None if _REPOSITORY.fullmatch(model) else _neither(model)


def _neither(model: str) -> str:
    return (
        f"model {model!r} is neither a folder nor a hub id; give a folder with the model's files, or an id "
        "such as openbmb/VoxCPM2"
    )


def _bar_class(fetched: Fetched) -> Any:
    """Make a class of progress bars for the hub's library that call `fetched` and draw nothing."""
    from tqdm.std import tqdm

    most, next_at = 0, 0.0

    class Bar(tqdm):  # type: ignore[misc]  # tqdm is untyped
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": False, "file": io.StringIO()})

        def display(self, *_args: object, **_kwargs: object) -> bool:
            """Called under tqdm's lock; also by its monitor thread if nothing has arrived for long."""
            nonlocal most, next_at
            if self.unit == "B" and self.n > most and time.monotonic() >= next_at:
                most, next_at = int(self.n), time.monotonic() + REPORT_S
                fetched(most, int(self.total or 0))
            return True

    return Bar


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # "~name" of an unknown user
        return Path(path)


def _not_here(model: str, offline: bool) -> str:
    why = "downloads are disabled (offline)" if offline else "the Hugging Face hub cannot be reached"
    return (
        f"model {model} is neither a folder here nor in this machine's Hugging Face cache, and {why}; fetch it once "
        f"with `hf download {model}`, or give the folder of its files"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Read the model's config.json, after checking that all files that voxcpm reads are present.

    Raises:
        EngineError: a file is missing or not a config, or the architecture is not supported by voxcpm.
    """
    lacks = [" or ".join(names) for names in _FILES if not any((folder / name).is_file() for name in names)]
    if lacks:
        raise EngineError(f"{folder} is not a complete VoxCPM model: {', '.join(lacks)} missing; download it again")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as fault:
        raise EngineError(f"{folder / 'config.json'} is not JSON ({fault}); fetch the model again") from fault
    arch = str(config.get("architecture", "voxcpm")).lower() if isinstance(config, dict) else "none"
    if arch not in ARCHITECTURES:
        known = " and ".join(ARCHITECTURES)
        raise EngineError(f"{folder} contains a model of architecture {arch!r}; voxcpm supports {known}")
    return dict(config)
