"""The store's files: locks, permissions, damage, and files it cannot use."""

import contextlib
import os
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from relayd.store import (
    PutRequest,
    PutSpace,
    PutToken,
    SpaceRecord,
    StoreError,
    StoreInUse,
    open_offline,
    open_store,
)
from relayd.store.database import DATABASE_NAME, SCHEMA_VERSION
from tests.relayd.store.records import config, open_sqlite_store, request, token


@pytest.mark.trio
@pytest.mark.parametrize("kind", ["sqlite", "memory"])
async def test_a_second_daemon_on_the_folder_is_refused(tmp_path: Path, kind: str) -> None:
    async with open_store(config(tmp_path, kind)):
        with pytest.raises(StoreInUse, match=f"another relayd \\(pid {os.getpid()}\\) uses"):
            async with open_store(config(tmp_path)):
                pass
        with pytest.raises(StoreInUse), open_offline(tmp_path):
            pass
    async with open_store(config(tmp_path)):
        pass


@pytest.mark.trio
async def test_commands_and_the_daemon_see_each_others_changes(tmp_path: Path) -> None:
    with open_offline(tmp_path / "new" / "state") as offline:
        offline.commit(PutToken(token()), PutSpace(SpaceRecord(name="x")))
        assert offline.load().tokens == (token(),)
        with pytest.raises(StoreError):
            offline.commit(PutRequest(request(1, ticket=2**70)))
    async with open_sqlite_store(tmp_path / "new" / "state") as store:
        assert [space.name for space in (await store.load()).spaces] == ["x"]


@pytest.mark.trio
async def test_only_the_owner_can_read_what_is_stored(tmp_path: Path) -> None:
    state_dir = tmp_path / "state"
    async with open_sqlite_store(state_dir) as store:
        await store.commit(PutToken(token()))
        assert stat.S_IMODE(state_dir.stat().st_mode) == 0o700
        assert {stat.S_IMODE(path.stat().st_mode) for path in state_dir.iterdir()} == {0o600}


def _newer(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")


def _foreign(path: Path) -> None:
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE birds (name)")


def _garbage(path: Path) -> None:
    path.write_bytes(b"no database" * 1000)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.trio
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_newer, f"newer relayd \\(schema {SCHEMA_VERSION + 1}; this one knows {SCHEMA_VERSION}\\): upgrade"),
        (_foreign, "of another program"),
        (_garbage, "move it away"),
        (_folder, "cannot open"),
    ],
)
async def test_a_file_it_cannot_use_is_refused_in_words(
    tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    with open_offline(tmp_path):
        pass
    spoil(tmp_path / DATABASE_NAME)
    with pytest.raises(StoreError, match=words):
        async with open_store(config(tmp_path)):
            pass


@pytest.mark.trio
async def test_a_state_dir_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot create the state folder"):
        async with open_store(config(tmp_path / "file" / "state")):
            pass


@pytest.mark.trio
async def test_a_damaged_row_costs_only_itself(tmp_path: Path) -> None:
    with open_offline(tmp_path) as offline:
        offline.commit(*(PutRequest(request(n)) for n in range(3)), PutToken(token()), PutToken(token(2)))
        offline.commit(PutSpace(SpaceRecord(name="a")), PutSpace(SpaceRecord(name="b")))
    with contextlib.closing(sqlite3.connect(tmp_path / DATABASE_NAME)) as db, db:
        db.execute("UPDATE requests SET submit = x'c1' WHERE ticket = 1")
        db.execute("UPDATE tokens SET spaces = 'x' WHERE token_id = 'tok_1'")
        db.execute("""UPDATE spaces SET config = '{"max_workers": 0}' WHERE name = 'a'""")
        db.execute("""UPDATE spaces SET config = '{"max_workers": 4, "of_the_future": 1}' WHERE name = 'b'""")
    async with open_sqlite_store(tmp_path) as store:
        loaded = await store.load()
    assert [record.ticket for record in loaded.requests] == [0, 2]
    assert [record.token_id for record in loaded.tokens] == ["tok_2"]
    assert [(record.name, record.config.max_workers) for record in loaded.spaces] == [("b", 4)]
    assert [words.split(":")[0] for words in loaded.damaged] == ["spaces", "tokens", "requests"]


@pytest.mark.trio
async def test_a_locked_database_fails_the_commit_and_not_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relayd.store.database.BUSY_TIMEOUT_S", 0.01)
    async with open_sqlite_store(tmp_path) as store:
        with contextlib.closing(sqlite3.connect(tmp_path / DATABASE_NAME, isolation_level=None)) as shell:
            shell.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreError, match="locked"):
                await store.commit(PutRequest(request(1)))
            shell.execute("ROLLBACK")
        await store.commit(PutRequest(request(2)))
        assert [record.ticket for record in (await store.load()).requests] == [2]


def test_a_command_run_by_root_leaves_files_to_the_folders_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: set[tuple[int, int]] = set()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "fchown", lambda _fd, uid, gid: given.add((uid, gid)))
    folder = tmp_path.stat()
    with open_offline(tmp_path) as offline:
        offline.commit(PutToken(token()))
    assert given == {(folder.st_uid, folder.st_gid)}
