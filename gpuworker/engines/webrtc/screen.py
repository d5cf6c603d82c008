"""Which pictures a peer is shown: those of the play if they are in time, and else the idle loop.

Pictures of VP8 refer to those before them, so a sequence may be entered at a key frame only, and is broken by any
picture that was left out.
"""

from collections.abc import Iterator, Sequence

from gpuworker.engines.webrtc.play import SLOT_TICKS, Play
from protocol.wire.ivf import PTS_HZ, Picture

#: A picture that comes later than this, against its audio, is left out, and all behind it to the next key frame.
LATE_TICKS = PTS_HZ // 10
#: The last picture of a play stands for so long if no other comes. Then the idle loop goes on.
HOLD_TICKS = PTS_HZ // 2
#: A peer that asks for key frames gets no more of them than this: they are ten times as large.
RESTART_TICKS = PTS_HZ


class Screen:
    """Decides slot by slot. All times are in 1/90000 s of the peer's clock.

    Attributes:
        shown: pictures that went out.
        dropped: pictures that came late, or were left out to save bandwidth.
        due_bytes: of all pictures that came in time, also of those that were left out.
    """

    def __init__(self) -> None:
        self.shown = 0
        self.dropped = 0
        self.due_bytes = 0
        self._idle: Sequence[Picture] = ()
        self._idle_ticks = 1
        self._idle_began = 0
        self._idle_next = 0
        #: Whose pictures are on the screen; the screen itself stands for the idle loop.
        self._showing: object = None
        #: Whether no picture of its sequence was left out.
        self._whole = False
        self._play_at = 0
        self._restarted_at = -RESTART_TICKS
        self._wants_key = False

    def set_idle(self, pictures: Sequence[Picture]) -> None:
        """Show these in a loop while no play has pictures; the first is a key frame."""
        first = pictures[0].pts
        self._idle = [Picture(each.data, each.pts - first) for each in pictures]
        last = self._idle[-1].pts
        self._idle_ticks = last + (last // (len(pictures) - 1) if last else PTS_HZ)
        if self._showing is self:
            self._showing = None

    def want_key(self) -> None:
        """The peer cannot go on without a key frame."""
        self._wants_key = True

    def pictures(self, at: int, play: Play | None, *, keys_only: bool = False) -> Iterator[tuple[int, Picture]]:
        """Yield what is due in the slot that begins at `at`, with its time."""
        if play is not None and play.has_video:
            position = play.position_ticks
            for picture in play.pop_pictures(position + SLOT_TICKS):
                if position - picture.pts > LATE_TICKS:
                    self._leave_out(play)
                    continue
                if self._passes(play, picture, keys_only):
                    yield at + max(0, picture.pts - position), picture
                if self._showing is play:
                    self._play_at = at
            if self._showing is play and at - self._play_at < HOLD_TICKS:
                return
        if self._idle:
            yield from self._idle_pictures(at, keys_only)

    def _idle_pictures(self, at: int, keys_only: bool) -> Iterator[tuple[int, Picture]]:
        if self._showing is not self or (self._wants_key and at - self._restarted_at >= RESTART_TICKS):
            self._idle_began, self._idle_next, self._restarted_at = at, 0, at
        while True:
            if self._idle_next == len(self._idle):
                self._idle_began, self._idle_next = self._idle_began + self._idle_ticks, 0
            picture = self._idle[self._idle_next]
            due = self._idle_began + picture.pts
            if due >= at + SLOT_TICKS:
                return
            self._idle_next += 1
            if self._passes(self, picture, keys_only):
                yield max(at, due), picture

    def _passes(self, source: object, picture: Picture, keys_only: bool) -> bool:
        self.due_bytes += len(picture.data)
        if picture.key:
            self._showing, self._whole, self._wants_key = source, True, False
        elif keys_only or self._showing is not source or not self._whole:
            self._leave_out(source)
            return False
        self.shown += 1
        return True

    def _leave_out(self, source: object) -> None:
        self.dropped += 1
        if self._showing is source:
            self._whole = False
