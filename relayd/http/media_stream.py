"""The audio or the video of a held request: its format, then its bytes, each once and in order."""

from collections.abc import Callable
from typing import Generic, TypeVar

import attrs

from protocol.wire.errors import ErrorCode
from protocol.wire.frames import Audio, Cancelled, Completed, Failed, Frame, Started, Video
from protocol.wire.ivf import ivf_picture
from protocol.wire.structs import AudioFormat, VideoFormat
from relayd.http.errors import HttpError
from relayd.http.request_stream import RequestStream

FormatT = TypeVar("FormatT", AudioFormat, VideoFormat)


@attrs.frozen
class Medium(Generic[FormatT]):
    """Audio or video: its `name`, its format in a `started`, its bytes in another frame."""

    name: str
    format_of: Callable[[Started], FormatT | None]
    bytes_of: Callable[[Frame], bytes]

    def missing(self, held: RequestStream) -> HttpError:
        """The error for a request that produces none."""
        message = f"space {held.request.submit.space!r} produces no {self.name}; use the request's events instead"
        return HttpError(f"no_{self.name}", message, status=409)


AUDIO = Medium[AudioFormat](
    "audio", lambda started: started.format, lambda frame: frame.pcm if isinstance(frame, Audio) else b""
)
#: Its bytes are those of IVF, behind the header.
VIDEO = Medium[VideoFormat](
    "video",
    lambda started: started.video,
    lambda frame: ivf_picture(frame.data, frame.pts) if isinstance(frame, Video) else b"",
)


@attrs.define(eq=False)
class MediaStream(Generic[FormatT]):
    """The samples or pictures of a request as they arrive; made by `open_media`.

    Attributes:
        format: the format of what `next` returns.
        result: the result of the completed request; empty before.
    """

    held: RequestStream
    format: FormatT
    _medium: Medium[FormatT]
    #: `seq` of the next expected frame.
    _next_seq: int
    result: dict[str, object] = attrs.field(factory=dict)
    #: Whether anything was returned already.
    _delivered: bool = False

    async def next(self) -> bytes | None:
        """Return the next whole samples, or the next picture; None at the end of a completed request.

        Raises:
            HttpError: the request failed, was cancelled, or completed without any; or a new attempt of an engine that
                is not reproducible starts before what was already returned.
        """
        medium = self._medium
        while True:
            match frame := await next_frame(self.held):
                case None | Completed() if not self._delivered:
                    advice = "send another text or input, or ask the relay's operator"
                    message = f"the engine made no {medium.name} of this; {advice}"
                    raise HttpError(ErrorCode.ENGINE_FAILED, message, retryable=False)
                case None:
                    return None
                case Completed():
                    self.result = dict(frame.result)
                    return None
                case Started() if frame.seq >= self._next_seq or not self._delivered:
                    given = medium.format_of(frame)
                    if given is None or (self._delivered and given != self.format):
                        raise medium.missing(self.held)
                    self.format = given
            if self._delivered and frame.seq < self._next_seq:
                message = "the worker was lost mid-stream, and the request was restarted; send it again"
                raise HttpError(ErrorCode.WORKER_LOST, message, retryable=True)
            self._next_seq = frame.seq + 1
            if data := medium.bytes_of(frame):
                self._delivered = True
                return data


AudioStream = MediaStream[AudioFormat]


async def open_media(held: RequestStream, medium: Medium[FormatT]) -> MediaStream[FormatT]:
    """Wait until the engine starts.

    Raises:
        HttpError: the request ended before that, or produces none.
    """
    while (frame := await next_frame(held)) is not None:
        if isinstance(frame, Started):
            if (given := medium.format_of(frame)) is None:
                break
            return MediaStream(held, given, medium, frame.seq + 1)
        if isinstance(frame, Completed):
            break
    raise medium.missing(held)


async def open_audio(held: RequestStream) -> AudioStream:
    """Wait until the engine starts; see `open_media`."""
    return await open_media(held, AUDIO)


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
