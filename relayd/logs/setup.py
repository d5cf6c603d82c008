"""Logs on stderr: for a person on a terminal, one JSON object a line elsewhere; stdlib loggers go the same way.

A module says `log = get_logger(__name__)` and then `log.info("what happened", key=value)`. Whatever is
logged, no token leaves: the finished line is searched for them.
"""

import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TextIO

import structlog
from structlog.typing import EventDict, ExcInfo, Processor, WrappedLogger

from protocol.commands.progress import printable
from relayd.config.schema import LogConfig

#: Loggers that tell every step they take at `debug`.
QUIET_LOGGERS = ("python_multipart",)
_TOKEN = re.compile(r"(rly_[a-z]_)[A-Za-z0-9_-]{16,}")
#: Told every event from `info` up, whatever level the log itself has: method of the logger, and what is logged.
Tap = Callable[[str, EventDict], None]
_taps: list[Tap] = []


@contextmanager
def log_tap(tap: Tap) -> Iterator[None]:
    """Tell `tap` what is logged inside the block, from whatever thread logs it. It must neither wait nor raise."""
    _taps.append(tap)
    try:
        yield
    finally:
        _taps.remove(tap)


def run_taps(_logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """The first processor of a log."""
    if method != "debug":
        for tap in tuple(_taps):
            tap(method, event)
    return event


def redacted(text: str) -> str:
    """`text` with tokens cut to their prefix."""
    return _TOKEN.sub(r"\1[secret]", text) if "rly_" in text else text


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """The logger of a module; may be made before `set_up_logs`."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


def set_up_logs(config: LogConfig, stream: TextIO | None = None) -> None:
    """Send all logs of the process to `stream`. May be called again.

    Args:
        config: level and format.
        stream: stderr if None.
    """
    stream = stream or sys.stderr
    console = config.format == "console" or (config.format == "auto" and stream.isatty())
    common: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    render = _console_processors(stream.isatty()) if console else _json_processors()
    # For a person the standard library's handler makes the lines; where each connection and each request leaves one,
    # they are written as they are, which costs half.
    last = [structlog.stdlib.ProcessorFormatter.wrap_for_formatter] if console else [*render, _redact]
    structlog.configure(
        processors=[
            run_taps,
            # Asks the stdlib's root logger at every call, so that `set_level` works on loggers that are in use.
            structlog.stdlib.filter_by_level,
            *common,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.processors.StackInfoRenderer(),
            *last,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory() if console else partial(_Lines, stream),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        _Redacting(
            foreign_pre_chain=[*common, structlog.stdlib.ExtraAdder()],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    # A log that cannot be written (the terminal went away) must not print tracebacks into what is left.
    logging.raiseExceptions = False
    root = logging.getLogger()
    root.handlers[:] = [handler]
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
    logging.captureWarnings(True)
    set_level(config.level)


def set_level(level: str) -> None:
    """Change what is logged from now on: `debug`, `info`, `warning` or `error`."""
    logging.getLogger().setLevel(level.upper())


class _Lines:
    """Writes finished lines; in the place of a logger of the standard library's, whose levels it goes by."""

    def __init__(self, stream: TextIO, name: str = "") -> None:
        self.name = name
        self._stream = stream
        # What structlog's processors ask of a logger; those before 25.5 ask for the second of the two.
        self.disabled = False
        self.getEffectiveLevel = logging.getLogger().getEffectiveLevel
        self.isEnabledFor = logging.getLogger().isEnabledFor

    def write(self, line: str) -> None:
        """One line, in one piece; without effect where the stream takes none, as of a terminal that went away."""
        try:
            self._stream.write(f"{line}\n")
            self._stream.flush()
        except (OSError, ValueError):
            return

    debug = info = warning = error = exception = critical = write


def _redact(_logger: WrappedLogger, _name: str, line: str) -> str:
    return redacted(line)


class _Redacting(structlog.stdlib.ProcessorFormatter):
    def format(self, record: logging.LogRecord) -> str:
        """The finished line, with tokens cut to their prefix."""
        return redacted(super().format(record))


def _json_processors() -> list[Processor]:
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=repr)]


def _console_processors(colors: bool) -> list[Processor]:
    # Plain tracebacks: the coloured ones show local variables, which is where secrets and megabytes are.
    renderer = structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=_plain_traceback)
    return [_printable, renderer]


def _plain_traceback(stream: TextIO, exc_info: ExcInfo) -> None:
    lines = "".join(traceback.format_exception(*exc_info)).splitlines()
    stream.write("\n" + "\n".join(map(printable, lines)))


def _printable(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
    """Escape control characters: what a peer sends must not steer the terminal."""
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = printable(value)
    return event
