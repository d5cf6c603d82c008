"""How the screen ends: by signals, by its terminal going away, and for certain."""

import asyncio
import os
import select
import signal
import sys
import termios
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

#: From the wish to end to the end; after this long, whatever still hangs (a terminal that takes nothing) is left.
ENDS_S = 1.25
EXIT_OF = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}


class ExitGuard:
    """Ends the process in time.

    A terminal that goes away is seen by polling it, as the signal of it (SIGHUP) may be ignored, and as reads of a
    terminal that is gone give nothing, at once, for ever.
    """

    def __init__(self) -> None:
        self._begun = threading.Event()
        self._over = threading.Event()
        self._code = 0
        self._before: list[Any] | None = None
        #: The terminal is gone; nothing may be written to it any more.
        self.terminal_gone = False

    def watch(self, loop: asyncio.AbstractEventLoop, end: Callable[[int], None]) -> None:
        """End at signals, and when the terminal goes away.

        Args:
            loop: that runs; `end` is called in it.
            end: begins the ordinary end, with the exit code.
        """
        if threading.current_thread() is not threading.main_thread() or not sys.__stdin__ or not sys.__stdin__.isatty():
            return  # under a test: no terminal, and the signals are the test's
        # Not the loop's own handlers: those wait until a loop that is busy, or stuck at a terminal that takes nothing,
        # gets round to them. These run at once, and the time that is left counts from there.
        for name, code in EXIT_OF.items():
            signal.signal(getattr(signal, name), partial(self._signalled, loop, end, code))
        threading.Thread(target=self._poll, args=(sys.__stdin__.fileno(), loop, end), daemon=True).start()

    def _signalled(
        self, loop: asyncio.AbstractEventLoop, end: Callable[[int], None], code: int, _number: int, _frame: object
    ) -> None:
        self.begin(code)
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(end, code)

    def _poll(self, terminal: int, loop: asyncio.AbstractEventLoop, end: Callable[[int], None]) -> None:
        poll = select.poll()
        poll.register(terminal, 0)  # a hang-up is told unasked
        while not poll.poll():
            pass
        self.terminal_gone = True
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(end, EXIT_OF["SIGHUP"])
        self.begin(EXIT_OF["SIGHUP"])

    def keep_terminal(self) -> None:
        """Remember how the terminal is set, to set it so again if it must."""
        with suppress(termios.error, ValueError, OSError, AttributeError):
            self._before = termios.tcgetattr(sys.__stdin__.fileno())  # type: ignore[union-attr]

    def begin(self, code: int) -> None:
        """From now on it ends within `ENDS_S`, whatever hangs."""
        if not self._begun.is_set() and sys.__stdin__ and sys.__stdin__.isatty() | self.terminal_gone:
            self._code = code
            self._begun.set()
            threading.Thread(target=self._make_sure, daemon=True).start()

    def over(self) -> None:
        """It has ended by itself."""
        self._over.set()

    def _make_sure(self) -> None:
        if not self._over.wait(ENDS_S):
            if self._before is not None:
                with suppress(termios.error, ValueError, OSError):
                    termios.tcsetattr(sys.__stdin__.fileno(), termios.TCSANOW, self._before)  # type: ignore[union-attr]
            os._exit(self._code)
