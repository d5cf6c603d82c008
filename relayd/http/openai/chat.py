"""`POST /v1/chat/completions`: a reply of a language space, as it is written or in one piece.

The head is sent with the first text, so that earlier errors have their own status; or after `COMMENT_S` of silence of
an engine that has begun, as proxies close silent connections. A later error is an event, and the connection is reset.
"""

import hashlib
import json
import secrets
import time

import trio
from starlette.requests import Request
from starlette.responses import JSONResponse

from protocol.wire.codec import encode
from protocol.wire.errors import EncodeError, ErrorCode
from protocol.wire.messages import Submit
from protocol.wire.structs import InputInfo
from protocol.wire.validators import Value
from relayd.auth.tokens import Principal
from relayd.core.space import Space
from relayd.http.authentication import principal_of
from relayd.http.body_parser import open_uploads, read_all
from relayd.http.context import HttpContext, context_of
from relayd.http.errors import HttpError
from relayd.http.openai.chat_request import JSON, MAX_BODY_BYTES, Asked, ChatRequest, asked_of, parse_chat, usage_json
from relayd.http.openai.errors import error_body, forbid_retry
from relayd.http.openai.models import space_of
from relayd.http.openai.names import LANGUAGE
from relayd.http.openai.waiting import begun, refuse_to_wait, wait_for_worker
from relayd.http.request_stream import RequestStream, cache_header, open_submission
from relayd.http.streaming_response import ResponseWriter
from relayd.http.text_stream import TextStream, open_text

#: Between two comments in a stream without text.
COMMENT_S = 15.0
EVENTS = "text/event-stream; charset=utf-8"


async def complete(request: Request, reply: ResponseWriter) -> None:
    """Reply to `messages` with a `model`, which is a space."""
    try:
        await _complete(request, reply)
    except HttpError as refusal:
        if refusal.status == 422:
            refusal.status = 400  # as OpenAI has it
        forbid_retry(refusal)
        raise


async def _complete(request: Request, reply: ResponseWriter) -> None:
    context, principal = context_of(request), principal_of(request)
    limits = context.relay.config.http
    with open_uploads(request) as uploads:
        chat = parse_chat(await read_all(request, MAX_BODY_BYTES, uploads.count))
        space = space_of(context, principal, chat.model, LANGUAGE)
        if not _is_answered(context, principal, space, chat):
            await wait_for_worker(context, space)
        asked, submit = _asked(context, space, chat)
    async with open_submission(request, submit, asked.inputs) as held:
        asked.inputs.clear()  # the relay has its own copy, and a reply may take minutes
        refuse_to_wait(held, limits.max_wait_s)
        text = await begun(held, open_text, limits.no_worker_wait_s)
        answer = _Answer(chat, held, asked)
        await (answer.stream(text, reply) if chat.stream else answer.send(text, reply))


def _asked(context: HttpContext, space: Space, chat: ChatRequest) -> tuple[Asked, Submit]:
    """Convert a request to what the space is asked, as far as is known what it accepts.

    Raises:
        HttpError: the space does not accept it.
    """
    asked = asked_of(chat, space)
    submit = Submit(
        request_id=secrets.token_hex(16),
        space=space.name,
        params=asked.params,
        inputs={
            name: InputInfo(media_type=JSON, size=len(data), sha256=hashlib.sha256(data).hexdigest())
            for name, data in asked.inputs.items()
        },
        queue_timeout_s=max(0.001, min(space.config.queue_timeout_s, context.relay.config.http.max_wait_s)),
        cache=chat.cache,
    )
    try:
        encode(submit)
    except EncodeError as fault:
        raise HttpError(ErrorCode.INVALID_PARAMS, fault.describe_in("params")) from None
    return asked, submit


def _is_answered(context: HttpContext, principal: Principal, space: Space, chat: ChatRequest) -> bool:
    """Whether an equal result is kept, asked for as the space's last worker accepts it: no worker is needed then."""
    if context.relay.workers.serving(space.name):
        return False  # who serves decides
    try:
        _, submit = _asked(context, space, chat)
    except HttpError:  # the next worker may accept it
        return False
    return context.admission.has_answer(submit, principal)


class _Answer:
    """Sends the reply in the way the client asked for."""

    def __init__(self, chat: ChatRequest, held: RequestStream, asked: Asked) -> None:
        self._chat = chat
        self._max_bytes = held.relay.config.limits.max_result_bytes
        request = held.request
        self._common: dict[str, Value] = {
            "id": f"chatcmpl-{request.request_id}",
            "created": int(time.time()),
            "model": chat.model,
        }
        self._headers = {"x-request-id": request.request_id, "x-relay-space": request.submit.space}
        self._headers |= cache_header(request)
        if asked.passed_over:
            self._headers["x-relay-ignored"] = ", ".join(asked.passed_over)

    async def send(self, text: TextStream, reply: ResponseWriter) -> None:
        """Send the reply in one piece."""
        pieces, size = [], 0
        while (piece := await text.next()) is not None:
            pieces.append(piece)
            size += len(piece)
            if size > self._max_bytes:
                message = f"the reply is larger than {self._max_bytes} characters (limits.max_result_bytes)"
                raise HttpError(ErrorCode.RESULT_TOO_LARGE, message)
        said = {"role": "assistant", "content": "".join(pieces), "refusal": None}
        choice = {"index": 0, "message": said, "logprobs": None, "finish_reason": _reason(text)}
        usage = usage_json(text.ending.get("usage"))
        body = self._common | {"object": "chat.completion", "choices": [choice], "usage": usage}
        await reply.answer(JSONResponse(body, headers=self._headers))

    async def stream(self, text: TextStream, reply: ResponseWriter) -> None:
        """Send the reply as events, as it is written."""
        try:
            while (piece := await self._next(text, reply)) is not None:
                await self._delta(reply, {"content": piece})
        except HttpError as refusal:
            if reply.started:
                await reply.write(_event(error_body(refusal)))
            raise
        await self._delta(reply, {}, _reason(text))
        usage = usage_json(text.ending.get("usage"))
        if self._chat.include_usage and usage is not None:
            await reply.write(_event(self._chunk([]) | {"usage": usage}))
        await reply.write(b"data: [DONE]\n\n")

    async def _next(self, text: TextStream, reply: ResponseWriter) -> str | None:
        """Wait for more of the text, and send comments meanwhile."""
        while True:
            with trio.move_on_after(COMMENT_S):
                return await text.next()
            await self._start(reply)
            await reply.write(b":\n\n")

    async def _delta(self, reply: ResponseWriter, delta: dict[str, Value], finish_reason: str | None = None) -> None:
        await self._start(reply)
        await reply.write(_event(self._chunk([_choice(delta, finish_reason)])))

    async def _start(self, reply: ResponseWriter) -> None:
        if not reply.started:
            await reply.start(EVENTS, headers=self._headers | {"x-accel-buffering": "no"})
            await reply.write(_event(self._chunk([_choice({"role": "assistant", "content": ""}, None)])))

    def _chunk(self, choices: list[Value]) -> dict[str, Value]:
        chunk = self._common | {"object": "chat.completion.chunk", "choices": choices}
        return chunk | ({"usage": None} if self._chat.include_usage else {})


def _choice(delta: dict[str, Value], finish_reason: str | None) -> dict[str, Value]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _reason(text: TextStream) -> str:
    reason = text.ending.get("finish_reason")
    return reason if isinstance(reason, str) and reason else "stop"


def _event(event: dict[str, Value]) -> bytes:
    return b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
