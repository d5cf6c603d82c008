"""An HTTP client that sends exactly what the test asks for."""

import json
import secrets
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import attrs
import h11
import trio

from protocol.client.address import parse_address


@attrs.define(eq=False)
class Answer:
    """A response: its head, and the part of its body that was read."""

    status: int
    headers: dict[str, str]
    _visitor: "Visitor"
    body: bytes = b""
    #: Whether the body ended as HTTP requires.
    whole: bool = False

    async def piece(self) -> bytes:
        """Read more of the body; returns nothing at its end."""
        with trio.fail_after(10):
            event = await self._visitor.next_event()
        if isinstance(event, h11.Data):
            self.body += event.data
            return bytes(event.data)
        assert isinstance(event, h11.EndOfMessage), event
        self.whole = True
        self._visitor.end()
        return b""

    async def rest(self) -> bytes:
        """Read the whole body."""
        while await self.piece():
            pass
        return self.body

    async def until(self, word: bytes) -> bytes:
        """Read the body up to and including `word`."""
        while word not in self.body:
            assert await self.piece(), f"{word!r} is not in {self.body[:2000]!r}"
        return self.body

    @property
    def json(self) -> Any:
        """Parse the body as JSON."""
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        """Return the error in the format of the requests API."""
        return self.json["error"]


@attrs.define(eq=False)
class Visitor:
    """Serve one connection."""

    stream: trio.abc.Stream
    headers: dict[str, str] = attrs.field(factory=dict)
    connection: h11.Connection = attrs.field(factory=lambda: h11.Connection(h11.CLIENT))

    async def next_event(self) -> Any:
        while (event := self.connection.next_event()) is h11.NEED_DATA:
            self.connection.receive_data(bytes(await self.stream.receive_some(65536)))
        return event

    def end(self) -> None:
        if self.connection.our_state is h11.DONE and self.connection.their_state is h11.DONE:
            self.connection.start_next_cycle()

    async def send(self, event: Any) -> None:
        if data := self.connection.send(event):
            await self.stream.send_all(data)

    async def begin(
        self, method: str, path: str, *, body: bytes = b"", headers: Mapping[str, str] | None = None, told: Any = None
    ) -> None:
        """Send a request."""
        if told is not None:
            body = json.dumps(told).encode()
        sent = {"host": "localhost"} | self.headers | ({"content-type": "application/json"} if told is not None else {})
        sent |= {"content-length": str(len(body))} if body or method in ("POST", "PUT") else {}
        await self.send(h11.Request(method=method, target=path, headers=list((sent | dict(headers or {})).items())))
        if body:
            await self.send(h11.Data(data=body))
        await self.send(h11.EndOfMessage())

    async def answer(self) -> Answer:
        """Read the head of the answer."""
        with trio.fail_after(10):
            while isinstance(head := await self.next_event(), h11.InformationalResponse):
                pass
        assert isinstance(head, h11.Response), head
        return Answer(head.status_code, {k.decode().lower(): v.decode() for k, v in head.headers}, self)

    async def open(self, method: str, path: str, **more: Any) -> Answer:
        """Send a request, and read the head of the answer."""
        await self.begin(method, path, **more)
        return await self.answer()

    async def ask(self, method: str, path: str, **more: Any) -> Answer:
        """Send a request, and read the whole answer."""
        answer = await self.open(method, path, **more)
        await answer.rest()
        return answer

    async def get(self, path: str, **more: Any) -> Answer:
        return await self.ask("GET", path, **more)

    async def hears_the_end(self) -> bool:
        """Whether the relay closes the connection."""
        with trio.move_on_after(10):
            try:
                while await self.stream.receive_some():
                    pass
            except trio.BrokenResourceError:
                pass
            return True
        return False


@asynccontextmanager
async def visitor(
    url: str, *, token: str | None = None, context: ssl.SSLContext | None = None
) -> AsyncIterator[Visitor]:
    """Open a connection to a listener; sends no request yet."""
    address = parse_address(url)
    stream: trio.abc.Stream
    if address.kind == "unix":
        stream = await trio.open_unix_socket(address.path)
    elif context is not None:
        stream = await trio.open_ssl_over_tcp_stream(
            address.host, address.port, ssl_context=context, https_compatible=True
        )
    else:
        stream = await trio.open_tcp_stream(address.host, address.port)
    try:
        yield Visitor(stream, {"authorization": f"Bearer {token}"} if token else {})
    finally:
        await trio.aclose_forcefully(stream)


@attrs.frozen
class File:
    """A file in a form."""

    data: bytes
    media_type: str = "audio/wav"
    filename: str = "voice.wav"


def form(parts: Mapping[str, str | File]) -> dict[str, Any]:
    """Make a multipart body, and the matching header."""
    boundary = secrets.token_hex(8)
    body = b""
    for name, part in parts.items():
        body += f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"'.encode()
        if isinstance(part, File):
            body += f'; filename="{part.filename}"\r\nContent-Type: {part.media_type}'.encode()
        body += b"\r\n\r\n" + (part.data if isinstance(part, File) else part.encode()) + b"\r\n"
    body += f"--{boundary}--\r\n".encode()
    return {"body": body, "headers": {"content-type": f"multipart/form-data; boundary={boundary}"}}


def events_of(body: bytes) -> list[tuple[str, str | None, Any]]:
    """Parse the complete server-sent events in `body` to (type, id, data)."""
    told = []
    for block in body.decode().split("\n\n")[:-1]:
        lines = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if lines:
            told.append((lines["event"], lines.get("id"), json.loads(lines["data"])))
    return told
