"""The main program of an engine's process: it loads one engine and runs one request at a time.

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

from gpuworker.engines.base import Chunk, Engine, EngineError, EngineInput, OptionError, RequestContext, error_text
from gpuworker.engines.catalog import EngineNotFound, find_engine
from gpuworker.slots import ipc
from gpuworker.slots.run_engine import run_engine

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


class EngineMain:
    """The slot process's end of the pipe.

    Args:
        sock: a socket connected to the worker.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._commands: queue.SimpleQueue[ipc.IpcMessage] = queue.SimpleQueue()
        self._cancelled_run = -1

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
                    if message["do"] == "cancel":
                        self._cancelled_run = max(self._cancelled_run, message["run"])
                    else:
                        self._commands.put(message)
            except BaseException:  # noqa: BLE001 - whatever it is (no memory): without this thread the slot is deaf
                os._exit(1)
            if not data:
                os._exit(0)

    def _send(self, message: ipc.IpcMessage) -> None:
        # Blocks while the worker does not read: a slot is ahead of it by no more than the socket's buffer.
        self._sock.sendall(ipc.pack(message))

    def serve(self) -> None:
        """Load the engine and run requests, until the engine must be restarted."""
        engine = self._load(self._commands.get())
        if engine is None:
            return
        while True:
            message = self._commands.get()
            run: int = message["run"]

            def cancelled(run: int = run) -> bool:
                return self._cancelled_run >= run

            def emit(chunk: Chunk) -> None:
                self._send(ipc.encode_chunk(chunk))

            inputs = {name: EngineInput(**item) for name, item in message["inputs"].items()}
            end = run_engine(engine, message["params"], inputs, cancelled, emit, RequestContext(**message["context"]))
            for stream in (sys.stdout, sys.stderr):  # what this run printed belongs under its own name in the log
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            self._send({"is": "end", **attrs.asdict(end)})
            if end.restart:
                return

    def _load(self, message: dict[str, Any]) -> Engine | None:
        try:
            engine = find_engine(message["engine"])(message["options"])
            engine.report = lambda progress: self._send(ipc.encode_chunk(progress))
            engine.load()
            engine.report = Engine.report
            self._send({"is": "ready", "capabilities": ipc.encode_capabilities(engine.capabilities)})
        except (EngineError, OptionError, EngineNotFound) as fault:
            self._send({"is": "load_failed", "message": error_text(fault)})
        except Exception as fault:  # noqa: BLE001 - a model's loader may raise anything; the worker reports it
            traceback.print_exc()
            self._send({"is": "load_failed", "message": f"{type(fault).__name__}: {error_text(fault)}"})
        else:
            return engine
        return None


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
