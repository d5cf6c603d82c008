"""A text that comes in parts: its pieces are those of the whole, and are known as soon as they can be."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gpuworker.speaking.live_text import MOST_CHARS, LiveText, Piece, pieces_of

ENGLISH = (
    'Well, I asked Dr. Smith about it. He said e.g. that 3.14 is no rate, really! "Yes?" she asked... No. 5 is next.\n'
    "1. First item.\n2. Second item.\n\nA new paragraph here, see example.com. U.S. law applies at 5 p.m. today. Done"
)
CHINESE = "你好！今天天气很好，我们去公园散步吧？「好的。」他说。价格是3.5元。真的吗？！是的，我们明天再去。完了"
RUSSIAN = "Привет! Как дела? Ул. Ленина, д. 5. Всё хорошо… правда? «Да!» — сказал он. Им. Пушкина и т. д. Конец"
JAPANESE = "こんにちは。元気ですか？「はい、元気です。」っていう話。「そうか。」と言った。今日は3.5度です！終わり"
TEXTS = (ENGLISH, CHINESE, RUSSIAN, JAPANESE)

SNIPPETS: list[str] = (  # noqa: SIM905 - as many lines as there are words
    "a I Dr. 3.14 1. e.g. J. ... … . ! ? 。 ！ ？ ， 、 , ; : — – - ( ) 「 」 “ ” « » ' \" * 好 っ て と カ ー मैं । "
    "👨‍👩‍👧 e\u0301 \u0301 \u200b \u200d Ул. Word word ([([([([ ............ a-rather-long-word"
).split(" ")
BLANKS = [" ", "  ", "\n", "\r\n", "\n\n", "\t", "\u00a0", "\u2028", "\r", " " * 50]
ANY_TEXTS = st.lists(st.sampled_from(SNIPPETS + BLANKS), max_size=120).map("".join)


@st.composite
def cut_texts(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> list[str]:
    """A text, cut anywhere."""
    text = draw(texts)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=30)))
    return [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def texts_of(text: str, most_chars: int = MOST_CHARS) -> list[str]:
    return [piece.text for piece in pieces_of([text], most_chars)]


@given(cut_texts(st.sampled_from(TEXTS) | ANY_TEXTS), st.sampled_from([MOST_CHARS, 40, 7, 1]))
@example(["「a rather long one。」っ", "て言った。"], MOST_CHARS)
def test_however_a_text_comes_its_pieces_are_the_same(parts: list[str], most_chars: int) -> None:
    pieces = list(pieces_of(parts, most_chars))
    whole = "".join(parts)
    assert pieces == list(pieces_of([whole], most_chars)) == list(pieces_of(whole, most_chars))
    at = 0
    for piece in pieces:  # in order, where the marks say
        assert piece.text == piece.text.strip()
        assert 0 < len(piece.text) <= max(most_chars, len(whole) if most_chars < 40 else 0)
        assert whole[at : piece.text_end].endswith(piece.text)
        at = piece.text_end


@given(ANY_TEXTS)
def test_no_letter_and_no_digit_is_lost(text: str) -> None:
    def spoken(words: str) -> str:
        return "".join(char for char in words if char.isalnum())

    assert spoken("".join(texts_of(text))) == spoken(text)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (
            "Hello there. This is a test, e.g. of Dr. Smith's 3.14 method. Really? Yes! It is. OK",
            ["Hello there.", "This is a test, e.g. of Dr. Smith's 3.14 method.", "Really? Yes! It is. OK"],
        ),
        ("Dear Mr. Smith, how are you? Fine.", ["Dear Mr. Smith,", "how are you? Fine."]),
        (
            "你好，今天天气很好，我们走吧。我们去公园散步。好的。",
            ["你好，今天天气很好，", "我们走吧。我们去公园散步。", "好的。"],
        ),
        ("Ул. Ленина, дом пять. Всё хорошо.", ["Ул. Ленина,", "дом пять. Всё хорошо."]),
        ("Он живёт тут. Ул. Ленина очень длинная. Да.", ["Он живёт тут.", "Ул. Ленина очень длинная.", "Да."]),
        (
            "「そうですね。」って言った。「はい、元気です。」と。",
            ["「そうですね。」って言った。", "「はい、元気です。」と。"],
        ),
        ("Approx. Five hundred of them.", ["Approx. Five hundred of them."]),
        ("Here it is, all of it. *** \n\n ---", ["Here it is,", "all of it. ***"]),
        (" \n\n  Hello.  \n", ["Hello."]),
        ("", []),
        (" \n" * 1_000, []),
        ("。" * 1_000, []),
        ("☃", ["☃"]),  # an engine may read it out
        ("Hello there, my friend.\n\n☃ *** ☃" + "\n" * 400 + "☃", ["Hello there,", "my friend."]),
        ("Yes.\nNo.\nWell...\nMaybe, etc.\nand so on.", ["Yes.", "No.", "Well...", "Maybe, etc.\nand so on."]),
        (
            "Ask Mr.\nSmith of Acme Inc.\nnow, at 5 p.m.\nor so.",
            ["Ask Mr.\nSmith of Acme Inc.\nnow,", "at 5 p.m.\nor so."],
        ),
        ('"Really?"\nhe asked, and went on.\n', ['"Really?"\nhe asked,', "and went on."]),
        ("A heading\n\nand its text\r\n \r\nOne more\nline", ["A heading", "and its text", "One more\nline"]),
        ("1.\nFirst\n2.\nSecond\n", ["1.\nFirst\n2.", "Second"]),
        ("好。\n「好的。」\n他说。\n", ["好。", "「好的。」\n他说。"]),
    ],
)
def test_pieces_end_where_a_speaker_would_pause(text: str, pieces: list[str]) -> None:
    assert texts_of(text) == pieces


def test_a_text_without_ends_is_cut_at_a_bound() -> None:
    pieces = texts_of("word " * 200)
    assert "".join(pieces).replace(" ", "") == "word" * 200
    assert max(map(len, pieces)) <= MOST_CHARS
    assert len(pieces) == 4
    assert texts_of("x" * 700) == ["x" * 300, "x" * 300, "x" * 100]
    assert texts_of("one, two " * 50)[0].endswith(("one,", "two"))
    assert [len(piece) for piece in texts_of("好" * 20, 8)] == [8, 8, 4]


@pytest.mark.parametrize(
    ("come", "known"),
    [
        ("Hello there. It", "Hello there."),  # the letter after the next one may belong to it
        ("Hello there. " + "-" * 40, "Hello there."),
        ("Hello there. \t\n", "Hello there."),
        ("Да.\r", "Да."),
        ("好。\n", "好。"),
        ("A heading\r\n\r", "A heading"),
        ("你好，今天天气很好。我们", "你好，今天天气很好。"),
        ("Well, here it is, on", "Well, here it is,"),
        ("x" * (MOST_CHARS + 40), "x" * MOST_CHARS),
    ],
)
def test_a_piece_is_known_as_soon_as_what_follows_tells(come: str, known: str) -> None:
    live = LiveText()
    early = [piece for char in come[:-1] for piece in live.add(char)]
    assert early == []
    assert [piece.text for piece in live.add(come[-1])] == [known]


@pytest.mark.parametrize(
    "come",
    [
        "Ask Mr.\n",
        "At 5 p.m.\n",
        "It is number 3.\n",
        "We met in Jan.\n",
        "Apples and pears etc.\n",
        '"Oh!"\n',
        "---.\n",
    ],
)
def test_a_line_that_may_end_within_a_sentence_waits_for_what_follows(come: str) -> None:
    assert not list(LiveText().add(come))


def test_marks_count_the_characters_of_the_whole_text() -> None:
    assert list(pieces_of(["\n😀 Hello there.  Another one, ", "which is long. \n "])) == [
        Piece("😀 Hello there.", 15),
        Piece("Another one, which is long.", 44),
    ]
