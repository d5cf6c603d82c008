"""A client of the Realtime API that sends and gets bare events."""

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import trio
from trio_websocket import WebSocketConnection

from tests.relayd.http.sample_sockets import socket_to
from tests.support.relay import new_token
from tests.support.talking import Stage, stage

Json = dict[str, Any]
PATH = "/v1/realtime?model=llm"


@attrs.define(eq=False)
class RealtimeClient:
    """Sends events, and keeps all that it gets."""

    socket: WebSocketConnection
    got: list[Json] = attrs.field(factory=list)

    async def say(self, kind: str, **fields: Any) -> None:
        """Send an event."""
        await self.socket.send_message(json.dumps({"type": kind, "event_id": "mine", **fields}))

    async def next(self, kind: str | None = None) -> Json:
        """Return the next event; with a type, the next of that type."""
        with trio.fail_after(10):
            while True:
                event: Json = json.loads(await self.socket.get_message())
                self.got.append(event)
                if kind in (None, event["type"]):
                    return event

    async def fault(self) -> Json:
        """Return the error that comes next."""
        error: Json = (await self.next("error"))["error"]
        return error

    async def user(self, text: str, **fields: Any) -> Json:
        """Add what a user says; returns the item."""
        content = [{"type": "input_text", "text": text}]
        await self.say(
            "conversation.item.create", item={"type": "message", "role": "user", "content": content} | fields
        )
        item: Json = (await self.next("conversation.item.done"))["item"]
        return item

    async def asked(self, **response: Any) -> Json:
        """Ask for a response, and return it when it is done."""
        await self.say("response.create", **({"response": response} if response else {}))
        return await self.done()

    async def done(self) -> Json:
        """Return the next response that is done."""
        response: Json = (await self.next("response.done"))["response"]
        return response

    def heard(self) -> bytes:
        """All samples so far."""
        return b"".join(base64.b64decode(event["delta"]) for event in self.got if event["type"].endswith("audio.delta"))

    def types(self) -> list[str]:
        """The types of all events so far, each once where it repeats."""
        types = [event["type"] for event in self.got]
        return [kind for before, kind in zip([None, *types], types, strict=False) if kind != before]


@asynccontextmanager
async def client_of(
    on: Stage, path: str = PATH, token: str | None = None, url: str | None = None, **options: Any
) -> AsyncIterator[RealtimeClient]:
    """Connect, with a token of its own if none is given."""
    token = await new_token(on.daemon) if token is None else token
    async with socket_to(url or on.daemon.url, path, token or None, **options) as socket:
        yield RealtimeClient(socket)


@asynccontextmanager
async def realtime(tmp_path: Path, path: str = PATH, **options: Any) -> AsyncIterator[tuple[Stage, RealtimeClient]]:
    """A daemon with conversations, and a client that is connected; `session.created` has come."""
    async with stage(tmp_path, **options) as on, client_of(on, path) as client:
        assert (await client.next())["type"] == "session.created"
        yield on, client
