"""A client of the GPU server's protocol for tests."""

import base64
import io
import json
import wave
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import trio
from trio_websocket import WebSocketConnection

from tests.relayd.http.sample_handlers import make_token
from tests.relayd.http.sample_sockets import socket_to
from tests.support.talking import Stage

GOOD = {
    "type": "text_webrtc",
    "content": "Hello",
    "avatar_id": "avatar_tutor_13",
    "user_id": 6,
    "engine_session_id": "uuid-session-1",
}


def without(*names: str, **fields: Any) -> dict[str, Any]:
    """A good message without some of its fields, or with others."""
    return {name: value for name, value in GOOD.items() if name not in names} | fields


@attrs.define(eq=False)
class GpuClient:
    """One connection."""

    socket: WebSocketConnection

    async def send(self, told: dict[str, Any] | str | bytes) -> None:
        """Send a message."""
        await self.socket.send_message(json.dumps(told) if isinstance(told, dict) else told)

    async def answer(self) -> dict[str, Any]:
        """Return the next answer."""
        with trio.fail_after(10):
            answer: dict[str, Any] = json.loads(await self.socket.get_message())
            return answer

    async def ask(self, told: dict[str, Any] | str | bytes) -> dict[str, Any]:
        """Send a message and return the next answer."""
        await self.send(told)
        return await self.answer()

    async def error(self, told: dict[str, Any] | str | bytes) -> str:
        """Return the text of the error that a message is answered with."""
        answer = await self.ask(told)
        assert answer["type"] == "error", answer
        content: str = answer["content"]
        return content


@asynccontextmanager
async def gpu_client(
    on: Stage, name: str = "user_6", *, token: str | None = None, path: str = "/ws/ws", url: str | None = None
) -> AsyncIterator[GpuClient]:
    """Connect as a client does: with the token in the URL."""
    token = make_token(on.daemon) if token is None else token
    async with socket_to(url or on.daemon.urls[0], f"{path}/{name}?token={token}") as socket:
        yield GpuClient(socket)


def pcm_of(answer: dict[str, Any]) -> bytes:
    """The samples of an answer's WAV."""
    with wave.open(io.BytesIO(base64.b64decode(answer["audio"], validate=True))) as audio:
        assert (audio.getsampwidth(), audio.getnchannels()) == (2, 1)
        frames: bytes = audio.readframes(audio.getnframes())
        return frames
