"""Responses that are produced while they are sent.

A handler writes to the response it is given, so that what it holds (a request of the relay, say) is released when its
block ends. An async generator would hold it until garbage collection.
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
    """Writes the response to one request."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self.started = False
        self._whole = False

    async def start(self, media_type: str, *, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Send the head; a later error can only abort the response."""
        fields = MutableHeaders(headers={"content-type": media_type} | dict(headers or {}))
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": fields.raw})

    async def write(self, data: bytes) -> None:
        """Send a part of the body; waits while the client does not read."""
        if data:
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def answer(self, response: Response) -> None:
        """Send a complete response instead of a streamed one."""
        self.started = self._whole = True
        await response(self._scope, self._receive, self._send)

    async def end(self) -> None:
        """Finish the body."""
        if self.started and not self._whole:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})


class StreamingRoute:
    """An ASGI application for a handler that writes to a `ResponseWriter`; used as the endpoint of a `Route`."""

    def __init__(self, handler: Callable[[Request, ResponseWriter], Awaitable[None]]) -> None:
        self.handler = handler
        self.__name__ = getattr(handler, "__name__", type(self).__name__)
        self.__doc__ = handler.__doc__

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request.

        Raises:
            ResponseAborted: an error occurred after the head was sent.
        """
        reply = ResponseWriter(scope, receive, send)
        try:
            await self.handler(Request(scope, receive), reply)
        except HttpError as refusal:
            if not reply.started:
                raise
            log.info("response aborted", path=scope["path"], code=refusal.code, why=refusal.message)
            raise ResponseAborted(str(refusal)) from refusal
        await reply.end()
