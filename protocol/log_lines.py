"""What the logs of both daemons have in common: their levels, their formats, and no tokens in them.

The relay writes its lines with structlog, which a worker must not need; `set_up_log` writes the same with logging.
"""

import datetime
import json
import logging
import re
import sys
from types import TracebackType
from typing import TextIO

from protocol.printable import printable

LEVELS = ("debug", "info", "warning", "error")
#: `auto` is `console` on a terminal and `json` elsewhere.
FORMATS = ("auto", "console", "json")
_TOKEN = re.compile(r"(rly_[a-z]_)[A-Za-z0-9_-]{16,}")

_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


def redacted(text: str) -> str:
    """Return `text` with tokens cut to their prefix."""
    return _TOKEN.sub(r"\1[secret]", text) if "rly_" in text else text


def for_people(log_format: str, stream: TextIO) -> bool:
    """Whether lines are written for people; otherwise as JSON."""
    return log_format in ("console", "text") or (log_format == "auto" and stream.isatty())


def set_up_log(logger: str, level: str, log_format: str) -> None:
    """Write the log to stderr; other loggers' records from `warning` up.

    Args:
        logger: the program's own logger.
        level: one of `LEVELS`, for that logger.
        log_format: one of `FORMATS`, or "text", which is "console".
    """
    handler = logging.StreamHandler(sys.stderr)
    lines = LineFormatter("%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    handler.setFormatter(lines if for_people(log_format, sys.stderr) else JsonFormatter())
    logging.basicConfig(handlers=[handler])
    logging.getLogger(logger).setLevel(level.upper())


class LineFormatter(logging.Formatter):
    """Writes one line for each record, with control characters escaped; the lines of a traceback are indented.

    Clients choose the reason of a cancel, and libraries what they print: neither may control the terminal, or imitate
    a record.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The line of a record."""
        return printable(redacted(super().formatMessage(record)))

    def formatException(self, ei: _ExcInfo) -> str:  # noqa: N802 - logging's name
        """A traceback."""
        return _set_in(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802 - logging's name
        """A stack."""
        return _set_in(super().formatStack(stack_info))


def _set_in(lines: str) -> str:
    return "\n".join(f"  | {printable(line)}" for line in redacted(lines).split("\n"))


class JsonFormatter(logging.Formatter):
    """Writes one JSON object for each record, with the keys of the relay's log."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        fields = {
            "timestamp": at.isoformat().replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            "module": record.module,
            "func_name": record.funcName,
            "lineno": record.lineno,
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return redacted(json.dumps(fields))
