"""The protocol of the VoxCPM server: `/tts` on the main port (docs/gpu-server-compat.md).

Each `tts_request` is one plain request of the space that speaks. JSON messages tell how far it is; its audio comes in
binary ones: AA 55, type, 0, and the lengths of what follows, a JSON object and 16-bit samples.
"""

import json
import secrets
import time
from typing import Any

import attrs
import trio
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.websockets import WebSocket

from protocol.wire.errors import ErrorCode
from protocol.wire.frames import Audio, Cancelled, Completed, Failed, Started
from protocol.wire.messages import Submit
from protocol.wire.structs import AudioFormat
from relayd.auth.tokens import Principal
from relayd.http.context import HttpContext, context_of
from relayd.http.errors import HttpError
from relayd.http.request_stream import RequestStream, hold_submission
from relayd.http.websocket_login import deny, principal_of_socket
from relayd.talk.dialects.json_messages import shown
from relayd.talk.dialects.json_socket import JsonSocket
from relayd.talk.dialects.tts_server_errors import Failure, Message, failure_of, invalid, parse
from relayd.talk.dialects.tts_server_params import faults_of, fitting

#: Its name in the metrics.
DIALECT = "tts_server"
#: The limits of that server, for each principal.
MAX_CONNECTIONS = 100
MAX_CONCURRENT = 10
MAX_QUEUED = 50
MAX_ID_CHARS = 256
#: Of a message with audio, and of what may wait before it, beside the audio.
OTHER_BYTES = 128 * 1024
#: Types of binary messages.
CHUNK, WHOLE = 0x01, 0x02
FULL = f"{MAX_CONCURRENT} requests run and {MAX_QUEUED} wait; try again later"


def routes() -> list[BaseRoute]:
    """Return the route; what it limits, it counts for itself."""
    return [WebSocketRoute("/tts", TtsServer().serve)]


def binary_message(kind: int, fields: Message, pcm: bytes) -> bytes:
    """Return a message with audio."""
    head = json.dumps(fields).encode()
    sizes = len(head).to_bytes(4, "big"), len(pcm).to_bytes(4, "big")
    return b"\xaa\x55" + bytes([kind, 0]) + sizes[0] + head + sizes[1] + pcm


@attrs.define(eq=False)
class Usage:
    """What the connections of one principal share."""

    running: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(MAX_CONCURRENT))
    connections: int = 0
    #: Requests that run or wait.
    requests: int = 0


@attrs.define(eq=False)
class TtsServer:
    """What all connections share."""

    #: By the names of the principals that are connected.
    usages: dict[str, Usage] = attrs.field(factory=dict)

    async def serve(self, websocket: WebSocket) -> None:
        """Serve one connection."""
        context = context_of(websocket)
        try:
            principal = principal_of_socket(websocket, websocket.query_params.get("token"))
            usage = self.usages.get(principal.name) or Usage()
            if usage.connections >= MAX_CONNECTIONS:
                raise HttpError(ErrorCode.RATE_LIMITED, f"{MAX_CONNECTIONS} are connected; try again later", status=503)
        except HttpError as refusal:
            await deny(websocket, refusal)
            return
        self.usages[principal.name] = usage
        usage.connections += 1
        try:
            with context.relay.stats.talk.connected(DIALECT):
                await websocket.accept()
                await Connection(usage, context, principal, JsonSocket(websocket)).run()
        finally:
            usage.connections -= 1
            if not usage.connections:
                del self.usages[principal.name]


@attrs.define(eq=False)
class Connection:
    """One connection; what it has asked for ends with it."""

    usage: Usage
    context: HttpContext
    principal: Principal
    socket: JsonSocket
    #: By the ids that the client has given to them.
    _requests: dict[str | None, trio.CancelScope] = attrs.field(factory=dict)

    async def run(self) -> None:
        """Serve it until it is closed."""
        async with trio.open_nursery() as nursery:
            async for data in self.socket.messages():
                request_id: Any = None
                try:
                    message = parse(data)
                    request_id = message.get("request_id")
                    await self._handle_message(message, request_id, nursery)
                except Failure as failure:
                    await self._fail(request_id, failure)
            nursery.cancel_scope.cancel()

    async def _fail(self, request_id: Any, failure: Failure) -> None:
        error = {"code": failure.code, "message": failure.message, "details": failure.details}
        await self.socket.send({"type": "error", "request_id": request_id, "error": error})

    async def _handle_message(self, message: Message, request_id: Any, nursery: trio.Nursery) -> None:
        kind = message.get("type")
        if kind == "ping":
            now = {"timestamp": message.get("timestamp", 0), "server_time": int(time.time())}
            await self.socket.send({"type": "pong"} | now)
            return
        if kind not in ("tts_request", "cancel"):
            raise Failure("UNKNOWN_MESSAGE_TYPE", f"Unknown message type: {shown(kind)}")
        if not (request_id is None or (isinstance(request_id, str) and len(request_id) <= MAX_ID_CHARS)):
            raise invalid({"request_id": f"must be a string of at most {MAX_ID_CHARS} characters"})
        if kind == "cancel":
            if (scope := self._requests.pop(request_id, None)) is not None:
                scope.cancel()
            await self._complete(request_id, {"cancelled": True})
            return
        params = message.get("params", {})
        if not isinstance(params, dict):
            raise invalid({"params": "must be an object"})
        if faults := faults_of(params):
            raise invalid(faults)
        if request_id in self._requests:
            raise invalid({"request_id": "is that of a request that runs"})
        if self.usage.requests >= MAX_CONCURRENT + MAX_QUEUED:
            raise Failure("RATE_LIMITED", FULL)
        scope = self._requests[request_id] = trio.CancelScope()
        self.usage.requests += 1
        nursery.start_soon(self._speak, request_id, params, scope)

    # -- one request

    async def _complete(self, request_id: str | None, result: Message) -> None:
        await self.socket.send({"type": "complete", "request_id": request_id, "result": result})

    async def _progress(self, request_id: str | None, state: str, progress: float, words: str) -> None:
        message = {"type": "progress", "request_id": request_id, "state": state, "progress": progress, "message": words}
        await self.socket.send(message)

    async def _speak(self, request_id: str | None, params: Message, scope: trio.CancelScope) -> None:
        try:
            with scope:
                await self._progress(request_id, "processing", 0.0, "Processing request")
                async with self.usage.running:
                    try:
                        result = await self._stream(request_id, params)
                    except HttpError as refusal:
                        raise failure_of(refusal) from None
                await self._complete(request_id, result)
        except Failure as failure:
            await self._fail(request_id, failure)
        finally:
            self.usage.requests -= 1
            if self._requests.get(request_id) is scope:
                del self._requests[request_id]

    async def _stream(self, request_id: str | None, params: Message) -> Message:
        config = self.context.relay.config
        space = self.context.relay.spaces.get(config.talk.speech) if config.talk else None
        if space is None:
            raise Failure("MODEL_NOT_LOADED", "no space speaks here; its owner can name one: [talk] speech")
        fit = fitting(params, space.params.get("properties", {}))
        submit = Submit(request_id=secrets.token_hex(16), space=space.name, params=fit)
        whole = bytearray() if params.get("mode") == "non_streaming" else None
        async with hold_submission(self.context, self.principal, submit) as held:
            made, chunks, size = await self._send_audio(request_id, held, whole)
        if made is None:
            raise Failure("GENERATION_FAILED", f"space {space.name!r} has made no audio")
        samples = size // made.sample_bytes
        figures = {"duration": samples / made.sample_rate, "sample_rate": made.sample_rate}
        if whole is not None:
            await self._progress(request_id, "encoding", 0.9, "Encoding audio...")
            named = {"request_id": request_id, "sample_rate": made.sample_rate, "duration": figures["duration"]}
            await self.socket.send_bytes(binary_message(WHOLE, named, bytes(whole)))
        return figures | {"samples": samples, "chunks": 1 if whole is not None else chunks}

    async def _send_audio(
        self, request_id: str | None, held: RequestStream, whole: bytearray | None
    ) -> tuple[AudioFormat | None, int, int]:
        """Send audio as it comes, or collect it in `whole`; returns its format, and how many pieces and bytes."""
        made: AudioFormat | None = None
        chunks = size = 0
        most = self.context.relay.config.limits.max_backlog_bytes - OTHER_BYTES
        async for event in held:
            match event:
                case Started(format=told_format) if not size:
                    made = told_format
                    await self._progress(request_id, "generating", 0.1 if whole is None else 0.5, "Generating audio...")
                case Audio(pcm=pcm) if made is not None:
                    size += len(pcm)
                    if whole is None:
                        fields = {"sequence": chunks, "sample_rate": made.sample_rate, "is_final": False}
                        await self.socket.send_bytes(binary_message(CHUNK, {"request_id": request_id} | fields, pcm))
                        chunks += 1
                    elif size > most:
                        raise Failure("GENERATION_FAILED", "the audio is too long for one message; use mode streaming")
                    else:
                        whole += pcm
                case Failed() | Cancelled():
                    raise HttpError.of(event)
                case Completed():
                    break
        return made, chunks, size
