"""A terminal for a process of its own: a pty of a given size, what is written to it, and how the process ends."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs

#: For Python, Textual and the first picture, on a machine that is busy with other tests.
START_S = 30.0


@attrs.define(eq=False)
class PtyProcess:
    process: "subprocess.Popen[bytes]"
    master: int
    slave: int
    #: All that was written to the terminal.
    output: bytes = b""

    def read_for(self, seconds: float) -> bytes:
        """What is written within so many seconds."""
        end = time.monotonic() + seconds
        begin = len(self.output)
        while (left := end - time.monotonic()) > 0:
            self._read(left)
        return self.output[begin:]

    def read_until(self, text: str, within_s: float = START_S) -> None:
        """Read until this stands in what was written."""
        self.read_while(lambda: text.encode() not in self.output, within_s, f"{text!r} was not shown")

    def read_while(self, going_on: Callable[[], bool], within_s: float, otherwise: str) -> None:
        end = time.monotonic() + within_s
        while going_on():
            left = end - time.monotonic()
            assert left > 0, f"{otherwise}: {self.output[-2000:]!r}"
            self._read(min(left, 0.1))

    def _read(self, seconds: float) -> None:
        if select.select([self.master], [], [], seconds)[0]:
            try:
                self.output += os.read(self.master, 65_536)
            except OSError:  # the other side is closed
                time.sleep(min(seconds, 0.01))

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def wait(self, within_s: float) -> int:
        """The exit code; what is written meanwhile is read, or it would hang in a full terminal."""
        if self.master >= 0:
            self.read_while(lambda: self.process.poll() is None, within_s, "it did not end")
        return self.process.wait(within_s)

    def settings(self) -> list[Any]:
        """How the terminal is set: raw, or as a shell wants it."""
        return termios.tcgetattr(self.slave)

    def hang_up(self) -> None:
        """The terminal goes away."""
        os.close(self.slave)
        os.close(self.master)
        self.master = self.slave = -1


@contextmanager
def on_a_pty(
    args: Sequence[str], *, columns: int = 80, lines: int = 24, ignored: Sequence[signal.Signals] = (), **environ: str
) -> Iterator[PtyProcess]:
    """Run Python with these arguments as the leader of a session on a terminal."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    ignore = "".join(f"signal.signal({int(one)}, signal.SIG_IGN);" for one in ignored)
    # The child takes the terminal for its own before it becomes the program, ignoring what it is to ignore.
    begin = (
        "import fcntl,os,signal,sys,termios;"
        f"fcntl.ioctl(0, termios.TIOCSCTTY, 0);{ignore}"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    clean = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-c", begin, *args],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        env=clean | {"LC_ALL": "C.UTF-8", "TERM": "xterm-256color", "COLORTERM": "truecolor", **environ},
    )
    there = PtyProcess(process, master, slave)
    try:
        yield there
    finally:
        process.kill()
        process.wait()
        for handle in (there.master, there.slave):
            if handle >= 0:
                os.close(handle)
