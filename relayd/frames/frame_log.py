"""Frame logs: the output of a request so far, and its readers.

Attach, resume, replay, a second reader and "fetch the result later" are one thing: a `FrameReader` at a `seq`.
Appending never waits for a reader or for the disk. A reader sends until its sink is full and continues from its own
position when the sink has drained, so a slow reader does not affect the others and needs no task.

New frames are kept in memory. `relayd.frames.spool` may write them to a file later and have the log release them; a
reader that needs released frames has some of them read ahead, and continues when they have been read.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

import attrs

from relayd.frames.frame_file import RECORD_BYTES, Contents, Index, new_index

#: A reader passes frames to its sink until its backlog is this large: one second of 48 kHz speech is 96 KB.
HIGH_WATER_BYTES = 256 * 1024
#: At this backlog the sink asks for more: late enough to send in batches, early enough never to run out of data.
LOW_WATER_BYTES = 64 * 1024
#: Memory per frame in addition to its bytes: the object header (33 bytes), its place in a list, rounding.
FRAME_COST_BYTES = 64


class Sink(Protocol):
    """Where a reader's frames go: a connection."""

    @property
    def backlog_bytes(self) -> int:
        """Bytes that were sent and that the transport has not accepted yet."""

    def send_frames(self, frames: list[bytes], size: int) -> None:
        """Send frames of `size` bytes in total without waiting; must not change the list."""

    def on_all_sent(self, reader: "FrameReader") -> None:
        """Handle that a reader of this sink has sent the last frame of its log."""

    def on_read_error(self, reader: "FrameReader") -> None:
        """Handle that the next frames of a reader of this sink cannot be read back."""


@attrs.define(eq=False)
class MemoryBudget:
    """The memory that all logs use together, and its limit."""

    limit_bytes: float = float("inf")
    held_bytes: int = 0
    #: Called whenever bytes are added and the limit is exceeded; must not wait.
    on_exceeded: Callable[[], None] = lambda: None

    @property
    def over(self) -> bool:
        """Whether the limit is exceeded."""
        return self.held_bytes > self.limit_bytes

    def add(self, cost: int) -> None:
        """Account for `cost` more bytes; negative when bytes were released."""
        self.held_bytes += cost
        if self.held_bytes > self.limit_bytes:
            self.on_exceeded()


@attrs.define(eq=False)
class FilePart:
    """The part of a log that is in its file: the frames below `frames`, some of which may be in memory as well."""

    #: The offsets of the records; None while it is not loaded, which only a sealed file allows: its trailer has it.
    index: Index | None = attrs.field(factory=new_index)
    frames: int = 0
    #: Whether the file is complete and synced to the disk.
    sealed: bool = False
    #: Frames that are being written from this seq on are already void.
    valid: float = float("inf")

    def cut(self, seq: int) -> None:
        """Remove the frames from `seq` on; the next frame written gets the number `seq`."""
        self.valid = min(self.valid, seq)
        if seq < self.frames:
            assert self.index is not None, "only a log that has not ended is cut"
            del self.index[seq + 1 :]
            self.frames = seq


@attrs.define(eq=False)
class FrameLog:
    """The frames of one request, and their readers.

    If the engine is reproducible, `seq` continues across attempts; if a new attempt begins at a lower seq, `restart`
    removes the frames from that seq on and moves the readers back to it.
    """

    #: The id of its request, which names the file.
    request_id: str = ""
    created_unix: float = 0.0
    memory: MemoryBudget = attrs.field(factory=MemoryBudget)
    #: Starts to read the frames from a reader's `seq` on, which are not in memory, and then calls `FrameReader.feed`;
    #: must not wait.
    fetch: Callable[["FrameReader"], None] = lambda _reader: None
    ended: bool = False
    readers: set["FrameReader"] = attrs.field(factory=set)
    file_part: FilePart = attrs.field(factory=FilePart)
    #: Incremented at every restart and drop: frames that were read before may be void.
    restarts: int = 0
    #: Bytes of all frames, in memory or in the file.
    size_bytes: int = 0
    #: Memory used by the frames in memory, including the cost per frame.
    memory_bytes: int = 0
    #: Number of the first frame that is kept; above 0 once those below were dropped for good.
    first_seq: int = 0
    #: Number of the next frame; only the log itself sets it.
    next_seq: int = 0
    #: Number of the first frame in memory.
    _base: int = 0
    _frames: list[bytes] = attrs.field(factory=list)
    #: (attempt, seq at which it began), in order.
    _starts: list[tuple[int, int]] = attrs.field(factory=list)

    @classmethod
    def of_file(cls, request_id: str, contents: Contents) -> "FrameLog":
        """Make the log of a request that ended before a restart, with all frames in its file."""
        return cls(
            request_id=request_id,
            created_unix=contents.created_unix,
            ended=True,
            size_bytes=contents.frame_bytes,
            file_part=FilePart(index=None, frames=contents.frames, sealed=True),
            next_seq=contents.frames,
            base=contents.frames,
            starts=list(contents.starts),
        )

    @property
    def is_complete(self) -> bool:
        """Whether it has ended and all of its frames are kept."""
        return self.ended and not self.first_seq

    @property
    def in_memory(self) -> bool:
        """Whether every frame that is kept is in memory."""
        return self._base == self.first_seq

    @property
    def starts(self) -> tuple[tuple[int, int], ...]:
        """The restarts of the log: (attempt, seq at which it began), in order."""
        return tuple(self._starts)

    def frame(self, seq: int) -> bytes | None:
        """Return the frame numbered `seq`, as the worker sent it; None if it is not in memory."""
        return self._frames[seq - self._base] if seq >= self._base else None

    def frames_from(self, seq: int, most_bytes: int) -> tuple[list[bytes], int]:
        """Return frames from `seq` on until they have `most_bytes` or more.

        Returns:
            The frames, and their size in bytes; no frames if `seq` is not in memory.
        """
        frames: list[bytes] = []
        size = 0
        if seq >= self._base:
            in_memory, at = self._frames, seq - self._base
            while at < len(in_memory) and size < most_bytes:
                data = in_memory[at]
                frames.append(data)
                size += len(data)
                at += 1
        return frames, size

    def restart(self, attempt: int, seq: int) -> None:
        """Begin `attempt` at `seq`, which is at most `next_seq`; frames from there on are removed."""
        self.restarts += 1
        self.size_bytes -= self._forget_memory(max(0, seq - self._base), len(self._frames))
        if seq < self._base:
            index = self.file_part.index
            assert index is not None, "only a log that has not ended is restarted"
            self.size_bytes -= index[self._base] - index[seq] - RECORD_BYTES * (self._base - seq)
            self._base = seq
        self.next_seq = seq
        self.file_part.cut(seq)
        self._starts.append((attempt, seq))
        for reader in self.readers:
            reader.seek(min(reader.seq, seq))

    def append(self, data: bytes, *, ends: bool = False) -> None:
        """Add the next frame and send it to every reader that can send it now; `ends`: it is the last."""
        self._frames.append(data)
        self.next_seq += 1
        size = len(data)
        cost = size + FRAME_COST_BYTES
        self.size_bytes += size
        self.memory_bytes += cost
        self.ended = ends
        memory = self.memory  # the same as `MemoryBudget.add`, without a call per frame
        memory.held_bytes += cost
        if memory.held_bytes > memory.limit_bytes:
            memory.on_exceeded()
        for reader in tuple(self.readers):
            reader.pump()

    def extend(self, frames: list[bytes], size: int) -> None:
        """Add several frames of `size` bytes in total, none of which is the last; otherwise like `append`."""
        before, count = self.next_seq, len(frames)
        self._frames += frames
        self.next_seq = after = before + count
        cost = size + FRAME_COST_BYTES * count
        self.size_bytes += size
        self.memory_bytes += cost
        memory = self.memory
        memory.held_bytes += cost
        if memory.held_bytes > memory.limit_bytes:
            memory.on_exceeded()
        for reader in tuple(self.readers):
            sink = reader.sink
            if reader.seq == before and sink.backlog_bytes + size <= HIGH_WATER_BYTES:
                reader.seq = after
                sink.send_frames(frames, size)
            else:
                reader.pump()

    def _forget_memory(self, begin: int, end: int) -> int:
        """Release frames in memory, given by their indices in `_frames`; returns their size in bytes."""
        released = self._frames[begin:end]
        del self._frames[begin:end]
        size = sum(map(len, released))
        cost = size + FRAME_COST_BYTES * len(released)
        self.memory_bytes -= cost
        self.memory.held_bytes -= cost
        return size

    def _clear_memory(self) -> None:
        """Release all frames in memory without touching them: access to memory unused for long is slow."""
        self._frames.clear()
        self.memory.held_bytes -= self.memory_bytes
        self.memory_bytes = 0

    def resume_seq(self, attempt: int, after_seq: int) -> int:
        """Return the seq at which a reader continues that has the frames of `attempt` up to `after_seq`.

        A reader with `attempt` 0 has no frames. A later attempt may have begun at a lower seq. The last frame of an
        ended log is sent to every reader: after a restart of the relay, its seq may be below `after_seq`.
        """
        begun = [seq for number, seq in self._starts if number > attempt > 0]
        return min(after_seq + 1, self.next_seq - self.ended, *begun)

    # -- memory and file

    def next_unwritten(self, most_bytes: int, most_frames: int) -> list[bytes]:
        """Return the first frames that are not in the file yet: at least one if there is one, else up to the limits."""
        frames: list[bytes] = []
        size = 0
        begin = self.file_part.frames - self._base
        for data in self._frames[begin : begin + most_frames]:
            size += len(data)
            if frames and size > most_bytes:
                break
            frames.append(data)
        return frames

    def release_written(self) -> None:
        """Release the frames in memory that the file has."""
        written = self.file_part.frames - self._base
        if written == len(self._frames):
            self._clear_memory()
        elif written > 0:
            self._forget_memory(0, written)
        self._base += max(0, written)

    def unread(self) -> None:
        """Release the index of a sealed file without readers: it takes 8 bytes per frame and can be loaded again."""
        if self.file_part.sealed and not self.readers:
            self.file_part.index = None

    def drop(self, last_frame: bytes | None = None) -> None:
        """Drop all frames for good; if `last_frame` is given, it replaces the last frame of an ended log."""
        self._clear_memory()
        self._base = self.next_seq - (last_frame is not None)
        self.size_bytes = 0
        self.restarts += 1
        self.file_part = FilePart()
        self.first_seq = self._base
        if last_frame is not None:
            self._frames.append(last_frame)
            self.size_bytes = len(last_frame)
            self.memory_bytes += len(last_frame) + FRAME_COST_BYTES
            self.memory.held_bytes += len(last_frame) + FRAME_COST_BYTES
        for reader in tuple(self.readers):
            reader.seek(max(reader.seq, self.first_seq))
            reader.pump()


@attrs.define(eq=False)
class FrameReader:
    """A reader of a log: the next `seq` to send, and the sink it sends to, which identifies the reader by `key`."""

    key: str
    log: FrameLog
    sink: Sink
    seq: int = 0
    #: Whether frames are being read from the file for it.
    prefetching: bool = False
    #: Frames from `seq` on that were read from the file.
    _prefetched: deque[bytes] = attrs.field(factory=deque)

    @property
    def done(self) -> bool:
        """Whether the log has ended and all of its frames were sent."""
        return self.log.ended and self.seq >= self.log.next_seq

    @property
    def is_open(self) -> bool:
        """Whether the reader is open."""
        return self in self.log.readers

    def open(self) -> None:
        """Start reading: send the existing frames, then each new frame."""
        self.seq = max(self.seq, self.log.first_seq)
        self.log.readers.add(self)
        self.pump()

    def close(self) -> None:
        """Stop reading."""
        self._discard_prefetched()
        self.log.readers.discard(self)
        self.log.unread()

    def seek(self, seq: int) -> None:
        """Continue at `seq`; frames that were read ahead are discarded."""
        self._discard_prefetched()
        self.seq = seq

    def pump(self) -> None:
        """Send frames until the sink is full; called for each new frame and whenever the sink has drained."""
        log, sink = self.log, self.sink
        while self.seq < log.next_seq and (room := HIGH_WATER_BYTES - sink.backlog_bytes) > 0:
            frames, size = self._next_prefetched(room) if self._prefetched else log.frames_from(self.seq, room)
            if not frames:
                if not self.prefetching:
                    log.fetch(self)
                return
            self.seq += len(frames)
            sink.send_frames(frames, size)
        if self.done:
            self.close()
            sink.on_all_sent(self)

    def feed(self, frames: Iterable[bytes]) -> None:
        """Add frames from `seq` on that were read from the file, and send."""
        self._prefetched.extend(frames)
        self.log.memory.held_bytes += sum(map(len, self._prefetched))
        self.pump()
        if self.log.memory.over:  # memory is short: read them again later
            self._discard_prefetched()

    def _next_prefetched(self, most_bytes: int) -> tuple[list[bytes], int]:
        frames: list[bytes] = []
        size = 0
        while self._prefetched and size < most_bytes:
            data = self._prefetched.popleft()
            frames.append(data)
            size += len(data)
        self.log.memory.held_bytes -= size
        return frames, size

    def _discard_prefetched(self) -> None:
        self.log.memory.held_bytes -= sum(map(len, self._prefetched))
        self._prefetched.clear()
