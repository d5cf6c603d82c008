"""A standby: a relay that waits until it may use the store, which another one uses."""

import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import attrs
import structlog
import trio

from protocol.sd_notify import ServiceManager
from relayd.store.base import StoreInUse

log = structlog.get_logger("relayd.standby")

#: Signs of life for systemd, beside those that its interval asks for.
ALIVE_S = 5.0


@attrs.define(eq=False)
class Standby:
    """What a relay does while it waits.

    Args:
        leave: ends the relay; called on SIGTERM and SIGINT.
        manager: is told that the service has started, though it only waits.

    Attributes:
        reload_asked: whether SIGHUP came meanwhile: the settings are to be read again.
    """

    leave: Callable[[], None]
    manager: ServiceManager = attrs.field(factory=ServiceManager.from_environment)
    reload_asked: bool = False

    @asynccontextmanager
    async def waiting(self, why: StoreInUse) -> AsyncIterator[None]:
        """Handle signals and satisfy systemd until the block ends."""
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            await nursery.start(self._handle_signals)
            nursery.start_soon(self._stay_alive)
            log.info("standing by", why=f"takes over when it ends: {why.holder}")
            self.manager.ready(f"standby; takes over from {why.holder}")
            yield
            nursery.cancel_scope.cancel()
        log.info("taking over", waited_s=round(trio.current_time() - began, 1))

    async def _handle_signals(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        had_terminal = os.isatty(2)
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            task_status.started()
            async for number in signals:
                if number == signal.SIGHUP and had_terminal == os.isatty(2):
                    self.reload_asked = True
                else:
                    self.leave()

    async def _stay_alive(self) -> None:
        while True:
            self.manager.alive()
            await trio.sleep(ALIVE_S if self.manager.watchdog_s is None else min(self.manager.watchdog_s / 3, ALIVE_S))
