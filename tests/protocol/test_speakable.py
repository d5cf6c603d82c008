import pytest

from protocol.speakable import speakable


@pytest.mark.parametrize("text", ["a", "好", "ก", "5", "½", " x ", "e\u0301", "𝕏", "ㄱ"])
def test_letters_and_digits_of_any_script_are_spoken(text: str) -> None:
    assert speakable(text)
    assert speakable(text, symbols=False)


@pytest.mark.parametrize("text", ["+", "€", "%", "&", "@", "°", "→", "♥", "👋", "🙂!"])
def test_symbols_are_spoken_by_who_reads_them_out(text: str) -> None:
    assert speakable(text)
    assert not speakable(text, symbols=False)


SPACES = ["", " \n\t", "\u3000", "\ufeff", "\u200b\u200d", "\u3164\u115f", "\u2800", "\x00"]
MARKS = ["-", "—", "...", "…", "!?", "«»", "───", "\u0301", "`^", "***"]
NOTHING = ["\ue000", "\U000f0000", "\ufffd\ufffc"]


@pytest.mark.parametrize("text", [*SPACES, *MARKS, *NOTHING])
def test_marks_blanks_and_what_stands_for_nothing_are_not(text: str) -> None:
    assert not speakable(text)
    assert not speakable(text, symbols=False)
