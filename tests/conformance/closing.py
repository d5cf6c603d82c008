"""Cases of the close handshake. Autobahn's section 7."""

from collections.abc import Iterator

from tests.conformance.cases import INVALID_DATA, PROTOCOL_ERROR, Case, texts
from tests.conformance.frames import Opcode, close, frame, more, ping, text

#: RFC 6455, section 7.4.1, and IANA's registry for 1012 to 1014.
MEANT = (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 3999, 4000, 4999)
#: Without a meaning, never to be sent (1005, 1006, 1015), or out of range.
MEANINGLESS = (0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535)


def codes() -> Iterator[Case]:
    """Autobahn 7.3, 7.7, 7.9, 7.13."""
    yield Case("a close without a code is answered by one", close(None), code=None, closes=True)
    for code in MEANT:
        yield Case(f"a close with {code} is answered with it", close(code), code=code, closes=True)
    for code in MEANINGLESS:
        yield Case(f"a close with {code} is answered with 1002", close(code), code=PROTOCOL_ERROR)
    bad = frame(Opcode.CLOSE, b"\x03")
    yield Case("a close with half a code is answered with 1002", bad, code=PROTOCOL_ERROR)


def reasons() -> Iterator[Case]:
    """Autobahn 7.3.4 to 7.3.6 and 7.5."""
    for reason in (b"Hello World!", "\u00e4\u4f60\U0001f600".encode(), b"*" * 123):
        one = Case(f"a close with a reason of {len(reason)} octets is answered", close(1000, reason), closes=True)
        yield one
        yield one.chopped(1)
    yield Case("a close with a reason of 124 octets is refused", close(1000, b"*" * 124), code=PROTOCOL_ERROR)
    head = frame(Opcode.CLOSE, announced=126)
    yield Case("a close of 126 octets is refused at its head", head, code=PROTOCOL_ERROR)
    for reason in (
        b"\xff",
        b"\xed\xa0\x80",
        "\u03ba\u03cc\u03c3\u03bc\u03b5".encode() + b"\xed\xa0\x80edited",
        b"\xc3",
    ):
        bad = close(1000, reason)
        yield Case(f"a close with the reason {reason.hex()} is answered with 1007", bad, code=INVALID_DATA)
    bad = frame(Opcode.CLOSE, b"\x03\xe8", fin=False)
    yield Case("a fragmented close is refused", bad, code=PROTOCOL_ERROR)


def order() -> Iterator[Case]:
    """Autobahn 7.1: nothing is answered behind a close."""
    hello, again = text("Hello World!"), texts("Hello World!")
    yield Case("a text before a close is answered first", hello + close(), again, closes=True)
    yield Case("a second close is ignored", close() + close(1001), closes=True)
    yield Case("a ping behind a close is ignored", close() + ping(b"late"), closes=True)
    yield Case("a text behind a close is ignored", close() + hello, closes=True)
    yield Case("a broken frame behind a close is ignored", close() + frame(15, b"late", rsv=7, key=None), closes=True)
    yield Case("octets that are no frame behind a close are ignored", close() + b"\xff" * 300, closes=True)
    sent = text("fragment1", fin=False) + close() + more("fragment2")
    yield Case("a close between fragments is answered, their text is not", sent, closes=True)
    yield Case("a close between fragments is answered, their text is not", sent, closes=True).chopped(1)
    big = "*" * (256 << 10)
    sent = text(big) + close() + ping(b"late")
    yield Case("256 KiB, a close and a ping: the close is answered", sent, texts(big), closes=True, all_messages=False)
    sent = ping(b"in time") + close()
    yield Case("a ping before a close is answered", sent, pongs=(b"in time",), closes=True)


CASES = [*codes(), *reasons(), *order()]
