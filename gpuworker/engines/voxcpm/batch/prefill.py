"""What a speech begins with: its text, the audio of its voice, and how the language models read them."""

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch

#: Tokens of voxcpm 2.0.3 (`VoxCPM2Model.__init__`) that begin the speech, and stand around reference audio.
SPEECH_TOKEN, REFERENCE_TOKEN, REFERENCE_END_TOKEN = 101, 103, 104
#: Patches before a speech that are decoded again with it as a whole: `streaming_prefix_len - 1` in each architecture.
CONTEXT_PATCHES = {True: 3, False: 2}


@attrs.frozen(eq=False)
class Opening:
    """Tokens and audio in the order in which the model reads them, on the CPU.

    Args:
        tokens: (places,); 0 where there is audio.
        audio: (places, patch, dimensions) float32; zeros where there is a token.
        heard: (places,) int32, 1 where there is audio.
    """

    tokens: torch.Tensor
    audio: torch.Tensor
    heard: torch.Tensor

    @classmethod
    def of(cls, tokens: Sequence[int], prompt: Mapping[str, Any] | None, *, patch: int, dimensions: int) -> "Opening":
        """As `_generate_with_prompt_cache` puts it together: reference, text, then the audio to continue from.

        Args:
            tokens: of the prompt's text and the text.
            prompt: voxcpm's prompt cache.
            patch, dimensions: the shape of a patch.
        """
        prompt = prompt or {}
        parts: list[list[int] | torch.Tensor] = [[*tokens, SPEECH_TOKEN]]
        if "ref_audio_feat" in prompt:
            parts[:0] = [[REFERENCE_TOKEN], prompt["ref_audio_feat"], [REFERENCE_END_TOKEN]]
        if "audio_feat" in prompt:
            parts.append(prompt["audio_feat"])
        read, audio, heard = [], [], []
        for part in parts:
            spoken = isinstance(part, torch.Tensor)
            read.append(torch.zeros(len(part), dtype=torch.long) if spoken else torch.tensor(part, dtype=torch.long))
            audio.append(part if isinstance(part, torch.Tensor) else torch.zeros(len(part), patch, dimensions))
            heard.append(torch.full((len(part),), int(spoken), dtype=torch.int32))
        return cls(torch.cat(read), torch.cat(audio), torch.cat(heard))

    def context(self, *, two: bool) -> torch.Tensor:
        """The patches (n, patch, dimensions) behind which the speech is decoded as a whole; none without a prompt.

        Args:
            two: whether the model is VoxCPM2.
        """
        if not self.heard[-1]:
            return self.audio[:0]
        return self.audio[self.heard.bool()][-CONTEXT_PATCHES[two] :]


@attrs.frozen(eq=False)
class Prefill:
    """What the language models made of an opening: their last outputs, and keys and values of each layer."""

    lm_hidden: torch.Tensor
    residual_hidden: torch.Tensor
    last_patch: torch.Tensor
    base: Sequence[tuple[torch.Tensor, torch.Tensor]]
    residual: Sequence[tuple[torch.Tensor, torch.Tensor]]


def prefill(tts: Any, opening: Opening, dtype: torch.dtype) -> Prefill:
    """The part of voxcpm's `_inference` before its loop, for one speech."""
    device = tts.lm_to_dit_proj.weight.device
    audio = opening.audio[None].to(device).to(dtype)
    heard = opening.heard[None].to(device)
    said = 1 - heard
    embedded = tts.enc_to_lm_proj(tts.feat_encoder(audio))
    scale = tts.config.lm_config.scale_emb if tts.config.lm_config.use_mup else 1.0
    text = tts.base_lm.embed_tokens(opening.tokens[None].to(device)) * scale
    heard, said = heard.unsqueeze(-1), said.unsqueeze(-1)
    hidden, base = tts.base_lm(inputs_embeds=said * text + heard * embedded, is_causal=True)
    hidden = tts.fsq_layer(hidden) * heard + hidden * said
    inputs = combine(tts, hidden, heard * embedded)
    residual_hidden, residual = tts.residual_lm(inputs_embeds=inputs, is_causal=True)
    return Prefill(hidden[0, -1], residual_hidden[0, -1], audio[0, -1], base, residual)


def combine(tts: Any, hidden: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
    """The input of the residual language model."""
    if hasattr(tts, "fusion_concat_proj"):  # VoxCPM2
        fused: torch.Tensor = tts.fusion_concat_proj(torch.cat((hidden, embedded), dim=-1))
        return fused
    return hidden + embedded
