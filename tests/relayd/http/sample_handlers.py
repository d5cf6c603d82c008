"""Handlers for the tests of the HTTP server, and a daemon that serves them."""

from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import h11
import pytest
import trio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from protocol.wire.frames import Audio
from protocol.wire.messages import Submit
from relayd.http.app import Routes, make_app
from relayd.http.context import HttpContext
from relayd.http.request_stream import open_submission
from relayd.http.streaming_response import ResponseWriter, StreamingRoute
from tests.support.fake_worker import samples
from tests.support.relay import Daemon, an_id, daemon

PCM = [samples(1200, seed) for seed in range(3)]
Logs = list[MutableMapping[str, Any]]
GONE = (h11.RemoteProtocolError, trio.BrokenResourceError)


def faults(logs: Logs) -> Logs:
    return [line for line in logs if line["log_level"] in ("error", "critical")]


class Stage:
    """Handlers for tests, and what became of them."""

    def __init__(self) -> None:
        self.entered, self.left = trio.Event(), trio.Event()
        self.go_on = trio.Event()
        self.cancelled = 0

    def routes(self) -> list[BaseRoute]:
        return [
            Route("/fine", self.fine),
            Route("/echo", self.echo, methods=["POST"]),
            Route("/ignore", self.fine, methods=["POST"]),
            Route("/broken", self.broken),
            Route("/half", StreamingRoute(self.half)),
            Route("/slow", StreamingRoute(self.slow)),
            Route("/waits", self.waits),
            Route("/endless", StreamingRoute(self.endless)),
            Route("/speech", StreamingRoute(self.speech)),
            Route("/takes", self.takes, methods=["POST"]),
            Route("/silent", Silent()),
            WebSocketRoute("/socket", self.socket),
        ]

    async def fine(self, request: Request) -> Response:
        return PlainTextResponse("fine")

    async def echo(self, request: Request) -> Response:
        return Response(await request.body())

    async def broken(self, request: Request) -> Response:
        raise RuntimeError("fell over")

    async def half(self, request: Request, reply: ResponseWriter) -> None:
        await reply.start("text/plain")
        await reply.write(b"half")
        raise RuntimeError("fell over")

    async def slow(self, request: Request, reply: ResponseWriter) -> None:
        await reply.start("text/plain")
        await reply.write(b"begun ")
        self.entered.set()
        await self.go_on.wait()
        await reply.write(b"ended")

    async def waits(self, request: Request) -> Response:
        self.entered.set()
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            self.cancelled += 1
            raise
        finally:
            self.left.set()

    async def takes(self, request: Request) -> Response:
        await self.go_on.wait()
        self.entered.set()
        try:
            return Response(await request.body())
        except trio.Cancelled:
            self.cancelled += 1
            raise

    async def endless(self, request: Request, reply: ResponseWriter) -> None:
        await reply.start("text/plain")
        try:
            while True:
                await reply.write(bytes(65536))
        finally:
            self.left.set()

    async def socket(self, websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text("hello")
        await websocket.receive_bytes()

    async def speech(self, request: Request, reply: ResponseWriter) -> None:
        submit = Submit(request_id=an_id(), space="tts", params={"text": "x"})
        async with open_submission(request, submit) as held:
            async for event in held:
                if isinstance(event, Audio):
                    if not reply.started:
                        await reply.start("audio/pcm")
                    await reply.write(event.pcm)


class Silent:
    """Answers nothing."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()


@asynccontextmanager
async def staged(state_dir: Path, **overrides: Any) -> AsyncIterator[tuple[Daemon, Stage]]:
    """A daemon with the stage's handlers."""
    stage = Stage()

    def make(context: HttpContext, more: Routes) -> Starlette:
        app = make_app(context, more)
        app.router.routes[:0] = stage.routes()
        return app

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("relayd.daemon.make_app", make)
        async with daemon(state_dir, **overrides) as relay:
            yield relay, stage


def make_token(relay: Daemon, name: str = "ann", **more: Any) -> str:
    return relay.tokens.create(role="client", name=name, now=0.0, **more).text
