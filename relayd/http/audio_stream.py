"""The audio of a held request: its format, then its samples, each once and in order."""

import attrs

from protocol.wire.errors import ErrorCode
from protocol.wire.frames import Audio, Cancelled, Completed, Failed, Frame, Started
from protocol.wire.structs import AudioFormat
from relayd.http.errors import HttpError
from relayd.http.request_stream import RequestStream


@attrs.define(eq=False)
class AudioStream:
    """The samples of a request as they arrive; made by `open_audio`.

    Attributes:
        format: the format of the samples that `next` returns.
        result: the result of the completed request; empty before.
    """

    held: RequestStream
    format: AudioFormat
    #: `seq` of the next expected frame.
    _next_seq: int
    result: dict[str, object] = attrs.field(factory=dict)
    #: Whether samples were returned already.
    _delivered: bool = False

    async def next(self) -> bytes | None:
        """Return the next whole samples; None at the end of a completed request.

        Raises:
            HttpError: the request failed, was cancelled, or completed without a single sample; or a new attempt of an
                engine that is not reproducible starts before samples that were already returned.
        """
        while True:
            match frame := await next_frame(self.held):
                case None | Completed() if not self._delivered:
                    message = "the engine made no audio of this; send another text, or ask the relay's operator"
                    raise HttpError(ErrorCode.ENGINE_FAILED, message, retryable=False)
                case None:
                    return None
                case Completed():
                    self.result = dict(frame.result)
                    return None
                case Started() if frame.seq >= self._next_seq or not self._delivered:
                    if frame.format is None or (self._delivered and frame.format != self.format):
                        raise _no_audio(self.held)
                    self.format = frame.format
            if self._delivered and frame.seq < self._next_seq:
                message = "the worker was lost mid-stream, and the request was restarted; send it again"
                raise HttpError(ErrorCode.WORKER_LOST, message, retryable=True)
            self._next_seq = frame.seq + 1
            if isinstance(frame, Audio) and frame.pcm:
                self._delivered = True
                return frame.pcm


async def open_audio(held: RequestStream) -> AudioStream:
    """Wait until the engine starts.

    Raises:
        HttpError: the request ended before that, or produces no audio.
    """
    while (frame := await next_frame(held)) is not None:
        if isinstance(frame, Started):
            if frame.format is None:
                break
            return AudioStream(held, frame.format, frame.seq + 1)
        if isinstance(frame, Completed):
            break
    raise _no_audio(held)


async def next_frame(held: RequestStream) -> Frame | None:
    """Return the next frame, skipping what is none; None after the last one.

    Raises:
        HttpError: the request failed or was cancelled.
    """
    while True:
        event = await held.next_event()
        if isinstance(event, Failed | Cancelled):
            raise HttpError.of(event)
        if event is None or isinstance(event, Frame):
            return event


def _no_audio(held: RequestStream) -> HttpError:
    message = f"space {held.request.submit.space!r} produces no audio; use the request's events instead"
    return HttpError("no_audio", message, status=409)
