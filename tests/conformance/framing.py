"""Cases of frames: lengths, pings, reserved bits and opcodes, fragments, masks. Autobahn's sections 1 to 5 and 10."""

from collections.abc import Iterator

from tests.conformance.cases import PROTOCOL_ERROR, Case, binaries, texts
from tests.conformance.frames import Opcode, binary, close, fragmented, frame, more, ping, pong, text

#: Around what each of the three forms of a length holds.
LENGTHS = (0, 1, 125, 126, 127, 128, 65535, 65536)
ALL_OCTETS = bytes(range(256))


def lengths() -> Iterator[Case]:
    """Autobahn 1 and 10: every form of a length, text and binary; one message in many frames."""
    for length in LENGTHS:
        letters, octets = (b"*" * length), (ALL_OCTETS * (length // 256 + 1))[:length]
        chop = 1 if length <= 128 else 997
        for one in (
            Case(f"a text of {length} octets comes back", text(letters), texts(letters)),
            Case(f"a binary message of {length} octets comes back", binary(octets), binaries(octets)),
        ):
            yield one
            yield one.chopped(chop)
    letters = b"*" * 65536
    yield Case("a text in 51 frames of 1300 octets comes back", fragmented(Opcode.TEXT, letters, 1300), texts(letters))
    ten = [b"%d" % number * number for number in range(10)]
    yield Case("messages in one write come back in order", b"".join(binary(one) for one in ten), binaries(*ten))
    # Section 5.2: the least number of octets must be used for a length.
    for length, form in ((0, 2), (125, 2), (0, 8), (126, 8), (65535, 8)):
        wasteful = frame(Opcode.BINARY, bytes(length), length_octets=form)
        yield Case(f"a length of {length} told in {form} octets is refused", wasteful, code=PROTOCOL_ERROR)
    top = frame(Opcode.BINARY, announced=1 << 63, length_octets=8)
    yield Case("a length with its top bit set is refused", top, code=PROTOCOL_ERROR)
    yield Case("a length of 64 bits, all set, is refused", frame(Opcode.TEXT, announced=2**64 - 1), code=PROTOCOL_ERROR)


def pings() -> Iterator[Case]:
    """Autobahn 2: pings are answered, pongs that answer nothing are not."""
    for payload in (b"", b"Hello, world!", bytes(range(8)) + b"\xff\xfe", b"\xfe" * 125):
        yield Case(f"a ping of {len(payload)} octets is answered with them", ping(payload), pongs=(payload,))
    yield Case("a ping comes chopped and is answered", ping(b"\xfe" * 125), pongs=(b"\xfe" * 125,)).chopped(1)
    for length in (126, 65536):
        too_long = frame(Opcode.PING, b"\xfe" * length)
        yield Case(f"a ping of {length} octets is refused", too_long, code=PROTOCOL_ERROR)
        yield Case(f"a pong of {length} octets is refused", frame(Opcode.PONG, bytes(length)), code=PROTOCOL_ERROR)
    head = frame(Opcode.PING, announced=126)
    yield Case("a ping of 126 octets is refused at its head", head, code=PROTOCOL_ERROR)
    head = frame(Opcode.PING, announced=1 << 40)
    yield Case("a ping of a tebioctet is refused at its head", head, code=PROTOCOL_ERROR)
    yield Case("a pong that answers nothing is ignored", pong())
    yield Case("a pong with a payload that answers nothing is ignored", pong(b"unsolicited"))
    yield Case("a pong and a ping: only the ping is answered", pong(b"unsolicited") + ping(b"asked"), pongs=(b"asked",))
    ten = tuple(b"payload-%d" % number for number in range(10))
    all_ten = b"".join(ping(one) for one in ten)
    yield Case("ten pings get ten pongs, in order", all_ten, pongs=ten)
    yield Case("ten pings get ten pongs, in order", all_ten, pongs=ten).chopped(1)


def reserved() -> Iterator[Case]:
    """Autobahn 3 and 4: reserved bits and opcodes fail the connection; what came whole before them is still served."""
    hello, again = text("Hello, world!"), texts("Hello, world!")
    for rsv in range(1, 8):
        bad = frame(Opcode.TEXT, b"Hello", rsv=rsv)
        yield Case(f"a text with reserved bits {rsv:03b} is refused", bad, code=PROTOCOL_ERROR)
    for opcode in (Opcode.BINARY, Opcode.PING, Opcode.PONG, Opcode.CLOSE):
        for rsv in (1, 2, 4):
            bad = frame(opcode, b"\x03\xe8" if opcode is Opcode.CLOSE else b"", rsv=rsv)
            words = f"a {opcode.name.lower()} with reserved bits {rsv:03b} is refused"
            yield Case(words, bad, code=PROTOCOL_ERROR)
    bad = text("Hel", fin=False) + frame(Opcode.CONTINUATION, b"lo", rsv=4)
    yield Case("a continuation with reserved bit 100 is refused", bad, code=PROTOCOL_ERROR)
    for unknown in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15):
        yield Case(f"reserved opcode {unknown} is refused", frame(unknown), code=PROTOCOL_ERROR)
        bad = hello + frame(unknown, b"payload") + ping()
        yield Case(f"a text is answered, reserved opcode {unknown} behind it refused", bad, again, code=PROTOCOL_ERROR)
    bad = hello + frame(Opcode.TEXT, b"Hello", rsv=2) + ping()
    for chop in (0, 1):
        one = Case("a text is answered, a reserved bit behind it refused", bad, again, code=PROTOCOL_ERROR)
        yield one.chopped(chop) if chop else one
    bad = text("half", fin=False) + frame(3, b"payload")
    yield Case("a reserved opcode between fragments is refused", bad, code=PROTOCOL_ERROR)
    # Autobahn's cases set the bits of a client without extensions: so does one that only dreams of compression.
    bad = frame(Opcode.TEXT, b"\xf2\x48\xcd\xc9\xc9\x07\x00", rsv=4)
    yield Case("a compressed text is refused where no compression was agreed", bad, code=PROTOCOL_ERROR)


def fragments() -> Iterator[Case]:
    """Autobahn 5: messages in pieces, with control frames among them."""
    halves = [text("fragment1", fin=False), more("fragment2")]
    whole = texts("fragment1fragment2")
    for between, inner, pongs in (("", b"", ()), (" with a ping between", ping(b"ping"), (b"ping",))):
        sent = halves[0] + inner + halves[1]
        one = Case(f"a text in two fragments{between} comes back", sent, whole, pongs)
        yield one
        yield one.chopped(len(halves[0]))
        yield one.chopped(1)
    fragment_and_ping = frame(Opcode.PING, b"fragment1", fin=False) + more("fragment2")
    yield Case("a fragmented ping is refused", fragment_and_ping, code=PROTOCOL_ERROR)
    yield Case("a fragmented pong is refused", frame(Opcode.PONG, b"one", fin=False) + more(), code=PROTOCOL_ERROR)
    for fin in (True, False):
        last = "a last" if fin else "a middle"
        bad = more("non-continuation payload", fin=fin) + text("Hello, world!")
        one = Case(f"{last} fragment with nothing to continue is refused", bad, code=PROTOCOL_ERROR)
        yield one
        yield one.chopped(len(more("non-continuation payload", fin=fin)))
        yield one.chopped(1)
        bad = b"".join(halves) + more("more", fin=fin) + text("Hello, world!")
        words = f"a text in two fragments is answered, {last} fragment behind it refused"
        yield Case(words, bad, whole, code=PROTOCOL_ERROR)
        bad = (more("more", fin=fin) + b"".join(halves)) * 2
        yield Case(f"{last} fragment before a whole text is refused", bad, code=PROTOCOL_ERROR)
    for kind, inner in (("a text", text("fragment2")), ("a binary message", binary(b"fragment2"))):
        for outer_kind, outer in (("a text", halves[0]), ("a binary message", binary(b"fragment1", fin=False))):
            yield Case(f"{kind} inside {outer_kind} in fragments is refused", outer + inner, code=PROTOCOL_ERROR)
    bad = halves[0] + text("fragment2", fin=False)
    yield Case("a second text that begins inside a first is refused", bad, code=PROTOCOL_ERROR)
    five = (
        text("fragment1", fin=False)
        + more("fragment2", fin=False)
        + ping(b"pongme 1!")
        + more("fragment3", fin=False)
        + more("fragment4", fin=False)
        + ping(b"pongme 2!")
        + more("fragment5")
    )
    joined = texts("fragment1fragment2fragment3fragment4fragment5")
    one = Case("a text in five fragments with two pings between comes back", five, joined, (b"pongme 1!", b"pongme 2!"))
    yield one
    yield one.chopped(1)
    yield Case(
        "a ping between fragments is answered before the last of them comes",
        text("never", fin=False) + ping(b"now") + close(),
        pongs=(b"now",),
        closes=True,
    )
    sent = fragmented(Opcode.BINARY, ALL_OCTETS, 1)
    yield Case("a binary message in fragments of one octet comes back", sent, binaries(ALL_OCTETS))
    empty = text("", fin=False) + more("", fin=False) + more("")
    yield Case("a text in three empty fragments comes back empty", empty, texts(""))
    mostly_empty = text("", fin=False) + more("middle payload", fin=False) + more("")
    yield Case("a text whose first and last fragments are empty comes back", mostly_empty, texts("middle payload"))
    sent = binary(b"\x00" * 300, fin=False) + pong() + more(b"\xff" * 300) + text("next")
    both = (*binaries(b"\x00" * 300 + b"\xff" * 300), *texts("next"))
    yield Case("a message behind a fragmented one comes back too", sent, both)


def masks() -> Iterator[Case]:
    """Section 5.3: a client masks all that it sends, each frame with a key of its own."""
    for key in (b"\x00\x00\x00\x00", b"\xff\xff\xff\xff", b"\x01\x02\x03\x04", b"\x80\x00\x00\x00"):
        for length in (0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 1000):
            payload = ALL_OCTETS[:length] if length < 256 else ALL_OCTETS * 4
            sent = frame(Opcode.BINARY, payload, key=key)
            yield Case(f"{len(payload)} octets masked with {key.hex()} come back", sent, binaries(payload))
    keys = (b"abcd", b"\x00\x00\x00\x00", b"wxyz")
    opcodes = (Opcode.BINARY, Opcode.CONTINUATION, Opcode.CONTINUATION)
    payloads = (b"\x01" * 5, b"\x02" * 130, b"\x03" * 3)
    sent = b"".join(
        frame(opcode, payload, fin=number == 2, key=key)
        for number, (opcode, payload, key) in enumerate(zip(opcodes, payloads, keys, strict=True))
    )
    whole = b"".join(payloads)
    yield Case("fragments masked with different keys come back as one", sent, binaries(whole))
    yield Case("fragments masked with different keys come back as one", sent, binaries(whole)).chopped(1)
    for opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.PING, Opcode.PONG, Opcode.CLOSE):
        bad = frame(opcode, b"\x03\xe8" if opcode is Opcode.CLOSE else b"", key=None)
        yield Case(f"an unmasked {opcode.name.lower()} is refused", bad, code=PROTOCOL_ERROR)
    bad = text("masked", fin=False) + frame(Opcode.CONTINUATION, b"unmasked", key=None)
    yield Case("an unmasked continuation is refused", bad, code=PROTOCOL_ERROR)
    bad = text("first") + frame(Opcode.TEXT, b"second", key=None)
    yield Case("a text is answered, an unmasked one behind it refused", bad, texts("first"), code=PROTOCOL_ERROR)


CASES = [*lengths(), *pings(), *reserved(), *fragments(), *masks()]
