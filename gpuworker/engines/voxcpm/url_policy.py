"""Decides which hosts may be fetched from, by name and by address, and parses URLs."""

import ipaddress
import re
import socket
from urllib.parse import quote, urlsplit

import attrs

from gpuworker.engines.base import OptionError

MAX_URL_CHARS = 2_048
DEFAULT_PORTS = {"http": 80, "https": 443}
#: The ports allowed if a listed host names none.
PORTS = (80, 443)

_HOST = re.compile(r"[a-z0-9_](?:[a-z0-9._-]{0,251}[a-z0-9_])?")
#: Characters of a path or query that are left as they are: delimiters, or part of an encoding.
SAFE = "/%:=&?~#+!$,;'@()*[]"
#: Networks that are not public although `is_global` says so, in some or all versions of Python: protocol assignments
#: (including Oracle's metadata service), 6to4 relays, and Azure's services for its own machines.
_NOT_PUBLIC = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32")))
_GLOBAL_V6 = ipaddress.ip_network("2000::/3")
#: Addresses that contain an IPv4 address, to which a gateway would forward: Teredo and others, 6to4. NAT64 and
#: IPv4-mapped addresses lie outside 2000::/3.
_TUNNELS = (ipaddress.ip_network("2001::/23"), ipaddress.ip_network("2002::/16"))


class FetchRefused(ValueError):
    """The URL may not be fetched; the message says why and what to do."""


def _host_name(host: str) -> str:
    """A host as compared: lower-case ASCII; an IPv6 address in its shortest form, without brackets."""
    try:
        return str(ipaddress.IPv6Address(host))
    except ValueError:
        name = host.encode("idna").decode().lower().removesuffix(".")  # UnicodeError is a ValueError
        if _HOST.fullmatch(name) is None:
            raise ValueError("no host name") from None
        return name


@attrs.frozen
class Listed:
    """A host that may be fetched from: `example.org`, or `.example.org` for its subdomains, either with `:port`."""

    host: str
    port: int | None = None
    below: bool = False

    @classmethod
    def parse(cls, entry: str) -> "Listed":
        """Parse an entry of the list.

        Raises:
            OptionError: it is not valid.
        """
        try:
            parts = urlsplit("//" + entry.removeprefix("."))
            if parts.path or parts.query or parts.fragment or "@" in parts.netloc or parts.port == 0:
                raise ValueError("more than a host")
            return cls(_host_name(parts.hostname or ""), parts.port, entry.startswith("."))
        except ValueError:
            raise OptionError(
                f"{entry!r} is not a host to fetch from; give names as example.org, .example.org (all below it) "
                "or example.org:8443"
            ) from None

    def allows(self, host: str, port: int) -> bool:
        """Whether it allows this host and port."""
        if port not in (PORTS if self.port is None else (self.port,)):
            return False
        return host.endswith("." + self.host) if self.below else host == self.host


def parse_hosts(option: str) -> tuple[str, ...]:
    """Parse a comma-separated list of hosts.

    Raises:
        OptionError: an entry is not valid.
    """
    entries = tuple(entry.strip() for entry in option.split(",") if entry.strip())
    for entry in entries:
        Listed.parse(entry)
    return entries


def is_public(address: str) -> bool:
    """Whether an IP address belongs to a machine on the public internet, and forwards to nothing else."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address) and (
        ip.scope_id is not None or ip not in _GLOBAL_V6 or any(ip in net for net in _TUNNELS)
    ):
        return False
    return ip.is_global and not ip.is_multicast and not any(ip in net for net in _NOT_PUBLIC)


def resolve(host: str, port: int) -> list[str]:
    """Resolve all addresses of a host.

    Raises:
        OSError: it cannot be resolved.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


@attrs.frozen
class Target:
    """The parts of a URL that a fetch needs.

    Args:
        scheme: `http` or `https`.
        host: in the form in which `Listed` compares it.
        path: including the query, percent-encoded.
    """

    scheme: str
    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, url: str) -> "Target":
        """Parse a URL.

        Raises:
            FetchRefused: it is not a valid URL, or contains something that must not be in a request's params.
        """
        if len(url) > MAX_URL_CHARS:
            raise FetchRefused(f"has {len(url)} characters; the limit is {MAX_URL_CHARS}")
        if not url.isprintable() or " " in url or "\\" in url:
            raise FetchRefused("contains a space or a character that is not allowed in a URL; percent-encode it")
        try:
            parts = urlsplit(url)
            scheme, port = parts.scheme, parts.port
            if scheme not in ("http", "https"):
                raise FetchRefused("is not an http or https URL")
            if "@" in parts.netloc:
                raise FetchRefused("contains a user name or password; leave it out")
            host = _host_name(parts.hostname or "")
        except FetchRefused:
            raise
        except ValueError:
            raise FetchRefused("has no valid host; give https://HOST/PATH") from None
        path = quote(parts.path, SAFE) or "/"
        if parts.query:
            path += "?" + quote(parts.query, SAFE)
        return cls(scheme, host, DEFAULT_PORTS[scheme] if port is None else port, path)

    @property
    def authority(self) -> str:
        """Host and port, as written in a URL."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
