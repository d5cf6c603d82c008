"""Hashes passwords with argon2id, in threads and a few at once: each takes memory and tens of milliseconds."""

from functools import cache
from typing import TYPE_CHECKING

import attrs
import trio

if TYPE_CHECKING:
    from argon2 import PasswordHasher

#: Hashes at once, 19 MiB each.
MAX_AT_ONCE = 2
#: Logins that wait for their turn to be hashed, some seconds' worth.
MAX_WAITING = 32


class TooManyLogins(Exception):
    """So many passwords are being hashed that this one is refused."""


@cache
def _hasher() -> "PasswordHasher":
    from argon2 import PasswordHasher  # only now: commands and relays without users do not need it

    # OWASP's first choice for argon2id with little memory (Password Storage Cheat Sheet).
    return PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1)


@cache
def _nobodys() -> str:
    return hash_password("the password of no user")


def hash_password(password: str) -> str:
    """Hash a password; blocks for tens of milliseconds."""
    return _hasher().hash(_bytes(password))


def matches(hashed: str, password: str) -> bool:
    """Whether a password is the one of a hash; takes as long for "", the hash of nobody. Blocks."""
    from argon2.exceptions import InvalidHashError, VerificationError

    nobodys = _nobodys()
    try:
        _hasher().verify(hashed or nobodys, _bytes(password))
    except (VerificationError, InvalidHashError):
        return False
    return bool(hashed)


def _bytes(password: str) -> bytes:
    return password.encode(errors="surrogatepass")  # JSON may name half a character


@attrs.define(eq=False)
class PasswordThreads:
    """Runs `hash_password` and `matches` in threads."""

    _limiter: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(MAX_AT_ONCE))

    async def hash(self, password: str) -> str:
        """See `hash_password`.

        Raises:
            TooManyLogins: too many wait.
        """
        self._check()
        return await trio.to_thread.run_sync(hash_password, password, limiter=self._limiter)

    async def matches(self, hashed: str, password: str) -> bool:
        """See `matches`.

        Raises:
            TooManyLogins: too many wait.
        """
        self._check()
        return await trio.to_thread.run_sync(matches, hashed, password, limiter=self._limiter)

    def _check(self) -> None:
        if self._limiter.statistics().tasks_waiting >= MAX_WAITING:
            raise TooManyLogins
