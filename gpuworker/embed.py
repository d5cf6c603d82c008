"""Serve a callable from inside a program that already runs: a Gradio app with its model loaded, say.

    from gpuworker.embed import serve

    handle = serve(speak, url="wss://relay.example.org", space="tts", token="rly_w_...")
    ...
    handle.status().state       # "registered"
    handle.stop()

The worker has a daemon thread and a Trio loop of its own; each slot calls the callable in one more thread. The
program's own event loop, signal handlers and logging are left alone (loggers `gpuworker` and `gpuworker.slot` report
what happens).
"""

import atexit
import contextlib
import os
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import trio

from gpuworker.config import worker_name
from gpuworker.engines.base import Engine, EngineError, OptionError
from gpuworker.engines.function.engine import FunctionEngine
from gpuworker.identity import Identity
from gpuworker.slots.process_slot import CANCEL_GRACE_S
from gpuworker.slots.thread_slot import ThreadSlot
from gpuworker.status import WorkerStatus
from gpuworker.worker import Worker
from protocol.client.address import from_environment, token_from_environment
from protocol.link.dial import Connect
from protocol.wire.messages import SPACE_PATTERN
from protocol.wire.validators import Value

#: For the first answer of the relay. A program must come up without its relay too, so this is short.
START_S = 5.0
STOP_S = 5.0


class EmbedError(Exception):
    """The worker did not start, and will not; the text says why and what to do."""


class Handle:
    """A worker that runs in this program; made by `serve`."""

    def __init__(self, make_worker: "Callable[[Callable[[], None]], Worker]") -> None:
        self._make_worker = make_worker
        self._changed = threading.Condition()
        self._worker: Worker | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._status: WorkerStatus | None = None
        self._failure: BaseException | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpuworker", daemon=True)

    def status(self) -> WorkerStatus:
        """How the worker stands; from any thread."""
        assert self._status is not None
        return self._status

    def stop(self, timeout_s: float = STOP_S, *, drain: bool = False) -> bool:
        """End the worker; may be called again, from any thread, and after it ended by itself.

        Args:
            timeout_s: how long to wait for its end.
            drain: finish and deliver what runs first.

        Returns:
            whether it has ended. A call of the callable that does not return is left behind in its thread.
        """
        atexit.unregister(self.stop)
        if self._token is not None and self._worker is not None and not self._ended.is_set():
            call = partial(self._worker.drain, "the program stops") if drain else self._worker.stop
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(call)
        if threading.current_thread() is self._thread:
            return False
        return self._ended.wait(timeout_s)

    def start(self, wait_s: float) -> None:
        """Start the thread and wait for the relay's first answer; `serve` calls it."""
        self._thread.start()
        atexit.register(self.stop)
        with self._changed:
            self._changed.wait_for(lambda: self._status is not None or self._ended.is_set())
            self._changed.wait_for(self._answered, wait_s)
        if self._failure is not None:
            raise EmbedError(str(self._failure)) from self._failure

    def _answered(self) -> bool:
        # Not by the state "stopped", which is told a moment before its reason.
        return self._ended.is_set() or (self._status is not None and self._status.state in ("registered", "draining"))

    def _note(self) -> None:
        with self._changed:
            if self._worker is not None:
                self._status = self._worker.status
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as fault:  # noqa: BLE001 - the thread's end; told by `start` and by `status`
            self._failure = fault
        finally:
            self._ended.set()
            self._note()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._worker = self._make_worker(self._note)
        self._note()
        await self._worker.run()


def serve(
    call: Callable[..., Any] | Callable[[], Engine],
    *,
    space: str,
    url: str | None = None,
    token: str | None = None,
    name: str | None = None,
    slots: int = 1,
    sample_rate: int | None = None,
    channels: int = 1,
    reproducible: bool = False,
    params: Mapping[str, Value] | None = None,
    cancel_grace_s: float = CANCEL_GRACE_S,
    wait_s: float = START_S,
    connect_to: Connect | None = None,
) -> Handle:
    """Serve `call` as a space, from a thread of this program.

    Args:
        call: any callable, as engine `function` takes it, or a subclass of `Engine` without required options. Of a
            class, each slot makes an instance of its own in its own thread.
        space: its name at the relay.
        url: of the relay; else RELAY_URL, else this machine's relay.
        token: of a worker; else RELAY_TOKEN or RELAY_TOKEN_FILE.
        name: of this worker, for people; the machine's by default.
        slots: calls at once. One, unless `call` may be called from several threads at the same time.
        sample_rate: Hz, where it returns audio without saying its rate.
        channels: 1 or 2, with `sample_rate`.
        reproducible: the same params always make the same output.
        params: JSON Schema of the params, in place of the one read from the signature (ranges, choices).
        cancel_grace_s: from a cancel to giving a call up that does not stop.
        wait_s: for the relay's first answer, seconds; 0 does not wait.
        connect_to: makes the transport; for tests and tunnels.

    Returns:
        a handle. Its worker is registered, or still trying where the relay did not answer within `wait_s`.

    Raises:
        EmbedError: the callable cannot be served, or the relay refuses the token, the space or this worker.
        ValueError: an argument is wrong.
    """
    if not SPACE_PATTERN.fullmatch(space):
        raise ValueError(f"{space!r} is no space name ({SPACE_PATTERN.pattern})")
    if slots < 1:
        raise ValueError(f"slots is {slots}; it must be at least 1")
    address = from_environment(url)
    token = token if token is not None else token_from_environment()
    make_engine: Callable[[], Engine]
    if isinstance(call, type) and issubclass(call, Engine):
        make_engine = call
    else:
        options = {"sample_rate": sample_rate, "channels": channels, "reproducible": reproducible}
        make_engine = partial(FunctionEngine, options, call, params)
        try:
            engine = make_engine()
            if not isinstance(call, type):  # that would be made twice, and each may be a model
                engine.load()  # here, so that its faults are raised where they were made
        except (EngineError, OptionError) as fault:
            raise EmbedError(str(fault)) from None
    identity = Identity(
        name=f"{worker_name(name)}-{os.getpid()}" if name is None else worker_name(name),
        spaces=(space,),
        engine=getattr(call, "__qualname__", type(call).__qualname__)[:128],
        token=token,
    )

    def make_worker(on_status: Callable[[], None]) -> Worker:
        return Worker(
            identity,
            address,
            [ThreadSlot(index, make_engine, cancel_grace_s=cancel_grace_s) for index in range(slots)],
            connect_to=connect_to,
            on_status=on_status,
        )

    handle = Handle(make_worker)
    handle.start(wait_s)
    return handle
