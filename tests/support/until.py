"""Waiting for what other tasks do."""

from collections.abc import Callable

import trio


async def until(true: Callable[[], bool]) -> None:
    """Wait until other tasks have made it true."""
    with trio.fail_after(10):
        while not true():  # noqa: ASYNC110  there is no event for it
            await trio.sleep(0.002)
