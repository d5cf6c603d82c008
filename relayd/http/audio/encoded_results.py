"""The audio of ended requests in a coding, as one thing: players ask for its length, and then for its parts.

It is encoded as a whole, and kept for the next question. A principal encodes one result at a time, and has a share of
the memory for those that are being sent.
"""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import attrs
import trio

from protocol.wire.errors import ErrorCode
from relayd.http.errors import HttpError
from relayd.requests.request import Request

#: Most bytes that are kept of all results, and that are being sent to one principal: each holds the largest result.
MAX_KEPT_BYTES = 64 * 1024 * 1024
MAX_SENDING_BYTES = 64 * 1024 * 1024


@attrs.frozen(eq=False)
class EncodedAudio:
    """A result in a coding, with the `ETag` of these bytes."""

    body: bytes = attrs.field(repr=False)
    etag: str


@attrs.define(eq=False)
class EncodedResults:
    """Has results encoded, and keeps those that were asked for last; one for the whole daemon."""

    #: By id and creation time of the request, and coding: a request that is forgotten is not kept by this.
    _kept: OrderedDict[tuple[str, float, str], EncodedAudio] = attrs.field(factory=OrderedDict)
    _kept_bytes: int = 0
    #: Principal -> what is being sent to it, and how often.
    _sending: dict[str, Counter[EncodedAudio]] = attrs.field(factory=dict)
    #: Principal -> the answers in one piece that are being collected for it, with their sizes.
    _collected: dict[str, dict[object, int]] = attrs.field(factory=dict)
    #: Principal -> the lock of its encoding; only of those who encode or wait for it.
    _locks: dict[str, trio.Lock] = attrs.field(factory=dict)

    @property
    def idle(self) -> bool:
        """Whether nothing is being encoded or sent."""
        return not self._sending and not self._locks and not self._collected

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
        async with self.encoding(principal):
            key = (request.request_id, request.created_unix, name)
            audio = self._find(key)
            if audio is None:
                body = await encode()
                digest = await trio.to_thread.run_sync(lambda: hashlib.sha256(body).hexdigest())
                audio = self._keep(key, EncodedAudio(body, f'"{digest[:32]}"'))
        with self.sending(principal, audio):
            yield audio

    @asynccontextmanager
    async def encoding(self, principal: str) -> AsyncIterator[None]:
        """Wait until nothing else is being encoded as a whole for a principal; then, it is its turn in the block."""
        lock = self._locks.setdefault(principal, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked():
                self._locks.pop(principal, None)

    @contextmanager
    def sending(self, principal: str, audio: EncodedAudio) -> Iterator[None]:
        """Count `audio` as being sent to a principal until the block ends; however often, it is in memory once.

        Raises:
            HttpError: too much is being sent to the principal.
        """
        sent = self._sending.setdefault(principal, Counter())
        self._check_size(sum(len(each.body) for each in sent if each is not audio), len(audio.body))
        sent[audio] += 1
        try:
            yield
        finally:
            sent[audio] -= 1
            if not sent[audio]:
                del sent[audio]
            if not sent:
                self._sending.pop(principal, None)

    def collect(self, principal: str, answer: object, size: int) -> None:
        """Count an answer that is collected to be sent to a principal in one piece.

        Args:
            principal: to whom it will be sent.
            answer: the same object until it is sent.
            size: bytes so far; 0 once it is sent, or given up.

        Raises:
            HttpError: there is too much of all such answers of the principal.
        """
        sizes = self._collected.setdefault(principal, {})
        sizes.pop(answer, None)
        if size:
            self._check_size(sum(sizes.values()), size)
            sizes[answer] = size
        elif not sizes:
            del self._collected[principal]

    def _check_size(self, others: int, size: int) -> None:
        """Refuse what is too much beside others; one by itself may always have its size."""
        if others and others + size > MAX_SENDING_BYTES:
            message = "too much encoded audio is being sent to you at once; read it, then ask for more"
            raise HttpError(ErrorCode.RATE_LIMITED, message, retry_after_s=2.0)

    def _find(self, key: tuple[str, float, str]) -> EncodedAudio | None:
        if audio := self._kept.get(key):
            self._kept.move_to_end(key)
        return audio

    def _keep(self, key: tuple[str, float, str], audio: EncodedAudio) -> EncodedAudio:
        self._kept[key] = audio
        self._kept_bytes += len(audio.body)
        while self._kept_bytes > MAX_KEPT_BYTES:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= len(oldest.body)
        return audio
