"""Failed logins over HTTP and WebSocket, counted by address.

A token has 256 random bits, so it cannot be guessed; the throttle only limits the noise. A valid token is always
accepted: clients that share an address with a program using an old token must not be locked out.
"""

import ipaddress
from collections import OrderedDict, deque

import attrs

#: Failures allowed per address in `WINDOW_S`; each further one is answered with `rate_limited`.
MAX_FAILURES = 10
WINDOW_S = 60.0
#: Addresses remembered; beyond that, the one that failed longest ago is forgotten.
MAX_ADDRESSES = 4096
TOO_MANY_LOGINS = "too many failed logins from this address; check the token and retry later"


@attrs.define(eq=False)
class LoginThrottle:
    """Recent login failures by address."""

    _times: OrderedDict[str, deque[float]] = attrs.field(factory=OrderedDict)

    def add(self, address: str, now: float) -> float | None:
        """Count one failure.

        Args:
            address: of the peer, without its port.
            now: monotonic seconds.

        Returns:
            None, or if `address` has failed too often, the seconds until it may try again.
        """
        network = network_of(address)
        times = self._times.setdefault(network, deque(maxlen=MAX_FAILURES))
        self._times.move_to_end(network)
        if len(self._times) > MAX_ADDRESSES:
            self._times.popitem(last=False)
        if len(times) == MAX_FAILURES and now - times[0] < WINDOW_S:
            return times[0] + WINDOW_S - now
        times.append(now)
        return None

    def take_back(self, address: str) -> None:
        """Forget the latest failure of `address`: the login succeeded, and was counted before that was known."""
        if times := self._times.get(network_of(address)):
            times.pop()

    def is_throttled(self, address: str, now: float) -> bool:
        """Whether the next failure of `address` would be one too many."""
        times = self._times.get(network_of(address))
        return times is not None and len(times) == MAX_FAILURES and now - times[0] < WINDOW_S


def address_of(peer: str) -> str:
    """Return a peer's address without its port.

    Args:
        peer: `HOST:PORT`, `[HOST]:PORT`, or an address alone, as reported by a proxy.
    """
    has_port = peer.startswith("[") or peer.count(":") == 1
    return peer.rpartition(":")[0] if has_port else peer


def network_of(peer: str) -> str:
    """The address in `peer`, without its port; for IPv6, the /64 it is in."""
    address = address_of(peer).strip("[]").partition("%")[0]
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(ipaddress.ip_network((ip, 64), strict=False)) if ip.version == 6 else address
