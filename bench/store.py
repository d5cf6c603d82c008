"""Measures how many requests per second the store commits, alone and concurrently: the benefit of group commit."""

import secrets
import tempfile
import time
from pathlib import Path

import trio

from bench.figures import Row, alternate, paired
from bench.machine import filesystem_of
from protocol.wire.messages import Submit
from relayd.store.records import PutRequest, RequestRecord
from relayd.store.sqlite import SqliteStore, open_sqlite

CROWD = 100
#: Commits per round: of the single committer, and of each of the concurrent ones.
ALONE_EACH, CROWD_EACH = 150, 15
ROUNDS = 5


def measure() -> list[Row]:
    """Commit as `relayd.core.admission` does, each committer waiting until its commit is durable."""
    with tempfile.TemporaryDirectory(prefix="relayd-bench-") as name:
        folder = Path(name)
        disk = filesystem_of(folder)
        crowd, alone = alternate(
            ROUNDS,
            lambda: trio.run(_commits, folder, CROWD, CROWD_EACH),
            lambda: trio.run(_commits, folder, 1, ALONE_EACH),
        )
    peer = "1 committer"
    return [
        paired(
            "store",
            f"durable commits on {disk}, {CROWD} committers",
            "commits/s",
            [rate for rate, _ in crowd],
            [rate for rate, _ in alone],
            peer,
        ),
        paired(
            "store",
            f"transactions (each one fsync) per commit, {CROWD} committers",
            "transactions",
            [each for _, each in crowd],
            [each for _, each in alone],
            peer,
        ),
    ]


async def _commits(folder: Path, committers: int, each: int) -> tuple[float, float]:
    """Commits per second, and transactions per commit."""
    async with open_sqlite(folder) as store:
        began, transactions = time.perf_counter(), store.transactions
        async with trio.open_nursery() as nursery:
            for _ in range(committers):
                nursery.start_soon(_commit, store, each)
        took_s = time.perf_counter() - began
        count = committers * each
        return count / took_s, (store.transactions - transactions) / count


async def _commit(store: SqliteStore, count: int) -> None:
    for _ in range(count):
        submit = Submit(request_id=secrets.token_hex(16), space="tts", params={"text": "Hello world. " * 8})
        record = RequestRecord(
            request_id=submit.request_id, principal="bench", ticket=1, submit=submit, created_at=time.time()
        )
        await store.commit(PutRequest(record))
