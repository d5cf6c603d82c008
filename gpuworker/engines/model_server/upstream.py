"""An HTTP client on a Trio loop in a thread of its own, for engines, whose code is not asynchronous.

Any number of threads may ask at once. Whoever waits for an answer looks for a cancel meanwhile, and the request that
it gives up is closed at once, whether its head, a stalled body or the connection itself is awaited.
"""

import contextlib
import math
import queue
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import trio

from gpuworker.engines.base import EngineError
from gpuworker.engines.model_server.refusals import ServerBusy
from protocol.wire.validators import Value

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")

CONNECT_S = 5.0
#: Between two looks for a cancel.
LOOK_S = 0.05
#: From a cancel until the connection is closed: TLS may say goodbye first.
CLOSE_S = 1.0
#: Pieces that wait for the engine, of at most 64 KiB each. Beyond them the server waits.
MAX_PIECES = 16
#: Limits of an error or a list.
MAX_TEXT_BYTES = 1024 * 1024
TEXT_S = 5.0


def _never() -> bool:
    return False


@attrs.frozen
class Head:
    """The head of an answer: its status, and its headers by name in lower case."""

    status: int
    headers: Mapping[str, str]


class Upstream:
    """A client of one server.

    Args:
        url: where the server's paths begin.
        key: sent as a bearer token; None for none.
        silence_s: how long the server may be silent, before its head and within a body.
        server: what errors call it.
    """

    def __init__(self, url: str, key: str | None, silence_s: float, server: str) -> None:
        self._url = url
        self._key = (key or "").encode()
        self.server = server
        self._headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._silence_s = silence_s
        self._closing = trio.Event()
        self._open: set[Exchange] = set()
        self._token: trio.lowlevel.TrioToken | None = None

    def open(self) -> None:
        """Start the thread; returns once it can be asked."""
        opened: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def live() -> None:
            try:
                trio.run(self._serve, opened)
            except BaseException as fault:  # noqa: BLE001 - raised where it is known, in `open`
                opened.put(fault)

        threading.Thread(target=live, name="model-server", daemon=True).start()
        if (fault := opened.get()) is not None:
            raise fault

    def close(self) -> None:
        """Give up all requests, and end the thread."""
        if self._token is not None:
            self._in_loop(self._closing.set)

    def hide_key(self, data: bytes) -> bytes:
        """Take the key out of what the server says of it."""
        return data.replace(self._key, b"(the key)") if self._key else data

    @contextlib.contextmanager
    def ask(
        self,
        method: str,
        path: str,
        body: Value = None,
        *,
        query: Mapping[str, str] | None = None,
        cancelled: Callable[[], bool] = _never,
    ) -> Iterator["Exchange"]:
        """Send a request; what is unread of its answer at the end of the block is given up.

        Args:
            method: of HTTP.
            path: after the server's URL.
            body: what to send as JSON; None for nothing.
            query: after the path.
            cancelled: whether to stop waiting; called every `LOOK_S`.
        """
        exchange = Exchange(self, cancelled, self._open)
        client, url = self._client, self._url + path
        self._in_loop(exchange.begin, self._nursery, lambda: client.stream(method, url, json=body, params=query))
        try:
            yield exchange
        finally:
            exchange.close()

    async def _serve(self, opened: "queue.SimpleQueue[BaseException | None]") -> None:
        import httpx2

        self._token = trio.lowlevel.current_trio_token()
        timeout = httpx2.Timeout(self._silence_s, connect=CONNECT_S, pool=None)
        # A connection a request: on a local network it costs nothing, and none is found closed by the server when the
        # next request is on its way. The environment's proxies are for the internet, but not its SSL_CERT_FILE, which
        # the standard library reads; that takes 0.3 s, so plain HTTP does without.
        async with (
            httpx2.AsyncClient(
                headers=self._headers,
                timeout=timeout,
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
                trust_env=False,
                verify=ssl.create_default_context() if self._url.startswith("https:") else False,
            ) as self._client,
            trio.open_nursery() as self._nursery,
        ):
            opened.put(None)
            await self._closing.wait()
            self._nursery.cancel_scope.cancel()

    def _in_loop(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return trio.from_thread.run_sync(call, *arguments, trio_token=self._token)
        except trio.RunFinishedError:
            raise _ended() from None

    def wait_in_loop(self, call: Callable[[], Awaitable[T]]) -> T:
        """Run an asynchronous function in the loop, and wait for it."""
        try:
            return trio.from_thread.run(call, trio_token=self._token)
        except (trio.RunFinishedError, trio.Cancelled):
            raise _ended() from None


class Exchange:
    """One request and its answer; used by one thread."""

    def __init__(self, upstream: Upstream, cancelled: Callable[[], bool], together: set["Exchange"]) -> None:
        self._upstream = upstream
        self._cancelled = cancelled
        #: Those that the server has not answered completely; only the loop uses it.
        self._together = together
        self._scope = trio.CancelScope()
        self._begun, self._ended = trio.Event(), trio.Event()
        self._head: Head | None = None
        self._complete = False
        self._fault = _ended()

    # -- in the engine's thread

    def head(self, until: float = math.inf) -> Head | None:
        """Wait for the head of the answer; None after a cancel, or after this time of `time.monotonic`.

        Raises:
            ServerBusy: the server cannot be reached.
            EngineError: the connection was lost, or the server was silent for too long.
        """
        while not self._cancelled() and time.monotonic() < until:
            if self._upstream.wait_in_loop(self._is_begun):
                if self._head is None:
                    raise self._fault
                return self._head
        return None

    def pieces(self, until: float = math.inf) -> Iterator[bytes]:
        """The body as it arrives, until a cancel, or until this time of `time.monotonic`.

        Raises:
            EngineError: the connection was lost, or the server was silent for too long.
        """
        while not self._cancelled() and time.monotonic() < until:
            data = self._upstream.wait_in_loop(self._next)
            if data is None:
                return
            if data:
                yield data

    def read_text(self) -> bytes:
        """The body of an error or a list, as much of it as arrives within `MAX_TEXT_BYTES` and `TEXT_S`."""
        body = bytearray()
        with contextlib.suppress(EngineError):
            for data in self.pieces(time.monotonic() + TEXT_S):
                body += data
                if len(body) > MAX_TEXT_BYTES:
                    break
        return self._upstream.hide_key(bytes(body[:MAX_TEXT_BYTES]))

    def close(self) -> None:
        """Give up what has not arrived, and close the connection."""
        with contextlib.suppress(EngineError):
            self._upstream.wait_in_loop(self._close)

    # -- in the loop

    def begin(
        self, nursery: trio.Nursery, request: Callable[[], AbstractAsyncContextManager["httpx2.Response"]]
    ) -> None:
        """Start the task that sends the request."""
        self._together.add(self)
        self._connected_by = trio.current_time() + 2 * CONNECT_S  # TLS may take as long again
        self._send, self._receive = trio.open_memory_channel[bytes](MAX_PIECES)
        nursery.start_soon(self._run, request)

    async def _run(self, request: Callable[[], AbstractAsyncContextManager["httpx2.Response"]]) -> None:
        try:
            with self._scope, self._send:
                async with request() as answer:
                    self._head = Head(answer.status_code, {name.lower(): text for name, text in answer.headers.items()})
                    self._begun.set()
                    async for data in answer.aiter_bytes():
                        # Given up, it must end within the client's generators, which nobody would close otherwise.
                        with trio.CancelScope(shield=True), contextlib.suppress(trio.BrokenResourceError):
                            await self._send.send(data)
                    self._complete = True
        except Exception as fault:  # noqa: BLE001 - the one broad catch for a request
            others = any(each.is_connected for each in self._together - {self})
            self._fault = _translated(fault, self._upstream.server, begun=self._head is not None, others=others)
            self._fault.add_note(_reason(fault))
        finally:
            self._together.discard(self)
            self._begun.set()
            self._ended.set()

    @property
    def is_connected(self) -> bool:
        """Whether the server works on it, so that it is there; false while that is not known."""
        return self._head is not None or trio.current_time() > self._connected_by

    async def _is_begun(self) -> bool:
        with trio.move_on_after(LOOK_S):
            await self._begun.wait()
        return self._begun.is_set()

    async def _next(self) -> bytes | None:
        """All of the body that has arrived: b"" if nothing came within `LOOK_S`, None at its end."""
        with trio.move_on_after(LOOK_S):
            try:
                pieces = [await self._receive.receive()]
            except trio.EndOfChannel:
                if not self._complete:
                    raise self._fault from None
                return None
            with contextlib.suppress(trio.WouldBlock, trio.EndOfChannel):
                while True:
                    pieces.append(self._receive.receive_nowait())
            return b"".join(pieces)
        return b""

    async def _close(self) -> None:
        self._scope.cancel()
        self._receive.close()
        with trio.move_on_after(CLOSE_S):
            await self._ended.wait()


def _ended() -> EngineError:
    return EngineError("the engine's HTTP client has ended", retryable=True, restart=True)


def _reason(fault: BaseException) -> str:
    """What is behind an exception of the HTTP client, which itself may say nothing (of a certificate, for example)."""
    while not str(fault) and (behind := fault.__cause__ or fault.__context__) is not None:
        fault = behind
    return f"{type(fault).__name__}: {fault}"


def _translated(fault: Exception, server: str, *, begun: bool, others: bool) -> EngineError:
    """The error that an exception of the HTTP client stands for, in words for clients: its own name addresses.

    Args:
        fault: what the client raised.
        server: what the server is.
        begun: whether there was a head.
        others: whether the server works on other requests.
    """
    import httpx2

    if isinstance(fault, httpx2.ConnectError | httpx2.ConnectTimeout):
        return ServerBusy(f"{server} cannot be reached; try again later", away=not others)
    if isinstance(fault, httpx2.TimeoutException):
        return EngineError(
            f"{server} was silent for too long; if it makes the whole answer before it sends any, the worker's owner "
            "raises -o silence_s",
            retryable=True,
        )
    if isinstance(fault, httpx2.TransportError):
        when = "in mid-stream" if begun else "before it answered"
        return EngineError(f"the connection to {server} was lost {when}; send the request again", retryable=True)
    return EngineError(f"{server} cannot be used: {type(fault).__name__}; its owner finds more in the worker's log")
