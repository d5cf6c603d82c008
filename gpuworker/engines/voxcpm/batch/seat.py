"""What a run sees of a batch: one row of it, with the methods of a `Model`."""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing

import torch

from gpuworker.engines.base import EngineError
from gpuworker.engines.voxcpm.batch.rows import Batch, Patch, Task
from gpuworker.engines.voxcpm.batch.steps import Steps
from gpuworker.engines.voxcpm.errors import named_faults
from gpuworker.engines.voxcpm.model import Model
from gpuworker.engines.voxcpm.model_output import PromptCache, Samples, Speech, Whole
from gpuworker.engines.voxcpm.speech_model import Settings


class Seat:
    """One row of a batch, for one run at a time; it takes the place of a `Model`, whose contracts it keeps.

    Args:
        model: the loaded model; its own `stream` and `whole` must not be used any more.
        batch: over the same model.
        steps: the thread of the batch.
        row: of the batch.
    """

    def __init__(self, model: Model, batch: Batch, steps: Steps, row: int) -> None:
        self._model, self._batch, self._steps, self._row = model, batch, steps, row
        self.clones = model.clones
        self.sample_rate = model.sample_rate
        self.prompt_rate = model.prompt_rate
        self.context = model.context
        self.tokens = model.tokens
        self.normalize = model.normalize
        self._generator = torch.Generator(device=model.device)

    def encode(
        self, *, prompt: Samples | None, prompt_text: str | None, reference: Samples | None, denoise: bool = False
    ) -> PromptCache:
        """See `Model.encode`."""
        return self._steps.ask(
            lambda: self._model.encode(prompt=prompt, prompt_text=prompt_text, reference=reference, denoise=denoise)
        )

    def seed(self, seed: int) -> None:
        """Begin the noise that `Model.seed` begins, for this run alone."""
        self._generator.manual_seed(seed)

    def stream(self, text: str, cache: PromptCache | None, settings: Settings) -> Speech:
        """See `Model.stream`."""
        self._model.check_room(text, cache)
        task = self.task(text, cache, settings, streams=True)
        return Speech(self._streamed(task), self.context, self._model.merge)

    def whole(self, text: str, cache: PromptCache | None, settings: Settings, on_step: Callable[[int], None]) -> Whole:
        """See `Model.whole`."""
        self._model.check_room(text, cache)
        attempts = settings.retry_badcase_max_times if settings.retry_badcase else 0
        too_many = self.tokens(text) * settings.ratio_threshold
        context = torch.empty(0)
        latents: list[torch.Tensor] = []
        steps = 0
        with named_faults(self.context):
            for _attempt in range(max(1, attempts)):
                task = self.task(text, cache, settings, streams=False)
                context = task.opening.context(two=self.clones)
                latents = []
                with closing(self._patches(task)) as patches:
                    for patch in patches:
                        latents.append(patch.latents)
                        steps += 1
                        on_step(steps)
                # VoxCPM 1.x counts the end of its prompt among the steps.
                if len(latents) + (0 if self.clones else len(context)) < too_many:
                    break
            spoken = torch.cat(latents, dim=1)
            samples = self._steps.ask(lambda: self._batch.decode_whole(context, spoken))
        return Whole(samples.numpy(), spoken.squeeze(0), self._model.merge)

    def task(self, text: str, cache: PromptCache | None, settings: Settings, *, streams: bool) -> Task:
        """What the batch is to make."""
        return Task(
            opening=self._model.opening(text, cache),
            generator=self._generator,
            timesteps=settings.inference_timesteps,
            cfg_value=settings.cfg_value,
            min_len=settings.min_len,
            max_len=settings.most_steps(self.tokens(text)),
            streams=streams,
        )

    def _streamed(self, task: Task) -> Iterator[tuple[torch.Tensor | None, None, list[torch.Tensor]]]:
        """The patches in the form in which voxcpm's generator yields them."""
        with closing(self._patches(task)) as patches:
            for patch in patches:
                assert patch.samples is not None
                yield patch.samples[None], None, [patch.latents]

    def _patches(self, task: Task) -> Generator[Patch, None, None]:
        out = self._steps.admit(self._row, task)
        ended = False
        try:
            while not ended:
                patch = out.get()
                ended = isinstance(patch, EngineError) or patch.ended or patch.fault is not None
                if isinstance(patch, EngineError):
                    raise patch
                yield patch
                if patch.fault is not None:
                    raise patch.fault
        finally:
            if not ended:  # the row is free already, if it has
                self._steps.leave(self._row, out)
