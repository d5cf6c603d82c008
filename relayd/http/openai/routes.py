"""OpenAI's speech API: `POST /v1/audio/speech`, and the lists of models and voices.

A model is a space. A request enters the same queue as those of WebSocket clients, and the worker's audio is encoded and
sent as it arrives. The head is sent with the first bytes of audio; earlier errors have their own status. A later error
resets the connection, so that partial audio does not look complete.
"""

import base64
import json
import math
import secrets
from contextlib import aclosing

import structlog
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import Rejected, Submit
from protocol.wire.validators import Value
from relayd.auth.tokens import Principal
from relayd.core.access import find_space
from relayd.core.space import Space
from relayd.http.audio.encoder import PCM, AudioExtraMissing, with_sizes
from relayd.http.audio.threaded_encoder import Transcoder, check_coding, open_transcoder
from relayd.http.audio_stream import AudioStream, open_audio
from relayd.http.authentication import principal_of
from relayd.http.context import HttpContext, context_of
from relayd.http.errors import HttpError
from relayd.http.openai.speech_request import (
    DEFAULT_VOICE,
    MAX_BODY_BYTES,
    Speech,
    params_of,
    parse_speech,
    speaks,
    usage_of,
    voices_of,
)
from relayd.http.request_stream import RequestStream, open_submission
from relayd.http.streaming_response import ResponseWriter, StreamingRoute

log = structlog.get_logger("relayd.http")

#: Path prefixes of this API, which has its own error format.
PATHS = ("/v1/audio", "/v1/models")
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(refusal: HttpError) -> dict[str, Value]:
    """Return the body of an error in OpenAI's format; `param` is the first invalid field of the body."""
    kind = "invalid_request_error" if refusal.status < 500 else "server_error"
    field = next(iter(refusal.details), None) if refusal.status == 422 else None
    if field in ("text", ""):  # a fault in a param of the space; names differ from OpenAI's
        field = "input" if field else None
    error = {"message": refusal.message, "type": _KINDS.get(refusal.status, kind), "param": field, "code": refusal.code}
    return {"error": error}


def routes() -> list[BaseRoute]:
    """Return the routes of this API."""
    return [
        Route("/v1/audio/speech", StreamingRoute(speak), methods=["POST"]),
        Route("/v1/audio/models", list_audio_models),
        Route("/v1/audio/voices", list_voices),
        Route("/v1/models", list_models),
        Route("/v1/models/{model}", show_model),
    ]


# -- speech -------------------------------------------------------------------------------------------------------


async def speak(request: Request, reply: ResponseWriter) -> None:
    """Speak the text in `input` with a `voice` of a `model`, which is a space."""
    context, principal = context_of(request), principal_of(request)
    speech = parse_speech(await _body(request))
    space = _space(context, principal, speech.space)
    params = params_of(speech, space)
    try:
        await check_coding(speech.coding.name, speech.speed, space.format or PCM)
        submit = Submit(
            request_id=secrets.token_hex(16),
            space=space.name,
            params=params,
            queue_timeout_s=max(0.001, min(space.config.queue_timeout_s, context.relay.config.http.max_wait_s)),
        )
        async with open_submission(request, submit) as held:
            _refuse_to_wait(held, context.relay.config.http.max_wait_s)
            await _send(speech, await open_audio(held), reply)
    except AudioExtraMissing as fault:
        raise HttpError("format_unavailable", str(fault), status=422, details={"response_format": str(fault)}) from None


async def _body(request: Request) -> bytes:
    body = bytearray()
    async with aclosing(request.stream()) as pieces:
        async for piece in pieces:
            body += piece
            if len(body) > MAX_BODY_BYTES:
                raise HttpError(ErrorCode.INPUT_TOO_LARGE, f"the body has more than {MAX_BODY_BYTES} bytes")
    return bytes(body)


def _space(context: HttpContext, principal: Principal, name: str) -> Space:
    """Return the space named by a client as a model.

    Raises:
        HttpError: 403 for a name that the token may not use, whether or not the space exists; 404 for other unknown
            names.
    """
    space = find_space(context.relay, principal, name)
    if isinstance(space, Rejected):
        raise HttpError.of(space)
    return space


def _refuse_to_wait(held: RequestStream, max_wait_s: float) -> None:
    """Refuse a long wait: HTTP clients do not see their position, and many give up after a minute.

    Raises:
        HttpError: 429; the request would wait longer than `http.max_wait_s`.
    """
    place = held.place()
    if place is not None and place.eta_s is not None and place.eta_s > max_wait_s:
        message = (
            f"{place.of} requests are queued; this one would start in about {place.eta_s:.0f} s, and the relay lets "
            f"HTTP clients wait {max_wait_s:g} s (http.max_wait_s)"
        )
        raise HttpError(ErrorCode.QUEUE_FULL, message, retry_after_s=math.ceil(place.eta_s - max_wait_s))


async def _send(speech: Speech, audio: AudioStream, reply: ResponseWriter) -> None:
    """Encode the audio, and send it in the way the client asked for.

    Raises:
        HttpError: the request failed.
        AudioExtraMissing: the coding needs packages that are not installed, given the format of the worker's audio.
    """
    held = audio.held
    if speech.whole:
        send: _Bytes = _Whole(speech, reply, held.relay.config.limits.max_result_bytes)
    else:
        send = _Events(speech, reply) if speech.sse else _Bytes(speech, reply)
    send.headers = {"x-request-id": held.request.request_id}
    transcoder: Transcoder | None = None
    try:
        while (pcm := await audio.next()) is not None:
            if transcoder is None:
                transcoder = await open_transcoder(speech.coding.name, audio.format, speech.speed)
            await send.audio(await transcoder.feed(pcm))
        if transcoder is None:
            transcoder = await open_transcoder(speech.coding.name, audio.format, speech.speed)
        await send.audio(await transcoder.finish())
        await send.end(transcoder)
    except HttpError as refusal:
        if reply.started:
            await send.failed(refusal)
        raise


class _Bytes:
    """Sends the bare audio as it arrives."""

    def __init__(self, speech: Speech, reply: ResponseWriter) -> None:
        self.speech = speech
        self.reply = reply
        self.headers: dict[str, str] = {}

    @property
    def media_type(self) -> str:
        return self.speech.coding.content_type

    async def audio(self, data: bytes) -> None:
        """Send encoded audio; the head is sent with the first of it."""
        if data:
            await self._start()
            await self.reply.write(data)

    async def end(self, transcoder: Transcoder) -> None:
        """Finish the response."""
        await self._start()

    async def failed(self, refusal: HttpError) -> None:
        """Report an error after the head was sent, before the connection is reset."""

    async def _start(self) -> None:
        if not self.reply.started:
            # Keeps nginx and proxies like it from buffering the response, which would defeat streaming.
            more = {"x-accel-buffering": "no"}
            await self.reply.start(self.media_type, headers=self.headers | more)


class _Events(_Bytes):
    """Sends server-sent events: `speech.audio.delta` for every piece, `speech.audio.done` at the end."""

    @property
    def media_type(self) -> str:
        return "text/event-stream"

    async def audio(self, data: bytes) -> None:
        """Send encoded audio as one event."""
        if data:
            await self._event({"type": "speech.audio.delta", "audio": base64.b64encode(data).decode("ascii")})

    async def end(self, transcoder: Transcoder) -> None:
        """Send the usage."""
        usage = usage_of(self.speech, transcoder.encoder.fed_s)
        await self._event({"type": "speech.audio.done", "usage": usage})

    async def failed(self, refusal: HttpError) -> None:
        """Send an error event, which OpenAI's clients raise."""
        await self._event({"type": "error", **error_body(refusal)})

    async def _event(self, event: dict[str, Value]) -> None:
        await self._start()
        await self.reply.write(b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n")


class _Whole(_Bytes):
    """Sends the audio in one piece, with its length in the head."""

    def __init__(self, speech: Speech, reply: ResponseWriter, max_bytes: int) -> None:
        super().__init__(speech, reply)
        self._body = bytearray()
        self._max_bytes = max_bytes

    async def audio(self, data: bytes) -> None:
        """Collect encoded audio."""
        self._body += data
        if len(self._body) > self._max_bytes:
            message = (
                f"the audio is larger than {self._max_bytes} bytes (limits.max_result_bytes); leave out stream: false"
            )
            raise HttpError(ErrorCode.RESULT_TOO_LARGE, message)

    async def end(self, transcoder: Transcoder) -> None:
        """Send the complete audio."""
        body = with_sizes(self.speech.coding.name, transcoder.encoder.source, bytes(self._body))
        await self.reply.answer(Response(body, media_type=self.media_type, headers=self.headers))


# -- models and voices --------------------------------------------------------------------------------------------


async def list_models(request: Request) -> Response:
    """List the spaces that speak, as models."""
    return JSONResponse({"object": "list", "data": [_model(space) for space in _speaking(request)]})


async def show_model(request: Request) -> Response:
    """Return one model."""
    space = _space(context_of(request), principal_of(request), request.path_params["model"])
    return JSONResponse(_model(space))


async def list_audio_models(request: Request) -> Response:
    """List the models in Open WebUI's format."""
    rows = [{"id": space.name, "name": space.config.description or space.name} for space in _speaking(request)]
    return JSONResponse({"models": rows})


async def list_voices(request: Request) -> Response:
    """List the voices of the space in `?model=`, or of all spaces that speak."""
    name = request.query_params.get("model")
    spaces = [_space(context_of(request), principal_of(request), name)] if name else _speaking(request)
    models_by_voice: dict[str, list[str]] = {}
    for space in spaces:
        for voice in dict.fromkeys((DEFAULT_VOICE, *(voices_of(space) or ()))):
            models_by_voice.setdefault(voice, []).append(space.name)
    return JSONResponse(
        {"voices": [{"id": voice, "name": voice, "models": models} for voice, models in models_by_voice.items()]}
    )


def _speaking(request: Request) -> list[Space]:
    """Return the spaces that speak and that the principal may use, sorted by name."""
    principal = principal_of(request)
    spaces = sorted(context_of(request).relay.spaces.values(), key=lambda space: space.name)
    return [space for space in spaces if principal.may_use(space.name) and speaks(space)]


def _model(space: Space) -> dict[str, Value]:
    return {"id": space.name, "object": "model", "created": int(space.created_at), "owned_by": "relayd"}
