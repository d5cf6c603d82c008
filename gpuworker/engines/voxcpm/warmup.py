"""Runs a newly loaded model, to pay the cost of the first runs and to check that the model is reproducible."""

import hashlib
from collections.abc import Iterator
from contextlib import closing
from itertools import islice

import attrs
import numpy as np
from numpy.typing import NDArray

from gpuworker.engines.voxcpm.model_output import PromptCache
from gpuworker.engines.voxcpm.speech_model import Settings, SpeechModel

TEXT = "Hello, this is the first sentence."
#: Steps in one run. The first after a prompt differs from the rest, and a CUDA graph is replayed from the third on.
STEPS = 4
TONE_HZ, TONE_S = 220.0, 0.5


@attrs.frozen
class WarmUp:
    """The result of the first runs.

    Args:
        digest: of their samples, 16 hex digits. Processes with different digests make different samples even if
            everything else is equal: CUDA kernels are chosen by timing them, and CPUs differ in rounding.
        repeats: whether the same seed made the same samples each time.
    """

    digest: str
    repeats: bool


def warm_up(model: SpeechModel, runs: int) -> WarmUp:
    """Speak a few steps in every way that a request may ask for, `runs` times.

    The prompt is read like an uploaded one, because the first file that librosa reads takes it seconds.

    Raises:
        EngineError: the model cannot speak.
    """
    times = np.arange(round(TONE_S * model.prompt_rate), dtype=np.float32) / model.prompt_rate
    tone = (0.3 * np.sin(2 * np.pi * TONE_HZ * times)).astype(np.float32)
    digests = set()
    for _ in range(runs):
        prompt = model.encode(prompt=tone, prompt_text="Ah.", reference=tone if model.clones else None)
        digest = hashlib.sha256()
        for cache in (None, prompt):
            for samples in _short_run(model, cache):
                digest.update(samples.tobytes())
        digests.add(digest.hexdigest()[:16])
    return WarmUp("".join(sorted(digests))[:16], repeats=len(digests) == 1)


def _short_run(model: SpeechModel, cache: PromptCache | None) -> Iterator[NDArray[np.float32]]:
    settings = Settings(cfg_value=2.0, inference_timesteps=4, max_len=STEPS, retry_badcase=False)
    model.seed(0)
    with closing(model.stream(TEXT, cache, settings)) as speech:
        yield from islice(speech, STEPS)
    yield model.whole(TEXT, cache, settings, lambda _step: None).samples
