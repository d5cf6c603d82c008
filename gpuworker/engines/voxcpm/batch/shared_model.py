"""A loaded model with a batch over it, and its proof that runs do not change each other."""

from collections.abc import Sequence

import attrs
import torch

from gpuworker.engines.voxcpm.batch.device import attention_name
from gpuworker.engines.voxcpm.batch.proof import is_independent
from gpuworker.engines.voxcpm.batch.rows import Batch, Task
from gpuworker.engines.voxcpm.batch.seat import Seat
from gpuworker.engines.voxcpm.batch.steps import Steps
from gpuworker.engines.voxcpm.errors import named_faults
from gpuworker.engines.voxcpm.model import Model
from gpuworker.engines.voxcpm.speech_model import Settings

#: What is spoken for the proof, and beside it.
TEXT = "Hello, this is the first sentence."
OTHER_TEXTS = ("And this is another.", "One more, which is a good deal longer than the others, so that it differs.")
STEPS, OTHER_STEPS = 4, 16


@attrs.frozen(eq=False)
class SharedModel:
    """One model for many runs.

    Args:
        name: what samples depend on besides the model: the batch's size, its context, and which attention it uses.
        seats: one for each row.
        steps: the thread that uses the model.
        independent: whether the samples of a run were the same in another row, beside others.
    """

    name: str
    seats: Sequence[Seat]
    steps: Steps
    independent: bool

    @classmethod
    def of(cls, model: Model, rows: int, *, record: bool) -> "SharedModel":
        """Put a batch over a model, which must not be used in any other way from now on.

        Args:
            model: loaded, and not compiled.
            rows: how many runs at once.
            record: on CUDA, record the steps as CUDA graphs.

        Raises:
            EngineError: memory ran out.
        """
        steps = Steps(model.device)
        with named_faults(model.context):
            batch = steps.start(lambda: Batch(model.tts, rows, device=model.device, record=record))
        seats = [Seat(model, batch, steps, row) for row in range(rows)]

        def task(number: int) -> Task:
            texts = OTHER_TEXTS if number else (TEXT,)
            settings = Settings(
                cfg_value=2.0 + 0.1 * number,
                inference_timesteps=4 + number % 3,
                min_len=OTHER_STEPS if number else STEPS,
                max_len=OTHER_STEPS if number else STEPS,
            )
            made = seats[0].task(texts[number % len(texts)], None, settings, streams=True)
            generator = torch.Generator(device=model.device).manual_seed(number)
            return attrs.evolve(made, generator=generator)

        with named_faults(model.context):
            independent = steps.ask(lambda: is_independent(batch, task))
        return cls(f"batch={rows} context={batch.places} {attention_name(model.device)}", seats, steps, independent)
