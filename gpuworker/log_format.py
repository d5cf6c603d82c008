"""Log lines as `gpuworker run` writes them to its owner's terminal."""

import logging
from types import TracebackType

from protocol.commands.progress import printable

_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class LineFormatter(logging.Formatter):
    """One line a record, control characters escaped; the lines of a traceback are set in.

    A client chooses the reason of a cancel, a library what it prints: none of it may steer the terminal, or look like
    a record of its own.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The line of a record."""
        return printable(super().formatMessage(record))

    def formatException(self, ei: _ExcInfo) -> str:  # noqa: N802 - logging's name
        """A traceback."""
        return _set_in(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802 - logging's name
        """A stack."""
        return _set_in(super().formatStack(stack_info))


def _set_in(lines: str) -> str:
    return "\n".join(f"  | {printable(line)}" for line in lines.split("\n"))
