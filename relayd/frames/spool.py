"""Moves frames between frame logs and their files: writes them, and reads them back for readers that lag.

Files are used in threads while the event loop runs: a log may grow, be restarted, end or be dropped while its file is
being written or read. Frames count as written only afterwards, as far as they are still valid, and frames that were
read are discarded if a restart has made them void. No file stays open between two operations.
"""

from collections.abc import Awaitable, Callable, Container
from weakref import WeakValueDictionary

import attrs
import structlog
import trio

from relayd.frames.frame_file import (
    RECORD_BYTES,
    Contents,
    DamagedResult,
    ResultFolder,
    UnfinishedResult,
    extend,
    size_of,
)
from relayd.frames.frame_log import HIGH_WATER_BYTES, FrameLog, FrameReader

log = structlog.get_logger("relayd.results")

#: Limits of one write or read: small enough that the event loop's part of it, and a join under the GIL, take less
#: than 1 ms.
SLICE_BYTES = 1024 * 1024
SLICE_FRAMES = 4096
#: Bytes read ahead for one reader at a time: as much as its sink accepts before it is full.
AHEAD_BYTES = HIGH_WATER_BYTES
#: Threads. Writers wait for the disk, and a sync should not delay the next write; reads mostly hit the page cache.
WRITERS, READERS = 4, 4


class NoRoom(Exception):
    """The disk is full or cannot be written, or `results.disk_bytes` is reached; the message says which."""


@attrs.define(eq=False)
class Spool:
    """Writes logs to files and reads them back. One task at a time writes a log's file; reads run in `nursery`."""

    folder: ResultFolder
    nursery: trio.Nursery
    disk_bytes: int
    #: Deletes old results until the given number of bytes of a log fit; returns False if they do not fit.
    make_room: Callable[[int, FrameLog], Awaitable[bool]]
    #: Called with a log that cannot be read back, and the reason.
    on_broken: Callable[[FrameLog, str], None]
    #: Size of all files in bytes.
    used_bytes: int = 0
    _sizes: dict[str, int] = attrs.field(factory=dict)
    #: Locks of the files that are in use, by request id.
    _locks: WeakValueDictionary[str, trio.Lock] = attrs.field(factory=WeakValueDictionary)
    _writers: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(WRITERS))
    _readers: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(READERS))
    #: Limits the tasks that read; acquired before a task checks whether there is still something to read.
    _reading: trio.Semaphore = attrs.field(factory=lambda: trio.Semaphore(READERS))

    def _lock(self, frames: FrameLog) -> trio.Lock:
        return self._locks.setdefault(frames.request_id, trio.Lock())

    def has_file(self, frames: FrameLog) -> bool:
        """Whether the log has a file."""
        return frames.request_id in self._sizes

    def file_bytes(self, frames: FrameLog) -> int:
        """Size of a log's file, 0 where it has none."""
        return self._sizes.get(frames.request_id, 0)

    def _set_size(self, request_id: str, size: int) -> None:
        self.used_bytes += size - self._sizes.pop(request_id, 0)
        if size:
            self._sizes[request_id] = size

    # -- writing

    async def spill(self, frames: FrameLog) -> None:
        """Write the frames that a live log has in memory to its file, and have the log release them.

        Raises:
            NoRoom: not all frames were written; those that were are released, the others are still in memory.
        """
        async with self._lock(frames):
            try:
                await self._write(frames, frames.next_seq)
            finally:
                frames.release_written()

    async def seal(self, frames: FrameLog) -> None:
        """Complete the file of an ended log and sync it to the disk; frames in memory stay there.

        Raises:
            NoRoom: the file could not be completed; frames that were only in memory still are.
        """
        async with self._lock(frames):
            if frames.file_part.sealed or not frames.is_complete:
                return
            batch = [] if frames.file_part.frames else frames.next_unwritten(SLICE_BYTES, SLICE_FRAMES)
            if len(batch) < frames.next_seq:
                batch = []
                await self._write(frames, frames.next_seq)
            file_part, starts = frames.file_part, frames.starts
            if file_part.index is None or file_part.frames + len(batch) < frames.next_seq:
                return  # it was dropped meanwhile
            index = file_part.index[:]
            extend(index, batch)
            size = size_of(index[-1], len(index) - 1, len(starts))
            await self._make_room_for(frames, size)
            if frames.file_part is not file_part:
                return  # it was dropped while room was made
            head = (frames.request_id, frames.created_unix)
            await self._in_thread(frames, self.folder.seal, *head, index, starts, batch, size=size)
            if frames.file_part is file_part:
                file_part.frames, file_part.index, file_part.sealed = frames.next_seq, index, True
                frames.unread()

    async def _write(self, frames: FrameLog, until_seq: int) -> None:
        """Write the frames below `until_seq` that are not in the file; the caller holds the lock."""
        file_part = frames.file_part
        while file_part is frames.file_part and file_part.frames < until_seq and file_part.index is not None:
            batch = frames.next_unwritten(SLICE_BYTES, SLICE_FRAMES)
            if not batch or frames.first_seq:  # a restart has shortened the log, or it was dropped
                return
            first, offset = file_part.frames, file_part.index[-1]
            file_part.valid = first + len(batch)
            size = offset + sum(map(len, batch)) + RECORD_BYTES * len(batch)
            await self._make_room_for(frames, size)
            if file_part is not frames.file_part or file_part.valid < first + len(batch):
                continue  # dropped or restarted while room was made
            await self._in_thread(
                frames, self.folder.write, frames.request_id, frames.created_unix, offset, batch, size=size
            )
            valid = max(0, int(file_part.valid) - first)  # a restart meanwhile has made the rest void
            if file_part is frames.file_part and valid and file_part.index is not None:
                extend(file_part.index, batch[:valid])
                file_part.frames += valid

    async def _make_room_for(self, frames: FrameLog, size: int) -> None:
        more = size - self._sizes.get(frames.request_id, 0)
        if more > 0 and self.used_bytes + more > self.disk_bytes and not await self.make_room(more, frames):
            raise NoRoom(f"results use all of their {self.disk_bytes} bytes on disk; raise results.disk_bytes")

    async def _in_thread(self, frames: FrameLog, work: Callable[..., None], *args: object, size: int = 0) -> None:
        """Do `work` in a thread; the file will have `size` bytes. An `OSError` is undone and raised as `NoRoom`."""
        if size:
            self._set_size(frames.request_id, max(size, self._sizes.get(frames.request_id, 0)))
        try:
            await trio.to_thread.run_sync(work, *args, limiter=self._writers)
        except OSError as fault:
            await self._undo(frames)
            raise NoRoom(f"{self.folder.path}: {fault.strerror or fault}") from fault

    async def _undo(self, frames: FrameLog) -> None:
        """Free the space that a failed write may have used, which a full disk needs."""
        request_id, index = frames.request_id, frames.file_part.index
        if frames.first_seq or index is None:
            return  # it was dropped meanwhile, and its file is about to be deleted
        try:
            if frames.in_memory:
                await trio.to_thread.run_sync(self.folder.remove, request_id, limiter=self._writers)
                frames.file_part.cut(0)
                self._set_size(request_id, 0)
            else:
                await trio.to_thread.run_sync(self.folder.cut, request_id, index[-1], limiter=self._writers)
                self._set_size(request_id, index[-1])
        except OSError as fault:
            log.error("a result's file cannot be cleaned up", request_id=request_id, why=str(fault))

    async def remove(self, frames: FrameLog) -> None:
        """Delete the file of a log that was dropped, after waiting for the task that writes it."""
        async with self._lock(frames):
            if not self.has_file(frames):
                return
            try:
                await trio.to_thread.run_sync(self.folder.remove, frames.request_id, limiter=self._writers)
            except OSError as fault:
                log.error("a result's file cannot be deleted", request_id=frames.request_id, why=str(fault))
            self._set_size(frames.request_id, 0)

    # -- reading

    def fetch(self, reader: FrameReader) -> None:
        """Implement `FrameLog.fetch`."""
        reader.prefetching = True
        self.nursery.start_soon(self._read_ahead, reader)

    async def _read_ahead(self, reader: FrameReader) -> None:
        frames = reader.log
        restarts = frames.restarts
        prefetched: list[bytes] = []
        fault = ""
        try:
            async with self._reading:
                # A restart may have moved the reader meanwhile, to frames that are in memory.
                wanted = reader.is_open and reader.seq < frames.file_part.frames
                if wanted and reader.sink.backlog_bytes < HIGH_WATER_BYTES:
                    prefetched = await self._read(frames, reader.seq)
        except (OSError, DamagedResult) as error:
            fault = str(error)
        except Exception as error:
            log.exception("internal error while reading a result", request_id=frames.request_id)
            fault = repr(error)
        finally:
            reader.prefetching = False
        if not reader.is_open:
            frames.unread()
        elif frames.restarts != restarts:
            reader.pump()  # continue from its new position
        elif fault:
            self.on_broken(frames, fault)
        elif prefetched:
            reader.feed(prefetched)
        else:
            reader.pump()  # sends from memory or fetches again; does nothing while its sink is full

    async def _read(self, frames: FrameLog, seq: int) -> list[bytes]:
        file_part = frames.file_part
        if file_part.index is None:
            contents = await trio.to_thread.run_sync(self.folder.load, frames.request_id, limiter=self._readers)
            if contents.created_unix != frames.created_unix or contents.frames != file_part.frames:
                raise DamagedResult(f"the file of {frames.request_id} belongs to another result")
            file_part.index = contents.index
        index, last = file_part.index, seq + 1
        while last < file_part.frames and index[last + 1] - index[seq] <= AHEAD_BYTES and last - seq < SLICE_FRAMES:
            last += 1
        offsets = index[seq : last + 1]
        return await trio.to_thread.run_sync(self.folder.read, frames.request_id, offsets, limiter=self._readers)

    # -- at the start

    async def sweep(
        self, ended: dict[str, float], left_alone: Container[str] = (), recorded_first: Container[str] = ()
    ) -> dict[str, Contents]:
        """Return the contents of the complete files of ended requests, by request id; delete all other files.

        Args:
            ended: request id -> creation time (Unix seconds) of every ended request.
            left_alone: ids whose files are neither read nor deleted.
            recorded_first: ids of requests whose end was stored before their file was completed: it may be unfinished.

        Raises:
            OSError: the folder cannot be read.
        """
        found, damaged, unknown = await trio.to_thread.run_sync(_sweep, self.folder, ended, left_alone, recorded_first)
        for message in damaged:
            log.error("a result is damaged", what=message)
        if unknown:
            log.info("files of unknown or unfinished requests deleted", files=unknown)
        for request_id, contents in found.items():
            self._set_size(request_id, contents.file_bytes)
        return found


def _sweep(
    folder: ResultFolder, ended: dict[str, float], left_alone: Container[str], recorded_first: Container[str]
) -> tuple[dict[str, Contents], list[str], int]:
    found: dict[str, Contents] = {}
    damaged: list[str] = []
    unknown = 0
    for request_id in folder.request_ids():
        if request_id in left_alone:
            continue
        contents, unfinished = None, request_id not in ended
        try:
            if request_id in ended:
                contents = folder.load(request_id)
        except UnfinishedResult as fault:
            unfinished = request_id in recorded_first
            if not unfinished:
                damaged.append(str(fault))
        except (OSError, DamagedResult) as fault:
            damaged.append(str(fault))
        try:
            if contents is not None and contents.created_unix == ended[request_id]:
                found[request_id] = contents
            else:
                folder.remove(request_id)
                unknown += unfinished
        except OSError as fault:
            damaged.append(str(fault))
    return found, damaged, unknown
