"""A slot whose engine runs in a thread of this process, for `gpuworker.embed` and load tests."""

import logging
import queue
import threading
from collections.abc import Callable, Mapping

import attrs
import trio

from gpuworker.engines.base import Capabilities, Chunk, Engine, EngineError, LiveInput, OptionError, error_text
from gpuworker.slots.feed import Feed
from gpuworker.slots.process_slot import CANCEL_GRACE_S, RESTART_FIRST_S, RESTART_LONGEST_S
from gpuworker.slots.run_engine import RunResult, run_engine
from gpuworker.slots.slot import Job, Run, Slot
from gpuworker.speaking.speaking import with_live_text
from protocol.link.backoff import Backoff

log = logging.getLogger("gpuworker.slot")


@attrs.define(eq=False)
class _ThreadJob:
    """A job on its way to the thread."""

    job: Job
    run: Run
    live: Mapping[str, LiveInput]
    stopped: threading.Event = attrs.field(factory=threading.Event)

    def stop(self) -> None:
        """Ask the engine to stop, also one that waits for more of a live input."""
        self.stopped.set()
        for live in self.live.values():
            live.stop()


class ThreadSlot(Slot):
    """A slot in a thread. It contains nothing: a crash ends the whole program, and a hang cannot be killed.

    A run that does not stop within the grace is abandoned: its request ends as cancelled, its further output is thrown
    away, and the slot is out of service until the thread returns.

    Args:
        index: from 0.
        make_engine: called in the slot's thread, each time the engine starts.
        cancel_grace_s: seconds from a cancel until the run is abandoned.
    """

    def __init__(
        self, index: int, make_engine: Callable[[], Engine], *, cancel_grace_s: float = CANCEL_GRACE_S
    ) -> None:
        super().__init__(index)
        self._make_engine = make_engine
        self._cancel_grace_s = cancel_grace_s
        self._orders: queue.SimpleQueue[_ThreadJob | None] = queue.SimpleQueue()
        self._order: _ThreadJob | None = None

    async def serve(self) -> None:
        """Load the engine and keep it alive, in a new thread after each death."""
        backoff = Backoff(RESTART_FIRST_S, RESTART_LONGEST_S)
        while True:
            ended = trio.Event()
            self._orders = queue.SimpleQueue()
            token = trio.lowlevel.current_trio_token()
            began = trio.current_time()
            # A daemon thread: the program's exit must not wait for a run. Trio's own threads are shared, and an engine
            # may want all its calls in one thread.
            threading.Thread(
                target=self._live, args=(token, self._orders, ended), name=f"gpuworker-{self.index}", daemon=True
            ).start()
            try:
                await ended.wait()
            finally:
                if self._order is not None:
                    self._order.stop()
                self._orders.put(None)
            if self.broken:
                await trio.sleep_forever()
            backoff.note_uptime(trio.current_time() - began)
            await trio.sleep(backoff.next_s())

    # -- in the thread

    def _live(
        self, token: trio.lowlevel.TrioToken, orders: "queue.SimpleQueue[_ThreadJob | None]", ended: trio.Event
    ) -> None:
        def call_in_trio(call: Callable[..., object], *arguments: object) -> None:
            trio.from_thread.run_sync(call, *arguments, trio_token=token)

        try:
            try:
                engine = self._make_engine()
                engine.load()
                (seat,) = engine.seats(1) if engine.SHARED else [engine]
                capabilities = with_live_text(engine.capabilities)
            except (EngineError, OptionError) as fault:
                call_in_trio(self._load_failed, error_text(fault))
            except Exception as fault:
                log.exception("%s: the engine cannot be loaded", self.name)
                call_in_trio(self._load_failed, f"{type(fault).__name__}: {error_text(fault)}")
            else:
                call_in_trio(self._loaded, capabilities)
                while (order := orders.get()) is not None:
                    run = order.run

                    def emit(chunk: Chunk, run: Run = run) -> None:
                        call_in_trio(self._emitted, run, chunk)

                    job, inputs = order.job, {**order.job.inputs, **order.live}
                    end = run_engine(seat, job.params, inputs, order.stopped.is_set, emit, job.context)
                    order.stop()  # a thread of the engine's own may still wait for more
                    call_in_trio(self._run_ended, run, end)
                    if end.restart:
                        break
                try:
                    engine.close()
                except Exception:
                    log.exception("%s: the engine cannot be closed", self.name)
            call_in_trio(ended.set)
        except trio.RunFinishedError:
            return  # the worker has ended; there is nobody left to notify

    # -- in Trio

    def _loaded(self, capabilities: Capabilities) -> None:
        self.capabilities = capabilities
        self._set_ready(True)

    def _load_failed(self, fault: str) -> None:
        log.error("%s: the engine cannot be loaded: %s", self.name, fault)
        self._set_ready(False, fault)

    def _emitted(self, run: Run, chunk: Chunk) -> None:
        if run is self._run and run.end is None:
            run.emit(chunk)

    def _run_ended(self, run: Run, end: RunResult) -> None:
        self._order = None
        if end.process_broken:
            self.broken = f"the GPU cannot be used by this program any more ({end.message}); start the program again"
            self.on_change()
        self._set_ready(not end.restart)
        run.finish(end)

    async def _start(self, job: Job, run: Run) -> None:
        token = trio.lowlevel.current_trio_token()

        def live(feed: Feed) -> LiveInput:
            def on_ask(taken: int) -> None:
                trio.from_thread.run_sync(feed.note_taken, taken, trio_token=token)

            return LiveInput(feed.media_type, on_ask)

        self._order = _ThreadJob(job, run, {name: live(feed) for name, feed in job.feeds.items()})
        self._orders.put(self._order)

    def _feed(self, name: str, data: bytes, last: bool) -> None:
        if self._order is not None:
            self._order.live[name].feed(data, last=last)

    async def _stop_when_asked(self, run: Run) -> None:
        await run.cancel_asked.wait()
        if self._order is not None:
            self._order.stop()
        await trio.sleep(self._cancel_grace_s)
        if run.end is not None:
            return  # it ended in the very last moment
        log.warning("%s: did not stop within %g s of a cancel; abandoned", self.name, self._cancel_grace_s)
        self._set_ready(False)  # until `_run_ended`
        run.finish(RunResult(outcome="cancelled"))

    def _force(self, run: Run) -> None:
        if self._order is not None:
            self._order.stop()
            self._set_ready(False)
