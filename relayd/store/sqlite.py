"""The durable store: a writer task commits all queued changes in one transaction, with one fsync."""

import contextlib
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path

import attrs
import trio

from relayd.logs.setup import get_logger
from relayd.store.base import MAX_POSTED, StorageFull, Store, StoreError
from relayd.store.database import BadChange, Database, Statement
from relayd.store.records import Change, Loaded, TurnRecord

log = get_logger(__name__)

#: How long writing the queue may take at the end.
CLOSE_S = 10.0
#: Pause before posted changes are retried after a failure; a `commit` in between retries them at once.
RETRY_S = 1.0
#: Limit of input data per transaction, which limits how long a small commit waits for large ones.
MAX_BATCH_BYTES = 32 * 1024 * 1024


@attrs.define(eq=False)
class _Entry:
    """The changes of one call. `done` is None for a post."""

    statements: list[Statement]
    size_bytes: int
    done: trio.Event | None
    error: StoreError | None = None


class SqliteStore(Store):
    """See `open_sqlite`."""

    def __init__(self, database: Database) -> None:
        super().__init__()
        self._database = database
        self._queue: deque[_Entry] = deque()
        self._posted = 0
        #: `_queued` is set by every call, `_urgent` by calls that must not wait for the pause after a failure.
        self._queued = trio.Event()
        self._urgent = trio.Event()
        self._closing = False
        self._holding = False
        self._scope = trio.CancelScope(shield=True)
        # Own thread limiters: a default limiter exhausted by name lookups must not delay `accepted`.
        self._write_limiter = trio.CapacityLimiter(1)
        self._read_limiter = trio.CapacityLimiter(1)

    @property
    def transactions(self) -> int:
        """See `Store.transactions`."""
        return self._database.transactions

    @property
    def queued(self) -> int:
        """See `Store.queued`."""
        return len(self._queue)

    async def load(self) -> Loaded:
        """See `Store.load`."""
        await self.flush()
        return await trio.to_thread.run_sync(self._database.load, limiter=self._read_limiter)

    async def read_input(self, request_id: str, name: str) -> bytes:
        """See `Store.read_input`."""
        return await trio.to_thread.run_sync(self._database.read_input, request_id, name, limiter=self._read_limiter)

    async def read_live_input(self, request_id: str, name: str, offset: int, most: int) -> bytes:
        """See `Store.read_live_input`."""
        read = self._database.read_live_input
        return await trio.to_thread.run_sync(read, request_id, name, offset, most, limiter=self._read_limiter)

    async def read_turns(self, talk_id: str) -> tuple[TurnRecord, ...]:
        """See `Store.read_turns`; changes that are still queued are in it."""
        await self.flush()
        return await trio.to_thread.run_sync(self._database.read_turns, talk_id, limiter=self._read_limiter)

    async def commit(self, *changes: Change) -> None:
        """See `Store.commit`."""
        if self._closing:
            raise StoreError("the store is closed")
        done = trio.Event()
        called_at = trio.current_time()
        entry = self._enqueue(changes, done)
        self._urgent.set()
        await done.wait()
        if entry.error is None:
            self.commit_s.add(trio.current_time() - called_at)
        else:
            self.failed_commits += 1
            # One error may fail many callers, and each needs its own exception object.
            raise type(entry.error)(*entry.error.args) from entry.error

    async def flush(self) -> None:
        """See `Store.flush`; an empty commit, which waits for its turn."""
        await self.commit()

    def post(self, *changes: Change) -> None:
        """See `Store.post`."""
        if self._closing or self._posted >= MAX_POSTED:
            self._drop("the store is closed" if self._closing else f"{MAX_POSTED} are already waiting for the disk")
            return
        self._enqueue(changes, None)
        self._posted += 1

    def _enqueue(self, changes: tuple[Change, ...], done: trio.Event | None) -> _Entry:
        # Converted to SQL here, so that an invalid change raises in its caller.
        statements = self._database.statements(changes)
        size = sum(len(v) for _, values in statements for v in values if isinstance(v, bytes | bytearray))
        entry = _Entry(statements, size, done)
        self._queue.append(entry)
        self._queued.set()
        return entry

    def _drop(self, why: str) -> None:
        self.dropped += 1
        log.error("a change was not stored", why=why, dropped=self.dropped)

    # -- the writer -

    async def serve_writes(self) -> None:
        """Write queued changes until `stop`; shielded from cancellation by the caller."""
        with self._scope:
            while self._queue or not self._closing:
                if not self._queue:
                    self._queued = trio.Event()
                    await self._queued.wait()
                elif not await self._write_batch():
                    if self._closing:
                        break
                    await self._pause()
        for entry in self._queue:
            if entry.done is None:
                self._drop("the store was closed before it was written")
            elif not entry.done.is_set():
                entry.error = StoreError("the store was closed before the change was written")
                entry.done.set()

    def stop(self) -> None:
        """Accept nothing more, and write the queue within `CLOSE_S`."""
        self._closing = True
        self._scope.deadline = trio.current_time() + CLOSE_S
        self._queued.set()
        self._urgent.set()

    async def _pause(self) -> None:
        if any(entry.done is not None for entry in self._queue):
            return
        self._urgent = trio.Event()
        with trio.move_on_after(RETRY_S):
            await self._urgent.wait()

    async def _write_batch(self) -> bool:
        """Write the first entries of the queue; False if some posts failed and stay in the queue for a retry."""
        batch = self._next_batch()
        error = await self._write(batch)
        one_by_one = len(batch) > 1 and isinstance(error, StorageFull | BadChange)
        held: list[_Entry] = []
        for entry in batch:
            if one_by_one and not held:
                error = await self._write([entry])
            if error is not None and entry.done is None and not isinstance(error, BadChange):
                held.append(entry)
            else:
                # Commits after a held post fail with it: written before it, they would break the order.
                self._conclude(entry, error)
        for _ in batch:
            self._queue.popleft()
        self._queue.extendleft(reversed(held))
        self._report_holding(held, error)
        return not held

    def _next_batch(self) -> list[_Entry]:
        batch: list[_Entry] = []
        size = 0
        for entry in self._queue:
            size += entry.size_bytes
            if batch and size > MAX_BATCH_BYTES:
                break
            batch.append(entry)
        return batch

    async def _write(self, batch: list[_Entry]) -> StoreError | None:
        statements = [statement for entry in batch for statement in entry.statements]
        return await trio.to_thread.run_sync(self._database.write, statements, limiter=self._write_limiter)

    def _conclude(self, entry: _Entry, error: StoreError | None) -> None:
        if entry.done is not None:
            entry.error = error
            entry.done.set()
            return
        self._posted -= 1
        if error is not None:
            self._drop(str(error))

    def _report_holding(self, held: list[_Entry], error: StoreError | None) -> None:
        if bool(held) != self._holding:
            self._holding = bool(held)
            if held:
                log.error("the disk refuses changes; retrying", error=str(error), waiting=len(self._queue))
            else:
                log.info("the disk accepts changes again")


@contextlib.asynccontextmanager
async def open_sqlite(state_dir: Path) -> AsyncIterator[SqliteStore]:
    """Open the store in `state_dir`, which must exist and be locked by the caller.

    Raises:
        StoreError: the database cannot be used.

    Cancellation: the writer runs until the end of the block, so that cleanup can still commit.
    """
    database = await trio.to_thread.run_sync(Database.open, state_dir)
    try:
        async with trio.open_nursery() as nursery:
            store = SqliteStore(database)
            nursery.start_soon(store.serve_writes)
            try:
                yield store
            finally:
                store.stop()
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(database.close)
