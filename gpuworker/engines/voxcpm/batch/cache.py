"""The KV cache of a language model with rows, each at its own position."""

from collections.abc import Sequence
from types import MethodType
from typing import Any

import attrs
import torch

from gpuworker.engines.voxcpm.batch.device import attend


@attrs.define(eq=False)
class Cache:
    """Keys and values of one language model; it replaces voxcpm's `StaticKVCache`, which has one position for all rows.

    Args:
        keys, values: (layers, rows, key heads, places, size of a head).
        in_use: the places that a step attends to, from the first; the positions of all rows lie in them.
    """

    keys: torch.Tensor
    values: torch.Tensor
    in_use: int

    @classmethod
    def install(cls, lm: Any, rows: int) -> "Cache":
        """Give a language model a cache for `rows`, as large for each as its own was, and positions by row.

        Its `forward_step` then takes `position_id` of shape (rows,).
        """
        _, layers, _, heads, places, size = lm.kv_cache.kv_cache.shape
        device, dtype = lm.kv_cache.kv_cache.device, lm.kv_cache.kv_cache.dtype
        lm.kv_cache = None  # before the new one is allocated
        shape = (layers, rows, heads, places, size)
        cache = cls(torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype), 0)
        cache.in_use = places
        lm.kv_cache = cache
        for layer in lm.layers:
            layer.self_attn.forward_step = MethodType(_attention_step, layer.self_attn)
        return cache

    @property
    def places(self) -> int:
        """Positions of each row."""
        return self.keys.size(3)

    def fill(self, row: int, prefill: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Store the keys and values of a prefill, (1, key heads, tokens, size) of each layer.

        What lies behind them is masked, but it is cleared: a NaN of the speech before would come through the mask.
        """
        for layer, (keys, values) in enumerate(prefill):
            tokens = keys.size(2)
            self.keys[layer, row, :, :tokens] = keys[0]
            self.values[layer, row, :, :tokens] = values[0]
            self.keys[layer, row, :, tokens:] = 0
            self.values[layer, row, :, tokens:] = 0

    def get_layer_cache(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The part in use of one layer: the call with which voxcpm's `MiniCPMModel.forward_step` asks for it."""
        return self.keys[layer, :, :, : self.in_use], self.values[layer, :, :, : self.in_use]


def _attention_step(
    attention: Any,
    hidden_states: torch.Tensor,
    position_emb: tuple[torch.Tensor, torch.Tensor] | None,
    position_id: torch.Tensor,
    kv_cache: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """`MiniCPMAttention.forward_step` of voxcpm 2.0.3, with a position for each row."""
    from voxcpm.modules.minicpm4.model import apply_rotary_pos_emb

    rows, size = hidden_states.size(0), attention.head_dim
    query = attention.q_proj(hidden_states).view(rows, attention.num_heads, 1, size)
    key = attention.k_proj(hidden_states).view(rows, attention.num_key_value_heads, 1, size)
    value = attention.v_proj(hidden_states).view(rows, attention.num_key_value_heads, 1, size)
    if position_emb is not None:
        cos, sin = (part[:, None, None, :] for part in position_emb)
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
    keys, values = kv_cache
    row = torch.arange(rows, device=keys.device)
    keys[row, :, position_id] = key[:, :, 0]
    values[row, :, position_id] = value[:, :, 0]
    mask = torch.arange(keys.size(2), device=keys.device)[None] <= position_id[:, None]
    out = attend(query, keys, values, mask[:, None, None, :])
    made: torch.Tensor = attention.o_proj(out.reshape(rows, attention.num_heads * size))
    return made
