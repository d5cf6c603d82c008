"""Keeps the latest log events and operator actions, as rows for operators."""

import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import attrs
import msgpack
import trio

from protocol.log_lines import redacted
from protocol.wire.validators import Value
from relayd.logs.setup import log_tap

#: Number of log events and operator actions that are kept.
MAX_EVENTS = 5_000
MAX_AUDIT = 1_000
#: Rows that are packed together.
PAGE_ROWS = 100
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
    """The latest `most` rows, with consecutive ids. Rows may be added from any thread.

    All but the newest are packed, a page of them in one block. Thousands of small objects that live on for hours would
    be scattered over all the memory that a busy hour took, and keep it from being returned.
    """

    most: int
    #: Id of the latest row; 0 before the first.
    last: int = 0
    #: Rows `last - len(_newest) + 1` to `last`.
    _newest: list[Row] = attrs.field(factory=list)
    #: Packed pages of `PAGE_ROWS` rows before those, oldest first.
    _pages: deque[bytes] = attrs.field(factory=deque)
    _lock: threading.Lock = attrs.field(factory=threading.Lock)

    @property
    def first(self) -> int:
        """Id of the oldest row; 1 before the first."""
        return max(1, self.last - self.most + 1)

    def add(self, row: Row) -> None:
        """Add a row, with its id and the time."""
        with self._lock:
            self.last += 1
            self._newest.append({"id": str(self.last), "time": round(time.time(), 3), **row})
            if len(self._newest) == PAGE_ROWS:
                self._pages.append(msgpack.packb(self._newest, unicode_errors="surrogatepass"))
                self._newest = []
            if (len(self._pages) - 1) * PAGE_ROWS + len(self._newest) >= self.most:
                self._pages.popleft()

    def between(self, after: int, until: int, most: int) -> list[Row]:
        """Return the latest `most` rows with `after` < id <= `until`, oldest first."""
        with self._lock:
            until = min(until, self.last)
            start = max(after + 1, self.first, until - most + 1)
            pages, newest, page_start = tuple(self._pages), tuple(self._newest), self.last - len(self._newest) + 1
        page_start -= len(pages) * PAGE_ROWS
        found: list[Row] = []
        for page in pages:
            page_end = page_start + PAGE_ROWS
            if page_start <= until and page_end > start:
                rows: list[Row] = msgpack.unpackb(page, unicode_errors="surrogatepass")
                found += rows[max(0, start - page_start) : until + 1 - page_start]
            page_start = page_end
        found += newest[max(0, start - page_start) : max(0, until + 1 - page_start)]
        return found


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
