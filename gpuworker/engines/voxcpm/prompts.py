"""Finds the voice of a request: fetches, decodes and encodes its prompt and reference audio, and caches the result."""

import hashlib
import time
from collections.abc import Callable, Collection, Mapping

import attrs
import numpy as np
from numpy.typing import NDArray

from gpuworker.engines.base import EngineError, EngineInput, InvalidParams, ProgressChunk
from gpuworker.engines.voxcpm.audio_decode import AudioFault, decode
from gpuworker.engines.voxcpm.fetch import fetch
from gpuworker.engines.voxcpm.model_output import PromptCache
from gpuworker.engines.voxcpm.schema import MAX_INPUT_BYTES
from gpuworker.engines.voxcpm.speech_model import SpeechModel
from gpuworker.engines.voxcpm.url_policy import FetchRefused
from gpuworker.engines.voxcpm.voices import PromptCaches, Voice
from protocol.wire.validators import Value

#: Time for a fetch. It is part of the run, so a slot waits for it.
FETCH_S = 20.0
SIGN_OF_LIFE_S = 3.0


class Stopped(Exception):
    """The run was cancelled."""


@attrs.frozen
class Source:
    """Audio of a voice: the field in which it was sent, its bytes, and its cache key."""

    field: str
    data: bytes
    digest: str


@attrs.frozen
class Prompt:
    """An encoded voice, and the field in which it was sent."""

    cache: PromptCache
    field: str


@attrs.frozen(kw_only=True)
class Prompts:
    """Finds the voice that a request asks for.

    Args:
        model: encodes the audio.
        voices: the voices of this worker, by name.
        hosts: hosts from which audio may be fetched, as returned by `parse_hosts`.
        max_prompt_s: longest audio, in seconds.
        caches: the cache of encoded prompts.
    """

    model: SpeechModel
    voices: Mapping[str, Voice]
    hosts: Collection[str]
    max_prompt_s: float
    caches: PromptCaches[PromptCache]

    def find(
        self,
        params: Mapping[str, Value],
        inputs: Mapping[str, EngineInput],
        *,
        described: bool,
        cancelled: Callable[[], bool],
        report: Callable[[ProgressChunk], None],
    ) -> Prompt | None:
        """Return the encoded voice of a request; None if it names no voice and sends no audio.

        Args:
            params: its params, which satisfy the schema and the rules.
            inputs: `prompt_wav`, `reference_wav`.
            described: whether a description of the voice precedes the text.
            cancelled: returns whether to stop.
            report: receives a sign of life every few seconds of a fetch.

        Raises:
            InvalidParams: the request's audio cannot be fetched or used.
            EngineError: the worker's own audio cannot be used, or the model failed.
            Stopped: the run was cancelled.
        """
        text = params.get("prompt_text")
        if (name := params.get("voice")) is not None:
            if (voice := self.voices.get(name)) is None:  # the folder changed, and another slot announced the voice
                raise EngineError(f"this slot no longer has the voice {name!r}; the worker's owner must restart it")
            source = Source("voice", voice.read(), voice.digest)
            reference = source if self.model.clones else None
            # A described voice is cloned from its reference only: a prompt would keep its own way of speaking.
            prompt = source if voice.text is not None and not (reference and described) else None
            text = voice.text if prompt else None
        else:
            prompt = self._source("prompt_wav", params, inputs, cancelled, report)
            reference = self._source("reference_wav", params, inputs, cancelled, report)
        if (first := prompt or reference) is None:
            return None
        cache = self._encoded(prompt, text, reference, params["denoise"], cancelled)
        if cancelled():
            raise Stopped
        return Prompt(cache, first.field)

    def _source(
        self,
        name: str,
        params: Mapping[str, Value],
        inputs: Mapping[str, EngineInput],
        cancelled: Callable[[], bool],
        report: Callable[[ProgressChunk], None],
    ) -> Source | None:
        signed_at = time.monotonic()

        def waiting() -> bool:
            # By the clock: an engine that fetches is not reproducible. A batch that is silent for long is killed.
            nonlocal signed_at
            if time.monotonic() - signed_at > SIGN_OF_LIFE_S:
                signed_at = time.monotonic()
                report(ProgressChunk("loading"))
            return cancelled()

        if name in inputs:
            field, data = name, inputs[name].data
        elif (url := params.get(f"{name}_url")) is not None:
            field = f"{name}_url"
            try:
                data = fetch(url, self.hosts, max_bytes=MAX_INPUT_BYTES, timeout_s=FETCH_S, cancelled=waiting)
            except FetchRefused as fault:
                if cancelled():
                    raise Stopped from None
                raise InvalidParams({field: str(fault)}) from None
        else:
            return None
        return Source(field, data, hashlib.sha256(data).hexdigest())

    def _encoded(
        self,
        prompt: Source | None,
        prompt_text: str | None,
        reference: Source | None,
        denoise: bool,
        cancelled: Callable[[], bool],
    ) -> PromptCache:
        what = (prompt and prompt.digest, prompt_text, reference and reference.digest, denoise)
        key = hashlib.sha256(repr(what).encode()).hexdigest()
        if (known := self.caches.get(key)) is not None:
            return known
        samples: dict[str, NDArray[np.float32]] = {}
        faults: dict[str, str] = {}
        for source in (prompt, reference):
            if source is not None and source.field not in samples:
                try:
                    samples[source.field] = decode(
                        source.data, rate=self.model.prompt_rate, max_seconds=self.max_prompt_s
                    )
                except AudioFault as fault:
                    faults[source.field] = str(fault)
        if faults:
            raise InvalidParams(faults)
        if cancelled():
            raise Stopped
        encoded = self.model.encode(
            prompt=samples[prompt.field] if prompt else None,
            prompt_text=prompt_text,
            reference=samples[reference.field] if reference else None,
            denoise=denoise,
        )
        self.caches.put(key, encoded, encoded.nbytes)
        return encoded
