"""Decides which spaces and requests a principal may see, for WebSocket and HTTP alike."""

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import Find, Rejected
from relayd.auth.tokens import Principal
from relayd.core.relay import Relay
from relayd.core.space import Space
from relayd.requests.request import Request
from relayd.scheduling.scheduler import no_such_space

#: Characters of a name that a refusal repeats: a name in an HTTP path can be longer than any valid space name.
MAX_NAME_CHARS = 64


def find_space(relay: Relay, principal: Principal, name: str) -> Space | Rejected:
    """Return the space with this name, if the principal may use it.

    `forbidden` is checked first: otherwise any token could find out which spaces exist.
    """
    if not principal.may_use(name):
        message = f"principal {principal.name!r} may not use space {name[:MAX_NAME_CHARS]!r}; ask for a token that may"
        return Rejected.because(ErrorCode.FORBIDDEN, message)
    space = relay.spaces.get(name)
    if space is None:
        known = filter(principal.may_use, relay.spaces)
        return no_such_space(name[:MAX_NAME_CHARS], operator=principal.role == "operator", known=known)
    return space


def find_request(relay: Relay, principal: Principal, request_id: str) -> Request | Rejected:
    """Return the request with this id, if the principal owns it; operators may see all requests.

    A request of another principal gets the same refusal as one that does not exist.
    """
    request = relay.requests.get(request_id)
    if request is not None and _may_see(principal, request):
        return request
    message = f"request {request_id} is unknown: it was never accepted, belongs to another principal, or ended long ago"
    return Rejected.because(ErrorCode.REQUEST_NOT_FOUND, message, request_id=request_id)


def find_requests(relay: Relay, principal: Principal, find: Find) -> list[Request]:
    """Return the requests that `find` asks for and the principal may see, the latest first, beyond its limit, too."""
    found = [
        request
        for request_id, request in relay.requests.items()
        if request_id.startswith(find.prefix)
        and _may_see(principal, request)
        and (not find.spaces or request.entry.space in find.spaces)
        and (not find.states or request.entry.state in find.states)
        and (not find.principals or request.principal in find.principals)
    ]
    found.reverse()  # of the same moment, the one that came later
    return sorted(found, key=lambda request: request.created_at, reverse=True)


def _may_see(principal: Principal, request: Request) -> bool:
    is_own = request.principal == principal.name and principal.may_use(request.entry.space)
    return is_own or principal.role == "operator"
