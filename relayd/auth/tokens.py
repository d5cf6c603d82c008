"""Authenticates peers and holds their permissions: tokens, and the credentials of a peer on the unix socket.

A token is `rly_`, a letter for its role, and 256 random bits in base64url. Only its SHA-256 is stored: with that many
random bits, a slow hash would add no protection. Pure: callers pass in the time and store the changes returned.
"""

import datetime
import hashlib
import hmac
import os
import pwd
import re
import secrets
import socket
import struct
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Protocol

import attrs

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import ROLES, Hello, Rejected
from protocol.wire.validators import Value
from relayd.store.records import TokenLimits, TokenRecord

TOKEN_BYTES = 32
#: Live tokens that a principal may have per role: the old and the new one during rotation.
MAX_LIVE_TOKENS = 2
#: How long the record of a revoked or expired token is kept, so that a refused login can give the reason: 30 days.
KEEP_ENDED_S = 30 * 86_400.0
PRINCIPAL_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
#: A space name, with the wildcards of fnmatch.
SPACE_GLOB = re.compile(r"[A-Za-z0-9._*?\[\]!-]{1,128}")
TOKEN_ID_PREFIX = "tok_"
#: Patterns that match no space.
NO_SPACES = ("",)
#: Of the ids of tokens, users, sessions and invitations: no principal is named like one.
USER_ID, SESSION_ID, INVITE_ID = "usr_", "ses_", "inv_"
ID_PREFIXES = (TOKEN_ID_PREFIX, USER_ID, SESSION_ID, INVITE_ID)

_PREFIXES = {role: f"rly_{role[0]}_" for role in ROLES}
#: Role of a token -> roles it may log in as.
_LOGINS = {"client": {"client"}, "worker": {"worker"}, "operator": {"operator", "client"}}
_SPAN = re.compile(r"([1-9][0-9]{0,5})([smhdw])")
_SPAN_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 7 * 86_400}
#: 9999-12-31T23:59:59Z, the last second that datetime can represent.
_LAST_S = 253_402_300_799.0
#: struct ucred of Linux: pid, uid, gid (unix(7), SO_PEERCRED).
_UCRED = struct.Struct("3i")


@attrs.frozen
class PeerCredentials:
    """The credentials of a peer on the unix socket, from the kernel."""

    pid: int
    uid: int
    gid: int


class OpenSocket(Protocol):
    """A connected socket of the standard library or of Trio."""

    @property
    def family(self) -> int:
        """The address family."""

    def getsockopt(self, level: int, option: int, length: int, /) -> bytes:
        """See `socket.socket.getsockopt`."""


def peer_credentials(sock: OpenSocket) -> PeerCredentials | None:
    """Return the credentials of the peer of a unix socket; None for other sockets.

    They date from the moment of connecting: privileges that the process dropped later still count here.
    """
    if sock.family != socket.AF_UNIX:
        return None
    return PeerCredentials(*_UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


@attrs.frozen(kw_only=True)
class Principal:
    """The identity of a connection, and its role.

    Args:
        spaces: patterns of the spaces it may use; empty for all.
        token_id: id of its token; None for a `local` login, by the credentials of the unix socket.
        expires_at: when its token expires, in Unix seconds.
        user_id: id of its user; None for a token's, and for a `local` login. `token_id` is then that of its session.
    """

    name: str
    role: str
    spaces: tuple[str, ...] = ()
    token_id: str | None = None
    local: bool = False
    readonly: bool = False
    limits: TokenLimits = attrs.field(factory=TokenLimits)
    expires_at: float | None = None
    user_id: str | None = None

    @property
    def link_id(self) -> str:
        """With what the links to results end that it makes: its user, not the session, or its token; "" for neither."""
        return self.user_id or self.token_id or ""

    def may_use(self, space: str) -> bool:
        """Whether it may use `space`: one of its patterns matches, or it has none."""
        return not self.spaces or any(fnmatchcase(space, pattern) for pattern in self.spaces)


def reject_readonly(request_id: str | None = None) -> Rejected:
    """Return the refusal of what a read-only principal may not do."""
    message = "this login is read-only: connect without --readonly, with a token that was created without it"
    return Rejected.because(ErrorCode.FORBIDDEN, message, request_id=request_id)


@attrs.frozen
class NewToken:
    """A new token. `text` is the secret: it is shown once and not stored."""

    record: TokenRecord
    text: str = attrs.field(repr=False)


class TokenRegistry:
    """The tokens of the store, in memory for logins.

    Methods change only the memory; the caller commits the records they return.

    Args:
        records: as loaded from the store.
        local_uids: users that need no token on the unix socket; by default the daemon's user and root.
    """

    def __init__(self, records: Iterable[TokenRecord] = (), *, local_uids: Iterable[int] | None = None) -> None:
        self._by_id: dict[str, TokenRecord] = {}
        self._by_sha256: dict[bytes, TokenRecord] = {}
        #: Error code -> number of logins refused with it.
        self.refused: dict[str, int] = {}
        # Names are looked up here and not at login, because NSS may ask a slow server.
        self._local_names = {uid: _user_name(uid) for uid in (local_uids or (os.geteuid(), 0))}
        for record in records:
            self._add(record)

    def _add(self, record: TokenRecord) -> None:
        self._by_id[record.token_id] = record
        self._by_sha256[record.sha256] = record

    # -- logins -

    def log_in(self, hello: Hello, peer: PeerCredentials | None, now: float) -> Principal | Rejected:
        """Authenticate the sender of `hello`.

        Args:
            hello: its token takes precedence over `peer`.
            peer: credentials of the peer of a unix socket; None for TCP.
            now: Unix seconds.

        Returns:
            The principal, or a refusal that says what to do: `unauthenticated` for a token that is unknown, revoked
            or expired, `forbidden` for one of another role.
        """
        principal = self._log_in(hello, peer, now)
        if isinstance(principal, Rejected):
            self.refused[principal.code] = self.refused.get(principal.code, 0) + 1
        return principal

    def _log_in(self, hello: Hello, peer: PeerCredentials | None, now: float) -> Principal | Rejected:
        if not hello.token:  # an empty RELAY_TOKEN counts as none
            return self._log_in_local(hello, peer)
        sha256 = hash_token(hello.token)
        record = self._by_sha256.get(sha256)
        if record is None or not hmac.compare_digest(record.sha256, sha256):
            message = "the relay does not know this token; `relayd token list` shows the tokens it knows"
            if not hello.token.startswith(tuple(_PREFIXES.values())):
                message = "not a relay token: tokens start with rly_c_, rly_w_ or rly_o_"
            return Rejected.because(ErrorCode.UNAUTHENTICATED, message)
        if not record.live(now):
            what = "was revoked" if record.revoked_at is not None else f"expired at {iso_time(record.expires_at or 0)}"
            return Rejected.because(
                ErrorCode.UNAUTHENTICATED,
                f"token {record.token_id} of {record.principal!r} {what}; create one with {_command(record.role)}",
            )
        if hello.role not in _LOGINS[record.role]:
            return Rejected.because(
                ErrorCode.FORBIDDEN,
                f"token {record.token_id} of {record.principal!r} is for the role '{record.role}' and cannot log in "
                f"as '{hello.role}'; create one that can with {_command(hello.role)}",
            )
        return _principal(record, hello.role, readonly=hello.readonly)

    def _log_in_local(self, hello: Hello, peer: PeerCredentials | None) -> Principal | Rejected:
        if peer is not None and (name := self._local_names.get(peer.uid)) is not None:
            return Principal(name=name, role=hello.role, local=True, readonly=hello.readonly)
        why = "this relay requires a token"
        if peer is not None:
            why = f"user id {peer.uid} needs a token here; only the daemon's own user and root need none"
        return Rejected.because(
            ErrorCode.UNAUTHENTICATED,
            f"{why}: set RELAY_TOKEN or RELAY_TOKEN_FILE; {_command(hello.role)} creates one on the relay's machine",
        )

    def owner_of(self, text: str, now: float) -> str | None:
        """The principal of a live token; None for any other text. Cheaper than a login."""
        record = self._by_sha256.get(hash_token(text))
        return record.principal if record is not None and record.live(now) else None

    def client_of(self, token_id: str, now: float) -> Principal | None:
        """The principal of a token that may log in as a client at `now`, in Unix seconds; None if there is none."""
        record = self._by_id.get(token_id)
        if record is None or not record.live(now) or "client" not in _LOGINS[record.role]:
            return None
        return _principal(record, "client")

    def principal_named(self, name: str, now: float) -> Principal:
        """The principal of this name as a client that shows no token, with the rights of a token of it that lives.

        If none of its tokens lives any more, it may use no space. One that never had a token may use all of them.
        """
        records = [record for record in self.list() if record.principal == name]
        living = (self.client_of(record.token_id, now) for record in records)
        return next(filter(None, living), Principal(name=name, role="client", spaces=NO_SPACES if records else ()))

    def is_live(self, token_id: str, now: float) -> bool:
        """Whether a token exists and is neither revoked nor expired at `now`, in Unix seconds."""
        record = self._by_id.get(token_id)
        return record is not None and record.live(now)

    def knows(self, name: str) -> bool:
        """Whether a token, also one that has ended, or a local login has this principal, in whatever case."""
        names = {record.principal for record in self._by_id.values()} | {*self._local_names.values()}
        return name.lower() in {each.lower() for each in names}

    # -- managing tokens -

    def create(
        self,
        *,
        role: str,
        name: str,
        now: float,
        spaces: Iterable[str] = (),
        expires_at: float | None = None,
        limits: TokenLimits | None = None,
        readonly: bool = False,
    ) -> NewToken:
        """Create a token. It is valid immediately; if its record cannot be committed, call `forget`.

        Args:
            role: `client`, `worker` or `operator`.
            name: the principal's name.
            now: Unix seconds.
            spaces: case-sensitive patterns of fnmatch; empty for all spaces.
            expires_at: Unix seconds, after `now`; None for never.
            limits: the token's limits; None for no limits.
            readonly: whether it may only watch.

        Raises:
            ValueError: an argument is invalid, or the principal already has two live tokens of this role.
        """
        if role not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, not {role!r}")
        if not PRINCIPAL_PATTERN.fullmatch(name) or name.startswith(ID_PREFIXES):
            raise ValueError(
                f"{name!r} is not a valid name: start with a letter or digit, then letters, digits and . _ @ -, "
                f"64 at most, and not starting with {', '.join(ID_PREFIXES)}"
            )
        patterns = tuple(dict.fromkeys(spaces))
        for pattern in patterns:
            if not SPACE_GLOB.fullmatch(pattern):
                raise ValueError(
                    f"{pattern!r} is not a valid space pattern: give a space name, in which * ? and [...] are wildcards"
                )
        if patterns and role == "operator":
            raise ValueError("an operator controls all spaces; leave out --space, or create a client or worker token")
        if readonly and role == "worker":
            raise ValueError("a worker cannot be read-only; create an operator's or a client's token")
        if expires_at is not None and expires_at <= now:
            raise ValueError(f"the token would already have expired, at {iso_time(expires_at)}")
        live = [r for r in self._by_id.values() if r.principal == name and r.role == role and r.live(now)]
        if len(live) >= MAX_LIVE_TOKENS:
            raise ValueError(
                f"{name!r} already has {len(live)} live {role} tokens ({', '.join(r.token_id for r in live)}); "
                "revoke one with `relayd token revoke ID`"
            )
        text = _PREFIXES[role] + secrets.token_urlsafe(TOKEN_BYTES)
        record = TokenRecord(
            token_id=self._new_id(),
            principal=name,
            role=role,
            spaces=patterns,
            sha256=hash_token(text),
            limits=limits or TokenLimits(),
            readonly=readonly,
            created_at=now,
            expires_at=expires_at,
        )
        self._add(record)
        return NewToken(record, text)

    def _new_id(self) -> str:
        while (token_id := TOKEN_ID_PREFIX + secrets.token_hex(4)) in self._by_id:
            pass
        return token_id

    def revoke(self, which: str, now: float) -> list[TokenRecord]:
        """Revoke a token by its id, or all live tokens of a principal by its name.

        Takes effect immediately. If the commit fails, the tokens stay revoked until the daemon restarts.

        Returns:
            The records to commit; the caller closes their connections. Empty if no live token matches.
        """
        matches = [r for r in self._by_id.values() if which in (r.token_id, r.principal) and r.revoked_at is None]
        revoked = [attrs.evolve(record, revoked_at=now) for record in matches]
        for record in revoked:
            self._add(record)
        return revoked

    def forget(self, token_id: str) -> None:
        """Remove a token from memory, to undo `create` or to delete it."""
        if record := self._by_id.pop(token_id, None):
            del self._by_sha256[record.sha256]

    def purge(self, now: float) -> list[str]:
        """Remove the tokens that were revoked or expired more than `KEEP_ENDED_S` ago.

        Returns:
            The ids of the records to delete from the store.
        """
        ends = {i: min(e for e in (r.revoked_at, r.expires_at, now) if e is not None) for i, r in self._by_id.items()}
        purged = [token_id for token_id, ended_at in ends.items() if now - ended_at > KEEP_ENDED_S]
        for token_id in purged:
            self.forget(token_id)
        return purged

    def reload(self, records: Iterable[TokenRecord], known: Iterable[str]) -> set[str]:
        """Replace the tokens by the store's records. A token revoked here stays revoked: its commit may have failed.

        Args:
            records: all that the store holds.
            known: ids that were in memory when the load began; a token created since may be missing from `records`.

        Returns:
            Ids of tokens that were not revoked before, and now are revoked or gone.
        """
        open_before = {record.token_id for record in self._by_id.values() if record.revoked_at is None}
        found = {record.token_id: record for record in records}
        for token_id in known:
            if token_id not in found:
                self.forget(token_id)
        for token_id, record in found.items():
            before = self._by_id.get(token_id)
            if before is None or before.revoked_at is None:
                self.forget(token_id)  # its hash may have changed
                self._add(record)
        return {t for t in open_before if t not in self._by_id or self._by_id[t].revoked_at is not None}

    def list(self) -> list[TokenRecord]:
        """Return all records, oldest first, including revoked and expired ones."""
        return sorted(self._by_id.values(), key=lambda record: (record.created_at, record.token_id))


def _principal(record: TokenRecord, role: str, *, readonly: bool = False) -> Principal:
    return Principal(
        name=record.principal,
        role=role,
        spaces=record.spaces,
        token_id=record.token_id,
        readonly=readonly or record.readonly,
        limits=record.limits,
        expires_at=record.expires_at,
    )


def hash_token(text: str) -> bytes:
    """Return the SHA-256 of a token."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def parse_expires(text: str, now: float) -> float:
    """Parse the expiry of a token, as Unix seconds.

    Args:
        text: a time span from now (`90s`, `45m`, `12h`, `30d`, `2w`), or an ISO 8601 date (its first second) or
            time; UTC if it has no zone.
        now: Unix seconds.

    Raises:
        ValueError: `text` is neither, or lies in the past or beyond the year 9999.
    """
    try:
        if span := _SPAN.fullmatch(text):
            moment = datetime.datetime.fromtimestamp(now + int(span[1]) * _SPAN_S[span[2]], datetime.UTC)
        else:
            moment = datetime.datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is neither a time span like 12h or 30d nor a date like 2031-12-31") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    at = moment.timestamp()
    if at <= now:
        raise ValueError(f"{text} is in the past")
    if at >= _LAST_S:  # possible with a time zone west of Greenwich
        raise ValueError(f"{text} is beyond the year 9999; a token without --expires never expires")
    return at


def parse_limits(wire: Value) -> TokenLimits:
    """Read a token's limits from a map.

    Raises:
        ValueError: a limit is unknown or not a positive integer.
    """
    known = [field.name for field in attrs.fields(TokenLimits)]
    if not isinstance(wire, dict) or not all(name in known for name in wire):
        raise ValueError(f"limits must be a map with the keys {', '.join(known)}")
    for name, value in wire.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"limits.{name} must be a positive integer, not {value!r}")
    return TokenLimits(**wire)


def iso_time(unix_s: float) -> str:
    """Format `unix_s` as ISO 8601 in UTC, to the second, clamped to the range of valid dates."""
    at = min(max(unix_s, 0.0), _LAST_S) if unix_s == unix_s else 0.0  # NaN differs from itself
    return datetime.datetime.fromtimestamp(int(at), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _command(role: str) -> str:
    return f"`relayd token create --role {role} --name NAME`"


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid{uid}"
