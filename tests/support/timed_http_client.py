"""An HTTP client that shows when each part of a response arrives, over TCP, TLS or a unix socket."""

import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import h11
import trio

Headers = list[tuple[str, str]]


@attrs.define(eq=False)
class Answer:
    """A response whose head has arrived; its body is read as it arrives."""

    status: int
    headers: dict[str, str]
    _connection: h11.Connection
    _stream: trio.abc.Stream

    async def piece(self) -> bytes | None:
        """Return some of the body as soon as it arrives; None at its end."""
        while True:
            event = await next_event(self._connection, self._stream)
            if isinstance(event, h11.Data):
                return bytes(event.data)
            if isinstance(event, h11.EndOfMessage):
                return None

    async def body(self) -> bytes:
        """Read the rest of the body."""
        pieces = []
        while (piece := await self.piece()) is not None:
            pieces.append(piece)
        return b"".join(pieces)

    async def json(self) -> Any:
        """Read the rest of the body, and parse it as JSON."""
        return json.loads(await self.body())


async def next_event(connection: h11.Connection, stream: trio.abc.Stream) -> Any:
    """Return the next event from the server."""
    while (event := connection.next_event()) is h11.NEED_DATA:
        connection.receive_data(bytes(await stream.receive_some(65_536)))
    return event


@asynccontextmanager
async def open_stream(url: str, context: ssl.SSLContext | None = None) -> AsyncIterator[trio.abc.Stream]:
    """Connect to `ws://HOST:PORT`, `http://…`, `https://…` or `unix:PATH`."""
    kind, _, place = url.partition(":")
    if kind == "unix":
        stream: trio.abc.Stream = await trio.open_unix_socket(place)
    else:
        host, _, port = place.strip("/").rpartition(":")
        stream = await trio.open_tcp_stream(host, int(port))
        if context is not None:
            stream = trio.SSLStream(stream, context, server_hostname=host, https_compatible=True)
    async with stream:
        yield stream


async def ask_on(
    stream: trio.abc.Stream,
    method: str,
    path: str,
    *,
    token: str | None = None,
    headers: Headers | None = None,
    body: bytes = b"",
) -> Answer:
    """Send one request; returns its answer once the response head has arrived."""
    connection = h11.Connection(h11.CLIENT)
    sent: Headers = list(headers or [])
    if not any(name.lower() == "host" for name, _value in sent):
        sent.insert(0, ("Host", "localhost"))
    if token is not None:
        sent.append(("Authorization", f"Bearer {token}"))
    if body or method in ("POST", "PUT"):
        sent.append(("Content-Length", str(len(body))))
    await stream.send_all(connection.send(h11.Request(method=method, target=path, headers=sent)) or b"")
    if body:
        await stream.send_all(connection.send(h11.Data(data=body)) or b"")
    connection.send(h11.EndOfMessage())
    while True:
        event = await next_event(connection, stream)
        if isinstance(event, h11.Response):
            found = {name.decode().lower(): value.decode() for name, value in event.headers}
            return Answer(event.status_code, found, connection, stream)
        assert isinstance(event, h11.InformationalResponse), f"unexpected event from the server: {event!r}"


@asynccontextmanager
async def asking(
    url: str, method: str, path: str, *, context: ssl.SSLContext | None = None, **more: Any
) -> AsyncIterator[Answer]:
    """Send one request on a connection of its own; `more` is as for `ask_on`."""
    with trio.fail_after(20):
        async with open_stream(url, context) as stream:
            yield await ask_on(stream, method, path, **more)
