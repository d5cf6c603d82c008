"""The store: what is loaded again, transactions, full disks, and that both stores mean the same."""

import contextlib
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from protocol.wire.errors import ErrorCode
from protocol.wire.structs import AudioFormat, InputRule
from relayd.config.schema import SpaceConfig
from relayd.store import (
    AppendInput,
    Change,
    DeleteRequest,
    DeleteSpace,
    DeleteTalk,
    DeleteToken,
    DeleteTurns,
    PutHeard,
    PutRequest,
    PutSpace,
    PutTalk,
    PutToken,
    PutTurn,
    SpaceRecord,
    StorageFull,
    Store,
    StoredInput,
    StoreError,
    TokenLimits,
    UpdateRequest,
    open_offline,
    open_store,
)
from relayd.store import sqlite as sqlite_store
from relayd.store.database import DATABASE_NAME, SCHEMA_VERSION, Database, Statement
from relayd.store.memory import MemoryStore
from relayd.store.records import (
    DeleteInvite,
    DeleteSession,
    InviteRecord,
    PutInvite,
    PutSession,
    PutUser,
    SessionRecord,
    UserRecord,
)
from relayd.store.sqlite import SqliteStore
from tests.relayd.store.records import (
    config,
    open_sqlite_store,
    reply_to_come,
    request,
    request_id,
    talk,
    token,
    turn,
)


def ended(number: int, state: str = "completed") -> UpdateRequest:
    return UpdateRequest(request_id=request_id(number), state=state, attempt=1, losses=0, ended_at=5.0)


@pytest.mark.trio
@pytest.mark.parametrize("kind", ["sqlite", "memory"])
async def test_every_change_is_in_what_is_loaded(tmp_path: Path, kind: str) -> None:
    space = SpaceRecord(
        name="tts",
        config=SpaceConfig(max_workers=3, max_running_per_principal=2, description="语"),
        paused=True,
        made_by="config",
        engine="espeak",
        params={"type": "object", "properties": {"text": {"type": "string"}}},
        inputs={"voice": InputRule(media_types=["audio/wav"], max_bytes=7, required=True)},
        format=AudioFormat(sample_rate=22_050),
        created_at=1.5,
    )
    full = token(1, spaces=("tts", "lab-*"), limits=TokenLimits(max_queued=4), expires_at=9.5, revoked_at=3.5)
    async with open_store(config(tmp_path, kind)) as store:
        await store.commit(PutSpace(space), PutSpace(SpaceRecord(name="a")), PutToken(full), PutToken(token(2)))
        await store.commit(PutRequest(request(2), {"voice": bytearray(b"abc")}), PutRequest(request(1)))
        store.post(
            UpdateRequest(
                request_id=request_id(2), state="running", attempt=2, losses=1, has_output=True, reproducible="espeak"
            )
        )
        loaded = await store.load()
        assert loaded.spaces == (SpaceRecord(name="a"), space)
        assert loaded.tokens == (full, token(2))
        running = request(2, state="running", attempt=2, losses=1, has_output=True, reproducible="espeak")
        assert loaded.requests == (request(1), running)
        assert loaded.damaged == ()
        assert await store.read_input(request_id(2), "voice") == b"abc"

        store.post(DeleteSpace("a"), DeleteToken("tok_2"), DeleteRequest(request_id(1)))
        failed = UpdateRequest(
            request_id=request_id(2), state="failed", attempt=2, losses=1, ended_at=7.0, code="internal", message="oh"
        )
        await store.commit(failed, ended(99))
        loaded = await store.load()
        assert [record.name for record in loaded.spaces] == ["tts"]
        assert loaded.tokens == (full,)
        (only,) = loaded.requests
        assert (only.state, only.code, only.message, only.ended_at) == ("failed", "internal", "oh", 7.0)
        with pytest.raises(KeyError):
            await store.read_input(request_id(2), "voice")


@pytest.mark.trio
@pytest.mark.parametrize("kind", ["sqlite", "memory"])
async def test_users_sessions_and_invitations_are_kept_and_a_name_is_one_users(tmp_path: Path, kind: str) -> None:
    def user(number: int, name: str, **fields: Any) -> UserRecord:
        return UserRecord(user_id=f"usr_{number}", name=name, created_at=float(number), **fields)

    session = SessionRecord(session_id="ses_1", user_id="usr_1", sha256=b"s" * 32, created_at=1.5, used_at=2.5)
    invite = InviteRecord(invite_id="inv_1", sha256=b"i" * 32, role="operator", created_at=1.5, expires_at=9.5)
    removed, again = user(1, "anna", password="$argon2id$…", removed_at=3.5), user(3, "Anna", role="operator")
    async with open_store(config(tmp_path, kind)) as store:
        await store.commit(PutUser(removed), PutUser(user(2, "bob", seen_at=4.5)), PutSession(session))
        await store.commit(PutInvite(invite), PutSession(attrs.evolve(session, session_id="ses_2", sha256=b"t" * 32)))
        loaded = await store.load()
        assert loaded.users == (removed, user(2, "bob", seen_at=4.5))
        assert [each.session_id for each in loaded.sessions] == ["ses_1", "ses_2"]
        assert (loaded.sessions[0], loaded.invites, loaded.damaged) == (session, (invite,), ())
        await store.commit(PutUser(again), DeleteSession("ses_2"), DeleteInvite("inv_1"))
        loaded = await store.load()
        assert loaded.users == (user(2, "bob", seen_at=4.5), again)
        assert (loaded.sessions, loaded.invites) == ((session,), ())


@pytest.mark.trio
@pytest.mark.parametrize("kind", ["sqlite", "memory"])
async def test_a_request_put_again_replaces_its_inputs(tmp_path: Path, kind: str) -> None:
    async with open_store(config(tmp_path, kind)) as store:
        await store.commit(PutRequest(request(1), {"a": b"1", "b": b"2"}))
        await store.commit(PutRequest(request(1), {"a": b"3"}))
        assert await store.read_input(request_id(1), "a") == b"3"
        with pytest.raises(KeyError):
            await store.read_input(request_id(1), "b")
        with pytest.raises(KeyError):
            await store.read_input(request_id(2), "a")


@pytest.mark.trio
async def test_a_conversation_and_its_turns_are_there_after_a_restart(tmp_path: Path) -> None:
    said = [turn(0), reply_to_come(1), turn(2, heard_chars=1, state="interrupted", code="no_worker", message="oh")]
    async with open_sqlite_store(tmp_path) as store:
        await store.commit(PutTalk(talk(1, instructions="Be brief.")), PutTalk(talk(2)), *map(PutTurn, said))
        await store.commit(PutTurn(turn(0, 3)), PutTurn(turn(0, 2)), DeleteTalk("talk-2"))
    async with open_sqlite_store(tmp_path) as store:
        loaded = await store.load()
        assert (loaded.talks, loaded.unended_turns) == ((talk(1, instructions="Be brief."),), (said[1],))
        assert await store.read_turns("talk-1") == tuple(said)
        assert await store.read_turns("talk-2") == await store.read_turns("talk-3") == ()
        store.post(PutTurn(turn(1, role="assistant")), DeleteTurns("talk-1", 0, 0))
        store.post(PutHeard("talk-1", 1, 3), PutHeard("talk-1", 2, None), PutHeard("talk-1", 7, 1))
        told = [(each.number, each.heard_chars) for each in await store.read_turns("talk-1")]
        assert told == [(1, 3), (2, None)], "also what is only queued"
        assert (await store.load()).unended_turns == ()


def piece(number: int, offset: int, data: bytes, *, last: bool = False) -> AppendInput:
    return AppendInput(request_id=request_id(number), name="text", offset=offset, data=data, last=last)


@pytest.mark.trio
@pytest.mark.parametrize("kind", ["sqlite", "memory"])
async def test_a_live_input_is_there_piece_by_piece_and_can_be_read_from_anywhere(tmp_path: Path, kind: str) -> None:
    async with open_store(config(tmp_path, kind)) as store:
        await store.commit(PutRequest(request(1)), PutRequest(request(2)))
        data, sizes = bytes(range(100)), (1, 30, 60, 9)
        for number, size in enumerate(sizes):
            offset = sum(sizes[:number])
            await store.commit(piece(1, offset, data[offset : offset + size]))
        await store.commit(piece(2, 0, b"", last=True))
        await store.commit(piece(3, 0, b"of no request"))
        loaded = await store.load()
        assert loaded.live_inputs == {
            request_id(1): {"text": StoredInput(100, ended=False)},
            request_id(2): {"text": StoredInput(0, ended=True)},
        }
        for start in range(101):
            for most in (1, 29, 31, 200):
                assert await store.read_live_input(request_id(1), "text", start, most) == data[start : start + most]
        assert await store.read_live_input(request_id(3), "text", 0, 10) == b""
        await store.commit(piece(1, 100, b"", last=True), ended(1))
        await store.commit(piece(1, 100, b"too late"))
        await store.commit(DeleteRequest(request_id(2)))
        assert (await store.load()).live_inputs == {}
        assert await store.read_live_input(request_id(1), "text", 0, 200) == b""


@pytest.mark.trio
async def test_the_pieces_of_a_live_input_are_there_after_a_restart(tmp_path: Path) -> None:
    async with open_sqlite_store(tmp_path) as store:
        await store.commit(PutRequest(request(1)))
        await store.commit(piece(1, 0, b"abc"), piece(1, 3, b"de", last=True))
    async with open_sqlite_store(tmp_path) as store:
        assert (await store.load()).live_inputs == {request_id(1): {"text": StoredInput(5, ended=True)}}
        assert await store.read_live_input(request_id(1), "text", 2, 2) == b"cd"


@pytest.mark.trio
@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM input_pieces WHERE offset = 3",
        "DELETE FROM input_pieces WHERE offset = 0",
        "UPDATE input_pieces SET data = x'61' WHERE offset = 3",
        "UPDATE input_pieces SET data = 'text' WHERE offset = 3",
        "UPDATE input_pieces SET data = 12 WHERE offset = 3",
        "UPDATE input_pieces SET offset = 2 WHERE offset = 3",
        "UPDATE input_pieces SET offset = 'x' WHERE offset = 3",
        "UPDATE input_pieces SET offset = -1 WHERE offset = 0",
        "UPDATE input_pieces SET last = 1 WHERE offset = 3",
        "UPDATE input_pieces SET last = 'no' WHERE offset = 3",
    ],
)
async def test_a_gap_in_a_live_input_costs_its_request_alone(tmp_path: Path, damage: str) -> None:
    async with open_sqlite_store(tmp_path) as store:
        await store.commit(PutRequest(request(1)), PutRequest(request(2)))
        for number, last in ((1, False), (2, True)):
            await store.commit(piece(number, 0, b"abc"), piece(number, 3, b"de"), piece(number, 5, b"f", last=last))
    with sqlite3.connect(tmp_path / DATABASE_NAME) as database:
        assert database.execute(f"{damage} AND request_id = ?", (request_id(1),)).rowcount == 1
    database.close()
    async with open_sqlite_store(tmp_path) as store:
        loaded = await store.load()
        assert [record.request_id for record in loaded.requests] == [request_id(2)]
        assert loaded.live_inputs[request_id(2)] == {"text": StoredInput(6, ended=True)}
        assert loaded.damaged_keys == {("requests", request_id(1))}
        assert "input 'text' do not follow each other" in loaded.damaged[0]
        if "last" not in damage:
            with contextlib.suppress(StoreError):
                assert await store.read_live_input(request_id(1), "text", 0, 10) != b"abcdef"


@pytest.mark.trio
async def test_what_was_committed_or_posted_is_there_after_a_restart(tmp_path: Path) -> None:
    async with open_sqlite_store(tmp_path) as store:
        await store.commit(PutRequest(request(1), {"voice": b"x" * 100_000}))
        store.post(ended(7), PutToken(token()))
    async with open_sqlite_store(tmp_path) as store:
        loaded = await store.load()
        assert loaded.requests == (request(1),)
        assert loaded.tokens == (token(),)
        assert await store.read_input(request_id(1), "voice") == b"x" * 100_000


CHILD = """
import sys
from pathlib import Path
import trio
from relayd.store import PutRequest, UpdateRequest, open_store
from relayd.config.loader import Config
from tests.relayd.store.records import request, request_id

async def main():
    async with open_store(Config(state_dir=Path(sys.argv[1]))) as store, trio.open_nursery() as nursery:
        async def writer(first):
            number = first
            while True:
                await store.commit(PutRequest(request(number), {"voice": b"%d" % number}))
                print(number, flush=True)
                store.post(UpdateRequest(request_id=request_id(number), state="running", attempt=1, losses=0))
                number += 8
        for first in range(8):
            nursery.start_soon(writer, first)

trio.run(main)
"""


def test_kill_minus_9_loses_nothing_whose_commit_returned(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3], text=True) as child:
        assert child.stdout is not None
        told = [int(child.stdout.readline()) for _ in range(200)]
        child.kill()
        told += [int(line) for line in child.stdout.read().split("\n")[:-1]]

    with open_offline(tmp_path) as store:
        loaded = store.load()
        kept = {record.ticket: record for record in loaded.requests}
        assert loaded.damaged == ()
        assert list(kept) == sorted(kept)
        assert set(told) <= set(kept)
        for number in told:
            assert store.read_input(request_id(number), "voice") == b"%d" % number
        # Each of the eight writers posts an update before its next commit: with that one, the update is there.
        for number in (n - 8 for n in told if n >= 8):
            assert kept[number].state == "running"


@pytest.mark.trio
async def test_waiting_commits_share_one_transaction(tmp_path: Path) -> None:
    async with open_sqlite_store(tmp_path) as store:
        before = store.transactions
        async with trio.open_nursery() as nursery:
            for number in range(500):
                nursery.start_soon(store.commit, PutRequest(request(number)))
        assert store.transactions - before <= 5
        assert len((await store.load()).requests) == 500


def _gate(monkeypatch: pytest.MonkeyPatch) -> tuple[trio.Event, trio.Event]:
    """Hold the store's next transaction: (it has begun, let it go)."""
    begun, go_on = trio.Event(), trio.Event()
    write = Database.write

    def held(database: Database, statements: Sequence[Statement]) -> StoreError | None:
        trio.from_thread.run_sync(begun.set)
        trio.from_thread.run(go_on.wait)
        return write(database, statements)

    monkeypatch.setattr(Database, "write", held)
    return begun, go_on


@pytest.mark.trio
async def test_a_cancelled_commit_is_whole_and_does_not_hurt_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_sqlite_store(tmp_path) as store:
        begun, go_on = _gate(monkeypatch)
        writing, waiting = trio.CancelScope(), trio.CancelScope()

        async def commit(number: int, scope: trio.CancelScope) -> None:
            with scope:
                await store.commit(PutRequest(request(number)), PutRequest(request(number + 1)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(commit, 10, writing)
            await begun.wait()
            nursery.start_soon(commit, 20, waiting)
            nursery.start_soon(commit, 30, trio.CancelScope())
            await wait_all_tasks_blocked()
            writing.cancel()
            waiting.cancel()
            await wait_all_tasks_blocked()
            store.post(DeleteRequest(request_id(20)))
            go_on.set()
        tickets = {record.ticket for record in (await store.load()).requests}
        assert tickets == {10, 11, 21, 30, 31}


@pytest.mark.trio
async def test_changes_are_made_in_the_order_of_the_calls(tmp_path: Path) -> None:
    async with open_sqlite_store(tmp_path) as store:
        store.post(PutRequest(request(1)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                store.commit, UpdateRequest(request_id=request_id(1), state="running", attempt=1, losses=0)
            )
            await wait_all_tasks_blocked()
            store.post(UpdateRequest(request_id=request_id(1), state="running", attempt=2, losses=1))
            nursery.start_soon(store.commit, ended(1))
        (record,) = (await store.load()).requests
        assert (record.state, record.attempt) == ("completed", 1)


@pytest.mark.trio
async def test_a_cancelled_daemon_writes_what_is_queued(tmp_path: Path) -> None:
    with trio.CancelScope() as scope:
        async with open_sqlite_store(tmp_path) as store:
            scope.cancel()
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await store.commit(PutRequest(request(1)))
                store.post(PutRequest(request(2)))
    async with open_sqlite_store(tmp_path) as store:
        assert [record.ticket for record in (await store.load()).requests] == [1, 2]


def _limit_pages(store: SqliteStore, more: int) -> None:
    """Make the disk full, as SQLite sees it, `more` pages from now."""
    writer = store._database._writer
    (pages,) = writer.execute("PRAGMA page_count").fetchone()
    writer.execute(f"PRAGMA max_page_count = {pages + more}")


@pytest.mark.trio
async def test_a_full_disk_is_told_to_its_committers_and_the_store_goes_on(tmp_path: Path) -> None:
    async with open_sqlite_store(tmp_path) as store:
        await store.commit(PutRequest(request(1)))
        _limit_pages(store, 4)
        outcomes: dict[int, StoreError | None] = {}

        async def commit(number: int, size: int) -> None:
            try:
                await store.commit(PutRequest(request(number), {"voice": bytes(size)}))
                outcomes[number] = None
            except StoreError as fault:
                outcomes[number] = fault

        async with trio.open_nursery() as nursery:
            nursery.start_soon(commit, 2, 1_000_000)
            nursery.start_soon(commit, 3, 10)
            nursery.start_soon(commit, 4, 1_000_000)
        assert isinstance(outcomes[2], StorageFull)
        assert outcomes[2].code is ErrorCode.STORAGE_FULL
        assert "free some space" in str(outcomes[2])
        assert isinstance(outcomes[4], StorageFull)
        assert outcomes[2] is not outcomes[4]
        assert outcomes[3] is None, "a small one is not to suffer for the large ones it shared a transaction with"
        await store.commit(ended(1))
        _limit_pages(store, 10_000)
        await store.commit(PutRequest(request(5), {"voice": bytes(1_000_000)}))
        assert [record.ticket for record in (await store.load()).requests] == [1, 3, 5]


@pytest.mark.trio
async def test_posts_wait_for_room_and_keep_their_order(tmp_path: Path) -> None:
    async with open_sqlite_store(tmp_path) as store:
        await store.commit(PutRequest(request(1)))
        _limit_pages(store, 1)
        store.post(PutRequest(request(2), {"voice": bytes(1_000_000)}))
        store.post(ended(2, "failed"))
        with pytest.raises(StorageFull):
            await store.commit(UpdateRequest(request_id=request_id(2), state="running", attempt=1, losses=0))
        assert store.queued == 2
        _limit_pages(store, 10_000)
        await store.flush()
        loaded = await store.load()
        assert [(record.ticket, record.state) for record in loaded.requests] == [(1, "queued"), (2, "failed")]
        assert store.dropped == 0


@pytest.mark.trio
async def test_posts_are_tried_again_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_store, "RETRY_S", 0.01)
    async with open_sqlite_store(tmp_path) as store:
        write, outcomes, written = Database.write, [], trio.Event()

        def watched(database: Database, statements: Sequence[Statement]) -> StoreError | None:
            error = write(database, statements)
            outcomes.append(type(error))
            if error is None:
                trio.from_thread.run_sync(written.set)
            else:
                _limit_pages(store, 10_000)
            return error

        monkeypatch.setattr(Database, "write", watched)
        _limit_pages(store, 1)
        store.post(PutRequest(request(2), {"voice": bytes(1_000_000)}))
        await written.wait()
        assert outcomes == [StorageFull, type(None)]
        assert len((await store.load()).requests) == 1


@pytest.mark.trio
async def test_a_commit_does_not_wait_for_the_pause_after_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_store, "RETRY_S", 3600)
    async with open_sqlite_store(tmp_path) as store:
        write, failed = Database.write, trio.Event()

        def watched(database: Database, statements: Sequence[Statement]) -> StoreError | None:
            error = write(database, statements)
            if error is not None:
                trio.from_thread.run_sync(failed.set)
            return error

        monkeypatch.setattr(Database, "write", watched)
        _limit_pages(store, 1)
        store.post(PutRequest(request(2), {"voice": bytes(1_000_000)}))
        await failed.wait()
        await wait_all_tasks_blocked()
        _limit_pages(store, 10_000)
        await store.commit(PutRequest(request(3)))
        assert [record.ticket for record in (await store.load()).requests] == [2, 3]


@pytest.mark.trio
async def test_posts_beyond_the_bound_are_dropped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_store, "MAX_POSTED", 3)
    async with open_sqlite_store(tmp_path) as store:
        for number in range(5):
            store.post(PutRequest(request(number)))
        assert store.dropped == 2
        await store.flush()
        store.post(PutRequest(request(9)))
        assert [record.ticket for record in (await store.load()).requests] == [0, 1, 2, 9]


@pytest.mark.trio
async def test_a_change_sqlite_has_no_word_for_fails_alone(tmp_path: Path) -> None:
    bad = request(1, ticket=2**70)
    async with open_sqlite_store(tmp_path) as store:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.commit, PutRequest(request(2)))
            store.post(PutRequest(bad))
            nursery.start_soon(store.commit, PutRequest(request(3)))
            with pytest.raises(StoreError, match="too large"):
                await store.commit(PutRequest(bad))
        assert store.dropped == 1
        assert [record.ticket for record in (await store.load()).requests] == [2, 3]


@pytest.mark.trio
async def test_one_call_is_all_or_nothing(tmp_path: Path) -> None:
    async with open_sqlite_store(tmp_path) as store:
        with pytest.raises(StoreError):
            await store.commit(PutRequest(request(2)), PutRequest(request(1, ticket=2**70)))
        assert (await store.load()).requests == ()


@pytest.mark.trio
async def test_a_closed_store_takes_nothing(tmp_path: Path) -> None:
    async with open_sqlite_store(tmp_path) as store:
        pass
    with pytest.raises(StoreError, match="closed"):
        await store.commit(PutRequest(request(1)))
    store.post(PutRequest(request(1)))
    assert store.dropped == 1


numbers = st.integers(0, 3)
updates = st.builds(
    UpdateRequest,
    request_id=numbers.map(request_id),
    state=st.sampled_from(["queued", "running", "completed"]),
    attempt=numbers,
    losses=numbers,
)
puts = st.builds(
    lambda number, inputs: PutRequest(request(number), inputs),
    numbers,
    st.dictionaries(st.sampled_from(["a", "b"]), st.binary(max_size=3)),
)
talks = st.integers(0, 1)
turns = st.builds(
    lambda number, of, make: PutTurn(make(number, of)), numbers, talks, st.sampled_from([turn, reply_to_come])
)
changes = st.one_of(
    puts,
    updates,
    updates,
    numbers.map(request_id).map(DeleteRequest),
    st.builds(lambda number, said: PutTalk(talk(number, instructions=said)), talks, st.sampled_from(["", "Be brief."])),
    turns,
    turns,
    st.builds(
        lambda number, of, heard: PutHeard(f"talk-{of}", number, heard), numbers, talks, st.none() | st.integers(0, 9)
    ),
    talks.map(lambda number: DeleteTalk(f"talk-{number}")),
    st.builds(lambda number, first, last: DeleteTurns(f"talk-{number}", first, last), talks, numbers, numbers),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(st.lists(changes, min_size=1, max_size=4), max_size=8))
def test_both_stores_mean_the_same(tmp_path_factory: pytest.TempPathFactory, batches: list[list[Change]]) -> None:
    async def contents(store: Store) -> object:
        found: dict[tuple[str, str], bytes] = {}
        loaded = await store.load()
        for record in loaded.requests:
            for name in "ab":
                with contextlib.suppress(KeyError):
                    found[record.request_id, name] = await store.read_input(record.request_id, name)
        return attrs.asdict(loaded), found, [await store.read_turns(f"talk-{number}") for number in range(2)]

    async def run() -> None:
        memory = MemoryStore()
        async with open_sqlite_store(tmp_path_factory.mktemp("state")) as store:
            for number, batch in enumerate(batches):
                memory.post(*batch)
                if number % 2:
                    await store.commit(*batch)
                else:
                    store.post(*batch)
            assert await contents(store) == await contents(memory)

    trio.run(run)


def test_a_fresh_database_has_the_schema_version_it_says(tmp_path: Path) -> None:
    database = Database.open(tmp_path)
    (version,) = database._writer.execute("PRAGMA user_version").fetchone()
    (synchronous,) = database._writer.execute("PRAGMA synchronous").fetchone()
    (journal,) = database._writer.execute("PRAGMA journal_mode").fetchone()
    database.close()
    assert (version, synchronous, journal) == (SCHEMA_VERSION, 2, "wal")
