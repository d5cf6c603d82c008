"""Logs users in by name and password, by the cookie of a session or the header of a trusted proxy; manages them."""

import re
import time
from collections.abc import Callable, Iterable

import attrs
import structlog
import trio

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import Rejected
from protocol.wire.validators import Value
from relayd.auth.login_throttle import TOO_MANY_LOGINS, LoginThrottle
from relayd.auth.origins import may_come_from
from relayd.auth.passwords import PasswordThreads, TooManyLogins
from relayd.auth.tokens import PRINCIPAL_PATTERN, SESSION_ID, Principal, TokenRegistry, parse_expires
from relayd.auth.users import (
    NewSession,
    UserRegistry,
    check_name,
    check_password,
    check_role,
    no_such_user,
    principal_of,
)
from relayd.config.schema import Users as UserSettings
from relayd.core.relay import Relay
from relayd.net.proxies import is_trusted
from relayd.store.base import StoreError
from relayd.store.records import Loaded, UserRecord

log = structlog.get_logger("relayd.users")

#: The cookie of a session. Browsers take one that is named `__Host-…` from nobody but this host over TLS.
COOKIE, SECURE_COOKIE = "relayd", "__Host-relayd"
_SESSION = re.compile(r"(?:^|;)[ \t]*(__Host-relayd|relayd)=(rly_s_[A-Za-z0-9_-]{43})[ \t]*(?=;|$)")
#: How often sessions with open connections are noted as used, and expired ones dropped.
ROUND_S = 30.0
BUSY_RETRY_S = 2.0
OFF = "this relay has no users ([users] enabled in relayd.toml); log in with a token"
WRONG = "the name or the password is wrong; an operator can set a new password with `relayd user passwd NAME`"
ELSEWHERE = (
    "this request comes from another site: the login of a page counts only for requests of the relay's own page; "
    "programs send a token (Authorization: Bearer TOKEN)"
)
NO_INVITE = "this invitation is unknown, has been used or has expired; ask for a new one"
Answer = dict[str, Value] | Rejected


@attrs.frozen
class Visit:
    """The head of a request, as far as it may log a user in.

    Args:
        get: returns a header, "" if there is none; several of one name are joined.
        source: the other end of the connection.
        secure: whether it came over TLS.
        reads: whether it is a GET or HEAD, and no WebSocket.
    """

    get: Callable[[str], str]
    source: str
    secure: bool
    reads: bool = False

    def comes_from_own_page(self, *, secure: bool) -> bool:
        """Whether a page of the relay itself sent it; of what only reads, whether no other page is known to have.

        A browser says where a request comes from in `Sec-Fetch-Site` or, over plain HTTP, only in `Origin`; no page can
        forge either.
        """
        site, origin = self.get("sec-fetch-site"), self.get("origin")
        if site not in ("", "same-origin", "none") or (secure and origin.startswith("http:")):
            return False
        if origin:
            return may_come_from(origin, self.get("host"), ())
        return self.reads or site == "same-origin"


@attrs.define(eq=False)
class Accounts:
    """The users of a relay, and what is known of failed logins.

    Args:
        relay: has the store, the settings and the connections.
        tokens: whose principals nobody may register as.
        failures: by address, of tokens and passwords together.
    """

    relay: Relay
    tokens: TokenRegistry
    failures: LoginThrottle
    users: UserRegistry = attrs.field(factory=UserRegistry)
    passwords: PasswordThreads = attrs.field(factory=PasswordThreads)
    #: Failed logins by name, from wherever: several addresses together guess no faster.
    _failures_of: LoginThrottle = attrs.field(factory=LoginThrottle)

    def restore(self, loaded: Loaded) -> None:
        """Take over what the store holds."""
        self.users.load(loaded.users, loaded.sessions, loaded.invites)

    @property
    def settings(self) -> UserSettings:
        """The current settings."""
        return self.relay.config.users

    def is_live(self, login_id: str) -> bool:
        """Whether a session or a user, by its id, may still be used."""
        return self.settings.enabled and self.users.is_live(login_id, time.time(), self.settings)

    def client_of(self, user_id: str) -> Principal | None:
        """The principal of a user, as a client; None if there is none."""
        return self.users.client_of(user_id) if self.settings.enabled else None

    async def serve(self) -> None:
        """Note which sessions are used by open connections, and drop those that have expired, until cancelled."""
        while True:
            await trio.sleep(ROUND_S)
            now, store = time.time(), self.relay.store
            changes = []
            for login_id in {connection.principal.token_id for connection in self.relay.connections.values()}:
                if login_id is not None and login_id.startswith(SESSION_ID):
                    changes += self.users.use(login_id, now)
            if changes := [*changes, *self.users.purge(now, self.settings)]:
                store.post(*changes)

    # -- who sends a request

    def is_secure(self, visit: Visit) -> bool:
        """Whether the browser speaks TLS: with the relay, or with a trusted proxy that says so."""
        trusted = is_trusted(visit.source, self.relay.config)
        return visit.secure or (trusted and visit.get("x-forwarded-proto").strip().lower() == "https")

    def session_text(self, visit: Visit) -> str:
        """What the cookie of a session holds; "" without one."""
        wanted = SECURE_COOKIE if self.is_secure(visit) else COOKIE
        return next((text for name, text in _SESSION.findall(visit.get("cookie")) if name == wanted), "")

    def visitor(self, visit: Visit) -> Principal | Rejected | None:
        """The user who sends a request, in the user's own role; or why it does not count; None without a login.

        A token that the request has goes before, so this must be asked for those that have none.
        """
        if not self.settings.enabled:
            return None
        header = self.settings.proxy_header
        user: Principal | Rejected | None = None
        if header and is_trusted(visit.source, self.relay.config) and (name := visit.get(header.lower()).strip()):
            user = self._proxied(name)
        elif text := self.session_text(visit):
            user = self._of_session(text)
        if isinstance(user, Principal) and not visit.comes_from_own_page(secure=self.is_secure(visit)):
            return Rejected.because(ErrorCode.FORBIDDEN, ELSEWHERE)
        return user

    def _of_session(self, text: str) -> Principal | None:
        now = time.time()
        found = self.users.session(text, now, self.settings)
        if found is None:
            return None
        session, user = found
        if changes := self.users.use(session.session_id, now):
            self.relay.store.post(*changes)
        ends_at = session.created_at + self.settings.session_max_s
        return principal_of(user, session.session_id, role=user.role, expires_at=ends_at)

    def _proxied(self, name: str) -> Principal | Rejected:
        user = self.users.find(name)
        if user is None:
            try:
                check_name(name)
                if self.tokens.knows(name):  # whoever chose this name at the proxy would have its requests
                    raise ValueError(
                        f"{name!r} is a token or a local login; `relayd user add {name}` lets the user be both"
                    )
                user = (added := self.users.add(name, "client", "", time.time(), is_new=True)).record
            except ValueError as fault:
                why = f"user {name[:64]!r} was removed" if self.users.was_removed(name) else str(fault)
                return Rejected.because(ErrorCode.FORBIDDEN, f"the proxy's login is not taken: {why}")
            self.relay.store.post(added)
        return principal_of(user, user.user_id, role=user.role)

    # -- logging in

    async def log_in(self, name: str, password: str, address: str) -> NewSession | Rejected:
        """Open a session, with a new id.

        An unknown name takes as long as a wrong password. A login counts as failed until it is known to be right, so
        that many at once are no more guesses.
        """
        if refusal := self._count(address, name):
            return refusal
        user = self.users.find(name)
        try:
            matched = await self.passwords.matches(user.password if user is not None else "", password)
        except TooManyLogins:
            self._take_back(address, name)
            return _busy()
        if not matched or user is None or not self._is_current(user):
            log.warning("login refused", peer=address, role="user", code=ErrorCode.UNAUTHENTICATED)
            return Rejected.because(ErrorCode.UNAUTHENTICATED, WRONG)
        self._take_back(address, name)
        return await self._open(user)

    async def register(self, name: str, password: str, code: str, address: str) -> NewSession | Rejected:
        """Make a user of whoever has an invitation, and open a session."""
        if self.settings.registration == "off":
            message = "nobody can register here; ask an operator for a user (`relayd user add NAME`)"
            return Rejected.because(ErrorCode.FORBIDDEN, message)
        if refusal := self._count(address):
            return refusal
        if self.users.find_invite(code, time.time()) is None:
            return Rejected.because(ErrorCode.FORBIDDEN, NO_INVITE)
        self._take_back(address)
        try:
            check_name(name)
            if self.users.find(name) is not None or self.users.was_removed(name) or self.tokens.knows(name):
                raise ValueError(f"the name {name!r} is taken; choose another one")
            check_password(password, name, self.settings)
            hashed = await self.passwords.hash(password)
            if (invite := self.users.find_invite(code, time.time())) is None:
                return Rejected.because(ErrorCode.FORBIDDEN, NO_INVITE)
            added = self.users.add(name, invite.role, hashed, time.time(), is_new=True)
        except ValueError as fault:
            return _invalid(str(fault))
        except TooManyLogins:
            return _busy()
        used = self.users.take_invite(invite.invite_id)
        assert used is not None  # it was found without a checkpoint in between
        try:
            await self.relay.store.commit(added, used)
        except StoreError as fault:
            self.users.forget(added.record)
            self.users.restore_invite(invite)
            return Rejected.because(fault.code, str(fault))
        log.info("user registered", user=name, peer=address, role=invite.role)
        return await self._open(added.record)

    async def change_password(self, name: str, old: str, new: str, address: str) -> NewSession | Rejected:
        """Change the password of a user who knows it; ends all sessions of the user, and opens a new one."""
        user = self.users.find(name)
        if user is None or not user.password:
            return _invalid("this user has no password here; change it where you log in")
        try:
            check_password(new, user.name, self.settings)
        except ValueError as fault:
            return _invalid(str(fault))
        if refusal := self._count(address, name):
            return refusal
        try:
            matched = await self.passwords.matches(user.password, old)
            hashed = await self.passwords.hash(new) if matched else ""
        except TooManyLogins:
            self._take_back(address, name)
            return _busy()
        if not hashed or not self._is_current(user):
            return Rejected.because(ErrorCode.UNAUTHENTICATED, "the present password is wrong; nothing was changed")
        self._take_back(address, name)
        changed = await self._change(user, "its user has changed the password", password=hashed)
        return await self._open(changed) if isinstance(changed, UserRecord) else changed

    async def end_session(self, text: str) -> Rejected | None:
        """Log out, by what the cookie holds; without effect where it is no session."""
        found = self.users.session(text, time.time(), self.settings)
        if found is None:
            return None
        ended = found[0].session_id
        self._disconnect({ended}, "its user has logged out")
        try:
            await self.relay.store.commit(*self.users.end_sessions({ended}))
        except StoreError as fault:
            return Rejected.because(fault.code, f"{fault}; the logout holds until the relay is started again")
        return None

    async def _open(self, user: UserRecord) -> NewSession | Rejected:
        new, changes, ended = self.users.open_session(user, time.time())
        self._disconnect(ended, "its user has logged in too often elsewhere")
        try:
            await self.relay.store.commit(*changes)
        except StoreError as fault:
            self.users.end_sessions({new.record.session_id})
            return Rejected.because(fault.code, str(fault))
        return new

    def _count(self, address: str, name: str = "") -> Rejected | None:
        """Count a failed login, until `_take_back`; returns the refusal if there are too many."""
        now = trio.current_time()
        wait_s = self.failures.add(address, now)
        if wait_s is None and PRINCIPAL_PATTERN.fullmatch(name):
            wait_s = self._failures_of.add(name.lower(), now)
        if wait_s is None:
            return None
        return Rejected.because(ErrorCode.RATE_LIMITED, TOO_MANY_LOGINS, retry_after_s=wait_s)

    def _take_back(self, address: str, name: str = "") -> None:
        self.failures.take_back(address)
        self._failures_of.take_back(name.lower())

    def _is_current(self, user: UserRecord) -> bool:
        """Whether a user is still there with the same password, after it was checked."""
        now = self.users.find(user.name)
        return now is not None and (now.user_id, now.password) == (user.user_id, user.password)

    # -- for operators

    async def create_user(self, name: str, role: str, password: str) -> Answer:
        """Add a user; without a password, one who logs in at a proxy."""
        try:
            check_name(name)
            check_role(role)
            if password:
                check_password(password, name, self.settings)
            hashed = await self.passwords.hash(password) if password else ""
            added = self.users.add(name, role, hashed, time.time())
        except ValueError as fault:
            return _invalid(str(fault))
        except TooManyLogins:
            return _busy()
        try:
            await self.relay.store.commit(added)
        except StoreError:
            self.users.forget(added.record)
            raise
        return {"id": added.record.user_id}

    async def set_password(self, name: str, password: str) -> Answer:
        """Set the password of a user, and end its sessions."""
        if (user := self.users.find(name)) is None:
            return _unknown(name)
        try:
            check_password(password, user.name, self.settings)
            hashed = await self.passwords.hash(password)
        except ValueError as fault:
            return _invalid(str(fault))
        except TooManyLogins:
            return _busy()
        if not self._is_current(user):
            return _invalid(f"user {name!r} was changed at the same time; look, and try again")
        changed = await self._change(user, "an operator has set its password", password=hashed)
        return changed if isinstance(changed, Rejected) else {}

    async def set_role(self, name: str, role: str) -> Answer:
        """Set the role of a user, and end its sessions."""
        if (user := self.users.find(name)) is None:
            return _unknown(name)
        try:
            check_role(role)
        except ValueError as fault:
            return _invalid(str(fault))
        changed = await self._change(user, "an operator has changed its role", role=role)
        return changed if isinstance(changed, Rejected) else {}

    async def remove(self, which: str) -> Answer:
        """Remove a user by its name and end its sessions, or take back an invitation by its id."""
        if (taken := self.users.take_invite(which)) is not None:
            await self.relay.store.commit(taken)
            return {}
        if (user := self.users.find(which)) is None:
            return _unknown(which)
        changed = await self._change(user, "an operator has removed its user", password="", removed_at=time.time())
        return changed if isinstance(changed, Rejected) else {}

    async def invite(self, role: str, expires: str | None) -> Answer:
        """Make an invitation; `code` is shown once."""
        now = time.time()
        try:
            new, change = self.users.invite(role, now, parse_expires(expires, now) if expires is not None else None)
        except ValueError as fault:
            return _invalid(str(fault))
        try:
            await self.relay.store.commit(change)
        except StoreError:
            self.users.take_invite(new.record.invite_id)
            raise
        return {"code": new.text, "id": new.record.invite_id}

    async def _change(self, user: UserRecord, reason: str, **fields: Value) -> UserRecord | Rejected:
        """Change a user, and end its sessions; it holds at once, and where it cannot be stored, until a restart."""
        changed = self.users.change(user, **fields)
        sessions = self.users.sessions_of(user.user_id)
        self._disconnect({*sessions, user.user_id}, reason)
        try:
            await self.relay.store.commit(changed, *self.users.end_sessions(sessions))
        except StoreError as fault:
            return Rejected.because(fault.code, f"{fault}; the change holds until the relay is started again")
        return changed.record

    def _disconnect(self, login_ids: Iterable[str], reason: str) -> None:
        ended = set(login_ids)
        for connection in list(self.relay.connections.values()):
            if connection.principal.token_id in ended:
                connection.disconnect(reason)


def as_role(user: Principal, role: str, *, readonly: bool = False) -> Principal | Rejected:
    """The principal of a user in the role that a connection asks for: an operator's may also be that of a client."""
    if role not in (user.role, "client"):
        message = f"user {user.name!r} is a {user.role} and cannot log in as '{role}'"
        if role == "operator":
            message += f"; an operator can change that with `relayd user role {user.name} operator`"
        return Rejected.because(ErrorCode.FORBIDDEN, message)
    return attrs.evolve(user, role=role, readonly=readonly)


def _invalid(message: str) -> Rejected:
    return Rejected.because(ErrorCode.INVALID_PARAMS, message)


def _unknown(name: str) -> Rejected:
    return _invalid(no_such_user(name))


def _busy() -> Rejected:
    message = "too many logins at this moment; try again in a few seconds"
    return Rejected.because(ErrorCode.RATE_LIMITED, message, retry_after_s=BUSY_RETRY_S)
