"""`ProcessSlot` runs its engine in a process of its own."""

import logging
from collections.abc import Mapping
from typing import Any

import attrs
import trio

from gpuworker.engines.base import OptionValue
from gpuworker.slots import ipc
from gpuworker.slots.engine_process import EngineProcess, open_child
from gpuworker.slots.run_engine import RunResult
from gpuworker.slots.slot import Job, Run, Slot
from protocol.link.backoff import Backoff
from protocol.wire.errors import ErrorCode

#: Delay between a slot's death and its next process; it doubles, so that a crash loop does not use up the machine.
RESTART_FIRST_S = 0.2
RESTART_LONGEST_S = 60.0
#: Longest silence of a load: a model of some GB takes minutes to read from a slow disk. Downloads give signs of life;
#: a limit on the whole load would kill a slow one again and again, because the hub's library starts over each time.
LOAD_TIMEOUT_S = 900.0
#: Time from a cancel to the kill. Longer than any chunk takes to make, because a killed slot must reload its model.
CANCEL_GRACE_S = 5.0

log = logging.getLogger("gpuworker.slot")


class ProcessSlot(Slot):
    """A slot whose engine has its own process: crashes and leaks are contained, and a hang can be killed.

    Args:
        index: from 0.
        engine: the engine's name in the catalog.
        options: the values of its options.
        loading: held while an engine loads, so that slots do not read their models at the same time.
        load_timeout_s: a load without a sign of life for this long is killed and tried again.
        cancel_grace_s: seconds from a cancel to the kill.
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
                        # In this order: the relay must know that the slot is gone before it sees its run fail.
                        self._set_ready(False)
                        if self._run is not None:
                            end = RunResult.failed(ErrorCode.ENGINE_FAILED, self._died, retryable=True)
                            self._run.finish(attrs.evolve(end, report=child.printed))
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
                    answer = next((message for message in batch if message["is"] != "progress"), None)
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
            fault = f"{await child.wait_exit()}; see its output in the worker's log"
        log.error("%s: %s cannot be loaded: %s", self.name, self._engine, fault)
        self._set_ready(False, fault)
        return False

    async def _live(self, child: EngineProcess) -> None:
        self._died = "the worker stopped"
        while batch := await child.receive():
            for message in batch:
                self._on_ipc_message(message)
        how = await child.wait_exit()
        log.warning("%s: %s", self.name, how)
        self._died = f"{how}; a new one is started; see its output in the worker's log"

    def _on_ipc_message(self, message: dict[str, Any]) -> None:
        run = self._run
        try:
            chunk = ipc.decode_chunk(message)
        except ValueError as fault:  # not a valid format
            if run is not None:
                run.fail(fault)
            return
        if chunk is not None:
            if run is not None:
                run.emit(chunk)
        elif message["is"] == "end":
            end = RunResult(**{name: value for name, value in message.items() if name != "is"})
            if self._child is not None:
                self._child.end_run()
                if end.outcome == "failed":
                    end = attrs.evolve(end, report=self._child.printed or end.report)
            if end.restart:
                self._set_ready(False)
            if run is not None:
                run.finish(end)

    async def _start(self, job: Job, run: Run) -> None:
        assert self._child is not None
        self._runs += 1
        self._child.begin_run(job.context.request_id)
        inputs = {name: attrs.asdict(item) for name, item in job.inputs.items()}
        job_fields = {"params": job.params, "inputs": inputs, "context": attrs.asdict(job.context)}
        await self._child.send({"do": "run", "run": self._runs, **job_fields})

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
