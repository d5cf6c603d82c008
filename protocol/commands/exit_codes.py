"""How the commands end: their exit codes (docs/design.md §11), and an output that nobody reads any more."""

import os
import signal
import sys
from contextlib import suppress

DONE, FAILED, USAGE, CANNOT_CONNECT, INTERRUPTED = 0, 1, 2, 3, 130
#: What a shell reports of a program that SIGPIPE ended.
PIPE_CLOSED = 128 + signal.SIGPIPE


def silence_stdout() -> None:
    """Send what is still to be written to stdout nowhere; called when its reader went away (`... | head`).

    What is buffered would raise again, with a traceback, when the interpreter flushes at its end.
    """
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, sys.stdout.fileno())
        finally:
            os.close(nowhere)
