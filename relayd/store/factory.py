"""The store that the settings ask for, with its state folder locked."""

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from relayd.config.schema import Config
from relayd.store.base import Store
from relayd.store.database import Database
from relayd.store.records import Change, Loaded
from relayd.store.state_dir import lock_state_dir


@contextlib.asynccontextmanager
async def open_store(config: Config) -> AsyncIterator[Store]:
    """The daemon's store. The state folder is this process's alone until the end, also with `store = "memory"`.

    On the way out what is queued is written, within `sqlite.CLOSE_S`.

    Raises:
        StoreInUse: another relayd, or an admin command, is on this folder.
        StoreError: the folder or the database cannot be used; the text says why.
    """
    from relayd.store.memory import MemoryStore
    from relayd.store.sqlite import open_sqlite

    with lock_state_dir(config.state_dir):
        if config.store == "memory":
            yield MemoryStore()
        else:
            async with open_sqlite(config.state_dir) as store:
                yield store


class OfflineStore:
    """The store of a daemon that is not running, for admin commands. Blocks."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def load(self) -> Loaded:
        """As `Store.load`."""
        return self._database.load()

    def read_input(self, request_id: str, name: str) -> bytes:
        """As `Store.read_input`."""
        return self._database.read_input(request_id, name)

    def commit(self, *changes: Change) -> None:
        """As `Store.commit`."""
        if (fault := self._database.write(self._database.statements(changes))) is not None:
            raise fault


@contextlib.contextmanager
def open_offline(state_dir: Path) -> Iterator[OfflineStore]:
    """The SQLite store in `state_dir`, for a command that runs while no daemon does.

    Raises:
        StoreInUse: a daemon runs on this folder (or stops just now).
        StoreError: the folder or the database cannot be used; the text says why.
    """
    with lock_state_dir(state_dir):
        database = Database.open(state_dir)
        try:
            yield OfflineStore(database)
        finally:
            database.close()
