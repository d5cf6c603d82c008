"""Feeds a live input of a request with the body of an HTTP request, as it comes."""

import attrs
import trio
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import MAX_INPUT_CHUNK_BYTES, MAX_UNACKED_BYTES
from relayd.http.authentication import principal_of
from relayd.http.context import context_of, exchange_of
from relayd.http.errors import HttpError
from relayd.http.live_feed import LiveFeed, input_closed
from relayd.http.request_stream import find_request
from relayd.requests.live_input import LiveInput, PipedInput
from relayd.requests.request import Request
from relayd.store.base import StoreError

#: Offsets have at most so many digits.
MAX_DIGITS = 12


async def feed_input(http: HttpRequest) -> Response:
    """Store the body in a live input as it comes; the end of the body is the end of the input.

    Raises:
        HttpError: the request has ended or has no such live input; or what is fed does not fit to what is stored.

    Cancellation: what has come is stored, and the input has not ended.
    """
    request, name = find_request(http, http.path_params["request_id"]), http.path_params["name"]
    if request.principal != (principal := principal_of(http)).name:
        raise HttpError(ErrorCode.FORBIDDEN, f"request {request.request_id} is fed by {request.principal!r} alone")
    offset = http.query_params.get("offset", "0")
    if not (offset.isascii() and offset.isdigit() and len(offset) <= MAX_DIGITS):
        message = f"offset must be the number of bytes before the body, not {offset[:32]!r}"
        raise HttpError(ErrorCode.INVALID_PARAMS, message, details={"offset": message})
    fed = _find_input(request, name)
    held = InputFeed(context_of(http), exchange_of(http), principal)
    try:
        held.attach(request)
        await held.feed(http, name, int(offset))
        return JSONResponse({"request_id": request.request_id, "input": name, "bytes": fed.size, "ended": fed.ended})
    finally:
        held.close()


def _find_input(request: Request, name: str) -> LiveInput:
    if not request.live:
        raise input_closed(request, name)
    fed = request.fed.get(name)
    if fed is None or isinstance(fed, PipedInput):
        known = ", ".join(sorted(each for each, info in request.submit.inputs.items() if info.live)) or "none"
        what = f"is not a live input of request {request.request_id}; its live inputs are {known}"
        raise HttpError(ErrorCode.INVALID_PARAMS, f"{name[:32]!r} {what}", details={f"inputs.{name[:32]}": what})
    return fed


@attrs.define(eq=False)
class InputFeed(LiveFeed):
    """Holds a request while a body is fed to it. It reads none of the frames."""

    def wake(self) -> None:
        """Wake the task that waits for room, or for a piece of a body that nobody needs any more."""
        super().wake()
        if self._refusal is not None or not self.request.live:
            self._stop_reading()

    def _stop_reading(self) -> None:
        assert self.exchange is not None
        if self.exchange.reading is not None:
            self.exchange.reading.cancel()

    async def feed(self, http: HttpRequest, name: str, offset: int) -> None:
        """Feed the body, and wait until all of it is stored.

        Raises:
            HttpError: the request has ended, or the relay refuses what is fed.
        """
        fed, is_over = _find_input(self.request, name), False
        while not is_over:
            data, is_over = await self._next_piece(http, name)
            for start in range(0, len(data) or 1, MAX_INPUT_CHUNK_BYTES):
                piece = data[start : start + MAX_INPUT_CHUNK_BYTES]
                fresh = await self._compare_stored(fed, name, offset, piece)
                offset += len(piece)
                while offset - fed.size > MAX_UNACKED_BYTES and offset - len(fresh) <= fed.known:
                    await self.wait_for_store(name)
                last = True if is_over and start + len(piece) == len(data) else None
                await self.add(name, offset - len(fresh), fresh, last)
        while not fed.ended:
            await self.wait_for_store(name)

    async def _compare_stored(self, fed: LiveInput, name: str, offset: int, data: bytes) -> bytes:
        """Return what is not stored yet of a piece, whose other bytes must be those that are."""
        count = min(len(data), max(0, fed.size - offset))
        stored = bytearray()
        while len(stored) < count:
            try:
                stored += await self.relay.feeds.read(self.request, name, offset + len(stored), count - len(stored))
            except StoreError as fault:
                self.relay.feeds.fail(self.request, name, fault)
            self.check(name)
        if stored != data[:count]:
            message = f"input {name!r} at offset {offset}: other bytes are stored; {fed.size} are stored so far"
            raise HttpError(ErrorCode.ID_CONFLICT, message)
        return data[count:]

    async def _next_piece(self, http: HttpRequest, name: str) -> tuple[bytes, bool]:
        """Return the next piece of the body and whether it is the last; waits as long as the request does."""
        assert self.exchange is not None
        with trio.CancelScope() as reading:
            self.exchange.reading = reading
            self.wake()  # the request may have ended before this scope was there
            if self.context.leaving:
                reading.cancel()
            event = await http.receive()
        self.exchange.reading = None
        self.check(name)
        if not reading.cancelled_caught and event["type"] != "http.request":
            raise HttpError("bad_request", "the body was cut", status=400)
        if reading.cancelled_caught:
            message = "the relay is shutting down and keeps the request; go on from its stored bytes when it is back"
            raise HttpError(ErrorCode.SHUTTING_DOWN, message, retry_after_s=5.0)
        return event.get("body", b""), not event.get("more_body", False)
