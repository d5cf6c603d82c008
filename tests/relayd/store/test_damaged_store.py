"""No stored state stops the daemon: what can be read is served, the rest is set aside, or one sentence says why not."""

import errno
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import trio

from protocol.wire.messages import Accepted, Attach, Done, Input, Status, StatusReply, Steer
from relayd.auth.tokens import Principal
from relayd.scheduling.model import State
from relayd.store import PutTalk, PutTurn
from relayd.store.base import StorageFull, StoreError
from relayd.store.database import DATABASE_NAME
from relayd.store.factory import open_offline
from relayd.talk.talks import Talk, Talks
from tests.relayd.store.records import reply_to_come, talk, turn
from tests.support.fake_worker import fake_worker, samples
from tests.support.relay import Daemon, a_submit, an_id, an_input, daemon, kept_logs, peer, until

SQLITE: dict[str, Any] = {"store": "sqlite"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A state folder, and the ids of the requests in it."""
    folder = tmp_path_factory.mktemp("whole") / "state"
    return folder, trio.run(_fill, folder)


@pytest.fixture
def filled(whole: tuple[Path, dict[str, str]], tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A copy of it."""
    return Path(shutil.copytree(whole[0], tmp_path / "state")), whole[1]


async def _fill(folder: Path) -> dict[str, str]:
    """A space, two tokens, a result, and requests that wait in two spaces."""
    ids: dict[str, str] = {}
    async with daemon(folder, **SQLITE) as relay, peer(relay.url, "operator") as operator:
        operator.send(Steer(action="create_space", target="made"))
        await operator.next(Done)
        for name in ("ann", "bob"):
            operator.send(Steer(action="create_token", target=name, options={"role": "client"}))
            await operator.next(Done)
        async with fake_worker(relay.url, instance=an_id()) as worker:
            ids["result"] = (submit := a_submit(detach=True)).request_id
            operator.send(submit)
            worker.speak(await worker.assigned(), [samples(100)])
            await operator.frames(submit)
        for name, space in (("bad", "tts"), ("good", "tts"), ("in made", "made")):
            ids[name] = (submit := a_submit(detach=True, space=space)).request_id
            operator.send(submit)
            await operator.next(Accepted)
        await relay.relay.finalizer.wait_finalized()
        await relay.relay.store.flush()
    return ids


def change(folder: Path, sql: str, *values: Any) -> None:
    """Do to the database what a disk or a person does to it."""
    with sqlite3.connect(folder / DATABASE_NAME) as database:
        assert database.execute(sql, values).rowcount == 1
    database.close()


def mistakes(logs: Iterable[Any]) -> list[Any]:
    """What tells of a mistake of the relay's own."""
    return [each for each in logs if "internal error" in each["event"] or "exc_info" in each]


async def state(relay: Daemon, request_id: str) -> str:
    async with peer(relay.url, "operator") as operator:
        operator.send(Status(request_id=request_id))
        reply = await operator.next()
        return reply.state if isinstance(reply, StatusReply) else ""


IMPOSSIBLE: dict[str, list[Any]] = {
    "requests.request_id": [None, "", 7, b"\x00", "Z" * 32, "f" * 32],
    "requests.principal": [None, b"\xff", "x" * 10_000, "CAST(x'C3' AS TEXT)"],
    "requests.ticket": [None, "first", b"\x01", -1, 0.5, 2**63 - 1],
    "requests.submit": [None, b"", b"\xc1", "text", b"\x80", b"\x91" * 100_000],
    "requests.state": [None, "", "stuck", b"queued"],
    "requests.attempt": [None, "one", -1, 2**62, 0.5, b"\x01"],
    "requests.losses": [None, "none", -1, b"\x01"],
    "requests.reproducible": [None, b"\x01"],
    "requests.stopping": [b"now", "x" * 100_000],
    "requests.worker_id": [b"box", "x" * 10_000],
    "requests.promoted": ["first", -1, b"\x01"],
    "requests.created_at": [None, "today", b"\x01", float("inf"), 1e300, -1.0],
    "requests.ended_at": ["today", b"\x01", float("inf"), 1e300],
    "requests.code": [b"x", "x" * 10_000],
    "requests.message": [b"x", "x" * 10_000],
}


@pytest.mark.trio
@pytest.mark.parametrize("column", IMPOSSIBLE)
async def test_an_impossible_request_is_set_aside_and_all_others_are_there(
    whole: tuple[Path, dict[str, str]], tmp_path: Path, column: str
) -> None:
    original, ids = whole
    for number, value in enumerate(IMPOSSIBLE[column]):
        folder = tmp_path / str(number)
        shutil.copytree(original, folder)
        place, values = "?", [value]
        if isinstance(value, str) and value.startswith("CAST"):  # text that is no UTF-8
            place, values = value, []
        name = column.partition(".")[2]
        with sqlite3.connect(folder / DATABASE_NAME) as database:
            # The columns that may not be empty are so in a damaged file all the same.
            database.execute("PRAGMA writable_schema = ON")
            database.execute("UPDATE sqlite_schema SET sql = replace(sql, ' NOT NULL', '') WHERE name = 'requests'")
        database.close()
        change(folder, f"UPDATE requests SET {name} = {place} WHERE request_id = ?", *values, ids["bad"])
        for _restart in range(1 if number else 2):
            with kept_logs() as logs:
                async with daemon(folder, **SQLITE) as relay:
                    assert await state(relay, ids["good"]) == "queued", value
                    assert await state(relay, ids["in made"]) == "queued", value
                    assert await state(relay, ids["bad"]) == "", value
                    assert relay.relay.records_set_aside == 1, value
                    await relay.goes_on()
                    relay.relay.sample(trio.current_time())
            assert mistakes(logs) == [], value
            assert [each["event"] for each in logs].count("store has a damaged record") == 1


@pytest.mark.trio
@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("name", "no/name"),
        ("config", "[]"),
        ("config", '{"max_workers": "many"}'),
        ("config", "[" * 100_000),
        ("made_by", "nobody"),
        ("engine", b"x"),
        ("params", b"\xc1"),
        ("params", b"\x81\xa4type\xa5never"),
        ("inputs", b"\x81\xa1a\x01"),
        ("format", b"\x81\xa1a\x01"),
        ("created_at", "today"),
    ],
)
async def test_requests_of_a_space_that_is_set_aside_are_kept_for_its_return(
    filled: tuple[Path, dict[str, str]], column: str, value: Any
) -> None:
    folder, ids = filled
    change(folder, f"UPDATE spaces SET {column} = ? WHERE name = 'made'", value)
    with kept_logs() as logs:
        async with daemon(folder, **SQLITE) as relay, peer(relay.url, "operator") as operator:
            assert await state(relay, ids["good"]) == "queued"
            assert await state(relay, ids["in made"]) == ""
            assert relay.relay.records_set_aside == 2, "the space, and its request"
            operator.send(Steer(action="create_space", target="made"))
            await operator.next(Done)
            await relay.goes_on()
        async with daemon(folder, **SQLITE) as relay:
            assert await state(relay, ids["in made"]) == "queued"
    assert mistakes(logs) == []


@pytest.mark.trio
@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("token_id", b"\x01"),
        ("principal", b"\x01"),
        ("role", "king"),
        ("spaces", "7"),
        ("spaces", "[7]"),
        ("sha256", "text"),
        ("limits", "[]"),
        ("limits", '{"max_queued": "many"}'),
        ("created_at", "today"),
        ("expires_at", "never"),
        ("revoked_at", "long ago"),
    ],
)
async def test_an_impossible_token_opens_nothing_and_the_others_do(
    filled: tuple[Path, dict[str, str]], column: str, value: Any
) -> None:
    folder, _ids = filled
    change(folder, f"UPDATE tokens SET {column} = ? WHERE principal = 'ann'", value)
    with kept_logs() as logs:
        async with daemon(folder, **SQLITE) as relay:
            assert [token.principal for token in relay.tokens.list()] == ["bob"]
            assert relay.relay.records_set_aside == 1
            await relay.goes_on()
    assert mistakes(logs) == []


@pytest.mark.trio
@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("talks", "principal", b"\x01"),
        ("talks", "touched_at", "today"),
        ("talks", "instructions", "x" * 10_000),
        ("turns", "role", "king"),
        ("turns", "content", b"\xff"),
        ("turns", "state", "stuck"),
        ("turns", "number", -1),
        ("turns", "text_request", "Z"),
        ("turns", "text_request", None),
        ("turns", "options", b"\xc1"),
        ("turns", "options", b"\x01"),
        ("turns", "options", "text"),
        ("turns", "options", None),
        ("turns", "at", "today"),
    ],
)
async def test_an_impossible_conversation_costs_no_other(
    filled: tuple[Path, dict[str, str]], table: str, column: str, value: Any
) -> None:
    folder, ids = filled
    with open_offline(folder) as store:
        store.commit(PutTalk(talk(1)), PutTalk(talk(2)), PutTurn(turn(0)), PutTurn(reply_to_come(1)))
        store.commit(PutTurn(turn(0, 2)), PutTurn(reply_to_come(1, 2)))
    where = "number = 1 AND talk_id = 'talk-1'" if table == "turns" else "talk_id = 'talk-1'"
    change(folder, f"UPDATE {table} SET {column} = ? WHERE {where}", value)
    with kept_logs() as logs:
        async with daemon(folder, **SQLITE, talk={"reply": "check"}, http={"no_worker_wait_s": 0.05}) as relay:
            talks = relay.http_context.talks
            assert isinstance(talks, Talks)
            other = await talks.open(Principal(name="ann", role="client"), "session-2", "user_6", create=False)
            assert isinstance(other, Talk)
            with trio.fail_after(10):
                await other.replies[1].wait_ended()
            assert [each.role for each in other.turns] == ["user", "assistant"]
            mine = await talks.open(Principal(name="ann", role="client"), "session-1", "user_6")
            assert isinstance(mine, Talk)
            for reply in list(mine.replies.values()):
                with trio.fail_after(10):
                    await reply.wait_ended()
            assert await state(relay, ids["good"]) == "queued"
            await relay.goes_on()
    assert [each for each in mistakes(logs) if each["event"] != "internal error in conversation"] == []


@pytest.mark.trio
@pytest.mark.parametrize("value", ["text", 7, b"short"])
async def test_a_stray_input_of_no_sense_costs_no_request(filled: tuple[Path, dict[str, str]], value: Any) -> None:
    folder, ids = filled
    with sqlite3.connect(folder / DATABASE_NAME) as database:
        database.execute("INSERT INTO inputs VALUES (?, 'voice', ?)", (ids["bad"], value))
    database.close()
    async with daemon(folder, **SQLITE) as relay, fake_worker(relay.url, instance=an_id()) as worker:
        for name in ("bad", "good"):
            assign = await worker.assigned()
            assert assign.request_id == ids[name]
            worker.speak(assign, [samples(10)])
        await relay.relay.finalizer.wait_finalized()
        assert [await state(relay, ids[name]) for name in ("bad", "good")] == ["completed"] * 2


@pytest.mark.trio
@pytest.mark.parametrize("value", ["text", 7, b"short", None])
async def test_a_damaged_input_fails_its_own_request(tmp_path: Path, value: Any) -> None:
    damaged, whole = (a_submit(detach=True, inputs={"voice": an_input(b"a voice")}) for _ in range(2))
    async with daemon(tmp_path, **SQLITE) as relay, peer(relay.url, "client") as client:
        for submit in (damaged, whole):
            client.send(submit)
            client.send(Input(request_id=submit.request_id, name="voice", offset=0, data=b"a voice"))
            await client.next(Accepted)
    with sqlite3.connect(tmp_path / DATABASE_NAME) as database:
        where = "WHERE request_id = ?"
        if value is None:
            assert database.execute(f"DELETE FROM inputs {where}", (damaged.request_id,)).rowcount == 1
        else:
            assert database.execute(f"UPDATE inputs SET data = ? {where}", (value, damaged.request_id)).rowcount == 1
    database.close()
    rules: dict[str, Any] = {"inputs": {"voice": {}}}
    async with (
        daemon(tmp_path, **SQLITE) as relay,
        fake_worker(relay.url, instance=an_id(), slots=2, **rules) as worker,
    ):
        assigns = [await worker.assigned() for _ in range(2)]
        assert (await worker.peer.next(Input)).data == b"a voice"
        worker.speak(assigns[1], [samples(10)])
        await until(lambda: relay.relay.requests[whole.request_id].entry.state is State.COMPLETED)
        await until(lambda: relay.relay.requests[damaged.request_id].entry.state is State.FAILED)
        await relay.goes_on()


@pytest.mark.trio
async def test_flipped_bits_are_served_around_or_refused_in_one_sentence(
    whole: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    data = (whole[0] / DATABASE_NAME).read_bytes()
    places = [place for place, byte in enumerate(data) if byte]
    outcomes = []
    for seed in range(24):
        draws, flipped, folder = random.Random(seed), bytearray(data), tmp_path / str(seed)
        shutil.copytree(whole[0], folder)
        for place in draws.sample(places, draws.choice([1, 1, 3])):
            flipped[place] ^= 1 << draws.randrange(8)
        (folder / DATABASE_NAME).write_bytes(flipped)
        with kept_logs() as logs:
            try:
                async with daemon(folder, **SQLITE) as relay:
                    await relay.goes_on()
                    outcomes.append("served")
            except* StoreError as group:
                fault: BaseException = group
                while isinstance(fault, BaseExceptionGroup):
                    (fault,) = fault.exceptions
                assert "\n" not in str(fault)
                outcomes.append("refused")
        aside = "request cannot be restored, set aside"  # what no check foresaw costs that record alone
        assert [each for each in mistakes(logs) if each["event"] != aside] == [], seed
    assert {"served", "refused"} == set(outcomes)


@pytest.mark.trio
async def test_a_damaged_index_is_made_again(
    filled: tuple[Path, dict[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    folder, ids = filled
    with sqlite3.connect(folder / DATABASE_NAME) as database:
        database.execute("PRAGMA journal_mode = DELETE")
        (page,) = database.execute("SELECT rootpage FROM sqlite_schema WHERE name LIKE '%requests_1'").fetchone()
        (size,) = database.execute("PRAGMA page_size").fetchone()
    database.close()
    data = bytearray((folder / DATABASE_NAME).read_bytes())
    at = data.index(ids["good"].encode(), (page - 1) * size)
    data[at] ^= 1
    (folder / DATABASE_NAME).write_bytes(data)
    async with daemon(folder, **SQLITE) as relay:
        request = relay.relay.requests[ids["good"]]
        relay.relay.cancel(request, "to see whether the store finds it")
        await relay.relay.finalizer.wait_finalized()
    assert "was damaged, and was rebuilt" in caplog.text
    with open_offline(folder) as store:
        assert {record.request_id: record.state for record in store.load().requests}[ids["good"]] == "cancelled"


# -- results ------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_results_and_records_may_each_be_missing(filled: tuple[Path, dict[str, str]]) -> None:
    folder, ids = filled
    file = folder / "results" / f"{ids['result']}.frames"
    stranger = file.with_name(f"{an_id()}.frames")
    assert file.exists()
    shutil.copy(file, stranger)
    async with daemon(folder, **SQLITE) as relay, peer(relay.url, "client") as client:
        assert not stranger.exists()
        client.send(Attach(request_id=ids["result"]))
        await client.next(Accepted)
    shutil.rmtree(file.parent)
    async with daemon(folder, **SQLITE) as relay:
        assert await state(relay, ids["result"]) == "completed"
        shutil.rmtree(file.parent)
        async with fake_worker(relay.url, instance=an_id(), slots=2) as worker:
            for _ in ("bad", "good"):
                worker.speak(await worker.assigned(), [samples(100)])
            await relay.relay.finalizer.wait_finalized()
        await relay.goes_on()
        assert relay.relay.results.unsaved_count == 0, "the folder is there again"


@pytest.mark.trio
async def test_the_result_of_a_damaged_record_is_left_where_it_is(filled: tuple[Path, dict[str, str]]) -> None:
    folder, ids = filled
    change(folder, "UPDATE requests SET state = 'stuck' WHERE request_id = ?", ids["result"])
    async with daemon(folder, **SQLITE):
        pass
    change(folder, "UPDATE requests SET state = 'completed' WHERE request_id = ?", ids["result"])
    async with daemon(folder, **SQLITE) as relay:
        assert relay.relay.requests[ids["result"]].has_result


# -- in one sentence ----------------------------------------------------------------------------------------------


def serve(folder: Path) -> tuple[int, str]:
    """What `relayd serve` on this folder ends with: its exit code and its last words."""
    command = [sys.executable, "-m", "relayd.cli", "serve", "--listen", "127.0.0.1:0", "--state-dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder)
    return done.returncode, done.stderr


def newer(folder: Path) -> None:
    with sqlite3.connect(folder / DATABASE_NAME) as database:
        database.execute("PRAGMA user_version = 1000")
    database.close()


def garbage(folder: Path) -> None:
    (folder / DATABASE_NAME).write_bytes(b"\xff" * 20_000)


def no_table(folder: Path) -> None:
    with sqlite3.connect(folder / DATABASE_NAME) as database:
        database.execute("ALTER TABLE requests RENAME TO others")
    database.close()


def results_are_a_file(folder: Path) -> None:
    shutil.rmtree(folder / "results")
    (folder / "results").touch()


def cannot_be_written(folder: Path) -> None:
    (folder / DATABASE_NAME).unlink()
    (folder / DATABASE_NAME).mkdir()


@pytest.mark.parametrize("spoil", [newer, garbage, no_table, results_are_a_file, cannot_be_written])
def test_a_store_that_cannot_be_used_ends_the_start_with_one_sentence_and_exit_code_2(
    filled: tuple[Path, dict[str, str]], spoil: Any
) -> None:
    folder, _ids = filled
    spoil(folder)
    code, words = serve(folder)
    assert code == 2, words
    last = words.splitlines()[-1]
    assert last.startswith("relayd: ")
    assert str(folder) in last
    assert "Traceback" not in words


# -- a full disk --------------------------------------------------------------------------------------------------


def test_a_first_start_on_a_full_disk_is_refused_in_one_sentence(tmp_path: Path) -> None:
    """Files cannot grow at all here: `ulimit -f 0` says EFBIG where a full disk says ENOSPC."""
    command = f"ulimit -f 0; exec {sys.executable} -m relayd.cli serve --listen 127.0.0.1:0 --state-dir {tmp_path}/s"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("relayd: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.trio
@pytest.mark.parametrize("step", ["pwrite", "ftruncate"])
async def test_a_lock_whose_pid_the_full_disk_does_not_take_still_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, full)
    with open_offline(tmp_path) as store:
        store.load()
        with pytest.raises(StoreError, match="another relayd"), open_offline(tmp_path):
            pass


@pytest.mark.trio
@pytest.mark.parametrize("step", ["open", "mkdir"])
async def test_no_room_for_a_file_is_told_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*_args: Any, **_options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = tmp_path / "state"
    with monkeypatch.context() as patch:
        patch.setattr(os if step == "open" else Path, step, full)
        with pytest.raises(StorageFull, match="no space"), open_offline(folder):
            pass
