"""Reports the state of the worker to systemd, and sends the watchdog's signs of life while it is healthy.

A worker is ready once an engine is loaded in a slot, with or without a relay: a relay that is down at boot must not
fail the unit, because the worker keeps trying. It is alive while its event loop runs and no slot is stuck: a run that
was asked to stop is killed after its grace, so one that still runs long after that shows that the worker has lost
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
#: Time allowed between two status reports while engines load. The worker itself limits the load: a download may take
#: hours, and a load that hangs is killed after `--load-timeout`.
START_S = 60.0
#: Time added to the grace of a cancel: for the kill, and for a process that the kernel is slow to end.
STUCK_S = 30.0
#: Time allowed after the drain for slots to be killed and reaped.
LEAVE_S = 20.0


@attrs.define(eq=False)
class HealthService:
    """Reports the health of a worker to systemd.

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
    #: A run that was asked to stop -> when this was first noticed.
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
                self._update_stopping()
                self.manager.status(self.status())

    def stopping(self) -> None:
        """Report that a signal made it drain. A drain asked for by the relay does not count: it may be undone."""
        self.manager.stopping(self.status(), self.drain_timeout_s + ACK_S + LEAVE_S)

    def status(self) -> str:
        """The worker's state in one line."""
        return describe_status(self.worker.status, len(self.slots))

    def _update_stopping(self) -> None:
        now = trio.current_time()
        runs = [slot.stopping for slot in self.slots]
        self._stopping = {run: self._stopping.get(run, now) for run in runs if run is not None}

    async def check_slots(self) -> str:
        """A description of slots that are stuck, for the watchdog; empty if there are none."""
        await trio.lowlevel.checkpoint()
        self._update_stopping()
        limit_s = self.cancel_grace_s + STUCK_S
        earliest = trio.current_time() - limit_s
        overdue = [s.name for s in self.slots if s.stopping and self._stopping[s.stopping] < earliest]
        return f"{', '.join(overdue)} still running, asked to stop more than {limit_s:g} s ago" if overdue else ""


def describe_status(status: WorkerStatus, slots: int) -> str:
    """Describe a worker's status in one line."""
    spaces = ", ".join(status.spaces)
    where = {
        "loading": "loading its engine",
        "connecting": f"not connected to {status.relay}",
        "registered": f"registered at {status.relay}",
        "draining": "draining",
        "stopped": "stopped",
    }[status.state]
    text = f"{where}; space {spaces}: {status.slots} of {slots} slots ready, {status.running} running"
    return f"{text}; {status.fault}" if status.fault else text
