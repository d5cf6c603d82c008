"""Stands for the package indextts in tests: `IndexTTS2` with the signatures and habits of upstream's, and no model.

Copied into a folder as `indextts/infer_v2.py`, never imported from here. A segment is a sentence; it sounds as loud as
the speaker's recording, for 50 ms a word. What it is called with goes to the file STAND_IN_CALLS, a JSON line each.
"""

import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import soundfile
import torch

RATE = 22_050
STEPS_A_WORD = 10
DIFFUSION_STEPS = 25


class Step(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Cfm(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.estimator = Step()


class IndexTTS2:
    def __init__(
        self,
        cfg_path: str = "checkpoints/config.yaml",
        model_dir: str = "checkpoints",
        use_fp16: bool = False,
        device: str | None = None,
        use_cuda_kernel: bool | None = None,
        use_deepspeed: bool = False,
    ) -> None:
        print(">> GPT weights restored from:", f"{model_dir}/gpt.pth")
        if "broken" in Path(cfg_path).read_text():
            raise RuntimeError("Error(s) in loading state_dict for UnifiedVoice")
        _note("make", use_fp16=use_fp16, device=device, use_cuda_kernel=use_cuda_kernel, use_deepspeed=use_deepspeed)
        self.cfg = SimpleNamespace(gpt=SimpleNamespace(max_mel_tokens=1815, max_text_tokens=600))
        self.gpt = SimpleNamespace(inference_model=Step())
        self.s2mel = SimpleNamespace(models=torch.nn.ModuleDict({"cfm": Cfm()}))
        self.qwen_emo: Any = object()
        self.gr_progress: Any = None
        self.cache_spk_audio_prompt: str | None = None
        self.loud = 0.0

    def normalize_emo_vec(self, emo_vector: list[float], apply_bias: bool = True) -> list[float]:
        return [value / 2 for value in emo_vector]

    def _set_gr_progress(self, value: float, desc: str) -> None:
        if self.gr_progress is not None:
            self.gr_progress(value, desc=desc)

    def infer(
        self,
        spk_audio_prompt: str,
        text: str,
        output_path: str | None,
        emo_audio_prompt: str | None = None,
        emo_alpha: float = 1.0,
        emo_vector: list[float] | None = None,
        use_emo_text: bool = False,
        emo_text: str | None = None,
        use_random: bool = False,
        interval_silence: int = 200,
        verbose: bool = False,
        max_text_tokens_per_segment: int = 120,
        stream_return: bool = False,
        more_segment_before: int = 0,
        **generation_kwargs: Any,
    ) -> Any:
        given = {name: value for name, value in locals().items() if name not in ("self", "generation_kwargs")}
        _note("infer", **given, **generation_kwargs)
        made = self._segments(spk_audio_prompt, text, emo_audio_prompt, interval_silence, stream_return)
        return made if stream_return else next(iter(list(made)), None)

    def _segments(
        self, speaker: str, text: str, emotion: str | None, interval_silence: int, stream_return: bool
    ) -> Iterator[Any]:
        print(">> starting inference...")
        self._set_gr_progress(0, "starting inference...")
        if self.cache_spk_audio_prompt != speaker:  # by its path, as upstream
            samples, rate = soundfile.read(speaker)
            _note("heard", rate=rate, seconds=len(samples) / rate)
            self.loud = float(abs(samples).max())
            self.cache_spk_audio_prompt = speaker
        if emotion is not None:
            _note("heard", rate=soundfile.info(emotion).samplerate)
        wavs: list[torch.Tensor] = []
        sentences = [
            sentence.split() for sentence in text.split(".") if sentence.strip(" !?\n") not in ("", "(silence)")
        ]
        for index, words in enumerate(sentences):
            self._set_gr_progress(0.2 + 0.7 * index / len(sentences), f"speech synthesis {index + 1}")
            print("\r 40%|####      | 10/25", end="", file=sys.stderr)
            with torch.no_grad():
                x = torch.zeros(1)
                steps = 10**12 if "forever" in words else STEPS_A_WORD * len(words)
                while steps := steps - 1:
                    self.gpt.inference_model(x)
                if "oom" in words:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
                if "assert" in words:
                    raise RuntimeError("CUDA error: device-side assert triggered")
                for _ in range(DIFFUSION_STEPS):
                    self.s2mel.models["cfm"].estimator(x)
                wav = torch.rand(1, int(0.05 * RATE) * len(words)) * 2 - 1
                wav[0, 0] = 1.0
                wavs.append(torch.clamp(32767 * self.loud * wav, -32767.0, 32767.0))
                if stream_return:
                    yield wavs[-1]
                    silence = torch.zeros(1, int(RATE * interval_silence / 1000.0))
                    yield silence if interval_silence > 0 else wavs  # the list, as upstream
        silence = torch.zeros(1, int(RATE * interval_silence / 1000.0))
        wav = torch.cat([part for wav in wavs for part in (wav, silence)][:-1], dim=1)
        print(f">> Generated audio length: {wav.shape[-1] / RATE:.2f} seconds, by chance {random.random()}")
        if not stream_return:
            yield (RATE, wav.type(torch.int16).numpy().T)


class IndexTTS25(IndexTTS2):
    """As `indextts.infer_v2_5.IndexTTS2`."""

    def __init__(
        self,
        cfg_path: str = "checkpoints/config.yaml",
        model_dir: str = "checkpoints",
        use_bf16: bool = False,
        device: str | None = None,
        use_cuda_kernel: bool | None = None,
        use_deepspeed: bool = False,
        use_accel: bool = False,
        use_torch_compile: bool = False,
        use_qwen_emo: bool = False,
    ) -> None:
        super().__init__(cfg_path, model_dir, device=device)
        _note("make 2.5", use_bf16=use_bf16, use_qwen_emo=use_qwen_emo)
        self.qwen_emo = object() if use_qwen_emo else None

    def infer(  # type: ignore[override]  # as upstream, `lang` stands before the rest
        self,
        spk_audio_prompt: str,
        text: str,
        output_path: str | None,
        lang: str,
        emo_audio_prompt: str | None = None,
        emo_alpha: float = 1.0,
        emo_vector: list[float] | None = None,
        use_emo_text: bool = False,
        emo_text: str | None = None,
        use_random: bool = False,
        interval_silence: int = 200,
        verbose: bool = False,
        max_text_tokens_per_segment: int = 120,
        stream_return: bool = False,
        more_segment_before: int = 0,
        duration_factor: float = 1.0,
        text_normalization: bool = True,
        **generation_kwargs: Any,
    ) -> Any:
        _note("infer 2.5", lang=lang, duration_factor=duration_factor)
        return super().infer(
            spk_audio_prompt, text, output_path, stream_return=stream_return, interval_silence=interval_silence
        )


def _note(what: str, **more: Any) -> None:
    if path := os.environ.get("STAND_IN_CALLS"):
        with Path(path).open("a") as calls:
            calls.write(json.dumps({"what": what, **more}) + "\n")
