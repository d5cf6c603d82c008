"""Dimensions of VoxCPM's models, released and tiny; their config.json, and a tokenizer of characters and bytes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs

Arch = Literal["voxcpm2", "voxcpm1.5", "voxcpm"]
Size = Literal["tiny", "mid", "full"]

#: One rope table length serves the language models, the encoder and the decoder: one head size for all (tiny).
_TINY_HEAD = 16
_TINY_HIDDEN = 64
_TINY_VAE = {"encoder_dim": 4, "decoder_dim": 128}

#: What tiny models have in common with the released ones. Sources: the defaults of the two `AudioVAEConfig` classes of
#: voxcpm 2.0.3 (0.5B and VoxCPM2); for 1.5 44.1 kHz and 7,056 samples per step, from its model card.
_SHAPES: Mapping[Arch, Mapping[str, Any]] = {
    "voxcpm2": {
        "architecture": "voxcpm2",
        "patch_size": 4,
        "residual_lm_no_rope": True,
        "vae": {
            "encoder_rates": [2, 5, 8, 8],
            "decoder_rates": [8, 6, 5, 2, 2, 2],
            "sample_rate": 16_000,
            "out_sample_rate": 48_000,
            "sr_bin_boundaries": [20_000, 30_000, 40_000],
        },
    },
    "voxcpm1.5": {
        "architecture": "voxcpm",
        "patch_size": 4,
        "vae": {"encoder_rates": [2, 3, 6, 7, 7], "decoder_rates": [7, 7, 6, 3, 2], "sample_rate": 44_100},
    },
    "voxcpm": {
        "architecture": "voxcpm",
        "patch_size": 2,
        "vae": {"encoder_rates": [2, 5, 8, 8], "decoder_rates": [8, 8, 5, 2], "sample_rate": 16_000},
    },
}


@attrs.frozen(kw_only=True)
class Dimensions:
    """Widths and depths of one model; `head` is the size of one attention head, in all its transformers."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    residual_layers: int
    local_hidden: int
    local_ffn: int
    local_layers: int
    local_heads: int
    latent: int
    vocabulary: int
    positions: int
    context: int
    vae: Mapping[str, int]


#: The released models. Sources: the number of residual layers, the quantizer's width, the context and the width of the
#: local transformers are the defaults of the two `VoxCPMConfig` classes of voxcpm 2.0.3, the VAE's widths those of its
#: `AudioVAEConfig` classes. The rest is taken from public ports (SGLang, MLX and Rust), which agree on the config.json
#: of openbmb/VoxCPM2 and openbmb/VoxCPM-0.5B: language models of 28 x 2,048 and 24 x 1,024, 16 heads over 2 KV
#: heads, local transformers 12 and 4 deep, heads of 128 and 64, a vocabulary of 73,448. The files themselves were
#: not available. The models have 2.38 and 0.73 billion parameters, including the VAE.
FULL: Mapping[Arch, Dimensions] = {
    "voxcpm2": Dimensions(
        hidden=2_048,
        ffn=6_144,
        layers=28,
        heads=16,
        kv_heads=2,
        head=128,
        residual_layers=8,
        local_hidden=1_024,
        local_ffn=4_096,
        local_layers=12,
        local_heads=16,
        latent=512,
        vocabulary=73_448,
        positions=32_768,
        context=8_192,
        vae={"encoder_dim": 128, "decoder_dim": 2_048},
    ),
    "voxcpm": Dimensions(
        hidden=1_024,
        ffn=4_096,
        layers=24,
        heads=16,
        kv_heads=2,
        head=64,
        residual_layers=6,
        local_hidden=1_024,
        local_ffn=4_096,
        local_layers=4,
        local_heads=16,
        latent=256,
        vocabulary=73_448,
        positions=32_768,
        context=4_096,
        vae={"encoder_dim": 128, "decoder_dim": 1_536},
    ),
}


def tiny(vocabulary: int, context: int) -> Dimensions:
    """Dimensions small enough that a step takes milliseconds on a CPU."""
    heads = _TINY_HIDDEN // _TINY_HEAD
    return Dimensions(
        hidden=_TINY_HIDDEN,
        ffn=_TINY_HIDDEN * 2,
        layers=2,
        heads=heads,
        kv_heads=heads // 2,
        head=_TINY_HEAD,
        residual_layers=1,
        local_hidden=_TINY_HIDDEN,
        local_ffn=_TINY_HIDDEN * 2,
        local_layers=1,
        local_heads=heads,
        latent=32,
        vocabulary=vocabulary,
        positions=context,
        context=context,
        vae=_TINY_VAE,
    )


def mid(vocabulary: int, context: int) -> Dimensions:
    """Dimensions of some 80 million parameters: a CPU is busy with arithmetic then, and not with calls."""
    return Dimensions(
        hidden=512,
        ffn=1_536,
        layers=8,
        heads=8,
        kv_heads=2,
        head=64,
        residual_layers=2,
        local_hidden=512,
        local_ffn=2_048,
        local_layers=6,
        local_heads=8,
        latent=256,
        vocabulary=vocabulary,
        positions=context,
        context=context,
        vae={"encoder_dim": 32, "decoder_dim": 512},
    )


def config_of(arch: Arch, dimensions: Dimensions, dtype: str) -> dict[str, Any]:
    shape = dict(_SHAPES[arch])
    vae = {"latent_dim": 64, "depthwise": True, **dimensions.vae, **shape.pop("vae")}
    local = {
        "hidden_dim": dimensions.local_hidden,
        "ffn_dim": dimensions.local_ffn,
        "num_heads": dimensions.local_heads,
        "num_layers": dimensions.local_layers,
        "kv_channels": dimensions.head,
    }
    cfm = {"sigma_min": 1e-6, "solver": "euler", "t_scheduler": "log-norm", "inference_cfg_rate": 2.0}
    return {
        **shape,
        "lm_config": {
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_size": dimensions.hidden,
            "intermediate_size": dimensions.ffn,
            "max_position_embeddings": dimensions.positions,
            "num_attention_heads": dimensions.heads,
            "num_hidden_layers": dimensions.layers,
            "num_key_value_heads": dimensions.kv_heads,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0,
            # The released tables hold other factors, at the same length: they change values, not work.
            "rope_scaling": {
                "type": "longrope",
                "long_factor": [1.0] * (dimensions.head // 2),
                "short_factor": [1.0] * (dimensions.head // 2),
                "original_max_position_embeddings": dimensions.positions,
            },
            "vocab_size": dimensions.vocabulary,
            "use_mup": False,
            "scale_emb": 12,
            "dim_model_base": 256,
            "scale_depth": 1.4,
            "kv_channels": dimensions.head,
        },
        "feat_dim": 64,
        "residual_lm_num_layers": dimensions.residual_layers,
        "scalar_quantization_latent_dim": dimensions.latent,
        "scalar_quantization_scale": 9,
        "encoder_config": local,
        "dit_config": {**local, "cfm_config": cfm},
        "audio_vae_config": vae,
        "max_length": dimensions.context,
        "device": "cuda",
        "dtype": dtype,
    }


def _vocabulary() -> tuple[dict[str, int], list[str]]:
    """Token -> id of a character-level tokenizer with byte fallback, and its merges.

    Ids 101-104 are the audio tokens that voxcpm has in its code. The two merges make Chinese words of two characters,
    which voxcpm takes apart again.
    """
    tokens = ["<unk>", "<s>", "</s>", "▁", *(chr(code) for code in range(33, 127))]
    tokens += [f"<|reserved_{i}|>" for i in range(len(tokens), 101)]
    tokens += ["<|audio_start|>", "<|audio_end|>", "<|audio_prompt_start|>", "<|audio_prompt_end|>"]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += ["你", "好", "世", "界", "你好", "世界"]
    return {token: i for i, token in enumerate(tokens)}, ["你 好", "世 界"]


def vocabulary_size() -> int:
    return -(-len(_vocabulary()[0]) // 32) * 32


def write_tokenizer(folder: Path) -> int:
    vocabulary, merges = _vocabulary()
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": token, **flags} for token, i in vocabulary.items() if i < 3 or 101 <= i <= 104]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
    settings = {
        "tokenizer_class": "LlamaTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": False,
        "add_eos_token": False,
        "legacy": True,
        "model_max_length": 100_000,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return vocabulary_size()
