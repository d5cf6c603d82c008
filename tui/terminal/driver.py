"""A Textual driver that knows when the terminal has stopped reading."""

from textual.drivers.linux_driver import LinuxDriver

#: Writes that may wait for the terminal. An update takes up to three of them; at thirty, Textual would block.
MOST_WAITING = 9


class RelayDriver(LinuxDriver):
    """A terminal driver that reports a stall, so that drawing can pause."""

    @property
    def behind(self) -> bool:
        """Whether the terminal has stopped reading."""
        writer = self._writer_thread
        return writer is not None and writer._queue.qsize() > MOST_WAITING
