"""Cases of text: what is UTF-8 (RFC 3629), and what only looks like it. Autobahn's section 6."""

from collections.abc import Iterator

from tests.conformance.cases import INVALID_DATA, Case, binaries, texts
from tests.conformance.frames import Opcode, binary, fragmented, more, text

_SURROGATES = (0xD800, 0xDB7F, 0xDB80, 0xDBFF, 0xDC00, 0xDF80, 0xDFFF)


def _encoded(code_point: int, octets: int) -> bytes:
    """A code point in so many octets, 2..6, whether UTF-8 allows that or not: as in RFC 2279, before 2003."""
    tail = [0x80 | code_point >> 6 * place & 0x3F for place in range(octets - 1)][::-1]
    lead = (0xFF00 >> octets & 0xFF) | code_point >> 6 * (octets - 1)
    return bytes([lead, *tail])


GOOD: dict[str, str] = {
    "letters of many scripts": "Gr\u00fc\u00dfe-\u00b5@\u00e0! \u03ba\u03cc\u03c3\u03bc\u03b5 \u4f60\u597d \U0001f600",
    "NUL": "\0",
    "U+007F, the last of one octet": "\x7f",
    "U+0080, the first of two octets": "\x80",
    "U+07FF, the last of two octets": "\u07ff",
    "U+0800, the first of three octets": "\u0800",
    "U+FFFF, the last of three octets": "\uffff",
    "U+10000, the first of four octets": "\U00010000",
    "U+10FFFF, the last of all": "\U0010ffff",
    "U+D7FF, before the surrogates": "\ud7ff",
    "U+E000, behind the surrogates": "\ue000",
    "a byte order mark, kept": "\ufefftext",
    "U+FFFD, the replacement character": "\ufffd",
    "a letter and its accent, kept apart": "e\u0301",
    "the noncharacters U+FDD0 to U+FDEF": "".join(map(chr, range(0xFDD0, 0xFDF0))),
    "the noncharacters at each plane's end": "".join(chr(p << 16 | e) for p in range(17) for e in (0xFFFE, 0xFFFF)),
}

BAD: dict[str, bytes] = {
    "a lone continuation octet 80": b"\x80",
    "a lone continuation octet BF": b"\xbf",
    "continuation octets alone": bytes(range(0x80, 0xC0)),
    "a continuation octet behind a whole character": "\u00e9".encode() + b"\xa9",
    "an octet FE": b"\xfe",
    "an octet FF": b"\xff",
    "a lead of two without its second": b"\xc3 ",
    "a lead of three with one": b"\xe2\x82 ",
    "a lead of four with two": b"\xf0\x9f\x98 ",
    "a lead behind a lead": b"\xc3\xc3\xa9",
    "all leads of two, each before a space": b"".join(bytes([lead, 0x20]) for lead in range(0xC0, 0xE0)),
    "all leads of three, each before a space": b"".join(bytes([lead, 0x20]) for lead in range(0xE0, 0xF0)),
    "all leads of four, each before a space": b"".join(bytes([lead, 0x20]) for lead in range(0xF0, 0xF8)),
    "an end inside two octets": b"\xdf",
    "an end inside three octets": b"\xef\xbf",
    "an end inside four octets": b"\xf0\x9f\x98",
    "a text that ends inside a character": "\u03ba\u03cc\u03c3\u03bc\u03b5".encode()[:-1],
    **{f"U+{point:04X}, a surrogate": _encoded(point, 3) for point in _SURROGATES},
    "a pair of surrogates": _encoded(0xD800, 3) + _encoded(0xDC00, 3),
    "another pair of surrogates": _encoded(0xDBFF, 3) + _encoded(0xDFFF, 3),
    **{f"a slash in {octets} octets": _encoded(0x2F, octets) for octets in range(2, 7)},
    **{f"NUL in {octets} octets": _encoded(0, octets) for octets in range(2, 7)},
    "U+007F in two octets": _encoded(0x7F, 2),
    "U+07FF in three octets": _encoded(0x7FF, 3),
    "U+FFFF in four octets": _encoded(0xFFFF, 4),
    "U+110000, beyond the last": _encoded(0x110000, 4),
    "U+1FFFFF, the last of the old four octets": _encoded(0x1FFFFF, 4),
    "U+200000 in five octets": _encoded(0x200000, 5),
    "U+3FFFFFF in five octets": _encoded(0x3FFFFFF, 5),
    "U+4000000 in six octets": _encoded(0x4000000, 6),
    "U+7FFFFFFF in six octets": _encoded(0x7FFFFFFF, 6),
    "a good text, then a surrogate, then more": b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xed\xa0\x80edited",
    "a good text, then U+110000, then more": b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xf4\x90\x80\x80edited",
}


def good_texts() -> Iterator[Case]:
    """Autobahn 6.1, 6.2, 6.5, 6.7, 6.9, 6.11, 6.22, 6.23: what comes back."""
    for name, words in GOOD.items():
        octets = words.encode()
        one = Case(f"{name}: comes back", text(words), texts(words))
        yield one
        yield one.chopped(1)
        cut = fragmented(Opcode.TEXT, octets, 1)
        yield Case(f"{name}: comes back from fragments of one octet", cut, texts(words))
    smile = "\U0001f600"
    for at in range(5):
        octets = smile.encode()
        sent = text(octets[:at], fin=False) + more(octets[at:])
        yield Case(f"a character cut into fragments of {at} and {4 - at} octets comes back", sent, texts(smile))
    sent = text(b"\xce", fin=False) + more(b"", fin=False) + more(b"\xba")
    yield Case("a character cut by an empty fragment comes back", sent, texts("\u03ba"))
    yield Case("a binary message need not be UTF-8", binary(b"\xff\xfe\xed\xa0\x80"), binaries(b"\xff\xfe\xed\xa0\x80"))
    sent = binary(b"\xce") + text("fine")
    yield Case("a text is judged without what a binary message left", sent, (*binaries(b"\xce"), *texts("fine")))


def bad_texts() -> Iterator[Case]:
    """Autobahn 6.3, 6.4, 6.6, 6.8, 6.10 to 6.21: what fails the connection."""
    for name, octets in BAD.items():
        one = Case(f"{name}: refused", text(octets), code=INVALID_DATA)
        yield one
        yield one.chopped(1)
        cut = fragmented(Opcode.TEXT, octets, 1) + text("never answered")
        yield Case(f"{name}: refused in fragments of one octet", cut, code=INVALID_DATA)
    sent = text("fine") + text(b"\xed\xa0\x80")
    yield Case("a good text is answered, a bad one behind it refused", sent, texts("fine"), code=INVALID_DATA)
    sent = text("\u03ba", fin=False) + more(b"\xff", fin=False) + more("end")
    yield Case("a bad middle fragment is refused", sent, code=INVALID_DATA)
    # Each fragment alone would pass: a character ends at its fragment's end, and a new one begins inside it.
    sent = text(b"\xe2\x82", fin=False) + more("\u00e9") + text("never answered")
    yield Case("a character that its next fragment does not go on with is refused", sent, code=INVALID_DATA)


CASES = [*good_texts(), *bad_texts()]
