"""Frame logs: the output of a request so far, and its readers.

Attach, resume, replay, a second listener and "fetch the result later" are one thing: a `FrameReader` at a `seq`.
Appending never waits for a reader, nor for a disk. A reader sends while its sink takes, stops when the sink is full,
and goes on from its own place when the sink says so; so a slow one costs nobody else anything, and needs no task.

Frames come into memory. `relayd.frames.spool` may write them to a file behind the log and have the log release them;
a reader that is that far behind asks for some of them ahead, and goes on when they are there.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

import attrs

from relayd.frames.frame_file import RECORD_BYTES, Contents, Index, new_index

#: A reader hands frames to its sink until this much waits there: one second of 48 kHz speech is 96 KB.
HIGH_WATER_BYTES = 256 * 1024
#: From here down the sink asks for more: late enough to send in batches, early enough never to run dry.
LOW_WATER_BYTES = 64 * 1024
#: What a frame takes in memory beside its bytes: the object's head (33 bytes), its place in a list, rounding.
FRAME_COST_BYTES = 64


class Sink(Protocol):
    """Where a reader's frames go: a connection."""

    @property
    def backlog_bytes(self) -> int:
        """What was sent and the transport has not taken yet."""

    def send_frames(self, frames: list[bytes], size: int) -> None:
        """Send these, of `size` bytes together, without waiting; the list is not to be changed."""

    def on_all_sent(self, reader: "FrameReader") -> None:
        """A reader of this sink has sent the last frame of its log."""

    def on_read_error(self, reader: "FrameReader") -> None:
        """What a reader of this sink wants next cannot be read back."""


@attrs.define(eq=False)
class MemoryBudget:
    """What all logs hold in memory together, and how much that may be."""

    limit_bytes: float = float("inf")
    held_bytes: int = 0
    #: Called whenever something comes in while they hold too much; must not wait.
    on_exceeded: Callable[[], None] = lambda: None

    @property
    def over(self) -> bool:
        """Whether they hold more than they may."""
        return self.held_bytes > self.limit_bytes

    def add(self, cost: int) -> None:
        """Account for `cost` more bytes; negative when bytes were released."""
        self.held_bytes += cost
        if self.held_bytes > self.limit_bytes:
            self.on_exceeded()


@attrs.define(eq=False)
class FilePart:
    """What of a log lies in its file: the frames below `frames`, some of which may lie in memory as well."""

    #: None where it is not at hand; the trailer of a sealed file has it.
    index: Index | None = attrs.field(factory=new_index)
    frames: int = 0
    #: The file is whole, and the disk has it.
    sealed: bool = False
    #: Frames that are being written, from here on up, are void already.
    valid: float = float("inf")

    def cut(self, seq: int) -> None:
        """Frames from `seq` on are void; the next to be written takes the place of `seq`."""
        self.valid = min(self.valid, seq)
        if seq < self.frames:
            assert self.index is not None, "only a log that has not ended is cut"
            del self.index[seq + 1 :]
            self.frames = seq


@attrs.define(eq=False)
class FrameLog:
    """The frames of one request, and who reads them.

    `seq` counts on over attempts where the engine is reproducible; where a new attempt begins lower, `restart`
    forgets what lies behind that place and takes the readers back to it.
    """

    #: Of its request; the file is named by it.
    request_id: str = ""
    created_unix: float = 0.0
    memory: MemoryBudget = attrs.field(factory=MemoryBudget)
    #: Gets a reader the frames from its `seq` on, which are not in memory, and has it `go_on`; must not wait.
    fetch: Callable[["FrameReader"], None] = lambda _reader: None
    ended: bool = False
    readers: set["FrameReader"] = attrs.field(factory=set)
    file_part: FilePart = attrs.field(factory=FilePart)
    #: Rises with every restart: what was read before it may be void.
    restarts: int = 0
    #: Bytes of all frames, wherever they lie.
    size_bytes: int = 0
    #: Of those in memory, with what they cost there.
    memory_bytes: int = 0
    #: Number of the first frame there is; above 0 once those below were let go of for good.
    first_seq: int = 0
    #: Number of the frame that is to come next; only the log itself sets it.
    next_seq: int = 0
    #: Number of the first frame in memory.
    _base: int = 0
    _frames: list[bytes] = attrs.field(factory=list)
    #: (attempt, seq it began at), in order.
    _starts: list[tuple[int, int]] = attrs.field(factory=list)

    @classmethod
    def of_file(cls, request_id: str, contents: Contents) -> "FrameLog":
        """The log of a request that ended before a restart: all of it lies in its file."""
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
        """Whether it has ended and every frame from the first on is there."""
        return self.ended and not self.first_seq

    @property
    def in_memory(self) -> bool:
        """Whether every frame there is lies in memory."""
        return self._base == self.first_seq

    @property
    def starts(self) -> tuple[tuple[int, int], ...]:
        """Attempts that did not begin at 0 as the first: (attempt, seq it began at), in order."""
        return tuple(self._starts)

    def frame(self, seq: int) -> bytes | None:
        """The frame numbered `seq`, as the worker sent it; None where it is not in memory."""
        return self._frames[seq - self._base] if seq >= self._base else None

    def frames_from(self, seq: int, most_bytes: int) -> tuple[list[bytes], int]:
        """Frames from `seq` on, until there is none or they have `most_bytes`; none where `seq` is not in memory.

        Returns:
            them, and their size in bytes.
        """
        frames: list[bytes] = []
        size = 0
        if seq >= self._base:
            every, at = self._frames, seq - self._base
            while at < len(every) and size < most_bytes:
                data = every[at]
                frames.append(data)
                size += len(data)
                at += 1
        return frames, size

    def restart(self, attempt: int, seq: int) -> None:
        """`attempt` begins at `seq`, at most `next_seq`; frames from there on are forgotten."""
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
        """Add the next frame and send it to every reader that has kept up."""
        self._frames.append(data)
        self.next_seq += 1
        size = len(data)
        cost = size + FRAME_COST_BYTES
        self.size_bytes += size
        self.memory_bytes += cost
        self.ended = ends
        memory = self.memory  # as `MemoryBudget.add`, without a call for every frame
        memory.held_bytes += cost
        if memory.held_bytes > memory.limit_bytes:
            memory.on_exceeded()
        for reader in tuple(self.readers):
            reader.pump()

    def extend(self, frames: list[bytes], size: int) -> None:
        """Add the next frames, none of which is the last, of `size` bytes together. As `append`, for many at once."""
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
        """Let go of frames in memory, by their places there; how many bytes they were."""
        gone = self._frames[begin:end]
        del self._frames[begin:end]
        size = sum(map(len, gone))
        cost = size + FRAME_COST_BYTES * len(gone)
        self.memory_bytes -= cost
        self.memory.held_bytes -= cost
        return size

    def _clear_memory(self) -> None:
        """Let go of all in memory, and look at none: what was not used for long is slow to look at."""
        self._frames.clear()
        self.memory.held_bytes -= self.memory_bytes
        self.memory_bytes = 0

    def resume_seq(self, attempt: int, after_seq: int) -> int:
        """Where a reader goes on that has the frames of `attempt` up to `after_seq`.

        An attempt of 0 has seen none, and a later attempt may have begun lower than it got. The last frame of a log
        that has ended is given to every reader: after a restart of the relay it may lie below what the reader has.
        """
        begun = [seq for number, seq in self._starts if number > attempt > 0]
        return min(after_seq + 1, self.next_seq - self.ended, *begun)

    # -- memory and file

    def next_unwritten(self, most_bytes: int, most_frames: int) -> list[bytes]:
        """The first frames that are not in the file yet: at least one where there is one, and no more than this."""
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
        """Keep in memory only what the file does not have."""
        gone = self.file_part.frames - self._base
        if gone == len(self._frames):
            self._clear_memory()
        elif gone > 0:
            self._forget_memory(0, gone)
        self._base += max(0, gone)

    def unread(self) -> None:
        """Let go of the index where nobody reads: it takes eight bytes a frame, and a sealed file has it."""
        if self.file_part.sealed and not self.readers:
            self.file_part.index = None

    def drop(self, last_frame: bytes | None = None) -> None:
        """Let go of all frames for good; of an ended log `last_frame` stays in place of its last one."""
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
    """One reader of one log: the next `seq` it wants, and the sink that gets it, which knows it by `key`."""

    key: str
    log: FrameLog
    sink: Sink
    seq: int = 0
    #: Whether frames are being read ahead for it.
    prefetching: bool = False
    #: Frames from `seq` on that were read ahead.
    _prefetched: deque[bytes] = attrs.field(factory=deque)

    @property
    def done(self) -> bool:
        """Whether the log has ended and all of it was sent."""
        return self.log.ended and self.seq >= self.log.next_seq

    @property
    def is_open(self) -> bool:
        """Whether it still reads."""
        return self in self.log.readers

    def open(self) -> None:
        """Begin: send what is there, then each frame as it comes."""
        self.seq = max(self.seq, self.log.first_seq)
        self.log.readers.add(self)
        self.pump()

    def close(self) -> None:
        """Read no more."""
        self._forget_ahead()
        self.log.readers.discard(self)
        self.log.unread()

    def seek(self, seq: int) -> None:
        """Go on at `seq`; what was read ahead is not wanted any more."""
        self._forget_ahead()
        self.seq = seq

    def pump(self) -> None:
        """Send while the sink takes; called at each new frame and whenever the sink has drained."""
        log, sink = self.log, self.sink
        while self.seq < log.next_seq and (room := HIGH_WATER_BYTES - sink.backlog_bytes) > 0:
            frames, size = self._next_ahead(room) if self._prefetched else log.frames_from(self.seq, room)
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
        """What was fetched is there: the frames from `seq` on."""
        self._prefetched.extend(frames)
        self.log.memory.held_bytes += sum(map(len, self._prefetched))
        self.pump()
        if self.log.memory.over:  # better to read them once more
            self._forget_ahead()

    def _next_ahead(self, most_bytes: int) -> tuple[list[bytes], int]:
        frames: list[bytes] = []
        size = 0
        while self._prefetched and size < most_bytes:
            data = self._prefetched.popleft()
            frames.append(data)
            size += len(data)
        self.log.memory.held_bytes -= size
        return frames, size

    def _forget_ahead(self) -> None:
        self.log.memory.held_bytes -= sum(map(len, self._prefetched))
        self._prefetched.clear()
