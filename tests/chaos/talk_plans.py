"""What talking clients say, derived from a seed, and what each reply must be: that of an undisturbed run."""

import hashlib
import json
import random
from collections.abc import Sequence

import attrs

from tests.chaos.workload import REPRODUCIBLE, SAMPLE_RATE_HZ, SENTENCES, tune_of

#: The space that replies; `tts` speaks.
LLM = "llm"
SPEECH = REPRODUCIBLE
#: All conversations have the same session, so that nothing but principal and user keeps them apart.
SESSION = "chat-1"
#: Time between two words of a reply.
WORD_S = 0.05

#: What a talking client does -> its relative frequency.
DEEDS = {
    "follow": 4,  # follows the events to the end
    "whole": 1,  # waits for the reply as one answer
    "leave": 3,  # its connection is closed in the middle; it comes back and asks for the turns
    "go on": 3,  # does not wait for the end before it says the next
    "interrupt": 3,  # interrupts, and mostly says what was heard
}

Messages = Sequence[dict[str, str]]


def retort(messages: Messages) -> str:
    """What the language space replies: another text for each other prompt."""
    key = hashlib.sha256(json.dumps(list(messages), ensure_ascii=False).encode()).hexdigest()
    draws = random.Random(key)
    return " ".join((f"{key[:12]}.", *draws.choices(SENTENCES, k=draws.randrange(1, 6))))


@attrs.frozen
class Saying:
    """One text, and what its speaker does then.

    Args:
        text: unique in a run.
        deed: one of `DEEDS`.
        interrupt: whether it interrupts the reply before it.
        speak: whether the reply is spoken.
        at_event: the number of events after which the speaker does what its deed says.
        tells_heard: whether an interrupter says before what was heard.
        seed: of the tune that speaks each piece of the reply.
        duration_s: of it.
    """

    text: str
    deed: str
    interrupt: bool
    speak: bool
    at_event: int
    tells_heard: bool
    seed: int
    duration_s: float

    @property
    def piece_samples(self) -> int:
        """Samples of the speech of each piece."""
        return round(self.duration_s * SAMPLE_RATE_HZ)

    def speech(self, reply: str) -> bytes:
        """The samples of a reply."""
        return tune_of(reply, self.seed, self.duration_s)

    @property
    def body(self) -> bytes:
        """Of the `say`."""
        asked = {"interrupt": self.interrupt, "speak": self.speak}
        speech = {"seed": self.seed, "duration_s": self.duration_s, "speed": 2.0}
        return json.dumps({"text": self.text, "speech_params": speech if self.speak else {}, **asked}).encode()


def draw_sayings(draws: random.Random, name: str) -> list[Saying]:
    """Draw what is said in the next conversation; depends only on the state of `draws`."""
    return [_draw_saying(draws, f"{name}.{number}") for number in range(1, draws.randrange(2, 7))]


def _draw_saying(draws: random.Random, name: str) -> Saying:
    return Saying(
        text=f"{name}: {draws.choice(SENTENCES)}",
        deed=draws.choices(list(DEEDS), list(DEEDS.values()))[0],
        interrupt=draws.random() < 0.2,
        speak=draws.random() < 0.8,
        at_event=draws.randrange(1, 25),
        tells_heard=draws.random() < 0.7,
        seed=draws.randrange(2**32),
        duration_s=round(draws.uniform(0.2, 0.8), 2),
    )
