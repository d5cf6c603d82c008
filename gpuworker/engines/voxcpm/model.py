"""Wraps the voxcpm package in one class: it loads, encodes prompts, speaks, and raises errors that say what to do.

A model speaks only one text at a time: voxcpm keeps the KV cache and the decoder's state in the model, so a second
stream would silently corrupt the first, and `Model` refuses it. All calls come from one thread, because CUDA graphs are
bound to the thread that captured them; only what concerns text may come from others. For many texts at a time see the
package `batch`.
"""

import functools
import importlib
import importlib.util
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from gpuworker.engines.base import EngineError, InvalidParams
from gpuworker.engines.voxcpm.batch.prefill import Opening
from gpuworker.engines.voxcpm.devices import choose_device, import_voxcpm, known_warnings, load_denoiser, log
from gpuworker.engines.voxcpm.errors import named_faults
from gpuworker.engines.voxcpm.fingerprint import model_fingerprint
from gpuworker.engines.voxcpm.loaded_model import fold_weight_norm, resize_context
from gpuworker.engines.voxcpm.lora import load_lora, lora_config, lora_files
from gpuworker.engines.voxcpm.model_files import Fetched, find_folder, ignore_progress, read_config
from gpuworker.engines.voxcpm.model_output import PromptCache as PromptCache
from gpuworker.engines.voxcpm.model_output import Samples, Speech, Whole, audio_places
from gpuworker.engines.voxcpm.speech_model import Settings as Settings

#: Patches of prompt audio that VoxCPM 1.x decodes before the speech and then cuts off. A shorter prompt would cost the
#: first patches of the speech (`decode_audio[..., patch_len * (streaming_prefix_len - 1):]` in voxcpm 2.0.3).
_CONTEXT_PATCHES_1X = 2


def _lora_class(arch: str) -> Any:
    return importlib.import_module(f"voxcpm.model.{arch}").LoRAConfig


@functools.cache
def _normalizer() -> Any:
    with known_warnings():
        from voxcpm.utils.text_normalize import TextNormalizer

        return TextNormalizer()


class Model:
    """One loaded VoxCPM model.

    Attributes:
        tts: the package's model.
        arch: "voxcpm2" or "voxcpm" (1.5 and 0.5B).
        sample_rate: of the speech, Hz.
        chunk_samples: samples in each chunk of a stream; all chunks are equally long.
        prompt_rate: of prompt and reference audio, Hz.
        context: positions for prompt, text and speech together: a token of text takes one, a patch of audio (a chunk)
            takes one.
        clones: whether it accepts reference audio, and a description of the voice before the text (VoxCPM2).
        device: the device it runs on: "cuda:1", "cpu" …
        compiled: by torch.compile.
        fingerprint: see `model_fingerprint`.
        can_normalize: whether text normalization is installed.
        can_denoise: whether the denoiser is loaded.
    """

    def __init__(self, voxcpm: Any, *, arch: str, device: str, compiled: bool, fingerprint: str, denoiser: Any) -> None:
        self._voxcpm = voxcpm
        self.tts = tts = voxcpm.tts_model
        self._denoiser = denoiser
        #: Of the tokenizer and the normalizer, which the runs of a batch share.
        self._text_lock = threading.Lock()
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
        context: int = 0,
        denoiser: bool = False,
        offline: bool = False,
        revision: str | None = None,
        fetched: Fetched = ignore_progress,
        lora: str | None = None,
    ) -> "Model":
        """Read a model and put it on a device. Its first speech is slower than the following ones.

        Args:
            model: a folder, or a Hugging Face id.
            device: auto, cpu, mps, cuda or cuda:N.
            optimize: compile it, on CUDA only.
            context: positions in its KV caches; 0 for as many as the model has.
            denoiser: load the denoiser too; it is fetched from ModelScope.
            offline: do not use the network.
            revision: revision of the hub's repository.
            fetched: called with the progress of a download, as by `find_folder`.
            lora: an adapter for it, as `lora_files` takes it.

        Raises:
            EngineError: it cannot be loaded; the message says what to do.
        """
        torchaudio, voxcpm = import_voxcpm()
        # Check first what can fail quickly: fetching a model may take gigabytes of traffic.
        adapter = [] if lora is None else lora_files(lora)
        chosen = choose_device(device)
        cleaner = load_denoiser(torchaudio, offline=offline) if denoiser else None
        folder = find_folder(model, offline=offline, revision=revision, fetched=fetched)
        arch = str(read_config(folder).get("architecture", "voxcpm")).lower()
        on_cuda = chosen.startswith("cuda")
        if on_cuda:
            # voxcpm compiles only for exactly "cuda", so make that name refer to the chosen device.
            torch.cuda.set_device(chosen)
            # Otherwise the VAE's transposed convolutions add in varying order, and a run could not be repeated.
            torch.backends.cudnn.deterministic = True
            torch.backends.cudnn.benchmark = False
        compiled = optimize and on_cuda and importlib.util.find_spec("triton") is not None
        if optimize and on_cuda and not compiled:
            log("triton is not installed, so the model is not compiled and is slower: pip install triton")
        try:
            with known_warnings(), named_faults(0):
                loaded = voxcpm.VoxCPM(
                    str(folder),
                    zipenhancer_model_path=None,
                    enable_denoiser=False,
                    optimize=False,  # not before its caches have their size
                    device="cuda" if on_cuda else chosen,
                    lora_config=lora_config(adapter, _lora_class(arch)) if adapter else None,
                )
                if adapter:
                    load_lora(loaded, adapter)
                fold_weight_norm(loaded.tts_model.audio_vae)
                resize_context(loaded.tts_model, context)
                loaded.tts_model.optimize(disable=not compiled)
        except EngineError:
            raise
        except Exception as fault:  # pydantic, safetensors, pickle and torch each raise classes of their own
            raise EngineError(f"the model in {folder} cannot be read: {fault}; fetch it again") from fault
        tts = loaded.tts_model
        mark = model_fingerprint(
            folder,
            device=chosen,
            dtype=str(tts.config.dtype),
            compiled=compiled,
            context=int(tts.base_lm.kv_cache.max_length),
            more=adapter,
        )
        return cls(loaded, arch=arch, device=chosen, compiled=compiled, fingerprint=mark, denoiser=cleaner)

    # -- text

    def tokens(self, text: str) -> int:
        """The number of tokens in the text: positions in the context, and the basis of the limit on steps."""
        return len(self._token_ids(text))

    def _token_ids(self, text: str) -> list[int]:
        with self._text_lock:
            ids: list[int] = self.tts.text_tokenizer(text)
            return ids

    def opening(self, text: str, cache: PromptCache | None) -> Opening:
        """What the model reads before it speaks this text."""
        prompt = cache.value if cache is not None else {}
        said = prompt.get("prompt_text", "") if "audio_feat" in prompt else ""
        return Opening.of(
            self._token_ids(said + text), prompt, patch=self.tts.patch_size, dimensions=self.tts.audio_vae.latent_dim
        )

    def normalize(self, text: str) -> str:
        """Write numbers, dates and signs in the text out as words (Chinese and English).

        Raises:
            EngineError: the packages for this are not installed.
        """
        if not self.can_normalize:
            raise EngineError("this worker cannot normalize text: pip install wetext inflect regex")
        with self._text_lock:
            return str(_normalizer().normalize(text))

    def prepare_normalizer(self) -> None:
        """Build the normalizer, if it is installed: that takes some ten seconds, which no request should wait for."""
        if self.can_normalize:
            _normalizer()

    # -- prompts

    def encode(
        self, *, prompt: Samples | None, prompt_text: str | None, reference: Samples | None, denoise: bool = False
    ) -> PromptCache:
        """Encode prompt and reference audio for the model. Does not use the random generator.

        Args:
            prompt: speech to continue from, float32 mono at `prompt_rate`; requires its text.
            prompt_text: the transcript of `prompt`.
            reference: speech whose voice to imitate, in the same format (VoxCPM2).
            denoise: remove noise from both first.

        Raises:
            InvalidParams: the model accepts no reference, or only one of prompt and its text is given.
            EngineError: no denoiser is loaded, or it failed; or memory ran out.
        """
        self._check_free()
        if (prompt is None) != (not prompt_text):
            raise InvalidParams({"prompt_text": "and prompt audio belong together: give both or neither"})
        if reference is not None and not self.clones:
            raise InvalidParams({"reference_wav": "is accepted by VoxCPM2 only; give prompt_wav with prompt_text"})
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
            return self._cache_of(self.tts.build_prompt_cache(prompt_text=prompt_text or None, **paths))

    def _write_wav(self, path: Path, samples: Samples | None, denoise: bool) -> str | None:
        if samples is None:
            return None
        # 32-bit floats at the model's own rate, so that reading the file does not change a sample.
        soundfile.write(path, samples, self.prompt_rate, subtype="FLOAT")
        if not denoise:
            return str(path)
        clean = path.with_suffix(".clean.wav")
        try:
            self._denoiser.enhance(str(path), output_path=str(clean))
        except RuntimeError as fault:
            raise EngineError(f"the denoiser failed ({fault}); send denoise false") from fault
        return str(clean)

    def merge(self, text: str, cache: PromptCache | None, latents: torch.Tensor) -> PromptCache:
        """Make the prompt to continue from: `cache` and then `text`, which was spoken as these latents."""
        with torch.inference_mode():
            return self._cache_of(self.tts.merge_prompt_cache(cache.value if cache else None, text, latents.float()))

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
        """Seed the random generators, including the GPU's, so that the next speech is the same each time.

        Args:
            seed: 0 to 2**64 - 1.
        """
        torch.manual_seed(seed)

    def stream(self, text: str, cache: PromptCache | None, settings: Settings) -> Speech:
        """Speak chunk by chunk: yields the samples that `VoxCPM.generate_streaming` yields after `torch.manual_seed`.

        How the joined chunks compare with the samples of `whole`, measured in float32:

        - VoxCPM2 without a prompt, or with only reference audio: equal except for rounding (1e-6 of full scale),
          because its decoder keeps its state between chunks. When it continues from prompt audio, a stream's decoder
          starts without state, while that of `whole` has decoded the end of the prompt: about the first five chunks
          differ, the first one audibly.
        - VoxCPM 1.5 and 0.5B decode each chunk from the last 3 patches: the first three chunks (after a prompt, only
          the first) are equal except for rounding; later ones sound alike and differ by some percent.

        Args:
            text: to speak; white space as `VoxCPM.generate` leaves it (no line ends).
            cache: the encoded prompt, if any.
            settings: how to speak; the retries do not apply to a stream.

        Raises:
            RuntimeError: another speech is open on this model, which is a bug in the caller.
            EngineError: immediately or at any chunk: prompt, text and speech exceed `context`, or memory ran out
                (retryable; the engine must then be restarted).
        """
        self._check_free()
        self.check_room(text, cache)
        chunks = self.tts.generate_with_prompt_cache_streaming(**_arguments(text, cache, settings))
        speech = Speech(chunks, self.context, self.merge)
        self._speaking = weakref.ref(speech)
        return speech

    def whole(self, text: str, cache: PromptCache | None, settings: Settings, on_step: Callable[[int], None]) -> Whole:
        """Speak as a whole: returns the samples that `VoxCPM.generate` returns after `torch.manual_seed`.

        Args:
            text: as for `stream`.
            cache: as for `stream`.
            settings: how to speak.
            on_step: called with 1, 2, 3… at each step of the model; retries continue the count. An exception that it
                raises stops the speech and is raised here; the model is then ready for the next speech.

        Raises:
            RuntimeError, EngineError: as for `stream`.
        """
        self._check_free()
        self.check_room(text, cache)
        arguments = _arguments(text, cache, settings)
        if settings.retry_badcase and settings.retry_badcase_max_times > 0:
            # With 0 attempts, voxcpm would not speak at all.
            arguments.update(retry_badcase=True, retry_badcase_max_times=settings.retry_badcase_max_times)
        steps = 0

        def count(*_module_inputs_output: object) -> None:
            nonlocal steps
            steps += 1
            on_step(steps)

        # In both architectures, the stop head is called once per step, outside everything that is compiled.
        hook = self.tts.stop_head.register_forward_hook(count)
        try:
            with named_faults(self.context):
                wav, _tokens, latents = self.tts.generate_with_prompt_cache(**arguments)
        finally:
            hook.remove()
        if not self.clones and cache is not None:
            # 1.x also decodes the patches of the prompt, and leaves them at the front.
            latents = latents[min(_CONTEXT_PATCHES_1X, audio_places(cache.value)) :]
        return Whole(wav.squeeze(0).numpy(), latents, self.merge)

    def _check_free(self) -> None:
        speech = self._speaking() if self._speaking is not None else None
        if speech is not None and not speech.ended:
            raise RuntimeError("this model is still speaking: a second speech at once would corrupt both")

    def check_room(self, text: str, cache: PromptCache | None) -> None:
        """Raise EngineError if the text and its prompt exceed `context`."""
        value = cache.value if cache is not None else {}
        needs = self.tokens(value.get("prompt_text", "") + text) + 1 + audio_places(value)
        if needs > self.context:
            raise EngineError(
                f"text and prompt need {needs} of the {self.context} positions in the model's context; "
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
