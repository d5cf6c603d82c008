"""Slots: room for one running request each. `ProcessSlot` runs its engine in a process of its own."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import trio

from gpuworker.engines.base import Capabilities, Chunk, EngineInput, OptionValue, error_text
from gpuworker.slots import ipc
from gpuworker.slots.engine_process import EngineProcess, open_child
from gpuworker.slots.run_engine import RunResult
from protocol.link.backoff import Backoff
from protocol.wire.errors import ErrorCode
from protocol.wire.validators import Value

#: Between a slot's death and its next process, doubling; a crash loop must not eat the machine.
RESTART_FIRST_S = 0.2
RESTART_LONGEST_S = 60.0
#: From one sign of life of a load to the next, or to its end: a model of some GB from a slow disk takes minutes.
#: A download gives signs of life; a limit to all of it would kill one from a slow network again and again, as the
#: hub's library begins anew each time.
LOAD_TIMEOUT_S = 900.0
#: From a cancel to the kill. Longer than any chunk takes to make: a killed slot loads its model again.
CANCEL_GRACE_S = 5.0

log = logging.getLogger("gpuworker.slot")


@attrs.frozen
class Job:
    """What a slot runs."""

    params: dict[str, Value]
    inputs: Mapping[str, EngineInput] = attrs.field(factory=dict)


class Run:
    """A job in a slot, from its start to its end."""

    def __init__(self, emit: Callable[[Chunk], None]) -> None:
        self._emit = emit
        self._fault: RunResult | None = None
        self.end: RunResult | None = None
        self.ended = trio.Event()
        self.cancel_asked = trio.Event()

    def emit(self, chunk: Chunk) -> None:
        """Hand a chunk on. Never raises: what takes it and breaks stops this run, not the slot it came out of."""
        if self._fault is None:
            try:
                self._emit(chunk)
            except Exception as fault:
                log.exception("what the engine made cannot be taken")
                self.fail(fault)

    def fail(self, fault: Exception) -> None:
        """Stop it; it then ends as failed."""
        self._fault = RunResult.failed(
            ErrorCode.ENGINE_FAILED, f"what the engine made cannot be taken: {error_text(fault)}"
        )
        self.cancel_asked.set()

    def finish(self, end: RunResult) -> None:
        """It ended; the first call counts. Whatever ends a run that was asked to stop, it was cancelled."""
        if self.end is None:
            if self._fault is not None:
                end = attrs.evolve(self._fault, restart=end.restart)
            elif end.outcome == "failed" and self.cancel_asked.is_set():
                end = RunResult(outcome="cancelled", restart=end.restart)
            self.end = end
            self.ended.set()


class Slot(ABC):
    """Room for one running request.

    Attributes:
        index: from 0, among the worker's slots.
        ready: its engine is loaded and alive.
        busy: a job runs in it.
        capabilities: of its engine, None until that was loaded once.
        load_fault: why its engine could not be loaded last time; empty when it could.
        on_change: called, in the Trio thread, after each change of `ready`, `busy` or `load_fault`.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.ready = False
        self.capabilities: Capabilities | None = None
        self.load_fault = ""
        self.on_change: Callable[[], None] = lambda: None
        self._run: Run | None = None

    @property
    def name(self) -> str:
        """For people."""
        return f"slot {self.index}"

    @property
    def busy(self) -> bool:
        """Whether a job runs in it."""
        return self._run is not None

    @property
    def stopping(self) -> Run | None:
        """The run in it that was told to stop and has not left yet."""
        return self._run if self._run is not None and self._run.cancel_asked.is_set() else None

    @property
    def free(self) -> bool:
        """Whether `run` may be called now."""
        return self.ready and not self.busy

    @abstractmethod
    async def serve(self) -> None:
        """Load the engine and keep it alive, with a new one after each death; never returns."""

    async def run(self, job: Job, emit: Callable[[Chunk], None]) -> RunResult:
        """Run a job to its end. Only while `free`.

        Args:
            job: its params checked, its inputs whole.
            emit: called in the Trio thread with each chunk, a `FormatChunk` first. It never waits, so the engine
                never waits for a slow reader; what bounds the chunks is whoever keeps them, by calling `cancel`.

        Cancellation: the engine is stopped, by force where there is force; the slot then starts anew.
        """
        assert self.free
        self._run = run = Run(emit)
        self.on_change()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._stop_when_asked, run)
                await self._start(job, run)
                await run.ended.wait()
                nursery.cancel_scope.cancel()
        finally:
            self._run = None
            if run.end is None:
                self._force(run)
            self.on_change()
        assert run.end is not None
        return run.end

    def cancel(self) -> None:
        """Ask the run at hand to stop before its next chunk; `run` then returns within the grace."""
        if self._run is not None:
            self._run.cancel_asked.set()

    @abstractmethod
    async def _start(self, job: Job, run: Run) -> None:
        """Hand the job to the engine."""

    @abstractmethod
    async def _stop_when_asked(self, run: Run) -> None:
        """Wait for `cancel_asked`, pass it on, and use force after the grace."""

    @abstractmethod
    def _force(self, run: Run) -> None:
        """End the run at once, whatever it takes."""

    def _set_ready(self, ready: bool, load_fault: str = "") -> None:
        if (ready, load_fault) != (self.ready, self.load_fault):
            self.ready, self.load_fault = ready, load_fault
            self.on_change()


class ProcessSlot(Slot):
    """A slot whose engine has a process of its own: a crash, a leak or a hang is contained, a hang can be killed.

    Args:
        index: from 0.
        engine: its name in the catalog.
        options: its options, as values.
        loading: held while an engine loads, so that the models of several slots are not read at once.
        load_timeout_s: after so long without a sign of life a load is killed, and tried again.
        cancel_grace_s: from a cancel to the kill.
    """

    def __init__(
        self,
        index: int,
        engine: str,
        options: Mapping[str, OptionValue],
        *,
        loading: trio.Lock | None = None,
        load_timeout_s: float = LOAD_TIMEOUT_S,
        cancel_grace_s: float = CANCEL_GRACE_S,
    ) -> None:
        super().__init__(index)
        self._engine = engine
        self._options = dict(options)
        self._loading = loading or trio.Lock()
        self._load_timeout_s = load_timeout_s
        self._cancel_grace_s = cancel_grace_s
        self._child: EngineProcess | None = None
        self._runs = 0

    async def serve(self) -> None:
        """Load the engine and keep it alive, with a new process after each death."""
        backoff = Backoff(RESTART_FIRST_S, RESTART_LONGEST_S)
        while True:
            async with open_child(self.name) as child:
                if await self._load(child):
                    began = trio.current_time()
                    try:
                        await self._live(child)
                    finally:
                        self._child = None
                        # In this order: the relay must know that the slot is gone before it sees what ran in it fail.
                        self._set_ready(False)
                        if self._run is not None:
                            self._run.finish(RunResult.failed(ErrorCode.ENGINE_FAILED, self._died, retryable=True))
                    backoff.note_uptime(trio.current_time() - began)
            await trio.sleep(backoff.next_s())

    _died = "the worker stopped"

    async def _load(self, child: EngineProcess) -> bool:
        answer: ipc.IpcMessage | None = None
        async with self._loading:
            began = trio.current_time()
            with trio.move_on_after(self._load_timeout_s) as deadline:
                await child.send({"do": "load", "engine": self._engine, "options": self._options})
                while answer is None and (batch := await child.receive()):
                    answer = next((said for said in batch if said["is"] != "progress"), None)
                    deadline.deadline = trio.current_time() + self._load_timeout_s
        if answer is not None and answer["is"] == "ready":
            self.capabilities = ipc.decode_capabilities(answer["capabilities"])
            log.info("%s: %s loaded in %.1f s", self.name, self._engine, trio.current_time() - began)
            self._child = child
            self._set_ready(True)
            return True
        if answer is not None:
            fault = str(answer["message"])
        elif deadline.cancelled_caught:
            fault = f"not loaded within {self._load_timeout_s:g} s; killed (--load-timeout gives it longer)"
        else:
            fault = await child.wait_exit()
        log.error("%s: %s cannot be loaded: %s", self.name, self._engine, fault)
        self._set_ready(False, fault)
        return False

    async def _live(self, child: EngineProcess) -> None:
        self._died = "the worker stopped"
        while batch := await child.receive():
            for said in batch:
                self._on_ipc_message(said)
        self._died = await child.wait_exit()
        log.warning("%s: %s", self.name, self._died)

    def _on_ipc_message(self, said: dict[str, Any]) -> None:
        run = self._run
        try:
            chunk = ipc.decode_chunk(said)
        except ValueError as fault:  # a format that is none
            if run is not None:
                run.fail(fault)
            return
        if chunk is not None:
            if run is not None:
                run.emit(chunk)
        elif said["is"] == "end":
            end = RunResult(**{name: value for name, value in said.items() if name != "is"})
            if end.restart:
                self._set_ready(False)
            if run is not None:
                run.finish(end)

    async def _start(self, job: Job, run: Run) -> None:
        assert self._child is not None
        self._runs += 1
        inputs = {name: attrs.asdict(given) for name, given in job.inputs.items()}
        await self._child.send({"do": "run", "run": self._runs, "params": job.params, "inputs": inputs})

    async def _stop_when_asked(self, run: Run) -> None:
        await run.cancel_asked.wait()
        child = self._child
        if child is None:
            return
        with trio.move_on_after(self._cancel_grace_s):
            await child.send({"do": "cancel", "run": self._runs})
            await trio.sleep_forever()
        log.warning("%s: did not stop within %g s of a cancel; killed", self.name, self._cancel_grace_s)
        child.kill()

    def _force(self, run: Run) -> None:
        if self._child is not None:
            self._child.kill()
