"""A link whose handler has paused it: nothing is lost, whoever closes it meanwhile."""

import attrs
import pytest
import trio
import trio.testing

from protocol.link.base import Link
from tests.protocol.link.link_pair import link_pair


@attrs.define(eq=False)
class OneAtATime:
    """Handles one message of each call, and pauses the link with the others."""

    link: Link
    messages: list[bytes] = attrs.field(factory=list)
    ends: list[str] = attrs.field(factory=list)

    def on_messages(self, messages: list[bytes]) -> None:
        """Handle the first."""
        self.messages.append(messages[0])
        if messages[1:]:
            self.link.pause(messages[1:])

    def on_text(self, text: str) -> None:
        """There is none."""

    def on_closed(self) -> None:
        """Note it."""
        self.ends.append("closed")

    def on_transport_closed(self) -> None:
        """Note it."""
        self.ends.append("transport closed")


@pytest.mark.trio
@pytest.mark.parametrize("closes", [False, True])
async def test_messages_of_a_paused_link_come_in_order_and_then_its_end(
    autojump_clock: trio.testing.MockClock, closes: bool
) -> None:
    sent = [bytes([number]) for number in range(20)]
    async with link_pair() as (client, relay):
        handler = OneAtATime(relay)
        relay.set_handler(handler)
        for data in sent:
            client.send_nowait(data)
        await client.drained()
        if closes:
            await client.aclose()
        await trio.testing.wait_all_tasks_blocked()
        for _ in sent:
            relay.set_handler(handler)
            await trio.testing.wait_all_tasks_blocked()
        assert handler.messages == sent
        assert relay.reading_paused is False
        if not closes:
            client.send_nowait(b"more")
            await trio.testing.wait_all_tasks_blocked()
            assert handler.messages[-1] == b"more"
    relay.set_handler(handler)
    assert handler.ends == ["closed", "transport closed"]


@pytest.mark.trio
@pytest.mark.parametrize("by", ["resume_reading", "set_handler"])
async def test_a_link_that_was_long_paused_is_not_dead_when_it_is_read_again(
    autojump_clock: trio.testing.MockClock, by: str
) -> None:
    async with link_pair() as (client, relay):
        handler = OneAtATime(relay)
        relay.set_handler(handler)
        relay.pause_reading()
        await trio.sleep(100.0)
        assert relay.gone is None
        if by == "resume_reading":
            relay.resume_reading()
        else:
            relay.set_handler(handler)
        relay.check_liveness(trio.current_time())  # before anything is read
        assert relay.gone is None
        client.send_nowait(b"more")
        await trio.testing.wait_all_tasks_blocked()
        assert handler.messages == [b"more"]
