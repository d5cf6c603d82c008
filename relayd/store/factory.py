"""Opens the store chosen in the settings, with its state folder locked."""

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import trio

from relayd.config.schema import Config
from relayd.store.base import Store, StoreInUse
from relayd.store.database import Database
from relayd.store.records import Change, Loaded
from relayd.store.state_dir import lock_state_dir

#: How often a standby tries the lock. flock cannot be awaited, and a thread that waits in it cannot be cancelled.
TRY_S = 0.2

#: What a standby does while the store is in use; the block ends when it no longer is.
Waiting = Callable[[StoreInUse], contextlib.AbstractAsyncContextManager[None]]


@contextlib.asynccontextmanager
async def open_store(config: Config, waiting: Waiting | None = None) -> AsyncIterator[Store]:
    """Open the daemon's store, and lock the state folder until the end, also with `store = "memory"`.

    At the end, queued changes are written, within `sqlite.CLOSE_S`.

    Args:
        config: all settings.
        waiting: entered while another process uses the folder; None raises.

    Raises:
        StoreInUse: another relayd, or an admin command, uses the folder.
        StoreError: the folder or the database cannot be used.
    """
    from relayd.store.memory import MemoryStore
    from relayd.store.sqlite import open_sqlite

    with contextlib.ExitStack() as locked:
        try:
            locked.enter_context(lock_state_dir(config.state_dir))
        except StoreInUse as fault:
            if waiting is None:
                raise
            async with waiting(fault):
                await _lock_when_free(locked, config.state_dir)
        if config.store == "memory":
            yield MemoryStore()
        else:
            async with open_sqlite(config.state_dir) as store:
                yield store


async def _lock_when_free(locked: contextlib.ExitStack, state_dir: Path) -> None:
    while True:
        await trio.sleep(TRY_S)
        with contextlib.suppress(StoreInUse):
            locked.enter_context(lock_state_dir(state_dir))
            return


class OfflineStore:
    """The store of a daemon that is not running, for admin commands. Blocks."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def load(self) -> Loaded:
        """See `Store.load`."""
        return self._database.load()

    def read_input(self, request_id: str, name: str) -> bytes:
        """See `Store.read_input`."""
        return self._database.read_input(request_id, name)

    def commit(self, *changes: Change) -> None:
        """See `Store.commit`."""
        if (fault := self._database.write(self._database.statements(changes))) is not None:
            raise fault


@contextlib.contextmanager
def open_offline(state_dir: Path) -> Iterator[OfflineStore]:
    """Open the SQLite store in `state_dir` for a command, while no daemon runs.

    Raises:
        StoreInUse: a daemon uses this folder, or is just stopping.
        StoreError: the folder or the database cannot be used.
    """
    with lock_state_dir(state_dir):
        database = Database.open(state_dir)
        try:
            yield OfflineStore(database)
        finally:
            database.close()
