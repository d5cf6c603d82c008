"""A WebSocket on which both sides send JSON objects; several tasks may send."""

import json
from collections.abc import AsyncIterator
from typing import Any

import attrs
import trio
from starlette.websockets import WebSocket


@attrs.define(eq=False)
class JsonSocket:
    """An accepted WebSocket."""

    websocket: WebSocket
    _turn: trio.Lock = attrs.field(factory=trio.Lock)

    async def messages(self) -> AsyncIterator[str | bytes]:
        """Return what comes, until the WebSocket is closed."""
        while (message := await self.websocket.receive())["type"] == "websocket.receive":
            text = message.get("text")
            yield message["bytes"] if text is None else text

    async def send(self, message: dict[str, Any]) -> None:
        """Send a JSON object; waits while the peer does not read.

        Raises:
            WebSocketDisconnect: the WebSocket is closed.
        """
        text = json.dumps(message, ensure_ascii=False).encode(errors="replace").decode()  # half a surrogate pair
        async with self._turn:
            await self.websocket.send_text(text)

    async def send_bytes(self, data: bytes) -> None:
        """Send a binary message; otherwise as `send`."""
        async with self._turn:
            await self.websocket.send_bytes(data)
