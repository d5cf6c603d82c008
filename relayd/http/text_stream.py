"""The text of a held request: its strings, each once and in order, and how it ends."""

from collections.abc import Callable, Mapping

import attrs

from protocol.wire.errors import ErrorCode
from protocol.wire.frames import Completed, Output, Started
from protocol.wire.validators import Value
from relayd.http.errors import HttpError
from relayd.http.media_stream import next_frame
from relayd.http.request_stream import RequestStream


@attrs.define(eq=False)
class TextStream:
    """The text of a request as it is written; made by `open_text`.

    Attributes:
        ending: the object that the space puts out at the end, with `finish_reason` and `usage`; empty before, and if it
            puts out none.
        on_object: called with each other object that the space puts out.
    """

    held: RequestStream
    #: `seq` of the next expected frame.
    _next_seq: int
    ending: dict[str, Value] = attrs.field(factory=dict)
    on_object: Callable[[Mapping[str, Value]], None] = lambda _object: None
    #: Whether text was returned already.
    _delivered: bool = False

    async def next(self) -> str | None:
        """Return more of the text; None at the end of a completed request.

        Raises:
            HttpError: the request failed, was cancelled, or completed without any text or ending; or a new attempt of
                an engine that is not reproducible starts before text that was already returned.

        Cancellation: nothing is lost.
        """
        while True:
            frame = await next_frame(self.held)
            if frame is None or isinstance(frame, Completed):
                if not self._delivered and not self.ending:
                    message = "the engine made no text of this; ask something else, or ask the relay's operator"
                    raise HttpError(ErrorCode.ENGINE_FAILED, message, retryable=False)
                return None
            if self._delivered and frame.seq < self._next_seq:
                message = "the worker was lost mid-stream, and the request was restarted; send it again"
                raise HttpError(ErrorCode.WORKER_LOST, message, retryable=True)
            self._next_seq = frame.seq + 1
            if not isinstance(frame, Output) or frame.mark is not None:
                continue
            if isinstance(frame.data, dict) and "finish_reason" in frame.data:
                self.ending = frame.data
            elif isinstance(frame.data, dict):
                self.on_object(frame.data)
            elif isinstance(frame.data, str) and frame.data:
                self._delivered = True
                return frame.data


async def open_text(held: RequestStream) -> TextStream:
    """Wait until the engine starts.

    Raises:
        HttpError: the request ended before that.
    """
    while (frame := await next_frame(held)) is not None:
        if isinstance(frame, Started):
            return TextStream(held, frame.seq + 1)
        if isinstance(frame, Completed):
            break
    raise HttpError(ErrorCode.ENGINE_FAILED, "the engine made no text of this", retryable=False)
