"""Runs Trio as a guest in Textual's asyncio loop; the only module that imports both."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import outcome
import trio

#: How long the function's clean-up may take at the end, before it is left behind.
STOP_S = 5.0


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
            done.set()  # first: whoever waits for the end must not wait for ever if `failed` raises
            if isinstance(result, outcome.Error):
                self.fault = result.error
                failed(result.error)

        def tick(step: Callable[[], object]) -> None:
            try:
                step()
            except BaseException as fault:
                # A step that raises (no thread can be started to wait for I/O) is the last one, and says so to nobody.
                if not done.is_set():
                    finished(outcome.Error(fault))
                raise

        trio.lowlevel.start_guest_run(
            guest,
            run_sync_soon_threadsafe=lambda step: loop.call_soon_threadsafe(tick, step),
            run_sync_soon_not_threadsafe=lambda step: loop.call_soon(tick, step),
            done_callback=finished,
            # asyncio owns the wakeup fd; otherwise Trio would take it and warn.
            host_uses_signal_set_wakeup_fd=True,
            strict_exception_groups=True,
        )

    async def stop(self) -> bool:
        """Cancel the function and wait for its clean-up, which would be lost if the loop ended first.

        Returns:
            whether it has ended. One that has not after `STOP_S` is left behind, so that the screen can end.
        """
        if self._done is None:
            return True
        self._scope.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                await self._done.wait()
        return self._done.is_set()
