"""Reports the state of the worker to systemd, and sends the watchdog's signs of life while it is healthy.

A worker is ready once an engine is loaded in a slot, with or without a relay: a relay that is down at boot must not
fail the unit, as the worker keeps trying for ever. It is alive while its event loop runs and no slot is stuck: a run
that was asked to stop is killed after its grace, so one that still runs long after shows that the worker has lost
control of its slots. An engine that hangs, crashes or cannot be loaded is handled by its slot alone.
"""

from collections.abc import Sequence

import attrs
import trio

from gpuworker.slots.slot import Run, Slot
from gpuworker.status import WorkerStatus
from gpuworker.worker import ACK_S, Worker
from protocol.sd_notify import ServiceManager, serve_watchdog

#: How often the line of `systemctl status` is updated and readiness is checked.
STATUS_INTERVAL_S = 1.0
#: Between two signs of life while engines load. The worker itself limits how long that may take: a download may
#: take hours, and a load that hangs is killed after `--load-timeout`.
START_S = 60.0
#: Time past the grace of a cancel: for the kill, and for a process that the kernel is slow to end.
STUCK_S = 30.0
#: Time after the drain: slots are killed and reaped.
LEAVE_S = 20.0


@attrs.define(eq=False)
class HealthService:
    """What systemd is told about a worker.

    Args:
        worker: a worker that does not run yet.
        slots: its slots.
        manager: the connection to systemd.
        cancel_grace_s: the slots' setting.
        drain_timeout_s: the worker's setting.
    """

    worker: Worker
    slots: Sequence[Slot]
    manager: ServiceManager
    cancel_grace_s: float
    drain_timeout_s: float
    #: Run that was asked to stop -> when this was first seen.
    _stopping: dict[Run, float] = attrs.field(factory=dict)

    async def serve(self) -> None:
        """Report until cancelled; start it together with the worker's `run`."""
        if not self.manager.present:
            return
        while not any(slot.ready for slot in self.slots):
            self.manager.starting(self.status(), START_S)
            await trio.sleep(STATUS_INTERVAL_S)
        self.manager.ready(self.status())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_watchdog, self.manager, {"slots": self.check_slots})
            while True:
                await trio.sleep(STATUS_INTERVAL_S)
                self._look_at_slots()
                self.manager.status(self.status())

    def stopping(self) -> None:
        """Whether a signal made it drain. A drain that the relay asked for does not count: it may be undone."""
        self.manager.stopping(self.status(), self.drain_timeout_s + ACK_S + LEAVE_S)

    def status(self) -> str:
        """The worker's state in one line."""
        return in_words(self.worker.status, len(self.slots))

    def _look_at_slots(self) -> None:
        now = trio.current_time()
        runs = [slot.stopping for slot in self.slots]
        self._stopping = {run: self._stopping.get(run, now) for run in runs if run is not None}

    async def check_slots(self) -> str:
        """A description of slots that are stuck, for the watchdog; empty if there are none."""
        await trio.lowlevel.checkpoint()
        self._look_at_slots()
        patience_s = self.cancel_grace_s + STUCK_S
        long_ago = trio.current_time() - patience_s
        overdue = [s.name for s in self.slots if s.stopping and self._stopping[s.stopping] < long_ago]
        return (
            f"{', '.join(overdue)} asked to stop more than {patience_s:g} s ago, and still running" if overdue else ""
        )


def in_words(status: WorkerStatus, slots: int) -> str:
    """A worker's status in one line."""
    spaces = ", ".join(status.spaces)
    where = {
        "loading": "loading its engine",
        "connecting": f"no link to {status.relay}",
        "registered": f"registered at {status.relay}",
        "draining": "draining",
        "stopped": "stopped",
    }[status.state]
    words = f"{where}; space {spaces}: {status.slots} of {slots} slots ready, {status.running} running"
    return f"{words}; {status.fault}" if status.fault else words
