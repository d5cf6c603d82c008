"""Wraps the voxcpm package in one class: it loads, encodes prompts, speaks, and raises errors that say what to do.

One model speaks one text at a time, ever: voxcpm keeps the KV cache and the decoder's state in the model, so a second
stream would corrupt the first without a word, and `Model` refuses it. All calls come from one thread (CUDA graphs are
bound to theirs).
"""

import importlib.util
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import soundfile
import torch

from gpuworker.engines.base import EngineError, InvalidParams
from gpuworker.engines.voxcpm.devices import choose_device, import_voxcpm, known_warnings, load_denoiser, log
from gpuworker.engines.voxcpm.errors import named_faults
from gpuworker.engines.voxcpm.fingerprint import model_fingerprint
from gpuworker.engines.voxcpm.model_files import Fetched, find_folder, read_config, to_nobody
from gpuworker.engines.voxcpm.model_output import PromptCache as PromptCache
from gpuworker.engines.voxcpm.model_output import Samples, Speech, Whole, audio_places

#: Patches of prompt audio that VoxCPM 1.x decodes before the speech and cuts off again. A shorter prompt would cost
#: the first patches of the speech (`decode_audio[..., patch_len * (streaming_prefix_len - 1):]` in voxcpm 2.0.3).
_CONTEXT_PATCHES_1X = 2


@attrs.frozen(kw_only=True)
class Settings:
    """How to speak; the names are those of voxcpm's `generate`.

    Args:
        min_len: steps before speech may end.
        max_len: steps at most; `int(tokens * ratio_threshold + 10)` caps them too.
        retry_badcase: of `whole` alone: speak again where the speech is suspiciously long.
        retry_badcase_max_times: tries in all, the first counted, as voxcpm counts them; 0 is no retry.
        ratio_threshold: steps per token of text from which on it is suspicious.
    """

    cfg_value: float = 2.0
    inference_timesteps: int = 10
    min_len: int = 2
    max_len: int = 4_096
    retry_badcase: bool = False
    retry_badcase_max_times: int = 3
    ratio_threshold: float = 6.0


class Model:
    """One loaded VoxCPM model.

    Attributes:
        arch: "voxcpm2" or "voxcpm" (1.5 and 0.5B).
        sample_rate: of the speech, Hz.
        chunk_samples: in each chunk of a stream, all alike.
        prompt_rate: of prompt and reference audio, Hz.
        context: places for prompt, text and speech together: text takes one a token, audio one a patch (a chunk).
        clones: whether it takes reference audio, and a description of the voice before the text (VoxCPM2).
        device: what it runs on: "cuda:1", "cpu" …
        compiled: by torch.compile.
        fingerprint: see `model_fingerprint`.
        can_normalize: text normalization is installed.
        can_denoise: the denoiser is loaded.
    """

    def __init__(self, voxcpm: Any, *, arch: str, device: str, compiled: bool, fingerprint: str, denoiser: Any) -> None:
        self._voxcpm = voxcpm
        self._tts = tts = voxcpm.tts_model
        self._denoiser = denoiser
        self._normalizer: Any = None
        self._speaking: weakref.ref[Speech] | None = None
        self.arch = arch
        self.clones = arch == "voxcpm2"
        self.sample_rate = int(tts.sample_rate)
        self.prompt_rate = int(tts.audio_vae.sample_rate)
        hop = tts.audio_vae.decode_chunk_size if self.clones else tts.audio_vae.chunk_size
        self.chunk_samples = int(tts.patch_size * hop)
        self.context = int(tts.base_lm.kv_cache.max_length)
        self.device = device
        self.compiled = compiled
        self.fingerprint = fingerprint
        self.can_normalize = all(importlib.util.find_spec(name) for name in ("wetext", "inflect", "regex"))
        self.can_denoise = denoiser is not None

    @classmethod
    def load(
        cls,
        model: str,
        *,
        device: str = "auto",
        optimize: bool = True,
        denoiser: bool = False,
        offline: bool = False,
        revision: str | None = None,
        fetched: Fetched = to_nobody,
    ) -> "Model":
        """Read a model and put it on a device. It has not spoken yet: the first speech is slower than the others.

        Args:
            model: folder, or Hugging Face id.
            device: auto, cpu, mps, cuda or cuda:N.
            optimize: compile it, on CUDA only; voxcpm then speaks a few steps itself.
            denoiser: load the denoiser too; it is fetched from ModelScope.
            offline: no network.
            revision: of the hub's repository.
            fetched: told how far a download is, as by `find_folder`.

        Raises:
            EngineError: it cannot; the message says what to do.
        """
        torchaudio, voxcpm = import_voxcpm()
        # First check what fails soon: the model may be gigabytes to fetch.
        chosen = choose_device(device)
        cleaner = load_denoiser(torchaudio, offline=offline) if denoiser else None
        folder = find_folder(model, offline=offline, revision=revision, fetched=fetched)
        arch = str(read_config(folder).get("architecture", "voxcpm")).lower()
        on_cuda = chosen.startswith("cuda")
        if on_cuda:
            # voxcpm compiles for exactly "cuda", so that name is made to mean the device chosen.
            torch.cuda.set_device(chosen)
            # Otherwise the VAE's transposed convolutions sum in any order, and a run could not be repeated.
            torch.backends.cudnn.deterministic = True
            torch.backends.cudnn.benchmark = False
        compiled = optimize and on_cuda and importlib.util.find_spec("triton") is not None
        if optimize and on_cuda and not compiled:
            log("triton is not installed, so the model is not compiled and speaks slower: pip install triton")
        try:
            with known_warnings(), named_faults(0):
                loaded = voxcpm.VoxCPM(
                    str(folder),
                    zipenhancer_model_path=None,
                    enable_denoiser=False,
                    optimize=compiled,
                    device="cuda" if on_cuda else chosen,
                )
        except EngineError:
            raise
        except Exception as fault:  # pydantic, safetensors, pickle and torch have their own classes
            raise EngineError(f"the model in {folder} cannot be read: {fault}; fetch it again") from fault
        mark = model_fingerprint(folder, device=chosen, dtype=str(loaded.tts_model.config.dtype), compiled=compiled)
        return cls(loaded, arch=arch, device=chosen, compiled=compiled, fingerprint=mark, denoiser=cleaner)

    # -- text

    def tokens(self, text: str) -> int:
        """How many tokens the text has: places in the context, and what the cap on steps is reckoned by."""
        return len(self._tts.text_tokenizer(text))

    def normalize(self, text: str) -> str:
        """Numbers, dates and signs of the text in words (Chinese and English).

        Raises:
            EngineError: the packages for it are not installed.
        """
        if not self.can_normalize:
            raise EngineError("this worker cannot normalize text: pip install wetext inflect regex")
        if self._normalizer is None:
            with known_warnings():
                from voxcpm.utils.text_normalize import TextNormalizer

                self._normalizer = TextNormalizer()
        return str(self._normalizer.normalize(text))

    # -- prompts

    def encode(
        self, *, prompt: Samples | None, prompt_text: str | None, reference: Samples | None, denoise: bool = False
    ) -> PromptCache:
        """Prompt and reference audio as the model takes them. Draws nothing from the random generator.

        Args:
            prompt: speech to go on from, float32 mono at `prompt_rate`; it needs its text.
            prompt_text: what is said in it.
            reference: speech whose voice to take, likewise (VoxCPM2).
            denoise: clean both first.

        Raises:
            InvalidParams: the model takes no reference, or a prompt and its text are not both given.
            EngineError: no denoiser was loaded, or it failed; or out of memory.
        """
        self._check_free()
        if (prompt is None) != (not prompt_text):
            raise InvalidParams({"prompt_text": "and prompt audio go together: give both or neither"})
        if reference is not None and not self.clones:
            raise InvalidParams({"reference_wav": "is taken by VoxCPM2 only; give prompt_wav with prompt_text"})
        if prompt is None and reference is None:
            raise InvalidParams({"prompt_wav": "is required, or reference_wav"})
        if denoise and self._denoiser is None:
            raise EngineError("this worker has no denoiser: start it with -o denoiser=true, or send denoise false")
        if prompt is not None and not self.clones:
            lacks = _CONTEXT_PATCHES_1X * self.chunk_samples - len(prompt)
            prompt = np.pad(prompt, (max(0, lacks), 0))
        with tempfile.TemporaryDirectory(prefix="voxcpm-") as name, named_faults(self.context), known_warnings():
            paths = {
                "prompt_wav_path": self._write_wav(Path(name) / "prompt.wav", prompt, denoise),
                "reference_wav_path": self._write_wav(Path(name) / "reference.wav", reference, denoise),
            }
            if not self.clones:
                del paths["reference_wav_path"]
            return self._cache_of(self._tts.build_prompt_cache(prompt_text=prompt_text or None, **paths))

    def _write_wav(self, path: Path, samples: Samples | None, denoise: bool) -> str | None:
        if samples is None:
            return None
        # 32 bit floats at the model's own rate, so that no reader of the file changes a sample.
        soundfile.write(path, samples, self.prompt_rate, subtype="FLOAT")
        if not denoise:
            return str(path)
        clean = path.with_suffix(".clean.wav")
        try:
            self._denoiser.enhance(str(path), output_path=str(clean))
        except RuntimeError as fault:
            raise EngineError(f"the denoiser failed ({fault}); send denoise false") from fault
        return str(clean)

    def _merged(self, text: str, cache: PromptCache | None, latents: torch.Tensor) -> PromptCache:
        with torch.inference_mode():
            return self._cache_of(self._tts.merge_prompt_cache(cache.value if cache else None, text, latents.float()))

    def _cache_of(self, value: dict[str, Any]) -> PromptCache:
        tensors = [item for item in value.values() if isinstance(item, torch.Tensor)]
        text = value.get("prompt_text", "")
        return PromptCache(
            value,
            patches=audio_places(value) + (self.tokens(text) if text else 0),
            nbytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        )

    # -- speech

    def seed(self, seed: int) -> None:
        """Set the random generators, of the GPU too: what is spoken next is the same each time.

        Args:
            seed: 0 to 2**64 - 1.
        """
        torch.manual_seed(seed)

    def stream(self, text: str, cache: PromptCache | None, settings: Settings) -> Speech:
        """Speak, chunk by chunk: the samples that `VoxCPM.generate_streaming` yields after `torch.manual_seed`.

        What voxcpm promises of the chunks put together, beside the samples of `whole`, measured on float32:

        - VoxCPM2 without a prompt, or with reference audio alone: the same but for rounding (1e-6 of full scale), as
          its decoder keeps its state from chunk to chunk. Going on from prompt audio, a stream's decoder starts cold
          where the whole's hears the prompt's end first: the first five chunks or so differ, the first one audibly.
        - VoxCPM 1.5 and 0.5B decode each chunk from the last 3 patches: the first three are the same but for
          rounding (the first one, after a prompt), the later ones sound alike and differ by some percent.

        Args:
            text: to speak; white space as `VoxCPM.generate` leaves it (no line ends).
            settings: its retries are not for a stream.

        Raises:
            RuntimeError: another speech is open on this model: a bug of the caller's.
            EngineError: at once or at any chunk: prompt, text and speech need more than `context`; out of memory
                (retryable, and the engine is to be started anew).
        """
        self._check_free()
        self._check_room(text, cache)
        chunks = self._tts.generate_with_prompt_cache_streaming(**_arguments(text, cache, settings))
        speech = Speech(chunks, self.context, self._merged)
        self._speaking = weakref.ref(speech)
        return speech

    def whole(self, text: str, cache: PromptCache | None, settings: Settings, on_step: Callable[[int], None]) -> Whole:
        """Speak in one go: the samples that `VoxCPM.generate` returns after `torch.manual_seed`.

        Args:
            text: as `stream`'s.
            on_step: called with 1, 2, 3… at each of the model's steps, those of retries counted on. What it raises
                stops the speech and is raised here; the model is then ready for the next.

        Raises:
            RuntimeError, EngineError: as `stream`.
        """
        self._check_free()
        self._check_room(text, cache)
        arguments = _arguments(text, cache, settings)
        if settings.retry_badcase and settings.retry_badcase_max_times > 0:
            # With 0 tries, voxcpm would not speak at all.
            arguments.update(retry_badcase=True, retry_badcase_max_times=settings.retry_badcase_max_times)
        steps = 0

        def count(*_module_inputs_output: object) -> None:
            nonlocal steps
            steps += 1
            on_step(steps)

        # The stop head is called once a step, in both architectures, and outside everything that is compiled.
        hook = self._tts.stop_head.register_forward_hook(count)
        try:
            with named_faults(self.context):
                wav, _tokens, latents = self._tts.generate_with_prompt_cache(**arguments)
        finally:
            hook.remove()
        if not self.clones and cache is not None:
            # 1.x leaves the prompt's patches, which it decoded too, at the front.
            latents = latents[min(_CONTEXT_PATCHES_1X, audio_places(cache.value)) :]
        return Whole(wav.squeeze(0).numpy(), latents, self._merged)

    def _check_free(self) -> None:
        speech = self._speaking() if self._speaking is not None else None
        if speech is not None and not speech.ended:
            raise RuntimeError("this model is still speaking: a second speech at once would corrupt both")

    def _check_room(self, text: str, cache: PromptCache | None) -> None:
        value = cache.value if cache is not None else {}
        needs = self.tokens(value.get("prompt_text", "") + text) + 1 + audio_places(value)
        if needs > self.context:
            raise EngineError(
                f"text and prompt need {needs} of the model's {self.context} places; "
                "shorten the text or the prompt audio"
            )


def _arguments(text: str, cache: PromptCache | None, settings: Settings) -> dict[str, Any]:
    return {
        "target_text": text,
        "prompt_cache": cache.value if cache is not None else None,
        "min_len": settings.min_len,
        "max_len": settings.max_len,
        "inference_timesteps": settings.inference_timesteps,
        "cfg_value": settings.cfg_value,
        "retry_badcase": False,
        "retry_badcase_max_times": 1,
        "retry_badcase_ratio_threshold": settings.ratio_threshold,
    }
