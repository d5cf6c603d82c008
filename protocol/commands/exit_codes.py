"""The commands' exit codes (docs/design.md §11), and the handling of standard streams that are closed."""

import io
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

DONE, FAILED, USAGE, CANNOT_CONNECT, INTERRUPTED = 0, 1, 2, 3, 130
#: The exit status that a shell reports for a program ended by SIGPIPE.
PIPE_CLOSED = 128 + signal.SIGPIPE


class Told(Exception):
    """What failed was printed; the program has only to exit with `FAILED`."""


def silence_stdout() -> None:
    """Discard further output to stdout; called when its reader has closed it (`... | head`).

    Otherwise the interpreter would flush the buffered output at exit, and print a traceback.
    """
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, sys.stdout.fileno())
        finally:
            os.close(nowhere)


def open_closed_streams() -> None:
    """Open the standard streams that were closed when the program was started (`relay ... <&-`); call it first.

    Otherwise they would be None, and the next file or socket would be taken for a standard stream.
    """
    # In this order, so that each gets the lowest free descriptor, which is its own.
    if sys.stdin is None:
        sys.stdin = Path(os.devnull).open()  # noqa: SIM115 - stays open
    if sys.stdout is None:
        sys.stdout = io.TextIOWrapper(_ClosedOutput(os.devnull), write_through=True)
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", errors="replace")  # noqa: SIM115


class _ClosedOutput(io.FileIO):
    """Stands for a closed stdout: what is written to it is not lost in silence, it fails as at a closed pipe."""

    def writable(self) -> bool:
        return True

    def write(self, _data: object) -> int:
        raise BrokenPipeError
