"""Failed logins over HTTP and WebSocket, counted by address.

A token has 256 random bits, so nobody finds one by trying; what is limited is the noise. A good token is always
taken: whoever shares an address with a program that tries an old one must not be shut out with it.
"""

from collections import OrderedDict, deque

import attrs

#: Failures that one address may have in `WINDOW_S`; each further one is answered with `rate_limited`.
MAX_FAILURES = 10
WINDOW_S = 60.0
#: Addresses remembered; of more the one that failed longest ago is forgotten.
MAX_ADDRESSES = 4096
TOO_MANY_LOGINS = "too many failed logins from this address; check the token and retry later"


@attrs.define(eq=False)
class LoginThrottle:
    """Who failed to log in of late."""

    _times: OrderedDict[str, deque[float]] = attrs.field(factory=OrderedDict)

    def add(self, address: str, now: float) -> float | None:
        """Count one more failure.

        Args:
            address: of the peer, without its port.
            now: monotonic seconds.

        Returns:
            None, or the seconds until `address` may try again: it has failed too often.
        """
        times = self._times.setdefault(address, deque(maxlen=MAX_FAILURES))
        self._times.move_to_end(address)
        if len(self._times) > MAX_ADDRESSES:
            self._times.popitem(last=False)
        if len(times) == MAX_FAILURES and now - times[0] < WINDOW_S:
            return times[0] + WINDOW_S - now
        times.append(now)
        return None


def address_of(peer: str) -> str:
    """Where a peer comes from, without its port.

    Args:
        peer: `HOST:PORT`, `[HOST]:PORT`, or an address alone, as a proxy names it.
    """
    has_port = peer.startswith("[") or peer.count(":") == 1
    return peer.rpartition(":")[0] if has_port else peer
