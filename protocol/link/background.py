"""A task that runs beside a block, without making exception groups of the block's own exceptions."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def open_background(
    work: Callable[[], Awaitable[None]], stop: Callable[[], Awaitable[None]]
) -> AsyncIterator[None]:
    """Run `work` until the block ends; what the block raises comes out as it is.

    A plain nursery around a `yield` would wrap every exception of the caller's block in a group, so that
    `except RequestFailed` around `async with open_relay()` would not match.

    Args:
        work: shielded from the block's cancellation, so that it can end in order. An exception of its own is a
            bug: it cancels the block and comes out in a group.
        stop: awaited, shielded, when the block has ended for whatever reason; it must make `work` return.
    """
    fault: BaseException | None = None
    ended = trio.Event()

    # Ctrl-C is for the program's own code: in here it would end the link before it could say goodbye.
    @trio.lowlevel.enable_ki_protection
    async def shielded() -> None:
        with trio.CancelScope(shield=True):
            try:
                await work()
            finally:
                ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(shielded)
        try:
            yield
        except BaseException as raised:  # noqa: BLE001  raised again below, outside the nursery
            fault = raised
        with trio.CancelScope(shield=True):
            await stop()
            await ended.wait()
    if fault is not None:
        raise fault
