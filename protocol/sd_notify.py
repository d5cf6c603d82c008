"""Reports the state of a service to systemd: ready, reloading, stopping, its status line, and its watchdog's signal.

Without systemd (`NOTIFY_SOCKET` is not set), nothing happens. Nothing here raises: a service continues
whether or not its manager listens. See sd_notify(3).
"""

import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Self

import attrs
import trio

#: Time to send a message. systemd queues hundreds of them; if it accepts none, the service must not wait for it.
SEND_S = 0.2
#: Status lines are cut to one line of `systemctl status`.
MAX_STATUS_CHARS = 400

log = logging.getLogger("systemd")

#: Returns what is wrong, "" for nothing. It may take its time: the caller sets the deadline.
Check = Callable[[], Awaitable[str]]


@attrs.define(eq=False)
class ServiceManager:
    """The service manager that started this process, if there is one.

    Args:
        address: of its socket; a leading `@` means the abstract namespace, "" means no manager.
        watchdog_s: it kills a service that is silent for this long; None if it does not.
    """

    address: str = ""
    watchdog_s: float | None = None
    _status: str = ""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Read `NOTIFY_SOCKET`, and `WATCHDOG_USEC` unless `WATCHDOG_PID` names another process."""
        environ = os.environ if environ is None else environ
        usec, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
        watched = usec.isdecimal() and int(usec) > 0 and pid in ("", str(os.getpid()))
        return cls(environ.get("NOTIFY_SOCKET", ""), int(usec) / 1e6 if watched else None)

    @property
    def present(self) -> bool:
        """Whether there is a manager to report to."""
        return bool(self.address)

    def ready(self, status: str) -> None:
        """Report that the service is ready, also at the end of a reload."""
        self._status = _one_line(status)
        self._send("READY=1", f"STATUS={self._status}")

    def starting(self, status: str, within_s: float) -> None:
        """Report that the service is still starting and will report again `within_s`, overriding `TimeoutStartSec`."""
        self.status(status)
        self._send(f"EXTEND_TIMEOUT_USEC={int(within_s * 1e6)}")

    def reloading(self) -> None:
        """Report that the settings are being read again; `ready` ends it."""
        # systemd 253 and later need the time, to tell this reload from an earlier one.
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, status: str, within_s: float) -> None:
        """Report that the service is stopping and may take `within_s` for it, overriding `TimeoutStopSec`."""
        self._status = _one_line(status)
        # In this order: time requested before systemd knows of the stop would be added to another timeout.
        self._send("STOPPING=1", f"STATUS={self._status}")
        self._send(f"EXTEND_TIMEOUT_USEC={int(within_s * 1e6)}")

    def status(self, text: str) -> None:
        """Set the line shown by `systemctl status`; sent only if it has changed."""
        text = _one_line(text)
        if text != self._status:
            self._status = text
            self._send(f"STATUS={text}")

    def alive(self) -> None:
        """Send the watchdog's sign of life."""
        self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> None:
        if not self.address:
            return
        path = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(SEND_S)
                sock.connect(path)
                sock.send("\n".join(lines).encode(errors="replace"))
        except (OSError, ValueError) as fault:  # ValueError: an address that is not valid
            log.warning("systemd could not be notified of %s: %s", lines[0], fault)


def _one_line(text: str) -> str:
    """Text from a peer must not look like a message of ours."""
    return "".join(char if char.isprintable() else " " for char in text)[:MAX_STATUS_CHARS]


async def serve_watchdog(manager: ServiceManager, checks: Mapping[str, Check]) -> None:
    """Send signs of life as long as no check reports a fault; returns if there is no watchdog.

    There are two rounds in each `watchdog_s`, and a check has a quarter of it: a sign of life is late only if checks
    failed or the event loop was blocked, and a single delay does not kill the service.

    Args:
        manager: the manager to report to.
        checks: by the name of what they check.
    """
    if not manager.present or manager.watchdog_s is None:
        return
    unhealthy = False
    while True:
        began = trio.current_time()
        faults = await run_checks(checks, manager.watchdog_s / 4)
        if not faults:
            manager.alive()
        if faults:
            log.error("not healthy, so systemd gets no sign of life: %s", "; ".join(faults))
        elif unhealthy:
            log.warning("healthy again")
        unhealthy = bool(faults)
        await trio.sleep_until(began + manager.watchdog_s / 2)


async def run_checks(checks: Mapping[str, Check], deadline_s: float) -> list[str]:
    """Run all checks concurrently and return the faults. A check that does not answer in time counts as one."""
    found: dict[str, str] = {}

    async def run(name: str, check: Check) -> None:
        try:
            found[name] = await check()
        except Exception as fault:
            log.exception("the check of %s raised an error", name)
            found[name] = f"the check raised an error: {fault!r}"

    with trio.move_on_after(deadline_s):
        async with trio.open_nursery() as nursery:
            for name, check in checks.items():
                nursery.start_soon(run, name, check)
    late = f"no answer within {deadline_s:g} s"
    return [f"{name}: {fault}" for name in checks if (fault := found.get(name, late))]
