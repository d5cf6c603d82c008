"""Runs Trio as a guest in Textual's asyncio loop; the only module that imports both."""

import asyncio
from collections.abc import Awaitable, Callable

import outcome
import trio


class Bridge:
    """Runs one Trio function in the running asyncio loop, in the same thread.

    So Trio code may call plain functions of the screen directly, and the screen may call Trio's `..._nowait` functions.
    """

    def __init__(self) -> None:
        self._scope = trio.CancelScope()
        self._done: asyncio.Event | None = None
        #: The exception that ended the function, if any.
        self.fault: BaseException | None = None

    def start(self, main: Callable[[], Awaitable[None]], failed: Callable[[BaseException], None]) -> None:
        """Start Trio inside the running asyncio loop.

        Args:
            main: the Trio function; it runs until `stop` cancels it.
            failed: called with the exception that it raised, in the loop's thread.
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
            # asyncio owns the wakeup fd; otherwise Trio would take it and warn.
            host_uses_signal_set_wakeup_fd=True,
            strict_exception_groups=True,
        )

    async def stop(self) -> None:
        """Cancel the function and wait for its clean-up, which would be lost if the loop ended first."""
        if self._done is not None:
            self._scope.cancel()
            await self._done.wait()
