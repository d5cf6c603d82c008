"""The waits of clients and workers, made short, so that a round of cut and recovery takes seconds.

They are constants and defaults of `protocol`, which no option names: nobody but a test wants them otherwise. The
relay's own are settings. `python -m tests.chaos.short_timeouts run ...` is `gpuworker run ...` in haste.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import protocol.client.client
import protocol.link.backoff
import protocol.link.dial
from gpuworker.cli import main

PING_INTERVAL_S = 0.5
#: 15 s otherwise; on loopback a peer that is only slow answers within one.
DEAD_AFTER_S = 2.5
HANDSHAKE_S = 3.0
#: The ceiling of the waits between two tries, doubling from the first.
BACKOFF_S = (0.1, 0.8)
#: 5 s otherwise. Under this storm hardly a login holds so long, and every wait would be the longest.
HELD_S = 0.5


@contextmanager
def in_haste() -> Iterator[None]:
    """Short waits for all links that this process opens in the block."""
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
    with in_haste():
        main()
