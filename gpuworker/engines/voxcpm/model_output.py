"""The results of a model: encoded prompts, streamed speech, and speech made as a whole."""

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import numpy as np
import torch
from numpy.typing import NDArray

from gpuworker.engines.voxcpm.errors import named_faults

Samples = NDArray[np.float32]


@attrs.frozen(eq=False)
class PromptCache:
    """Encoded prompt audio, usable any number of times.

    Args:
        value: voxcpm's own dict; opaque.
        patches: positions that it takes in the model's context: audio, markers, and the tokens of its text.
        nbytes: size of its tensors in bytes.
    """

    value: dict[str, Any]
    patches: int
    nbytes: int


#: (text spoken, prompt used, latents of shape (steps, patch, dimensions)) -> the prompt to continue from.
Merge = Callable[[str, PromptCache | None, torch.Tensor], PromptCache]


def audio_places(value: Mapping[str, Any]) -> int:
    """Positions in the context taken by the audio in a cache's `value`: patches, and two markers around a reference."""
    places = len(value["audio_feat"]) if "audio_feat" in value else 0
    return places + (len(value["ref_audio_feat"]) + 2 if "ref_audio_feat" in value else 0)


@attrs.frozen(eq=False)
class Whole:
    """Speech made as a whole: `samples` float32 (n,) at the model's rate."""

    samples: Samples
    _latents: torch.Tensor
    _merge: Merge

    def as_prompt(self, text: str, cache: PromptCache | None) -> PromptCache:
        """Make a prompt that continues this speech in the same voice; pass the `text` and `cache` that were spoken."""
        return self._merge(text, cache, self._latents)


class Speech:
    """A text being spoken: iterates over float32 arrays of shape (n,), each as soon as it is made.

    To cancel, close it between two chunks; the model is then ready for the next speech. It closes itself at the end.

    Args:
        chunks: voxcpm's generator.
        context: size of the model's context, for error messages.
        merge: the model's function that makes the prompt to continue from.
    """

    def __init__(self, chunks: Any, context: int, merge: Merge) -> None:
        self._chunks = chunks
        self._context = context
        self._merge = merge
        self._latents: list[torch.Tensor] = []
        self.ended = False

    def __iter__(self) -> "Speech":
        return self

    def __next__(self) -> Samples:
        """Return the next chunk.

        Raises:
            EngineError: the model failed; see `Model.stream`.
        """
        if self.ended:
            raise StopIteration
        try:
            with named_faults(self._context):
                wav, _tokens, latents = next(self._chunks)
        except BaseException:
            self.close()
            raise
        # VoxCPM2 drops older entries from its list, so take the newest each time.
        self._latents.append(latents[-1])
        chunk: Samples = wav.squeeze(0).numpy()
        return chunk

    def close(self) -> None:
        """Stop speaking; does nothing if it has ended."""
        self.ended = True
        self._chunks.close()

    def as_prompt(self, text: str, cache: PromptCache | None) -> PromptCache:
        """Make a prompt that continues this speech in the same voice; pass the `text` and `cache` that were spoken.

        It covers what was spoken, up to the end or to `close`.

        Raises:
            ValueError: nothing was spoken, or the speech has not ended.
        """
        if not self.ended or not self._latents:
            raise ValueError("only a speech that has ended and made audio can be a prompt")
        with torch.inference_mode():
            return self._merge(text, cache, torch.cat(self._latents, dim=1).squeeze(0).cpu())
