"""`ProcessSlot` runs its engine in a process of its own, or shares one with the worker's other slots."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import trio

from gpuworker.engines.base import OptionValue
from gpuworker.slots import ipc
from gpuworker.slots.engine_process import EngineProcess, open_child
from gpuworker.slots.feed import Feed
from gpuworker.slots.run_engine import RunResult
from gpuworker.slots.slot import Job, Run, Slot
from protocol.link.backoff import HELD_S, Backoff
from protocol.wire.errors import ErrorCode

#: Delay between a process's death and the next one; it doubles, so that a crash loop does not use up the machine.
RESTART_FIRST_S = 0.2
RESTART_LONGEST_S = 60.0
#: Longest silence of a load: a model of some GB takes minutes to read from a slow disk. Downloads give signs of life;
#: a limit on the whole load would kill a slow one again and again, because the hub's library starts over each time.
LOAD_TIMEOUT_S = 900.0
#: Time from a cancel to the kill. Longer than any chunk takes to make, because a killed engine must reload its model.
CANCEL_GRACE_S = 5.0
#: Longest silence of a shared engine while it runs requests. All its listeners wait meanwhile, and the relay takes
#: each of them for hung after 30 s (`idle_timeout_s`), so the process must be known as hung well before.
STALL_TIMEOUT_S = 10.0
#: Time for a worker that was itself stopped (SIGSTOP) to read what its engine sent meanwhile, before it calls it hung.
SECOND_LOOK_S = 0.1
#: What a client is told whose run ended because another's run asked for a new process.
RESTARTED = "the engine had to be started again while it ran this request; see its output in the worker's log"

log = logging.getLogger("gpuworker.slot")


class EngineHost:
    """Keeps an engine's process alive for its slots, with a new process after each death.

    Args:
        engine: the engine's name in the catalog.
        options: the values of its options.
        shared: whether its process serves several slots (`Engine.SHARED`).
        loading: held while an engine loads, so that processes do not read their models at the same time.
        load_timeout_s: a load without a sign of life for this long is killed and tried again.
        cancel_grace_s: seconds from a cancel to the kill.
        stall_timeout_s: a shared engine that streams, and is silent for this long while it runs requests, is killed.

    Attributes:
        slots: its slots, in the order of their places in the process.
        child: the process, once its engine is loaded.
    """

    def __init__(
        self,
        engine: str,
        options: Mapping[str, OptionValue],
        *,
        shared: bool = False,
        loading: trio.Lock | None = None,
        load_timeout_s: float = LOAD_TIMEOUT_S,
        cancel_grace_s: float = CANCEL_GRACE_S,
        stall_timeout_s: float = STALL_TIMEOUT_S,
    ) -> None:
        self.shared = shared
        self.cancel_grace_s = cancel_grace_s
        self.slots: list[ProcessSlot] = []
        self.child: EngineProcess | None = None
        self._engine = engine
        self._options = dict(options)
        self._loading = loading or trio.Lock()
        self._load_timeout_s = load_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._stall = trio.CancelScope()
        self._stalled = False
        #: A run has completed in this process, so that it does not die in a loop.
        self._worked = False
        #: The process runs nothing more, and is killed once its last run has ended.
        self._retiring = False

    @property
    def name(self) -> str:
        """The process's name in the log."""
        first, last = self.slots[0], self.slots[-1]
        return first.name if first is last else f"slots {first.index}-{last.index}"

    async def serve(self) -> None:
        """Load the engine and keep it alive; never returns."""
        backoff = Backoff(RESTART_FIRST_S, RESTART_LONGEST_S)
        while True:
            async with open_child(self.name) as child:
                if await self._load(child):
                    began = trio.current_time()
                    how = "the worker stopped"
                    try:
                        how = await self._live(child)
                    finally:
                        self.child = None
                        self._end_runs(how, printed=child.printed)
                    backoff.note_uptime(HELD_S if self._worked else trio.current_time() - began)
            await trio.sleep(backoff.next_s())

    async def _load(self, child: EngineProcess) -> bool:
        answer: ipc.IpcMessage | None = None
        async with self._loading:
            began = trio.current_time()
            with trio.move_on_after(self._load_timeout_s) as deadline:
                order = {"do": "load", "engine": self._engine, "options": self._options, "seats": len(self.slots)}
                await child.send(order)
                while answer is None and (batch := await child.receive()):
                    answer = next((message for message in batch if message["is"] != "progress"), None)
                    deadline.deadline = trio.current_time() + self._load_timeout_s
        if answer is not None and answer["is"] == "ready":
            capabilities = ipc.decode_capabilities(answer["capabilities"])
            for slot in self.slots:
                slot.capabilities = capabilities
            live = ", ".join(name for name, rule in capabilities.inputs.items() if rule.live)
            more = f"; live inputs: {live}" if live else ""
            log.info("%s: %s loaded in %.1f s%s", self.name, self._engine, trio.current_time() - began, more)
            self.child, self._worked, self._stalled, self._retiring = child, False, False, False
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

    async def _live(self, child: EngineProcess) -> str:
        """Pass messages on until the process has ended; returns how it did, for clients."""
        while batch := await self._receive(child):
            for message in batch:
                self._on_message(child, message)
        how = await child.wait_exit()
        if self._stalled:
            how = f"the engine's process sent nothing for {self._stall_timeout_s:g} s and was killed"
        log.warning("%s: %s", self.name, how)
        return f"{how}; a new one is started; see its output in the worker's log"

    async def _receive(self, child: EngineProcess) -> list[ipc.IpcMessage]:
        """The next messages; empty if the process has ended, or stalled and was killed."""
        if not self.shared:
            return await child.receive()
        with trio.CancelScope() as self._stall:
            self.watch_for_stall()
            return await child.receive()
        with trio.move_on_after(SECOND_LOOK_S):
            return await child.receive()
        self._stalled = True
        child.kill()
        return []

    def watch_for_stall(self) -> None:
        """Allow `stall_timeout_s` until the next message if something runs and does not wait for its live input.

        Called at each message, at a start, and when a piece of a live input is sent.
        """
        capabilities = self.slots[0].capabilities
        runs = capabilities is not None and capabilities.streams and any(slot.works for slot in self.slots)
        if not runs:
            self._stall.deadline = math.inf
        elif self._stall.deadline == math.inf:
            self._stall.deadline = trio.current_time() + self._stall_timeout_s

    def _on_message(self, child: EngineProcess, message: dict[str, Any]) -> None:
        slot = self.slots[message["slot"]]
        slot.heard_at = trio.current_time()
        run = slot.live_run
        try:
            chunk = ipc.decode_chunk(message)
        except ValueError as fault:  # not a valid format
            if run is not None:
                run.fail(fault)
            return
        if chunk is not None:
            slot.asks = None
            if run is not None:
                run.emit(chunk)
        elif message["is"] == "asks":
            slot.on_ask(message["run"], message["name"], message["taken"])
        elif message["is"] == "end":
            end = RunResult(**{name: value for name, value in message.items() if name not in ("is", "slot")})
            self._on_end(child, slot, end)

    def _on_end(self, child: EngineProcess, slot: "ProcessSlot", end: RunResult) -> None:
        run = slot.live_run
        self._worked |= end.outcome == "completed"
        if not self.shared:
            child.end_run()
            if end.outcome != "completed":
                end = attrs.evolve(end, report=child.printed or end.report)
        if end.restart:
            self._end_runs(RESTARTED, slot, end)  # the process ends by itself
        elif slot.abandoned:  # it has stopped after all
            slot.abandoned = False
            self._set_ready(not self._retiring, slots=[slot])
        elif run is not None:
            others_run = self._others_run(slot)
            if not others_run and any(each.abandoned for each in self.slots):
                self._retire()  # before the relay hears of the end, and assigns another
            run.finish(end)
            if self._retiring and not others_run:
                child.kill()

    def abandon(self, slot: "ProcessSlot", asked_at: float) -> bool:
        """Take a slot out of service that does not stop, if others have gone on since: a kill would end their runs.

        A process that has lost half of its slots so starts no more runs, and is started again after the last one.

        Args:
            slot: a slot with a run.
            asked_at: when it was asked to stop, in Trio time.
        """
        goes_on = any(each.heard_at > asked_at for each in self.slots if each is not slot)
        if not (goes_on and self._others_run(slot)):
            return False
        slot.abandoned = True
        if 2 * sum(each.abandoned for each in self.slots) >= len(self.slots):
            self._retire()
        else:
            self._set_ready(False, slots=[slot])
        return True

    def _others_run(self, slot: "ProcessSlot") -> bool:
        return any(each.live_run for each in self.slots if each is not slot)

    def _retire(self) -> None:
        self._retiring = True
        self._set_ready(False)

    def _end_runs(
        self,
        why: str,
        reporter: "ProcessSlot | None" = None,
        reported: RunResult | None = None,
        *,
        printed: str = "",
    ) -> None:
        """End all runs, because their process has ended or is about to.

        If there are several, nobody knows whose fault it is. Those that had made something worked until then, so they
        are called innocent; it was more likely one that the engine had just begun with.

        Args:
            why: the reason, for clients.
            reporter: the slot whose run asked for a new process, if one did.
            reported: how that run ended. If it says that it is innocent, nobody is to blame.
            printed: for operators, what the run of an engine that is not shared printed.
        """
        # In this order: the relay must know that the slots are gone before it sees their runs fail.
        self._set_ready(False)
        runs = [(slot, slot.live_run) for slot in self.slots]
        blameless = reported is not None and reported.details.get("innocent") is True
        several = sum(run is not None or slot.abandoned for slot, run in runs) > 1
        for slot, run in runs:
            slot.abandoned = False
            if run is None:
                continue
            end = attrs.evolve(RunResult.failed(ErrorCode.ENGINE_FAILED, why, retryable=True), report=printed)
            if slot is reporter and reported is not None:
                end = reported
            if self.shared:
                innocent = blameless or (several and run.made_something)
                end = attrs.evolve(
                    end, details=end.details | {"innocent": innocent}, retryable=end.retryable or innocent
                )
            run.finish(end)

    def _set_ready(self, ready: bool, load_fault: str = "", slots: "Sequence[ProcessSlot] | None" = None) -> None:
        """Set it for all slots, or for some, before anyone hears of it: the relay is told once."""
        changed = [s for s in slots or self.slots if (s.ready, s.load_fault) != (ready, load_fault)]
        for slot in changed:
            slot.ready, slot.load_fault = ready, load_fault
        for slot in changed:
            slot.on_change()


class ProcessSlot(Slot):
    """A slot whose engine has a process: crashes and leaks are contained, and a hang can be killed.

    Args:
        index: from 0.
        host: keeps the process. Several slots may have the same one, if its engine is shared.

    Attributes:
        host: as given.
        heard_at: when its last message came, in Trio time.
        abandoned: it is out of service, because its last run was cancelled and has not stopped.
        asks: the live input of which its engine wants more; None once that goes on.
    """

    def __init__(self, index: int, host: EngineHost) -> None:
        super().__init__(index)
        self.shared = host.shared
        self.heard_at = -math.inf
        self.abandoned = False
        self.asks: Feed | None = None
        self.host = host
        self._place = len(host.slots)
        self._runs = 0
        self._feeds: Mapping[str, Feed] = {}
        host.slots.append(self)

    @property
    def live_run(self) -> Run | None:
        """The run that has not ended."""
        return self._run if self._run is not None and self._run.end is None else None

    @property
    def works(self) -> bool:
        """Whether it has a run that could send something: one that waits for its live input cannot."""
        return self.live_run is not None and (self.asks is None or not self.asks.starves)

    def on_ask(self, run: int, name: str, taken: int) -> None:
        """Its engine has taken this many bytes of a live input, and wants more; a run before may ask belatedly."""
        if self.live_run is not None and run == self._runs and (feed := self._feeds.get(name)) is not None:
            self.asks = feed
            feed.note_taken(taken)

    async def serve(self) -> None:
        """Keep the engine alive; of several slots with one process, the first does."""
        if self.host.slots[0] is self:
            await self.host.serve()
        await trio.sleep_forever()

    async def _start(self, job: Job, run: Run) -> None:
        child = self.host.child
        assert child is not None
        self._runs += 1
        self._feeds, self.asks = job.feeds, None
        if not self.shared:  # what seats of one process print cannot be told apart
            child.begin_run(job.context.request_id)
        self.host.watch_for_stall()
        inputs = {name: attrs.asdict(item) for name, item in job.inputs.items()}
        live = {name: feed.media_type for name, feed in job.feeds.items()}
        job_fields = {"params": job.params, "inputs": inputs, "live": live, "context": attrs.asdict(job.context)}
        await child.send({"do": "run", "slot": self._place, "run": self._runs, **job_fields})

    def _feed(self, name: str, data: bytes, last: bool) -> None:
        if (child := self.host.child) is not None:
            piece = {"name": name, "data": data, "last": last}
            child.post({"do": "feed", "slot": self._place, "run": self._runs, **piece})
            self.host.watch_for_stall()

    async def _stop_when_asked(self, run: Run) -> None:
        await run.cancel_asked.wait()
        asked_at = trio.current_time()
        child, grace_s = self.host.child, self.host.cancel_grace_s
        if child is None:
            return
        is_sent = False
        with trio.move_on_after(grace_s):
            await child.send({"do": "cancel", "slot": self._place, "run": self._runs})
            is_sent = True
            await trio.sleep_forever()
        if run.end is not None:
            return  # it ended in the very last moment
        if is_sent and self.host.abandon(self, asked_at):  # half a message would mix with the next one
            log.warning("%s: did not stop within %g s of a cancel; out of service until it does", self.name, grace_s)
            run.finish(RunResult(outcome="cancelled"))
        else:
            log.warning("%s: did not stop within %g s of a cancel; killed", self.name, grace_s)
            child.kill()

    def _force(self, run: Run) -> None:
        if self.host.child is not None:
            self.host.child.kill()
