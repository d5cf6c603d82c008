"""A request of a turn: held while it runs, and its frames, read without waiting."""

from collections import deque
from collections.abc import Callable

import attrs

from protocol.wire.codec import decode
from protocol.wire.errors import ErrorCode
from protocol.wire.frames import Frame
from protocol.wire.messages import FRAMES, Rejected
from relayd.auth.tokens import Principal
from relayd.frames.frame_log import LOW_WATER_BYTES, FrameReader
from relayd.requests.request import Request
from relayd.scheduling.model import QueuePosition

#: Of the requests of conversations: ahead of batch jobs, which have 5.
PRIORITY = 3
LOST = "the relay cannot read the result from its disk; see its log, and say it again"


@attrs.define(eq=False)
class FrameQueue:
    """The frames of a request that were not taken yet: a sink that tells when there are more.

    Args:
        on_change: called when there is more to take, or an end; must not wait.
    """

    on_change: Callable[[], None]
    request: Request | None = None
    backlog_bytes: int = 0
    #: Why there are no more frames although it has not come to its last.
    refusal: Rejected | None = None
    _frames: deque[bytes] = attrs.field(factory=deque)
    _reader: FrameReader | None = None

    def open(self, request: Request) -> None:
        """Read the frames of a request, from the first on."""
        self.request = request
        if not request.has_result:
            message = f"request {request.request_id} has ended, and its result is no longer kept; say it again"
            self._refuse(Rejected.because(ErrorCode.REQUEST_NOT_FOUND, message))
            return
        self._reader = FrameReader(request.request_id, request.log, self)
        self._reader.open()

    def next_frame(self) -> Frame | None:
        """Return the next frame; None if there is none now."""
        if not self._frames:
            return None
        data = self._frames.popleft()
        self.backlog_bytes -= len(data)
        if self.backlog_bytes < LOW_WATER_BYTES and self._reader is not None:
            self._reader.pump()
        frame = decode(data, FRAMES)
        assert isinstance(frame, Frame)
        return frame

    @property
    def has_more(self) -> bool:
        """Whether there is something to take now."""
        return bool(self._frames)

    @property
    def is_read(self) -> bool:
        """Whether everything was taken that there will be."""
        return self.request is not None and self._reader is None and not self._frames

    def close(self) -> None:
        """Read no more."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        self._frames.clear()

    # -- as a sink

    def send_frames(self, frames: list[bytes], size: int) -> None:
        """Keep frames until they are taken."""
        self._frames.extend(frames)
        self.backlog_bytes += size
        self.on_change()

    def on_all_sent(self, reader: FrameReader) -> None:
        """The last frame is among those that were kept."""
        self._reader = None
        self.on_change()

    def on_read_error(self, reader: FrameReader) -> None:
        """The rest cannot be read."""
        self._reader = None
        self._refuse(Rejected.because(ErrorCode.INTERNAL, LOST))

    def _refuse(self, refusal: Rejected) -> None:
        self.refusal = refusal
        self.on_change()


@attrs.define(eq=False)
class HeldRequest(FrameQueue):
    """A request that is held as a connected client holds it."""

    def hold(self, request: Request) -> None:
        """Hold a request and read its frames."""
        if request.live:
            request.hold(self)
        self.open(request)

    @property
    def has_begun(self) -> bool:
        """Whether a worker has ever been given the request, or it has ended."""
        return self.request is None or not self.request.live or self.request.entry.attempt > 0

    def release(self, now: float) -> None:
        """Hold and read it no longer."""
        self.close()
        if self.request is not None:
            self.request.release(self, now)

    # -- as a holder

    def on_accepted(self, request: Request) -> None:
        """The request is stored."""
        self.on_change()

    def on_rejected(self, request: Request, refusal: Rejected) -> None:
        """The request was rejected after it was admitted."""
        self._refuse(refusal)

    def on_position(self, request: Request, position: QueuePosition) -> None:
        """It is queued, or its queue has moved."""
        self.on_change()

    def on_worker(self, request: Request) -> None:
        """Its worker is away, or back."""

    def on_input_stored(self, request: Request, name: str, *, again: bool = False) -> None:
        """More of the text is stored for its worker."""

    def on_ended(self, request: Request) -> None:
        """The request has ended."""
        self.on_change()


@attrs.define(eq=False)
class FedRequest(HeldRequest):
    """A request whose live input is fed by its holder."""

    principal: Principal = attrs.field(kw_only=True)

    def on_input_stored(self, request: Request, name: str, *, again: bool = False) -> None:
        """There is room for more."""
        self.on_change()
