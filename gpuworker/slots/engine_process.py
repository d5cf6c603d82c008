"""An engine's process as seen by the worker: it is started, written to, logged, killed and reaped here."""

import logging
import math
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from gpuworker.slots import ipc
from protocol.wire.messages import MAX_REPORT_CHARS

_READ_BYTES = 256 * 1024
MAX_LINE_CHARS = 500
#: Lines of a run that operators are told if it fails.
MAX_LINES = 40
#: Time from the end of its socket to the end of the process, before it is killed; allows to learn its exit code.
EXIT_S = 1.0
#: Time to read the rest of stderr once the process has ended; a child of it may hold the other end open.
STDERR_S = 0.5
#: Time from SIGKILL to the end; only a process stuck in the kernel (a lost GPU) takes longer, and is left behind.
KILL_S = 5.0
#: Variables of the worker's that lead to its token, or let who has them speak to systemd in its name. An engine runs
#: other people's code, and needs none of them.
KEPT_BACK = frozenset(
    {"RELAY_TOKEN", "RELAY_TOKEN_FILE", "CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"}
)

log = logging.getLogger("gpuworker.slot")


class EngineProcess:
    """A running engine process; made by `open_child`.

    Attributes:
        request_id: the running request; empty while there is none, and for a shared engine, which runs several. The
            output of the process goes only to the worker's log, and to operators with the run that printed it: the
            next one may be another principal's.
    """

    def __init__(self, name: str, process: "subprocess.Popen[bytes]", stream: trio.SocketStream, output: int) -> None:
        self.name = name
        self.pid = process.pid
        self.request_id = ""
        self._printed: deque[str] = deque(maxlen=MAX_LINES)
        self._line = b""
        self._process = process
        self._stream = stream
        self._output = trio.lowlevel.FdStream(output)
        self._output_ended = trio.Event()
        self._pidfd = os.pidfd_open(process.pid)
        self._sending = trio.Lock()
        self._inbox = ipc.Inbox()
        #: Of live inputs, whose senders limit what lies here.
        self._post, self._posted = trio.open_memory_channel[ipc.IpcMessage](math.inf)

    async def send(self, message: ipc.IpcMessage) -> None:
        """Send a message; lost if the process has ended, which `receive` reports.

        Cancellation: may leave half a message behind; kill the process then.
        """
        async with self._sending:
            try:
                await self._stream.send_all(ipc.pack(message))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return

    def post(self, message: ipc.IpcMessage) -> None:
        """Send a message without waiting for it; messages are sent in the order in which they are posted."""
        self._post.send_nowait(message)

    async def send_posted(self) -> None:
        """Task of `open_child`: send what is posted. No run cancels it, so no half message is left behind."""
        async for message in self._posted:
            await self.send(message)

    async def receive(self) -> list[ipc.IpcMessage]:
        """The next message or messages; empty once the process has closed its end."""
        while True:
            try:
                data = await self._stream.receive_some(_READ_BYTES)
                messages = self._inbox.feed(bytes(data))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return []
            except ipc.PipeError as fault:
                log.error("%s: its process sent an invalid message: %s", self.name, fault)
                return []
            if messages or not data:
                return messages

    async def wait_exit(self) -> str:
        """Wait for the end of a process that has closed its socket, and kill it if it lingers.

        Returns:
            a short description of how it ended, which any client may read.
        """
        with trio.move_on_after(EXIT_S):
            await self._wait()
        self.kill()
        with trio.move_on_after(KILL_S):
            await self._wait()
        with trio.move_on_after(STDERR_S):
            await self._output_ended.wait()
        code = self._process.returncode
        if code is None:
            how = "closed its pipe but did not end"
        elif code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
        else:
            how = f"ended with exit code {code}"
        return f"the engine's process {how}"

    def kill(self) -> None:
        """Kill the process and its children; does nothing once it has ended."""
        if self._process.returncode is None:
            try:
                os.killpg(self.pid, signal.SIGKILL)  # the process leads its own session
            except ProcessLookupError:
                return

    async def _wait(self) -> None:
        if self._process.returncode is None:
            await trio.lowlevel.wait_readable(self._pidfd)
            self._process.wait()

    async def read_output(self) -> None:
        """Task of `open_child`: its stdout and stderr to the log."""
        async for data in self._output:
            self._add_output(bytes(data))
        self._end_line()
        self._output_ended.set()

    def begin_run(self, request_id: str) -> None:
        """A run begins: what is printed from now on is its own."""
        self.request_id = request_id
        self._printed.clear()

    @property
    def printed(self) -> str:
        """The last lines that the current or latest run printed."""
        return "\n".join(self._printed)[-MAX_REPORT_CHARS:]

    def end_run(self) -> None:
        """A run has ended: log what it printed under its name, before the next one begins."""
        try:
            while data := os.read(self._output.fileno(), _READ_BYTES):
                self._add_output(data)
        except OSError:  # BlockingIOError: nothing more has come
            pass
        self._end_line()
        self.request_id = ""

    def _add_output(self, data: bytes) -> None:
        *lines, rest = (self._line + data).split(b"\n")
        for line in lines:
            self._log_output(line)
        self._line = rest[-64 * MAX_LINE_CHARS :]

    def _end_line(self) -> None:
        self._log_output(self._line)
        self._line = b""

    def _log_output(self, line: bytes) -> None:
        # A progress bar overwrites its line with "\\r"; only the last version matters.
        text = line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace").strip()[:MAX_LINE_CHARS]
        if text:
            if self.request_id:
                self._printed.append(text)
            running = f", request {self.request_id[:8]}" if self.request_id else ""
            log.info("%s%s | %s", self.name, running, text)

    async def reap(self) -> None:
        """Kill the process and wait for its end. Cancellation: shielded, with a deadline."""
        self.kill()
        with trio.move_on_after(KILL_S, shield=True):
            await self._wait()

    async def aclose(self) -> None:
        """Close the worker's ends of socket and pipes."""
        await trio.aclose_forcefully(self._stream)
        await trio.aclose_forcefully(self._output)
        os.close(self._pidfd)


@asynccontextmanager
async def open_child(name: str) -> AsyncIterator[EngineProcess]:
    """Start an engine's process; it is killed and reaped at the end of the block.

    Must run in a thread that lives as long as the worker, because the parent-death signal follows the thread that
    forked. `trio.run_process` forks in a pool thread, so it cannot be used; starting here blocks for a few ms.

    Args:
        name: for the log.
    """
    ours, theirs = socket.socketpair()
    read_end, write_end = os.pipe()
    try:
        process = subprocess.Popen(  # noqa: ASYNC220 - see above
            [sys.executable, "-P", "-m", "gpuworker.slots.engine_main", str(theirs.fileno()), str(os.getpid())],
            env={name: value for name, value in os.environ.items() if name not in KEPT_BACK},
            stdin=subprocess.DEVNULL,
            stdout=write_end,
            stderr=write_end,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
    except BaseException:
        ours.close()
        os.close(read_end)
        raise
    finally:
        theirs.close()
        os.close(write_end)
    child = EngineProcess(name, process, trio.SocketStream(trio.socket.from_stdlib_socket(ours)), read_end)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child.read_output)
            nursery.start_soon(child.send_posted)
            try:
                yield child
            finally:
                await child.reap()
                nursery.cancel_scope.cancel()
    finally:
        await child.aclose()
