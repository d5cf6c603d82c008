"""Serves a callable from inside a running program, for example a Gradio app that has loaded its model.

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

#: How long to wait for the relay's first answer. Short, because the program must start without its relay too.
START_S = 5.0
STOP_S = 5.0


class EmbedError(Exception):
    """The worker cannot start; the message says why and what to do."""


class Handle:
    """A worker that runs inside this program; returned by `serve`."""

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
        """The current status of the worker; callable from any thread."""
        assert self._status is not None
        return self._status

    def stop(self, timeout_s: float = STOP_S, *, drain: bool = False) -> bool:
        """Stop the worker; callable repeatedly, from any thread, and after the worker has ended by itself.

        Args:
            timeout_s: how long to wait for the worker to end.
            drain: let running requests finish and deliver them first.

        Returns:
            whether it has ended. A call of the callable that does not return stays behind in its thread.
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
        """Start the thread and wait for the relay's first answer; called by `serve`."""
        self._thread.start()
        atexit.register(self.stop)
        with self._changed:
            self._changed.wait_for(lambda: self._status is not None or self._ended.is_set())
            self._changed.wait_for(self._answered, wait_s)
        if self._failure is not None:
            raise EmbedError(str(self._failure)) from self._failure

    def _answered(self) -> bool:
        # Do not wait for the state "stopped": it is set a moment before its reason.
        return self._ended.is_set() or (self._status is not None and self._status.state in ("registered", "draining"))

    def _note(self) -> None:
        with self._changed:
            if self._worker is not None:
                self._status = self._worker.status
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as fault:  # noqa: BLE001 - it ends the thread; `start` and `status` report it
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
        call: any callable that engine `function` accepts, or a subclass of `Engine` without required options. Each
            slot makes its own instance of a class, in its own thread.
        space: its name on the relay.
        url: the relay's address, or several with commas between them; default: RELAY_URL, else the relay on this
            machine.
        token: a worker's token; default: RELAY_TOKEN or RELAY_TOKEN_FILE.
        name: the worker's name as shown to people; default: the host name.
        slots: calls at once. Leave it at one unless `call` may be called from several threads at the same time.
        sample_rate: Hz, for audio that `call` returns without a rate.
        channels: 1 or 2, with `sample_rate`.
        reproducible: the same params always make the same output.
        params: JSON Schema of the params, instead of the one derived from the signature (ranges, choices).
        cancel_grace_s: seconds from a cancel until a call that does not stop is abandoned.
        wait_s: seconds to wait for the relay's first answer; 0 does not wait.
        connect_to: makes the transport; for tests and tunnels.

    Returns:
        a handle. Its worker is registered, or still trying if the relay did not answer within `wait_s`.

    Raises:
        EmbedError: the callable cannot be served, or the relay refuses the token, the space or this worker.
        ValueError: an argument is not valid.
    """
    if not SPACE_PATTERN.fullmatch(space):
        raise ValueError(f"{space!r} is not a valid space name ({SPACE_PATTERN.pattern})")
    if slots < 1:
        raise ValueError(f"slots is {slots}; it must be at least 1")
    address = from_environment(url)
    token = token if token is not None else token_from_environment()
    make_engine: Callable[[], Engine]
    if isinstance(call, type) and issubclass(call, Engine):
        if call.SHARED and slots > 1:
            raise EmbedError(
                f"{call.__qualname__} is a shared engine, which is embedded with one slot; use gpuworker run"
            )
        make_engine = call
    else:
        options = {"sample_rate": sample_rate, "channels": channels, "reproducible": reproducible}
        make_engine = partial(FunctionEngine, options, call, params)
        try:
            engine = make_engine()
            if not isinstance(call, type):  # a class would be instantiated twice, and may hold a model
                engine.load()  # here, so that errors are raised to the caller
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
