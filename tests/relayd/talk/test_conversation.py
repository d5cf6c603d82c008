"""The conversation: its turns, its prompt, and what never happens in it."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from relayd.store.records import MAX_TURN_CHARS, TurnRecord
from relayd.talk.conversation import MAX_MARKS, MAX_PROMPT_BYTES, Conversation, TurnState, played_content


def say(conversation: Conversation, text: str | None, speech: str | None = None) -> TurnRecord:
    return conversation.say(text, 1.0, text_request="a" * 32, speech_request=speech, options=b"\x80")[-1]


def answered(conversation: Conversation, text: str, reply: str) -> None:
    say(conversation, text)
    conversation.begin()
    assert conversation.delta(reply)
    conversation.end(TurnState.DONE)


def prompt(conversation: Conversation, instructions: str = "", most_chars: int = 1000) -> list[tuple[str, str]]:
    number = max(conversation.turns) + 1
    return [(each["role"], each["content"]) for each in conversation.prompt(number, instructions, most_chars)]


def test_the_prompt_has_the_instructions_and_the_newest_turns_that_fit() -> None:
    talk = Conversation("t")
    for number in range(10):
        answered(talk, f"question {number}", f"answer {number}")
    say(talk, "and now?")
    newest = [("user", "question 9"), ("assistant", "answer 9"), ("user", "and now?")]
    assert prompt(talk, "Be brief.", 40) == [("system", "Be brief."), *newest]
    assert len(prompt(talk)) == 21
    assert prompt(talk, most_chars=1) == [("user", "and now?")], "what was said last is always there"


def test_the_roles_alternate_whatever_was_lost() -> None:
    talk = Conversation("t")
    say(talk, "first")
    talk.begin()
    talk.end(TurnState.FAILED, "no_worker", "")
    say(talk, "second")
    talk.add("system", "It rains.", 2.0)
    talk.add("user", "third", 3.0)
    assert prompt(talk) == [("system", "It rains."), ("user", "first\n\nsecond\n\nthird")]
    begun = Conversation("t")
    begun.add("assistant", "Welcome!", 1.0)
    begun.add("user", "Hi", 1.0)
    assert prompt(begun) == [("user", "Hi")], "models want the user first"


def test_a_prompt_fits_into_a_request_whatever_its_characters_are() -> None:
    talk = Conversation("t")
    for _ in range(30):
        answered(talk, "你" * 1000, "𝄞" * 1000)
    messages = prompt(talk, most_chars=50_000)
    assert sum(len(content.encode()) for _, content in messages) <= MAX_PROMPT_BYTES
    assert len(messages) > 5


def test_of_an_interrupted_reply_only_what_was_heard_is_told() -> None:
    talk = Conversation("t")
    say(talk, "Count!", "b" * 32)
    talk.begin()
    talk.delta("One two three. Four five six.")
    talk.speech(1400)
    talk.mark(14, 1400)
    talk.speech(700)
    ended = talk.end(TurnState.INTERRUPTED)
    assert played_content(ended) == "One two three."
    assert talk.note_played(ended.number, 750) is not None
    assert prompt(talk)[-1] == ("assistant", "One two")
    assert talk.note_played(ended.number, 750) is None, "nothing new"
    assert talk.note_played(0, 1) is None


def test_a_text_that_was_not_spoken_was_read() -> None:
    talk = Conversation("t")
    for speech in (None, "b" * 32):
        say(talk, "Count!", speech)
        talk.begin()
        talk.delta("One two")
        if speech:
            talk.speech_ended(whole=False)
        assert talk.end(TurnState.INTERRUPTED).heard_chars is None


def test_speech_without_marks_is_known_when_it_is_whole() -> None:
    talk = Conversation("t")
    say(talk, "Count!", "b" * 32)
    talk.begin()
    talk.delta("One two three four")
    talk.speech(1800)
    talk.speech_ended(whole=True)
    ended = talk.end(TurnState.DONE)
    assert ended.heard_chars is None
    assert talk.note_played(ended.number, 900) == talk.turns[ended.number]
    assert played_content(talk.turns[ended.number]) == "One two"


def test_of_a_very_long_speech_fewer_marks_are_kept_and_it_is_still_known_what_was_heard() -> None:
    talk = Conversation("t")
    say(talk, "Read it to me.", "b" * 32)
    talk.begin()
    for number in range(1, 1_001):
        assert talk.delta("four ")
        talk.speech(50)
        talk.mark(5 * number, 50 * number)
    assert talk.making is not None
    assert len(talk.making.marks) <= MAX_MARKS
    assert talk.making.marks[-1].text_end == 5_000
    talk.making.played = 25_025
    heard = talk.end(TurnState.INTERRUPTED).heard_chars
    assert heard is not None
    assert abs(heard - 2_500) <= 5


def test_a_reply_has_a_limit() -> None:
    talk = Conversation("t")
    say(talk, "Never stop!")
    talk.begin()
    assert talk.delta("x" * MAX_TURN_CHARS)
    assert not talk.delta("y")


def test_old_turns_go_and_those_to_come_stay() -> None:
    talk = Conversation("t")
    for number in range(5):
        answered(talk, str(number), str(number))
    waits = say(talk, "new")
    assert talk.trim(6, 99) == 5
    assert talk.trim(6, 5) == 7, "each has one character, but for what was said last"
    assert sorted(talk.turns) == [8, 9, 10, 11]
    assert talk.trim(1, 99) == 10
    assert sorted(talk.turns) == [waits.number]
    assert not talk.delete(waits.number)
    assert Conversation("t", dict(talk.turns)).begin() == waits, "after a restart it still waits"


WORDS = st.text(alphabet="abc .", min_size=1, max_size=12)


class Talking(RuleBasedStateMachine):
    """Any order of events keeps the rules."""

    def __init__(self) -> None:
        super().__init__()
        self.talk = Conversation("t")
        self.begun: list[int] = []
        self.ended: dict[int, TurnRecord] = {}
        self.asked: list[int] = []
        #: Reply -> the most of its text that its marks allow to have been heard.
        self.most: dict[int, str] = {}

    @rule(text=st.none() | WORDS, speaks=st.booleans())
    def say(self, text: str | None, speaks: bool) -> None:
        self.asked.append(say(self.talk, text, "b" * 32 if speaks else None).number)

    @rule()
    def begin(self) -> None:
        runs = self.talk.making is not None
        turn = self.talk.begin()
        if turn is not None:
            assert not runs, "one reply at a time"
            self.begun.append(turn.number)
            assert turn.number == min(set(self.asked) - set(self.ended)), "in order"

    @precondition(lambda self: self.talk.making is not None)
    @rule(text=WORDS)
    def delta(self, text: str) -> None:
        assert self.talk.delta(text)

    @precondition(lambda self: self.talk.making is not None and self.talk.making.spoken)
    @rule(samples=st.integers(1, 50), data=st.data())
    def speech(self, samples: int, data: st.DataObject) -> None:
        making = self.talk.making
        assert making is not None
        self.talk.speech(samples)
        self.talk.mark(data.draw(st.integers(0, len(making.content))), making.samples)

    @precondition(lambda self: self.talk.making is not None)
    @rule(state=st.sampled_from([TurnState.DONE, TurnState.INTERRUPTED, TurnState.FAILED]))
    def end(self, state: TurnState) -> None:
        making = self.talk.making
        assert making is not None
        last = making.marks[-1].text_end if making.marks else 0
        turn = self.talk.end(state)
        self.ended[turn.number] = turn
        self.most[turn.number] = turn.content if state is TurnState.DONE or not making.spoken else turn.content[:last]

    @precondition(lambda self: self.talk.waiting)
    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(set(self.asked) - set(self.begun) - set(self.ended))))
        turn = self.talk.refuse(number, "queue_full", "")
        assert turn is not None
        self.ended[number], self.most[number] = turn, ""

    @precondition(lambda self: self.ended)
    @rule(data=st.data(), samples=st.integers(0, 200))
    def heard(self, data: st.DataObject, samples: int) -> None:
        self.talk.note_played(data.draw(st.sampled_from(sorted(self.ended))), samples)

    @invariant()
    def the_prompt_holds_only_what_was_heard(self) -> None:
        messages = self.talk.prompt(len(self.talk.turns) * 2 + 99, "", 10_000)
        roles = [message["role"] for message in messages]
        assert all(before != after for before, after in pairwise(roles))
        assert roles[:1] in ([], ["user"])
        heard = [self.most[number].strip() for number in sorted(self.most)]
        told = [message["content"] for message in messages if message["role"] == "assistant"]
        for content in told:
            for part in content.split("\n\n"):
                assert any(each.startswith(part) for each in heard)

    @invariant()
    def every_reply_is_to_come_or_has_ended(self) -> None:
        for number in self.asked:
            ended = self.talk.turns[number].ended
            assert ended == (number in self.ended)
        running = [number for number in self.begun if number not in self.ended]
        assert len(running) == (self.talk.making is not None)
        assert self.talk.waiting == len(set(self.asked) - set(self.begun) - set(self.ended))


TestTalking: Any = Talking.TestCase
TestTalking.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("most", [1, 3])
def test_the_newest_turns_are_kept(most: int) -> None:
    talk = Conversation("t")
    for number in range(4):
        answered(talk, str(number), "ok")
    talk.trim(most, 99)
    assert len(talk.turns) == most
