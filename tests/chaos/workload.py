"""What is asked for, drawn from a seed, and the samples that each answer must have: those of an undisturbed run."""

import hashlib
import random
from typing import Any

import attrs

from gpuworker.engines.mock import Tune, tune_key

#: Low, so that a machine with two cores has time for many streams.
SAMPLE_RATE_HZ = 8_000
SAMPLE_BYTES = 2
#: Of no note a whole number of cycles, so that two swapped chunks show even inside one note.
CHUNK_MS = 53
#: Losses after which a request is given up, in spaces where only chance takes workers down.
PATIENT_ATTEMPTS = 50
#: The same in the space of those that take their slot down themselves.
FRAIL_ATTEMPTS = 3
#: And how long it waits there for a hung engine.
FRAIL_IDLE_S = 1.2

REPRODUCIBLE, LOOSE, FRAIL = "tts", "loose", "frail"

_tune = Tune(SAMPLE_RATE_HZ)


@attrs.frozen(kw_only=True)
class Plan:
    """One request and what its listener does.

    Args:
        name: unique in a run; what its text is, so that no two requests make the same tune.
        kind: one of `KINDS`.
        space: `tts` (reproducible), `loose` (not) or `frail` (its engine takes the slot down).
        seed: of the tune.
        duration_s: of audio.
        speed: audio seconds made in one second.
        retry: as in `submit`.
        fail: script of the mock's failure; None for none.
        progress: `progress` frames in between.
        at_frame: audio frames after which the kind's deed is done.
        later_s: from leaving to coming back.
    """

    name: str
    kind: str
    space: str
    seed: int
    duration_s: float
    speed: float
    retry: str
    fail: dict[str, Any] | None
    progress: int
    at_frame: int
    later_s: float

    @property
    def params(self) -> dict[str, Any]:
        """Of the `submit`."""
        params: dict[str, Any] = {
            "text": self.name,
            "seed": self.seed,
            "duration_s": self.duration_s,
            "speed": self.speed,
            "progress": self.progress,
        }
        return params | ({"fail": self.fail} if self.fail else {})

    @property
    def reproducible(self) -> bool:
        """Whether another attempt makes the same frames."""
        return self.space != LOOSE

    def expected(self) -> bytes:
        """The samples of an undisturbed run."""
        return _tune.pcm(tune_key(self.name, self.seed), 0, round(self.duration_s * SAMPLE_RATE_HZ))

    def expected_sha256(self) -> str:
        """Of all of them."""
        return hashlib.sha256(self.expected()).hexdigest()


#: What a listener does -> how often.
KINDS = {
    "plain": 8,  # submits and listens to the end
    "again": 3,  # and fetches the result once more afterwards
    "second": 3,  # another connection listens too, from somewhere in the middle on
    "twin": 2,  # the same submit comes over a second connection as well
    "detached": 3,  # submits, leaves, and fetches all of it later
    "by hand": 2,  # the same, but goes on after the frames it has
    "heir": 3,  # dies; another connection takes over in time
    "abandoned": 1,  # dies, and nobody comes
    "cancelled": 2,  # is cancelled in the middle
    "poison": 1,  # takes down every slot it runs in, or hangs there
}


def draw_plan(random: random.Random, name: str) -> Plan:
    """The next plan of a client; a pure function of the state of `random`."""
    kind = random.choices(list(KINDS), list(KINDS.values()))[0]
    duration_s = round(random.choice((0.3, 1.0, 2.0, 3.0, 5.0)) * random.uniform(0.7, 1.3), 2)
    space = LOOSE if kind in ("plain", "again", "second", "detached", "cancelled") and random.random() < 0.3 else ""
    space = FRAIL if kind == "poison" else space or REPRODUCIBLE
    frames = int(duration_s * 1000 / CHUNK_MS)
    at_frame = random.randrange(max(1, frames))
    if kind == "cancelled":  # so long that it cannot end of itself before the cancel is carried out
        duration_s = 90.0
    fail = None
    if kind == "poison":
        fail = {"how": random.choice(("exit", "hang")), "at": random.randrange(max(1, frames))}
    return Plan(
        name=name,
        kind=kind,
        space=space,
        seed=random.randrange(2**32),
        duration_s=duration_s,
        speed=round(random.uniform(0.8, 2.0), 2),
        retry=random.choice(("before_output", "before_output", "always", "never")),
        fail=fail,
        progress=random.choice((0, 0, 7)),
        at_frame=at_frame,
        later_s=round(random.uniform(0.0, 4.0), 2),
    )
