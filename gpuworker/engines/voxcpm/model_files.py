"""Finds a model's files, in a given folder or a snapshot from the Hugging Face hub, and checks that none is missing."""

import io
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpuworker.engines.base import EngineError

ARCHITECTURES = ("voxcpm2", "voxcpm")
#: "owner/name": a name on the hub, which as a path could only be a relative one of two parts.
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
#: The files that voxcpm reads, each with its alternatives.
_FILES = (
    ("config.json",),
    ("model.safetensors", "pytorch_model.bin"),
    ("audiovae.safetensors", "audiovae.pth"),
    ("tokenizer.json", "tokenizer.model"),
)
#: Time between two progress reports of a download.
TELL_S = 10.0

#: Called with the bytes of a download that have arrived, and the total (of the files begun; 0 if not known).
Fetched = Callable[[int, int], None]


def to_nobody(_had: int, _total: int) -> None:
    """Ignore the progress."""


def find_folder(
    model: str, *, offline: bool = False, revision: str | None = None, fetched: Fetched = to_nobody
) -> Path:
    """The folder of `model`, fetched from the hub if need be and allowed.

    Args:
        model: a folder, or a hub id such as `openbmb/VoxCPM2`.
        offline: take what is on disk alone.
        revision: of the hub's repository, a commit or tag; None takes its newest.
        fetched: called every `TELL_S` of a download at the most, and only where more has come; by any one thread.

    Raises:
        EngineError: it is neither, or the hub does not give it.
    """
    if model and (folder := _expanded(model)).is_dir():
        return folder
    if not _REPOSITORY.fullmatch(model):
        raise EngineError(
            f"model {model!r} is neither a folder nor a hub id; give a folder with the model's files, or an id "
            "such as openbmb/VoxCPM2"
        )
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(
            snapshot_download(model, revision=revision, local_files_only=offline, tqdm_class=_bar_class(fetched))
        )
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as fault:
        off = offline or isinstance(fault.__cause__ or fault, errors.OfflineModeIsEnabled)
        raise EngineError(_not_here(model, off)) from fault
    except errors.GatedRepoError as fault:
        raise EngineError(f"model {model} wants an account that was let in: `hf auth login` first") from fault
    except errors.RevisionNotFoundError as fault:
        raise EngineError(f"model {model} has no revision {revision!r} on the Hugging Face hub") from fault
    except errors.RepositoryNotFoundError as fault:
        raise EngineError(f"the Hugging Face hub has no {model}; is it spelled right, or is it a folder?") from fault
    except (errors.HfHubHTTPError, OSError) as fault:
        raise EngineError(f"model {model} could not be fetched ({fault}); try again, or give a folder") from fault


def _bar_class(fetched: Fetched) -> Any:
    """A progress bar for the hub's library that draws nothing."""
    from tqdm.std import tqdm

    most, next_at = 0, 0.0

    class Bar(tqdm):  # type: ignore[misc]  # it has no types
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": False, "file": io.StringIO()})

        def display(self, *_args: object, **_kwargs: object) -> bool:
            """Called under tqdm's lock; also by its monitor if nothing has arrived for long."""
            nonlocal most, next_at
            if self.unit == "B" and self.n > most and time.monotonic() >= next_at:
                most, next_at = int(self.n), time.monotonic() + TELL_S
                fetched(most, int(self.total or 0))
            return True

    return Bar


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # "~name" of an unknown user
        return Path(path)


def _not_here(model: str, offline: bool) -> str:
    why = "fetching is switched off (offline)" if offline else "the Hugging Face hub cannot be reached"
    return (
        f"model {model} is neither a folder here nor in this machine's Hugging Face cache, and {why}; fetch it once "
        f"with `hf download {model}`, or give the folder of its files"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json, once all that voxcpm reads is there.

    Raises:
        EngineError: a file is missing or is not a config, or the architecture is not one of voxcpm's.
    """
    lacks = [" or ".join(names) for names in _FILES if not any((folder / name).is_file() for name in names)]
    if lacks:
        raise EngineError(f"{folder} contains no VoxCPM model: {', '.join(lacks)} missing; was the download cut off?")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as fault:
        raise EngineError(f"{folder / 'config.json'} is not JSON ({fault}); fetch the model again") from fault
    arch = str(config.get("architecture", "voxcpm")).lower() if isinstance(config, dict) else "none"
    if arch not in ARCHITECTURES:
        known = " and ".join(ARCHITECTURES)
        raise EngineError(f"{folder} holds a model of architecture {arch!r}; voxcpm speaks {known}")
    return dict(config)
