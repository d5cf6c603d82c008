"""Translates the errors of voxcpm and torch to messages that say what to do."""

import contextlib
from collections.abc import Iterator

import torch

from gpuworker.engines.base import EngineError


@contextlib.contextmanager
def named_faults(context: int) -> Iterator[None]:
    """Raise known errors of voxcpm and torch as EngineError with advice; other errors pass through."""
    try:
        yield
    except torch.OutOfMemoryError as fault:
        raise EngineError(
            f"the GPU is out of memory ({str(fault).splitlines()[0]}); run fewer slots or rows on it (--slots, "
            "-o batch), or keep other programs off it",
            retryable=True,
            restart=True,
        ) from fault
    except RuntimeError as fault:
        # torch.AcceleratorError since 2.8, a plain RuntimeError before.
        if not str(fault).startswith("CUDA error"):
            raise
        # The state after a failed kernel is undefined: only a new process may use the device again.
        raise EngineError(f"the GPU failed: {str(fault).splitlines()[0]}", retryable=True, restart=True) from fault
    except ValueError as fault:
        if str(fault) != "KV cache is full":
            raise
        raise EngineError(
            f"prompt, text and speech filled the model's context of {context} positions before the speech ended; "
            "shorten the text or the prompt audio, or lower retry_badcase_ratio_threshold"
        ) from fault
