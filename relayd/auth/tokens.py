"""Who a peer is and what it may do: tokens, and the credentials of a peer on the unix socket.

A token is `rly_`, a letter for its role, and 256 random bits in base64url. Only its SHA-256 is kept: with that
many random bits a slow hash would protect nothing more. Pure: time comes in, changes for the store go out.
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
#: Live tokens that one principal may have for one role: the old one and the new one while a token is rotated.
MAX_LIVE_TOKENS = 2
#: How long the record of a revoked or expired token is kept, to tell its user what became of it: 30 days.
KEEP_ENDED_S = 30 * 86_400.0
PRINCIPAL_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
#: A space name, with the wildcards of fnmatch.
SPACE_GLOB = re.compile(r"[A-Za-z0-9._*?\[\]!-]{1,128}")
TOKEN_ID_PREFIX = "tok_"

_PREFIXES = {role: f"rly_{role[0]}_" for role in ROLES}
#: Role of a token -> roles that it may log in with.
_LOGINS = {"client": {"client"}, "worker": {"worker"}, "operator": {"operator", "client"}}
_SPAN = re.compile(r"([1-9][0-9]{0,5})([smhdw])")
_SPAN_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 7 * 86_400}
#: 9999-12-31T23:59:59Z; datetime knows no later second.
_LAST_S = 253_402_300_799.0
#: struct ucred of Linux: pid, uid, gid (unix(7), SO_PEERCRED).
_UCRED = struct.Struct("3i")


@attrs.frozen
class PeerCredentials:
    """Who connected to the unix socket, as the kernel says."""

    pid: int
    uid: int
    gid: int


class OpenSocket(Protocol):
    """A connected socket: the standard library's or Trio's."""

    @property
    def family(self) -> int:
        """Its address family."""

    def getsockopt(self, level: int, option: int, length: int, /) -> bytes:
        """As `socket.socket.getsockopt`."""


def peer_credentials(sock: OpenSocket) -> PeerCredentials | None:
    """Who is at the other end of a unix socket; None for any other kind.

    They are those of the moment it connected; a process that gave up its rights afterwards keeps them here.
    """
    if sock.family != socket.AF_UNIX:
        return None
    return PeerCredentials(*_UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


@attrs.frozen(kw_only=True)
class Principal:
    """Who a connection speaks for, and in which role.

    Args:
        spaces: patterns of the spaces it may use; empty for all.
        token_id: None for a login by the credentials of the unix socket, which makes it `local`.
        expires_at: Unix seconds at which its token ends.
    """

    name: str
    role: str
    spaces: tuple[str, ...] = ()
    token_id: str | None = None
    local: bool = False
    readonly: bool = False
    limits: TokenLimits = attrs.field(factory=TokenLimits)
    expires_at: float | None = None

    def may_use(self, space: str) -> bool:
        """Whether one of its patterns takes `space`."""
        return not self.spaces or any(fnmatchcase(space, pattern) for pattern in self.spaces)


@attrs.frozen
class NewToken:
    """A token just made. `text` is the secret: it is shown once and kept nowhere."""

    record: TokenRecord
    text: str = attrs.field(repr=False)


class TokenRegistry:
    """The tokens of the store, ready for logins.

    Every method decides at once and in memory; the caller commits the records that come back.

    Args:
        records: as loaded from the store.
        local_uids: users who need no token on the unix socket: the daemon's own and root unless said otherwise.
    """

    def __init__(self, records: Iterable[TokenRecord] = (), *, local_uids: Iterable[int] | None = None) -> None:
        self._by_id: dict[str, TokenRecord] = {}
        self._by_sha256: dict[bytes, TokenRecord] = {}
        #: Error code -> logins that were refused with it.
        self.refused: dict[str, int] = {}
        # Names are looked up here and not at login: behind NSS may be a server that takes its time.
        self._local_names = {uid: _user_name(uid) for uid in (local_uids or (os.geteuid(), 0))}
        for record in records:
            self._add(record)

    def _add(self, record: TokenRecord) -> None:
        self._by_id[record.token_id] = record
        self._by_sha256[record.sha256] = record

    # -- logins -

    def log_in(self, hello: Hello, peer: PeerCredentials | None, now: float) -> Principal | Rejected:
        """Who says `hello`.

        Args:
            hello: its token counts before anything else, also on the unix socket.
            peer: of a unix socket; None for TCP.
            now: Unix seconds.

        Returns:
            The principal, or a refusal that says what to do: `unauthenticated` for a token that opens nothing (any
            more), `forbidden` for one of another role.
        """
        principal = self._log_in(hello, peer, now)
        if isinstance(principal, Rejected):
            self.refused[principal.code] = self.refused.get(principal.code, 0) + 1
        return principal

    def _log_in(self, hello: Hello, peer: PeerCredentials | None, now: float) -> Principal | Rejected:
        if not hello.token:  # an empty RELAY_TOKEN is none
            return self._log_in_local(hello, peer)
        sha256 = hash_token(hello.token)
        record = self._by_sha256.get(sha256)
        if record is None or not hmac.compare_digest(record.sha256, sha256):
            words = "this relay does not know the token; `relayd token list` shows those it knows"
            if not hello.token.startswith(tuple(_PREFIXES.values())):
                words = "not a relay token: tokens start with rly_c_, rly_w_ or rly_o_"
            return Rejected.because(ErrorCode.UNAUTHENTICATED, words)
        if not record.live(now):
            what = "was revoked" if record.revoked_at is not None else f"expired at {iso_time(record.expires_at or 0)}"
            return Rejected.because(
                ErrorCode.UNAUTHENTICATED,
                f"token {record.token_id} of {record.principal!r} {what}; make a new one with {_command(record.role)}",
            )
        if hello.role not in _LOGINS[record.role]:
            return Rejected.because(
                ErrorCode.FORBIDDEN,
                f"token {record.token_id} of {record.principal!r} is for the role '{record.role}' and cannot log in "
                f"as '{hello.role}'; make one that can with {_command(hello.role)}",
            )
        return Principal(
            name=record.principal,
            role=hello.role,
            spaces=record.spaces,
            token_id=record.token_id,
            readonly=hello.readonly,
            limits=record.limits,
            expires_at=record.expires_at,
        )

    def _log_in_local(self, hello: Hello, peer: PeerCredentials | None) -> Principal | Rejected:
        if peer is not None and (name := self._local_names.get(peer.uid)) is not None:
            return Principal(name=name, role=hello.role, local=True, readonly=hello.readonly)
        why = "this relay asks for a token"
        if peer is not None:
            why = f"user id {peer.uid} needs a token here; only the daemon's own user and root need none"
        return Rejected.because(
            ErrorCode.UNAUTHENTICATED,
            f"{why}: set RELAY_TOKEN or RELAY_TOKEN_FILE; {_command(hello.role)} makes one on the relay's machine",
        )

    def is_live(self, token_id: str, now: float) -> bool:
        """Whether a token still opens something at `now`, in Unix seconds."""
        record = self._by_id.get(token_id)
        return record is not None and record.live(now)

    # -- keeping tokens -

    def create(
        self,
        *,
        role: str,
        name: str,
        now: float,
        spaces: Iterable[str] = (),
        expires_at: float | None = None,
        limits: TokenLimits | None = None,
    ) -> NewToken:
        """Make a token. It counts from now on; if its record cannot be committed, `forget` it.

        Args:
            role: `client`, `worker` or `operator`.
            name: the principal's.
            now: Unix seconds.
            spaces: patterns as of fnmatch, case-sensitive; none for all spaces.
            expires_at: Unix seconds, after `now`.
            limits: none unless given.

        Raises:
            ValueError: says what is wrong with the arguments, or that the principal has two live tokens already.
        """
        if role not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, not {role!r}")
        if not PRINCIPAL_PATTERN.fullmatch(name) or name.startswith(TOKEN_ID_PREFIX):
            raise ValueError(
                f"name {name!r}: a letter or digit, then letters, digits and . _ @ -, 64 at most, "
                f"and not beginning with {TOKEN_ID_PREFIX}"
            )
        patterns = tuple(dict.fromkeys(spaces))
        for pattern in patterns:
            if not SPACE_GLOB.fullmatch(pattern):
                raise ValueError(f"space pattern {pattern!r}: a space name, in which * ? and [...] may stand")
        if patterns and role == "operator":
            raise ValueError(
                "an operator sees and steers all spaces; leave out --space, or make a client or worker token"
            )
        if expires_at is not None and expires_at <= now:
            raise ValueError(f"the token would have expired at {iso_time(expires_at)} already")
        live = [r for r in self._by_id.values() if r.principal == name and r.role == role and r.live(now)]
        if len(live) >= MAX_LIVE_TOKENS:
            raise ValueError(
                f"{name!r} has {len(live)} live {role} tokens already ({', '.join(r.token_id for r in live)}); "
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
        """Close the door to a token by its id, or to all live ones of a principal by its name.

        It holds at once. Should the commit fail, the door stays closed until the daemon restarts.

        Returns:
            The records to commit; their connections are the caller's to drop. Empty when nothing live matches.
        """
        matches = [r for r in self._by_id.values() if which in (r.token_id, r.principal) and r.revoked_at is None]
        revoked = [attrs.evolve(record, revoked_at=now) for record in matches]
        for record in revoked:
            self._add(record)
        return revoked

    def forget(self, token_id: str) -> None:
        """Undo `create`, or drop a token for good."""
        if record := self._by_id.pop(token_id, None):
            del self._by_sha256[record.sha256]

    def purge(self, now: float) -> list[str]:
        """Drop the records of tokens that were revoked or have expired long ago.

        Returns:
            The ids of the records to delete from the store.
        """
        ends = {i: min(e for e in (r.revoked_at, r.expires_at, now) if e is not None) for i, r in self._by_id.items()}
        purged = [token_id for token_id, ended_at in ends.items() if now - ended_at > KEEP_ENDED_S]
        for token_id in purged:
            self.forget(token_id)
        return purged

    def reload(self, records: Iterable[TokenRecord], known: Iterable[str]) -> set[str]:
        """Let the store's records count. One that was revoked here stays so: its commit may have failed.

        Args:
            records: all that the store holds.
            known: ids that were here when the store was asked; one made since may not be among `records` yet.

        Returns:
            Ids that were not revoked before, and now are, or are gone.
        """
        open_before = {record.token_id for record in self._by_id.values() if record.revoked_at is None}
        found = {record.token_id: record for record in records}
        for token_id in known:
            if token_id not in found:
                self.forget(token_id)
        for token_id, record in found.items():
            before = self._by_id.get(token_id)
            if before is None or before.revoked_at is None:
                self.forget(token_id)  # its hash may be another
                self._add(record)
        return {t for t in open_before if t not in self._by_id or self._by_id[t].revoked_at is not None}

    def list(self) -> list[TokenRecord]:
        """All records, the oldest first; those that are revoked or expired, too."""
        return sorted(self._by_id.values(), key=lambda record: (record.created_at, record.token_id))


def hash_token(text: str) -> bytes:
    """SHA-256 of a token's text."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def parse_expires(text: str, now: float) -> float:
    """When a token ends, in Unix seconds.

    Args:
        text: a span from now (`90s`, `45m`, `12h`, `30d`, `2w`), or an ISO 8601 date (the first second of that day)
            or time; UTC where it names no zone.
        now: Unix seconds.

    Raises:
        ValueError: it is neither, or lies in the past.
    """
    try:
        if span := _SPAN.fullmatch(text):
            moment = datetime.datetime.fromtimestamp(now + int(span[1]) * _SPAN_S[span[2]], datetime.UTC)
        else:
            moment = datetime.datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is neither a span like 12h or 30d nor a date like 2031-12-31") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    at = moment.timestamp()
    if at <= now:
        raise ValueError(f"{text} lies in the past")
    if at >= _LAST_S:  # a zone west of Greenwich can lead there
        raise ValueError(f"{text} lies beyond the year 9999; a token without --expires never ends")
    return at


def parse_limits(wire: Value) -> TokenLimits:
    """A token's limits from a map of them.

    Raises:
        ValueError: one is unknown, or no whole number from 1 on.
    """
    known = [field.name for field in attrs.fields(TokenLimits)]
    if not isinstance(wire, dict) or not all(name in known for name in wire):
        raise ValueError(f"limits is a map of {', '.join(known)}")
    for name, value in wire.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"limits.{name} must be a whole number from 1 on, not {value!r}")
    return TokenLimits(**wire)


def iso_time(unix_s: float) -> str:
    """`unix_s` as ISO 8601, UTC, to the second; what no date can tell as the nearest that can."""
    at = min(max(unix_s, 0.0), _LAST_S) if unix_s == unix_s else 0.0  # NaN is not itself
    return datetime.datetime.fromtimestamp(int(at), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _command(role: str) -> str:
    return f"`relayd token create --role {role} --name NAME`"


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid{uid}"
