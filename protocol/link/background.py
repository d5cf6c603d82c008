"""Runs a task beside a block without wrapping the block's own exceptions in groups."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def open_background(
    work: Callable[[], Awaitable[None]], stop: Callable[[], Awaitable[None]]
) -> AsyncIterator[None]:
    """Run `work` until the block ends; an exception of the block is raised unchanged.

    A plain nursery around a `yield` would wrap every exception of the caller's block in a group, so that
    `except RequestFailed` around `async with open_relay()` would not match.

    Args:
        work: shielded from the block's cancellation, so that it can end in order. An exception that it raises is a
            bug: it cancels the block and is raised in a group.
        stop: awaited, shielded, when the block has ended for whatever reason; it must make `work` return.
    """
    fault: BaseException | None = None
    ended = trio.Event()

    # Ctrl-C is for the program's own code: here it would end the link before the closing handshake.
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
