"""The results of a model: encoded prompts, a speech that streams, and a speech made as a whole."""

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
    """Encoded prompt audio, to speak with any number of times.

    Args:
        value: voxcpm's own dict; opaque.
        patches: places it takes in the model's context: audio, markers, and the tokens of its text.
        nbytes: of its tensors.
    """

    value: dict[str, Any]
    patches: int
    nbytes: int


#: From the text spoken, what it was spoken with and its latents (steps, patch, dimensions): the prompt to go on from.
Merge = Callable[[str, PromptCache | None, torch.Tensor], PromptCache]


def audio_places(value: Mapping[str, Any]) -> int:
    """Places in the context of the audio in a cache's `value`: its patches, and two markers round a reference."""
    places = len(value["audio_feat"]) if "audio_feat" in value else 0
    return places + (len(value["ref_audio_feat"]) + 2 if "ref_audio_feat" in value else 0)


@attrs.frozen(eq=False)
class Whole:
    """Speech made as a whole: `samples` float32 (n,) at the model's rate."""

    samples: Samples
    _latents: torch.Tensor
    _merge: Merge

    def as_prompt(self, text: str, cache: PromptCache | None) -> PromptCache:
        """A prompt with which the next speech continues in the same voice; `text` and `cache` as they were spoken."""
        return self._merge(text, cache, self._latents)


class Speech:
    """A text being spoken: iterates float32 arrays of shape (n,), each as soon as it is made.

    Close it to cancel, between two chunks; the model is then ready for the next. It is closed once it has ended.

    Args:
        chunks: voxcpm's generator.
        context: places of the model, for the words of an error.
        merge: of the model.
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
        """The next chunk.

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
        # VoxCPM2 drops older ones from its list, so the newest is taken each time.
        self._latents.append(latents[-1])
        chunk: Samples = wav.squeeze(0).numpy()
        return chunk

    def close(self) -> None:
        """Stop speaking. Does nothing once it has ended."""
        self.ended = True
        self._chunks.close()

    def as_prompt(self, text: str, cache: PromptCache | None) -> PromptCache:
        """A prompt from which the next speech goes on in the same voice; `text` and `cache` as they were spoken.

        Of as much as was made: after the end, or after `close`.

        Raises:
            ValueError: nothing was made, or it still speaks.
        """
        if not self.ended or not self._latents:
            raise ValueError("a speech is a prompt once it has ended, if it made any audio")
        with torch.inference_mode():
            return self._merge(text, cache, torch.cat(self._latents, dim=1).squeeze(0).cpu())
