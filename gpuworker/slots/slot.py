"""The base class of slots: each has room for one running request, whatever runs its engine."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial

import attrs
import trio

from gpuworker.engines.base import (
    Capabilities,
    Chunk,
    EngineInput,
    FormatChunk,
    ProgressChunk,
    RequestContext,
    error_text,
)
from gpuworker.slots.feed import Feed
from gpuworker.slots.run_engine import RunResult
from protocol.wire.errors import ErrorCode
from protocol.wire.validators import Value

log = logging.getLogger("gpuworker.slot")


@attrs.frozen
class Job:
    """A request for a slot to run: `inputs` has the whole ones, `feeds` the live ones."""

    params: dict[str, Value]
    inputs: Mapping[str, EngineInput] = attrs.field(factory=dict)
    context: RequestContext = attrs.field(factory=RequestContext)
    feeds: Mapping[str, Feed] = attrs.field(factory=dict)


class Run:
    """A job in a slot, from its start to its end.

    Attributes:
        made_something: the engine has begun with it in earnest: it has made output, or reported progress above 0.
        end: how it ended; None before.
    """

    def __init__(self, emit: Callable[[Chunk], None]) -> None:
        self.made_something = False
        self._emit = emit
        self._fault: RunResult | None = None
        self.end: RunResult | None = None
        self.ended = trio.Event()
        self.cancel_asked = trio.Event()

    def emit(self, chunk: Chunk) -> None:
        """Pass a chunk on. Never raises: an error in the receiver stops this run, but not the slot."""
        if not self.made_something:
            is_sign = chunk.fraction > 0 if isinstance(chunk, ProgressChunk) else not isinstance(chunk, FormatChunk)
            self.made_something = is_sign
        if self._fault is None:
            try:
                self._emit(chunk)
            except Exception as fault:
                log.exception("the engine's output cannot be processed")
                self.fail(fault)

    def fail(self, fault: Exception) -> None:
        """Stop the run, and let it end as failed."""
        self._fault = RunResult.failed(
            ErrorCode.ENGINE_FAILED, f"the engine's output cannot be processed: {error_text(fault)}"
        )
        self.cancel_asked.set()

    def finish(self, end: RunResult) -> None:
        """End the run; only the first call counts. A run that was asked to stop always ends as cancelled."""
        if self.end is None:
            if self._fault is not None:
                end = attrs.evolve(self._fault, restart=end.restart, report=end.report)
            elif end.outcome == "failed" and self.cancel_asked.is_set():
                end = RunResult(outcome="cancelled", restart=end.restart, report=end.report)
            self.end = end
            self.ended.set()


class Slot(ABC):
    """Room for one running request.

    Attributes:
        index: from 0, among the worker's slots.
        ready: its engine is loaded and alive.
        busy: a job runs in it.
        capabilities: those of its engine, None until it has been loaded once.
        load_fault: why the last load failed; empty if it succeeded.
        shared: its engine's process serves other slots too, so that its end ends their runs.
        broken: why no engine can run in this program again; empty if one can.
        on_change: called, in the Trio thread, after each change of `ready`, `busy` or `load_fault`.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.ready = False
        self.shared = False
        self.capabilities: Capabilities | None = None
        self.load_fault = ""
        self.broken = ""
        self.on_change: Callable[[], None] = lambda: None
        self._run: Run | None = None

    @property
    def name(self) -> str:
        """The slot's name in the log."""
        return f"slot {self.index}"

    @property
    def busy(self) -> bool:
        """Whether a job runs in it."""
        return self._run is not None

    @property
    def stopping(self) -> Run | None:
        """The run that was asked to stop and has not ended yet."""
        return self._run if self._run is not None and self._run.cancel_asked.is_set() else None

    @property
    def free(self) -> bool:
        """Whether `run` may be called now."""
        return self.ready and not self.busy

    @abstractmethod
    async def serve(self) -> None:
        """Load the engine and keep it alive, with a new one after each death; never returns."""

    async def run(self, job: Job, emit: Callable[[Chunk], None]) -> RunResult:
        """Run a job to its end. Call it only while the slot is `free`.

        Args:
            job: its params are checked, its whole inputs complete. Its feeds are closed at the end.
            emit: called in the Trio thread with each chunk, a `FormatChunk` first. It never waits, so the engine
                never waits for a slow reader; whoever stores the chunks limits them by calling `cancel`.

        Cancellation: the engine is stopped, by force if possible; the slot then starts again.
        """
        assert self.free
        self._run = run = Run(emit)
        self.on_change()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._stop_when_asked, run)
                await self._start(job, run)
                for name, feed in job.feeds.items():
                    feed.flow_into(partial(self._feed, name))
                await run.ended.wait()
                nursery.cancel_scope.cancel()
        finally:
            self._run = None
            for feed in job.feeds.values():
                feed.close()
            if run.end is None:
                self._force(run)
            self.on_change()
        assert run.end is not None
        return run.end

    def cancel(self) -> None:
        """Ask the current run to stop before its next chunk; `run` then returns within the grace."""
        if self._run is not None:
            self._run.cancel_asked.set()

    @abstractmethod
    async def _start(self, job: Job, run: Run) -> None:
        """Give the job to the engine."""

    @abstractmethod
    def _feed(self, name: str, data: bytes, last: bool) -> None:
        """Give a piece of a live input to the engine of the run that has started; never waits."""

    @abstractmethod
    async def _stop_when_asked(self, run: Run) -> None:
        """Wait for `cancel_asked`, pass it on, and use force after the grace."""

    @abstractmethod
    def _force(self, run: Run) -> None:
        """End the run immediately, by any means."""

    def _set_ready(self, ready: bool, load_fault: str = "") -> None:
        if (ready, load_fault) != (self.ready, self.load_fault):
            self.ready, self.load_fault = ready, load_fault
            self.on_change()
