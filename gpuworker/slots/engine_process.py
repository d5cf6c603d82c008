"""A slot's process as the worker sees it: started, spoken to, its stderr kept, killed and reaped."""

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from gpuworker.slots import ipc

_READ_BYTES = 256 * 1024
MAX_LINE_CHARS = 500
#: From the end of its socket to the end of the process, before it is killed: long enough to learn its exit code.
EXIT_S = 1.0
#: For the rest of stderr once the process has ended; something it started may hold the other end open.
STDERR_S = 0.5
#: From SIGKILL to the end; only a process stuck in the kernel (a lost GPU) takes longer, and is left behind.
KILL_S = 5.0

log = logging.getLogger("gpuworker.slot")


class EngineProcess:
    """A running slot process; made by `open_child`.

    Attributes:
        request_id: of the request that it runs, for the log; empty while it runs none. What the process prints goes
            to the worker's log and nowhere else: it may be one principal's, and the next request another's.
    """

    def __init__(self, name: str, process: "subprocess.Popen[bytes]", stream: trio.SocketStream, output: int) -> None:
        self.name = name
        self.pid = process.pid
        self.request_id = ""
        self._process = process
        self._stream = stream
        self._output = trio.lowlevel.FdStream(output)
        self._output_ended = trio.Event()
        self._pidfd = os.pidfd_open(process.pid)
        self._sending = trio.Lock()
        self._inbox = ipc.Inbox()

    async def send(self, said: ipc.IpcMessage) -> None:
        """Say something; into the void where the process is gone, which `receive` tells.

        Cancellation: may leave half a message behind; kill the process then.
        """
        async with self._sending:
            try:
                await self._stream.send_all(ipc.pack(said))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return

    async def receive(self) -> list[ipc.IpcMessage]:
        """What it says next, one message or several; empty when it has closed its end."""
        while True:
            try:
                data = await self._stream.receive_some(_READ_BYTES)
                said = self._inbox.feed(bytes(data))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return []
            except ipc.PipeError as fault:
                log.error("%s: its process speaks nonsense: %s", self.name, fault)
                return []
            if said or not data:
                return said

    async def wait_exit(self) -> str:
        """Wait for the end of a process that has closed its socket, and kill it where it lingers.

        Returns:
            how it ended, in a few words that any client may read.
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
            how = "closed its pipe and does not end"
        elif code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
        else:
            how = f"ended with exit code {code}"
        return f"the slot's process {how}"

    def kill(self) -> None:
        """SIGKILL to the process and to what it started; harmless once it is gone."""
        if self._process.returncode is None:
            try:
                os.killpg(self.pid, signal.SIGKILL)  # it leads a session of its own
            except ProcessLookupError:
                return

    async def _wait(self) -> None:
        if self._process.returncode is None:
            await trio.lowlevel.wait_readable(self._pidfd)
            self._process.wait()

    async def read_output(self) -> None:
        """Task of `open_child`: its stdout and stderr to the log."""
        rest = b""
        async for data in self._output:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._log_output(line)
            rest = rest[-64 * MAX_LINE_CHARS :]
        self._log_output(rest)
        self._output_ended.set()

    def _log_output(self, line: bytes) -> None:
        # A progress bar overwrites its line with "\r"; what stays on a screen is the last of it.
        text = line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace").strip()[:MAX_LINE_CHARS]
        if text:
            running = f", request {self.request_id[:8]}" if self.request_id else ""
            log.info("%s%s | %s", self.name, running, text)

    async def reap(self) -> None:
        """Kill it and wait for its end. Cancellation: shielded, with a deadline."""
        self.kill()
        with trio.move_on_after(KILL_S, shield=True):
            await self._wait()

    async def aclose(self) -> None:
        """Close this end of everything."""
        await trio.aclose_forcefully(self._stream)
        await trio.aclose_forcefully(self._output)
        os.close(self._pidfd)


@asynccontextmanager
async def open_child(name: str) -> AsyncIterator[EngineProcess]:
    """Start a slot's process; killed and reaped at the end of the block.

    Must run in a thread that lives as long as the worker: the parent-death signal follows the thread that forked. So
    `trio.run_process`, which forks in a thread of a pool, would not do; starting here blocks for a few ms.

    Args:
        name: for the log.
    """
    ours, theirs = socket.socketpair()
    read_end, write_end = os.pipe()
    try:
        process = subprocess.Popen(  # noqa: ASYNC220 - see above
            [sys.executable, "-P", "-m", "gpuworker.slots.engine_main", str(theirs.fileno()), str(os.getpid())],
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
            try:
                yield child
            finally:
                await child.reap()
                nursery.cancel_scope.cancel()
    finally:
        await child.aclose()
