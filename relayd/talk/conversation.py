"""One conversation: its turns, which of them runs, and what the model is told. Pure: events in, records out.

What is said and the reply to it are two entries in `turns`, with numbers that follow each other. One reply is made at
a time; others wait in order. A reply ends as `done`, `interrupted` or `failed`, and only what was heard of it is ever
in a prompt.
"""

from collections import deque
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import attrs

from relayd.store.records import MAX_TURN_CHARS, TurnRecord
from relayd.talk.playing import Mark, played_chars

#: Replies of one conversation that may wait.
MAX_WAITING = 100
#: Replies of one conversation of which somebody may still say what was heard.
MAX_SPOKEN = 20
#: Marks of one reply; of more than so many, every second is kept.
MAX_MARKS = 256
#: Size of all messages of one prompt in UTF-8: a request's params have 64 KiB.
MAX_PROMPT_BYTES = 56_000
#: What a message takes beside its text.
MESSAGE_BYTES = 32


class TurnState(StrEnum):
    """The states of a turn."""

    WAITING = "waiting"
    THINKING = "thinking"
    SPEAKING = "speaking"
    DONE = "done"
    INTERRUPTED = "interrupted"
    FAILED = "failed"


@attrs.define(eq=False)
class Making:
    """The reply that is being made: what has come of it so far."""

    number: int
    #: What the state says while it runs.
    state: TurnState = TurnState.THINKING
    content: str = ""
    marks: list[Mark] = attrs.field(factory=list)
    #: Samples of its speech that have come; and that were played, as far as somebody has said.
    samples: int = 0
    played: int | None = None
    #: Whether it is spoken, or will be; and whether all of its speech has come.
    spoken: bool = False
    spoken_whole: bool = False

    def count_heard(self, content: str) -> int | None:
        """Return how many characters of its content were heard; None for all of them."""
        if not self.spoken:
            return None
        marks = self.marks
        if self.spoken_whole and (not marks or marks[-1].text_end < len(content)):
            marks = [*marks, Mark(len(content), self.samples)]
        played = self.samples if self.played is None else self.played
        chars = played_chars(content, marks, played)
        return None if chars >= len(content) else chars


@attrs.define(eq=False)
class Conversation:
    """The turns of one conversation.

    Args:
        talk_id: its id.
        turns: by number, in order; those that wait are continued with `resume`.
        spoken: of the last replies that were spoken, what was made of them but their content: for a listener who says
            later what was heard.
    """

    talk_id: str
    turns: dict[int, TurnRecord] = attrs.field(factory=dict)
    making: Making | None = None
    _waiting: deque[int] = attrs.field(factory=deque)
    _spoken: dict[int, Making] = attrs.field(factory=dict)
    _next: int = 0
    #: Characters of all turns.
    _chars: int = 0

    def __attrs_post_init__(self) -> None:
        self._next = max(self.turns, default=-1) + 1
        self._waiting.extend(number for number, turn in self.turns.items() if not turn.ended)
        self._chars = sum(len(turn.content) for turn in self.turns.values())

    @property
    def waiting(self) -> int:
        """Number of replies that wait."""
        return len(self._waiting)

    # -- what is said

    def add(self, role: str, content: str, at: float) -> TurnRecord:
        """Add a turn that nobody answers."""
        turn = TurnRecord(talk_id=self.talk_id, number=self._use_number(), role=role, content=content, at=at)
        self.turns[turn.number] = turn
        self._chars += len(content)
        return turn

    def say(self, text: str | None, at: float, **reply: Any) -> tuple[TurnRecord, ...]:
        """Add what the user says, if anything, and the reply, which waits; returns the new turns, the reply last.

        Args:
            text: None to have a reply to what is there.
            at: Unix seconds.
            reply: more fields of the reply.
        """
        said = () if text is None else (self.add("user", text, at),)
        waits = TurnRecord(
            talk_id=self.talk_id, number=self._use_number(), role="assistant", state=TurnState.WAITING, at=at, **reply
        )
        self.turns[waits.number] = waits
        self._waiting.append(waits.number)
        return (*said, waits)

    def _use_number(self) -> int:
        number, self._next = self._next, self._next + 1
        return number

    # -- the reply that is made

    def begin(self) -> TurnRecord | None:
        """Begin the next reply that waits; None if there is none, or one is being made."""
        if self.making is not None or not self._waiting:
            return None
        turn = self.turns[self._waiting.popleft()]
        self.making = Making(turn.number, spoken=turn.speech_request is not None)
        return turn

    def delta(self, text: str) -> bool:
        """Add to the reply; False if it would be too long."""
        making = self._made()
        if len(making.content) + len(text) > MAX_TURN_CHARS:
            return False
        making.content += text
        return True

    def speech(self, samples: int) -> None:
        """Note that more of its speech has come."""
        making = self._made()
        making.samples += samples
        making.state = TurnState.SPEAKING

    def mark(self, text_end: int, sample: int) -> None:
        """Note what its speech has spoken; a mark that goes back is not true."""
        marks = self._made().marks
        if not marks or (text_end >= marks[-1].text_end and sample >= marks[-1].sample):
            marks.append(Mark(text_end, sample))
        if len(marks) > MAX_MARKS:
            del marks[-2::-2]

    def speech_ended(self, *, whole: bool) -> None:
        """Note that no more of its speech comes. If none came at all, its text is what was heard."""
        making = self._made()
        making.spoken_whole = whole
        if not making.samples:
            making.spoken = False

    def end(self, state: TurnState, code: str | None = None, message: str | None = None) -> TurnRecord:
        """End the reply, and return it as it is now."""
        making = self._made()
        self.making = None
        if making.marks or making.samples:
            self._spoken[making.number] = making
            if len(self._spoken) > MAX_SPOKEN:
                del self._spoken[next(iter(self._spoken))]
        waits = self.turns.get(making.number)
        assert waits is not None, "a reply that is being made is not deleted"
        content, making.content = making.content, ""
        heard = making.count_heard(content) if state is not TurnState.DONE or making.played is not None else None
        return self._put(waits, state, code, message, content=content, heard_chars=heard)

    def _put(
        self, turn: TurnRecord, state: TurnState, code: str | None, message: str | None, **more: Any
    ) -> TurnRecord:
        ended = attrs.evolve(turn, state=state, code=code, message=message, options=None, **more)
        self._chars += len(ended.content) - len(turn.content)
        self.turns[turn.number] = ended
        return ended

    def _made(self) -> Making:
        assert self.making is not None, "no reply is being made"
        return self.making

    # -- other events

    def refuse(self, number: int, code: str, message: str) -> TurnRecord | None:
        """End a reply that waits; None if it does not."""
        if number not in self._waiting:
            return None
        self._waiting.remove(number)
        return self._put(self.turns[number], TurnState.FAILED, code, message)

    def note_played(self, number: int, samples: int) -> TurnRecord | None:
        """Note how much of the speech of a reply was played; returns the turn if it has ended and is changed by it."""
        if self.making is not None and self.making.number == number:
            self.making.played = samples
            return None
        made, turn = self._spoken.get(number), self.turns.get(number)
        if made is None or turn is None:
            return None
        made.played = samples
        now = attrs.evolve(turn, heard_chars=made.count_heard(turn.content))
        self.turns[number] = now
        return now if now != turn else None

    def delete(self, number: int) -> bool:
        """Delete a turn; False if there is none, or its reply is still to come."""
        turn = self.turns.get(number)
        if turn is None or not turn.ended:
            return False
        del self.turns[number]
        self._chars -= len(turn.content)
        self._spoken.pop(number, None)
        return True

    def trim(self, most: int, most_chars: int) -> int | None:
        """Delete the oldest ended turns over `most`, or over so many characters; returns the number of the last one."""
        last = None
        while len(self.turns) > most or self._chars > most_chars:
            oldest = next(iter(self.turns))
            if not self.delete(oldest):
                break
            last = oldest
        return last

    # -- the prompt

    def prompt(self, number: int, instructions: str, most_chars: int) -> list[dict[str, str]]:
        """Return the messages for the reply `number`: the instructions, and the newest turns before it that fit.

        The turns of user and assistant alternate, beginning with the user: those of one role that follow each other are
        one message. The newest turn is always among them.
        """
        system = [instructions] if instructions else []
        newest: list[TurnRecord] = []
        chars, size = len(instructions), len(instructions.encode()) + MESSAGE_BYTES
        for each, turn in reversed(self.turns.items()):
            content = played_content(turn)
            if each >= number or not content or not turn.ended:
                continue
            chars += len(content)
            size += len(content.encode()) + MESSAGE_BYTES
            if newest and (chars > most_chars or size > MAX_PROMPT_BYTES):
                break
            newest.append(turn)
        newest.reverse()
        system += [played_content(turn) for turn in newest if turn.role == "system"]
        messages: list[dict[str, str]] = [{"role": "system", "content": "\n\n".join(system)}] if system else []
        return messages + _alternating([turn for turn in newest if turn.role != "system"])


def played_content(turn: TurnRecord) -> str:
    """Return what of a turn a listener has heard, without white space around it."""
    content = turn.content if turn.heard_chars is None else turn.content[: turn.heard_chars]
    return content.strip()


def _alternating(turns: Sequence[TurnRecord]) -> list[dict[str, str]]:
    messages: list[dict[str, str]] = []
    for turn in turns:
        content = played_content(turn)
        if messages and messages[-1]["role"] == turn.role:
            messages[-1]["content"] += f"\n\n{content}"
        elif messages or turn.role == "user":
            messages.append({"role": turn.role, "content": content})
    return messages
