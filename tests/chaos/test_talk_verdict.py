"""The rules of a verdict on a conversation."""

from typing import Any

import attrs
import pytest

from gpuworker.speaking.live_text import pieces_of
from tests.chaos.talk_plans import Saying, retort
from tests.chaos.talk_verdict import Memory, Said, Turn, judge_talk

SAYING = Saying("one: hello", "follow", False, True, 5, True, 7, 0.2)
FIRST = retort([{"role": "user", "content": "one: hello"}])
HEARD = next(pieces_of([FIRST])).text_end


def said(words: str = "one: hello", **more: Any) -> Said:
    return Said(attrs.evolve(SAYING, text=words), 0.0, **{"acknowledged": True} | more)


def turn(number: int, content: str, **more: Any) -> Turn:
    usual = {"role": "assistant" if number % 2 else "user", "state": "done", "heard_chars": None, "code": None}
    return {"number": number, "content": content, "message": None} | usual | more


def judged(turns: list[Turn], *all_said: Said, stale: tuple[str, ...] = ()) -> list[str]:
    return judge_talk(all_said or (said(),), turns, Memory(), stale)


def test_a_whole_reply_is_as_it_should_be() -> None:
    whole = turn(1, FIRST)
    assert judged([turn(0, "one: hello"), whole]) == []
    pcm = SAYING.speech(FIRST)
    told = said(told=whole, text=FIRST, pcm=pcm, spoken_whole=True)
    assert judged([turn(0, "one: hello"), whole], told) == []


@pytest.mark.parametrize(
    ("turns", "what"),
    [
        ([], "lost"),
        ([turn(0, "one: hello")], "no reply"),
        ([turn(0, "one: hello"), turn(1, FIRST[:-9])], "told as done"),
        ([turn(0, "one: hello"), turn(1, "Something else.")], "not the reply"),
        ([turn(0, "one: hello"), turn(1, FIRST[:-9], state="interrupted")], "nobody has asked for"),
        ([turn(0, "one: hello"), turn(1, "", state="failed", code="internal")], "internal"),
        ([turn(0, "one: hello"), turn(1, FIRST), turn(2, "one: hello"), turn(3, "")], "2 times"),
        ([turn(0, "one: hello"), turn(1, FIRST), turn(2, "of another"), turn(3, "")], "text of another"),
        ([turn(1, FIRST)], "replies to nothing"),
    ],
)
def test_what_is_lost_halved_or_foreign_is_told(turns: list[Turn], what: str) -> None:
    assert any(what in complaint for complaint in judged(turns))


def test_what_was_not_acknowledged_may_be_there_once_or_not_at_all() -> None:
    tried = said(acknowledged=False)
    assert judged([], tried) == []
    assert judged([turn(0, "one: hello"), turn(1, FIRST)], tried) == []
    late = [turn(0, "an old text"), turn(1, "any reply")]
    assert judged(late, tried, stale=("an old text",)) == []


def test_texts_that_are_out_of_order_are_told() -> None:
    second = retort([{"role": "user", "content": "two: hello"}])
    says = [("user", "two: hello"), ("assistant", second), ("user", "one: hello")]
    first = retort([{"role": role, "content": content} for role, content in says])
    turns = [turn(0, "two: hello"), turn(1, second), turn(2, "one: hello"), turn(3, first)]
    assert judged(turns, said("two: hello"), said()) == []
    assert any("out of order" in complaint for complaint in judged(turns, said(), said("two: hello")))


def test_an_interrupted_reply_has_no_more_than_was_played() -> None:
    cut = turn(1, FIRST, state="interrupted", heard_chars=HEARD)
    some = SAYING.piece_samples - 1
    assert judged([turn(0, "one: hello"), cut], said(may_be_interrupted=True, heard=some)) == []
    too_much = turn(1, FIRST, state="interrupted", heard_chars=HEARD + 1)
    complaints = judged([turn(0, "one: hello"), too_much], said(may_be_interrupted=True, heard=some))
    assert any("played" in each for each in complaints)
    # The model is told only that in the next prompt.
    history = [{"role": "user", "content": "one: hello"}, {"role": "assistant", "content": FIRST[:HEARD]}]
    after = {"role": "user", "content": "two: go on"}
    for heard, is_right in ((FIRST[:HEARD], True), (FIRST, False)):
        reply = retort([history[0], {"role": "assistant", "content": heard}, after])
        turns = [turn(0, "one: hello"), cut, turn(2, "two: go on"), turn(3, reply)]
        assert (judged(turns, said(may_be_interrupted=True), said("two: go on")) == []) is is_right


def test_an_interruption_that_was_answered_holds() -> None:
    turns = [turn(0, "one: hello"), turn(1, FIRST)]
    assert any("done, though" in each for each in judged(turns, said(may_be_interrupted=True, was_interrupted=True)))
