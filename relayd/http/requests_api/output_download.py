"""`GET /v1/requests/{id}/output/{n}`: one output of a request as the bytes it is, such as an image or a video."""

import json

import attrs
from starlette.requests import Request as HttpRequest

from protocol.wire.errors import ErrorCode
from protocol.wire.frames import Output
from protocol.wire.media_types import BINARY, essence, suffix_of
from relayd.http.errors import HttpError
from relayd.http.json_encoding import jsonable
from relayd.http.media_stream import next_frame
from relayd.http.request_stream import RequestStream, find_result, open_reader, wait_safe
from relayd.http.requests_api.audio_download import check_result, start_range
from relayd.http.streaming_response import ResponseWriter

#: What a browser may show by itself; anything else is only saved, because it could contain a script.
_SHOWN = ("image/", "audio/", "video/")
_SHOWN_ALSO = frozenset({"text/plain", "application/json"})
_NEVER_SHOWN = frozenset({"image/svg+xml"})
#: For a browser that shows it: it may show itself and nothing else, and is not of the relay's origin.
_POLICY = (
    "default-src 'none'; img-src 'self'; media-src 'self'; style-src 'unsafe-inline'; sandbox; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
#: Digits of the number of an output in a path.
MAX_DIGITS = 9


async def send_output(http: HttpRequest, reply: ResponseWriter) -> None:
    """Send an output, by its number from 0: bytes as they are, text as text, any other value as JSON.

    It is sent as it arrives; once the request has ended, with its length and range support.
    """
    number = _number(http.path_params.get("number", "0"))
    request = find_result(http, http.path_params["request_id"])
    await wait_safe(http, request)
    check_result(request)
    is_complete = request.log.is_complete
    async with open_reader(http, request) as held:
        output = await open_output(held, number)
        headers = {
            "content-disposition": _disposition(request.request_id, number, output.media_type),
            "content-security-policy": _POLICY,
        }
        if not is_complete:
            await reply.start(output.media_type, headers={"accept-ranges": "none", **headers})
            while http.method != "HEAD" and (data := await output.next()) is not None:
                await reply.write(data)
            return
        total = 0
        while (data := await output.next()) is not None:
            total += len(data)
    etag = f'"{request.request_id}.{request.created_unix:.0f}.output.{number}"'
    span = await start_range(http, reply, output.media_type, etag, total, headers)
    if span is None:
        return
    at = 0
    async with open_reader(http, request) as held:
        output = await open_output(held, number)
        while at < span.end and (data := await output.next()) is not None:
            await reply.write(span.cut(data, at))
            at += len(data)


@attrs.define(eq=False)
class OutputStream:
    """One output as it arrives, in one part or several; made by `open_output`.

    Attributes:
        media_type: what it is.
    """

    held: RequestStream
    media_type: str
    _part: Output | None
    _seq: int = -1
    _more: bool = False

    async def next(self) -> bytes | None:
        """Return the next part; None at the end.

        Raises:
            HttpError: the request failed or was cancelled, or a new attempt makes the output again.
        """
        part, self._part = self._part, None
        while part is None and self._more:
            frame = await next_frame(self.held)
            if frame is None or frame.ENDS:
                return None
            if frame.seq <= self._seq:
                message = "the worker was lost mid-stream, and the request was restarted; send it again"
                raise HttpError(ErrorCode.WORKER_LOST, message, retryable=True)
            part = frame if isinstance(frame, Output) and frame.mark is None else None
        if part is None:
            return None
        self._seq, self._more = part.seq, bool(part.more)
        return _encoded(part)


async def open_output(held: RequestStream, number: int) -> OutputStream:
    """Wait until an output arrives.

    Raises:
        HttpError: the request ended before that.
    """
    begins: list[int] = []  # seq of the first frame of each output so far
    continues = False
    while (frame := await next_frame(held)) is not None:
        while begins and begins[-1] >= frame.seq:  # a new attempt makes them again
            begins.pop()
            continues = False
        if isinstance(frame, Output) and frame.mark is None:
            if not continues:
                begins.append(frame.seq)
                if len(begins) > number:
                    return OutputStream(held, _media_type(frame), frame)
            continues = bool(frame.more)
    made = f"it made {len(begins)}, numbered from 0" if begins else "it made none; see its audio or its events"
    raise HttpError("no_output", f"request {held.request.request_id} has no output {number}: {made}", status=404)


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS):
        raise HttpError("not_found", f"an output has a number from 0, not {text[:32]!r}", status=404)
    return int(text)


def _media_type(output: Output) -> str:
    if output.media_type is not None:
        return output.media_type
    if isinstance(output.data, bytes):
        return BINARY
    return "text/plain; charset=utf-8" if isinstance(output.data, str) else "application/json"


def _encoded(output: Output) -> bytes:
    if isinstance(output.data, bytes):
        return output.data
    if isinstance(output.data, str):
        return output.data.encode()
    return json.dumps(jsonable(output.data), ensure_ascii=False, separators=(",", ":")).encode()


def _disposition(request_id: str, number: int, media_type: str) -> str:
    kind = essence(media_type)
    shown = kind in _SHOWN_ALSO or (kind.startswith(_SHOWN) and kind not in _NEVER_SHOWN)
    name = f"{request_id[:8]}-{number}{suffix_of(media_type)}"
    return f'{"inline" if shown else "attachment"}; filename="{name}"'
