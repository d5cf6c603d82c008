"""`POST /v1/audio/transcriptions`: writes down what is said in a file, as it is recognized or in one piece."""

import json
import secrets

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from protocol.wire.errors import ErrorCode
from protocol.wire.media_types import accepts, recognize
from protocol.wire.messages import Submit
from protocol.wire.structs import InputInfo
from protocol.wire.validators import Value
from relayd.core.space import Space
from relayd.http.authentication import principal_of
from relayd.http.body_parser import Upload, open_uploads
from relayd.http.context import context_of
from relayd.http.errors import HttpError
from relayd.http.openai.errors import error_body, forbid_retry
from relayd.http.openai.json_body import invalid
from relayd.http.openai.models import space_of
from relayd.http.openai.names import TRANSCRIPTION
from relayd.http.openai.transcription_request import AUDIO, Transcript, Transcription, parse_transcription, transcribes
from relayd.http.openai.waiting import begun, refuse_to_wait, wait_for_worker
from relayd.http.request_stream import RequestStream, cache_header, open_submission
from relayd.http.streaming_response import ResponseWriter
from relayd.http.text_stream import TextStream, open_text

FILE = "file"


async def transcribe(request: Request, reply: ResponseWriter) -> None:
    """Write down what is said in `file`, with a `model`, which is a space."""
    try:
        await _transcribe(request, reply)
    except HttpError as refusal:
        refusal.details = {
            FILE if name == f"inputs.{AUDIO}" else name.removeprefix("params."): what
            for name, what in refusal.details.items()
        }
        if refusal.status == 422:
            refusal.status = 400  # as OpenAI has it
        forbid_retry(refusal)
        raise


async def _transcribe(request: Request, reply: ResponseWriter) -> None:
    context, principal = context_of(request), principal_of(request)
    limits = context.relay.config.limits
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        message = "send multipart/form-data, with the fields file and model"
        raise HttpError("unsupported_media_type", message, status=415)

    def cap(name: str, _media_type: str) -> int:
        if name != FILE:
            raise invalid({name: "is not a file of this API; send file"}, status=400)
        return limits.max_input_bytes

    with open_uploads(request) as uploads:
        body = await uploads.read(cap)
        asked = parse_transcription(body.fields)
        space = space_of(context, principal, asked.model, TRANSCRIPTION)
        if (upload := body.uploads.get(FILE)) is None:
            raise invalid({FILE: "is required: the sound, as a file of the form"}, status=400)
        await wait_for_worker(context, space)
        if not transcribes(space):
            what = f"is space {space.name!r}, which does not write down what it hears (GET /v1/models)"
            raise invalid({"model": what}, status=400)
        media_type = _media_type(upload, space)
        info = InputInfo(media_type=media_type, size=len(upload.data), sha256=upload.sha256)
        submit = Submit(
            request_id=secrets.token_hex(16),
            space=space.name,
            params=asked.params_of(space),
            inputs={AUDIO: info},
            queue_timeout_s=max(0.001, min(space.config.queue_timeout_s, context.relay.config.http.max_wait_s)),
        )
        inputs = {AUDIO: upload.data}
        body.uploads.clear()
        del upload
    async with open_submission(request, submit, inputs) as held:
        inputs.clear()  # the relay has its own copy
        refuse_to_wait(held, context.relay.config.http.max_wait_s)
        text = await begun(held, open_text, context.relay.config.http.no_worker_wait_s)
        await _answer(asked, text, held, reply)


def _media_type(upload: Upload, space: Space) -> str:
    """What the file is, by its first bytes or by its client's word.

    Raises:
        HttpError: the space does not read that.
    """
    media_type, rule = recognize(upload.data) or upload.media_type, space.inputs.get(AUDIO)
    if rule is not None and not accepts(rule.media_types, media_type):
        what = f"is {media_type}, and model {space.name!r} reads {', '.join(rule.media_types)}; convert it"
        raise HttpError(ErrorCode.INVALID_PARAMS, f"{FILE} {what}", status=400, details={FILE: what})
    return media_type


async def _answer(asked: Transcription, text: TextStream, held: RequestStream, reply: ResponseWriter) -> None:
    transcript, most = Transcript(), held.relay.config.limits.max_result_bytes
    text.on_object = transcript.note
    headers = {"x-request-id": held.request.request_id, "x-relay-space": held.request.submit.space}
    headers |= cache_header(held.request)
    size = 0
    try:
        while (piece := await text.next()) is not None:
            size += len(piece)
            if size > most:
                raise HttpError(ErrorCode.RESULT_TOO_LARGE, f"the transcript is larger than {most} characters")
            delta = piece if transcript.pieces else piece.lstrip()
            transcript.add(delta)
            if asked.stream and delta:
                await _event(reply, headers, {"type": "transcript.text.delta", "delta": delta})
    except HttpError as refusal:
        if reply.started:
            await _event(reply, headers, {"type": "error", **error_body(refusal)})
        raise
    transcript.ending = text.ending
    if asked.stream:
        done = {"type": "transcript.text.done", "text": transcript.text, "usage": transcript.usage_json()}
        await _event(reply, headers, done)
        return
    body, media_type = transcript.in_format(asked.response_format)
    if media_type == "application/json":
        await reply.answer(JSONResponse(body, headers=headers))
    else:
        await reply.answer(Response(body, media_type=media_type, headers=headers))


async def _event(reply: ResponseWriter, headers: dict[str, str], event: dict[str, Value]) -> None:
    if not reply.started:
        await reply.start("text/event-stream; charset=utf-8", headers=headers | {"x-accel-buffering": "no"})
    await reply.write(b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n")
