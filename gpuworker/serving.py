"""`gpuworker run`: runs a worker in its own process until it has drained or a signal ends it."""

import faulthandler
import signal
import sys
from functools import partial

import trio

from gpuworker.config import WorkerConfig
from gpuworker.health import LEAVE_S, HealthService
from gpuworker.identity import Identity
from gpuworker.slots.process_slot import EngineHost, ProcessSlot
from gpuworker.slots.slot import Slot
from gpuworker.slots.thread_slot import ThreadSlot
from gpuworker.status import WorkerError
from gpuworker.worker import Worker
from protocol.commands.exit_codes import DONE, FAILED, INTERRUPTED
from protocol.exit_deadline import end_within, prepare_exit_deadline
from protocol.log_lines import set_up_log
from protocol.printable import printable
from protocol.sd_notify import ServiceManager


def run_worker(config: WorkerConfig) -> int:
    """Register with a relay and run its requests; returns the exit code (docs/design.md §11)."""
    set_up_log("gpuworker", config.log_level, config.log_format)
    faulthandler.enable()  # systemd's watchdog ends a hung worker with SIGABRT: the log then shows where it hung
    prepare_exit_deadline()
    try:
        return trio.run(_serve, config)
    except WorkerError as fault:
        print(printable(f"gpuworker: {fault.code}: {fault}"), file=sys.stderr)
        return FAILED
    finally:
        end_within(LEAVE_S)


async def _serve(config: WorkerConfig) -> int:
    slots = make_slots(config)
    worker = Worker(
        Identity(name=config.name, spaces=config.spaces, engine=config.engine, token=config.token),
        config.address,
        slots,
        drain_timeout_s=config.drain_timeout_s,
        on_leave=partial(end_within, LEAVE_S),
    )
    manager = ServiceManager.from_environment()
    service = HealthService(worker, slots, manager, config.cancel_grace_s, config.drain_timeout_s)
    received: list[int] = []
    failure: WorkerError | None = None
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:

            async def listen() -> None:
                async for number in signals:
                    received.append(number)
                    if len(received) == 1:
                        worker.drain(f"{signal.Signals(number).name}; send it again to stop at once")
                        service.stopping()
                    else:
                        worker.stop()

            nursery.start_soon(listen)
            nursery.start_soon(service.serve)
            try:
                await worker.run()
            except WorkerError as fault:  # stored, because a nursery would wrap it in a group
                failure = fault
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return INTERRUPTED if signal.SIGINT in received or len(received) > 1 else DONE


def make_slots(config: WorkerConfig) -> list[Slot]:
    """Make the slots of a worker; they are not served yet."""
    if config.in_threads:
        make = partial(config.engine_class, config.options)
        return [ThreadSlot(index, make, cancel_grace_s=config.cancel_grace_s) for index in range(config.slots)]
    loading = trio.Lock()

    def make_host() -> EngineHost:
        return EngineHost(
            config.engine,
            config.options,
            shared=config.shared,
            loading=loading,
            load_timeout_s=config.load_timeout_s,
            cancel_grace_s=config.cancel_grace_s,
            stall_timeout_s=config.stall_timeout_s,
        )

    one = make_host() if config.shared else None
    return [ProcessSlot(index, one or make_host()) for index in range(config.slots)]
