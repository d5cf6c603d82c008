"""What every route needs, and who is being answered at this moment."""

import time
from typing import Protocol

import attrs
import trio
from starlette.requests import Request

from relayd.auth.login_throttle import LoginFailures
from relayd.auth.tokens import PeerCredentials, Principal, Tokens
from relayd.core.admission import Intake
from relayd.core.relay import Relay

#: A revoked token's responses end within 2 s (DESIGN §8), and an expired one's.
TOKENS_INTERVAL_S = 1.0


class Waiting(Protocol):
    """What a response waits for: a request of the relay's."""

    @property
    def live(self) -> bool:
        """Whether more is to come than is there."""

    def wake(self) -> None:
        """Have the response look again."""


@attrs.define(eq=False)
class Visit:
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

    def hang_up(self) -> None:
        """The client is not there any more: whoever works for it stops at once."""
        if not self.answered:
            self.gone = True
            self.scope.cancel()


@attrs.define(eq=False)
class Site:
    """What all routes share."""

    relay: Relay
    intake: Intake
    tokens: Tokens
    failures: LoginFailures = attrs.field(factory=LoginFailures)
    #: Requests that are being answered.
    visits: set[Visit] = attrs.field(factory=set)
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
        return sum(visit.waits_for is None or not visit.waits_for.live for visit in self.visits)

    def places_of(self, principal: Principal) -> int:
        """Connections and responses that a token has at this moment."""
        links = (link.principal for link in self.relay.connections.values())
        visitors = (visit.principal for visit in self.visits if visit.principal is not None and not visit.answered)
        return sum(other.token_id == principal.token_id for other in (*links, *visitors))

    def leave(self) -> None:
        """The relay is about to be gone: responses that still wait end now."""
        self.leaving = True
        for visit in self.visits:
            if visit.waits_for is not None:
                visit.waits_for.wake()

    async def serve(self) -> None:
        """End the responses to those whose token was revoked or has expired, until cancelled."""
        while True:
            await trio.sleep(TOKENS_INTERVAL_S)
            now = time.time()
            for visit in list(self.visits):
                token_id = visit.principal.token_id if visit.principal is not None else None
                if token_id is not None and not self.tokens.is_live(token_id, now):
                    visit.hang_up()


def site_of(request: Request) -> Site:
    """The site that a request came to."""
    site = request.app.state.site
    assert isinstance(site, Site)
    return site


def visit_of(request: Request) -> Visit:
    """What the server knows of a request."""
    visit = request.state.visit
    assert isinstance(visit, Visit)
    return visit
