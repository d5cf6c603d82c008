"""Keeps the latest log events and operator actions, as rows for operators."""

import itertools
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import attrs
import trio

from protocol.log_lines import redacted
from protocol.wire.validators import Value
from relayd.logs.setup import log_tap

#: Number of log events and operator actions that are kept.
MAX_EVENTS = 5_000
MAX_AUDIT = 1_000
#: Limits for one value and for all details together, in characters; tracebacks are only in the log itself.
MAX_VALUE_CHARS = 200
MAX_DETAILS_CHARS = 600
#: Key in events -> key in rows; other keys become details.
_KEYS = {"request_id": "request_id", "space": "space", "worker": "worker_id", "principal": "principal"}
#: Logger methods whose name is not a level.
_LEVELS = {"exception": "error", "warn": "warning", "fatal": "critical"}
#: Keys that are added by processors.
_NOT_SHOWN = frozenset({"event", "level", "logger", "timestamp", "exc_info", "stack_info"})

Row = dict[str, Value]


@attrs.define(eq=False)
class RecentRows:
    """The latest `most` rows, with increasing ids. Rows may be added from any thread."""

    most: int
    rows: deque[Row] = attrs.field(init=False)
    _ids: "itertools.count[int]" = attrs.field(factory=lambda: itertools.count(1))

    def __attrs_post_init__(self) -> None:
        self.rows = deque(maxlen=self.most)

    def add(self, row: Row) -> None:
        """Add a row, with its id and the time."""
        self.rows.append({"id": str(next(self._ids)), "time": round(time.time(), 3), **row})

    @property
    def last(self) -> int:
        """Id of the latest row; 0 before the first."""
        return int(self.rows[-1]["id"]) if self.rows else 0

    def between(self, after: int, until: int, most: int) -> list[Row]:
        """Return the latest `most` rows with `after` < id <= `until`, oldest first."""
        found: list[Row] = []
        for row in reversed(tuple(self.rows)):
            number = int(row["id"])
            if number <= after or len(found) >= most:
                break
            if number <= until:
                found.append(row)
        return found[::-1]


async def serve_events(ring: RecentRows, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Add log events to `ring` until cancelled."""

    def record(method: str, event: Mapping[str, Any]) -> None:
        ring.add(log_row(method, event))

    with log_tap(record):
        task_status.started()
        await trio.sleep_forever()


def log_row(method: str, event: Mapping[str, Any]) -> Row:
    """Convert a log event to a row, without an id.

    Args:
        method: the logger's method, which gives the level.
        event: the logged event.
    """
    row: Row = {"level": _LEVELS.get(method, method), "event": _short(event.get("event", ""))}
    row |= {key: _short(event[name]) if event.get(name) is not None else None for name, key in _KEYS.items()}
    more = {name: _short(value) for name, value in event.items() if name not in _KEYS and name not in _NOT_SHOWN}
    if event.get("exc_info") and (fault := _exception_of(event["exc_info"])) is not None:
        more |= {"exception": _short(repr(fault))}
    row["details"] = " ".join(f"{name}={value}" for name, value in more.items())[:MAX_DETAILS_CHARS]
    return row


def _exception_of(exc_info: object) -> BaseException | None:
    return exc_info if isinstance(exc_info, BaseException) else sys.exc_info()[1]


def _short(value: object) -> str:
    return redacted(str(value)[: 2 * MAX_VALUE_CHARS])[
        :MAX_VALUE_CHARS
    ]  # redacted before the final cut: part of a token is secret, too
