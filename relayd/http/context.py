"""What every HTTP route shares, and the exchanges that are open now."""

import time
from typing import Protocol

import attrs
import trio
from starlette.requests import Request

from relayd.auth.login_throttle import LoginThrottle
from relayd.auth.tokens import PeerCredentials, Principal, TokenRegistry
from relayd.core.admission import Admission
from relayd.core.relay import Relay

#: A revoked token's responses end within 2 s (docs/design.md §8), and an expired one's.
TOKENS_INTERVAL_S = 1.0


class Waiting(Protocol):
    """What a response waits for: a request of the relay's."""

    @property
    def live(self) -> bool:
        """Whether more frames may still arrive."""

    def wake(self) -> None:
        """Have the response look again."""


@attrs.define(eq=False)
class Exchange:
    """One HTTP request, from its head to the end of its response.

    Args:
        peer: where it comes from, for logs.
        credentials: of a unix socket's peer.
        secure: whether it came over TLS.
    """

    peer: str
    credentials: PeerCredentials | None = None
    secure: bool = False
    principal: Principal | None = None
    waits_for: Waiting | None = None
    #: The client hung up before it had its answer.
    gone: bool = False
    #: The response is complete.
    answered: bool = False
    #: Ends the handler.
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)

    def abort(self) -> None:
        """The client is not there any more: whoever works for it stops at once."""
        if not self.answered:
            self.gone = True
            self.scope.cancel()


@attrs.define(eq=False)
class HttpContext:
    """What all routes share."""

    relay: Relay
    admission: Admission
    tokens: TokenRegistry
    failures: LoginThrottle = attrs.field(factory=LoginThrottle)
    #: Requests that are being answered.
    exchanges: set[Exchange] = attrs.field(factory=set)
    #: Connections of HTTP's that are open, whether anything is being answered there or not.
    connections: int = 0
    #: HTTP status -> responses that began with it.
    responses: dict[int, int] = attrs.field(factory=dict)
    #: Bytes of uploads that have come and are no request's yet.
    upload_bytes: int = 0
    #: Whether the relay leaves: who waits is told so.
    leaving: bool = False

    @property
    def unfinished(self) -> int:
        """Responses that can be finished without anything more being made: a drain waits for them."""
        return sum(exchange.waits_for is None or not exchange.waits_for.live for exchange in self.exchanges)

    def connection_count(self, principal: Principal) -> int:
        """Connections and responses that a token has at this moment."""
        links = (link.principal for link in self.relay.connections.values())
        principals = (
            exchange.principal
            for exchange in self.exchanges
            if exchange.principal is not None and not exchange.answered
        )
        return sum(other.token_id == principal.token_id for other in (*links, *principals))

    def begin_shutdown(self) -> None:
        """The relay is about to be gone: responses that still wait end now."""
        self.leaving = True
        for exchange in self.exchanges:
            if exchange.waits_for is not None:
                exchange.waits_for.wake()

    async def serve(self) -> None:
        """End the responses to those whose token was revoked or has expired, until cancelled."""
        while True:
            await trio.sleep(TOKENS_INTERVAL_S)
            now = time.time()
            for exchange in list(self.exchanges):
                token_id = exchange.principal.token_id if exchange.principal is not None else None
                if token_id is not None and not self.tokens.is_live(token_id, now):
                    exchange.abort()


def context_of(request: Request) -> HttpContext:
    """What the routes share, from a request."""
    context = request.app.state.context
    assert isinstance(context, HttpContext)
    return context


def exchange_of(request: Request) -> Exchange:
    """What the server knows of a request."""
    exchange = request.state.exchange
    assert isinstance(exchange, Exchange)
    return exchange
