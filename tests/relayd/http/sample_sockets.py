"""WebSocket endpoints for tests, a daemon that serves them, and clients of them."""

import ssl
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from starlette.applications import Starlette
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect
from trio_websocket import ConnectionClosed, ConnectionRejected, WebSocketConnection, wrap_client_stream

from protocol.link.websocket_frames import Parser, make_frame
from protocol.wire.frames import Completed
from relayd.http.app import Routes, make_app
from relayd.http.context import HttpContext, context_of
from relayd.http.errors import HttpError
from relayd.http.request_stream import hold_submission
from relayd.http.websocket_login import deny, principal_of_socket
from tests.relayd.http.sample_handlers import Stage
from tests.support.relay import Daemon, a_submit, daemon
from tests.support.timed_http_client import open_stream


class Sockets:
    """Endpoints, and what became of them."""

    def __init__(self) -> None:
        self.entered, self.left, self.go_on = trio.Event(), trio.Event(), trio.Event()
        self.cancelled = 0
        #: Code with which the latest was closed, as its endpoint saw it.
        self.code: int | None = None
        self.read = 0
        self.counted = 0

    def routes(self) -> list[BaseRoute]:
        return [
            WebSocketRoute("/echo", self.echo),
            WebSocketRoute("/open", self.open_to_all),
            WebSocketRoute("/query", self.query),
            WebSocketRoute("/own-words", self.own_words),
            WebSocketRoute("/silent", self.silent),
            WebSocketRoute("/hears-nothing", self.hears_nothing),
            WebSocketRoute("/counts", self.counts),
            WebSocketRoute("/endless", self.endless),
            WebSocketRoute("/broken", self.broken),
            WebSocketRoute("/broken-before", self.broken_before),
            WebSocketRoute("/stubborn", self.stubborn),
            WebSocketRoute("/closes", self.closes),
            WebSocketRoute("/refuses", self.refuses),
            WebSocketRoute("/interrupted", self.interrupted),
            WebSocketRoute("/speech", self.speech),
            Route("/plain", Stage().fine),
        ]

    async def echo(self, websocket: WebSocket) -> None:
        principal_of_socket(websocket)
        offered = websocket.scope["subprotocols"]
        await websocket.accept(offered[0] if offered else None)
        self.entered.set()
        try:
            while (message := await websocket.receive())["type"] == "websocket.receive":
                self.read += 1
                await websocket.send({**message, "type": "websocket.send"})
            self.code = message["code"]
        except trio.Cancelled:
            self.cancelled += 1
            raise
        finally:
            self.left.set()

    async def open_to_all(self, websocket: WebSocket) -> None:
        await websocket.accept()
        await self.silent_part()

    async def query(self, websocket: WebSocket) -> None:
        principal = principal_of_socket(websocket, websocket.query_params.get("token"))
        await websocket.accept()
        await websocket.send_text(principal.name)

    async def own_words(self, websocket: WebSocket) -> None:
        try:
            principal_of_socket(websocket)
        except HttpError as refusal:
            await deny(websocket, refusal, {"detail": refusal.message})

    async def silent(self, websocket: WebSocket) -> None:
        principal_of_socket(websocket)

    async def silent_part(self) -> None:
        self.entered.set()
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            self.cancelled += 1
            raise
        finally:
            self.left.set()

    async def hears_nothing(self, websocket: WebSocket) -> None:
        principal_of_socket(websocket)
        await websocket.accept()
        self.entered.set()
        await self.go_on.wait()
        while True:
            await websocket.receive_bytes()
            self.read += 1

    async def counts(self, websocket: WebSocket) -> None:
        principal_of_socket(websocket)
        await websocket.accept()
        while True:
            await websocket.receive_bytes()
            self.counted += 1

    async def endless(self, websocket: WebSocket) -> None:
        principal_of_socket(websocket)
        await websocket.accept()
        try:
            while True:
                await websocket.send_bytes(bytes(60_000))
        except WebSocketDisconnect as gone:
            self.code = gone.code
        finally:
            self.left.set()

    async def broken(self, websocket: WebSocket) -> None:
        principal_of_socket(websocket)
        await websocket.accept()
        raise RuntimeError("fell over")

    async def broken_before(self, websocket: WebSocket) -> None:
        raise RuntimeError("fell over")

    async def stubborn(self, websocket: WebSocket) -> None:
        principal_of_socket(websocket)
        await websocket.accept()
        await self.silent_part()

    async def closes(self, websocket: WebSocket) -> None:
        principal_of_socket(websocket)
        await websocket.accept()
        await websocket.close(4001, "that was all")

    async def refuses(self, websocket: WebSocket) -> None:
        principal_of_socket(websocket)
        await websocket.accept()
        raise HttpError(await websocket.receive_text(), "this is why")

    async def interrupted(self, websocket: WebSocket) -> None:
        principal_of_socket(websocket)
        await websocket.accept()
        for number in range(100):
            with trio.move_on_after(0.001):
                await websocket.send_bytes(bytes([number]) * 60_000)
        self.left.set()
        await websocket.send_text("the end")

    async def speech(self, websocket: WebSocket) -> None:
        """Runs a request for each text, all at once, and answers with its frames' types."""
        context, principal = context_of(websocket), principal_of_socket(websocket)
        await websocket.accept()

        async def speak(text: str) -> None:
            try:
                async with hold_submission(context, principal, a_submit(text)) as held:
                    async for event in held:
                        if isinstance(event, Completed):
                            await websocket.send_text(f"{text} {event.TYPE}")
            except HttpError as refusal:
                await websocket.send_text(f"{text} {refusal.code}")

        async with trio.open_nursery() as nursery:
            while (text := (await websocket.receive()).get("text")) is not None:
                nursery.start_soon(speak, text)
            nursery.cancel_scope.cancel()
            self.left.set()


@asynccontextmanager
async def sockets(state_dir: Path, **overrides: Any) -> AsyncIterator[tuple[Daemon, Sockets]]:
    """A daemon with these endpoints, on a TCP port."""
    endpoints = Sockets()

    def make(context: HttpContext, more: Routes) -> Starlette:
        app = make_app(context, more)
        app.router.routes[:0] = endpoints.routes()
        return app

    with pytest.MonkeyPatch.context() as patch, trio.fail_after(60):
        patch.setattr("relayd.daemon.make_app", make)
        async with daemon(state_dir, **({"listen": "127.0.0.1:0"} | overrides)) as relay:
            yield relay, endpoints


@asynccontextmanager
async def socket_to(
    url: str,
    path: str,
    token: str | None = None,
    headers: dict[str, str] | None = None,
    context: ssl.SSLContext | None = None,
    **options: Any,
) -> AsyncIterator[WebSocketConnection]:
    """A WebSocket to `path`; at the end it is cut."""
    sent = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    if token is not None:
        sent.append((b"authorization", f"Bearer {token}".encode()))
    async with open_stream(url, context) as stream, trio.open_nursery() as nursery:
        host = url.partition("//")[2] or "localhost"
        assert isinstance(stream, trio.SocketStream | trio.SSLStream)
        yield await wrap_client_stream(nursery, stream, host, path, extra_headers=sent, **options)
        nursery.cancel_scope.cancel()


async def denial(url: str, path: str, token: str | None = None, **options: Any) -> tuple[int, bytes]:
    """The status and the body with which a handshake is denied."""
    with pytest.RaisesGroup(ConnectionRejected, flatten_subgroups=True) as denied:
        async with socket_to(url, path, token, **options):
            pass
    rejected = denied.value.exceptions[0]
    assert isinstance(rejected, ConnectionRejected)
    return rejected.status_code, rejected.body or b""


async def closing(socket: WebSocketConnection) -> tuple[int, str]:
    """Read until the relay closes; returns its code and reason."""

    async def read() -> None:
        while True:
            await socket.get_message()

    with pytest.raises(ConnectionClosed) as closed:
        await read()
    reason = closed.value.reason
    assert reason is not None
    return reason.code, reason.reason or ""


@attrs.define(eq=False)
class RawSocket:
    """The client's end of a WebSocket, which answers nothing by itself."""

    stream: trio.abc.Stream
    _parser: Parser = attrs.field(factory=lambda: Parser(masked=False, max_message_bytes=2**24))
    _events: deque[Any] = attrs.field(factory=deque)

    async def send(self, opcode: int, payload: bytes, *, last: bool = True) -> None:
        """Send one frame."""
        frame = bytearray(make_frame(opcode, payload, masked=True))
        frame[0] &= 0xFF if last else 0x7F
        await self.stream.send_all(frame)

    async def next(self, *kinds: type) -> Any:
        """The next message or control frame of one of these kinds."""
        with trio.fail_after(10):
            while True:
                while not self._events:
                    data = await self.stream.receive_some()
                    assert data, "the relay hung up"
                    self._parser.feed(data)
                    self._events.extend(self._parser.pop_events())
                if isinstance(event := self._events.popleft(), kinds):
                    return event


@asynccontextmanager
async def raw_socket(url: str, path: str, token: str) -> AsyncIterator[RawSocket]:
    """A WebSocket whose handshake is accepted; at the end it is cut."""
    async with open_stream(url) as stream:
        yield await shake_hands(stream, path, token)


async def shake_hands(stream: trio.abc.Stream, path: str, token: str) -> RawSocket:
    """Make a WebSocket of a connection."""
    await stream.send_all(
        f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
        f"Authorization: Bearer {token}\r\n\r\n".encode()
    )
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += await stream.receive_some(1) or pytest.fail(f"it hung up, and said {head!r}")
    assert head.startswith(b"HTTP/1.1 101 "), head
    return RawSocket(stream)
