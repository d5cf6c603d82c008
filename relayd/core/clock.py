"""The relay's own clock: seconds that it has run, over all of its lives, however each of them ended.

Deadlines outlive a restart by it. The wall clock may jump, and the time that the relay was away counts for nobody:
no worker could come back to it, and no slot was handed out.
"""

from typing import Protocol

import attrs
import structlog
import trio

from relayd.store.base import Store, StoreError
from relayd.store.records import Loaded, PutUptime

log = structlog.get_logger("relayd")

#: A relay that is killed has lost this much of its time at most.
SAVE_INTERVAL_S = 1.0


@attrs.frozen
class RelayClock:
    """Translates between the times of this life (of Trio) and those of all lives together.

    Args:
        earlier_s: all lives before this one.
        started_at: when this one began.
    """

    earlier_s: float = 0.0
    started_at: float = attrs.field(factory=trio.current_time)

    @classmethod
    def after(cls, loaded: Loaded) -> "RelayClock":
        """The clock goes on where the store says that it stood, or where the latest of its records was written."""
        times = (time for record in loaded.requests for time in (record.since, record.away_since) if time is not None)
        return cls(max([loaded.uptime_s, *times]))

    def of(self, trio_time: float) -> float:
        """A time of this life, for the store."""
        return self.earlier_s + trio_time - self.started_at

    def trio_time(self, stored: float | None) -> float:
        """A time of the store's as one of this life, whose beginning it is where the store knows none."""
        return self.started_at if stored is None else self.started_at - (self.earlier_s - stored)


class Ticking(Protocol):
    """The relay, as far as its clock goes."""

    clock: RelayClock
    store: Store

    @property
    def has_live_requests(self) -> bool:
        """Whether the time counts for anybody."""


async def serve_clock(relay: Ticking) -> None:
    """Store how long the relay has run, while requests have deadlines; until cancelled."""
    while True:
        await trio.sleep(SAVE_INTERVAL_S)
        if relay.has_live_requests:
            try:
                await relay.store.commit(PutUptime(relay.clock.of(trio.current_time())))
            except StoreError:
                continue  # the store tells it
            except Exception:
                log.exception("internal error in clock loop")
