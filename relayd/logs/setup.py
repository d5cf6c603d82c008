"""Sets up logging to stderr: readable lines on a terminal, else one JSON object per line; also for stdlib loggers.

`plain` lines are those of other servers: `TIME - LOGGER - LEVEL - event key=value, key=value`.

Modules use `log = get_logger(__name__)` and `log.info("what happened", key=value)`. Tokens are redacted from every
finished line.
"""

import datetime
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TextIO

import structlog
from structlog.typing import EventDict, ExcInfo, Processor, WrappedLogger

from protocol.log_lines import for_people, redacted
from protocol.printable import printable
from relayd.config.schema import PLAIN, LogConfig

#: Loggers that log every step at `debug`.
QUIET_LOGGERS = ("python_multipart",)
_PARAMETER = structlog.processors.CallsiteParameter
_CALLSITE = (_PARAMETER.MODULE, _PARAMETER.FUNC_NAME, _PARAMETER.LINENO)
#: Called with the logger's method and the event, for every event from `info` up, regardless of the log level.
Tap = Callable[[str, EventDict], None]
_taps: list[Tap] = []


@contextmanager
def log_tap(tap: Tap) -> Iterator[None]:
    """Pass events logged during the block to `tap`, in the thread that logs them. It must neither block nor raise."""
    _taps.append(tap)
    try:
        yield
    finally:
        _taps.remove(tap)


def run_taps(_logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Pass an event to the taps; the first processor of the log."""
    if method != "debug":
        for tap in tuple(_taps):
            tap(method, event)
    return event


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """Return the logger of a module; may be called before `set_up_logs`."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


def set_up_logs(config: LogConfig, stream: TextIO | None = None) -> None:
    """Send all logs of the process to `stream`. May be called again.

    Args:
        config: level and format.
        stream: where to write; stderr if None.
    """
    stream = stream or sys.stderr
    console = for_people(config.format, stream)
    common: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if config.callsite:
        common.append(structlog.processors.CallsiteParameterAdder(_CALLSITE))
    if console:
        render = _console_processors(stream.isatty())
    else:
        render = _plain_processors() if config.format == PLAIN else _json_processors()
    # On a terminal the standard library's handler formats the lines. Others are written directly, which costs half and
    # matters because each connection and each request logs one.
    last = [structlog.stdlib.ProcessorFormatter.wrap_for_formatter] if console else [*render, _redact]
    structlog.configure(
        processors=[
            run_taps,
            # Asks the stdlib's root logger at every call, so that `set_level` affects existing loggers.
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
    # If the log cannot be written, because the terminal was closed, logging must not print tracebacks.
    logging.raiseExceptions = False
    root = logging.getLogger()
    root.handlers[:] = [handler]
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
    logging.captureWarnings(True)
    set_level(config.level)


def set_level(level: str) -> None:
    """Set the log level: `debug`, `info`, `warning` or `error`."""
    logging.getLogger().setLevel(level.upper())


class _Lines:
    """Writes finished lines. Replaces a logger of the standard library, and uses the level of its root logger."""

    def __init__(self, stream: TextIO, name: str = "") -> None:
        self.name = name
        self._stream = stream
        # structlog's `filter_by_level` uses `getEffectiveLevel`, and before 25.5 `isEnabledFor`.
        self.disabled = False
        self.getEffectiveLevel = logging.getLogger().getEffectiveLevel
        self.isEnabledFor = logging.getLogger().isEnabledFor

    def write(self, line: str) -> None:
        """Write one line at once; does nothing if the stream cannot be written, such as that of a closed terminal."""
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
        """Format a record, with tokens cut to their prefix."""
        return redacted(super().format(record))


def _json_processors() -> list[Processor]:
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=repr)]


def _plain_processors() -> list[Processor]:
    return [structlog.processors.format_exc_info, _plain_line]


def _plain_line(_logger: WrappedLogger, _name: str, event: EventDict) -> str:
    """Return the line of an event, in local time, and an indented traceback behind it; nothing else breaks the line."""
    at = datetime.datetime.fromisoformat(event.pop("timestamp")).astimezone()
    what, level, logger = event.pop("event"), event.pop("level").upper(), event.pop("logger")
    traces = [event.pop(name) for name in ("exception", "stack") if name in event]
    fields = ", ".join(f"{key}={value}" for key, value in event.items())
    line = f"{at:%Y-%m-%d %H:%M:%S},{at.microsecond // 1000:03} - {logger} - {level} - {what} {fields}".rstrip()
    return "\n".join([printable(line), *(f"  | {printable(each)}" for trace in traces for each in trace.split("\n"))])


def _console_processors(colors: bool) -> list[Processor]:
    # Plain tracebacks: the coloured ones show local variables, which may hold secrets and megabytes.
    renderer = structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=_plain_traceback)
    return [_printable, renderer]


def _plain_traceback(stream: TextIO, exc_info: ExcInfo) -> None:
    lines = "".join(traceback.format_exception(*exc_info)).splitlines()
    stream.write("\n" + "\n".join(map(printable, lines)))


def _printable(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
    """Escape control characters: text from a peer must not control the terminal."""
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = printable(value)
    return event
