"""`GET /v1/requests/{id}/events`: every frame as a server-sent event, resumable with `Last-Event-ID`."""

import re

import trio
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from protocol.wire.errors import ErrorCode
from protocol.wire.frames import Frame
from relayd.http.errors import HttpError
from relayd.http.json_encoding import error_json, format_sse, frame_json
from relayd.http.request_stream import RequestStream, find_request, open_reader
from relayd.http.streaming_response import ResponseWriter
from relayd.requests.request import Request

#: Interval of comments that keep an idle stream open: proxies close connections that are silent for a minute.
COMMENT_S = 15.0
#: Id of an event: `attempt.seq` of its frame.
_EVENT_ID = re.compile(r"([0-9]{1,7})\.([0-9]{1,10})")
MAX_ATTEMPT, MAX_SEQ = 1_000_000, 2**31
HEADERS = {"x-accel-buffering": "no"}


async def send_events(http: HttpRequest, reply: ResponseWriter) -> None:
    """Send a request's queue positions and frames until its end; with `Last-Event-ID`, those after that frame."""
    request = find_request(http, http.path_params["request_id"])
    attempt, seq = _last_event(http)
    if _has_all(request, attempt, seq):
        # After an empty stream, a browser's EventSource would reconnect forever; 204 stops it.
        await reply.answer(Response(status_code=204))
        return
    async with open_reader(http, request, attempt, seq) as held:
        await reply.start("text/event-stream; charset=utf-8", headers=HEADERS)
        if http.method == "HEAD":
            return
        try:
            while (data := await _next(held, attempt, seq)) is not None:
                await reply.write(data)
        except HttpError as refusal:
            await reply.write(format_sse("error", error_json(refusal)))


async def _next(held: RequestStream, attempt: int, seq: int) -> bytes | None:
    """Return the next event or a comment; empty for a frame that the client has, None at the end.

    After a restart, the relay receives all frames of a request from its worker again.
    """
    message = None
    with trio.move_on_after(COMMENT_S) as silence:
        message = await held.next_event()
    if silence.cancelled_caught:
        return b":\n\n"
    if message is None:
        return None
    if not isinstance(message, Frame):
        return format_sse(message.TYPE, frame_json(message))
    if message.attempt <= attempt and message.seq <= seq and not message.ENDS:
        return b""
    return format_sse(message.TYPE, frame_json(message), f"{message.attempt}.{message.seq}")


def _has_all(request: Request, attempt: int, seq: int) -> bool:
    log = request.log
    return log.ended and attempt == request.entry.attempt and seq == log.next_seq - 1


def _last_event(http: HttpRequest) -> tuple[int, int]:
    """Return attempt and seq of the last frame that the client has; 0 and -1 if it has none."""
    text = http.headers.get("last-event-id", "")
    if not text:
        return 0, -1
    match = _EVENT_ID.fullmatch(text)
    if match is None or int(match[1]) > MAX_ATTEMPT or int(match[2]) > MAX_SEQ:
        message = (
            "Last-Event-ID is not a valid id of this stream (attempt.seq); leave it out to start from the beginning"
        )
        raise HttpError(ErrorCode.INVALID_PARAMS, message)
    return int(match[1]), int(match[2])
