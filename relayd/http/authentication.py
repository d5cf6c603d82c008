"""Authenticates HTTP requests and WebSockets: by bearer token, or by the credentials of a peer on the unix socket."""

import time

import structlog
import trio
from starlette.requests import HTTPConnection, Request

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import PROTOCOL_VERSION, Hello, Rejected
from relayd.auth import login_throttle
from relayd.auth.tokens import Principal, reject_readonly
from relayd.core.accounts import Visit, as_role
from relayd.core.principals import RETRY_S, too_fast
from relayd.http.context import Exchange, HttpContext, context_of, exchange_of
from relayd.http.errors import HttpError
from relayd.net.proxies import client_of
from relayd.requests.request import Request as RelayRequest

log = structlog.get_logger("relayd.http")

#: As in the wire protocol's `hello`.
MAX_TOKEN_CHARS = 256
#: Query parameters that other services accept tokens in; refused, because URLs end up in logs and histories.
SECRET_NAMES = frozenset({"token", "access_token", "api_key", "apikey", "key", "authorization"})


#: Methods that change nothing, which are all that a read-only login may use. A WebSocket begins with one of them.
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
#: Query parameter of a signed link to one result.
LINK = "link"
_NEW_LINK = "ask whoever gave it to you for a new one (GET /v1/requests/ID/link)"


def principal_of(request: HTTPConnection, role: str = "client") -> Principal:
    """Authenticate the sender of `request`.

    Args:
        request: the HTTP request, or the WebSocket.
        role: the role to log in as; operator tokens may also log in as `client`.

    Raises:
        HttpError: the login is refused: 401, 403, or 429 after too many failures or with too many connections; or it is
            read-only, and the method changes something.
    """
    exchange = exchange_of(request)
    if exchange.principal is not None:
        return exchange.principal
    if SECRET_NAMES & {name.lower() for name in request.query_params}:
        message = "put the token into the Authorization header (Bearer TOKEN): URLs end up in logs and histories"
        raise HttpError(ErrorCode.UNAUTHENTICATED, message)
    token = _token(request)
    user = context_of(request).accounts.visitor(visit_of(request)) if token is None and not exchange.local else None
    if user is None:
        return principal_by_token(request, token, role)
    principal = as_role(user, role) if isinstance(user, Principal) else user
    if isinstance(principal, Rejected):
        raise HttpError.of(principal)
    _admit(context_of(request), exchange, principal)
    _check_method(request, principal)
    return principal


def visit_of(request: HTTPConnection) -> Visit:
    """What may log in a user of the page: the head of a request."""
    exchange = exchange_of(request)
    return Visit(
        lambda name: ", ".join(request.headers.getlist(name)),
        exchange.slot.source,
        exchange.secure,
        reads=request.scope["type"] == "http" and request.scope["method"] in ("GET", "HEAD"),
    )


def principal_by_token(request: HTTPConnection, token: str | None, role: str = "client") -> Principal:
    """Authenticate the sender of `request` by a token, wherever it came in; None for one that sent none.

    Raises:
        HttpError: as for `principal_of`.
    """
    context, exchange = context_of(request), exchange_of(request)
    principal = _log_in(context, exchange, token, role)
    if isinstance(principal, Rejected):
        raise _refuse(context, request, token, role, principal)
    _admit(context, exchange, principal)
    _check_method(request, principal)
    return principal


def _check_method(request: HTTPConnection, principal: Principal) -> None:
    if principal.readonly and request.scope.get("method", "GET") not in SAFE_METHODS:
        raise HttpError.of(reject_readonly())


def principal_by_link(request: Request, request_id: str) -> Principal:
    """Authenticate the sender of `request` by its signed link to one result, or as `principal_of` if it has none.

    Raises:
        HttpError: the link is for something else, has expired or was damaged, or its token was revoked; or as for
            `principal_of`.
    """
    context, exchange = context_of(request), exchange_of(request)
    if LINK not in request.query_params:
        return principal_of(request)
    now = time.time()
    linked = context.relay.requests.get(request_id)
    grant = context.links.read(result_name(linked), request.query_params[LINK]) if linked is not None else None
    if linked is None or grant is None:
        wait_s = context.failures.add(address_of(request), trio.current_time())
        if wait_s is not None:
            raise HttpError(ErrorCode.RATE_LIMITED, login_throttle.TOO_MANY_LOGINS, retry_after_s=wait_s)
        message = f"this link is not valid for this result, or the result is no longer kept; {_NEW_LINK}"
        raise HttpError(ErrorCode.UNAUTHENTICATED, message)
    if not now < grant.expires_at <= now + context.relay.config.http.link_s:
        raise HttpError(ErrorCode.UNAUTHENTICATED, f"this link has expired; {_NEW_LINK}")
    principal = context.tokens.client_of(grant.token_id, now) or context.accounts.client_of(grant.token_id)
    if not grant.token_id:  # made on the unix socket: whoever has the link has not come from there
        principal = Principal(name=linked.principal, role="client")
    if principal is None:
        raise HttpError(ErrorCode.UNAUTHENTICATED, f"the token that this link was made with has ended; {_NEW_LINK}")
    _admit(context, exchange, principal)
    return principal


def result_name(request: RelayRequest) -> str:
    """What a link is for: this request, and not a later one that was given the same id."""
    return f"{request.request_id}.{request.created_unix:.0f}"


def _admit(context: HttpContext, exchange: Exchange, principal: Principal) -> None:
    """Let an authenticated principal have its answer.

    Raises:
        HttpError: it has too many at once, or asks too fast.
    """
    if full := context.full_message(principal):
        raise HttpError(ErrorCode.RATE_LIMITED, full, retry_after_s=RETRY_S)
    if wait_s := context.relay.principals.request_wait_s(principal, context.relay.config.limits.principal):
        raise HttpError(ErrorCode.RATE_LIMITED, too_fast(principal.name), retry_after_s=wait_s)
    if not exchange.slot.log_in(principal.role):
        message = "the relay has all the connections it accepts; try again later"
        raise HttpError(ErrorCode.RATE_LIMITED, message, retry_after_s=RETRY_S)
    exchange.principal = principal


def _log_in(context: HttpContext, exchange: Exchange, token: str | None, role: str) -> Principal | Rejected:
    if token is not None and len(token) > MAX_TOKEN_CHARS:
        return Rejected.because(ErrorCode.UNAUTHENTICATED, "not a relay token: it is too long")
    hello = Hello(version=PROTOCOL_VERSION, role=role, token=token, agent="")
    return context.tokens.log_in(hello, exchange.slot.credentials, time.time())


def _token(request: HTTPConnection) -> str | None:
    """Return the bearer token; None without an `Authorization` header.

    Raises:
        HttpError: 401; the header has another scheme.
    """
    header = request.headers.get("authorization")
    if header is None:
        return None
    scheme, _, value = header.partition(" ")
    if scheme.lower() != "bearer" or not value.strip():
        raise HttpError(ErrorCode.UNAUTHENTICATED, "the relay accepts only `Authorization: Bearer TOKEN`")
    return value.strip()


def _refuse(
    context: HttpContext, request: HTTPConnection, token: str | None, role: str, refused: Rejected
) -> HttpError:
    if refused.code != ErrorCode.UNAUTHENTICATED or token is None:
        return HttpError.of(refused)
    wait_s = context.failures.add(address_of(request), trio.current_time())
    if wait_s is not None:
        return HttpError(ErrorCode.RATE_LIMITED, login_throttle.TOO_MANY_LOGINS, retry_after_s=wait_s)
    log.warning("login refused", peer=address_of(request), role=role, code=refused.code)
    return HttpError.of(refused)


def address_of(request: HTTPConnection) -> str:
    """Return the client's address without its port; behind a trusted proxy, the one reported by the proxy."""
    slot = exchange_of(request).slot
    client = None
    if slot.credentials is None:
        client = client_of(slot.peer, request.headers.getlist("x-forwarded-for"), context_of(request).relay.config)
    return client or login_throttle.address_of(slot.peer)
