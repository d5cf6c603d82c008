"""Reports the daemon's state to systemd, and watchdog pings while its health checks pass.

Healthy means that the event loop runs, the store's writer makes progress, and the listeners accept connections. A full
disk or file table is not a failure: a restart would not help and would interrupt every stream.
"""

import logging
import socket
from collections.abc import Mapping

import attrs
import trio

from protocol.sd_notify import Check, ServiceManager, serve_watchdog
from relayd.core.relay import Relay
from relayd.store.base import StoreError

#: How often the status line of `systemctl status` is updated.
STATUS_INTERVAL_S = 5.0
#: How long closing the links and writing the store may take after the drain.
LEAVE_S = 30.0

log = logging.getLogger("relayd.systemd")


@attrs.define(eq=False)
class HealthService:
    """Reports on a relay with `listeners`, by their URLs."""

    relay: Relay
    listeners: Mapping[str, trio.SocketListener]
    manager: ServiceManager

    async def serve(self) -> None:
        """Report readiness, then the status until cancelled. The listeners must be open."""
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
        """Describe the relay in one line."""
        relay = self.relay
        queued = sum(len(space.queue) for space in relay.scheduler.state.spaces.values())
        counts = f"{relay.running_count} running, {queued} queued"
        if relay.draining.is_set():
            return f"draining: {counts}"
        workers = f"{len(relay.workers)} worker{'' if len(relay.workers) == 1 else 's'}"
        return f"{workers}, {counts}; listens on {', '.join(self.listeners)}"

    async def _report_stopping(self) -> None:
        await self.relay.draining.wait()
        self.manager.stopping(self.status(), self.relay.config.drain_timeout_s + LEAVE_S)

    # -- health checks

    def health_checks(self) -> dict[str, Check]:
        """Return the health checks of the watchdog."""
        checks = {f"listener {url}": ListenerCheck(self.relay, each).check for url, each in self.listeners.items()}
        return {"store": self._check_store, **checks}

    async def _check_store(self) -> str:
        try:
            await self.relay.store.flush()  # waits in the queue, as any commit does
        except StoreError:
            return ""  # the disk refuses writes, but the writer runs; the store logs the error and retries
        return ""


@attrs.frozen
class ListenerCheck:
    """Whether one listener still accepts connections."""

    relay: Relay
    listener: trio.SocketListener

    async def check(self) -> str:
        """Connect, close the sending side, and wait until the relay closes the connection."""
        if self.relay.draining.is_set():
            return ""  # closed on purpose
        sock = self.listener.socket
        try:
            address = sock.getsockname()
            probe = trio.socket.socket(sock.family, sock.type)
        except OSError as fault:  # no file descriptor is left, or the listeners are being closed
            log.warning("health check: listener does not answer: %s", fault)
            return ""
        with probe:
            try:
                await probe.connect(address)
            except OSError as fault:  # a firewall or a deleted socket file: the event loop is not hung
                log.warning("health check: listener %s does not answer: %s", address, fault)
                return ""
            try:
                probe.getpeername()
            except OSError:  # Trio treats EAGAIN as a connect in progress; for a unix socket it means a full backlog
                return "its backlog is full"
            try:
                probe.shutdown(socket.SHUT_WR)
                await probe.recv(1)
            except OSError:
                return ""  # closed with a reset
        return ""
