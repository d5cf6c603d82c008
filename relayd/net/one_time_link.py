"""A link that is good once: an HTTP server on this machine that leads the first who opens it on to another address."""

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import trio

from protocol.link.background import open_background
from relayd.net.hang_up import answer_and_hang_up
from relayd.net.http_head import read_head

USED = "this link was used before, and is good once"
UNKNOWN = "there is nothing here"


@attrs.define(eq=False)
class OneTimeLink:
    """Answers with a redirection once.

    Args:
        target: where it leads; a secret belongs behind the `#`, which browsers send to nobody.
    """

    target: str
    path: str = attrs.field(factory=lambda: f"/{secrets.token_urlsafe(16)}")
    is_used: bool = False

    async def serve(self, stream: trio.SocketStream) -> None:
        """Answer one connection."""
        async with stream:
            method, _, rest = (await read_head(stream)).partition(b" ")
            await answer_and_hang_up(stream, self.answer(method, rest.partition(b" ")[0]))

    def answer(self, method: bytes, path: bytes) -> bytes:
        """Return the whole answer to a request."""
        if method != b"GET" or not secrets.compare_digest(path, self.path.encode()):
            return _answer("404 Not Found", UNKNOWN)
        if self.is_used:
            return _answer("410 Gone", USED)
        self.is_used = True
        return _answer("303 See Other", "", f"Location: {self.target}\r\n")


def _answer(status: str, words: str, headers: str = "") -> bytes:
    more = f"Content-Type: text/plain\r\nCache-Control: no-store\r\nContent-Length: {len(words)}\r\nConnection: close"
    return f"HTTP/1.1 {status}\r\n{headers}{more}\r\n\r\n{words}".encode()


@asynccontextmanager
async def open_one_time_link(target: str) -> AsyncIterator[str]:
    """Serve a link on the loopback until the end of the block; yields its address."""
    link, scope = OneTimeLink(target), trio.CancelScope()
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")

    async def serve() -> None:
        with scope:
            await trio.serve_listeners(link.serve, listeners)

    async def stop() -> None:
        scope.cancel()

    async with open_background(serve, stop):
        yield f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}{link.path}"
