"""The same table against the link over any Trio stream, as the relay has it over TLS: in memory, and no time passes."""

from contextlib import suppress

import attrs
import pytest
import trio
import trio.testing

from protocol.link.dial import serve_link
from protocol.link.limits import LinkLimits
from tests.conformance import closing, framing, limits, unicode
from tests.conformance.cases import Case
from tests.conformance.frames import Opcode, close
from tests.conformance.peer import Heard, Message, ServerStream

CROWDS_AND_EXCESSES = dict(limits.crowds()) | dict(limits.excesses())
RULES = LinkLimits(max_message_bytes=limits.MAX_MESSAGE_BYTES)


@attrs.define(eq=False)
class Ears:
    """Takes what a link hears."""

    messages: list[Message] = attrs.field(factory=list)

    def on_messages(self, messages: list[bytes]) -> None:
        self.messages += [Message(Opcode.BINARY, one) for one in messages]

    def on_text(self, text: str) -> None:
        self.messages.append(Message(Opcode.TEXT, text.encode()))

    def on_closed(self) -> None:
        pass

    def on_transport_closed(self) -> None:
        pass


async def hold(case: Case) -> None:
    """Hold a link to a case: what it heard is what an echo would have sent back."""
    here, there = trio.testing.memory_stream_pair()
    ears, heard = Ears(), Heard()
    async with serve_link(there, peer="a peer", limits=RULES) as link, trio.open_nursery() as nursery:
        link.set_handler(ears)
        nursery.start_soon(ServerStream(here).listen, heard)
        with suppress(trio.BrokenResourceError):  # it hangs up once it has said why
            for at in range(0, len(case.sent), case.chop or len(case.sent)):
                await here.send_all(case.sent[at : at + (case.chop or len(case.sent))])
                if case.chop:
                    await trio.testing.wait_all_tasks_blocked()
            if not case.closes and not case.breaks:
                await here.send_all(close())
    if case.all_messages:
        assert ears.messages == list(case.messages)
    assert heard.pongs == list(case.pongs)
    assert heard.closed, "no close frame came"
    assert heard.code == case.code, heard.reason
    assert heard.stray == 0, "something came behind the close frame"


@pytest.mark.trio
@pytest.mark.parametrize("case", [*framing.CASES, *unicode.CASES, *closing.CASES], ids=lambda case: case.promise)
async def test_a_link_over_a_stream_agrees(case: Case, autojump_clock: trio.testing.MockClock) -> None:
    await hold(case)


@pytest.mark.trio
@pytest.mark.parametrize("promise", CROWDS_AND_EXCESSES)
async def test_a_link_over_a_stream_keeps_the_limits(promise: str, autojump_clock: trio.testing.MockClock) -> None:
    await hold(CROWDS_AND_EXCESSES[promise]())
