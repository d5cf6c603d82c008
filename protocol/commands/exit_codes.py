"""The commands' exit codes (docs/design.md §11), and the handling of a standard output whose reader has closed it."""

import os
import signal
import sys
from contextlib import suppress

DONE, FAILED, USAGE, CANNOT_CONNECT, INTERRUPTED = 0, 1, 2, 3, 130
#: The exit status that a shell reports for a program ended by SIGPIPE.
PIPE_CLOSED = 128 + signal.SIGPIPE


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
