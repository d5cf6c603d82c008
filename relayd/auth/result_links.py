"""Signed links: whoever has one may read one result until it expires, and nothing else.

A link is `EXPIRES.TOKEN_ID.SIGNATURE`. It holds no secret of its own: the signature is a keyed hash of the request and
the rest, and ends with the token that it was made with.
"""

import base64
import contextlib
import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path

import attrs

from relayd.store.state_dir import open_private

KEY_NAME = "link.key"
KEY_BYTES = 32
_LINK = re.compile(r"([0-9]{1,12})\.([A-Za-z0-9_-]{0,64})\.([A-Za-z0-9_-]{43})")


@attrs.frozen
class LinkGrant:
    """What a link with a valid signature says.

    Args:
        expires_at: when it expires, in Unix seconds.
        token_id: the token that it was made with; empty for a login by the credentials of the unix socket.
    """

    expires_at: int
    token_id: str


@attrs.frozen
class LinkSigner:
    """Makes and checks links."""

    _key: bytes = attrs.field(repr=False)

    def make(self, result: str, grant: LinkGrant) -> str:
        """Make a link to the result of this name."""
        return f"{grant.expires_at}.{grant.token_id}.{self._signature(result, grant)}"

    def read(self, result: str, link: str) -> LinkGrant | None:
        """Return what a link grants, which may have expired; None if it was not made here, or for another result."""
        match = _LINK.fullmatch(link)
        if match is None:
            return None
        grant = LinkGrant(int(match[1]), match[2])
        return grant if hmac.compare_digest(self._signature(result, grant), match[3]) else None

    def _signature(self, result: str, grant: LinkGrant) -> str:
        signed = f"result link 1\n{result}\n{grant.expires_at}\n{grant.token_id}".encode()
        digest = hmac.new(self._key, signed, hashlib.sha256).digest()
        return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def load_signer(state_dir: Path) -> LinkSigner:
    """Read the secret in the state folder, and make a new one if there is none, or no whole one.

    Raises:
        OSError: it can be neither read nor written.
    """
    descriptor = open_private(state_dir / KEY_NAME)
    with contextlib.closing(os.fdopen(descriptor, "r+b", buffering=0)) as file:
        key = file.read(KEY_BYTES + 1) or b""
        if len(key) != KEY_BYTES:
            key = secrets.token_bytes(KEY_BYTES)
            file.seek(0)
            file.truncate()
            file.write(key)
            os.fsync(descriptor)
    return LinkSigner(key)


def new_signer() -> LinkSigner:
    """Make a signer whose links last as long as this process."""
    return LinkSigner(secrets.token_bytes(KEY_BYTES))
