"""Users, who log in with a name and a password or at a proxy; their sessions in browsers; and invitations.

The cookie of a session and the code of an invitation have 256 random bits, and only their SHA-256 is stored, as of a
token. Pure: callers pass in the time and the hash of a password, and store the changes returned.
"""

import secrets
from collections import defaultdict
from collections.abc import Iterable, Iterator

import attrs

from protocol.wire.validators import Value
from relayd.auth.tokens import (
    ID_PREFIXES,
    INVITE_ID,
    PRINCIPAL_PATTERN,
    SESSION_ID,
    TOKEN_BYTES,
    USER_ID,
    Principal,
    hash_token,
    iso_time,
)
from relayd.config.schema import Users as UserSettings
from relayd.store.records import (
    USER_ROLES,
    Change,
    DeleteInvite,
    DeleteSession,
    InviteRecord,
    PutInvite,
    PutSession,
    PutUser,
    SessionRecord,
    UserRecord,
)

SESSION_PREFIX, INVITE_PREFIX = "rly_s_", "rly_i_"
#: Sessions of one user; the one that was used longest ago makes room for the next.
MAX_SESSIONS = 20
#: Open invitations; users; each a bound on memory and on what a listing sends.
MAX_INVITES, MAX_USERS = 1_000, 10_000
#: The use of a session is stored after this time, or a write of the disk would follow each request.
USE_STORED_S = 300.0
#: How long an invitation is good if its maker does not say: a week.
INVITE_S = 7 * 86_400.0
#: A longer password costs time to hash and no guesser more.
MAX_PASSWORD_CHARS = 256
Row = dict[str, Value]


@attrs.frozen
class NewSession:
    """A new session. `text` is what the cookie holds: not stored."""

    record: SessionRecord
    user: UserRecord
    text: str = attrs.field(repr=False)


@attrs.frozen
class NewInvite:
    """A new invitation. `text` is its code: shown once and not stored."""

    record: InviteRecord
    text: str = attrs.field(repr=False)


def check_name(name: str) -> None:
    """Check the name of a new user.

    Raises:
        ValueError: says what a name must be like.
    """
    if not PRINCIPAL_PATTERN.fullmatch(name) or name.startswith(ID_PREFIXES):
        raise ValueError(
            f"{name[:64]!r} is not a valid name: start with a letter or digit, then letters, digits and . _ @ -, "
            f"64 at most, and not starting with {', '.join(ID_PREFIXES)}"
        )


def check_password(password: str, name: str, settings: UserSettings) -> None:
    """Check a new password: long enough, and not the name.

    Raises:
        ValueError: says what a password must be like.
    """
    if len(password) < settings.min_password_chars:
        raise ValueError(f"a password must have at least {settings.min_password_chars} characters; choose a longer one")
    if len(password) > MAX_PASSWORD_CHARS:
        raise ValueError(f"a password may have at most {MAX_PASSWORD_CHARS} characters; choose a shorter one")
    if name.lower() == password.lower():
        raise ValueError("a password must not be the name; choose another one")


def check_role(role: object) -> None:
    """Check the role of a user.

    Raises:
        ValueError: says what there is.
    """
    if role not in USER_ROLES:
        raise ValueError(f"role must be one of {', '.join(USER_ROLES)}, not {role!r}")


def no_such_user(name: str) -> str:
    """Say that there is no such user, and where those are that there are."""
    return f"no user is named {name[:64]!r}; `relayd user list` shows those there are"


class UserRegistry:
    """The users of the store, their sessions and the open invitations, in memory for logins.

    Methods change only the memory; the caller commits the changes they return.
    """

    def __init__(self) -> None:
        #: Name in lower case -> user, the removed ones included: nobody registers under a name that somebody had.
        self._by_name: dict[str, UserRecord] = {}
        self._by_id: dict[str, UserRecord] = {}
        self._sessions: dict[str, SessionRecord] = {}
        self._session_by_sha256: dict[bytes, SessionRecord] = {}
        self._sessions_of: defaultdict[str, set[str]] = defaultdict(set)
        self._invites: dict[str, InviteRecord] = {}
        #: When each session was last used, where that is not stored yet.
        self._used_at: dict[str, float] = {}

    def load(
        self, users: Iterable[UserRecord], sessions: Iterable[SessionRecord], invites: Iterable[InviteRecord]
    ) -> None:
        """Take over what the store holds; sessions of users who are not there are left out."""
        for user in users:
            self._put(user)
        for session in sessions:
            if (owner := self._by_id.get(session.user_id)) is not None and owner.removed_at is None:
                self._put_session(session)
        self._invites |= {invite.invite_id: invite for invite in invites}

    def _put(self, user: UserRecord) -> UserRecord:
        before = self._by_name.get(user.name.lower())
        if before is not None:
            del self._by_id[before.user_id]
        self._by_name[user.name.lower()] = self._by_id[user.user_id] = user
        return user

    def _put_session(self, session: SessionRecord) -> None:
        self._sessions[session.session_id] = self._session_by_sha256[session.sha256] = session
        self._sessions_of[session.user_id].add(session.session_id)

    # -- users

    def find(self, name: str) -> UserRecord | None:
        """The user with this name, in whatever case; None if there is none, or it was removed."""
        user = self._by_name.get(name.lower())
        return user if user is not None and user.removed_at is None else None

    def was_removed(self, name: str) -> bool:
        """Whether there was a user with this name, who was removed."""
        user = self._by_name.get(name.lower())
        return user is not None and user.removed_at is not None

    def users(self) -> Iterator[UserRecord]:
        """All users, without those that were removed."""
        return (user for user in self._by_id.values() if user.removed_at is None)

    def is_live(self, login_id: str, now: float, settings: UserSettings) -> bool:
        """Whether a session, by its id, may be used at `now`, or a user by theirs exists."""
        if login_id.startswith(USER_ID):
            user = self._by_id.get(login_id)
            return user is not None and user.removed_at is None
        session = self._sessions.get(login_id)
        return session is not None and self._is_open(session, now, settings)

    def client_of(self, user_id: str) -> Principal | None:
        """The principal of a user, as a client; None if there is none."""
        user = self._by_id.get(user_id)
        return principal_of(user, user_id) if user is not None and user.removed_at is None else None

    def add(self, name: str, role: str, password: str, now: float, *, is_new: bool = False) -> PutUser:
        """Add a user.

        Args:
            name: as checked by `check_name`.
            role: `client` or `operator`.
            password: its hash; "" for a user who logs in at a proxy alone.
            now: Unix seconds.
            is_new: whether nobody may have had this name before.

        Raises:
            ValueError: the name is taken, or there are too many users.
        """
        if self.find(name) is not None or (is_new and self.was_removed(name)):
            raise ValueError(f"the name {name!r} is taken; choose another one")
        if len(self._by_id) >= MAX_USERS:
            raise ValueError(f"there are {MAX_USERS} users already; no more can be added")
        user_id = USER_ID + secrets.token_hex(8)
        return PutUser(self._put(UserRecord(user_id=user_id, name=name, role=role, password=password, created_at=now)))

    def change(self, user: UserRecord, **fields: Value) -> PutUser:
        """Change some fields of a user."""
        return PutUser(self._put(attrs.evolve(self._by_id[user.user_id], **fields)))

    def forget(self, user: UserRecord) -> None:
        """Undo `add`."""
        del self._by_name[user.name.lower()], self._by_id[user.user_id]

    # -- sessions

    def open_session(self, user: UserRecord, now: float) -> tuple[NewSession, list[Change], set[str]]:
        """Open a session of a user; returns it, what to commit, and the ids of sessions that had to make room."""
        text = SESSION_PREFIX + secrets.token_urlsafe(TOKEN_BYTES)
        session = SessionRecord(
            session_id=SESSION_ID + secrets.token_hex(8),
            user_id=user.user_id,
            sha256=hash_token(text),
            created_at=now,
            used_at=now,
        )
        old = sorted((self._sessions[each] for each in self._sessions_of[user.user_id]), key=self._last_use)
        ended = {each.session_id for each in old[: max(0, len(old) - MAX_SESSIONS + 1)]}
        self._put_session(session)
        user = self._put(attrs.evolve(self._by_id[user.user_id], seen_at=now))
        changes = [PutUser(user), PutSession(session), *self.end_sessions(ended)]
        return NewSession(session, user, text), changes, ended

    def session(self, text: str, now: float, settings: UserSettings) -> tuple[SessionRecord, UserRecord] | None:
        """The session whose cookie holds `text`, and its user; None if there is none, or it has ended."""
        session = self._session_by_sha256.get(hash_token(text))
        if session is None or not self._is_open(session, now, settings):
            return None
        return session, self._by_id[session.user_id]

    def owner_of(self, text: str) -> str | None:
        """The name of the user of a session; None for any other text. Cheaper than `session`."""
        session = self._session_by_sha256.get(hash_token(text))
        return self._by_id[session.user_id].name if session is not None else None

    def use(self, session_id: str, now: float) -> list[Change]:
        """Note that a session is being used; returns what to post, mostly nothing."""
        session = self._sessions.get(session_id)
        if session is None:
            return []
        self._used_at[session_id] = now
        if now - session.used_at < USE_STORED_S:
            return []
        used = attrs.evolve(session, used_at=now)
        self._put_session(used)
        user = self._put(attrs.evolve(self._by_id[session.user_id], seen_at=now))
        return [PutSession(used), PutUser(user)]

    def _last_use(self, session: SessionRecord) -> float:
        return self._used_at.get(session.session_id, session.used_at)

    def _is_open(self, session: SessionRecord, now: float, settings: UserSettings) -> bool:
        idle_s = now - self._last_use(session)
        return idle_s < settings.session_idle_s and now < session.created_at + settings.session_max_s

    def sessions_of(self, user_id: str) -> set[str]:
        """The ids of a user's sessions."""
        return set(self._sessions_of[user_id])

    def end_sessions(self, session_ids: Iterable[str]) -> list[Change]:
        """End sessions; returns what to commit."""
        ended: list[Change] = []
        for session_id in session_ids:
            if (session := self._sessions.pop(session_id, None)) is not None:
                del self._session_by_sha256[session.sha256]
                self._sessions_of[session.user_id].discard(session_id)
                self._used_at.pop(session_id, None)
                ended.append(DeleteSession(session_id))
        return ended

    def purge(self, now: float, settings: UserSettings) -> list[Change]:
        """Drop the sessions and invitations that have expired; returns what to post."""
        sessions = [each.session_id for each in self._sessions.values() if not self._is_open(each, now, settings)]
        invites = [each.invite_id for each in self._invites.values() if each.expires_at <= now]
        for invite_id in invites:
            del self._invites[invite_id]
        return [*self.end_sessions(sessions), *map(DeleteInvite, invites)]

    # -- invitations

    def invite(self, role: str, now: float, expires_at: float | None = None) -> tuple[NewInvite, PutInvite]:
        """Make an invitation, for one user.

        Raises:
            ValueError: the role does not exist, or there are too many invitations.
        """
        check_role(role)
        if len(self._invites) >= MAX_INVITES:
            raise ValueError(f"there are {MAX_INVITES} open invitations; remove some with `relayd user remove ID`")
        text = INVITE_PREFIX + secrets.token_urlsafe(TOKEN_BYTES)
        record = InviteRecord(
            invite_id=INVITE_ID + secrets.token_hex(4),
            sha256=hash_token(text),
            role=role,
            created_at=now,
            expires_at=expires_at if expires_at is not None else now + INVITE_S,
        )
        self._invites[record.invite_id] = record
        return NewInvite(record, text), PutInvite(record)

    def find_invite(self, text: str, now: float) -> InviteRecord | None:
        """The open invitation with this code."""
        sha256 = hash_token(text)
        return next((each for each in self._invites.values() if each.sha256 == sha256 and now < each.expires_at), None)

    def restore_invite(self, invite: InviteRecord) -> None:
        """Undo `take_invite`."""
        self._invites[invite.invite_id] = invite

    def take_invite(self, invite_id: str) -> DeleteInvite | None:
        """Use an invitation up, or take it back; None if there is none of this id."""
        return DeleteInvite(invite_id) if self._invites.pop(invite_id, None) is not None else None

    # -- listing

    def rows(self, now: float) -> list[Row]:
        """Return the users by name, and behind them the open invitations."""
        users = [
            {
                "id": user.user_id,
                "name": user.name,
                "role": user.role,
                "state": "active" if user.password else "proxy",
                "created": iso_time(user.created_at),
                "seen": None if user.seen_at is None else iso_time(user.seen_at),
                "sessions": len(self._sessions_of[user.user_id]),
                "expires": None,
            }
            for user in sorted(self.users(), key=lambda user: user.name.lower())
        ]
        invited = [
            {
                "id": invite.invite_id,
                "name": "",
                "role": invite.role,
                "state": "invited",
                "created": iso_time(invite.created_at),
                "seen": None,
                "sessions": 0,
                "expires": iso_time(invite.expires_at),
            }
            for invite in self._invites.values()
            if now < invite.expires_at
        ]
        return [*users, *invited]


def principal_of(
    user: UserRecord, login_id: str, *, role: str = "client", expires_at: float | None = None
) -> Principal:
    """The principal of a user, by the id of the session or of the user: its login ends when that ends."""
    return Principal(name=user.name, role=role, token_id=login_id, user_id=user.user_id, expires_at=expires_at)
