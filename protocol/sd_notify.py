"""What a service tells systemd: ready, reloading, stopping, how it stands, and that it is alive (sd_notify(3)).

Outside systemd, which is where `NOTIFY_SOCKET` is not set, all of it does nothing. Nothing here raises: a service goes
on whether or not its manager listens.
"""

import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Self

import attrs
import trio

#: For a message to be taken. systemd queues hundreds of them; where it takes none, the service must not wait for it.
SEND_S = 0.2
#: Status lines end on one line of `systemctl status`.
MAX_STATUS_CHARS = 400

log = logging.getLogger("systemd")

#: Tells what is wrong, "" for nothing. It may take its time: who asks sets the deadline.
Check = Callable[[], Awaitable[str]]


@attrs.define(eq=False)
class ServiceManager:
    """The service manager that started this process, if one did.

    Args:
        address: of its socket; a leading `@` is the abstract namespace's, "" is no manager at all.
        watchdog_s: it kills a service that says nothing for so long; None where it does not.
    """

    address: str = ""
    watchdog_s: float | None = None
    _status: str = ""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Self:
        """As systemd says it: `NOTIFY_SOCKET`, and `WATCHDOG_USEC` unless `WATCHDOG_PID` is another process."""
        environ = os.environ if environ is None else environ
        usec, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
        watched = usec.isdecimal() and int(usec) > 0 and pid in ("", str(os.getpid()))
        return cls(environ.get("NOTIFY_SOCKET", ""), int(usec) / 1e6 if watched else None)

    @property
    def present(self) -> bool:
        """Whether anybody is told anything."""
        return bool(self.address)

    def ready(self, status: str) -> None:
        """All doors are open; also said when a reload is over."""
        self._status = _one_line(status)
        self._say("READY=1", f"STATUS={self._status}")

    def starting(self, status: str, within_s: float) -> None:
        """Not ready yet, and not to be given up if it says so again `within_s`, whatever `TimeoutStartSec` says."""
        self.status(status)
        self._say(f"EXTEND_TIMEOUT_USEC={int(within_s * 1e6)}")

    def reloading(self) -> None:
        """The settings are being read again; `ready` ends it."""
        # systemd 253 and later want the time, to tell this reload from one before it.
        self._say("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, status: str, within_s: float) -> None:
        """This process is about to leave, and may take `within_s` for it, whatever `TimeoutStopSec` says."""
        self._status = _one_line(status)
        # In this order: a time asked for before it is known to stop would be added to another timeout.
        self._say("STOPPING=1", f"STATUS={self._status}")
        self._say(f"EXTEND_TIMEOUT_USEC={int(within_s * 1e6)}")

    def status(self, words: str) -> None:
        """How it stands, for `systemctl status`; said only where it has changed."""
        words = _one_line(words)
        if words != self._status:
            self._status = words
            self._say(f"STATUS={words}")

    def alive(self) -> None:
        """A sign of life for the watchdog."""
        self._say("WATCHDOG=1")

    def _say(self, *lines: str) -> None:
        if not self.address:
            return
        path = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(SEND_S)
                sock.connect(path)
                sock.send("\n".join(lines).encode(errors="replace"))
        except (OSError, ValueError) as fault:  # ValueError: an address that is none
            log.warning("systemd was not told %s: %s", lines[0], fault)


def _one_line(words: str) -> str:
    """What a peer may have put into `words` must not look like a message of ours."""
    return "".join(sign if sign.isprintable() else " " for sign in words)[:MAX_STATUS_CHARS]


async def serve_watchdog(manager: ServiceManager, checks: Mapping[str, Check]) -> None:
    """Give signs of life for as long as every check finds nothing; returns where nobody waits for any.

    Two rounds fall into one `watchdog_s`, and a check has a quarter of it: a sign of life is late only if checks failed
    or the event loop stood still, and one bad moment kills nobody.

    Args:
        manager: told.
        checks: by the name of what they look at.
    """
    if not manager.present or manager.watchdog_s is None:
        return
    ill = False
    while True:
        began = trio.current_time()
        faults = await run_checks(checks, manager.watchdog_s / 4)
        if not faults:
            manager.alive()
        if faults:
            log.error("not healthy, so systemd gets no sign of life: %s", "; ".join(faults))
        elif ill:
            log.warning("healthy again")
        ill = bool(faults)
        await trio.sleep_until(began + manager.watchdog_s / 2)


async def run_checks(checks: Mapping[str, Check], deadline_s: float) -> list[str]:
    """Run all checks at once; what is wrong, in words. One that does not answer in time is wrong, too."""
    found: dict[str, str] = {}

    async def run(name: str, check: Check) -> None:
        try:
            found[name] = await check()
        except Exception as fault:
            log.exception("the check of %s broke", name)
            found[name] = f"the check broke: {fault!r}"

    with trio.move_on_after(deadline_s):
        async with trio.open_nursery() as nursery:
            for name, check in checks.items():
                nursery.start_soon(run, name, check)
    late = f"no answer within {deadline_s:g} s"
    return [f"{name}: {words}" for name in checks if (words := found.get(name, late))]
