"""A Textual driver that sends only what differs, and knows how far the terminal is behind."""

import array
import fcntl
import termios
from contextlib import suppress
from typing import Any, TextIO

from textual.drivers.linux_driver import LinuxDriver

from tui.terminal.cell_buffer import RESET, CellBuffer

#: What may wait for the terminal before drawing pauses: half a second of a line of 4 KB/s.
MOST_WAITING_BYTES = 2_000
#: Writes that may wait. A draw takes up to three of them; at thirty, Textual would block.
MOST_WAITING = 9


class RelayDriver(LinuxDriver):
    """A terminal driver with the cells that the terminal shows.

    Attributes:
        cells: what is shown and what is to be shown.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.cells = CellBuffer(fills=_fills())
        self._given = 0
        self._taken = Counted(self._file)
        self._file = self._taken  # type: ignore[assignment]  # it is all that the writer thread needs

    @property
    def behind(self) -> bool:
        """Whether the terminal is slow, or has stopped reading."""
        writer = self._writer_thread
        if writer is not None and writer._queue.qsize() > MOST_WAITING:
            return True
        return self._given - self._taken.chars + self._taken.waiting_bytes() > MOST_WAITING_BYTES

    def write(self, data: str) -> None:
        """Hand something to the thread that writes."""
        self._given += len(data)
        super().write(data)

    def start_application_mode(self) -> None:
        """Take the terminal over, at the start and after Ctrl+Z; what it shows is unknown."""
        super().start_application_mode()  # type: ignore[no-untyped-call]
        self.cells.forget()

    def stop_application_mode(self) -> None:
        """Hand the terminal back, without a colour of ours."""
        self.write(RESET)
        super().stop_application_mode()


def _fills() -> bool:
    """Whether this terminal, by its entry in terminfo, fills what it erases with the background."""
    with suppress(ImportError, OSError):  # Python may be built without curses
        import curses

        with suppress(curses.error):
            curses.setupterm()
            return curses.tigetflag("bce") > 0
    return False


class Counted:
    """The terminal as a file, and how much of what it was given it has taken."""

    def __init__(self, file: TextIO | None) -> None:
        assert file is not None, "there is no terminal"
        self._file = file
        #: Characters, as `RelayDriver.write` counts them.
        self.chars = 0

    def write(self, text: str) -> int:
        """Write; blocks while the terminal takes nothing."""
        written = self._file.write(text)
        self._file.flush()
        self.chars += written
        return written

    def flush(self) -> None:
        """Do nothing: all is written at once."""

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._file.isatty()

    def fileno(self) -> int:
        """Its file descriptor."""
        return self._file.fileno()

    def waiting_bytes(self) -> int:
        """What the kernel holds for the terminal, where it says so: on serial lines, and ptys of BSD and macOS."""
        waiting = array.array("i", [0])
        with suppress(OSError):
            fcntl.ioctl(self._file.fileno(), termios.TIOCOUTQ, waiting)
        return waiting[0]
