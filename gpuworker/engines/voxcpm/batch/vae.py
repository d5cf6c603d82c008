"""The audio VAE's decoder with a state for each row; one class for VoxCPM2, one for 1.5 and 0.5B."""

from collections.abc import Collection
from typing import Any, Protocol

import torch

from gpuworker.engines.voxcpm.batch.device import recorded

#: Patches that VoxCPM 1.x decodes at each step, to keep the last (`streaming_prefix_len` of voxcpm 2.0.3).
RECENT_PATCHES = 3


class Decoder(Protocol):
    """Decodes a patch of every row, and whole speeches."""

    def start(self, row: int, context: torch.Tensor) -> None:
        """Begin a speech in a row; `context` (patches, patch, dimensions) was spoken before, and may be empty."""

    def decode(self, latents: torch.Tensor, rows: Collection[int]) -> torch.Tensor:
        """The samples of the patches (rows, dimensions, patch): (rows, n) on the CPU; right for the given rows."""

    def whole(self, latents: torch.Tensor) -> torch.Tensor:
        """The samples of a whole speech (1, dimensions, n): (n,) on the CPU."""


class StatefulDecoder:
    """The decoder of VoxCPM2: `StreamingVAEDecoder`, whose layers keep the end of their input, with a row for each."""

    def __init__(self, tts: Any, rows: int, *, device: str, record: bool) -> None:
        from voxcpm.modules.audiovae import audio_vae_v2

        self._vae = vae = tts.audio_vae
        self._carries = False
        self._states: list[torch.Tensor] = []
        weight = next(vae.decoder.parameters())
        for module in vae.decoder.modules():
            # Names that Python made of the package's private `__padding` and `__output_padding`.
            if isinstance(module, audio_vae_v2.CausalConv1d):
                before = module._CausalConv1d__padding * 2 - module._CausalConv1d__output_padding
                if before > 0:
                    self._carry(module, torch.nn.Conv1d.forward, before, 0, 0, rows, weight)
            elif isinstance(module, audio_vae_v2.CausalTransposeConv1d):
                trim = module._CausalTransposeConv1d__padding * 2 - module._CausalTransposeConv1d__output_padding
                before = (module.kernel_size[0] - 1) // module.stride[0]
                if before > 0:
                    forward, skip = torch.nn.ConvTranspose1d.forward, before * module.stride[0]
                    self._carry(module, forward, before, skip, trim, rows, weight)
        self._latents = weight.new_zeros(rows, vae.latent_dim, tts.patch_size)
        self._samples = weight.new_zeros(rows, tts.patch_size * vae.decode_chunk_size)
        # Made here, because a tensor from the host cannot be part of a recording.
        self._rate = None
        if vae.sr_bin_boundaries is not None:
            self._rate = torch.tensor([vae.out_sample_rate], device=weight.device, dtype=torch.int32)
        self._decode_all = recorded(self._decode, device, record=record)

    def _carry(
        self, module: Any, forward: Any, before: int, skip: int, trim: int, rows: int, weight: torch.Tensor
    ) -> None:
        """Let a convolution prepend the last `before` of its previous input, and cut what comes of that."""
        state = weight.new_zeros(rows, module.in_channels, before)
        self._states.append(state)

        def carried(x: torch.Tensor) -> Any:
            if not self._carries:
                return type(module).forward(module, x)
            whole = torch.cat((state, x), dim=-1)
            state.copy_(whole[..., -before:])
            out = forward(module, whole)
            return out[..., skip : out.size(-1) - trim]

        module.forward = carried

    def _decode(self) -> None:
        self._carries = True
        try:
            self._samples.copy_(self._vae.decode(self._latents, self._rate)[:, 0])
        finally:
            self._carries = False

    def start(self, row: int, context: torch.Tensor) -> None:
        """Begin without a state, as the package does even after a prompt."""
        del context
        for state in self._states:
            state[row].zero_()

    def decode(self, latents: torch.Tensor, rows: Collection[int]) -> torch.Tensor:
        """See `Decoder`."""
        del rows
        self._latents.copy_(latents)
        self._decode_all()
        samples: torch.Tensor = self._samples.to("cpu", copy=True)
        return samples

    def whole(self, latents: torch.Tensor) -> torch.Tensor:
        """See `Decoder`."""
        samples: torch.Tensor = self._vae.decode(latents.to(torch.float32), self._rate)[0, 0].cpu()
        return samples


class RecentDecoder:
    """The decoder of VoxCPM 1.x, which has no state: each patch is decoded behind the two before it."""

    def __init__(self, tts: Any, rows: int, *, device: str, record: bool) -> None:
        self._vae = vae = tts.audio_vae
        self._patch = tts.patch_size
        self._chunk = tts.patch_size * vae.chunk_size
        weight = next(vae.decoder.parameters())
        self._recent = weight.new_zeros(rows, vae.latent_dim, RECENT_PATCHES * self._patch)
        self._samples = weight.new_zeros(rows, self._chunk)
        self._known = [0] * rows
        self._decode_all = recorded(self._decode, device, record=record)

    def _decode(self) -> None:
        self._samples.copy_(self._vae.decode(self._recent)[:, 0, -self._chunk :])

    def start(self, row: int, context: torch.Tensor) -> None:
        """See `Decoder`."""
        self._known[row] = len(context)
        if len(context):
            joined = context.permute(2, 0, 1).flatten(1)  # (dimensions, patches * patch)
            self._recent[row, :, -joined.size(1) :] = joined

    def decode(self, latents: torch.Tensor, rows: Collection[int]) -> torch.Tensor:
        """See `Decoder`. A row with fewer than three patches is decoded by itself: it must not see older ones."""
        patch = self._patch
        self._recent.copy_(torch.cat((self._recent[..., patch:], latents), dim=-1))
        few = {}
        for row in rows:
            self._known[row] = min(self._known[row] + 1, RECENT_PATCHES)
            if self._known[row] < RECENT_PATCHES:
                few[row] = self._vae.decode(self._recent[row : row + 1, :, -self._known[row] * patch :])
        if len(few) < len(rows):
            self._decode_all()
        for row, samples in few.items():
            self._samples[row] = samples[0, 0, -self._chunk :]
        made: torch.Tensor = self._samples.to("cpu", copy=True)
        return made

    def whole(self, latents: torch.Tensor) -> torch.Tensor:
        """See `Decoder`."""
        samples: torch.Tensor = self._vae.decode(latents.to(torch.float32))[0, 0].cpu()
        return samples
