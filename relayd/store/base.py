"""The interface of a store: it keeps records across restarts and takes changes to them."""

import abc

from protocol.wire.errors import ErrorCode
from relayd.stats.histogram import DISK_S, Histogram
from relayd.store.records import Change, Loaded

#: Entries that wait for a disk that takes nothing: a few minutes of a busy relay, some 50 MiB.
MAX_POSTED = 100_000


class StoreError(Exception):
    """The store cannot do what it was asked for; the text says what to do about it.

    Attributes:
        code: what to answer a peer with: `storage_full` or `internal`.
    """

    code = ErrorCode.INTERNAL


class StorageFull(StoreError):
    """No room is left on the disk; the store goes on, and takes changes again once there is room."""

    code = ErrorCode.STORAGE_FULL


class StoreInUse(StoreError):
    """Another process holds this state folder."""


# -- changes ------------------------------------------------------------------------------------------------------


class Store(abc.ABC):
    """Takes changes, in the order of the calls, whoever makes them: `commit` and `post` share one queue.

    Attributes:
        commit_s: seconds from the call of `commit` until it was durable; of none that failed.
        failed_commits: of calls.
        dropped: posts that were lost: over `MAX_POSTED`, refused for good, or still waiting at the end.
    """

    def __init__(self) -> None:
        self.commit_s = Histogram(DISK_S)
        self.failed_commits = 0
        self.dropped = 0

    @property
    def transactions(self) -> int:
        """Transactions written so far, each with one fsync."""
        return 0

    @property
    def queued(self) -> int:
        """Calls whose changes are not written yet."""
        return 0

    @abc.abstractmethod
    async def load(self) -> Loaded:
        """All that is held now; changes that are still queued are in it.

        Raises:
            StoreError: it cannot be read.
        """

    @abc.abstractmethod
    async def commit(self, *changes: Change) -> None:
        """Make `changes`, all of them or none; durable when this returns.

        Raises:
            StorageFull: no room; nothing of `changes` was made.
            StoreError: any other trouble of the disk; as above.

        Cancellation: the changes are made all the same, or fail unheard. They keep their place, so a change that
        takes them back, queued afterwards, is made after them.
        """

    @abc.abstractmethod
    def post(self, *changes: Change) -> None:
        """Have `changes` made soon, all of them or none; after a crash they may be missing.

        Never waits and never fails: posted changes are tried again until the disk takes them. While more than
        `MAX_POSTED` wait for a disk that takes nothing, new ones are dropped, counted and logged.
        """

    @abc.abstractmethod
    async def flush(self) -> None:
        """Return when all that was queued before is durable.

        Raises:
            StoreError: the disk does not take it.
        """

    @abc.abstractmethod
    async def read_input(self, request_id: str, name: str) -> bytes:
        """The bytes of an input of a committed request.

        Raises:
            KeyError: there is no such input (the request ended, or never was).
            StoreError: it cannot be read.
        """


# -- the state folder ---------------------------------------------------------------------------------------------
