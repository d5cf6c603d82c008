"""What a run needs of a model: the methods that speak, and how to speak.

A `Model` has them for one run at a time, each `Seat` of a batch for one of many.
"""

from collections.abc import Callable
from typing import Protocol

import attrs

from gpuworker.engines.voxcpm.model_output import PromptCache, Samples, Speech, Whole

#: Steps that the package adds to tokens * ratio.
SPARE_STEPS = 10


@attrs.frozen(kw_only=True)
class Settings:
    """How to speak; the names are those of voxcpm's `generate`.

    Args:
        min_len: the fewest steps before the speech may end.
        max_len: the most steps; `int(tokens * ratio_threshold + 10)` is a limit too.
        retry_badcase: used only by `whole`: speak again if the speech is suspiciously long.
        retry_badcase_max_times: attempts in total, including the first, as voxcpm counts them; 0 means no retry.
        ratio_threshold: steps per token of text above which speech is suspiciously long.
    """

    cfg_value: float = 2.0
    inference_timesteps: int = 10
    min_len: int = 2
    max_len: int = 4_096
    retry_badcase: bool = False
    retry_badcase_max_times: int = 3
    ratio_threshold: float = 6.0

    def most_steps(self, tokens: int) -> int:
        """The number of steps after which the package ends the speech of this many tokens."""
        return min(int(tokens * self.ratio_threshold + SPARE_STEPS), self.max_len)


class SpeechModel(Protocol):
    """The part of `Model` that runs use; its docstrings apply."""

    clones: bool
    sample_rate: int
    prompt_rate: int
    context: int

    def tokens(self, text: str) -> int:
        """See `Model.tokens`."""

    def normalize(self, text: str) -> str:
        """See `Model.normalize`."""

    def encode(
        self, *, prompt: Samples | None, prompt_text: str | None, reference: Samples | None, denoise: bool = False
    ) -> PromptCache:
        """See `Model.encode`."""

    def seed(self, seed: int) -> None:
        """See `Model.seed`."""

    def stream(self, text: str, cache: PromptCache | None, settings: Settings) -> Speech:
        """See `Model.stream`."""

    def whole(self, text: str, cache: PromptCache | None, settings: Settings, on_step: Callable[[int], None]) -> Whole:
        """See `Model.whole`."""
