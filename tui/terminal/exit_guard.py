"""Ends the process at a signal or when its terminal disappears, within a bounded time."""

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

#: Longest time from the decision to end until the process is killed, even if it hangs writing to the terminal.
ENDS_S = 1.25
EXIT_OF = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}


class ExitGuard:
    """Ends the process within a bounded time.

    The terminal is polled to notice that it has gone: SIGHUP may be ignored, and reads from a terminal that is gone
    return nothing, immediately and for ever.
    """

    def __init__(self) -> None:
        self._begun = threading.Event()
        self._over = threading.Event()
        self._code = 0
        self._before: list[Any] | None = None
        #: The terminal has gone; nothing may be written to it any more.
        self.terminal_gone = False

    def watch(self, loop: asyncio.AbstractEventLoop, end: Callable[[int], None]) -> None:
        """Exit at signals, and when the terminal goes away.

        Args:
            loop: the running loop; `end` is called in it.
            end: starts the ordinary exit with the given code.
        """
        if threading.current_thread() is not threading.main_thread() or not sys.__stdin__ or not sys.__stdin__.isatty():
            return  # in a test there is no terminal, and the test handles signals
        # The loop's own handlers would wait until a busy loop, or one blocked by the terminal, got round to them. These
        # run at once, and the remaining time counts from there.
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
        poll.register(terminal, 0)  # a hang-up is always reported
        while not poll.poll():
            pass
        self.terminal_gone = True
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(end, EXIT_OF["SIGHUP"])
        self.begin(EXIT_OF["SIGHUP"])

    def keep_terminal(self) -> None:
        """Remember the terminal's settings, so that they can be restored after a hang."""
        with suppress(termios.error, ValueError, OSError, AttributeError):
            self._before = termios.tcgetattr(sys.__stdin__.fileno())  # type: ignore[union-attr]

    def begin(self, code: int) -> None:
        """Make sure that the process ends within `ENDS_S`."""
        if not self._begun.is_set() and sys.__stdin__ and sys.__stdin__.isatty() | self.terminal_gone:
            self._code = code
            self._begun.set()
            threading.Thread(target=self._make_sure, daemon=True).start()

    def over(self) -> None:
        """Note that the process has ended by itself."""
        self._over.set()

    def _make_sure(self) -> None:
        if not self._over.wait(ENDS_S):
            if self._before is not None:
                with suppress(termios.error, ValueError, OSError):
                    termios.tcsetattr(sys.__stdin__.fileno(), termios.TCSANOW, self._before)  # type: ignore[union-attr]
            os._exit(self._code)
