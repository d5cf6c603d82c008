"""Moves frames between frame logs and their files: written behind a log, and read back for readers that lag.

All of it happens in threads, and the event loop goes on meanwhile: a log may grow, be restarted, end or be dropped
while its file is being written or read. What was written is noted only afterwards, as far as it still holds, and
what was read is dropped where a restart has made it void. No file stays open between two of these.
"""

from collections.abc import Awaitable, Callable
from weakref import WeakValueDictionary

import attrs
import structlog
import trio

from relayd.frames.frame_file import RECORD_BYTES, Contents, DamagedResult, ResultFolder, extend, size_of
from relayd.frames.frame_log import HIGH_WATER_BYTES, FrameLog, FrameReader

log = structlog.get_logger("relayd.results")

#: Written or read in one go: few enough that the loop's own part of it, and a join under the GIL, stay below 1 ms.
SLICE_BYTES = 1024 * 1024
SLICE_FRAMES = 4096
#: Read for one reader at once: what its sink takes before it is full.
AHEAD_BYTES = HIGH_WATER_BYTES
#: Threads. Writers wait for the disk, and one that syncs should not hold up the next; readers hit the page cache.
WRITERS, READERS = 4, 4


class NoRoom(Exception):
    """The disk, or `results.disk_bytes`, takes no more; the text says which and why."""


@attrs.define(eq=False)
class Spool:
    """Writes logs to files and reads them back. One task at a time has a log's file; `nursery` holds the reading."""

    folder: ResultFolder
    nursery: trio.Nursery
    disk_bytes: int
    #: Deletes old results until so many bytes fit; False where none is left that may go.
    make_room: Callable[[int], Awaitable[bool]]
    #: Told that a log cannot be read back, and why.
    on_broken: Callable[[FrameLog, str], None]
    #: Of all files.
    used_bytes: int = 0
    _sizes: dict[str, int] = attrs.field(factory=dict)
    #: Of the files that somebody has in hand.
    _locks: WeakValueDictionary[str, trio.Lock] = attrs.field(factory=WeakValueDictionary)
    _writers: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(WRITERS))
    _readers: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(READERS))
    #: Who may ask those threads: taken before it is known whether there is still something to read.
    _reading: trio.Semaphore = attrs.field(factory=lambda: trio.Semaphore(READERS))

    def _lock(self, frames: FrameLog) -> trio.Lock:
        return self._locks.setdefault(frames.request_id, trio.Lock())

    def has_file(self, frames: FrameLog) -> bool:
        """Whether there is a file of this log's name."""
        return frames.request_id in self._sizes

    def _size(self, request_id: str, size: int) -> None:
        self.used_bytes += size - self._sizes.pop(request_id, 0)
        if size:
            self._sizes[request_id] = size

    # -- writing

    async def spill(self, frames: FrameLog) -> None:
        """Write what a live log holds in memory at this moment to its file, and have the log let go of it.

        Raises:
            NoRoom: not all of it was written; what was is let go of, the rest is still in memory.
        """
        async with self._lock(frames):
            try:
                await self._write(frames, frames.next_seq)
            finally:
                frames.release_written()

    async def seal(self, frames: FrameLog) -> None:
        """Make the file of a log that has ended whole; when this returns the disk has it. Memory is left as it is.

        Raises:
            NoRoom: it is not in its file; what lay in memory alone still does.
        """
        async with self._lock(frames):
            if frames.file_part.sealed or not frames.is_complete:
                return
            batch = [] if frames.file_part.frames else frames.next_unwritten(SLICE_BYTES, SLICE_FRAMES)
            if len(batch) < frames.next_seq:
                batch = []
                await self._write(frames, frames.next_seq)
            filed, starts = frames.file_part, frames.starts
            if filed.index is None or filed.frames + len(batch) < frames.next_seq:
                return  # it was dropped meanwhile
            index = filed.index[:]
            extend(index, batch)
            size = size_of(index[-1], len(index) - 1, len(starts))
            await self._room_for(frames, size)
            if frames.file_part is not filed:
                return  # it was dropped while room was made
            head = (frames.request_id, frames.created_unix)
            await self._in_thread(frames, self.folder.seal, *head, index, starts, batch, size=size)
            if frames.file_part is filed:
                filed.frames, filed.index, filed.sealed = frames.next_seq, index, True
                frames.unread()

    async def _write(self, frames: FrameLog, until_seq: int) -> None:
        """Write the frames below `until_seq` that are not in the file; the caller has the lock."""
        filed = frames.file_part
        while filed is frames.file_part and filed.frames < until_seq and filed.index is not None:
            batch = frames.next_unwritten(SLICE_BYTES, SLICE_FRAMES)
            if not batch or frames.first_seq:  # a restart has made the log shorter, or it was dropped
                return
            first, offset = filed.frames, filed.index[-1]
            filed.valid = first + len(batch)
            size = offset + sum(map(len, batch)) + RECORD_BYTES * len(batch)
            await self._room_for(frames, size)
            if filed is not frames.file_part or filed.valid < first + len(batch):
                continue  # dropped or restarted while room was made
            await self._in_thread(
                frames, self.folder.write, frames.request_id, frames.created_unix, offset, batch, size=size
            )
            good = max(0, int(filed.valid) - first)  # a restart meanwhile has made the rest of them void
            if filed is frames.file_part and good and filed.index is not None:
                extend(filed.index, batch[:good])
                filed.frames += good

    async def _room_for(self, frames: FrameLog, size: int) -> None:
        more = size - self._sizes.get(frames.request_id, 0)
        if more > 0 and self.used_bytes + more > self.disk_bytes and not await self.make_room(more):
            raise NoRoom(f"results have their {self.disk_bytes} bytes on disk; raise results.disk_bytes")

    async def _in_thread(self, frames: FrameLog, work: Callable[..., None], *args: object, size: int = 0) -> None:
        """Raises NoRoom for whatever the disk says; how much room the file takes then is made good again."""
        if size:
            self._size(frames.request_id, max(size, self._sizes.get(frames.request_id, 0)))
        try:
            await trio.to_thread.run_sync(work, *args, limiter=self._writers)
        except OSError as fault:
            await self._undo(frames)
            raise NoRoom(f"{self.folder.path}: {fault.strerror or fault}") from fault

    async def _undo(self, frames: FrameLog) -> None:
        """Give back what a write that failed has taken: a full disk needs it."""
        request_id, index = frames.request_id, frames.file_part.index
        if frames.first_seq or index is None:
            return  # it was dropped meanwhile, and its file is about to go
        try:
            if frames.in_memory:
                await trio.to_thread.run_sync(self.folder.remove, request_id, limiter=self._writers)
                frames.file_part.cut(0)
                self._size(request_id, 0)
            else:
                await trio.to_thread.run_sync(self.folder.cut, request_id, index[-1], limiter=self._writers)
                self._size(request_id, index[-1])
        except OSError as fault:
            log.error("a result's file is in the way", request_id=request_id, why=str(fault))

    async def remove(self, frames: FrameLog) -> None:
        """Delete the file of a log that was dropped; waits for whoever writes it."""
        async with self._lock(frames):
            if not self.has_file(frames):
                return
            try:
                await trio.to_thread.run_sync(self.folder.remove, frames.request_id, limiter=self._writers)
            except OSError as fault:
                log.error("a result's file cannot be deleted", request_id=frames.request_id, why=str(fault))
            self._size(frames.request_id, 0)

    # -- reading

    def fetch(self, reader: FrameReader) -> None:
        """As `FrameLog.fetch`."""
        reader.prefetching = True
        self.nursery.start_soon(self._read_ahead, reader)

    async def _read_ahead(self, reader: FrameReader) -> None:
        frames = reader.log
        restarts = frames.restarts
        ahead: list[bytes] = []
        fault = ""
        try:
            async with self._reading:
                # Since it asked, a restart may have taken it to where memory has what it wants.
                wanted = reader.is_open and reader.seq < frames.file_part.frames
                if wanted and reader.sink.backlog_bytes < HIGH_WATER_BYTES:
                    ahead = await self._read(frames, reader.seq)
        except (OSError, DamagedResult) as refusal:
            fault = str(refusal)
        except Exception as broken:
            log.exception("internal error while reading a result", request_id=frames.request_id)
            fault = repr(broken)
        finally:
            reader.prefetching = False
        if not reader.is_open:
            frames.unread()
        elif frames.restarts != restarts:
            reader.pump()  # from where it was taken to, with what is there now
        elif fault:
            self.on_broken(frames, fault)
        elif ahead:
            reader.feed(ahead)
        else:
            reader.pump()  # from memory, or to ask once more; while its sink is full this does nothing

    async def _read(self, frames: FrameLog, seq: int) -> list[bytes]:
        filed = frames.file_part
        if filed.index is None:
            contents = await trio.to_thread.run_sync(self.folder.load, frames.request_id, limiter=self._readers)
            if contents.created_unix != frames.created_unix or contents.frames != filed.frames:
                raise DamagedResult(f"the file of {frames.request_id} is another result's")
            filed.index = contents.index
        index, last = filed.index, seq + 1
        while last < filed.frames and index[last + 1] - index[seq] <= AHEAD_BYTES and last - seq < SLICE_FRAMES:
            last += 1
        offsets = index[seq : last + 1]
        return await trio.to_thread.run_sync(self.folder.read, frames.request_id, offsets, limiter=self._readers)

    # -- at the start

    async def sweep(self, ended: dict[str, float]) -> dict[str, Contents]:
        """What whole files there are of requests that have ended; all others are deleted.

        Args:
            ended: request id -> when it was made, Unix seconds.

        Raises:
            OSError: the folder cannot be read.
        """
        found, damaged = await trio.to_thread.run_sync(_sweep, self.folder, ended)
        for words in damaged:
            log.error("a result is damaged", what=words)
        for request_id, contents in found.items():
            self._size(request_id, contents.file_bytes)
        return found


def _sweep(folder: ResultFolder, ended: dict[str, float]) -> tuple[dict[str, Contents], list[str]]:
    found: dict[str, Contents] = {}
    damaged: list[str] = []
    for request_id in folder.request_ids():
        contents = None
        try:
            if request_id in ended:
                contents = folder.load(request_id)
        except (OSError, DamagedResult) as fault:
            damaged.append(str(fault))
        try:
            if contents is not None and contents.created_unix == ended[request_id]:
                found[request_id] = contents
            else:
                folder.remove(request_id)
        except OSError as fault:
            damaged.append(str(fault))
    return found, damaged
