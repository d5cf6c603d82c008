"""Going round a list of relays, and following `not_owner`."""

from collections.abc import Callable

import attrs
import pytest
import trio
import trio.testing

from protocol.client.address import Address, parse_address
from protocol.link.backoff import Backoff
from protocol.link.base import Link
from protocol.link.dial import run_with_reconnect
from protocol.link.places import Places
from protocol.wire.errors import ConnectError, LinkError
from protocol.wire.messages import Error, Hello, Welcome
from tests.support.scripted_relay import accept_link

HELLO = Hello(version=1, role="client")
A, B, C = (parse_address(f"ws://{name}:1") for name in "abc")
Answer = Callable[[Link], None]


def owner(link: Link) -> None:
    link.send(Welcome(connection_id="c", principal="p"))


def not_owner(url: str) -> Answer:
    return lambda link: link.send(Error(code="not_owner", message="a standby", details={"url": url}))


@attrs.define
class Cluster:
    """Relays by their addresses, each with its answer to a login; those without one refuse the connection."""

    nursery: trio.Nursery
    answers: dict[Address, Answer]
    tried: list[str] = attrs.field(factory=list)
    ends: list[trio.abc.Stream] = attrs.field(factory=list)

    async def connect(self, address: Address) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        assert not address.others
        self.tried.append(address.host)
        if address not in self.answers:
            raise ConnectError(f"no relay listens at {address}")
        ours, theirs = trio.testing.memory_stream_pair()
        self.ends.append(theirs)
        self.nursery.start_soon(self._serve, theirs, self.answers[address])
        return ours

    async def _serve(self, stream: trio.abc.Stream, answer: Answer) -> None:
        async with accept_link(stream) as link:
            await link.receive()
            answer(link)
            await link.drained()
            async for _data in link:
                pass

    async def cut(self, address: Address) -> None:
        """Lose the owner: its connections break, and nothing listens there any more."""
        del self.answers[address]
        while self.ends:
            await trio.aclose_forcefully(self.ends.pop())


@pytest.mark.trio
async def test_the_next_relay_of_a_list_is_tried_at_once_and_the_wait_comes_after_a_round(
    autojump_clock: trio.testing.MockClock,
) -> None:
    downs: list[tuple[str, float]] = []

    def on_down(fault: LinkError, delay_s: float) -> None:
        downs.append((str(fault), delay_s))
        if len(downs) == 2:
            cluster.answers[B] = owner

    async def serve(link: Link, _welcome: Welcome) -> None:
        assert link.peer == str(B)

    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery, {})
        every = attrs.evolve(A, others=(B, C))
        backoff = Backoff(draw=lambda: 1.0)
        await run_with_reconnect(every, HELLO, serve, on_down=on_down, backoff=backoff, connect_to=cluster.connect)
        nursery.cancel_scope.cancel()
    listens = [f"no relay listens at ws://{name}:1" for name in "abc"]
    assert downs == [("; ".join(listens), 0.5), ("; ".join(listens), 1.0)]
    assert cluster.tried == [*"abc", *"abc", *"ab"]


@pytest.mark.trio
async def test_a_standby_is_followed_to_the_owner_also_to_one_that_is_not_on_the_list(
    autojump_clock: trio.testing.MockClock,
) -> None:
    served: list[str] = []

    async def serve(link: Link, _welcome: Welcome) -> None:
        served.append(link.peer)
        if len(served) < 2:
            await cluster.cut(C)
            cluster.answers[B] = owner
            async for _data in link:
                pass

    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery, {A: not_owner("ws://c:1"), B: not_owner("ws://c:1"), C: owner})
        every = attrs.evolve(A, others=(B,))
        await run_with_reconnect(every, HELLO, serve, on_down=lambda _fault, _delay_s: None, connect_to=cluster.connect)
        nursery.cancel_scope.cancel()
    assert served == ["ws://c:1", "ws://b:1"]
    assert cluster.tried == ["a", "c", "a", "b"], "the lost owner that A still names is not tried again before B"


def test_who_was_lost_comes_last_and_is_waited_for_only_shortly() -> None:
    places = Places(attrs.evolve(A, others=(B, C)))
    assert [places.begin_round(), places.next(), places.next(), places.next()] == [A, B, C, None]
    places.note_loss(A)
    assert places.doubts(A)
    assert not places.doubts(B)
    assert [places.begin_round(), places.next(), places.next()] == [B, C, A]
    places.note_answer(A)
    assert not places.doubts(A)
    alone = Places(A)
    alone.note_loss(A)
    assert not alone.doubts(A), "there is nobody else to ask"


@pytest.mark.parametrize(
    ("place", "url", "followed"),
    [
        ("ws://a:1", "wss://b:1", True),
        ("wss://a:1", "wss://b:1", True),
        ("wss://a:1", "ws://b:1", False),
        ("ws://a:1", "ws://a:1", False),
        ("ws://a:1", "unix:/etc/socket", False),
        ("ws://a:1", "what", False),
        ("ws://a:1", "", False),
    ],
)
def test_a_named_owner_is_followed_once_and_never_out_of_tls(place: str, url: str, followed: bool) -> None:
    places = Places(parse_address(place))
    here = places.begin_round()
    for _ in range(2):
        places.follow(here, url)
    assert places.next() == (parse_address(url) if followed else None)
    places.follow(here, url)
    assert places.next() is None, "two that name each other are no loop"
