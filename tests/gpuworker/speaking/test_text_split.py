"""The split of long texts: what speakers of each language would expect, and what holds for any text at all."""

import subprocess
import sys
from itertools import pairwise

import pytest
import regex
from hypothesis import example, given
from hypothesis import strategies as st

from gpuworker.speaking.text_split import split

# No lone surrogates: no text off the wire has them.
ANY_TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=120)
# Denser in what the rules look at than any text is.
SNIPPETS = (
    "a I Dr. 3.14 1. e.g. J. ... … …… . ! ? ! 。 ！ ？ ， 、 , ; : — – - ( ) （ ） 「 」 “ ” „ « » ' \" * ¿ "
    "好 是 が っ こ カ ー と मैं है । ॥ ؟ ۔ ، سلام เ ก ำ 👨‍👩‍👧 🇫🇷 🇩 👍🏽 e\u0301 \u0301 \u200b \u200d \ufe0f ‼️ "
    "http://a.b/c?d=e Word word"
)
BLANKS = [" ", "  ", "\n", "\r\n", "\n\n", "\t", "\u00a0", "\u2028", "\u2029", "\u0085", "\x1c", "\u3000"]
TRICKY_TEXTS = st.lists(st.sampled_from(SNIPPETS.split(" ") + BLANKS), max_size=60).map("".join)
TEXTS = ANY_TEXTS | TRICKY_TEXTS
LIMITS = st.integers(1, 40)


def inked(text: str) -> list[str]:
    """The grapheme clusters of a text that are more than white space."""
    return [cluster for cluster in regex.findall(r"\X", text) if not cluster.isspace()]


class Counted:
    """A measure that counts how often it is asked, and about how many characters."""

    def __init__(self) -> None:
        self.calls = 0
        self.characters = 0

    def __call__(self, text: str) -> int:
        self.calls += 1
        self.characters += len(text)
        return len(text)


def assert_cut_only_at_bars(marked: str) -> None:
    """Splits the text without its bars, from each bar on and with every limit that lets a part through.

    The first piece must always reach to the farthest bar that the limit allows.
    """
    parts = marked.split("|")
    for number in range(len(parts) - 1):
        rest = "".join(parts[number:])
        fitting = ["".join(parts[number:stop]).strip() for stop in range(number + 1, len(parts))]
        for limit in range(len(fitting[0]), len(rest.strip())):
            expected = max((piece for piece in fitting if len(piece) <= limit), key=len)
            assert split(rest, limit, len)[0] == expected, (rest, limit)


@pytest.mark.parametrize(
    "marked",
    [
        pytest.param("It rained. |We stayed! |Did you? |Yes.", id="English"),
        pytest.param("Dr. Smith met Mrs. Jones at St. Mary. |They spoke.", id="titles"),
        pytest.param("He read J. R. R. Tolkien and Ph.D. theses. |So do I. |We did.", id="initials"),
        pytest.param("Take fruit, e.g. Apples, i.e. Fuji, in the U.S. and drink. |Then rest.", id="dotted"),
        pytest.param("It costs $3.14 or 1,000.50 today. |It was 5.00. |Now less.", id="decimals"),
        pytest.param("See No. 5 on Jan. 3 and pp. 4-7 there. |No. |I will not.", id="before numbers"),
        pytest.param("Go to https://a.example/x?q=1.2!y or mail b.c@d.example now. |Then wait.", id="URL"),
        pytest.param("Well... yes and … maybe. |Wait... |Then what?", id="ellipses"),
        pytest.param('"Really?" he asked. |"Yes." |(It was so.) |Fine.', id="quotes"),
        pytest.param("What?! |No!!! |Wait. . . what? |Oh ‼️ |Yes.", id="many marks"),
        pytest.param("« Ça va ? » |Elle part. |« Oui. »", id="French"),
        pytest.param("„Ja.“ |Er kam am 3. Oktober mit Nr. 7 bzw. Acht. |»Nein.« |Gut.", id="German"),
        pytest.param("¿Qué? |¡Sí! |El Sr. Gómez vino.", id="Spanish"),
        pytest.param("Пришёл А. С. Пушкин, т. е. он. |Всё.", id="Russian"),
        pytest.param("Он тут. |Ул. Ленина и пл. Мира. |Г. Москва. |Им. Пушкина.", id="capitalised abbreviations"),
        pytest.param("Approx. Half is left. |Cf. Smith. |Vol. Two. |Pp. 4 too.", id="at the beginning"),
        pytest.param("他说：“你好。”|然后他走了！|真的吗？|价格是3.14元。|再见", id="Chinese"),
        pytest.param("真的吗……|他走了。|“好！”，他说。|你好!|你呢?|好", id="Chinese mixed marks"),
        pytest.param("「そうだ。」と言った。|「はい。」|彼は去った。|どう？|いい｡|はい", id="Japanese"),
        pytest.param("यह अच्छा है। |क्या हाल है? |ठीक॥ |अब", id="Hindi"),
        pytest.param("هل هذا جيد؟ |نعم. |٣.١٤ هنا. |یہ اچھا ہے۔ |ٹھیک", id="Arabic and Urdu"),
        pytest.param("ปี พ.ศ. 2567 ครับ! |ดี", id="Thai"),
        pytest.param("သွားမယ်။ |လာပါ။ |ဟုတ်", id="Burmese"),
        pytest.param("ሰላም። |እንዴት ነህ፧ |ደህና", id="Amharic"),
        pytest.param("1. First\n|2. Second\n|- third\n|* fourth\n\n|A. Last", id="lists"),
        pytest.param("Title\n|A line that was\nwrapped here.\r\n|More\n\n|lower after all", id="lines"),
        pytest.param("One\u2028|Two\u2029|Three\u0085|Four\x0b|Five\x0c|Six", id="Unicode lines"),
        pytest.param("Great! |😀 Next **bold.** |Then.", id="emoji and markdown"),
    ],
)
def test_cuts_at_sentence_ends_where_one_is_in_reach(marked: str) -> None:
    assert_cut_only_at_bars(marked)


@pytest.mark.parametrize(
    "marked",
    [
        pytest.param("when it rains, |we stay; |this is known: |always", id="English"),
        pytest.param("one – |two — |three - |four-five", id="dashes"),
        pytest.param("at 12:30 with 1,000 men, |he came... |and went", id="numbers"),
        pytest.param("如果下雨，|我们就留下；|苹果、|梨", id="Chinese"),
        pytest.param("在12：30分，|他来", id="Chinese numbers"),
        pytest.param("نعم، |ثم؛ |هنا", id="Arabic"),
    ],
)
def test_cuts_a_sentence_at_clause_marks(marked: str) -> None:
    assert_cut_only_at_bars(marked)


@pytest.mark.parametrize(
    "marked",
    [
        pytest.param("one |two\u3000|three\u200b|four\u00a0|five", id="white space"),
        pytest.param("say |“it |is” |(so |to |speak) |¿ask ! |now", id="marks stay with their words"),
        pytest.param("สวัสดี |วันนี้ |ดี", id="Thai"),
        pytest.param("使|用|VoxCPM2|模|型|（很|好）|了", id="words within Chinese"),
        pytest.param("あ|がっ|こ|う|カタカナー|で|す", id="Japanese lines start with no small kana"),
        pytest.param("เร|า|ไป", id="Thai vowels stay with their consonants"),
    ],
)
def test_cuts_a_clause_at_white_space_else_at_words(marked: str) -> None:
    assert_cut_only_at_bars(marked)


def test_a_text_that_fits_is_untouched() -> None:
    text = "  (calm) One.\n\nTwo…  "
    assert split(text, len(text), len) == [text]


def test_a_text_of_white_space_gives_nothing() -> None:
    assert [split(text, 1, len) for text in ("", " ", "\n\u2028\t\u3000")] == [[], [], []]


def test_a_leading_description_stays_whole_and_with_what_follows() -> None:
    description = "(a young woman. She is calm! Yes)"
    pieces = split(f"{description}Hello there. How are you?", 50, len)
    assert pieces == [f"{description}Hello there.", "How are you?"]
    assert split(f"{description} 你好。再见。", 38, len) == [f"{description} 你好。", "再见。"]
    assert split(f"（年轻女性。温柔！）{'你好，' * 5}", 13, len)[0] == "（年轻女性。温柔！）你好，"


def test_a_description_over_the_limit_is_cut_like_any_text() -> None:
    assert split("(She is calm. She is slow.) Hello.", 14, len) == ["(She is calm.", "She is slow.)", "Hello."]


@pytest.mark.parametrize("cluster", ["👨‍👩‍👧‍👦", "e\u0301\u0323", "🇫🇷", "👍🏽", "क्षि", "한"])
def test_a_limit_too_small_for_one_grapheme_gives_it_alone(cluster: str) -> None:
    for limit in (-1, 0, 1):
        assert split(cluster * 3, limit, len) == [cluster] * 3


@given(text=TEXTS, limit=LIMITS)
@example(text=" \u0301a", limit=1)
@example(text="a \u0301", limit=1)
@example(text="a\r\n\u0301b", limit=1)
def test_only_white_space_is_lost_and_no_grapheme_is_cut(text: str, limit: int) -> None:
    pieces = split(text, limit, len)
    assert [cluster for piece in pieces for cluster in inked(piece)] == inked(text)
    at = 0
    for piece in pieces:  # in place and in order; what lies between is white space
        found = text.index(piece, at)
        assert not text[at:found].strip()
        at = found + len(piece)


@given(text=TEXTS, limit=LIMITS)
def test_every_piece_fits_or_is_one_grapheme_and_none_is_blank(text: str, limit: int) -> None:
    pieces = split(text, limit, len)
    for piece in pieces:
        assert not piece.isspace()
        assert len(piece) <= limit or len(inked(piece)) == 1
    if len(pieces) > 1:
        assert all(piece == piece.strip() for piece in pieces if inked(piece) == regex.findall(r"\X", piece.strip()))


@given(text=TEXTS, limit=LIMITS, salt=st.integers(0, 10))
def test_every_piece_fits_whatever_the_measure_and_the_same_each_time(text: str, limit: int, salt: int) -> None:
    def whimsical(piece: str) -> int:
        """Neither growing nor bounded by length."""
        return (len(piece) * 7919 + sum(map(ord, piece)) + salt) % 61 - 3

    pieces = split(text, limit, whimsical)
    assert all(whimsical(piece) <= limit or len(inked(piece)) <= 1 for piece in pieces)
    assert [cluster for piece in pieces for cluster in inked(piece)] == inked(text)
    assert pieces == split(text, limit, whimsical)


@given(words=st.lists(st.sampled_from(["a", "bcd", "好", "(e", "f)", "«g»", "h?!", "3", "नि।", "“i.”"]), min_size=1))
def test_no_piece_is_only_punctuation(words: list[str]) -> None:
    for joint in ("", " ", " - ", "… "):
        text = joint.join(words)
        for limit in (12, 20):
            assert all(regex.search(r"[\p{L}\p{N}]", piece) for piece in split(text, limit, len))


@given(words=st.lists(st.text("abdg", min_size=2, max_size=8), min_size=1, max_size=40), limit=st.integers(10, 60))
def test_neighbouring_sentences_are_packed_together(words: list[str], limit: int) -> None:
    pieces = split(" ".join(f"{word.title()}." for word in words), limit, len)
    assert all(len(f"{piece} {after.split()[0]}") > limit for piece, after in pairwise(pieces))


@given(text=TRICKY_TEXTS, limit=st.integers(1, 12))
def test_a_measure_like_a_tokenizer_that_grows_for_less_text_is_kept_to(text: str, limit: int) -> None:
    def tokens(piece: str) -> int:
        """Known words are one token, all else one a byte: "wor" is longer than "word"."""
        return sum(1 if part in ("word", "Word") else len(part.encode()) for part in regex.split(r"(\s+)", piece))

    assert all(tokens(piece) <= limit or len(inked(piece)) == 1 for piece in split(text, limit, tokens))


LONG_TEXTS = {
    "no space": "x" * 5_000,
    "Chinese without marks": "好" * 5_000,
    "full stops": "." * 5_000,
    "open brackets": "(" * 5_000,
    "emoji": "👨‍👩‍👧" * 1_000,
    "one grapheme": "a" + "\u0301" * 4_999,
    "marks and quotes": '."' * 2_500,
    "German quotes": "..“" * 1_666,
    "spaced guillemets": " »" * 2_500,
    "numbers": "1. " * 1_666,
    "initials": "J." * 2_500,
    "white space within": "a" + "\n " * 2_499 + "b",
    "sentences": "The quick brown fox, they say, jumps over the dog. " * 98,
}


@pytest.mark.parametrize("name", LONG_TEXTS)
@pytest.mark.parametrize("limit", [0, 1, 7, 300])
def test_the_work_is_near_linear_in_the_text(name: str, limit: int) -> None:
    text, measure = LONG_TEXTS[name], Counted()
    pieces = split(text, limit, measure)
    assert [cluster for piece in pieces for cluster in inked(piece)] == inked(text)
    assert measure.calls <= 20 + 20 * len(pieces)
    assert measure.characters <= 20 * len(text)


@pytest.mark.parametrize("answer", [0, 10**9])
def test_a_measure_that_knows_one_answer_ends_as_well(answer: int) -> None:
    text = "Some words, here. " * 20
    pieces = split(text, 5, lambda _: answer)
    assert pieces == ([text] if answer == 0 else inked(text))


def test_a_fault_of_the_measure_comes_through() -> None:
    def broken(_: str) -> int:
        raise LookupError("no such token")

    with pytest.raises(LookupError, match="no such token"):
        split("Some words.", 3, broken)


def test_the_module_loads_nothing_that_only_the_extra_has() -> None:
    code = "import sys, gpuworker.speaking.text_split; print(sorted({'regex', 'numpy', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
