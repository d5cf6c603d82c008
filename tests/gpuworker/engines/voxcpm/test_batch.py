"""The batch of rows, through the real package on tiny checkpoints: a speech has its samples whatever is beside it."""

import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gpuworker.engines.voxcpm.batch import device, diffusion, rows, vae
from gpuworker.engines.voxcpm.batch.rows import Batch, Patch, Task
from gpuworker.engines.voxcpm.batch.seat import Seat
from gpuworker.engines.voxcpm.batch.shared_model import SharedModel
from gpuworker.engines.voxcpm.batch.steps import Steps
from gpuworker.engines.voxcpm.model import Model, PromptCache, Settings
from gpuworker.engines.voxcpm.model_output import Samples
from gpuworker.engines.voxcpm.speech_model import SpeechModel
from tests.gpuworker.engines.voxcpm.conftest import ARCHES, voiced
from tests.support.voxcpm_checkpoint.checkpoint import write_checkpoint

#: How much chance tries, and of how many different speeches.
EXAMPLES = int(os.environ.get("BATCH_EXAMPLES", "3"))
DIFFERENT = 6 + EXAMPLES // 3
TEXTS = ("Hello there, my friend.", "What?", "A rather longer sentence, whose prefill has another length.")
#: A speech may end from the fourth step on, at about the sixth.
STOP = 6
#: Batches; each size is a fingerprint of its own, so a speech is compared only with itself in the same one.
BATCHES = [("voxcpm2", 3), ("voxcpm1.5", 5), ("voxcpm", 2), *((arch, 8) for arch in ARCHES)]
WORDS = ("Hello", "there,", "42", "my friend.", "什么？", "Ahem!", "And", "so on…")

Load = Callable[..., Model]


@pytest.fixture(scope="module")
def load(checkpoint: Callable[..., Path]) -> Load:
    """`load(arch)`: a new model each time, because a batch keeps the one that it is given."""

    def get(arch: str) -> Model:
        return Model.load(str(checkpoint(arch, STOP)), device="cpu")

    return get


@pytest.fixture(scope="module")
def prompts(load: Load) -> Callable[[str], dict[str, PromptCache | None]]:
    """`prompts(arch)`: each kind of voice, by name; the caches are the same for every model of the checkpoint."""
    made: dict[str, dict[str, PromptCache | None]] = {}

    def get(arch: str) -> dict[str, PromptCache | None]:
        if arch not in made:
            made[arch] = prompts_of(load(arch))
        return made[arch]

    return get


def prompts_of(model: Model) -> dict[str, PromptCache | None]:
    rate = model.prompt_rate
    found: dict[str, PromptCache | None] = {"none": None}
    found["short"] = model.encode(prompt=voiced(0.25, rate), prompt_text="Ah, well.", reference=None)
    found["usual"] = usual = model.encode(prompt=voiced(1.0, rate), prompt_text="Ah, well.", reference=None)
    # Long enough for a second bucket of places; encoding so much audio would take its time.
    again = usual.value["audio_feat"].repeat(-(-100 // len(usual.value["audio_feat"])), 1, 1)
    found["long"] = attrs.evolve(usual, value={**usual.value, "audio_feat": again}, patches=usual.patches + 100)
    if model.clones:
        sound = voiced(1.0, rate)
        found["reference"] = model.encode(prompt=None, prompt_text=None, reference=sound)
        found["both"] = model.encode(prompt=voiced(0.25, rate), prompt_text="Ah.", reference=sound)
    return found


# -- one row is the package --------------------------------------------------------------------------------------


def seat_of(model: Model, size: int = 1) -> tuple[Seat, Batch]:
    steps = Steps("cpu")
    batch = steps.start(lambda: Batch(model.tts, size, device="cpu"))
    return Seat(model, batch, steps, 0), batch


def spoken(model: SpeechModel, cache: PromptCache | None, how: Settings) -> Iterator[Samples]:
    """A stream, and speech made as a whole that goes on with the same noise, perhaps more than once."""
    model.seed(7)
    stream = model.stream(TEXTS[0], cache, how)
    yield from stream
    steps: list[int] = []
    again = attrs.evolve(how, retry_badcase=True, retry_badcase_max_times=2, ratio_threshold=1.0)
    whole = model.whole(TEXTS[1], cache, again, steps.append)
    yield whole.samples
    yield np.array(steps, np.float32)
    for made, text in ((stream, TEXTS[0]), (whole, TEXTS[1])):
        merged = made.as_prompt(text, cache)
        assert merged.patches > (cache.patches if cache else 0)
        yield merged.value["audio_feat"].numpy()


@pytest.mark.parametrize("arch", ARCHES)
def test_one_row_has_the_bits_of_the_package_in_every_way_to_speak(
    arch: str, load: Load, prompts: Callable[[str], dict[str, PromptCache | None]]
) -> None:
    plain, (seat, _) = load(arch), seat_of(load(arch))
    usual, fine = Settings(cfg_value=1.7, inference_timesteps=2, max_len=5), Settings(inference_timesteps=50, max_len=1)
    for name, cache in prompts(arch).items():
        for how in (usual, fine) if name == "none" else (usual,):
            pairs = list(zip(spoken(seat, cache, how), spoken(plain, cache, how), strict=True))
            assert all(np.array_equal(ours, theirs) for ours, theirs in pairs), (name, how)


@pytest.mark.parametrize("arch", ARCHES)
def test_one_row_has_the_bits_of_the_package_whatever_is_asked_and_whenever_it_stops(
    arch: str, load: Load, prompts: Callable[[str], dict[str, PromptCache | None]]
) -> None:
    plain, (seat, batch) = load(arch), seat_of(load(arch))
    voices = prompts(arch)

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=8),
        voice=st.sampled_from(sorted(voices)),
        seed=st.integers(0, 2**32 - 1),
        cfg_value=st.floats(1, 10),
        timesteps=st.integers(1, 16),
        max_len=st.integers(1, 7),
        heard=st.integers(0, 8),
    )
    def chance(
        words: list[str], voice: str, seed: int, cfg_value: float, timesteps: int, max_len: int, heard: int
    ) -> None:
        how = Settings(cfg_value=cfg_value, inference_timesteps=timesteps, max_len=max_len)

        def first(model: SpeechModel) -> list[bytes]:
            model.seed(seed)
            with closing(model.stream(" ".join(words), voices[voice], how)) as stream:
                return [samples.tobytes() for samples in islice(stream, heard)]

        assert first(seat) == first(plain)
        assert batch.live == 0

    chance()


@pytest.mark.parametrize("arch", ["voxcpm2", "voxcpm"])
def test_one_row_has_the_bits_of_the_package_in_the_type_of_released_models(arch: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, arch, dtype="bfloat16", context=256)
    plain, shared = (Model.load(str(tmp_path), device="cpu") for _ in range(2))
    seat, _ = seat_of(shared)
    prompt = plain.encode(prompt=voiced(0.5, plain.prompt_rate), prompt_text="Ah.", reference=None)
    for cache in (None, prompt):
        how = Settings(cfg_value=1.7, inference_timesteps=3, max_len=4)
        pairs = list(zip(spoken(seat, cache, how), spoken(plain, cache, how), strict=True))
        assert all(np.array_equal(ours, theirs) for ours, theirs in pairs)


def test_the_context_ends_where_that_of_the_package_ends(checkpoint: Callable[..., Path]) -> None:
    def steps_made(model: SpeechModel, more: int) -> tuple[int, str]:
        how = Settings(inference_timesteps=1, min_len=4_096, ratio_threshold=99.0)
        how = attrs.evolve(how, max_len=model.context - tokens - 1 + more)
        made = 0
        try:
            for _ in model.stream(text, None, how):
                made += 1
        except Exception as fault:  # noqa: BLE001 - it is compared
            return made, str(fault)
        return made, ""

    plain, small = (Model.load(str(checkpoint("voxcpm")), device="cpu", context=40) for _ in range(2))
    text = TEXTS[0]
    tokens = plain.tokens(text)
    seat, batch = seat_of(small)
    for more in (0, 1, 2):
        ours, theirs = steps_made(seat, more), steps_made(plain, more)
        assert ours == theirs
        assert ("filled the model's context" in ours[1]) == (more > 0)
        assert batch.live == 0


# -- many rows ---------------------------------------------------------------------------------------------------


@attrs.frozen
class Job:
    """A speech; it is made by the same task each time."""

    text: str
    voice: str
    seed: int
    timesteps: int
    cfg_value: float
    max_len: int
    streams: bool


@attrs.frozen
class Arrival:
    """When a job comes into which row, and after how many patches it is cancelled (0: not)."""

    job: Job
    row: int
    at: int
    cancelled: int


@attrs.define
class Room:
    """A batch, and what each job gave when it was alone in it, in the first row."""

    model: Model
    batch: Batch
    voices: dict[str, PromptCache | None]
    known: dict[Job, list[bytes]] = attrs.field(factory=dict)

    def task(self, job: Job) -> Task:
        return Task(
            opening=self.model.opening(job.text, self.voices[job.voice]),
            generator=torch.Generator().manual_seed(job.seed),
            timesteps=job.timesteps,
            cfg_value=job.cfg_value,
            min_len=2,
            max_len=job.max_len,
            streams=job.streams,
        )

    def drive(self, arrivals: Sequence[Arrival]) -> list[list[bytes]]:
        """What each of the arrivals gave."""
        waiting = sorted(arrivals, key=lambda arrival: arrival.at)
        speaking: dict[int, Arrival] = {}
        made: dict[int, list[bytes]] = {arrival.row: [] for arrival in arrivals}
        for turn in range(1_000):
            while waiting and waiting[0].at <= turn:
                arrival = waiting.pop(0)
                self.batch.admit(arrival.row, self.task(arrival.job))
                speaking[arrival.row] = arrival
            if not waiting and not self.batch.live:
                break
            for row, patch in self.batch.step().items() if self.batch.live else ():
                made[row].append(content(patch))
                if len(made[row]) == speaking[row].cancelled:
                    self.batch.leave(row)
        return [made[arrival.row] for arrival in arrivals]

    def alone(self, job: Job) -> list[bytes]:
        if job not in self.known:
            (self.known[job],) = self.drive([Arrival(job, 0, 0, 0)])
        return self.known[job]


def content(patch: Patch) -> bytes:
    samples = b"" if patch.samples is None else patch.samples.numpy().tobytes()
    return samples + patch.latents.numpy().tobytes()


@pytest.fixture(scope="module")
def room(load: Load, prompts: Callable[[str], dict[str, PromptCache | None]]) -> Callable[[str, int], Room]:
    """`room(arch, size)`: one batch of this size."""
    made: dict[tuple[str, int], Room] = {}

    def get(arch: str, size: int) -> Room:
        if (arch, size) not in made:
            model = load(arch)
            made[arch, size] = Room(model, Batch(model.tts, size, device="cpu"), prompts(arch))
        return made[arch, size]

    return get


def jobs(voices: Sequence[str], count: int) -> list[Job]:
    """Speeches of all kinds, the same at each call."""
    choice = random.Random(count)
    return [
        Job(
            text=choice.choice(TEXTS),
            voice=voices[number % len(voices)],
            seed=number,
            timesteps=choice.randint(1, 3),
            cfg_value=choice.choice((1.0, 1.7, 3.0)),
            max_len=choice.randint(1, 7),
            streams=number % 4 != 3,
        )
        for number in range(count)
    ]


@pytest.mark.parametrize(("arch", "size"), BATCHES)
def test_a_speech_is_the_same_whatever_comes_goes_and_stays_in_the_other_rows(
    arch: str, size: int, room: Callable[[str, int], Room]
) -> None:
    here = room(arch, size)
    speeches = jobs(tuple(here.voices), DIFFERENT)

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        drawn=st.lists(
            st.tuples(st.sampled_from(speeches), st.integers(0, 6), st.sampled_from((0, 0, 1, 2, 4))),
            min_size=1,
            max_size=size,
        ),
        places=st.permutations(range(size)),
    )
    def chance(drawn: list[tuple[Job, int, int]], places: list[int]) -> None:
        arrivals = [Arrival(job, row, at, cancelled) for (job, at, cancelled), row in zip(drawn, places, strict=False)]
        for arrival, made in zip(arrivals, here.drive(arrivals), strict=True):
            expected = here.alone(arrival.job)
            assert made == (expected[: arrival.cancelled] if arrival.cancelled else expected), arrival
        assert here.batch.live == 0

    chance()


def test_a_speech_is_the_same_while_the_longest_neighbour_needs_more_of_the_cache(
    room: Callable[[str, int], Room],
) -> None:
    here = room("voxcpm2", 3)
    job = Job(TEXTS[0], "none", 1, 2, 2.0, 8, streams=True)
    beside = Job(TEXTS[2], "long", 2, 2, 2.0, 5, streams=True)
    assert device.places_in_use("cpu", 100, 1_024) < len(here.task(beside).opening.tokens)
    together = here.drive([Arrival(job, 2, 0, 0), Arrival(beside, 0, 2, 0)])
    assert together[0] == here.alone(job)


def test_a_speech_is_the_same_after_one_in_its_row_that_was_not_finite(room: Callable[[str, int], Room]) -> None:
    here = room("voxcpm2", 3)
    job = Job(TEXTS[0], "none", 1, 2, 2.0, 8, streams=True)
    alone = here.alone(job)
    sick = attrs.evolve(job, cfg_value=math.inf, max_len=4)
    before = here.drive([Arrival(sick, 1, 0, 0)])[0]
    assert np.isnan(np.frombuffer(before[-1], np.float32)).any()
    assert here.drive([Arrival(job, 1, 0, 0)]) == [alone]


def test_a_batch_of_another_size_makes_nearly_the_same_samples(room: Callable[[str, int], Room], load: Load) -> None:
    job = Job(TEXTS[0], "none", 1, 4, 2.0, 6, streams=True)
    model = load("voxcpm2")
    one = Room(model, Batch(model.tts, 1, device="cpu"), {"none": None})
    for ours, theirs in zip(room("voxcpm2", 8).alone(job), one.alone(job), strict=True):
        gap = np.abs(np.frombuffer(ours, np.float32) - np.frombuffer(theirs, np.float32))
        assert gap.max() < 1e-4


# -- its proof ---------------------------------------------------------------------------------------------------


def test_rows_that_change_each_other_are_found_out(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return attend(query, keys, values, mask) + query.mean(dim=0, keepdim=True)

    attend = device.attend
    shared = SharedModel.of(load("voxcpm2"), 3, record=False)
    assert shared.independent
    assert shared.name == "batch=3 context=1024 gqa"
    shared.steps.close()
    monkeypatch.setattr("gpuworker.engines.voxcpm.batch.cache.attend", leaking)
    shared = SharedModel.of(load("voxcpm2"), 3, record=False)
    assert not shared.independent
    shared.steps.close()


# -- what CUDA needs, as far as a CPU can tell -------------------------------------------------------------------


class _Recordable(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    """Refuses what cannot be part of a CUDA graph: reading a value, making one on the host, and random numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        for word in ("_local_scalar_dense", "item", "nonzero", "lift_fresh", "rand", "masked_select"):
            assert word not in name, f"{name} cannot be recorded"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("arch", ARCHES)
def test_what_is_recorded_can_be(arch: str, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = 0

    def record(call: Callable[[], None], _device: str, *, record: bool) -> Callable[[], None]:
        def checked() -> None:
            nonlocal recorded
            recorded += 1
            with _Recordable():  # type: ignore[no-untyped-call]  # untyped in torch
                call()

        assert record
        return checked

    for module in (rows, diffusion, vae):
        monkeypatch.setattr(module, "recorded", record)
    model = load(arch)
    here = Room(model, Batch(model.tts, 2, device="cpu"), {"none": None})
    here.alone(Job(TEXTS[0], "none", 1, 3, 2.0, 4, streams=True))
    assert recorded >= 4 * 4  # diffusion twice, reading, advancing, and the decoder from the third on


def test_grouped_attention_is_that_of_the_package_but_for_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(shape, generator=generator) for shape in ((3, 16, 1, 8), (3, 2, 40, 8), (3, 2, 40, 8))
    )
    mask = (torch.arange(40)[None] <= torch.tensor([0, 17, 39])[:, None])[:, None, None, :]
    plain = device.attend(query, keys, values, mask)
    assert torch.allclose(device.attend_grouped(query, keys, values, mask), plain, atol=1e-6)
