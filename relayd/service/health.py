"""The daemon as a service: reports its state to systemd, and signs of life while its health checks pass.

Alive means: the event loop turns, the store's writer takes its turn, and whoever knocks at a door is let in. A disk or
a table of files that is merely full is no illness: a restart would cure nothing and cut every stream.
"""

import logging
import socket
from collections.abc import Mapping

import attrs
import trio

from protocol.sd_notify import Check, ServiceManager, serve_watchdog
from relayd.core.relay import Relay
from relayd.store.base import StoreError

#: How often the line of `systemctl status` is looked over.
STATUS_INTERVAL_S = 5.0
#: After the drain: links are closed and the store is written, each with a deadline of its own.
LEAVE_S = 30.0

log = logging.getLogger("relayd.systemd")


@attrs.define(eq=False)
class HealthService:
    """What systemd is told of a relay whose doors are, by their URLs, `doors`."""

    relay: Relay
    doors: Mapping[str, trio.SocketListener]
    manager: ServiceManager

    async def serve(self) -> None:
        """Say that all is ready, and go on telling until cancelled. The doors must be open."""
        self.manager.ready(self.status())
        if not self.manager.present:
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_watchdog, self.manager, self.health_checks())
            nursery.start_soon(self._report_stopping)
            while True:
                await trio.sleep(STATUS_INTERVAL_S)
                self.manager.status(self.status())

    def status(self) -> str:
        """The relay in one line."""
        relay = self.relay
        queued = sum(len(space.queue) for space in relay.scheduler.state.spaces.values())
        counts = f"{relay.running_count} running, {queued} queued"
        if relay.draining.is_set():
            return f"draining: {counts}"
        workers = f"{len(relay.workers)} worker{'' if len(relay.workers) == 1 else 's'}"
        return f"{workers}, {counts}; listens on {', '.join(self.doors)}"

    async def _report_stopping(self) -> None:
        await self.relay.draining.wait()
        self.manager.stopping(self.status(), self.relay.config.drain_timeout_s + LEAVE_S)

    # -- is it alive

    def health_checks(self) -> dict[str, Check]:
        """What the watchdog looks at."""
        doors = {f"door {url}": ListenerCheck(self.relay, listener).check for url, listener in self.doors.items()}
        return {"store": self._check_store, **doors}

    async def _check_store(self) -> str:
        try:
            await self.relay.store.flush()  # waits its turn behind all that is queued, as any commit does
        except StoreError:
            return ""  # the disk says no, and that is an answer; the store tells it and tries again
        return ""


@attrs.frozen
class ListenerCheck:
    """Whether one listener still accepts connections."""

    relay: Relay
    listener: trio.SocketListener

    async def check(self) -> str:
        """Knock, and wait to be answered: a connection that says nothing and hangs up is hung up on."""
        if self.relay.draining.is_set():
            return ""  # closed on purpose
        sock = self.listener.socket
        try:
            address = sock.getsockname()
            probe = trio.socket.socket(sock.family, sock.type)
        except OSError as fault:  # no descriptor is left, or the doors are being closed just now
            log.warning("health check: listener does not answer: %s", fault)
            return ""
        with probe:
            try:
                await probe.connect(address)
            except OSError as fault:  # a firewall, or a socket file that was deleted: it is not the loop that stands
                log.warning("health check: listener %s does not answer: %s", address, fault)
                return ""
            try:
                probe.getpeername()
            except OSError:  # Trio takes EAGAIN for a connect under way; a unix socket means a backlog that is full
                return "nobody empties its backlog"
            try:
                probe.shutdown(socket.SHUT_WR)
                await probe.recv(1)
            except OSError:
                return ""  # hung up on, harder
        return ""
