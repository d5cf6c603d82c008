"""Making links: over a WebSocket at hand, to an address, and to an address for ever."""

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio
from trio_websocket import WebSocketConnection

from protocol.address import Address
from protocol.background import open_background
from protocol.backoff import Backoff as Backoff
from protocol.codec import decode
from protocol.duplex import CLOSE_S as CLOSE_S
from protocol.duplex import DEAD_AFTER_S, MAX_BACKLOG_BYTES, PING_INTERVAL_S, SEND_TIMEOUT_S
from protocol.duplex import Link as Link
from protocol.errors import ConnectError, ErrorCode, LinkBroken, LinkError, LoginRefused, ProtocolError
from protocol.messages import FROM_RELAY, Error, Hello, Message, Rejected, Welcome
from protocol.websocket import Socket, connect, open_socket

#: TCP, TLS and WebSocket handshakes together.
CONNECT_TIMEOUT_S = 10.0
#: From our `hello` to the relay's `welcome`.
LOGIN_TIMEOUT_S = 10.0


@asynccontextmanager
async def serve_link(
    ws: WebSocketConnection,
    *,
    peer: str,
    ping_interval_s: float = PING_INTERVAL_S,
    dead_after_s: float = DEAD_AFTER_S,
    send_timeout_s: float = SEND_TIMEOUT_S,
    max_backlog_bytes: int = MAX_BACKLOG_BYTES,
    farewell: Message | None = None,
) -> AsyncIterator[Link]:
    """A link over a WebSocket whose handshake is done, either side; closed at the end of the block.

    A relay makes `ws` best with `protocol.websocket.open_upgrade`; one of `trio_websocket.wrap_server_stream` does.

    Args:
        ws: must be used by nobody else from now on.
        peer: who it is, for people.
        ping_interval_s: seconds between WebSocket pings.
        dead_after_s: seconds of silence after which the link is broken.
        send_timeout_s: with something to send, and nothing of it taken for so many seconds, the link breaks
            ("slow_consumer").
        max_backlog_bytes: with more queued, the same.
        farewell: for such a peer, in place of what it did not take; the link is then closed, and counts as closed by
            this side, after at most twice `CLOSE_S`.

    Cancellation: the block alone is cancelled; what is queued still goes out, within `CLOSE_S`.
    """
    link = Link(
        Socket.adopt(ws),
        peer,
        ping_interval_s=ping_interval_s,
        dead_after_s=dead_after_s,
        send_timeout_s=send_timeout_s,
        max_backlog_bytes=max_backlog_bytes,
        farewell=farewell,
    )
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
    ping_interval_s: float = PING_INTERVAL_S,
    dead_after_s: float = DEAD_AFTER_S,
    send_timeout_s: float = SEND_TIMEOUT_S,
    max_backlog_bytes: int = MAX_BACKLOG_BYTES,
) -> AsyncIterator[Link]:
    """A link to the relay at `address`, not logged in yet.

    Args:
        address: where it listens.
        ssl_context: for wss://; None takes the system's certificate authorities.
        connect_to: makes the transport in place of sockets; for tests and tunnels.
        connect_timeout_s: for transport and handshakes together.
        ping_interval_s: as `serve_link`, like the rest.
        dead_after_s: as `serve_link`.
        send_timeout_s: as `serve_link`.
        max_backlog_bytes: as `serve_link`.

    Raises:
        ConnectError: no link could be made.
    """
    deadline = trio.current_time() + connect_timeout_s
    too_slow = f"{address} did not answer within {connect_timeout_s:g} s"
    with trio.move_on_at(deadline) as connecting:
        stream = await (connect_to(address) if connect_to is not None else connect(address, ssl_context))
    if connecting.cancelled_caught:
        raise ConnectError(too_slow)
    with trio.CancelScope(deadline=deadline) as shaking:
        async with open_socket(stream, address) as socket:
            # The block below is the caller's: our deadline, and a cancellation by it, end here.
            shaking.deadline = float("inf")
            async with serve_link(
                socket,
                peer=str(address),
                ping_interval_s=ping_interval_s,
                dead_after_s=dead_after_s,
                send_timeout_s=send_timeout_s,
                max_backlog_bytes=max_backlog_bytes,
            ) as link:
                yield link
    if shaking.cancelled_caught:
        raise ConnectError(too_slow)


async def log_in(link: Link, hello: Hello) -> Welcome:
    """Say hello and wait for the relay's welcome.

    Raises:
        LoginRefused: the relay said no.
        LinkBroken: the link went, or the relay did not answer within `LOGIN_TIMEOUT_S`.
        ProtocolError: the answer was none of the protocol's.
    """
    link.send(hello)
    with trio.move_on_after(LOGIN_TIMEOUT_S):
        answer = decode(await link.receive(), FROM_RELAY)
        if isinstance(answer, Welcome):
            return answer
        if isinstance(answer, Error | Rejected):
            raise LoginRefused(answer.code, answer.message)
        raise ProtocolError(f"the relay answered hello with {answer.TYPE!r}")
    raise LinkBroken(f"{link.peer} did not answer the login within {LOGIN_TIMEOUT_S:g} s")


async def keep_linked(
    address: Address,
    hello: Hello,
    serve: Callable[[Link, Welcome], Awaitable[None]],
    *,
    on_down: Callable[[LinkError, float], None],
    backoff: Backoff | None = None,
    ssl_context: ssl.SSLContext | None = None,
    connect_to: Connect | None = None,
) -> None:
    """Connect, log in and serve, again and again for ever.

    Args:
        address: where the relay listens.
        hello: of every login.
        serve: called with each new link. When it returns and the link is not broken, so does this function; when it
            raises LinkError or ProtocolError, or returns because the link broke, a new link is made.
        on_down: told why the link went, or could not be made, and in how many seconds the next try follows.
        backoff: waiting times; 0.5 -> 10 s with full jitter by default.
        ssl_context: as `open_link`.
        connect_to: as `open_link`.

    Raises:
        LoginRefused: the relay refused the login with a code that trying again does not help.
    """
    backoff = backoff or Backoff()
    while True:
        fault: LinkError
        began = trio.current_time()
        try:
            async with open_link(address, ssl_context=ssl_context, connect_to=connect_to) as link:
                try:
                    welcome = await log_in(link, hello)
                    began = trio.current_time()
                    await serve(link, welcome)
                except ProtocolError as broken_rule:
                    await link.aclose(1002, str(broken_rule))
                    raise LinkBroken(f"{address} broke the rules of the protocol: {broken_rule}") from broken_rule
                if not isinstance(link.gone, LinkBroken):
                    return
                fault = link.gone
            backoff.lived(trio.current_time() - began)
        except LoginRefused as refusal:
            if not _may_pass(refusal.code):
                raise
            fault = refusal
        except ConnectError as failure:
            fault = failure
        except LinkError as failure:
            backoff.lived(trio.current_time() - began)
            fault = failure
        delay_s = backoff.next_s()
        on_down(fault, delay_s)
        await trio.sleep(delay_s)


def _may_pass(code: str) -> bool:
    return any(code == known and known.retryable for known in ErrorCode)
