"""What a case is."""

import attrs

from tests.conformance.frames import Opcode
from tests.conformance.peer import Message

#: Close codes (RFC 6455, section 7.4.1).
NORMAL = 1000
PROTOCOL_ERROR = 1002
INVALID_DATA = 1007
TOO_BIG = 1009


@attrs.frozen
class Case:
    """What a client sends on a new connection to an echo, and all that must come back.

    Attributes:
        promise: for people, and the test's id.
        sent: frames, good or bad.
        messages: what comes back, whole, in order.
        pongs: the payloads of those that come back, in order.
        code: of the server's close frame; None stands for one without a code. Where `sent` neither closes nor breaks
            a rule, the tests close with 1000 once they have all of it, and get that back.
        closes: whether `sent` has a good close frame.
        chop: octets a write; 0: all of `sent` in one.
        all_messages: false where the server may, but need not, answer what came before the close frame.
    """

    promise: str
    sent: bytes = attrs.field(repr=False)
    messages: tuple[Message, ...] = ()
    pongs: tuple[bytes, ...] = ()
    code: int | None = NORMAL
    closes: bool = False
    chop: int = 0
    all_messages: bool = True

    @property
    def breaks(self) -> bool:
        """Whether `sent` breaks a rule."""
        return not self.closes and self.code != NORMAL

    def chopped(self, octets: int) -> "Case":
        """The same, in writes of so many octets."""
        size = "one octet" if octets == 1 else f"{octets} octets"
        return attrs.evolve(self, promise=f"{self.promise}, in writes of {size}", chop=octets)


def texts(*payloads: str | bytes) -> tuple[Message, ...]:
    """Text messages."""
    return tuple(Message(Opcode.TEXT, one.encode() if isinstance(one, str) else one) for one in payloads)


def binaries(*payloads: bytes) -> tuple[Message, ...]:
    """Binary messages."""
    return tuple(Message(Opcode.BINARY, one) for one in payloads)
