"""The requests of a run, derived from a seed, and the samples that each must return: those of an undisturbed run."""

import hashlib
import random
from collections.abc import AsyncIterator, Mapping
from typing import Any

import attrs
import trio

from gpuworker.engines.mock import Tune, tune_key
from gpuworker.speaking.live_text import pieces_of

#: Low, so that a machine with two cores can run many streams.
SAMPLE_RATE_HZ = 8_000
SAMPLE_BYTES = 2
#: Not a whole number of cycles of any note, so that swapped chunks are visible even inside one note.
CHUNK_MS = 53
#: Losses after which a request is given up, in spaces where only random faults stop workers.
PATIENT_ATTEMPTS = 50
#: The same in the space of requests that end their own slot.
FRAIL_ATTEMPTS = 3
#: `idle_timeout_s` of that space: how long it waits for a hung engine.
FRAIL_IDLE_S = 1.2

REPRODUCIBLE, LOOSE, FRAIL = "tts", "loose", "frail"
#: Spaces whose requests put out text, which others speak: the same, and one whose attempts do not go on.
TELL, LOOSE_TELL = "tell", "muse"
#: Spaces of many short requests, of requests that nobody serves, and of the hostile worker.
DEEP, HELD, LAIR = "deep", "held", "lair"

#: The input that the engine takes, if it is given; its tune depends on it.
INPUT = "voice"
#: What is dictated: sentences in languages that end them in other ways.
SENTENCES = (
    "The relay stores every piece before the worker has it.",
    "Mr. J. R. Smith fed it, word by word!",
    "机器把每个字都记下来了。",
    "Сервер помнит всё, что ему сказали.",
    "彼は「もう一度」と言った。",
    "And what if the line is cut in the middle of a word?",
    "那就从断开的地方继续说！",
)

#: Words of a text that takes long to be put out, at 5 a second.
LONG_WORDS = 300

_tune = Tune(SAMPLE_RATE_HZ)


def digest(data: bytes) -> str:
    """What the tune depends on of an input."""
    return hashlib.sha256(data).hexdigest()


def tune_of(text: str, seed: int, duration_s: float, voice: str = "") -> bytes:
    """The samples of a text that is spoken piece by piece."""
    samples = round(duration_s * SAMPLE_RATE_HZ)
    return b"".join(_tune.pcm(tune_key(piece.text + voice, seed), 0, samples) for piece in pieces_of([text]))


@attrs.frozen(kw_only=True)
class Plan:
    """One request, and what its listener does.

    Args:
        name: unique in a run; also its text, so that no two requests make the same tune.
        kind: one of `KINDS` or `WEB_KINDS`.
        space: `tts` (reproducible), `loose` (not) or `frail` (its engine ends the slot).
        seed: the seed of the tune.
        duration_s: seconds of audio.
        speed: seconds of audio made per second.
        retry: as in `submit`.
        fail: the mock engine's script of a failure; None for none.
        progress: the number of `progress` frames.
        at_frame: the number of audio frames after which the listener does what its kind says.
        later_s: seconds from leaving to coming back.
        input_bytes: size of the input; 0 for none.
        queue_timeout_s: as in `submit`; None for that of the space.
        text: what is dictated while the request runs, as the live input `text`; each piece has `duration_s`. Without
            it, `name` is the param.
        word_s: seconds between two words of it, at most.
        source: the request whose output is that input, instead of a dictation; it puts out `text`.
        grouped: whether both are of one group.
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
    input_bytes: int = 0
    queue_timeout_s: float | None = None
    text: str = ""
    word_s: float = 0.0
    source: "Plan | None" = None
    grouped: bool = False

    async def dictate(self, random: random.Random) -> AsyncIterator[bytes]:
        """Yield the text in parts of any size, cut anywhere, also inside a character."""
        data = self.text.encode()
        while data:
            size = random.choice((1, 3, 7, 20, 60))
            yield data[:size]
            data = data[size:]
            await trio.sleep(random.uniform(0.0, self.word_s))

    @property
    def inputs(self) -> dict[str, bytes]:
        """Of the `submit`."""
        return {INPUT: random.Random(self.seed).randbytes(self.input_bytes)} if self.input_bytes else {}

    @property
    def params(self) -> dict[str, Any]:
        """The params of the `submit`."""
        params: dict[str, Any] = {
            **({"text": self.text, "output": "text"} if self.tells else {} if self.text else {"text": self.name}),
            "seed": self.seed,
            "duration_s": self.duration_s,
            "speed": self.speed,
            "progress": self.progress,
        }
        return params | ({"fail": self.fail} if self.fail else {})

    @property
    def reproducible(self) -> bool:
        """Whether another attempt makes the same frames."""
        return self.space not in (LOOSE, LOOSE_TELL)

    @property
    def tells(self) -> bool:
        """Whether it puts out its text, instead of audio."""
        return self.space in (TELL, LOOSE_TELL)

    def expected(self) -> bytes:
        """The samples of an undisturbed run, or the text."""
        if self.tells:
            return self.text.encode()
        voice = "".join(map(digest, self.inputs.values()))
        if self.text:
            return tune_of(self.text, self.seed, self.duration_s, voice)
        return _tune.pcm(tune_key(self.name + voice, self.seed), 0, round(self.duration_s * SAMPLE_RATE_HZ))

    def expected_sha256(self) -> str:
        """SHA-256 of the expected samples."""
        return hashlib.sha256(self.expected()).hexdigest()


#: What a listener does -> its relative frequency.
KINDS = {
    "plain": 8,  # submits, and listens to the end
    "again": 3,  # and fetches the result again afterwards
    "second": 3,  # another connection listens too, from a frame in the middle
    "pried": 1,  # a client of another principal asks about it, and must not be told
    "twin": 2,  # the same submit is also sent over a second connection
    "detached": 3,  # submits, leaves, and fetches all of it later
    "by hand": 2,  # the same, but continues after the frames that it has
    "heir": 3,  # its connection is lost; another one takes over in time
    "abandoned": 1,  # its connection is lost, and no other takes over
    "cancelled": 2,  # is cancelled in the middle
    "poison": 1,  # ends every slot in which it runs, or hangs there
    "dictated": 4,  # dictates its text while it listens
    "dictated twice": 1,  # and another client dictates the same at the same time
    "dictated on": 2,  # its connection is lost in the middle; another one dictates from the beginning
    "piped": 4,  # speaks what another request puts out
    "piped on": 2,  # and its connection is lost in the middle; another one takes over in time
    "piped from cancelled": 1,  # and the other is cancelled in the middle
    "piped from broken": 1,  # and the engine of the other fails in the middle
    "piped and cancelled": 2,  # and is cancelled in the middle; then so is the other, if they are of one group
}

DICTATED = ("dictated", "dictated twice", "dictated on")
PIPED = ("piped", "piped on", "piped from cancelled", "piped from broken", "piped and cancelled")
_ALSO_LOOSE = ("plain", *DICTATED, *PIPED, "again", "second", "detached", "cancelled", "events", "audio", "deleted")
#: The same for a client that uses HTTP.
WEB_KINDS = {
    "events": 4,  # puts a request, and follows its events; after a cut, from the last one on
    "audio": 3,  # puts one that needs no holder, and downloads its audio; after a cut, what is missing if it can
    "deleted": 1,  # puts one, and deletes it in the middle
    "speech": 3,  # uses OpenAI's API, where the response is the request; after a cut, a new one
}


def draw_short_plan(random: random.Random, name: str) -> Plan:
    """Draw one of the many short requests of a burst; some of them do not wait for long."""
    return Plan(
        name=name,
        kind="plain",
        space=DEEP,
        seed=random.randrange(2**32),
        duration_s=round(random.uniform(0.1, 0.4), 2),
        speed=10.0,
        retry=random.choice(("before_output", "always")),
        fail=None,
        progress=0,
        at_frame=0,
        later_s=0.0,
        queue_timeout_s=random.choice((None, None, None, round(random.uniform(0.5, 8.0), 2))),
    )


def draw_plan(random: random.Random, name: str, kinds: Mapping[str, int] = KINDS) -> Plan:
    """Draw the next plan of a client; depends only on the state of `random`."""
    kind = random.choices(list(kinds), list(kinds.values()))[0]
    duration_s = round(random.choice((0.3, 1.0, 2.0, 3.0, 5.0)) * random.uniform(0.7, 1.3), 2)
    space = LOOSE if kind in _ALSO_LOOSE and random.random() < 0.3 else ""
    space = FRAIL if kind == "poison" else space or REPRODUCIBLE
    frames = int(duration_s * 1000 / CHUNK_MS)
    at_frame = random.randrange(max(1, frames))
    if kind in ("cancelled", "deleted"):  # so long that it cannot end before the cancel is carried out
        duration_s = 90.0
    fail = None
    if kind == "poison":
        fail = {"how": random.choice(("exit", "hang")), "at": random.randrange(max(1, frames))}
    text = ""
    if kind in DICTATED + PIPED:  # each piece is short, and there are several
        text = f"{name}. " + " ".join(random.choices(SENTENCES, k=random.randrange(1, 7)))
        duration_s = round(random.uniform(0.2, 0.8), 2)
    plan = Plan(
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
        input_bytes=random.choice((0, 0, 0, 100, 40_000, 300_000)),
        text=text,
        word_s=random.choice((0.0, 0.05, 0.2)),
    )
    if kind in PIPED:
        return _piped(random, plan)
    # OpenAI's API cannot say these.
    return attrs.evolve(plan, speed=1.0, retry="before_output", input_bytes=0) if kind == "speech" else plan


def _piped(random: random.Random, plan: Plan) -> Plan:
    """Let a plan speak what another one puts out."""
    grouped = plan.kind == "piped and cancelled" and random.random() < 0.5
    text, speed, fail, duration_s = plan.text, plan.speed, None, plan.duration_s
    words = len(text.split())
    if plan.kind == "piped from cancelled" or grouped:  # so long that it cannot end before the cancel is carried out
        text, speed = " ".join([text] * (1 + LONG_WORDS // words)), 0.3
    elif plan.kind == "piped and cancelled":
        duration_s = 90.0
    elif plan.kind == "piped from broken":
        fail = {"how": "raise", "at": random.randrange(words)}
    source = attrs.evolve(
        plan,
        name=f"{plan.name} source",
        kind="source",
        space=random.choice((TELL, TELL, LOOSE_TELL)),
        text=text,
        speed=speed,
        fail=fail,
        # A failed engine would be tried again until its attempts are used up.
        retry=random.choice(("before_output", "never") if fail else ("before_output", "always", "always", "never")),
        input_bytes=0,
    )
    at_frame = min(plan.at_frame, 5)
    return attrs.evolve(plan, text=text, source=source, grouped=grouped, at_frame=at_frame, duration_s=duration_s)
