"""Makes links: over an open stream, to an address, and to an address with endless reconnecting."""

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from protocol.client.address import Address
from protocol.link.background import open_background
from protocol.link.backoff import Backoff as Backoff
from protocol.link.base import CLOSE_S as CLOSE_S
from protocol.link.base import Link as Link
from protocol.link.connect import connect, perform_handshake
from protocol.link.limits import LinkLimits as LinkLimits
from protocol.link.places import Places
from protocol.link.stream_link import StreamLink
from protocol.wire.codec import decode
from protocol.wire.errors import ConnectError, ErrorCode, LinkBroken, LinkError, LoginRefused, ProtocolError
from protocol.wire.messages import FROM_RELAY, Error, Hello, Rejected, Welcome

#: For the TCP, TLS and WebSocket handshakes together.
CONNECT_TIMEOUT_S = 10.0
#: The same for a relay of a list that was lost or did not answer before: another may have taken over meanwhile.
DOUBTFUL_TIMEOUT_S = 2.0
#: From sending `hello` to receiving `welcome`.
LOGIN_TIMEOUT_S = 10.0


@asynccontextmanager
async def serve_link(
    stream: trio.abc.Stream, *, peer: str, limits: LinkLimits | None = None, is_client: bool = False, early: bytes = b""
) -> AsyncIterator[Link]:
    """Run a link over a stream whose WebSocket handshake is done; both are closed at the end of the block.

    Args:
        stream: must not be used by anyone else from now on.
        peer: name of the other end, for people.
        limits: the limits enforced on the peer.
        is_client: whether this side is the WebSocket client.
        early: bytes received behind the handshake.

    Cancellation: only the block is cancelled; what is queued is still sent, within `CLOSE_S`.
    """
    link = StreamLink(stream, peer, limits or LinkLimits(), is_client=is_client, early=early)
    async with open_background(link.run, link.aclose):
        yield link


Connect = Callable[[Address], Awaitable[trio.abc.Stream]]


@asynccontextmanager
async def open_link(
    address: Address,
    *,
    ssl_context: ssl.SSLContext | None = None,
    connect_to: Connect | None = None,
    connect_timeout_s: float = CONNECT_TIMEOUT_S,
    limits: LinkLimits | None = None,
) -> AsyncIterator[Link]:
    """Open a link to the relay at `address`; it is not logged in yet.

    Args:
        address: the relay's address.
        ssl_context: for wss://; None uses the system's certificate authorities.
        connect_to: makes the transport instead of opening a socket; for tests and tunnels.
        connect_timeout_s: for the transport and the handshakes together.
        limits: the limits enforced on the relay.

    Raises:
        ConnectError: no link could be made.
    """
    deadline = trio.current_time() + connect_timeout_s
    too_slow = f"{address} did not answer within {connect_timeout_s:g} s"
    with trio.move_on_at(deadline) as connecting:
        stream = await (connect_to(address) if connect_to is not None else connect(address, ssl_context))
    if connecting.cancelled_caught:
        raise ConnectError(too_slow)
    with trio.move_on_at(deadline) as handshaking:
        try:
            early = await perform_handshake(stream, address)
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
    if handshaking.cancelled_caught:
        raise ConnectError(too_slow)
    async with serve_link(stream, peer=str(address), limits=limits, is_client=True, early=early) as link:
        yield link


async def log_in(link: Link, hello: Hello) -> Welcome:
    """Send `hello` and wait for the relay's `welcome`.

    Raises:
        LoginRefused: the relay refused the login.
        LinkBroken: the link ended, or the relay did not answer within `LOGIN_TIMEOUT_S`.
        ProtocolError: the answer is not a message that may follow `hello`.
    """
    link.send(hello)
    with trio.move_on_after(LOGIN_TIMEOUT_S):
        answer = decode(await link.receive(), FROM_RELAY)
        if isinstance(answer, Welcome):
            return answer
        if isinstance(answer, Error | Rejected):
            url = answer.details.get("url") if answer.code == ErrorCode.NOT_OWNER else ""
            raise LoginRefused(answer.code, answer.message, url if isinstance(url, str) else "")
        raise ProtocolError(f"the relay answered hello with {answer.TYPE!r}")
    raise LinkBroken(f"{link.peer} did not answer the login within {LOGIN_TIMEOUT_S:g} s")


async def run_with_reconnect(
    address: Address,
    hello: Hello,
    serve: Callable[[Link, Welcome], Awaitable[None]],
    *,
    on_down: Callable[[LinkError, float], None],
    backoff: Backoff | None = None,
    ssl_context: ssl.SSLContext | None = None,
    connect_to: Connect | None = None,
) -> None:
    """Connect, log in and serve, again after each loss.

    Args:
        address: the relay's address. Of a list, each is tried before the wait that follows a failure; one that refuses
            the login with `not_owner` and names another is followed there.
        hello: sent at every login.
        serve: called with each new link. If it returns while the link is not broken, this function returns too; if it
            raises LinkError or ProtocolError, or returns because the link broke, a new link is made.
        on_down: called with the reason why the link broke or could not be made, and the seconds until the next attempt.
        backoff: waiting times; by default 0.5 s to 10 s with full jitter.
        ssl_context: as for `open_link`.
        connect_to: as for `open_link`.

    Raises:
        LoginRefused: the relay refused the login with a code that is not retryable.
    """
    backoff, places = backoff or Backoff(), Places(address)
    place = places.begin_round()
    faults: list[LinkError] = []
    served = False
    while True:
        fault: LinkError
        began = trio.current_time()
        timeout_s = DOUBTFUL_TIMEOUT_S if places.doubts(place) else CONNECT_TIMEOUT_S
        try:
            async with open_link(
                place, ssl_context=ssl_context, connect_to=connect_to, connect_timeout_s=timeout_s
            ) as link:
                try:
                    welcome = await log_in(link, hello)
                    began, served = trio.current_time(), True
                    places.note_answer(place)
                    await serve(link, welcome)
                except ProtocolError as broken_rule:
                    await link.aclose(1002, str(broken_rule))
                    raise LinkBroken(f"{place} broke the rules of the protocol: {broken_rule}") from broken_rule
                if not isinstance(link.gone, LinkBroken):
                    return
                fault = link.gone
            backoff.note_uptime(trio.current_time() - began)
            places.note_loss(place)
        except LoginRefused as refusal:
            if not _is_retryable(refusal.code):
                raise
            fault = refusal
            places.note_answer(place)
            places.follow(place, refusal.url)
        except ConnectError as failure:
            fault = failure
            places.note_loss(place)
        except LinkError as failure:
            backoff.note_uptime(trio.current_time() - began)
            fault = failure
            places.note_loss(place)
        faults.append(fault)
        if not served and (following := places.next()) is not None:
            place = following
            continue
        delay_s = backoff.next_s()
        on_down(faults[0] if len(faults) == 1 else ConnectError("; ".join(map(str, faults))), delay_s)
        await trio.sleep(delay_s)
        place, faults, served = places.begin_round(), [], False


def _is_retryable(code: str) -> bool:
    return any(code == known and known.retryable for known in ErrorCode)
