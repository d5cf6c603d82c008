"""Cases of large and of many. Autobahn's section 9; made when they are run, as they are large."""

from collections.abc import Callable, Iterator
from functools import partial

from tests.conformance.cases import TOO_BIG, Case, binaries, texts
from tests.conformance.frames import Opcode, binary, close, fragmented, frame, more, ping, text

KIB = 1024
MIB = 1024 * KIB
#: What the echo takes; the relay itself takes less, through the same code.
MAX_MESSAGE_BYTES = 16 * MIB

Make = Callable[[], Case]


def _octets(size: int) -> bytes:
    return (bytes(range(256)) * (size // 256 + 1))[:size]


def _letters(size: int) -> bytes:
    return ("\u00e9\u4f60\U0001f600" * (size // 9 + 1)).encode()[: size // 9 * 9]


def _one_frame(promise: str, opcode: Opcode, size: int, chop: int = 0) -> Case:
    payload = _letters(size) if opcode is Opcode.TEXT else _octets(size)
    messages = texts(payload) if opcode is Opcode.TEXT else binaries(payload)
    return Case(promise, frame(opcode, payload), messages, chop=chop)


def _many_frames(promise: str, opcode: Opcode, size: int, fragment: int) -> Case:
    payload = _letters(size) if opcode is Opcode.TEXT else _octets(size)
    messages = texts(payload) if opcode is Opcode.TEXT else binaries(payload)
    return Case(promise, fragmented(opcode, payload, fragment), messages)


def sizes() -> Iterator[tuple[str, Make]]:
    """Autobahn 9.1 to 9.6."""
    for opcode in (Opcode.TEXT, Opcode.BINARY):
        kind = f"a {opcode.name.lower()} message"
        for size in (64 * KIB, MIB, 4 * MIB):
            promise = f"{kind} of {size // KIB} KiB comes back"
            yield promise, partial(_one_frame, promise, opcode, size)
        for fragment in (64, 4 * KIB, MIB) if opcode is Opcode.TEXT else (256, 64 * KIB + 1):
            promise = f"{kind} of 4 MiB in fragments of {fragment} octets comes back"
            yield promise, partial(_many_frames, promise, opcode, 4 * MIB, fragment)
        for size, chop in ((64 * KIB, 64), (MIB, 2000), (MIB, 64 * KIB + 13)):
            promise = f"{kind} of {size // KIB} KiB in writes of {chop} octets comes back"
            yield promise, partial(_one_frame, promise, opcode, size, chop)
    promise = "a message of exactly the limit comes back"
    yield promise, partial(_one_frame, promise, Opcode.BINARY, MAX_MESSAGE_BYTES)


def crowds() -> Iterator[tuple[str, Make]]:
    """Autobahn 9.7 and 9.8 without the waiting, and then some: many frames at once."""
    for size in (0, 16, 125, 126, 4096):
        promise = f"a thousand messages of {size} octets at once come back in order"

        def messages(promise: str = promise, size: int = size) -> Case:
            each = [(b"%04d" % number * (size // 4 + 1))[:size] for number in range(1000)]
            return Case(promise, b"".join(map(binary, each)), binaries(*each))

        yield promise, messages
    promise = "a thousand pings at once get a thousand pongs"

    def pings(promise: str = promise) -> Case:
        each = tuple(b"%d" % number for number in range(1000))
        return Case(promise, b"".join(map(ping, each)), pongs=each)

    yield promise, pings
    promise = "ten thousand empty fragments are one empty message"

    def empties(promise: str = promise) -> Case:
        return Case(promise, text("", fin=False) + more(fin=False) * 10_000 + more(), texts(""))

    yield promise, empties
    promise = "frames of all sizes, cut where they come, come back in order"

    def mixed(promise: str = promise) -> Case:
        each = [_octets(size) for size in (0, 1, 125, 126, 4096, 65535, 65536, 65537, 0, 200_000, 3)]
        return Case(promise, b"".join(map(binary, each)), binaries(*each), chop=1009)

    yield promise, mixed


def excesses() -> Iterator[tuple[str, Make]]:
    """More than the limit is refused at the head that tells it, before any of it is sent."""
    most = MAX_MESSAGE_BYTES
    for announced in (most + 1, 1 << 30, 1 << 40, 1 << 62, (1 << 63) - 1):
        for opcode in (Opcode.TEXT, Opcode.BINARY):
            promise = f"a {opcode.name.lower()} message is refused when it announces {announced:#x} octets"
            yield promise, partial(Case, promise, frame(opcode, announced=announced), code=TOO_BIG)
    promise = "a fragment that makes its message too long is refused at its head"

    def sum_of_fragments(promise: str = promise) -> Case:
        quarter = bytes(most // 4)
        full = binary(quarter, fin=False) + more(quarter, fin=False) * 3
        return Case(promise, full + frame(Opcode.CONTINUATION, announced=1), code=TOO_BIG)

    yield promise, sum_of_fragments
    promise = "an empty last fragment does not make a message of exactly the limit too long"

    def full(promise: str = promise) -> Case:
        return Case(promise, binary(bytes(most), fin=False) + more(), binaries(bytes(most)))

    yield promise, full
    promise = "whoever sends all of 20 MiB still learns why it was refused"
    yield promise, partial(_refused_in_full, promise)
    promise = "4 MiB behind a close are ignored, and the close is answered"
    yield promise, partial(_close_and_more, promise)
    promise = "a message before one that is too long is answered"

    def behind(promise: str = promise) -> Case:
        return Case(promise, text("fine") + frame(Opcode.BINARY, announced=most + 1), texts("fine"), code=TOO_BIG)

    yield promise, behind


def _refused_in_full(promise: str) -> Case:
    return Case(promise, binary(bytes(20 * MIB)), code=TOO_BIG)


def _close_and_more(promise: str) -> Case:
    return Case(promise, close() + binary(bytes(4 * MIB)), closes=True)


CASES: dict[str, Make] = {**dict(sizes()), **dict(crowds()), **dict(excesses())}
