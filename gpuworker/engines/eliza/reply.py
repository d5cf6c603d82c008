"""Finds what `eliza` replies to a conversation. A pure function of the messages and the seed."""

import hashlib
import re
from collections.abc import Sequence

from gpuworker.engines.eliza.rules import CHINESE, ENGLISH, Tongue
from gpuworker.engines.language import Message

#: How much of a message is looked at: patterns go back and forth in it.
LOOK_CHARS = 1_000
MAX_QUOTE_CHARS = 120
MAX_COUNT = 1_000
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
_LETTER = re.compile(r"[^\W\d_]")
_NUMBER = re.compile(r"[0-9０-９]+(?:[.,][0-9]+)*|[零一二三四五六七八九十百千万两]{2,}")
_MARKS = " \t\r\n.,;:!?…。，；：！？、~～\"'“”"
#: A word, or two ideographs, with the space before and the marks behind.
_PIECE = re.compile(r"\s*(?:[\u3400-\u9fff]{1,2}[，。！？、；：”]*|[^\s\u3400-\u9fff]+)|\s+")
#: Said from the other side.
_MIRROR = {
    "i": "you", "me": "you", "my": "your", "mine": "yours", "myself": "yourself", "am": "are", "i'm": "you are",
    "i've": "you have", "i'll": "you will", "i'd": "you would", "your": "my", "yours": "mine", "yourself": "myself",
    "you're": "I am", "you've": "I have", "you'll": "I will",
}  # fmt: skip
_HAN_MIRROR = str.maketrans({"我": "你", "你": "我", "您": "我"})


def pieces(text: str) -> list[str]:
    """A text in pieces of a word each, or of two ideographs; together they are the text."""
    return _PIECE.findall(text)


def reply(messages: Sequence[Message], seed: int = 0) -> str:
    """What is replied to the last message of the user."""
    said = [message.content.strip() for message in messages if message.role == "user" and message.content.strip()]
    tongue = _tongue(said)
    if not said or messages[-1].role != "user":
        return tongue.greeting
    *earlier, text = [each[:LOOK_CHARS] for each in said]
    heard = _plain(text)
    asked = text.rstrip(" \t\r\n\"'”").endswith(("?", "？")) or heard.endswith(("吗", "呢"))
    known = _recalled(tongue, heard, earlier) or _on_demand(tongue, heard)
    if known:
        return known
    last = next((message.content for message in reversed(messages) if message.role == "assistant"), "")
    draw = hashlib.sha256(f"{seed}\0{len(said)}\0{text}".encode("utf-8", "replace")).digest()
    for rule in tongue.rules:
        if found := rule.pattern.search(heard):
            caught = _mirrored(found[1] or "") if rule.pattern.groups else ""
            return _drawn(rule.replies, draw, last, caught)
    if earlier and draw[1] % 3 == 0:
        return _drawn(tongue.quotes, draw, last, _quote(earlier[draw[2] % len(earlier)]))
    return _drawn(tongue.questions if asked else tongue.others, draw, last, "")


def _tongue(said: Sequence[str]) -> Tongue:
    """The language of the newest text that has letters."""
    newest = next((text for text in reversed(said) if _LETTER.search(text)), "")
    return CHINESE if _HAN.search(newest) else ENGLISH


def _plain(text: str) -> str:
    return " ".join(text.lower().replace("’", "'").split()).strip(_MARKS)


def _drawn(replies: Sequence[str], draw: bytes, last: str, caught: str) -> str:
    """One of the replies, and not the one that was given last, if there is another."""
    texts = [text.format(caught) for text in replies]
    at = draw[0] % len(texts)
    return texts[(at + 1) % len(texts)] if texts[at] == last else texts[at]


def _mirrored(caught: str) -> str:
    caught = caught.strip(_MARKS)
    if _HAN.search(caught):
        return caught.translate(_HAN_MIRROR)
    words = re.sub(r"\byou are\b", "you're", caught).split()
    turned = [_MIRROR.get(word, word) for word in words]
    for at, word in enumerate(words):
        if word == "you":
            turned[at] = "me" if at == len(words) - 1 else "I"
    return " ".join(turned)


def _quote(text: str) -> str:
    text = " ".join(text.split()).strip(_MARKS).replace('"', "'")
    return text if len(text) <= MAX_QUOTE_CHARS else f"{text[: MAX_QUOTE_CHARS - 1]}…"


def _on_demand(tongue: Tongue, heard: str) -> str:
    """A story or a row of numbers, if it is asked for."""
    if found := tongue.asks_count.search(heard):
        between, end = tongue.count
        return between.join(map(str, range(1, min(MAX_COUNT, max(1, int(found[1]))) + 1))) + end
    return tongue.story if tongue.asks_story.search(heard) else ""


def _recalled(tongue: Tongue, heard: str, earlier: Sequence[str]) -> str:
    """What the user said earlier, if the text asks for it."""
    if tongue.asks_number.search(heard):
        number = _number_in(tongue, earlier)
        return tongue.number.format(number) if number else tongue.no_number
    if found := tongue.asks_said.search(heard):
        if not earlier:
            return tongue.nothing_said
        return tongue.said.format(_quote(earlier[0 if any(map(_is_first, found.groups())) else -1]))
    for pattern in tongue.asks_fact:
        if found := pattern.search(heard):
            what = found[1].strip().removesuffix(" again") if pattern.groups else tongue.name
            thing = _fact_in(tongue, what, earlier)
            return tongue.fact.format(what, thing) if thing else tongue.no_fact.format(what)
    return ""


def _is_first(caught: str | None) -> bool:
    return caught is not None and caught.strip() != "just"


def _number_in(tongue: Tongue, earlier: Sequence[str]) -> str:
    """The newest number, of a text about one if there is any."""
    about = [text for text in earlier if tongue.about_number.search(text.lower())]
    for texts in (about, earlier):
        for text in reversed(texts):
            if found := _NUMBER.search(text):
                return found[0].rstrip(".,")
    return ""


def _fact_in(tongue: Tongue, what: str, earlier: Sequence[str]) -> str:
    for text in reversed(earlier):
        plain = " ".join(text.replace("’", "'").split())
        for pattern in tongue.facts:
            for found in re.finditer(pattern.pattern, plain, re.IGNORECASE):
                *name, thing = found.groups()
                if (name[0].strip().lower() if name else tongue.name) == what:
                    return _quote(thing)
    return ""
