"""The client library for programs without Trio: the same calls, each of which blocks.

    with protocol.blocking.open_relay("ws://gpu.example.org:8765") as relay:
        with relay.submit("tts", {"text": "Hello"}) as stream:
            for pcm in stream.audio():
                player.write(pcm)
            print(stream.result())

Trio runs in a thread beside the program while the `open_relay` block lasts. Any thread may call, also several at the
same time. Ctrl-C ends the call that it interrupts; leaving the blocks then cancels the request as usual.
"""

import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import trio

from protocol.client import client
from protocol.client import inputs as sources
from protocol.client import stream as streams
from protocol.wire.frames import Frame, Video
from protocol.wire.messages import Queued, StatusReply, Welcome
from protocol.wire.structs import AudioFormat, VideoFormat
from protocol.wire.validators import Value

T = TypeVar("T")


class _Portal:
    """Runs async functions in a thread with Trio, for callers in other threads."""

    def __init__(self) -> None:
        self._begun: Future[trio.lowlevel.TrioToken] = Future()
        self._closed = trio.Event()
        self._open: dict[Future[None], trio.CancelScope] = {}
        self._thread = threading.Thread(target=self._run, name="protocol.blocking", daemon=True)

    def open(self) -> None:
        """Start the thread."""
        self._thread.start()
        self._token = self._begun.result()

    def close(self) -> None:
        """Stop the thread and everything that still runs in it."""
        self._token.run_sync_soon(self._closed.set)
        self._thread.join()

    def _run(self) -> None:
        trio.run(self._main)

    async def _main(self) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._begun.set_result(trio.lowlevel.current_trio_token())
            await self._closed.wait()
            nursery.cancel_scope.cancel()

    def call(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Run `function` in Trio's thread, and return or raise what it does.

        An exception in the calling thread, such as KeyboardInterrupt, cancels the function, waits for it to end and is
        then raised.
        """
        outcome: Future[T] = Future()
        scope = trio.CancelScope()
        self._start(function, args, outcome, scope)
        try:
            return outcome.result()
        except BaseException:
            if not outcome.done():
                self._token.run_sync_soon(scope.cancel)
                outcome.exception()
            raise

    @contextmanager
    def enter(self, block: AbstractAsyncContextManager[T]) -> Iterator[T]:
        """Yield the value of an async block, which a task of its own keeps open."""
        entered: Future[T] = Future()
        left: Future[None] = Future()
        leave = trio.Event()
        scope = trio.CancelScope()
        self._open[left] = scope

        async def hold() -> None:
            async with block as value:
                entered.set_result(value)
                await leave.wait()

        left.add_done_callback(partial(_pass_on, entered))
        left.add_done_callback(self._open.pop)
        self._start(hold, (), left, scope)
        try:
            yield entered.result()
        except BaseException:
            # Needed also if Ctrl-C came while the block was being entered.
            self._token.run_sync_soon(scope.cancel)
            left.exception()
            raise
        self._token.run_sync_soon(leave.set)
        left.result()

    def end_blocks(self, *, but: int) -> None:
        """Leave all open blocks except the first `but`, innermost first.

        Ctrl-C can arrive between the start of a block and the moment when the `with` statement notes it; such a block
        would never be left.
        """
        for left, scope in reversed(list(self._open.items())[but:]):
            self._token.run_sync_soon(scope.cancel)
            left.exception()

    def _start(
        self,
        function: Callable[..., Awaitable[T]],
        args: tuple[Any, ...],
        outcome: "Future[T]",
        scope: trio.CancelScope,
    ) -> None:
        async def task() -> None:
            with scope:
                try:
                    outcome.set_result(await function(*args))
                except trio.Cancelled:
                    raise
                except BaseException as fault:  # noqa: BLE001  it is raised again, in the caller's thread
                    outcome.set_exception(fault)
            if not outcome.done():
                outcome.set_exception(InterruptedError("the call was interrupted"))

        self._token.run_sync_soon(partial(self._nursery.start_soon, task))


def _pass_on(entered: "Future[Any]", left: "Future[None]") -> None:
    """Raise an error from before the block was entered in the thread that waits to enter it."""
    if not entered.done():
        entered.set_exception(left.exception() or RuntimeError("the block ended before it began"))


_END = object()


class _Waiting(Generic[T]):
    """A blocking iterator over an async one."""

    def __init__(self, portal: _Portal, steps: AsyncIterator[T]) -> None:
        self._portal = portal
        self._steps = steps

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        step: Any = self._portal.call(self._step)
        if step is _END:
            raise StopIteration
        result: T = step
        return result

    async def _step(self) -> Any:
        try:
            return await anext(self._steps)
        except StopAsyncIteration:
            return _END


class Stream:
    """The blocking form of `protocol.client.stream.Stream`.

    Iterate over it, or over `events()`, `audio()` or `video()`.
    """

    def __init__(self, portal: _Portal, stream: streams.Stream) -> None:
        self._portal = portal
        self._stream = stream
        self._frames = _Waiting[Frame](portal, stream)

    def __iter__(self) -> Iterator[Frame]:
        return self._frames

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self._stream.request_id

    @property
    def format(self) -> AudioFormat | None:
        """The format of the audio, once the first of it has arrived."""
        return self._stream.format

    @property
    def video_format(self) -> VideoFormat | None:
        """The format of the video, once the first of it has arrived."""
        return self._stream.video_format

    @property
    def place(self) -> Queued | None:
        """The last known place in the queue."""
        return self._stream.place

    def events(self) -> Iterator[streams.Event]:
        """The blocking form of `protocol.client.stream.Stream.events`."""
        return _Waiting(self._portal, self._stream.events())

    def audio(self, on_restart: Callable[[], None] | None = None) -> Iterator[bytes]:
        """Audio as it arrives; `on_restart` is called in Trio's thread and must not call this module."""
        return _Waiting(self._portal, self._stream.audio(on_restart))

    def video(self, on_restart: Callable[[], None] | None = None) -> Iterator[Video]:
        """Pictures as they arrive; `on_restart` as for `audio`."""
        return _Waiting(self._portal, self._stream.video(on_restart))

    def result(self) -> dict[str, Value]:
        """The blocking form of `protocol.client.stream.Stream.result`."""
        return self._portal.call(self._stream.result)

    def feed(self, name: str, data: sources.Piece) -> None:
        """The blocking form of `protocol.client.stream.Stream.feed`."""
        self._portal.call(self._stream.feed, name, data)

    def fed_bytes(self, name: str) -> int:
        """The blocking form of `protocol.client.stream.Stream.fed_bytes`."""
        return self._portal.call(self._stream.fed_bytes, name)

    def end_input(self, name: str) -> None:
        """The blocking form of `protocol.client.stream.Stream.end_input`."""
        self._portal.call(self._stream.end_input, name)


class Relay:
    """The blocking form of `protocol.client.client.RelayClient`; made by `open_relay`."""

    def __init__(self, portal: _Portal, relay: client.RelayClient) -> None:
        self._portal = portal
        self._relay = relay

    @property
    def welcome(self) -> Welcome:
        """What the relay sent at the last login."""
        return self._relay.welcome

    @contextmanager
    def submit(
        self,
        space: str,
        params: Mapping[str, Value] | None = None,
        *,
        inputs: "Mapping[str, InputSource] | None" = None,
        **options: Any,
    ) -> Iterator[Stream]:
        """Submit a request.

        Args:
            space: name of the space.
            params: valid for the space's schema.
            inputs: as for `protocol.client.client.RelayClient.submit`, but what feeds a live input is an ordinary
                iterator, which is read in a thread of its own.
            options: as for that function.
        """
        made = {name: _unblocked(source) for name, source in (inputs or {}).items()}
        with self._portal.enter(self._relay.submit(space, params, inputs=made, **options)) as stream:
            yield Stream(self._portal, stream)

    @contextmanager
    def attach(self, request_id: str, after_seq: int = -1, *, attempt: int = 0) -> Iterator[Stream]:
        """Read the frames of a request; see `protocol.client.client.RelayClient.attach`."""
        with self._portal.enter(self._relay.attach(request_id, after_seq, attempt=attempt)) as stream:
            yield Stream(self._portal, stream)

    def cancel(self, request_id: str, reason: str = "") -> StatusReply:
        """Cancel a request; see `protocol.client.client.RelayClient.cancel`."""
        return self._portal.call(self._relay.cancel, request_id, reason)

    def status(self, request_id: str) -> StatusReply:
        """The current state of a request; see `protocol.client.client.RelayClient.status`."""
        return self._portal.call(self._relay.status, request_id)

    def spaces(self) -> list[dict[str, Value]]:
        """The spaces that this principal may use."""
        return self._portal.call(self._relay.spaces)


Whole = bytes | bytearray | memoryview | Path
InputSource = (
    Whole | Iterable[sources.Piece] | sources.Live | sources.From | tuple[Whole | Iterable[sources.Piece], str]
)


def _unblocked(source: InputSource) -> sources.InputSource:
    if isinstance(source, tuple):
        return _fed_or_whole(source[0]), source[1]
    return source if isinstance(source, sources.Live | sources.From) else _fed_or_whole(source)


def _fed_or_whole(source: Whole | Iterable[sources.Piece]) -> bytes | Path | AsyncIterator[sources.Piece]:
    if isinstance(source, Path):
        return source
    if isinstance(source, str):  # it would be fed character by character
        raise ValueError("an input is bytes, a Path, or what yields its pieces: encode a text, or put it into a list")
    return bytes(source) if isinstance(source, bytes | bytearray | memoryview) else _in_thread(source)


async def _in_thread(pieces: Iterable[sources.Piece]) -> AsyncIterator[sources.Piece]:
    limiter = trio.CapacityLimiter(1)  # it may block for long, and must not use up the threads of others
    steps = iter(pieces)
    while True:
        piece: Any = await trio.to_thread.run_sync(next, steps, _END, abandon_on_cancel=True, limiter=limiter)
        if piece is _END:
            return
        yield piece


@contextmanager
def open_relay(url: str | None = None, **options: Any) -> Iterator[Relay]:
    """Connect to a relay; options as for `protocol.client.client.open_relay`. Callbacks run in Trio's thread."""
    portal = _Portal()
    portal.open()
    try:
        with portal.enter(client.open_relay(url, **options)) as relay:
            try:
                yield Relay(portal, relay)
            finally:
                portal.end_blocks(but=1)
    finally:
        portal.close()
