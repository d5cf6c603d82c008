"""Finds the relay's address and the token, from URLs, the environment and the local socket."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import attrs

from protocol.wire.messages import PATH

#: Name of the relay's socket in its state directory.
SOCKET_NAME = "relayd.sock"
MAX_TOKEN_CHARS = 256
#: The addresses of the page and of the HTTP API mean the same relay.
_SCHEMES: dict[str, Literal["tcp", "tls"]] = {"ws": "tcp", "wss": "tls", "http": "tcp", "https": "tls"}


@attrs.frozen(kw_only=True)
class Address:
    """The address of a relay, or of several that stand in for each other.

    Args:
        kind: `tcp` (ws://), `tls` (wss://) or `unix`.
        host: name or address without brackets; empty for `unix`.
        port: 1..65535; 0 for `unix`.
        path: the socket file, for `unix`.
        resource: the path requested in the WebSocket handshake.
        others: the further relays of a list.
    """

    kind: Literal["tcp", "tls", "unix"]
    host: str = ""
    port: int = 0
    path: str = ""
    resource: str = PATH
    others: "tuple[Address, ...]" = ()

    def __str__(self) -> str:
        if self.others:
            return ",".join(map(str, self.each))
        if self.kind == "unix":
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        prefix = self.resource.removesuffix(PATH)
        return f"{'wss' if self.kind == 'tls' else 'ws'}://{host}:{self.port}{prefix}"

    @property
    def each(self) -> "tuple[Address, ...]":
        """The relays of the list, one by one."""
        return (attrs.evolve(self, others=()), *self.others)

    def rotated(self) -> "Address":
        """The list with its second relay first, and its first one last."""
        first, *others = (*self.each[1:], self.each[0])
        return attrs.evolve(first, others=tuple(others))


def parse_address(url: str) -> Address:
    """Parse a relay URL, or several with commas between them: relays that stand in for each other.

    Args:
        url: `ws://host[:port][/prefix]`, `wss://...` or `unix:PATH`; `/v1/relay` is appended if it is missing. The
            addresses of the page and of OpenAI's API (`http://host[:port][/prefix][/v1]`, `https://...`) are taken too.

    Raises:
        ValueError: it is none of these; the message says what is wrong and what is right.
    """
    first, *others = dict.fromkeys(map(_parse_one, re.split(r"\s*,\s*(?=wss?:|https?:|unix:)", url.strip())))
    return attrs.evolve(first, others=tuple(others))


def _parse_one(url: str) -> Address:
    if url.startswith("unix:"):
        path = re.sub(r"^//(?=/)", "", url.removeprefix("unix:"))
        if not path:
            raise ValueError("relay URL 'unix:' lacks the path of the socket (unix:/run/relayd/relayd.sock)")
        return Address(kind="unix", path=os.path.expanduser(path))  # noqa: PTH111  Path would drop a trailing '/'
    if "," in url:
        raise ValueError(f"relay URL {url!r}: write each relay of a list in full, as in ws://a:8765,ws://b:8765")
    try:
        parts = urlsplit(url)
    except ValueError as fault:
        raise ValueError(f"relay URL {url!r}: {fault}") from None
    kind = _SCHEMES.get(parts.scheme)
    if kind is None:
        raise ValueError(f"relay URL {url!r} must begin with ws://, wss:// or unix:")
    if "@" in parts.netloc:
        raise ValueError("a relay URL must contain no user or token: put the token in RELAY_TOKEN or RELAY_TOKEN_FILE")
    if parts.query or parts.fragment:
        raise ValueError(f"relay URL {url!r} must have no '?' or '#' part")
    try:
        host, port = parts.hostname, parts.port
    except ValueError as fault:
        raise ValueError(f"relay URL {url!r}: {fault}") from None
    if not host:
        raise ValueError(f"relay URL {url!r} lacks a host")
    if port is None:
        port = 443 if kind == "tls" else 80
    if not 0 < port < 65536:
        raise ValueError(f"relay URL {url!r}: port {port} lies outside 1..65535")
    prefix = re.sub(r"/v1(/relay)?$", "", parts.path.rstrip("/"))
    return Address(kind=kind, host=host, port=port, resource=prefix + PATH)


def default_socket(environ: Mapping[str, str] | None = None) -> Path:
    """The local relay's socket: the first that exists at the usual places, else the first of these places."""
    environ = os.environ if environ is None else environ
    places = []
    if state_dir := environ.get("RELAYD_STATE_DIR"):
        places.append(Path(state_dir) / SOCKET_NAME)
    state_home = environ.get("XDG_STATE_HOME") or str(Path(environ.get("HOME") or "~").expanduser() / ".local/state")
    places.append(Path(state_home) / "relayd" / SOCKET_NAME)
    places += [Path("/run/relayd") / SOCKET_NAME, Path("/var/lib/relayd") / SOCKET_NAME]
    return next((place for place in places if _exists(place)), places[0])


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a directory on the way that we may not enter
        return False


def from_environment(url: str | None = None, environ: Mapping[str, str] | None = None) -> Address:
    """The address in `url`, else in RELAY_URL, else the local unix socket.

    Raises:
        ValueError: the URL is not valid.
    """
    environ = os.environ if environ is None else environ
    url = url or environ.get("RELAY_URL")
    if url:
        return parse_address(url)
    return Address(kind="unix", path=str(default_socket(environ)))


def read_token(path: str | Path) -> str:
    """Read the token in the file at `path`, without surrounding white space.

    Raises:
        ValueError: the file cannot be read or contains no token.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise ValueError(
            f"token file {path} cannot be read: {fault.strerror if isinstance(fault, OSError) else 'it is not text'}"
        ) from None
    return _checked(text, f"token file {path}")


def token_from_environment(environ: Mapping[str, str] | None = None) -> str | None:
    """The token in RELAY_TOKEN, else in the file named by RELAY_TOKEN_FILE; None if neither is set.

    Raises:
        ValueError: the file cannot be read or contains no token.
    """
    environ = os.environ if environ is None else environ
    if token := environ.get("RELAY_TOKEN"):
        return _checked(token, "RELAY_TOKEN")
    if path := environ.get("RELAY_TOKEN_FILE"):
        return read_token(path)
    return None


def _checked(text: str, where: str) -> str:
    token = text.strip()
    if not token:
        raise ValueError(f"{where} is empty")
    if len(token) > MAX_TOKEN_CHARS or any(sign.isspace() or not sign.isprintable() for sign in token):
        raise ValueError(f"{where} does not contain exactly one token")
    return token
