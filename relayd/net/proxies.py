"""Which client a connection comes from, where proxies stand in front of the relay."""

import ipaddress
import re
from collections.abc import Iterable
from functools import lru_cache

from relayd.config.schema import Config

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
#: An address in `X-Forwarded-For`, which may have a port.
_ADDRESS = re.compile(r"[0-9A-Za-z.:\[\]%_-]{1,64}")


def is_trusted(peer: str, config: Config) -> bool:
    """Whether a peer is a proxy whose `X-Forwarded-For` counts: one of `trusted_proxies`, or without any a neighbour.

    Args:
        peer: `HOST:PORT`, `[HOST]:PORT`, or an address alone.
        config: the current settings.
    """
    if not config.behind_proxy or (address := _parse(peer)) is None:
        return False
    if config.trusted_proxies:
        return is_within(peer, config.trusted_proxies)
    return address.is_private  # which loopback is, too


def client_of(peer: str, forwarded: Iterable[str], config: Config) -> str | None:
    """Return the address of the client that trusted proxies report; None if there is none.

    Each proxy appends the address that it sees, so what is to the left of the first untrusted one from the right is
    only that one's claim.

    Args:
        peer: the other end of the connection.
        forwarded: the values of its `X-Forwarded-For` headers, in order.
        config: the current settings.
    """
    if not is_trusted(peer, config):
        return None
    client = None
    for text in reversed(",".join(forwarded).split(",")):
        if not _ADDRESS.fullmatch(text.strip()):
            break
        client = text.strip()
        if not is_within(client, config.trusted_proxies):
            break
    return client


def is_within(peer: str, networks: tuple[str, ...]) -> bool:
    """Whether a peer is in one of these networks.

    Args:
        peer: as for `is_trusted`.
        networks: addresses and networks.
    """
    address = _parse(peer)
    return address is not None and any(address in network for network in _networks(networks))


@lru_cache(maxsize=8)
def _networks(texts: tuple[str, ...]) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    return tuple(map(ipaddress.ip_network, texts))


def _parse(peer: str) -> _Address | None:
    """Return the address in `peer`; of an IPv4 peer on an IPv6 socket, its IPv4 address. None if it is a name."""
    has_port = peer.startswith("[") or peer.count(":") == 1
    host = (peer.rpartition(":")[0] or peer).strip("[]") if has_port else peer
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
