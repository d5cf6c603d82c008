"""Frame logs: what a request has put out so far, and its readers.

Attach, resume, replay, a second listener and "fetch the result later" are one thing: a `FrameReader` at a `seq`.
Appending never waits for a reader. A reader sends while its sink takes, stops when the sink is full, and goes on
from its own place when the sink says so; so a slow one costs nobody else anything, and needs no task.

The frames lie in memory. A file behind them changes `FrameLog` alone: readers only ask for the frame at a `seq`.
"""

from typing import Protocol

import attrs

#: A reader hands frames to its sink until this much waits there: one second of 48 kHz speech is 96 KB.
HIGH_WATER_BYTES = 256 * 1024
#: From here down the sink asks for more: late enough to send in batches, early enough never to run dry.
LOW_WATER_BYTES = 64 * 1024


class Sink(Protocol):
    """Where a reader's frames go: a connection."""

    @property
    def backlog_bytes(self) -> int:
        """What was sent and the transport has not taken yet."""

    def send_nowait(self, data: bytes) -> None:
        """Send one message without waiting."""

    def hear_read(self, reader: "FrameReader") -> None:
        """A reader of this sink has sent the last frame of its log."""


@attrs.define(eq=False)
class FrameLog:
    """The frames of one request, and who reads them.

    `seq` counts on over attempts where the engine is reproducible; where a new attempt begins lower, `restart`
    forgets what lies behind that place and takes the readers back to it.
    """

    bytes_held: int = 0
    ended: bool = False
    readers: set["FrameReader"] = attrs.field(factory=set)
    _frames: list[bytes] = attrs.field(factory=list)
    #: (attempt, seq it began at), in order.
    _starts: list[tuple[int, int]] = attrs.field(factory=list)

    @property
    def next_seq(self) -> int:
        """Number of the frame that is to come next."""
        return len(self._frames)

    def frame(self, seq: int) -> bytes:
        """The frame numbered `seq`, as the worker sent it."""
        return self._frames[seq]

    def restart(self, attempt: int, seq: int) -> None:
        """`attempt` begins at `seq`, at most `next_seq`; frames from there on are forgotten."""
        for data in self._frames[seq:]:
            self.bytes_held -= len(data)
        del self._frames[seq:]
        self._starts.append((attempt, seq))
        for reader in self.readers:
            reader.seq = min(reader.seq, seq)

    def append(self, data: bytes, *, ends: bool = False) -> None:
        """Add the next frame and send it to every reader that has kept up."""
        self._frames.append(data)
        self.bytes_held += len(data)
        self.ended = ends
        for reader in tuple(self.readers):
            reader.pump()

    def drop(self) -> None:
        """Let go of an ended log's frames, to save their memory."""
        self._frames.clear()
        self.bytes_held = 0

    def place(self, attempt: int, after_seq: int) -> int:
        """Where a reader goes on that has the frames of `attempt` up to `after_seq`.

        An attempt of 0 has seen none, and a later attempt may have begun lower than it got. The last frame of a log
        that has ended is given to every reader: after a restart of the relay it may lie below what the reader has.
        """
        begun = [seq for number, seq in self._starts if number > attempt > 0]
        return min(after_seq + 1, self.next_seq - self.ended, *begun)


@attrs.define(eq=False)
class FrameReader:
    """One reader of one log: the next `seq` it wants, and the sink that gets it, which knows it by `key`."""

    key: str
    log: FrameLog
    sink: Sink
    seq: int = 0

    @property
    def done(self) -> bool:
        """Whether the log has ended and all of it was sent."""
        return self.log.ended and self.seq >= self.log.next_seq

    def open(self) -> None:
        """Begin: send what is there, then each frame as it comes."""
        self.log.readers.add(self)
        self.pump()

    def close(self) -> None:
        """Read no more."""
        self.log.readers.discard(self)

    def pump(self) -> None:
        """Send while the sink takes; called at each new frame and whenever the sink has drained."""
        log, sink = self.log, self.sink
        while self.seq < log.next_seq and sink.backlog_bytes < HIGH_WATER_BYTES:
            data = log.frame(self.seq)
            self.seq += 1
            sink.send_nowait(data)
        if self.done:
            self.close()
            sink.hear_read(self)
