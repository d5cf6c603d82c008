"""A WebSocket on which both sides send JSON objects; several tasks may send."""

import json
from collections.abc import AsyncIterator
from typing import Any

import attrs
import trio
from starlette.websockets import WebSocket

#: Of what a client has sent, in an error that names it.
MAX_SHOWN_CHARS = 128


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

    async def send(self, told: dict[str, Any]) -> None:
        """Send a JSON object; waits while the peer does not read.

        Raises:
            WebSocketDisconnect: the WebSocket is closed.
        """
        text = json.dumps(told, ensure_ascii=False).encode(errors="replace").decode()  # half a surrogate pair
        async with self._turn:
            await self.websocket.send_text(text)

    async def send_bytes(self, data: bytes) -> None:
        """Send a binary message; otherwise as `send`."""
        async with self._turn:
            await self.websocket.send_bytes(data)


def parse_object(text: str) -> dict[str, Any]:
    """Parse a message.

    Raises:
        ValueError: it is not a JSON object.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it is not an object")
    return value


def shown(value: object) -> str:
    """Return a value that a client has sent, as an error names it."""
    if isinstance(value, list | dict):
        return "an array" if isinstance(value, list) else "an object"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}…"
