"""The latest log events and operator actions, as rows for operators."""

import itertools
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import attrs
import trio

from protocol.wire.validators import Value
from relayd.logs.setup import log_tap, redacted

#: Lines of the log, and steers, that are kept.
MAX_EVENTS = 5_000
MAX_AUDIT = 1_000
#: Of one value and of all details together, in characters: a traceback is for the log itself.
MAX_VALUE_CHARS = 200
MAX_DETAILS_CHARS = 600
#: What events call a thing -> the key that it has in rows; the rest is told as details.
_KEYS = {"request_id": "request_id", "space": "space", "worker": "worker_id", "principal": "principal"}
#: Methods of loggers that are no levels.
_LEVELS = {"exception": "error", "warn": "warning", "fatal": "critical"}
#: What processors put beside the event's own.
_NOT_SHOWN = frozenset({"event", "level", "logger", "timestamp", "exc_info", "stack_info"})

Row = dict[str, Value]


@attrs.define(eq=False)
class RecentRows:
    """Rows with rising ids, of which the latest `most` are kept. May be added to from any thread."""

    most: int
    rows: deque[Row] = attrs.field(init=False)
    _ids: "itertools.count[int]" = attrs.field(factory=lambda: itertools.count(1))

    def __attrs_post_init__(self) -> None:
        self.rows = deque(maxlen=self.most)

    def add(self, row: Row) -> None:
        """Add a row; it is given its id, and the time."""
        self.rows.append({"id": str(next(self._ids)), "time": round(time.time(), 3), **row})

    @property
    def last(self) -> int:
        """Id of the latest row; 0 before the first."""
        return int(self.rows[-1]["id"]) if self.rows else 0

    def between(self, after: int, until: int, most: int) -> list[Row]:
        """The latest `most` rows with ids above `after` and not above `until`, the oldest first."""
        found: list[Row] = []
        for row in reversed(tuple(self.rows)):
            number = int(row["id"])
            if number <= after or len(found) >= most:
                break
            if number <= until:
                found.append(row)
        return found[::-1]


async def serve_events(ring: RecentRows, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Keep in `ring` what is logged, until cancelled."""

    def record(method: str, event: Mapping[str, Any]) -> None:
        ring.add(log_row(method, event))

    with log_tap(record):
        task_status.started()
        await trio.sleep_forever()


def log_row(method: str, event: Mapping[str, Any]) -> Row:
    """A line of the log as a row, without its id.

    Args:
        method: of the logger, which is its level.
        event: what was logged.
    """
    row: Row = {"level": _LEVELS.get(method, method), "event": _short(event.get("event", ""))}
    row |= {key: _short(event[name]) if event.get(name) is not None else None for name, key in _KEYS.items()}
    more = {name: _short(value) for name, value in event.items() if name not in _KEYS and name not in _NOT_SHOWN}
    if event.get("exc_info") and (fault := _fault(event["exc_info"])) is not None:
        more |= {"exception": _short(repr(fault))}
    row["details"] = " ".join(f"{name}={value}" for name, value in more.items())[:MAX_DETAILS_CHARS]
    return row


def _fault(exc_info: object) -> BaseException | None:
    return exc_info if isinstance(exc_info, BaseException) else sys.exc_info()[1]


def _short(value: object) -> str:
    return redacted(str(value)[: 2 * MAX_VALUE_CHARS])[:MAX_VALUE_CHARS]  # redacted first: half a token is one, too
