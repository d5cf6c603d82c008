"""The routes of the page's users: log in, register, change the password, log out. Programs use tokens instead."""

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import Rejected
from protocol.wire.validators import kind_of
from relayd.auth.tokens import Principal, iso_time
from relayd.auth.users import NewSession
from relayd.core.accounts import COOKIE, ELSEWHERE, OFF, SECURE_COOKIE, Accounts
from relayd.http.authentication import address_of, visit_of
from relayd.http.body_parser import read_all
from relayd.http.context import context_of
from relayd.http.errors import HttpError
from relayd.http.openai.json_body import invalid, read_fields

#: A name, two passwords and an invitation, with room to spare.
MAX_BODY_BYTES = 8 * 1024
PATH = "/v1/session"


def routes() -> list[BaseRoute]:
    """Return the routes."""
    return [
        Route(PATH, Session),
        Route(f"{PATH}/password", password, methods=["PUT"]),
        Route("/v1/register", register, methods=["POST"]),
    ]


class Session(HTTPEndpoint):
    """The login of a page."""

    async def get(self, http: Request) -> Response:
        """Say whether there are users here, and who is logged in; needs no login."""
        accounts = context_of(http).accounts
        user, settings = accounts.visitor(visit_of(http)), accounts.settings
        name, role = (user.name, user.role) if isinstance(user, Principal) else (None, None)
        return JSONResponse(
            {
                "users": settings.enabled,
                "registration": settings.registration if settings.enabled else "off",
                "min_password_chars": settings.min_password_chars,
                "name": name,
                "role": role,
                # One who logs in at the proxy has no password here, and cannot log out here.
                "proxied": isinstance(user, Principal) and user.token_id == user.user_id,
            }
        )

    async def post(self, http: Request) -> Response:
        """Log in with a name and a password."""
        accounts = _accounts(http)
        name, secret = await _texts(http, "name", "password")
        return await _answer(http, lambda: accounts.log_in(name, secret, address_of(http)))

    async def delete(self, http: Request) -> Response:
        """Log out."""
        accounts = _accounts(http)
        visit = visit_of(http)
        if (refusal := await accounts.end_session(accounts.session_text(visit))) is not None:
            raise HttpError.of(refusal)
        return Response(status_code=204, headers={"set-cookie": _cookie("", 0, secure=accounts.is_secure(visit))})


async def password(http: Request) -> Response:
    """Change the password of whoever is logged in; all other sessions of the user end."""
    accounts = _accounts(http)
    user = accounts.visitor(visit_of(http))
    if not isinstance(user, Principal):
        raise HttpError(ErrorCode.UNAUTHENTICATED, "nobody is logged in here; log in first (POST /v1/session)")
    old, new = await _texts(http, "password", "new_password")
    return await _answer(http, lambda: accounts.change_password(user.name, old, new, address_of(http)))


async def register(http: Request) -> Response:
    """Register with an invitation, and log in."""
    accounts = _accounts(http)
    name, secret, invite = await _texts(http, "name", "password", "invite")
    return await _answer(http, lambda: accounts.register(name, secret, invite, address_of(http)), status=201)


def _accounts(http: Request) -> Accounts:
    """The users, for a request of the relay's own page.

    Raises:
        HttpError: there are none, or the request comes from elsewhere: a page of another site could log its visitors in
            as somebody else.
    """
    accounts = context_of(http).accounts
    if not accounts.settings.enabled:
        raise HttpError("not_found", OFF, status=404)
    visit = visit_of(http)
    if not visit.comes_from_own_page(secure=accounts.is_secure(visit)):
        raise HttpError(ErrorCode.FORBIDDEN, ELSEWHERE)
    return accounts


async def _texts(http: Request, *names: str) -> list[str]:
    """Read fields of the body, all of which must be there."""
    fields: dict[str, Any] = read_fields(await read_all(http, MAX_BODY_BYTES))
    if faults := {name: "is required" for name in names if name not in fields}:
        raise invalid(faults)
    if wrong := {name: each for name in names if not isinstance(each := fields[name], str)}:
        raise invalid({name: f"must be a string, not {kind_of(each)}" for name, each in wrong.items()})
    return [fields[name] for name in names]


async def _answer(
    http: Request, log_in: Callable[[], Awaitable[NewSession | Rejected]], *, status: int = 200
) -> Response:
    """Log in, and give the browser the new session; the one that it had ends, as nobody else may know its id."""
    accounts, visit = context_of(http).accounts, visit_of(http)
    before = accounts.session_text(visit)
    new = await log_in()
    if isinstance(new, Rejected):
        raise HttpError.of(new)
    await accounts.end_session(before)
    lasts_s = accounts.settings.session_max_s
    content = {
        "name": new.user.name,
        "role": new.user.role,
        "expires_at": iso_time(new.record.created_at + lasts_s),
    }
    cookie = _cookie(new.text, int(lasts_s), secure=accounts.is_secure(visit))
    return JSONResponse(content, status, headers={"set-cookie": cookie})


def _cookie(text: str, lasts_s: int, *, secure: bool) -> str:
    name, end = (SECURE_COOKIE, "; Secure") if secure else (COOKIE, "")
    return f"{name}={text}; Path=/; Max-Age={lasts_s}; HttpOnly; SameSite=Strict{end}"
