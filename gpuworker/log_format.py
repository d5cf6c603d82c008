"""Formats the log lines that `gpuworker run` writes to the terminal."""

import datetime
import json
import logging
from types import TracebackType

from protocol.commands.progress import printable

_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class LineFormatter(logging.Formatter):
    """Writes one line for each record, with control characters escaped; the lines of a traceback are indented.

    Clients choose the reason of a cancel, and libraries what they print: neither may control the terminal, or imitate
    a record.
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


class JsonFormatter(logging.Formatter):
    """Writes one JSON object for each record, with the keys of the relay's log."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        told = {
            "timestamp": at.isoformat().replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            "module": record.module,
            "func_name": record.funcName,
            "lineno": record.lineno,
        }
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told)
