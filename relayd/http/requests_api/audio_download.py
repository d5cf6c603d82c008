"""`GET /v1/requests/{id}/audio`: the audio of a request, live while it runs, with range support once it has ended."""

import re
from collections.abc import Mapping
from functools import partial

import attrs
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from protocol.audio.encoder import CODINGS, AudioExtraMissing
from protocol.commands.wav_writer import HEADER_BYTES, MAX_DATA_BYTES, wav_header
from protocol.wire.errors import ErrorCode
from protocol.wire.structs import AudioFormat
from relayd.http.audio.threaded_encoder import check_coding, open_transcoder
from relayd.http.authentication import principal_of
from relayd.http.context import context_of
from relayd.http.errors import CANCELLED, HttpError
from relayd.http.media_stream import AudioStream, open_audio
from relayd.http.request_stream import find_result, open_reader, wait_safe
from relayd.http.streaming_response import ResponseWriter
from relayd.requests.request import Request
from relayd.scheduling.model import State

#: Most bytes of encoded audio that are copied at a time.
PIECE_BYTES = 256 * 1024
_RANGE = re.compile(r"bytes=([0-9]{0,15})-([0-9]{0,15})")


async def send_audio(http: HttpRequest, reply: ResponseWriter) -> None:
    """Send the audio in the coding given by `format`; `wav` (the default) and `pcm` keep the worker's format."""
    request = find_result(http, http.path_params["request_id"])
    name = http.query_params.get("format", "wav")
    if name not in CODINGS:
        raise HttpError(ErrorCode.INVALID_PARAMS, f"format must be one of {', '.join(CODINGS)}, not {name[:32]!r}")
    await wait_safe(http, request)
    check_result(request)
    if name not in ("wav", "pcm"):
        await _check_available(name)
        await (_send_whole_encoded if request.log.is_complete else _send_encoded)(http, reply, request, name)
    elif request.log.is_complete:
        await _send_whole(http, reply, request, name)
    else:
        await _send_live(http, reply, request, name)


def check_result(request: Request) -> None:
    """Check that a request has a result, or may still have one.

    Raises:
        HttpError: it has failed, or was cancelled.
    """
    match request.entry.state:
        case State.FAILED:
            raise HttpError(
                request.code or ErrorCode.INTERNAL,
                request.message or "the request failed",
                details=request.details,
                retryable=request.outcome.retryable,
            )
        case State.CANCELLED:
            raise HttpError(CANCELLED, request.message or "the request was cancelled")


# -- running requests ---------------------------------------------------------------------------------------------


async def _send_live(http: HttpRequest, reply: ResponseWriter, request: Request, name: str) -> None:
    async with open_reader(http, request) as held:
        audio = await open_audio(held)
        pcm = await audio.next()  # before any audio, a new attempt may have another format
        await reply.start(_content_type(name, audio.format), headers={"accept-ranges": "none"})
        if http.method == "HEAD":
            return
        if name == "wav":
            data_bytes = MAX_DATA_BYTES - MAX_DATA_BYTES % audio.format.sample_bytes  # the length is unknown
            await reply.write(wav_header(audio.format, data_bytes))
        while pcm is not None:
            await reply.write(pcm)
            pcm = await audio.next()


async def _check_available(name: str) -> None:
    try:
        await check_coding(name)
    except AudioExtraMissing as fault:
        raise HttpError("not_implemented", str(fault), status=501) from None


async def _send_encoded(http: HttpRequest, reply: ResponseWriter, request: Request, name: str) -> None:
    async with open_reader(http, request) as held:
        audio = await open_audio(held)
        pcm = await audio.next()
        transcoder = await open_transcoder(name, audio.format)
        await reply.start(CODINGS[name].content_type, headers={"accept-ranges": "none"})
        if http.method == "HEAD":
            return
        while pcm is not None:
            await reply.write(await transcoder.feed(pcm))
            pcm = await audio.next()
        await reply.write(await transcoder.finish())


def _content_type(name: str, audio_format: AudioFormat) -> str:
    if name == "wav":
        return "audio/wav"
    return f"audio/pcm; rate={audio_format.sample_rate}; channels={audio_format.channels}"


# -- ended requests -----------------------------------------------------------------------------------------------


@attrs.frozen
class ByteRange:
    """The bytes of a body from `first` to `end` (exclusive); `part` if a client requested a range."""

    first: int
    end: int
    part: bool = False

    def cut(self, data: bytes, at: int) -> bytes:
        """Return the part of `data` in the range; `data` starts at byte `at` of the body."""
        return data[max(0, self.first - at) : max(0, self.end - at)]


async def _send_whole(http: HttpRequest, reply: ResponseWriter, request: Request, name: str) -> None:
    async with open_reader(http, request) as held:
        audio = await open_audio(held)
        data_bytes = await _size_of(audio)
    head = wav_header(audio.format, data_bytes) if name == "wav" else b""
    total = len(head) + data_bytes
    etag = f'"{request.request_id}.{request.created_unix:.0f}.{name}"'
    if (span := await start_range(http, reply, _content_type(name, audio.format), etag, total)) is None:
        return
    at = len(head)
    await reply.write(span.cut(head, 0))
    async with open_reader(http, request) as held:
        audio = await open_audio(held)
        while at < span.end and (pcm := await audio.next()) is not None:
            await reply.write(span.cut(pcm, at))
            at += len(pcm)


async def _send_whole_encoded(http: HttpRequest, reply: ResponseWriter, request: Request, name: str) -> None:
    encode = partial(_encode, http, request, name)
    async with context_of(http).encoded.open(principal_of(http).name, request, name, encode) as audio:
        span = await start_range(http, reply, CODINGS[name].content_type, audio.etag, len(audio.body))
        if span is not None:
            for at in range(span.first, span.end, PIECE_BYTES):
                await reply.write(audio.body[at : min(at + PIECE_BYTES, span.end)])


async def _encode(http: HttpRequest, request: Request, name: str) -> bytes:
    body = bytearray()
    async with open_reader(http, request) as held:
        audio = await open_audio(held)
        pcm = await audio.next()
        transcoder = await open_transcoder(name, audio.format)
        transcoder.encoder.make_repeatable()
        while pcm is not None:
            body += await transcoder.feed(pcm)
            pcm = await audio.next()
        body += await transcoder.finish()
    return transcoder.encoder.with_sizes(body)


async def start_range(
    http: HttpRequest, reply: ResponseWriter, kind: str, etag: str, total: int, more: Mapping[str, str] | None = None
) -> ByteRange | None:
    """Send the head of a body of `total` bytes; returns the part of it to send, or None if none is to be sent."""
    headers = {"accept-ranges": "bytes", "etag": etag, **(more or {})}
    known = {each.strip().removeprefix("W/") for each in http.headers.get("if-none-match", "").split(",")}
    if known & {etag, "*"}:
        await reply.answer(Response(status_code=304, headers=headers))
        return None
    whole = http.method != "GET" or http.headers.get("if-range", etag) != etag  # RFC 9110 14.2: ranges are of GET
    span = ByteRange(0, total) if whole else span_of(http.headers.get("range", ""), total)
    if span is None:
        await reply.answer(Response(status_code=416, headers=headers | {"content-range": f"bytes */{total}"}))
        return None
    headers["content-length"] = str(span.end - span.first)
    if span.part:
        headers["content-range"] = f"bytes {span.first}-{span.end - 1}/{total}"
    await reply.start(kind, status=206 if span.part else 200, headers=headers)
    return None if http.method == "HEAD" else span


async def _size_of(audio: AudioStream) -> int:
    """Count the bytes of all samples; after a restart, the request's own count may be too low."""
    size = 0
    while (pcm := await audio.next()) is not None:
        size += len(pcm)
    return min(size, MAX_DATA_BYTES - HEADER_BYTES)


def span_of(header: str, total: int) -> ByteRange | None:
    """Parse a `Range` header (RFC 9110 section 14.2); None if the range cannot be satisfied.

    Other units, several ranges and invalid headers select the whole body.
    """
    match = _RANGE.fullmatch(header.replace(" ", ""))
    if match is None or match[0] == "bytes=-":
        return ByteRange(0, total)
    first, last = match.groups()
    if not first:
        begin, end = max(0, total - int(last)), total
    else:
        begin = int(first)
        end = min(total, int(last) + 1) if last else total
        if last and int(last) < begin:
            return ByteRange(0, total)
    return ByteRange(begin, end, part=True) if begin < end else None
