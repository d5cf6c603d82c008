"""Frame logs with files behind them: real files, real threads, and sinks that the test drains."""

import errno
import os
import random
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import structlog
import trio
from structlog.testing import capture_logs

from relayd.frames.frame_file import ResultFolder
from relayd.frames.frame_log import HIGH_WATER_BYTES, FrameLog, FrameReader, MemoryBudget
from relayd.frames.spool import NoRoom, Spool
from tests.support.relay import an_id, until

BIG = HIGH_WATER_BYTES // 4


class Bucket:
    """A sink that is drained by the test."""

    def __init__(self) -> None:
        self.backlog_bytes = 0
        self.got: list[bytes] = []
        self.read = self.broken = 0

    def send_frames(self, frames: list[bytes], size: int) -> None:
        assert self.backlog_bytes + sum(map(len, frames[:-1])) < HIGH_WATER_BYTES, "no more than a sink takes"
        assert size == sum(map(len, frames))
        self.backlog_bytes += size
        self.got += frames

    def on_all_sent(self, reader: FrameReader) -> None:
        self.read += 1

    def on_read_error(self, reader: FrameReader) -> None:
        self.broken += 1


@attrs.define(eq=False)
class Bench:
    """A spool, and logs whose memory is counted together."""

    spool: Spool
    memory: MemoryBudget = attrs.field(factory=MemoryBudget)
    broken: list[str] = attrs.field(factory=list)

    def log(self) -> FrameLog:
        return FrameLog(request_id=an_id(), created_unix=1.5, memory=self.memory, fetch=self.spool.fetch)

    def reader(self, log: FrameLog, seq: int = 0) -> tuple[FrameReader, Bucket]:
        bucket = Bucket()
        reader = FrameReader("key", log, bucket, seq)
        reader.open()
        return reader, bucket

    async def read(self, log: FrameLog, seq: int = 0) -> list[bytes]:
        """All that a reader gets of an ended log."""
        reader, bucket = self.reader(log, seq)
        while not reader.done:
            bucket.backlog_bytes = 0
            reader.pump()
            await trio.lowlevel.checkpoint()
        assert bucket.read == 1
        return bucket.got

    @property
    def files(self) -> list[str]:
        return self.spool.folder.request_ids()


@asynccontextmanager
async def a_bench(tmp_path: Path, disk_bytes: int = 2**40) -> AsyncIterator[Bench]:
    async def no_room(_more: int, _frames: FrameLog) -> bool:
        return False

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            folder = ResultFolder(tmp_path / "results")
            spool = Spool(folder, nursery, disk_bytes, no_room, lambda _log, why: bench.broken.append(why))
            bench = Bench(spool)
            yield bench
            nursery.cancel_scope.cancel()


def frames(count: int, size: int = BIG, tag: int = 0) -> list[bytes]:
    return [bytes((tag, number % 256)) * (size // 2) for number in range(count)]


def fill(log: FrameLog, some: Sequence[bytes], *, end: bool = False) -> None:
    for data in some:
        log.append(data)
    if end:
        log.append(b"completed", ends=True)


class Slow:
    """A call in a thread that waits for the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: ResultFolder, name: str) -> None:
        self.began, self.go_on = threading.Event(), threading.Event()
        work = getattr(folder, name)

        def slow(*args: Any) -> Any:
            self.began.set()
            assert self.go_on.wait(30)
            return work(*args)

        monkeypatch.setattr(folder, name, slow)

    async def here(self) -> None:
        await until(self.began.is_set)


@pytest.mark.trio
async def test_what_is_spilled_leaves_the_memory_and_is_read_back_in_order(tmp_path: Path) -> None:
    async with a_bench(tmp_path) as bench:
        log, some = bench.log(), frames(100)
        fill(log, some)
        await bench.spool.spill(log)
        assert bench.memory.held_bytes == log.memory_bytes == 0
        assert log.size_bytes == 100 * BIG
        fill(log, some[:3], end=True)
        assert await bench.read(log) == [*some, *some[:3], b"completed"]
        assert await bench.read(log, 98) == [*some[98:], *some[:3], b"completed"]
        assert bench.memory.held_bytes == log.memory_bytes, "nothing that was read ahead stays"


@pytest.mark.trio
async def test_a_reader_that_has_kept_up_needs_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_bench(tmp_path) as bench:
        monkeypatch.delattr(ResultFolder, "read")
        log = bench.log()
        _, bucket = bench.reader(log)
        fill(log, frames(2))
        await bench.spool.spill(log)
        bucket.backlog_bytes = 0
        fill(log, frames(1), end=True)
        assert len(bucket.got) == 4
        assert not bench.broken


@pytest.mark.trio
async def test_a_sealed_log_lets_go_of_everything_and_is_found_again(tmp_path: Path) -> None:
    async with a_bench(tmp_path) as bench:
        log, some = bench.log(), frames(30, 5_000)
        fill(log, some[:20])
        log.restart(2, 15)
        await bench.spool.spill(log)
        fill(log, some[15:], end=True)
        await bench.spool.seal(log)
        assert log.file_part.sealed
        log.release_written()
        assert bench.memory.held_bytes == 0
        assert log.file_part.index is None, "nobody reads"
        whole = [*some, b"completed"]
        assert await bench.read(log) == whole
        assert log.file_part.index is None
        size = (tmp_path / "results" / f"{log.request_id}.frames").stat().st_size
        assert bench.spool.used_bytes == size
    async with a_bench(tmp_path) as bench:
        found = await bench.spool.sweep({log.request_id: 1.5})
        again = FrameLog.of_file(log.request_id, found[log.request_id])
        again.fetch = bench.spool.fetch
        assert again.size_bytes == sum(map(len, whole))
        assert again.resume_seq(1, 20) == 15
        assert await bench.read(again) == whole
        assert bench.spool.used_bytes == size


@pytest.mark.trio
async def test_only_whole_files_of_requests_that_ended_outlive_a_restart(tmp_path: Path) -> None:
    async with a_bench(tmp_path) as bench:
        whole, live, other, torn = (bench.log() for _ in range(4))
        for log in (whole, live, other):
            fill(log, frames(2, 10), end=True)
            await bench.spool.seal(log)
        fill(torn, frames(2, 10))
        await bench.spool.spill(torn)
        assert len(bench.files) == 4
    async with a_bench(tmp_path) as bench:
        ended = {whole.request_id: 1.5, torn.request_id: 1.5, other.request_id: 2.5, an_id(): 1.0}
        assert list(await bench.spool.sweep(ended)) == [whole.request_id]
        assert bench.files == [whole.request_id]


@pytest.mark.trio
async def test_an_unfinished_file_is_no_damage_where_the_end_is_stored_before_the_file_is_complete(
    tmp_path: Path,
) -> None:
    async with a_bench(tmp_path) as bench:
        cancelled, completed = bench.log(), bench.log()
        for log in (cancelled, completed):
            fill(log, frames(2, 10))
            await bench.spool.spill(log)
    async with a_bench(tmp_path) as bench:
        ended = {cancelled.request_id: 1.5, completed.request_id: 1.5}
        with capture_logs() as logs:
            assert await bench.spool.sweep(ended, recorded_first={cancelled.request_id}) == {}
        errors = [entry["what"] for entry in logs if entry["log_level"] == "error"]
        assert errors == [f"{completed.request_id}.frames is incomplete"]
        assert bench.files == []


@pytest.mark.trio
async def test_a_restart_while_a_spill_is_being_written_makes_the_rest_of_it_void(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_bench(tmp_path) as bench, trio.open_nursery() as nursery:
        log, old, new = bench.log(), frames(6, 1_000), frames(5, 1_500, tag=1)
        _, bucket = bench.reader(log)
        fill(log, old)
        slow = Slow(monkeypatch, bench.spool.folder, "write")
        nursery.start_soon(bench.spool.spill, log)
        await slow.here()
        log.restart(2, 2)
        fill(log, new)
        slow.go_on.set()
        await bench.spool.spill(log)
        log.append(b"completed", ends=True)
        await bench.spool.seal(log)
        log.release_written()
        truth = [*old[:2], *new, b"completed"]
        assert await bench.read(log) == truth
        assert bucket.got == [*old, *new, b"completed"]
        assert log.size_bytes == sum(map(len, truth))
        contents = bench.spool.folder.load(log.request_id)
        assert bench.spool.folder.read(log.request_id, contents.index) == truth


@pytest.mark.trio
async def test_a_restart_below_what_is_spilled_takes_the_file_back(tmp_path: Path) -> None:
    async with a_bench(tmp_path) as bench:
        log, old, new = bench.log(), frames(6, 1_000), frames(2, 10, tag=1)
        fill(log, old)
        await bench.spool.spill(log)
        log.restart(2, 3)
        assert (log.next_seq, log.size_bytes, log.memory_bytes) == (3, 3_000, 0)
        fill(log, new, end=True)
        assert await bench.read(log) == [*old[:3], *new, b"completed"]
        await bench.spool.seal(log)
        log.release_written()
        assert await bench.read(log) == [*old[:3], *new, b"completed"]


@pytest.mark.trio
async def test_what_was_read_before_a_restart_is_not_passed_on_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_bench(tmp_path) as bench:
        log, old, new = bench.log(), frames(6, 1_000), frames(4, 1_000, tag=1)
        fill(log, old)
        await bench.spool.spill(log)
        slow = Slow(monkeypatch, bench.spool.folder, "read")
        _, bucket = bench.reader(log)
        await slow.here()
        log.restart(2, 1)
        fill(log, new, end=True)
        slow.go_on.set()
        await until(lambda: bucket.read == 1)
        assert bucket.got == [old[0], *new, b"completed"]


@pytest.mark.trio
async def test_a_reader_that_was_closed_while_it_was_read_for_gets_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_bench(tmp_path) as bench:
        log = bench.log()
        fill(log, frames(6, 1_000), end=True)
        await bench.spool.seal(log)
        log.release_written()
        slow = Slow(monkeypatch, bench.spool.folder, "read")
        reader, bucket = bench.reader(log)
        await slow.here()
        reader.close()
        slow.go_on.set()
        await until(lambda: not reader.prefetching)
        assert not bucket.got
        assert bench.memory.held_bytes == 0
        assert log.file_part.index is None


@pytest.mark.trio
async def test_a_log_that_is_dropped_while_it_is_sealed_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_bench(tmp_path) as bench, trio.open_nursery() as nursery:
        log = bench.log()
        fill(log, frames(6, 1_000), end=True)
        slow = Slow(monkeypatch, bench.spool.folder, "seal")
        nursery.start_soon(bench.spool.seal, log)
        await slow.here()
        log.drop()
        nursery.start_soon(bench.spool.remove, log)
        slow.go_on.set()
        await until(lambda: not bench.files)
        assert not log.file_part.sealed
        assert bench.memory.held_bytes == 0
        await until(lambda: bench.spool.used_bytes == 0)


@pytest.mark.trio
@pytest.mark.parametrize("call", ["write", "seal"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS])
async def test_a_disk_that_takes_no_more_costs_nothing_that_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    async with a_bench(tmp_path) as bench:
        log, some = bench.log(), frames(60)
        fill(log, some, end=True)
        work, calls = getattr(bench.spool.folder, call), []

        def failing(*args: Any) -> None:
            calls.append(args)
            if call == "seal" or len(calls) == 2:
                work(*args)
                raise OSError(code, os.strerror(code))
            work(*args)

        with monkeypatch.context() as patch:
            patch.setattr(bench.spool.folder, call, failing)
            with pytest.raises(NoRoom, match=os.strerror(code)):
                await bench.spool.seal(log)
        assert (bench.files, bench.spool.used_bytes) == ([], 0), "what it has taken is given back"
        assert log.size_bytes == 60 * BIG + 9
        assert await bench.read(log) == [*some, b"completed"]
        await bench.spool.seal(log)
        log.release_written()
        assert await bench.read(log) == [*some, b"completed"]


@pytest.mark.trio
async def test_a_seal_that_fails_keeps_what_lies_in_the_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_bench(tmp_path) as bench:
        log, some = bench.log(), frames(60)
        fill(log, some[:30])
        await bench.spool.spill(log)
        fill(log, some[30:], end=True)

        def full(*_args: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(bench.spool.folder, "seal", full)
            with pytest.raises(NoRoom):
                await bench.spool.seal(log)
        assert bench.spool.used_bytes == sum(path.stat().st_size for path in bench.spool.folder.path.iterdir()) > 0
        assert await bench.read(log) == [*some, b"completed"]
        await bench.spool.seal(log)
        assert await bench.read(log) == [*some, b"completed"]


@pytest.mark.trio
async def test_files_take_no_more_than_they_may(tmp_path: Path) -> None:
    async with a_bench(tmp_path, disk_bytes=5 * BIG) as bench:
        one, two = bench.log(), bench.log()
        fill(one, frames(3), end=True)
        fill(two, frames(3), end=True)
        await bench.spool.seal(one)
        with pytest.raises(NoRoom, match=r"raise results\.disk_bytes"):
            await bench.spool.seal(two)
        assert bench.files == [one.request_id]
        await bench.spool.remove(one)
        await bench.spool.seal(two)
        assert bench.files == [two.request_id]


@pytest.mark.trio
@pytest.mark.parametrize("harm", ["flip", "cut", "delete", "another"])
async def test_a_file_that_is_not_what_was_written_is_told_and_nothing_of_it_is_passed_on(
    tmp_path: Path, harm: str
) -> None:
    async with a_bench(tmp_path) as bench:
        log = bench.log()
        fill(log, frames(3, 1_000), end=True)
        await bench.spool.seal(log)
        log.release_written()
        path = tmp_path / "results" / f"{log.request_id}.frames"
        data = bytearray(path.read_bytes())
        if harm == "flip":
            data[40] ^= 1
        elif harm == "cut":
            del data[-1]
        elif harm == "another":
            log.created_unix += 1
        path.write_bytes(data)
        if harm == "delete":
            path.unlink()
        _, bucket = bench.reader(log)
        await until(lambda: len(bench.broken) == 1)
        assert not bucket.got


@pytest.mark.trio
async def test_windows_that_a_full_sink_leaves_are_dropped_while_memory_is_short(tmp_path: Path) -> None:
    async with a_bench(tmp_path) as bench:
        log, some = bench.log(), frames(12, BIG)
        fill(log, some, end=True)
        await bench.spool.seal(log)
        log.release_written()
        bench.memory.limit_bytes = 0
        reader, bucket = bench.reader(log)
        bucket.backlog_bytes = HIGH_WATER_BYTES - 1
        await until(lambda: len(bucket.got) == 1)
        assert bench.memory.held_bytes == 0
        while not reader.done:
            bucket.backlog_bytes = 0
            reader.pump()
            await trio.lowlevel.checkpoint()
        assert bucket.got == [*some, b"completed"]


@pytest.mark.trio
async def test_a_reader_that_a_restart_takes_back_while_it_waits_for_the_disk_goes_on_from_memory(
    tmp_path: Path,
) -> None:
    async with a_bench(tmp_path) as bench:
        log = bench.log()
        fill(log, frames(5, 1_000))
        await bench.spool.spill(log)
        assert not log.in_memory
        reader, bucket = bench.reader(log)
        assert reader.prefetching, "it asks for what lies in the file"
        log.restart(2, 0)
        anew = frames(4, 500)
        fill(log, anew)
        await until(lambda: not reader.prefetching)
        assert not bench.broken
        fill(log, [], end=True)
        assert bucket.got == [*anew, b"completed"]


@pytest.mark.trio
@pytest.mark.parametrize("seed", range(12))
async def test_every_reader_ends_with_every_frame_in_order_whatever_happens_behind_the_log(
    tmp_path: Path, seed: int
) -> None:
    """As a client sees it: a frame replaces what it holds from that `seq` on. Spills run beside everything else."""
    rng = random.Random(seed)
    async with a_bench(tmp_path) as bench, trio.open_nursery() as nursery:
        log, attempt = bench.log(), 1
        readers: list[tuple[FrameReader, Bucket]] = []
        truth: list[bytes] = []

        def append(*, ends: bool = False) -> None:
            head = len(truth).to_bytes(4, "big") + attempt.to_bytes(4, "big")
            truth.append(head + rng.randbytes(rng.choice((1, 500, 40_000, 300_000))))
            log.append(truth[-1], ends=ends)

        for _ in range(250):
            step = rng.random()
            if step < 0.5:
                append()
            elif step < 0.6:
                nursery.start_soon(bench.spool.spill, log)
            elif step < 0.65:
                readers.append(bench.reader(log))
            elif step < 0.67:
                attempt += 1
                del truth[rng.randint(0, len(truth)) :]
                log.restart(attempt, len(truth))
            elif step < 0.9 and readers:
                reader, bucket = rng.choice(readers)
                bucket.backlog_bytes = 0
                reader.pump()
            else:
                await trio.sleep(rng.choice((0, 0, 0.001)))
            assert log.next_seq == len(truth)
            assert log.size_bytes == sum(map(len, truth))
        append(ends=True)
        await bench.spool.seal(log)
        if seed % 2:
            log.release_written()
        for reader, bucket in readers:
            while not reader.done:
                bucket.backlog_bytes = 0
                reader.pump()
                await trio.lowlevel.checkpoint()
            view: list[bytes] = []
            for data in bucket.got:
                seq = int.from_bytes(data[:4], "big")
                assert seq <= len(view), "none is missing"
                if seq < len(view):
                    assert data[4:8] > view[seq][4:8], "none comes twice"
                del view[seq:]
                view.append(data)
            assert view == truth
            assert bucket.read == 1
        assert not log.readers
        assert await bench.read(log) == truth
        assert bench.memory.held_bytes == log.memory_bytes
        contents = bench.spool.folder.load(log.request_id)
        assert bench.spool.folder.read(log.request_id, contents.index) == truth
        assert not bench.broken


@pytest.mark.trio
@pytest.mark.parametrize("call", ["spill", "seal"])
async def test_a_log_that_is_dropped_while_room_is_made_leaves_no_file(tmp_path: Path, call: str) -> None:
    async with a_bench(tmp_path, disk_bytes=0) as bench:
        log = bench.log()
        fill(log, frames(6, 1_000), end=call == "seal")

        async def make_room(_more: int, _frames: FrameLog) -> bool:
            await trio.lowlevel.checkpoint()
            log.drop()  # it has no file yet, so nobody will delete one
            return True

        bench.spool.make_room = make_room
        await getattr(bench.spool, call)(log)
        assert (bench.files, bench.spool.used_bytes) == ([], 0)


@pytest.mark.trio
async def test_a_log_that_begins_anew_while_room_is_made_is_written_as_it_is_then(tmp_path: Path) -> None:
    async with a_bench(tmp_path, disk_bytes=0) as bench:
        log = bench.log()
        fill(log, frames(6, 1_000))
        again = frames(3, 1_000, tag=1)

        async def make_room(_more: int, _frames: FrameLog) -> bool:
            await trio.lowlevel.checkpoint()
            bench.spool.disk_bytes = 2**40
            log.restart(2, 0)
            fill(log, again)
            return True

        bench.spool.make_room = make_room
        await bench.spool.spill(log)
        assert (log.memory_bytes, log.file_part.frames) == (0, 3)
        index = log.file_part.index
        assert index is not None
        assert bench.spool.folder.read(log.request_id, index) == again


@pytest.mark.trio
@pytest.mark.parametrize("missing", [0, 1])
@pytest.mark.parametrize("call", ["spill", "seal"])
async def test_files_may_take_exactly_what_they_are_allowed(tmp_path: Path, call: str, missing: int) -> None:
    async with a_bench(tmp_path) as bench:
        log = bench.log()
        fill(log, frames(3, 1_000), end=call == "seal")
        await getattr(bench.spool, call)(log)
        size = bench.spool.used_bytes
        assert (
            size
            == bench.spool.file_bytes(log)
            == sum(path.stat().st_size for path in bench.spool.folder.path.iterdir())
        )
        await bench.spool.remove(log)
        assert (bench.spool.used_bytes, bench.spool.file_bytes(log), bench.spool.has_file(log)) == (0, 0, False)
        bench.spool.disk_bytes = size - missing
        again = bench.log()
        fill(again, frames(3, 1_000), end=call == "seal")
        if missing:
            with pytest.raises(NoRoom):
                await getattr(bench.spool, call)(again)
        else:
            await getattr(bench.spool, call)(again)
        assert bench.spool.has_file(again) is not bool(missing)


@pytest.mark.trio
async def test_what_takes_the_place_of_what_was_written_needs_no_room(tmp_path: Path) -> None:
    async with a_bench(tmp_path) as bench:
        log = bench.log()
        fill(log, frames(3, 1_000))
        await bench.spool.spill(log)
        bench.spool.disk_bytes = 0
        log.restart(2, 1)
        fill(log, frames(2, 1_000, tag=1))
        await bench.spool.spill(log)
        assert log.file_part.frames == 3
        fill(log, frames(1, 1_000))
        with pytest.raises(NoRoom):
            await bench.spool.spill(log)


@pytest.mark.trio
async def test_a_file_with_other_frames_than_it_should_have_is_not_read(tmp_path: Path) -> None:
    async with a_bench(tmp_path) as bench:
        log = bench.log()
        fill(log, frames(3, 1_000), end=True)
        await bench.spool.seal(log)
        log.release_written()
        other = FrameLog(request_id=log.request_id, created_unix=log.created_unix)
        fill(other, frames(2, 1_000), end=True)
        await Spool(bench.spool.folder, bench.spool.nursery, 2**40, bench.spool.make_room, bench.spool.on_broken).seal(
            other
        )
        _, bucket = bench.reader(log)
        await until(lambda: len(bench.broken) == 1)
        assert "belongs to another result" in bench.broken[0]
        assert not bucket.got


@pytest.mark.trio
async def test_files_whose_records_cannot_be_read_are_left_as_they_are_at_the_start(tmp_path: Path) -> None:
    async with a_bench(tmp_path) as bench:
        kept, left, unknown = (bench.log() for _ in range(3))
        for log in (kept, left, unknown):
            fill(log, frames(2, 10), end=True)
            await bench.spool.seal(log)
    async with a_bench(tmp_path) as bench:
        with structlog.testing.capture_logs() as logs:
            found = await bench.spool.sweep({kept.request_id: 1.5, left.request_id: 1.5}, {left.request_id})
        assert list(found) == [kept.request_id]
        assert bench.files == sorted([kept.request_id, left.request_id])
        assert bench.spool.used_bytes == found[kept.request_id].file_bytes
        assert [(log["event"], log.get("files")) for log in logs] == [
            ("files of unknown or unfinished requests deleted", 1)
        ]
