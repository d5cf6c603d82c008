"""OpenAI's API: `POST /v1/audio/speech`, and the routes of chat and of the lists of models and voices.

A model is a space. A request enters the same queue as those of WebSocket clients, and the worker's audio is encoded and
sent as it arrives. The head is sent with the first bytes of audio; earlier errors have their own status. A later error
resets the connection, so that partial audio does not look complete.
"""

import base64
import hashlib
import json
import secrets
from urllib.parse import quote

import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from protocol.audio.encoder import PCM, AudioExtraMissing
from protocol.wire.errors import ErrorCode
from protocol.wire.messages import Submit
from protocol.wire.structs import InputInfo
from protocol.wire.validators import Value
from relayd.auth.tokens import Principal
from relayd.core.space import Space
from relayd.http.audio.encoded_results import EncodedAudio
from relayd.http.audio.threaded_encoder import Transcoder, check_coding, open_transcoder
from relayd.http.authentication import principal_of
from relayd.http.body_parser import open_uploads, read_all
from relayd.http.context import HttpContext, context_of
from relayd.http.errors import HttpError
from relayd.http.media_stream import AudioStream, open_audio
from relayd.http.openai.chat import complete
from relayd.http.openai.errors import error_body, forbid_retry
from relayd.http.openai.models import list_audio_models, list_models, list_voices, show_model, space_of
from relayd.http.openai.names import SPEECH, only_space
from relayd.http.openai.speech_request import (
    MAX_BODY_BYTES,
    SpaceParams,
    Speech,
    params_of,
    parse_speech,
    usage_of,
)
from relayd.http.openai.transcription import transcribe
from relayd.http.openai.waiting import begun, refuse_to_wait, wait_for_worker
from relayd.http.request_stream import RequestStream, cache_header, open_submission
from relayd.http.streaming_response import ResponseWriter, StreamingRoute

log = structlog.get_logger("relayd.http")

#: Path prefixes of this API, which has its own error format.
PATHS = ("/v1/audio", "/v1/chat", "/v1/models", "/v1/realtime")


def routes() -> list[BaseRoute]:
    """Return the routes of this API."""
    return [
        Route("/v1/audio/speech", StreamingRoute(speak), methods=["POST"]),
        Route("/v1/chat/completions", StreamingRoute(complete), methods=["POST"]),
        Route("/v1/audio/transcriptions", StreamingRoute(transcribe), methods=["POST"]),
        Route("/v1/audio/models", list_audio_models),
        Route("/v1/audio/voices", list_voices),
        Route("/v1/models", list_models),
        Route("/v1/models/{model:path}", show_model),
    ]


# -- speech -------------------------------------------------------------------------------------------------------


async def speak(request: Request, reply: ResponseWriter) -> None:
    """Speak the text in `input` with a `voice` of a `model`, which is a space."""
    try:
        await _speak(request, reply)
    except AudioExtraMissing as fault:
        raise HttpError("format_unavailable", str(fault), status=422, details={"response_format": str(fault)}) from None
    except HttpError as refusal:
        forbid_retry(refusal)
        raise


async def _speak(request: Request, reply: ResponseWriter) -> None:
    context, principal = context_of(request), principal_of(request)
    limits = context.relay.config.http
    with open_uploads(request) as uploads:
        speech = parse_speech(await read_all(request, MAX_BODY_BYTES, uploads.count))
        space = space_of(context, principal, speech.model, SPEECH)
        if not _is_answered(context, principal, space, speech):
            await wait_for_worker(context, space)
        asked, submit = _asked_of(context, principal, space, speech)
        if asked.replaced and space.name not in context.voices_replaced:
            context.voices_replaced.add(space.name)
            log.warning("voice is spoken with another", space=space.name, asked=speech.voice, voice=asked.voice)
        await check_coding(speech.coding.name, speech.speed, space.format or PCM)
        inputs = {name: data for name, (_, data) in asked.inputs.items()}
    try:
        async with open_submission(request, submit, inputs) as held:
            for sent in (speech.extra, asked.inputs, inputs):
                sent.clear()  # the relay has its own copy, and a response may take minutes
            refuse_to_wait(held, limits.max_wait_s)
            audio = await begun(held, open_audio, limits.no_worker_wait_s)
            await _send(speech, audio, reply, _headers(held, asked))
    except HttpError as refusal:
        refusal.details = {asked.field(name): what for name, what in refusal.details.items()}
        raise


def _asked_of(context: HttpContext, principal: Principal, space: Space, speech: Speech) -> tuple[SpaceParams, Submit]:
    """Convert a speech request to what the space is asked, as far as is known what it accepts.

    Raises:
        HttpError: 422; the space does not accept it.
    """
    names, only = context.relay.config.openai, only_space(SPEECH, context.relay.spaces.values(), principal)
    asked = params_of(speech, space, names, any_voice=not names.strict and only is space)
    submit = Submit(
        request_id=secrets.token_hex(16),
        space=space.name,
        params=asked.params,
        inputs={
            name: InputInfo(media_type=media_type, size=len(data), sha256=hashlib.sha256(data).hexdigest())
            for name, (media_type, data) in asked.inputs.items()
        },
        queue_timeout_s=max(0.001, min(space.config.queue_timeout_s, context.relay.config.http.max_wait_s)),
        cache=speech.cache,
    )
    return asked, submit


def _is_answered(context: HttpContext, principal: Principal, space: Space, speech: Speech) -> bool:
    """Whether an equal result is kept, asked for as the space's last worker accepts it: no worker is needed then."""
    if context.relay.workers.serving(space.name):
        return False  # who serves decides
    try:
        _, submit = _asked_of(context, principal, space, speech)
    except HttpError:  # the next worker may accept it
        return False
    return context.admission.has_answer(submit, principal)


def _headers(held: RequestStream, asked: SpaceParams) -> dict[str, str]:
    """The headers that describe the request. They are ASCII; other characters are percent-encoded as in a URL."""
    headers = {
        "x-request-id": held.request.request_id,
        "x-relay-space": held.request.submit.space,
        "x-relay-voice": quote(asked.voice, safe=" !#$&'()*+,/:;=?@[]"),
    }
    headers |= cache_header(held.request)
    return headers | ({"x-relay-ignored": ", ".join(asked.passed_over)} if asked.passed_over else {})


async def _send(speech: Speech, audio: AudioStream, reply: ResponseWriter, headers: dict[str, str]) -> None:
    """Encode the audio, and send it in the way the client asked for.

    Raises:
        HttpError: the request failed.
        AudioExtraMissing: the coding needs packages that are not installed, given the format of the worker's audio.
    """
    held = audio.held
    if speech.whole:
        send: _Bytes = _Whole(speech, reply, held)
    else:
        send = _Events(speech, reply) if speech.sse else _Bytes(speech, reply)
    send.headers = headers
    transcoder: Transcoder | None = None
    try:
        while (pcm := await audio.next()) is not None:
            if transcoder is None:
                transcoder = await open_transcoder(speech.coding.name, audio.format, speech.speed)
            await send.audio(await transcoder.feed(pcm))
        assert transcoder is not None  # what ends without audio has failed
        await send.audio(await transcoder.finish())
        await send.end(transcoder)
    except HttpError as refusal:
        if reply.started:
            await send.failed(refusal)
        raise
    finally:
        send.close()


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

    def close(self) -> None:
        """The response has ended."""

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

    def __init__(self, speech: Speech, reply: ResponseWriter, held: RequestStream) -> None:
        super().__init__(speech, reply)
        self._held = held
        self._body = bytearray()
        self._max_bytes = held.relay.config.limits.max_result_bytes

    async def audio(self, data: bytes) -> None:
        """Collect encoded audio."""
        self._body += data
        if len(self._body) > self._max_bytes:
            message = (
                f"the audio is larger than {self._max_bytes} bytes (limits.max_result_bytes); leave out stream: false"
            )
            raise HttpError(ErrorCode.RESULT_TOO_LARGE, message)
        self._held.context.encoded.collect(self._held.principal.name, self, len(self._body))

    def close(self) -> None:
        """See `_Bytes.close`."""
        self._held.context.encoded.collect(self._held.principal.name, self, 0)

    async def end(self, transcoder: Transcoder) -> None:
        """Send the complete audio."""
        body = transcoder.encoder.with_sizes(self._body)
        with self._held.context.encoded.sending(self._held.principal.name, EncodedAudio(body, "")):
            await self.reply.answer(Response(body, media_type=self.media_type, headers=self.headers))
