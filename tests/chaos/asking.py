"""How the clients that use HTTP ask: on a connection for each question, and again until it is answered."""

import ssl
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Self

import attrs
import h11
import trio

from tests.chaos.clients import AGAIN_S
from tests.chaos.proxy import Line
from tests.chaos.report import Ledger
from tests.support.timed_http_client import Answer, ask_on, open_stream

#: Silence after which a connection is given up and opened again: HTTP has no sign of life of its own.
SILENCE_S = 4.0
#: How a connection ends in this storm.
BROKEN = (OSError, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, h11.RemoteProtocolError)
WAV_HEADER_BYTES = 44
#: Answers after which a program asks again: too much at once, not now, and that the disk is too slow to tell.
LATER = (429, 503, 507)


@attrs.frozen
class Pieces:
    """The pieces of a body, as they arrive; no generator, which would have to be closed where reading ends early."""

    answer: Answer
    silence_s: float = SILENCE_S

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        with trio.fail_after(self.silence_s):
            piece = await self.answer.piece()
        if piece is None:
            raise StopAsyncIteration
        return piece


@attrs.define(eq=False)
class WebPeer:
    """One program, with its line; each question has a connection of its own."""

    name: str
    line: Line
    ledger: Ledger
    token: str
    seed: int
    tls: ssl.SSLContext | None

    @property
    def counts(self) -> Counter[str]:
        """The figures of the run."""
        return self.ledger.counts

    @asynccontextmanager
    async def ask(self, method: str, path: str, *, silence_s: float = SILENCE_S, **more: Any) -> AsyncIterator[Answer]:
        """Ask on a connection of its own; the block begins with the head of the answer."""
        url = f"{'http' if self.tls is None else 'https'}://127.0.0.1:{self.line.port}"
        with trio.fail_after(silence_s) as patience:
            async with open_stream(url, self.tls) as stream:
                answer = await ask_on(stream, method, path, token=self.token, **more)
                patience.deadline = float("inf")
                yield answer

    async def until_answered(self, who: str, method: str, path: str, **more: Any) -> tuple[Answer, bytes]:
        """Ask until there is an answer that is not to ask later."""
        while True:
            try:
                with trio.fail_after(2 * SILENCE_S):
                    async with self.ask(method, path, **more) as answer:
                        body = await answer.body()
                if answer.status not in LATER:
                    return answer, body
                self.counts[f"HTTP answers {answer.status}"] += 1
            except BROKEN as fault:
                self.broken(who, fault)
            await trio.sleep(AGAIN_S)

    def broken(self, who: str, fault: BaseException) -> None:
        """Note that a connection broke."""
        self.counts["HTTP responses cut"] += 1
        self.ledger.note(who, f"its connection broke: {fault!r}")
