"""Connecting, logging in and reconnecting."""

import random

import pytest
import trio
import trio.testing

from protocol.client.address import Address
from protocol.link.backoff import Backoff
from protocol.link.base import Link
from protocol.link.dial import log_in, open_link, run_with_reconnect
from protocol.wire.codec import encode
from protocol.wire.errors import ConnectError, LinkBroken, LinkError, LoginRefused, ProtocolError
from protocol.wire.messages import Error, Hello, Welcome
from tests.protocol.link.link_pair import link_pair
from tests.support.scripted_relay import ADDRESS, Connection, FakeRelay

HELLO = Hello(version=1, role="client")


@pytest.mark.trio
async def test_connect_errors_say_what_is_wrong(tmp_path: object) -> None:
    listener = trio.socket.socket()
    await listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]  # bound and not listening: refused
    cases = [
        (Address(kind="unix", path=f"{tmp_path}/none.sock"), "no relay listens at unix:"),
        (Address(kind="tcp", host="127.0.0.1", port=port), "no relay listens at ws://127.0.0.1:"),
        (Address(kind="unix", path="/" + "long" * 50), "cannot reach unix:"),
    ]
    for address, words in cases:
        with pytest.raises(ConnectError, match=words):
            async with open_link(address):
                pass
    listener.close()


@pytest.mark.trio
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 14\r\n\r\norigin refused", "HTTP 403: origin refused"),
        (b"", "closed the connection"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "is not a relay"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "HTTP 200"),
        (
            b"HTTP/1.1 308 No\r\nLocation: https://h/v1/relay\r\nContent-Length: 0\r\n\r\n",
            "308; use https://h/v1/relay",
        ),
    ],
)
async def test_whatever_else_answers_is_a_connect_error(
    answer: bytes, words: str, autojump_clock: trio.testing.MockClock
) -> None:
    ours, theirs = trio.testing.memory_stream_pair()

    async def connect(_address: Address) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        return ours

    async def other_server() -> None:
        await theirs.receive_some()
        await theirs.send_all(answer)
        await theirs.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other_server)
        with pytest.raises(ConnectError, match=words):
            async with open_link(ADDRESS, connect_to=connect):
                pass
    assert trio.current_time() < 1


@pytest.mark.trio
async def test_a_server_that_never_answers_is_given_up_at_the_deadline(autojump_clock: trio.testing.MockClock) -> None:
    ours, _theirs = trio.testing.memory_stream_pair()

    async def connect(_address: Address) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        return ours

    with pytest.raises(ConnectError, match="within 10 s"):
        async with open_link(ADDRESS, connect_to=connect):
            pass

    async def never(_address: Address) -> trio.abc.Stream:
        await trio.sleep_forever()
        raise AssertionError

    with pytest.raises(ConnectError, match="within 10 s"):
        async with open_link(ADDRESS, connect_to=never):
            pass


@pytest.mark.trio
async def test_a_login_that_is_refused_or_not_answered_says_so(autojump_clock: trio.testing.MockClock) -> None:
    async with link_pair() as (client, relay):
        relay.send(Error(code="unauthenticated", message="this token is not known"))
        with pytest.raises(LoginRefused, match="not known") as refusal:
            await log_in(client, HELLO)
        assert refusal.value.code == "unauthenticated"
    async with link_pair() as (client, relay):
        with pytest.raises(LinkBroken, match="did not answer the login"):
            await log_in(client, HELLO)
    async with link_pair() as (client, relay):
        relay.send_nowait(encode(Welcome(connection_id="c", principal="p"))[:-1])
        with pytest.raises(ProtocolError):
            await log_in(client, HELLO)


@pytest.mark.trio
async def test_keep_linked_comes_back_after_each_loss_and_starts_over_after_one_that_held(
    autojump_clock: trio.testing.MockClock,
) -> None:
    waits: list[float] = []

    async def serve(link: Link, welcome: Welcome) -> None:
        assert welcome.principal == "tester"
        async for _data in link:
            pass

    async def lasting(connection: Connection) -> None:
        await trio.sleep(60)
        await connection.cut()

    async with trio.open_nursery() as nursery:
        relay = FakeRelay(nursery, *[Connection.cut] * 7, lasting, Connection.cut)

        def on_down(fault: LinkError, delay_s: float) -> None:
            assert isinstance(fault, LinkBroken)
            waits.append(delay_s)
            if len(waits) == 10:
                nursery.cancel_scope.cancel()

        backoff = Backoff(draw=lambda: 1.0)
        await run_with_reconnect(ADDRESS, HELLO, serve, on_down=on_down, backoff=backoff, connect_to=relay.connect)
    assert waits == [0.5, 1, 2, 4, 8, 10, 10, 0.5, 1, 2]


@pytest.mark.trio
async def test_keep_linked_returns_when_serve_does_and_lets_a_refusal_through(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def serve(_link: Link, _welcome: Welcome) -> None:
        await trio.lowlevel.checkpoint()

    def on_down(fault: LinkError, delay_s: float) -> None:
        pytest.fail(f"{fault}")

    async with trio.open_nursery() as nursery:
        relay = FakeRelay(nursery, Connection.hold)
        await run_with_reconnect(ADDRESS, HELLO, serve, on_down=on_down, connect_to=relay.connect)
        wrong = Hello(version=1, role="client", token="wrong")
        with pytest.raises(LoginRefused):
            await run_with_reconnect(ADDRESS, wrong, serve, on_down=on_down, connect_to=relay.connect)


@pytest.mark.trio
async def test_keep_linked_closes_with_1002_on_bytes_that_are_no_protocol_and_tries_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    reasons: list[str] = []
    codes: list[int | None] = []

    async def serve(link: Link, _welcome: Welcome) -> None:
        await link.receive()
        raise ProtocolError("cut short")

    async def babble(connection: Connection) -> None:
        connection.link.send_nowait(b"\xc1")
        await connection.hold()
        codes.append(connection.link.close_code)

    async with trio.open_nursery() as nursery:
        relay = FakeRelay(nursery, babble)

        def on_down(fault: LinkError, _delay_s: float) -> None:
            reasons.append(str(fault))
            if len(reasons) == 2:
                nursery.cancel_scope.cancel()

        await run_with_reconnect(ADDRESS, HELLO, serve, on_down=on_down, connect_to=relay.connect)
    assert "cut short" in reasons[0]
    assert codes[0] == 1002


def test_backoff_doubles_to_its_longest_with_full_jitter() -> None:
    rng = random.Random(1)
    backoff = Backoff(draw=rng.random)
    for ceiling in (0.5, 1, 2, 4, 8, 10, 10):
        assert 0 <= backoff.next_s() <= ceiling
    longest = Backoff(draw=lambda: 1.0)
    assert [longest.next_s() for _ in range(7)] == [0.5, 1, 2, 4, 8, 10, 10]
    longest.note_uptime(4.9)
    assert longest.next_s() == 10
    longest.note_uptime(5)
    assert longest.next_s() == 0.5
