"""The client's stream listens to a frame log, over cuts, lost attempts and killed relays: it always has the end."""

from collections import defaultdict
from typing import Any, cast

import attrs
import trio
from hypothesis import example, given
from hypothesis import strategies as st

from protocol.client.stream import Restarted, Stream
from protocol.wire.codec import decode, encode
from protocol.wire.errors import RequestFailed
from protocol.wire.frames import Audio, Completed, Failed, Frame
from protocol.wire.messages import FRAMES, FROM_CLIENT, Attach
from protocol.wire.validators import Message
from relayd.frames.frame_log import FrameLog, FrameReader

ID = "a" * 32


@attrs.define(eq=False)
class Wire:
    """A connection: the client's link at its one end, and the relay's sink at the other."""

    gone: object = None
    backlog_bytes: int = 0
    said: list[Message] = attrs.field(factory=list)
    frames: list[bytes] = attrs.field(factory=list)

    def send_nowait(self, data: bytes) -> None:
        self.said.append(decode(data, FROM_CLIENT))

    def send(self, message: Message) -> None:
        self.said.append(message)

    def send_frames(self, frames: list[bytes], size: int) -> None:
        self.frames += frames

    def on_all_sent(self, reader: FrameReader) -> None:
        """Nothing follows."""

    def on_read_error(self, reader: FrameReader) -> None:
        raise AssertionError("everything is in memory")


@attrs.define(eq=False)
class World:
    """A relay with one request, its worker and its listener; `holds`: he is more than a reader."""

    holds: bool
    stream: Stream
    log: FrameLog = attrs.field(factory=FrameLog)
    attempt: int = 1
    stored: int = 0
    highest: int = 0
    wire: Wire | None = None
    #: Attempt -> its frames, which its worker keeps.
    made: dict[int, list[bytes]] = attrs.field(factory=lambda: defaultdict(list))

    def frame(self) -> None:
        if not self.attempt:  # it waits
            self.lose()
        data = encode(Audio(**self._next(), pcm=bytes([self.attempt, self.log.next_seq])))
        self.made[self.attempt].append(data)
        self.log.append(data)

    def store(self) -> None:
        self.stored = self.attempt

    def lose(self) -> None:
        """Another attempt begins; the store is not more than one behind."""
        self.store()
        self.attempt = max(self.attempt, self.highest) + 1
        self.log.restart(self.attempt, 0)

    def kill(self) -> None:
        """The next relay knows what was stored, and the worker of that attempt comes back with its frames."""
        self.cut()
        self.highest = max(self.highest, self.stored) + 1
        self.log, self.attempt = FrameLog(), self.stored
        if self.attempt > 1:
            self.log.restart(self.attempt, 0)
        for data in self.made[self.attempt]:
            self.log.append(data)

    def cut(self) -> None:
        self.wire = None

    def connect(self) -> None:
        if self.wire is None:
            self.wire = Wire()
            self.stream.open(cast(Any, self.wire))
        self.deliver()

    def deliver(self) -> None:
        while (wire := self.wire) is not None and (wire.said or wire.frames):
            if wire.frames:
                self.stream.on_message(cast(Frame, decode(wire.frames.pop(0), FRAMES)))
                continue
            attach = wire.said.pop(0)
            assert isinstance(attach, Attach)
            if self.holds and self.attempt < attach.attempt <= self.highest and not self.log.ended:
                self.attempt = attach.attempt
                self.lose()
            seq = self.log.resume_seq(attach.attempt, attach.after_seq)
            FrameReader(ID, self.log, cast(Any, wire), seq).open()

    def end(self, *, completes: bool) -> None:
        if completes and not self.attempt:
            self.lose()
        if completes:
            last: Frame = Completed(**self._next())
        else:
            last = Failed(**self._next(), code="worker_lost", message="")
        self.log.append(encode(last), ends=True)

    def _next(self) -> dict[str, Any]:
        return {"request_id": ID, "attempt": self.attempt, "seq": self.log.next_seq}


STEPS = st.lists(st.sampled_from(["frame", "frame", "store", "lose", "kill", "cut", "connect", "connect"]), max_size=30)


@given(STEPS, st.booleans(), st.booleans())
@example(["connect", "frame", "store", "lose", "frame", "frame", "connect", "kill", "frame"], True, False)
@example(["connect", "frame", "store", "lose", "frame", "frame", "connect", "kill", "frame"], False, False)
def test_whatever_a_killed_relay_forgets_its_listener_has_the_end(
    steps: list[str], completes: bool, holds: bool
) -> None:
    async def main() -> None:
        world = World(holds, Stream(ID))
        for step in steps:
            getattr(world, step)()
        world.end(completes=completes)
        world.connect()
        assert world.stream.ended
        pieces: list[bytes] = []
        try:
            async for event in world.stream.events():
                if isinstance(event, Restarted):
                    del pieces[event.seq :]
                elif isinstance(event, Audio):
                    pieces.append(event.pcm)
            assert completes
            every = [decode(data, FRAMES) for data in world.log.frames_from(0, 1 << 20)[0]]
            assert pieces == [frame.pcm for frame in every if isinstance(frame, Audio)]
        except RequestFailed:
            assert not completes

    trio.run(main)
