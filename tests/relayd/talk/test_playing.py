"""What was heard of a spoken text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayd.talk.playing import Mark, last_boundary, played_chars

TEXT = "One two three. Four five six."
MARKS = [Mark(14, 1400), Mark(29, 2900)]


@pytest.mark.parametrize(
    ("samples", "heard"),
    [
        (0, ""),
        (299, ""),
        (300, "One"),
        (750, "One two"),
        (1399, "One two"),
        (1400, "One two three."),
        (2000, "One two three. Four"),
        (2400, "One two three. Four five"),
        (2900, TEXT),
        (9999, TEXT),
    ],
)
def test_a_word_counts_when_it_was_heard_to_its_end(samples: int, heard: str) -> None:
    assert TEXT[: played_chars(TEXT, MARKS, samples)].strip() == heard


def test_without_a_mark_nothing_was_heard_for_certain() -> None:
    assert played_chars(TEXT, [], 1_000_000) == 0


def test_in_scripts_without_spaces_every_character_is_a_word() -> None:
    text = "你好，我是一个老师。"
    assert played_chars(text, [Mark(len(text), 1000)], 450) == 4
    assert last_boundary("日本語 and English", 6) == 4


@given(
    text=st.text(alphabet="ab .你", min_size=1, max_size=60),
    steps=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=9),
    samples=st.integers(0, 100),
)
def test_more_samples_are_never_less_text_and_never_more_than_the_marks_say(
    text: str, steps: list[tuple[int, int]], samples: int
) -> None:
    marks, chars, at = [], 0, 0
    for more, longer in steps:
        chars, at = min(len(text), chars + more), at + longer
        marks.append(Mark(chars, at))
    heard = played_chars(text, marks, samples)
    assert 0 <= heard <= (marks[-1].text_end if marks else 0)
    assert heard >= max((mark.text_end for mark in marks if mark.sample <= samples), default=0)
    assert played_chars(text, marks, samples + 1) >= heard
