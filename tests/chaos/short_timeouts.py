"""Short timeouts for clients and workers, so that a cut and its recovery take seconds.

They replace constants and defaults of `protocol` that have no option, because only tests need other values. Those of
the relay are settings. `python -m tests.chaos.short_timeouts run ...` is `gpuworker run ...` with short timeouts.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import protocol.client.client
import protocol.link.backoff
import protocol.link.dial
from gpuworker.cli import main

PING_INTERVAL_S = 0.5
#: 15 s otherwise; on loopback even a slow peer answers within 1 s.
DEAD_AFTER_S = 3.5
#: 10 s otherwise; a busy machine needs most of that.
HANDSHAKE_S = 8.0
#: The first and the longest wait between two attempts; it doubles each time.
BACKOFF_S = (0.1, 0.8)
#: 5 s otherwise. In this storm hardly any login lasts that long, so every wait would be the longest.
HELD_S = 0.5


@contextmanager
def shortened_timeouts() -> Iterator[None]:
    """Use short timeouts for all links that this process opens in the block."""
    link, backoff = protocol.link.dial, protocol.link.backoff
    defaults = link.open_link.__wrapped__.__kwdefaults__  # type: ignore[attr-defined]
    before = dict(defaults), backoff.Backoff.__init__.__defaults__, backoff.HELD_S, link.LOGIN_TIMEOUT_S
    limits = link.LinkLimits(ping_interval_s=PING_INTERVAL_S, dead_after_s=DEAD_AFTER_S)
    defaults |= {"limits": limits, "connect_timeout_s": HANDSHAKE_S}
    backoff.Backoff.__init__.__defaults__ = (*BACKOFF_S, random.random)
    backoff.HELD_S, link.LOGIN_TIMEOUT_S = HELD_S, HANDSHAKE_S
    try:
        yield
    finally:
        defaults |= before[0]
        backoff.Backoff.__init__.__defaults__, backoff.HELD_S, link.LOGIN_TIMEOUT_S = before[1:]


if __name__ == "__main__":
    with shortened_timeouts():
        main()
