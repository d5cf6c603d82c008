"""The audio of a held request: its format, then its samples, once each and in order."""

import attrs

from protocol.wire.errors import ErrorCode
from protocol.wire.frames import Audio, Cancelled, Completed, Failed, Frame, Started
from protocol.wire.messages import Queued
from protocol.wire.structs import AudioFormat
from relayd.http.errors import HttpError
from relayd.http.request_stream import RequestStream


@attrs.define(eq=False)
class AudioStream:
    """Samples of a request as they come; made by `listen`.

    Attributes:
        format: of what `next` gives.
        result: figures of the completed request; empty before its end.
    """

    held: RequestStream
    format: AudioFormat
    #: Number of the frame that is due.
    _due: int
    result: dict[str, object] = attrs.field(factory=dict)
    #: Whether samples were given out that nobody can take back.
    _heard: bool = False

    async def next(self) -> bytes | None:
        """The next whole samples; None at the end of a completed request.

        Raises:
            HttpError: it failed or was cancelled; or a new attempt of an engine that is not reproducible began anew
                behind samples that were given out.
        """
        while True:
            match frame := await _frame(self.held):
                case None:
                    return None
                case Completed():
                    self.result = dict(frame.result)
                    return None
                case Started() if frame.seq >= self._due or not self._heard:
                    if frame.format is None or (self._heard and frame.format != self.format):
                        raise _no_audio(self.held)
                    self.format = frame.format
            if self._heard and frame.seq < self._due:
                message = "the worker was lost in mid-stream, and another one began anew; send the request again"
                raise HttpError(ErrorCode.WORKER_LOST, message, retryable=True)
            self._due = frame.seq + 1
            if isinstance(frame, Audio) and frame.pcm:
                self._heard = True
                return frame.pcm


async def open_audio(held: RequestStream) -> AudioStream:
    """Wait until the engine has begun.

    Raises:
        HttpError: the request ended before, or makes no audio.
    """
    while (frame := await _frame(held)) is not None:
        if isinstance(frame, Started):
            if frame.format is None:
                break
            return AudioStream(held, frame.format, frame.seq + 1)
        if isinstance(frame, Completed):
            break
    raise _no_audio(held)


async def _frame(held: RequestStream) -> Frame | None:
    """The next frame, places passed over.

    Raises:
        HttpError: it is the end of a request that did not complete.
    """
    while True:
        event = await held.next_event()
        if isinstance(event, Failed | Cancelled):
            raise HttpError.of(event)
        if not isinstance(event, Queued):
            return event


def _no_audio(held: RequestStream) -> HttpError:
    message = f"space {held.request.submit.space!r} makes no audio; ask for the request's events"
    return HttpError("no_audio", message, status=409)
