"""Makes a newly loaded voxcpm model faster and smaller, without changing a bit of its samples."""

from typing import Any

from torch.nn.utils import remove_weight_norm

from gpuworker.engines.base import EngineError
from gpuworker.engines.voxcpm.devices import known_warnings


def fold_weight_norm(vae: Any) -> None:
    """Compute the weights of the audio VAE once, which voxcpm 2.0.3 computes again from two factors at each call."""
    with known_warnings():
        for module in vae.modules():
            if hasattr(module, "weight_g"):
                remove_weight_norm(module)


def resize_context(tts: Any, places: int) -> None:
    """Give both language models KV caches of `places` positions; 0 leaves them as they are.

    What lies behind the positions in use is masked, so the size of a cache changes no sample. Call it before the model
    is compiled.

    Raises:
        EngineError: the model has fewer positions.
    """
    own = int(tts.base_lm.kv_cache.max_length)
    if places > own:
        raise EngineError(f"the model has {own} positions; use -o context={own} or less, or leave it out")
    if places in (0, own):
        return
    for lm in (tts.base_lm, tts.residual_lm):
        cache = lm.kv_cache.kv_cache
        lm.kv_cache = None  # before the new one is allocated
        lm.setup_cache(1, places, cache.device, cache.dtype)
