"""The main program of an engine's process: it loads one engine, and runs one request at a time in each of its slots.

Started as `python -P -m gpuworker.slots.engine_main FD PARENT_PID`.

It talks to the worker only over the socket `FD`. It ends when the worker ends, for whatever reason: by the parent-death
signal, and by the end of the socket. The worker handles signals: this process ignores those that a terminal or systemd
sends to the whole group.
"""

import contextlib
import ctypes
import faulthandler
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from typing import Any

import attrs

from gpuworker.engines.base import (
    Chunk,
    Engine,
    EngineError,
    EngineInput,
    LiveInput,
    OptionError,
    RequestContext,
    error_text,
)
from gpuworker.engines.catalog import EngineNotFound, find_engine
from gpuworker.slots import ipc
from gpuworker.slots.run_engine import run_engine
from gpuworker.speaking.speaking import with_live_text

_PR_SET_PDEATHSIG = 1
_READ_BYTES = 64 * 1024


def _isolate(parent_pid: int) -> None:
    """Die with the parent, ignore signals sent to the whole group, and keep stdout off the pipe."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # the parent ended before the line above
        os._exit(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()
    os.dup2(2, 1)  # engines and their C libraries may print
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a TextIOWrapper here


@attrs.define(eq=False)
class Seat:
    """What the process knows of one slot: the runs to come, and the last one that was cancelled.

    `live` has the live inputs of the run that came last.
    """

    index: int
    runs: "queue.SimpleQueue[tuple[ipc.IpcMessage, dict[str, LiveInput]]]" = attrs.field(factory=queue.SimpleQueue)
    cancelled_run: int = -1
    last_run: int = -1
    live: dict[str, LiveInput] = attrs.field(factory=dict)


class EngineMain:
    """The engine process's end of the pipe.

    Args:
        sock: a socket connected to the worker.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sending = threading.Lock()
        self._loads: queue.SimpleQueue[ipc.IpcMessage] = queue.SimpleQueue()
        self._seats: list[Seat] = []

    def read_commands(self) -> None:
        """Read commands until the socket ends, which ends the process; runs in its own thread.

        Only this thread notices a `cancel` while the engine works, or the end of the worker while the engine hangs.
        """
        inbox = ipc.Inbox()
        while True:
            try:
                data = self._sock.recv(_READ_BYTES)
                commands = inbox.feed(data)
                for message in commands:
                    self._obey(message)
            except BaseException:  # noqa: BLE001 - whatever it is (no memory): without this thread the slot is deaf
                os._exit(1)
            if not data:
                os._exit(0)

    def _obey(self, message: ipc.IpcMessage) -> None:
        if message["do"] == "load":
            self._seats = [Seat(index) for index in range(message["seats"])]
            self._loads.put(message)
            return
        seat, run = self._seats[message["slot"]], message["run"]
        if message["do"] == "run":  # its live inputs are made here: their bytes may come before the slot's thread looks
            seat.last_run = run
            seat.live = {name: self._live_input(seat, run, name, kind) for name, kind in message["live"].items()}
            seat.runs.put((message, seat.live))
        elif message["do"] == "cancel":
            seat.cancelled_run = max(seat.cancelled_run, run)
            for live in seat.live.values() if run == seat.last_run else ():
                live.stop()
        elif run == seat.last_run:
            seat.live[message["name"]].feed(message["data"], last=message["last"])

    def _live_input(self, seat: Seat, run: int, name: str, media_type: str) -> LiveInput:
        def on_ask(taken: int) -> None:
            self._send({"slot": seat.index, "is": "asks", "run": run, "name": name, "taken": taken})

        return LiveInput(media_type, on_ask)

    def _send(self, message: ipc.IpcMessage) -> None:
        # Blocks while the worker does not read: the engine is ahead of it by no more than the socket's buffer.
        with self._sending:
            self._sock.sendall(ipc.pack(message))

    def serve(self) -> None:
        """Load the engine and run requests, until the engine must be restarted."""
        engines = self._load(self._loads.get())
        if len(engines) == 1:
            self._drive(self._seats[0], engines[0])  # in the thread that loaded it
        elif engines:
            self._drive_all(engines)

    def _drive_all(self, engines: list[Engine]) -> None:
        """Run the requests of all slots, each in its own thread, until the engine must be restarted."""
        ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def drive(seat: Seat, engine: Engine) -> None:
            try:
                self._drive(seat, engine)
            except BaseException as fault:  # noqa: BLE001 - nobody would notice a slot without a thread
                ended.put(fault)
            else:
                ended.put(None)

        for seat, engine in zip(self._seats, engines, strict=True):
            threading.Thread(target=drive, args=(seat, engine), name=f"slot {seat.index}", daemon=True).start()
        if (fault := ended.get()) is not None:
            raise fault

    def _drive(self, seat: Seat, engine: Engine) -> None:
        """Run the requests of one slot, until the engine must be restarted."""
        while True:
            message, live = seat.runs.get()
            run: int = message["run"]

            def cancelled(run: int = run) -> bool:
                return seat.cancelled_run >= run

            def emit(chunk: Chunk) -> None:
                self._send({"slot": seat.index, **ipc.encode_chunk(chunk)})

            inputs = {**{name: EngineInput(**item) for name, item in message["inputs"].items()}, **live}
            end = run_engine(engine, message["params"], inputs, cancelled, emit, RequestContext(**message["context"]))
            for each in live.values():  # a thread of the engine's own may still wait for more
                each.stop()
            for stream in (sys.stdout, sys.stderr):  # what this run printed belongs under its own name in the log
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            self._send({"slot": seat.index, "is": "end", **attrs.asdict(end)})
            if end.restart:
                return

    def _load(self, message: dict[str, Any]) -> list[Engine]:
        """The engines of the slots; empty if they cannot be loaded, which the worker has been told then."""
        try:
            engine = find_engine(message["engine"])(message["options"])
            engine.report = lambda progress: self._send(ipc.encode_chunk(progress))
            engine.load()
            engines = list(engine.seats(len(self._seats))) if engine.SHARED else [engine]
            if len(engines) != len(self._seats):
                raise EngineError(f"the engine made {len(engines)} seats for {len(self._seats)} slots")
            engine.report = Engine.report
            self._send({"is": "ready", "capabilities": ipc.encode_capabilities(with_live_text(engine.capabilities))})
        except (EngineError, OptionError, EngineNotFound) as fault:
            self._send({"is": "load_failed", "message": error_text(fault)})
        except Exception as fault:  # noqa: BLE001 - a model's loader may raise anything; the worker reports it
            traceback.print_exc()
            self._send({"is": "load_failed", "message": f"{type(fault).__name__}: {error_text(fault)}"})
        else:
            return engines
        return []


def main(arguments: list[str]) -> None:
    """Entry point of the process."""
    _isolate(int(arguments[1]))
    with socket.socket(fileno=int(arguments[0])) as sock:
        sock.set_inheritable(False)
        process = EngineMain(sock)
        threading.Thread(target=process.read_commands, name="commands", daemon=True).start()
        code = 1
        try:
            process.serve()
            code = 0
        except BaseException:  # noqa: BLE001 - MemoryError, and what an engine leaves in this thread
            with contextlib.suppress(MemoryError):
                traceback.print_exc()
        finally:
            # Do not return: threads and atexit handlers of a failed engine may hang.
            with contextlib.suppress(Exception):
                sys.stderr.flush()
            os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
