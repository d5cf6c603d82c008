"""The state shared by all HTTP routes, and the open exchanges."""

import time
from itertools import chain
from typing import Any, Protocol

import attrs
import trio
from starlette.requests import HTTPConnection

from protocol.link.websocket_frames import PartialBudget
from relayd.auth.login_throttle import LoginThrottle
from relayd.auth.result_links import LinkSigner, new_signer
from relayd.auth.tokens import PeerCredentials, Principal, TokenRegistry
from relayd.core import principals
from relayd.core.accounts import Accounts
from relayd.core.admission import Admission
from relayd.core.relay import Relay
from relayd.http.audio.encoded_results import EncodedResults

#: Responses end within 2 s after their token was revoked (docs/design.md §8) or has expired.
TOKENS_INTERVAL_S = 1.0
#: Unfinished messages of all WebSockets together.
MAX_PARTIAL_BYTES = 128 * 1024 * 1024
#: What an answer to somebody without a token takes of the event loop's time, most of it in the routing.
STRANGER_COST_S = 0.001


class Waiting(Protocol):
    """What a response waits for: a request of the relay."""

    @property
    def live(self) -> bool:
        """Whether more frames may still arrive."""

    def wake(self) -> None:
        """Wake the task that writes the response."""


class Slot(Protocol):
    """A connection's place among all that the relay keeps."""

    peer: str
    #: The other end of the connection: a proxy's, where there is one.
    source: str
    credentials: PeerCredentials | None

    def log_in(self, role: str) -> bool:
        """Note that the peer has logged in; False where the relay has all the connections of that role it may have."""

    def log_out(self) -> None:
        """Note that the connection waits for its next request."""


@attrs.define(eq=False)
class Exchange:
    """One HTTP request, from its head to the end of its response; or a WebSocket, to its close.

    Args:
        slot: the connection's.
        secure: whether it came over TLS.
    """

    slot: Slot
    secure: bool = False
    principal: Principal | None = None
    waits_for: Waiting | None = None
    #: The client disconnected before its response was complete.
    gone: bool = False
    #: The response is complete.
    answered: bool = False
    #: Cancels the wait for the next piece of the body; None while the handler does not read it. Of a WebSocket, cancels
    #: the handler.
    reading: trio.CancelScope | None = None
    #: Cancels the handler.
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)

    @property
    def local(self) -> bool:
        """Whether it came over the unix socket."""
        return self.slot.credentials is not None

    def abort(self) -> None:
        """Cancel the handler, because its client has disconnected or its token is no longer valid."""
        if not self.answered:
            self.gone = True
            self.scope.cancel()


@attrs.define(eq=False)
class HttpContext:
    """The state that all HTTP routes share."""

    relay: Relay
    admission: Admission
    tokens: TokenRegistry
    #: Makes and checks links to results.
    links: LinkSigner = attrs.field(factory=new_signer)
    failures: LoginThrottle = attrs.field(factory=LoginThrottle)
    #: The users, and how they log in.
    accounts: Accounts = attrs.field(init=False)
    #: Requests being answered.
    exchanges: set[Exchange] = attrs.field(factory=set)
    #: What WebSockets wait for, each for any number of requests of the relay.
    streams: set[Waiting] = attrs.field(factory=set)
    #: Open HTTP connections, including idle ones.
    connections: int = 0
    #: HTTP status -> number of responses started with it.
    responses: dict[int, int] = attrs.field(factory=dict)
    #: Limits the unfinished messages of all WebSockets.
    partial: PartialBudget = attrs.field(factory=lambda: PartialBudget(MAX_PARTIAL_BYTES))
    #: Bytes of uploads in memory that do not belong to a request yet.
    upload_bytes: int = 0
    #: Spaces for which the log has reported that another voice than requested is used.
    voices_replaced: set[str] = attrs.field(factory=set)
    encoded: EncodedResults = attrs.field(factory=EncodedResults)
    #: The conversations: `relayd.talk.talks.Talks`, whose `talks_of` returns them; None without [talk].
    talks: object = None
    #: Paths of the OpenAPI document that are of what is above this layer.
    more_paths: dict[str, Any] = attrs.field(factory=dict)
    #: The relay is shutting down; waiting responses end with an error.
    leaving: bool = False

    def __attrs_post_init__(self) -> None:
        self.accounts = Accounts(self.relay, self.tokens, self.failures)

    @property
    def unfinished(self) -> int:
        """Number of responses that need no more of their client or of frames to finish; a drain waits for them."""
        settled = (exchange for exchange in self.exchanges if exchange.reading is None)
        unsent = sum(not stream.live for stream in self.streams)
        return unsent + sum(exchange.waits_for is None or not exchange.waits_for.live for exchange in settled)

    async def wait_turn(self, slot: Slot, token: str) -> None:
        """Wait until a request may be answered: those without a token of the relay's have a share together."""
        if slot.credentials is not None:
            return
        owner = (self.tokens.owner_of(token, time.time()) or self.accounts.users.owner_of(token)) if token else None
        if owner is None:
            await self.relay.principals.wait_stranger_turn(STRANGER_COST_S)
        else:
            await self.relay.principals.wait_refused_turn(owner, STRANGER_COST_S)

    def full_message(self, principal: Principal) -> str | None:
        """Why a principal may not have one more request answered at this moment; None if it may."""
        answering = (exchange for exchange in self.exchanges if not exchange.answered)
        settings = self.relay.config.limits.principal
        return principals.full_message(principal, settings, chain(self.relay.connections.values(), answering))

    def is_live(self, login_id: str, now: float) -> bool:
        """Whether a token, a session or a user, by its id, may still be used."""
        return self.tokens.is_live(login_id, now) or self.accounts.is_live(login_id)

    def begin_shutdown(self) -> None:
        """End the responses that still wait for a request or for a body, because the relay is about to exit."""
        self.leaving = True
        for exchange in self.exchanges:
            if exchange.reading is not None:
                exchange.reading.cancel()
            if exchange.waits_for is not None:
                exchange.waits_for.wake()
        for stream in self.streams:
            stream.wake()

    async def serve(self) -> None:
        """Abort the responses whose token was revoked or has expired, until cancelled."""
        while True:
            await trio.sleep(TOKENS_INTERVAL_S)
            now = time.time()
            for exchange in list(self.exchanges):
                token_id = exchange.principal.token_id if exchange.principal is not None else None
                if token_id is not None and not self.is_live(token_id, now):
                    exchange.abort()


def context_of(request: HTTPConnection) -> HttpContext:
    """Return the context of the application that serves `request`."""
    context = request.app.state.context
    assert isinstance(context, HttpContext)
    return context


def exchange_of(request: HTTPConnection) -> Exchange:
    """Return the exchange of a request."""
    exchange = request.state.exchange
    assert isinstance(exchange, Exchange)
    return exchange
