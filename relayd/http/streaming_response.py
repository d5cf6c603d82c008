"""Responses that are made while they are sent.

A handler of this kind is given the response to write to, so that whatever it holds meanwhile (a request of the
relay's, say) is let go of when its block ends: an async generator would keep it until somebody collects it.
"""

from collections.abc import Awaitable, Callable, Mapping

import structlog
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from relayd.http.errors import HttpError, ResponseAborted

log = structlog.get_logger("relayd.http")


class ResponseWriter:
    """The response to one request."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self.started = False
        self._whole = False

    async def start(self, media_type: str, *, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Send the head; from here on an error can only cut the response short."""
        given = MutableHeaders(headers={"content-type": media_type} | dict(headers or {}))
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": given.raw})

    async def write(self, data: bytes) -> None:
        """Send some of the body; waits while the client takes nothing."""
        if data:
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def answer(self, response: Response) -> None:
        """Send a whole response in place of one in pieces."""
        self.started = self._whole = True
        await response(self._scope, self._receive, self._send)

    async def end(self) -> None:
        """The body is whole."""
        if self.started and not self._whole:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})


class StreamingRoute:
    """The ASGI application of one handler that writes to a `ResponseWriter`; the endpoint of a `Route`."""

    def __init__(self, handler: Callable[[Request, ResponseWriter], Awaitable[None]]) -> None:
        self.handler = handler
        self.__name__ = getattr(handler, "__name__", type(self).__name__)
        self.__doc__ = handler.__doc__

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request.

        Raises:
            ResponseAborted: an error came after the head was sent.
        """
        reply = ResponseWriter(scope, receive, send)
        try:
            await self.handler(Request(scope, receive), reply)
        except HttpError as refusal:
            if not reply.started:
                raise
            log.info("response cut short", path=scope["path"], code=refusal.code, why=refusal.message)
            raise ResponseAborted(str(refusal)) from refusal
        await reply.end()
