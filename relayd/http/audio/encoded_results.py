"""The audio of ended requests in a coding, as one thing: players ask for its length, and then for its parts.

It is encoded as a whole, and kept for the next question. A principal encodes one result at a time, and has a share of
the memory for those that are being sent.
"""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import attrs
import trio

from protocol.wire.errors import ErrorCode
from relayd.http.errors import HttpError
from relayd.requests.request import Request

#: Most bytes that are kept of all results, and that are being sent to one principal: each holds the largest result.
MAX_KEPT_BYTES = 64 * 1024 * 1024
MAX_SENDING_BYTES = 64 * 1024 * 1024


@attrs.frozen
class EncodedAudio:
    """A result in a coding, with the `ETag` of these bytes."""

    body: bytes = attrs.field(repr=False)
    etag: str


@attrs.define(eq=False)
class EncodedResults:
    """Has results encoded, and keeps those that were asked for last; one for the whole daemon."""

    _kept: OrderedDict[tuple[Request, str], EncodedAudio] = attrs.field(factory=OrderedDict)
    _kept_bytes: int = 0
    #: Principal -> bytes that are being sent to it.
    _sending: Counter[str] = attrs.field(factory=Counter)
    #: Principal -> the lock of its encoding; only of those who encode or wait for it.
    _locks: dict[str, trio.Lock] = attrs.field(factory=dict)

    @property
    def idle(self) -> bool:
        """Whether nothing is being encoded or sent."""
        return not self._sending and not self._locks

    @asynccontextmanager
    async def open(
        self, principal: str, request: Request, name: str, encode: Callable[[], Awaitable[bytes]]
    ) -> AsyncIterator[EncodedAudio]:
        """Yield the audio of a completed request; until the block ends, it is being sent.

        Args:
            principal: to whom it is sent.
            request: the request.
            name: the name of the coding.
            encode: encodes it.

        Raises:
            HttpError: too much is being sent to the principal; or an error of `encode`.
        """
        lock = self._locks.setdefault(principal, trio.Lock())
        try:
            async with lock:
                audio = self._find(request, name) or self._keep(request, name, await encode())
        finally:
            if not lock.locked():
                self._locks.pop(principal, None)
        size = len(audio.body)
        if self._sending[principal] and self._sending[principal] + size > MAX_SENDING_BYTES:
            message = "too much encoded audio is being sent to you at once; read it, then ask for more"
            raise HttpError(ErrorCode.RATE_LIMITED, message, retry_after_s=2.0)
        self._sending[principal] += size
        try:
            yield audio
        finally:
            self._sending[principal] -= size
            if not self._sending[principal]:
                del self._sending[principal]

    def _find(self, request: Request, name: str) -> EncodedAudio | None:
        if audio := self._kept.get((request, name)):
            self._kept.move_to_end((request, name))
        return audio

    def _keep(self, request: Request, name: str, body: bytes) -> EncodedAudio:
        audio = EncodedAudio(body, f'"{hashlib.sha256(body).hexdigest()[:32]}"')
        self._kept[request, name] = audio
        self._kept_bytes += len(body)
        while self._kept_bytes > MAX_KEPT_BYTES:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= len(oldest.body)
        return audio
