"""The terminal, as Textual drives it, and whether it keeps up."""

from textual.drivers.linux_driver import LinuxDriver

#: Writes that wait for the terminal: one update of the screen is up to three, and Textual blocks everything at thirty.
MOST_WAITING = 9


class RelayDriver(LinuxDriver):
    """A terminal that may stall: nothing more is drawn while it does."""

    @property
    def behind(self) -> bool:
        """Whether it does not take what it was sent."""
        writer = self._writer_thread
        return writer is not None and writer._queue.qsize() > MOST_WAITING
