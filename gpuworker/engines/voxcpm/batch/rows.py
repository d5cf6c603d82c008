"""The batch: a fixed number of rows, a speech in each, and the step that makes a patch of every one."""

from collections.abc import Mapping
from typing import Any

import attrs
import torch

from gpuworker.engines.voxcpm.batch.cache import Cache
from gpuworker.engines.voxcpm.batch.device import places_in_use, recorded
from gpuworker.engines.voxcpm.batch.diffusion import Diffusion
from gpuworker.engines.voxcpm.batch.prefill import Opening, combine, prefill
from gpuworker.engines.voxcpm.batch.vae import Decoder, RecentDecoder, StatefulDecoder

#: As in voxcpm when its cache has no place left; the errors of both are translated alike.
FULL = "KV cache is full"


@attrs.frozen(kw_only=True, eq=False)
class Task:
    """A speech to be made.

    Args:
        opening: what the model reads first.
        generator: of its noise, on the device; others may have drawn from it before.
        timesteps: of the diffusion.
        cfg_value: the guidance.
        min_len, max_len: the fewest steps before it may end, and the most.
        streams: whether each patch is decoded as it is made.
    """

    opening: Opening
    generator: torch.Generator
    timesteps: int
    cfg_value: float
    min_len: int
    max_len: int
    streams: bool


@attrs.frozen(eq=False)
class Patch:
    """One step of a speech, on the CPU.

    Args:
        latents: (1, 1, patch, dimensions), in the model's dtype.
        samples: (n,) float32; None if the speech does not stream.
        ended: whether it was the last.
        fault: why there can be no more, if the speech is not at its end.
    """

    latents: torch.Tensor
    samples: torch.Tensor | None
    ended: bool
    fault: Exception | None = None


@attrs.define(eq=False)
class _Speech:
    task: Task
    position: int
    made: int = 0


class Batch:
    """Speaks in many rows at once. All calls come from one thread.

    A row makes the same patches whatever is in the others, because the shapes are always those of all rows, and no
    operation adds over rows. With one row, they are those of the package, bit for bit; with more, sums are rounded
    differently, so batches of different sizes have different fingerprints.

    Args:
        tts: the package's model, loaded; from now on it belongs to the batch.
        rows: how many.
        device: where the model is: "cpu", "cuda:1" …
        record: on CUDA, record the step as CUDA graphs.
    """

    def __init__(self, tts: Any, rows: int, *, device: str, record: bool = True) -> None:
        self.rows = rows
        self._tts, self._device = tts, device
        self._two = hasattr(tts, "fusion_concat_proj")
        self._live: dict[int, _Speech] = {}
        with torch.inference_mode():
            self._base = Cache.install(tts.base_lm, rows)
            self._residual = Cache.install(tts.residual_lm, rows)
            self.places = self._base.places
            weight = tts.lm_to_dit_proj.weight
            self._lm_hidden = weight.new_zeros(rows, weight.size(1))
            self._residual_hidden = torch.zeros_like(self._lm_hidden)
            self._embedded = torch.zeros_like(self._lm_hidden)
            self._positions = torch.zeros(rows, dtype=torch.long, device=weight.device)
            self._stops = torch.zeros_like(self._positions)
            self._diffusion = Diffusion(tts, rows, device=device, record=record)
            decoder = StatefulDecoder if self._two else RecentDecoder
            self._decoder: Decoder = decoder(tts, rows, device=device, record=record)
            self._read_patches = recorded(self._read, device, record=record)
            self._advance_all = recorded(self._advance, device, record=record)

    @property
    def live(self) -> int:
        """How many rows are in use."""
        return len(self._live)

    @torch.inference_mode()
    def admit(self, row: int, task: Task) -> None:
        """Begin a speech in a free row."""
        assert row not in self._live
        read = prefill(self._tts, task.opening, self._lm_hidden.dtype)
        self._base.fill(row, read.base)
        self._residual.fill(row, read.residual)
        self._lm_hidden[row] = read.lm_hidden
        self._residual_hidden[row] = read.residual_hidden
        self._diffusion.cond[row] = read.last_patch.T
        self._diffusion.start(row, timesteps=task.timesteps, cfg_value=task.cfg_value)
        self._decoder.start(row, task.opening.context(two=self._two).to(self._lm_hidden.dtype))
        self._live[row] = _Speech(task, len(task.opening.tokens))

    def leave(self, row: int) -> None:
        """Free a row, if it is in use."""
        if self._live.pop(row, None) is not None:
            self._diffusion.stop(row)

    @torch.inference_mode()
    def step(self) -> Mapping[int, Patch]:
        """Make one patch of every speech. Rows whose patch was the last, or has a fault, are free afterwards."""
        tts, live, diffusion = self._tts, self._live, self._diffusion
        shape = (1, *diffusion.noise.shape[1:])
        for row, speech in live.items():
            noise = torch.randn(
                shape, generator=speech.task.generator, device=diffusion.noise.device, dtype=diffusion.noise.dtype
            )
            diffusion.noise[row] = noise[0]
        parts = tts.lm_to_dit_proj(self._lm_hidden), tts.res_to_dit_proj(self._residual_hidden)
        diffusion.mu.copy_(torch.cat(parts, dim=-1) if self._two else parts[0] + parts[1])
        diffusion.run()
        self._read_patches()
        streaming = [row for row, speech in live.items() if speech.task.streams]
        samples = self._decoder.decode(diffusion.noise.to(torch.float32), streaming) if streaming else None
        latents = diffusion.noise.transpose(1, 2).to("cpu", copy=True)
        made = {}
        for row, (speech, stop) in self._with_stops().items():
            speech.made += 1
            stopped = stop and speech.made - 1 > speech.task.min_len
            # The package reads even the patch after which it ends at `max_len`, and needs a place for that.
            fault = ValueError(FULL) if not stopped and speech.position >= self.places else None
            ended = stopped or speech.made >= speech.task.max_len
            out = samples[row] if samples is not None and speech.task.streams else None
            made[row] = Patch(latents[row : row + 1].unsqueeze(1).clone(), out, ended, fault)  # not all rows' latents
            if ended or fault:
                self.leave(row)
        if live:
            positions = [live[row].position if row in live else 0 for row in range(self.rows)]
            self._positions.copy_(torch.tensor(positions))
            in_use = places_in_use(self._device, max(positions) + 1, self.places)
            self._base.in_use = self._residual.in_use = in_use
            self._advance_all()
            for speech in live.values():
                speech.position += 1
        return made

    @torch.inference_mode()
    def decode_whole(self, context: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The samples (n,) of a speech that did not stream.

        Args:
            context: (patches, patch, dimensions), what was spoken before: of its `Opening`.
            latents: (1, patches, patch, dimensions), its own.
        """
        joined = torch.cat((context[None].to(latents.dtype), latents), dim=1).to(self._lm_hidden.device)
        samples = self._decoder.whole(joined.permute(0, 3, 1, 2).flatten(2))
        return samples[len(context) * (len(samples) // joined.size(1)) :]

    def _with_stops(self) -> dict[int, tuple[_Speech, bool]]:
        stops = self._stops.tolist()  # waits for the device, once a step
        return {row: (speech, stops[row] == 1) for row, speech in self._live.items()}

    def _read(self) -> None:
        """Read the new patches, and whether the language model wants to end."""
        tts, diffusion = self._tts, self._diffusion
        patches = diffusion.noise.transpose(1, 2)
        self._embedded.copy_(tts.enc_to_lm_proj(tts.feat_encoder(patches.unsqueeze(1)))[:, 0])
        diffusion.cond.copy_(diffusion.noise)
        self._stops.copy_(tts.stop_head(tts.stop_actn(tts.stop_proj(self._lm_hidden))).argmax(dim=-1))

    def _advance(self) -> None:
        """One token of both language models, at the positions of the rows."""
        tts = self._tts
        self._lm_hidden.copy_(tts.fsq_layer(tts.base_lm.forward_step(self._embedded, self._positions)))
        inputs = combine(tts, self._lm_hidden, self._embedded)
        self._residual_hidden.copy_(tts.residual_lm.forward_step(inputs, self._positions))
