"""Feeds the live inputs of a request from iterators, beside the block that reads it."""

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager

import trio

from protocol.client.inputs import Piece
from protocol.client.stream import Stream
from protocol.wire.errors import InputClosed, LinkError, ProtocolError, RequestError

#: What `Stream.feed` and `Stream.end_input` raise because the stream has ended.
_ENDS = (InputClosed, LinkError, ProtocolError, RequestError)


@asynccontextmanager
async def open_feeders(
    stream: Stream, sources: Mapping[str, AsyncIterable[Piece]], faults: list[Exception]
) -> AsyncIterator[None]:
    """Feed the live inputs of a request from iterators until the block ends.

    An exception of an iterator cancels the block and is raised by it. One of the block is raised unchanged, not in the
    group that a nursery would make of it.

    Args:
        stream: the request.
        sources: name of the live input -> what yields it.
        faults: exceptions of iterators are added to it.
    """
    block = trio.CancelScope()
    block_fault: BaseException | None = None

    async def feed(name: str, pieces: AsyncIterable[Piece]) -> None:
        try:
            await _feed_all(stream, name, pieces)
        except Exception as fault:  # noqa: BLE001  raised again below, outside the nursery
            faults.append(fault)
            block.cancel()

    async with trio.open_nursery() as nursery:
        for name, pieces in sources.items():
            nursery.start_soon(feed, name, pieces)
        try:
            with block:
                yield
        except BaseException as fault:  # noqa: BLE001  likewise
            block_fault = fault
        nursery.cancel_scope.cancel()
    if block_fault is not None:
        raise block_fault
    if faults:
        raise faults[0]


async def _feed_all(stream: Stream, name: str, pieces: AsyncIterable[Piece]) -> None:
    async with AsyncExitStack() as stack:
        if isinstance(pieces, AsyncGenerator):
            await stack.enter_async_context(aclosing(pieces))
        async for piece in pieces:
            try:
                await stream.feed(name, piece)
            except _ENDS:
                if stream.ended:
                    return  # whoever reads the stream is told why
                raise
    try:
        await stream.end_input(name)
    except _ENDS:
        if not stream.ended:
            raise
