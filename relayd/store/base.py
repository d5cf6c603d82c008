"""The interface of a store, which keeps records across restarts and applies changes to them."""

import abc

from protocol.wire.errors import ErrorCode
from relayd.stats.histogram import DISK_S, Histogram
from relayd.store.records import Change, Loaded, TurnRecord

#: Queued posts while the disk accepts no writes: a few minutes of a busy relay, some 50 MiB.
MAX_POSTED = 100_000


class StoreError(Exception):
    """The store failed; the message says what to do.

    Attributes:
        code: the error code for a peer: `storage_full` or `internal`.
    """

    code = ErrorCode.INTERNAL


class StorageFull(StoreError):
    """The disk is full; the store accepts changes again once there is space."""

    code = ErrorCode.STORAGE_FULL


class StoreInUse(StoreError):
    """Another process uses this state folder.

    Attributes:
        holder: who uses it.
    """

    def __init__(self, message: str, holder: str = "another relayd") -> None:
        super().__init__(message)
        self.holder = holder


# -- changes ------------------------------------------------------------------------------------------------------


class Store(abc.ABC):
    """Applies changes in the order of the calls: `commit` and `post` share one queue.

    Attributes:
        commit_s: seconds from the call of `commit` until it was durable; without failed calls.
        failed_commits: number of failed calls.
        dropped: number of lost posts: over `MAX_POSTED`, permanently refused, or unwritten at the end.
    """

    def __init__(self) -> None:
        self.commit_s = Histogram(DISK_S)
        self.failed_commits = 0
        self.dropped = 0

    @property
    def transactions(self) -> int:
        """Number of transactions written so far, each with one fsync."""
        return 0

    @property
    def queued(self) -> int:
        """Number of calls whose changes are not written yet."""
        return 0

    @abc.abstractmethod
    async def load(self) -> Loaded:
        """Return all records, including changes that are still queued.

        Raises:
            StoreError: the store cannot be read.
        """

    @abc.abstractmethod
    async def commit(self, *changes: Change) -> None:
        """Apply all of `changes` or none; they are durable when this returns.

        Raises:
            StorageFull: the disk is full; none of `changes` was applied.
            StoreError: another error of the disk; none of `changes` was applied.

        Cancellation: the changes are still applied, or fail silently. They keep their place in the queue, so a change
        queued afterwards to undo them is applied after them.
        """

    @abc.abstractmethod
    def post(self, *changes: Change) -> None:
        """Queue `changes` to be applied soon, all of them or none; a crash may lose them.

        Never waits and never fails: posted changes are retried until they are written. While `MAX_POSTED` of them are
        queued, new ones are dropped, counted and logged.
        """

    @abc.abstractmethod
    async def flush(self) -> None:
        """Wait until everything queued before is durable.

        Raises:
            StoreError: the disk refused the write.
        """

    @abc.abstractmethod
    async def read_input(self, request_id: str, name: str) -> bytes:
        """Return the data of a whole input of a committed request.

        Raises:
            KeyError: the input does not exist (the request has ended, or never existed).
            StoreError: the input cannot be read.
        """

    @abc.abstractmethod
    async def read_live_input(self, request_id: str, name: str, offset: int, most: int) -> bytes:
        """Return up to `most` bytes of a live input from `offset` on; fewer where the store has no more.

        Raises:
            StoreError: the pieces cannot be read, or one is missing.
        """

    @abc.abstractmethod
    async def read_turns(self, talk_id: str) -> tuple[TurnRecord, ...]:
        """Return the turns of a conversation, in order; without those that are damaged.

        Raises:
            StoreError: they cannot be read.
        """


# -- the state folder ---------------------------------------------------------------------------------------------
