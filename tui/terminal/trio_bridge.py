"""Trio as a guest in Textual's asyncio loop: the only module that knows both (STYLE, Textual)."""

import asyncio
from collections.abc import Awaitable, Callable

import outcome
import trio


class Bridge:
    """Runs one Trio main function in the loop that is running, in the same thread.

    Trio code may so call the screen's plain functions directly, and the screen may call Trio's `..._nowait` ones.
    """

    def __init__(self) -> None:
        self._scope = trio.CancelScope()
        self._done: asyncio.Event | None = None
        #: What the main function fell over, if it did.
        self.fault: BaseException | None = None

    def start(self, main: Callable[[], Awaitable[None]], failed: Callable[[BaseException], None]) -> None:
        """Begin, inside the running asyncio loop.

        Args:
            main: runs until `stop` cancels it.
            failed: told what it raised, in the loop's thread.
        """
        loop = asyncio.get_running_loop()
        done = self._done = asyncio.Event()

        async def guest() -> None:
            with self._scope:
                await main()

        def finished(result: "outcome.Outcome[None]") -> None:
            if isinstance(result, outcome.Error):
                self.fault = result.error
                failed(result.error)
            done.set()

        trio.lowlevel.start_guest_run(
            guest,
            run_sync_soon_threadsafe=loop.call_soon_threadsafe,
            run_sync_soon_not_threadsafe=loop.call_soon,
            done_callback=finished,
            # asyncio owns the wakeup fd; Trio would warn, and take it.
            host_uses_signal_set_wakeup_fd=True,
            strict_exception_groups=True,
        )

    async def stop(self) -> None:
        """Cancel it, and wait for its clean-up: with the loop gone before that, it would silently be lost."""
        if self._done is not None:
            self._scope.cancel()
            await self._done.wait()
